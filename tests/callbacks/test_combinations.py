"""Methods side by side: those that go together train the union and live on in files; the others are refused."""

from __future__ import annotations

import copy
import functools
import itertools
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from foreign import BERT, CLASSES, BertInInit, Classifier, make, small, trainer
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import lightning_ft
from lightning_ft import (
    IA3,
    Adapter,
    BitFit,
    FullFineTuning,
    GradualUnfreezing,
    HeadOnly,
    InjectionError,
    LayerNormTuning,
    LoRA,
    TopLayers,
)
from lightning_ft.callbacks.checkpoint_io import METADATA
from lightning_ft.callbacks.finetuning import FineTuning
from lightning_ft.injection import injected_modules, injected_names

TOGETHER: dict[str, list[FineTuning]] = {
    "lora, some biases": [LoRA(r=2), BitFit(["query", "LayerNorm"])],
    "bitfit, layernorm": [BitFit(), LayerNormTuning()],
    "ia3, bitfit": [IA3(), BitFit()],
    "lora, ia3, bitfit, layernorm": [LoRA(r=2, target_modules=["query"]), IA3(), BitFit(), LayerNormTuning()],
    "lora, bitfit, pooler": [LoRA(r=2), BitFit(modules_to_save=["pooler"])],
}
each_combination = pytest.mark.parametrize("names", TOGETHER)


def methods(names: str) -> list[FineTuning]:
    return [copy.copy(method) for method in TOGETHER[names]]


def training(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def trained_by(*of: FineTuning, kind: type[Classifier] = BertInInit) -> set[str]:
    module = make(kind)
    for method in of:
        method.inject(module)
    return training(module)


def fitted(names: str, epochs: int = 2, backwards: bool = False, **more: Any) -> tuple[Any, BertInInit]:
    module, callbacks = make(BertInInit), methods(names)
    run = trainer(*(reversed(callbacks) if backwards else callbacks), max_epochs=epochs)
    run.fit(module, **more)
    return run, module


@functools.cache
def trained(names: str) -> BertInInit:
    _, module = fitted(names)
    module.trainer = None
    return module


def output(module: Any) -> Tensor:
    module.eval()
    with torch.no_grad():
        return module.outputs(module.example())


def same(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return set(states[0]) == set(states[1]) and all(torch.equal(v, states[1][k]) for k, v in states[0].items())


# ------------------------------------------------------------------------------------------ those that go together


@each_combination
def test_the_union_trains_and_their_order_does_not_matter(names: str) -> None:
    of = TOGETHER[names]
    union = set().union(*(trained_by(method) for method in of))
    assert {frozenset(trained_by(*order)) for order in itertools.permutations(of)} == {frozenset(union)}
    before = make(BertInInit).state_dict()
    one, (_, other) = trained(names), fitted(names, backwards=True)
    assert same(one, other)
    assert training(one) == union
    for name, parameter in one.named_parameters():
        assert name not in before or torch.equal(parameter, before[name]) != (name in union), name


@each_combination
def test_a_checkpoint_resumes_exactly_and_loads(names: str, tmp_path: Path) -> None:
    run, module = fitted(names, epochs=1)
    run.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt")
    assert set(saved["state_dict"]) == training(module)
    assert [r["method"] for r in saved[METADATA]] == [type(method).__name__ for method in TOGETHER[names]]
    torch.manual_seed(7)
    loaded = lightning_ft.load_from_checkpoint(BertInInit, tmp_path / "x.ckpt")
    assert same(loaded, module)
    assert training(loaded) == training(module)
    torch.manual_seed(8)
    _, resumed = fitted(names, epochs=3, ckpt_path=tmp_path / "x.ckpt")
    assert same(resumed, fitted(names, epochs=3)[1])


@each_combination
def test_a_folder_carries_all_that_was_learnt(names: str, tmp_path: Path) -> None:
    module = trained(names)
    lightning_ft.save_adapter(module, tmp_path / "a")
    fresh = make(BertInInit)
    nn.init.normal_(fresh.model.classifier.weight)
    lightning_ft.load_adapter(fresh, tmp_path / "a")
    assert same(fresh, module)
    assert training(fresh) == training(module)
    lightning_ft.save_adapter(fresh, tmp_path / "b")
    trainer(*methods(names), max_epochs=1).fit(fresh)  # the same methods go on
    assert training(fresh) == training(module)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@each_combination
def test_stock_peft_loads_those_with_one_method_of_its_own(names: str, tmp_path: Path) -> None:
    module = copy.deepcopy(trained(names))
    lightning_ft.save_adapter(module, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    card = (tmp_path / "README.md").read_text()
    kinds = {mixin.method for _, layer in injected_modules(module) for mixin in layer._mixins}
    if len(kinds) != 1:
        assert config["peft_type"] == ("COMBINED" if kinds else "PARTIAL")
        assert "PeftModel." not in card
        return
    assert [config["peft_type"]] == [*kinds]
    assert "PeftModel." in card
    if names.startswith("lora, bitfit"):
        assert config["bias"] == "all"
    bare = make(BertInInit)
    bare.model = peft.PeftModel.from_pretrained(bare.model, tmp_path)
    torch.testing.assert_close(output(bare), output(module), atol=1e-5, rtol=1e-5)


@each_combination
def test_merging_keeps_the_outputs_and_gives_the_tree_back(names: str) -> None:
    original, module = make(BertInInit), copy.deepcopy(trained(names))
    before = output(module)
    lightning_ft.merge(module)
    torch.testing.assert_close(output(module), before, atol=1e-6, rtol=1e-5)
    assert [(n, type(m)) for n, m in module.named_modules()] == [(n, type(m)) for n, m in original.named_modules()]
    assert training(module) == set(module.state_dict())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("whole", "adding", "part"),
    [
        (LayerNormTuning(modules_to_save=["pooler"]), LoRA(r=2, target_modules="all-linear"), "pooler"),
        (BitFit(modules_to_save=["encoder.layer.1"]), LoRA(r=2), "encoder.layer.1"),
        (BitFit(modules_to_save=["encoder.layer.1"]), Adapter("houlsby"), "encoder.layer.1"),
        (LoRA(r=2, modules_to_save=["encoder.layer.1"]), IA3(["key"], []), "encoder.layer.1"),
    ],
    ids=["layernorm, lora", "bitfit, lora", "bitfit, adapter", "lora, ia3"],
)
def test_what_one_trains_whole_the_other_leaves_out(
    whole: FineTuning, adding: FineTuning, part: str, tmp_path: Path
) -> None:
    module = make(BertInInit)
    trainer(copy.copy(whole), copy.copy(adding), max_epochs=1).fit(module)
    other = make(BertInInit)
    trainer(copy.copy(adding), copy.copy(whole), max_epochs=1).fit(other)
    assert same(module, other), "their order doesn't matter"
    adapted = {name for name in injected_names(module) if not name.startswith(f"model.bert.{part}.")}
    assert adapted == injected_names(module)
    assert all(p.requires_grad for p in module.model.bert.get_submodule(part).parameters())
    lightning_ft.save_adapter(module, tmp_path)
    fresh, stock = make(BertInInit), make(BertInInit)
    lightning_ft.load_adapter(fresh, tmp_path)
    assert same(fresh, module)
    assert training(fresh) == training(module)
    if json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA":
        stock.model = peft.PeftModel.from_pretrained(stock.model, tmp_path)
        torch.testing.assert_close(output(stock), output(module), atol=1e-5, rtol=1e-5)


def test_what_carries_something_is_not_trained_whole_after_it() -> None:
    module = make(BertInInit)
    LoRA(r=2, target_modules="all-linear").inject(module)
    before = snapshot(module)
    with pytest.raises(
        InjectionError, match=r"LayerNormTuning is to train .*pooler\.dense' whole.*carries LORA already"
    ):
        LayerNormTuning(modules_to_save=["pooler"]).inject(module)
    assert snapshot(module) == before
    module = make(BertInInit)
    BitFit(modules_to_save=["pooler"]).inject(module)
    before = snapshot(module)
    with pytest.raises(InjectionError, match=r"Nothing is left for LoRA: another method.*pooler"):
        LoRA(r=2, target_modules=["pooler.dense"]).inject(module)
    assert snapshot(module) == before


def test_a_second_method_may_come_in_a_later_fit() -> None:
    _, module = fitted("ia3, bitfit", epochs=1)
    trainer(LayerNormTuning(), max_epochs=1).fit(module)
    assert training(module) == trained_by(*TOGETHER["ia3, bitfit"], LayerNormTuning())


# ----------------------------------------------------------------------------------------------- those that do not


def snapshot(module: nn.Module) -> list[Any]:
    modules = [(name, type(m), set(vars(m))) for name, m in module.model.named_modules()]
    return [modules, [(name, p.requires_grad) for name, p in module.named_parameters()]]


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(
    ("alone", "other"),
    [(HeadOnly(), LoRA(r=2)), (FullFineTuning(), BitFit()), (TopLayers(1), LoRA(r=2)), (GradualUnfreezing(), BitFit())],
)
def test_one_that_decides_alone_is_refused_beside_another(
    other: FineTuning, alone: FineTuning, backwards: bool
) -> None:
    module, pair = make(BertInInit), [alone, other]
    before, name = snapshot(module), type(alone).__name__
    with pytest.raises(InjectionError, match=rf"{name} says of all parameters of the base.*can't be combined.*{name}"):
        trainer(*(reversed(pair) if backwards else pair)).fit(module)
    assert snapshot(module) == before


@pytest.mark.parametrize(
    ("alone", "earlier"),
    [
        (HeadOnly(), LoRA(r=2)),
        (TopLayers(1), BitFit()),
        (GradualUnfreezing(), LoRA(r=2)),
        (GradualUnfreezing(max_layers=1), LayerNormTuning(modules_to_save=["embeddings"])),  # which it doesn't train
    ],
)
def test_and_after_another_unless_it_is_merged(earlier: FineTuning, alone: FineTuning) -> None:
    module = make(BertInInit)
    earlier.inject(module)
    before = snapshot(module)
    with pytest.raises(InjectionError, match=r"go on training.*Merge"):
        alone.inject(module)
    assert snapshot(module) == before
    lightning_ft.merge(module)
    alone.inject(module)
    assert training(module) == trained_by(alone)


@pytest.mark.parametrize("alone", [HeadOnly(), TopLayers(1), FullFineTuning()])
def test_it_goes_on_over_its_own_folder_and_over_no_others(alone: FineTuning, tmp_path: Path) -> None:
    module = make(BertInInit)
    trainer(alone, max_epochs=1).fit(module)
    lightning_ft.save_adapter(module, tmp_path)
    fresh = make(BertInInit)
    lightning_ft.load_adapter(fresh, tmp_path)
    trainer(copy.copy(alone), max_epochs=1).fit(fresh)
    assert training(fresh) == training(module)
    if not isinstance(alone, HeadOnly):
        again = make(BertInInit)
        lightning_ft.load_adapter(again, tmp_path)
        with pytest.raises(InjectionError, match=r"go on training.*Merge"):
            HeadOnly().inject(again)


@pytest.mark.parametrize("backwards", [False, True])
def test_two_that_act_on_the_same_weights_are_refused_and_neither_goes_in(backwards: bool) -> None:
    module, pair = make(BertInInit), [LoRA(r=2, target_modules=["key", "query"]), IA3()]
    before = snapshot(module)
    with pytest.raises(
        InjectionError, match=r"key' already carries (LORA|IA3), and (IA3|LORA) would act on its weights"
    ):
        trainer(*(reversed(pair) if backwards else pair)).fit(module)
    assert snapshot(module) == before


# ------------------------------------------------------------------------------------------------- two backbones


class TwoTowers(Classifier):
    """A text and a vision model under one head."""

    def __init__(self) -> None:
        super().__init__()
        self.text = BertModel(small(BertConfig, **BERT), add_pooling_layer=False)
        self.vision = nn.Sequential(nn.Linear(7, 16), nn.Tanh(), nn.Linear(16, 16), nn.LayerNorm(16))
        self.head = nn.Linear(32, CLASSES)

    def outputs(self, x: Tensor) -> Tensor:
        pixels = x.float() / 50
        return self.head(torch.cat([self.text(input_ids=x).last_hidden_state.mean(1), self.vision(pixels)], dim=1))


TOWERS = {
    "lora, lora": [LoRA(r=2, backbone="text"), LoRA(r=3, alpha=6, backbone="vision", target_modules="all-linear")],
    "bitfit, lora": [BitFit(backbone="text"), LoRA(r=3, backbone="vision", target_modules="all-linear")],
    "head, lora": [HeadOnly(backbone="text"), LoRA(r=3, backbone="vision", target_modules="all-linear")],
    "single layers": [
        LoRA(r=2, backbone="text.encoder.layer.0.output.dense"),
        BitFit(backbone="text.encoder.layer.1.output.dense"),
    ],
}


@pytest.mark.parametrize("names", TOWERS)
def test_two_backbones_each_with_its_method(names: str, tmp_path: Path) -> None:
    of, original = TOWERS[names], make(TwoTowers)

    def fit(epochs: int, **more: Any) -> tuple[Any, TwoTowers]:
        module = make(TwoTowers)
        run = trainer(*map(copy.copy, of), max_epochs=epochs)
        run.fit(module, **more)
        return run, module

    run, module = fit(1)
    every = {name for name, _ in original.named_parameters()}
    left_alone = {name for name in every if not any(name.startswith(f"{m.backbone}.") for m in of)}
    expected = set().union(*({n for n in trained_by(m, kind=TwoTowers) if n.startswith(m.backbone)} for m in of))
    assert training(module) == expected | left_alone
    run.save_checkpoint(tmp_path / "x.ckpt")
    assert set(torch.load(tmp_path / "x.ckpt")["state_dict"]) == training(module)
    torch.manual_seed(7)
    assert same(lightning_ft.load_from_checkpoint(TwoTowers, tmp_path / "x.ckpt"), module)
    assert same(fit(3, ckpt_path=tmp_path / "x.ckpt")[1], fit(3)[1])

    for method in of:
        lightning_ft.save_adapter(module, tmp_path / method.backbone, backbone=method.backbone)
    for order in (of, of[::-1]):
        fresh = make(TwoTowers)
        for method in order:
            lightning_ft.load_adapter(fresh, tmp_path / method.backbone, backbone=method.backbone)
        assert same(fresh, module)
        assert training(fresh) == training(module)

    before = output(module)
    lightning_ft.merge(module)
    torch.testing.assert_close(output(module), before, atol=1e-6, rtol=1e-5)
    assert training(module) == every
    assert not injected_names(module)
