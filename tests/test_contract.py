"""What every method must hold. A new method gets all of this by its line in METHODS."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from foreign import BERT, BertInInit, make, small, trainer
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

import lightning_ft
from lightning_ft import (
    IA3,
    AdaLoRA,
    Adapter,
    BitFit,
    Doctor,
    FullFineTuning,
    GradientCheckpointing,
    GradualUnfreezing,
    HeadOnly,
    LayerNormTuning,
    LoRA,
    PrefixTuning,
    PromptTuning,
    PTuning,
    TopLayers,
    adapters,
)
from lightning_ft.apps.paths import conf_dir
from lightning_ft.callbacks.finetuning import FineTuning, count_parameters
from lightning_ft.injection import Injected, injected_names

METHODS: dict[str, FineTuning] = {
    "lora": LoRA(r=2, target_modules="all-linear"),
    "dora": LoRA(r=2, use_dora=True, rank_pattern={"query": 3}),
    "rslora": LoRA(r=2, use_rslora=True, bias="lora_only"),
    "pissa": LoRA(r=2, init_lora_weights="pissa"),
    "olora": LoRA(r=2, init_lora_weights="olora", use_rslora=True),
    "loraplus": LoRA(r=2, loraplus_lr_ratio=16.0),
    "adalora": AdaLoRA(init_r=4, target_r=2, target_modules="all-linear"),
    "adapter": Adapter(bottleneck=3),
    "houlsby": Adapter("houlsby", non_linearity="gelu"),
    "parallel_adapter": Adapter("parallel"),
    "ia3": IA3(),
    "bitfit": BitFit(),
    "layernorm": LayerNormTuning(),
    "top_layers": TopLayers(k=1),
    "gradual_unfreezing": GradualUnfreezing(),
    "prompt": PromptTuning(num_virtual_tokens=4),
    "p_tuning": PTuning(num_virtual_tokens=4, encoder_hidden_size=8),
    "prefix": PrefixTuning(num_virtual_tokens=4),
    "full": FullFineTuning(),
    "head": HeadOnly(),
}
"""A method by the name of its config, with settings for a tiny model."""

each_method = pytest.mark.parametrize("name", METHODS)
"""For what needs a training; what doesn't is quick, and held in one test by all of them."""


def those_that(hold: Callable[[FineTuning], bool]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", [name for name, method in METHODS.items() if hold(method)])


def acts_on_weights_alone(method: FineTuning) -> bool:
    return all(layer.acts_on == "weights" for layer in method.layers)


def acts_on_inputs(method: FineTuning) -> bool:
    return any(layer.acts_on == "inputs" for layer in method.layers)


def method(name: str) -> FineTuning:
    return copy.copy(METHODS[name])


def injected(name: str) -> BertInInit:
    module = make(BertInInit)
    method(name).inject(module)
    return module


@functools.cache
def trained(name: str) -> BertInInit:
    module = make(BertInInit)
    trainer(method(name), max_epochs=3).fit(module)
    module.trainer = None
    return module


def fitted(name: str) -> BertInInit:
    """A module after three epochs, to do with as one likes."""
    return copy.deepcopy(trained(name))


def output(module: Any) -> Tensor:
    module.eval()
    with torch.no_grad():
        return module.outputs(module.example())


def training(module: torch.nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def test_every_method_is_under_contract() -> None:
    assert {type(m) for m in METHODS.values()} == set(adapters.METHODS)
    assert {path.stem for path in (conf_dir() / "method").glob("*.yaml")} == set(METHODS)


def test_every_config_is_a_constructor_call() -> None:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        configs = {name: compose("train", [f"method={name}"]).method for name in METHODS}
    for name, ours in METHODS.items():
        config = configs[name]
        assert type(instantiate(config, _convert_="all")) is type(ours), name
        # as lightning-hydra-template and others pass their callbacks
        assert instantiate({"_target_": "builtins.dict"}, callbacks=[ours])["callbacks"][0] is ours, name


@pytest.mark.parametrize(
    ("method", "least", "most"),
    [
        (FullFineTuning(), 1, 1),
        (LoRA(r=8, target_modules="attention"), 0.001, 0.01),
        (AdaLoRA(target_modules="attention"), 0.001, 0.01),
        (Adapter(), 0.02, 0.04),
        (Adapter("houlsby"), 0.02, 0.04),
        (Adapter("parallel"), 0.02, 0.04),
        (PromptTuning(num_virtual_tokens=20), 0.0001, 0.001),
        (BitFit(), 0.0005, 0.001),
        (IA3(), 0.0005, 0.001),
        (HeadOnly(), 0.00001, 0.0001),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, FineTuning) else "",
)
def test_the_share_that_trains_of_bert_base_is_as_published(method: FineTuning, least: float, most: float) -> None:
    with torch.device("meta"):  # 110M parameters, of which only the shapes matter
        model = BertForSequenceClassification(BertConfig())
    method.inject(model)
    total, trained = count_parameters(model)
    assert least <= trained / total <= most


def test_arguments_are_kept_under_their_own_names_as_plain_values() -> None:
    for name, ours in METHODS.items():
        arguments = ours.record()["arguments"]
        assert set(arguments) == set(inspect.signature(type(ours)).parameters), name
        assert type(ours)(**json.loads(json.dumps(arguments))).record() == ours.record(), name


def test_at_the_start_outputs_are_the_bases() -> None:
    before = output(make(BertInInit))
    for name, ours in METHODS.items():
        assert acts_on_inputs(ours) != torch.equal(output(injected(name)), before), name


def test_injecting_twice_is_injecting_once() -> None:
    for name in METHODS:
        module = make(BertInInit)
        first = method(name).inject(module)
        trains, before = training(module), state(module)
        assert method(name).inject(module) == first, name
        assert training(module) == trains, name
        assert all(torch.equal(before[key], value) for key, value in module.state_dict().items()), name


def test_the_base_keeps_its_classes_weights_signatures_and_keys() -> None:
    original = make(BertInInit)
    for name in METHODS:
        module = injected(name)
        for (path, ours), (_, theirs) in zip(module.named_modules(), original.named_modules(), strict=True):
            assert isinstance(ours, type(theirs)), (name, path)
            assert inspect.signature(ours.forward) == inspect.signature(theirs.forward)
            assert getattr(ours, "weight", None) is None or torch.equal(ours.weight, theirs.weight)  # type: ignore[arg-type]
        result = module.load_state_dict(original.state_dict(), strict=False)
        assert (set(result.missing_keys), result.unexpected_keys) == (injected_names(module), []), name


@each_method
def test_what_is_frozen_stays_and_what_trains_moves(name: str) -> None:
    before, module = make(BertInInit).state_dict(), fitted(name)
    added = injected_names(module)
    for key, parameter in module.named_parameters():
        if key not in added:
            assert torch.equal(parameter, before[key]) != parameter.requires_grad, key
    assert set(module.state_dict()) == set(before) | added


@each_method
def test_resume_is_exact_and_the_checkpoint_has_only_what_trains(name: str, tmp_path: Path) -> None:
    def fit(module: BertInInit, **more: Any) -> BertInInit:
        # Saved in the middle: what a method does when training ends is still to come.
        each_epoch = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        trainer(method(name), each_epoch, max_epochs=3, enable_checkpointing=True).fit(module, **more)
        return module

    whole, path = fit(make(BertInInit)), tmp_path / "epoch=0.ckpt"
    saved = torch.load(path)["state_dict"]
    resumed = make(BertInInit)
    torch.manual_seed(5)
    fit(resumed, ckpt_path=path)
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())
    assert set(saved) == training(whole) | injected_names(whole)


@each_method
def test_load_from_checkpoint_restores_the_module(name: str, tmp_path: Path) -> None:
    run, module = trainer(method(name), max_epochs=1), make(BertInInit)
    run.fit(module)
    run.save_checkpoint(tmp_path / "x.ckpt")
    torch.manual_seed(7)
    loaded = lightning_ft.load_from_checkpoint(BertInInit, tmp_path / "x.ckpt")
    assert torch.equal(output(loaded), output(module))
    assert training(loaded) == training(module)


@each_method
def test_an_adapter_folder_carries_all_that_was_learnt(name: str, tmp_path: Path) -> None:
    module = fitted(name)
    lightning_ft.save_adapter(module, tmp_path / "adapter")
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "README.md",
    }  # fmt: skip
    fresh = make(BertInInit)
    torch.nn.init.normal_(fresh.model.classifier.weight)  # a new head is another one
    lightning_ft.load_adapter(fresh, tmp_path / "adapter")
    torch.testing.assert_close(output(fresh), output(module), atol=1e-6, rtol=1e-6)


@those_that(acts_on_weights_alone)
def test_merging_keeps_the_outputs_and_gives_the_tree_back(name: str) -> None:
    original, module = make(BertInInit), fitted(name)
    before = output(module)
    lightning_ft.merge(module)
    torch.testing.assert_close(output(module), before, atol=1e-6, rtol=1e-5)
    assert [(n, type(m)) for n, m in module.named_modules()] == [(n, type(m)) for n, m in original.named_modules()]
    assert list(module.state_dict()) == list(original.state_dict())
    assert lightning_ft.merge(module) == []


@those_that(lambda method: bool(method.layers) and acts_on_weights_alone(method))
def test_a_reversible_merge_is_undone_to_the_bit_and_training_goes_on(name: str) -> None:
    module, untouched = fitted(name), fitted(name)
    outputs, parameters = output(module), list(module.parameters())
    merged = lightning_ft.merge(module.model, reversible=True)
    assert list(module.state_dict()) == list(make(BertInInit).state_dict())
    for model in (copy.deepcopy(module.model), pickle.loads(pickle.dumps(module.model)), module.model):
        assert lightning_ft.unmerge(model) == merged
        for (key, one), (other, two) in zip(
            model.state_dict().items(), untouched.model.state_dict().items(), strict=True
        ):
            assert key == other
            assert torch.equal(one, two)
        assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in untouched.model.parameters()]
    assert torch.equal(output(module), outputs)
    assert all(one is two for one, two in zip(module.parameters(), parameters, strict=True)), "an optimizer holds them"
    for model in (module, untouched):
        torch.manual_seed(3)
        trainer(method(name), max_epochs=1).fit(model.train())
    assert all(torch.equal(one, two) for one, two in zip(module.parameters(), untouched.parameters(), strict=True))
    with pytest.raises(lightning_ft.InjectionError, match=r"merged for good, or never.*reversible=True"):
        lightning_ft.unmerge(module)


def test_a_merge_that_cannot_be_is_refused_and_changes_nothing() -> None:
    for module in (fitted(name) for name, method in METHODS.items() if not acts_on_weights_alone(method)):
        before, outputs = state(module), output(module)
        with pytest.raises(NotImplementedError, match="can't be merged"):
            lightning_ft.merge(module)
        assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
        assert torch.equal(output(module), outputs)


def test_a_model_can_be_copied_and_pickled() -> None:
    for model in (trained(name).model for name in METHODS):
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
            assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
            assert training(again) == training(model)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_what_is_injected_stays_in_its_dtype_under_every_precision(precision: str, tmp_path: Path) -> None:
    of_base = torch.float32 if precision == "bf16-mixed" else torch.bfloat16
    for name, dtype in itertools.product(METHODS, ("float32", "bfloat16")):
        module, callback = make(BertInInit), method(name)
        callback.adapter_dtype = dtype  # type: ignore[assignment]
        run = trainer(callback, max_epochs=1, precision=precision)
        run.fit(module)
        added = injected_names(module)
        held = {p.dtype for n, p in module.state_dict().items() if n in added}
        assert held <= {getattr(torch, dtype)}, name
        assert {p.dtype for n, p in module.named_parameters() if n not in added} == {of_base}, name
        assert module.outputs(module.example()).isfinite().all(), name
        if added and dtype == "bfloat16" and precision == "bf16-mixed":
            run.save_checkpoint(tmp_path / f"{name}.ckpt")
            torch.manual_seed(7)
            again = lightning_ft.load_from_checkpoint(BertInInit, tmp_path / f"{name}.ckpt")
            assert {p.dtype for n, p in again.state_dict().items() if n in added} == {torch.bfloat16}, name
            assert torch.equal(output(again), output(module)), name


COMMON = {*dir(Injected), *inspect.get_annotations(Injected), "forward"}
"""What every layer has, and surgery reads from the layer that it is about."""


def test_methods_that_share_a_module_share_no_names() -> None:
    """Their layers are mixed into one class: what one calls its own, another mustn't have too."""
    own: dict[str, dict[str, str]] = {}
    for method in METHODS.values():
        for layer in method.layers:
            names = {name for kind in layer.__mro__ for name in vars(kind)} - COMMON
            own.setdefault(layer.acts_on, {}).update(dict.fromkeys(names, layer.__name__))
    for one, other in itertools.combinations(own.values(), 2):
        assert not {name: (one[name], other[name]) for name in set(one) & set(other) if not name.startswith("__")}


def test_the_doctor_finds_every_method_well_at_its_own_rate_and_not_at_another() -> None:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        rates = compose("train").rates
    for name in METHODS:
        low, high = METHODS[name].plausible_lr
        for lr in (rates[name], low / 2, 2 * high):
            module, doctor = make(BertInInit), Doctor()
            module.configure_optimizers = lambda m=module, lr=lr: torch.optim.AdamW(m.parameters(), lr=lr)  # type: ignore[method-assign]
            with warnings.catch_warnings():
                if lr != rates[name]:
                    warnings.filterwarnings("ignore", "Doctor: 1 fault after the first step")
                trainer(doctor, method(name), max_steps=1).fit(module)
            assert doctor.report is not None
            assert [f for f in doctor.report.faults if "learning rate" not in f] == [], name
            assert bool(doctor.report.faults) == (lr != rates[name]), (name, lr)
            tensors = int(doctor.report.facts.split()[0])
            waiting = {p for m in [METHODS[name]] if isinstance(m, GradualUnfreezing) for p in m.waiting(module, 0)}
            assert tensors == sum(p.requires_grad and p not in waiting for p in module.parameters()), name


class Watch(Callback):
    """Keeps the gradients of the first step, and counts the calls of the last layer's attention."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}
        self.calls = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        attention = pl_module.model.bert.encoder.layer[-1].attention
        attention.register_forward_hook(lambda *_: setattr(self, "calls", self.calls + 1))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.gradients = {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}


@each_method
def test_gradient_checkpointing_keeps_the_gradients_under_dropout_too(name: str) -> None:
    def watched(*callbacks: Callback) -> tuple[Watch, BertInInit]:
        torch.manual_seed(7)
        module, callback, watch = BertInInit(), method(name), Watch()
        dropouts = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
        module.model = BertForSequenceClassification(small(BertConfig, **{**BERT, **dropouts}))
        if hasattr(callback, "dropout"):
            callback.dropout = 0.2
        trainer(callback, *callbacks, watch, max_steps=1).fit(module)
        return watch, module

    plain, _ = watched()
    saving, module = watched(GradientCheckpointing())
    assert set(saving.gradients) == set(plain.gradients)
    late = method(name).waiting(module, 0) if isinstance(METHODS[name], GradualUnfreezing) else []
    assert set(plain.gradients) == training(module) - {
        n for n, p in module.named_parameters() if any(p is w for w in late)
    }
    for key, value in plain.gradients.items():
        torch.testing.assert_close(saving.gradients[key], value, atol=1e-7, rtol=1e-5, msg=key)
    assert (plain.calls, saving.calls) == (1, 1 if name == "head" else 2), "run again in the backward pass"
    assert not module.model.is_activation_checkpointing
