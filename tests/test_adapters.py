"""Where methods and files meet: load_from_checkpoint and merge, beyond what every method's contract holds."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
import torch
from foreign import CLASSES, BertInInit, Classifier, make, trainer, vector_data
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lightning_ft
from lightning_ft import IA3, HeadOnly, InjectionError, LoRA
from lightning_ft.callbacks.checkpoint_io import METADATA
from lightning_ft.callbacks.finetuning import FineTuning
from lightning_ft.files.state import StateError
from lightning_ft.injection import Injected, attach, injected_modules, injected_names


class Sized(Classifier):
    """With arguments of its own, which its checkpoints remember."""

    data = staticmethod(lambda: vector_data(8))

    def __init__(self, width: int, seed: int = 7, slope: float = 1.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(seed)
        self.encoder = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, width))
        self.head = nn.Linear(width, CLASSES)

    def outputs(self, x: Tensor) -> Tensor:
        return self.head(self.hparams["slope"] * self.encoder(x))


def lora(**settings: Any) -> LoRA:
    return LoRA(**{"r": 2, "backbone": "encoder", "target_modules": ["0", "2"], **settings})


def fitted(path: Path, module: Classifier, *callbacks: Any) -> Any:
    run = trainer(*callbacks, max_epochs=1)
    run.fit(module)
    run.save_checkpoint(path)
    return module


def same(one: nn.Module, two: nn.Module) -> bool:
    states = one.state_dict(), two.state_dict()
    return set(states[0]) == set(states[1]) and all(torch.equal(v, states[1][k]) for k, v in states[0].items())


# ------------------------------------------------------------------------------------ load_from_checkpoint


@pytest.mark.parametrize("more", [{}, {"map_location": "cpu", "strict": False}])
def test_arguments_come_from_the_checkpoint(more: dict[str, Any], tmp_path: Path) -> None:
    module = fitted(tmp_path / "x.ckpt", Sized(6, slope=0.5), lora(alpha=3))
    loaded = lightning_ft.load_from_checkpoint(Sized, tmp_path / "x.ckpt", **more)
    assert type(loaded) is Sized
    assert loaded.hparams == module.hparams
    assert same(loaded, module)
    assert torch.equal(loaded.outputs(loaded.example()), module.outputs(module.example()))
    assert {layer.lora for _, layer in injected_modules(loaded)} == {
        layer.lora for _, layer in injected_modules(module)
    }


def test_arguments_given_win_over_the_checkpoints(tmp_path: Path) -> None:
    module = fitted(tmp_path / "x.ckpt", Sized(6), lora())
    loaded = lightning_ft.load_from_checkpoint(Sized, tmp_path / "x.ckpt", slope=2.0)
    assert loaded.hparams["slope"] == 2.0
    assert same(loaded, module)
    for other in ({"seed": 8}, {"width": 5}):
        with pytest.raises(StateError, match="trained over other pretrained weights"):
            lightning_ft.load_from_checkpoint(Sized, str(tmp_path / "x.ckpt"), **other)


def test_a_loaded_module_trains_on_and_loads_again(tmp_path: Path) -> None:
    fitted(tmp_path / "x.ckpt", Sized(6), lora())
    loaded = lightning_ft.load_from_checkpoint(Sized, tmp_path / "x.ckpt")
    module = fitted(tmp_path / "y.ckpt", loaded, lora())
    assert same(lightning_ft.load_from_checkpoint(Sized, tmp_path / "y.ckpt"), module)


def test_a_checkpoint_that_no_method_changed_is_not_ours(tmp_path: Path) -> None:
    module = fitted(tmp_path / "x.ckpt", Sized(6))
    with pytest.raises(StateError, match=r"x\.ckpt' wasn't saved with a lightning_ft callback.*MyModule\.load"):
        lightning_ft.load_from_checkpoint(Sized, tmp_path / "x.ckpt")
    assert same(Sized.load_from_checkpoint(tmp_path / "x.ckpt"), module)


class LastLayer(FineTuning):
    """A user's own method."""

    peft_type: ClassVar[str] = "PARTIAL"

    def inject(self, model: nn.Module) -> list[str]:
        model.encoder.requires_grad_(False)
        model.encoder[2].requires_grad_(True)
        return ["encoder.2"]


def test_an_unknown_method_is_named_and_can_be_passed(tmp_path: Path) -> None:
    module = fitted(tmp_path / "x.ckpt", Sized(6), LastLayer(backbone="encoder"))
    with pytest.raises(StateError, match=r"saved with LastLayer, .*method=LastLayer\(\.\.\.\)"):
        lightning_ft.load_from_checkpoint(Sized, tmp_path / "x.ckpt")
    loaded = lightning_ft.load_from_checkpoint(Sized, tmp_path / "x.ckpt", method=LastLayer(backbone="encoder"))
    assert same(loaded, module)


def test_a_method_that_is_not_ours_must_be_passed(tmp_path: Path) -> None:
    module = fitted(tmp_path / "x.ckpt", Sized(6), lora())
    checkpoint = torch.load(tmp_path / "x.ckpt")
    checkpoint[METADATA].append({**checkpoint[METADATA][0], "method": "LastLayer"})
    torch.save(checkpoint, tmp_path / "x.ckpt")
    with pytest.raises(StateError, match="LastLayer, which isn't one of"):
        lightning_ft.load_from_checkpoint(Sized, tmp_path / "x.ckpt")
    assert same(lightning_ft.load_from_checkpoint(Sized, tmp_path / "x.ckpt", method=[lora()]), module)


@pytest.mark.parametrize("strict", [True, False])
def test_nothing_trained_may_be_missing_even_if_not_strict(strict: bool, tmp_path: Path) -> None:
    """A restore that restores nothing, and says nothing, is what this function is there to prevent."""
    fitted(tmp_path / "x.ckpt", Sized(6), lora())
    checkpoint = torch.load(tmp_path / "x.ckpt")
    del checkpoint["state_dict"]["encoder.0.lora_A"]
    torch.save(checkpoint, tmp_path / "x.ckpt")
    with pytest.raises(StateError, match=r"no value for 1 trained tensors, encoder\.0\.lora_A"):
        lightning_ft.load_from_checkpoint(Sized, tmp_path / "x.ckpt", strict=strict)


def test_the_modules_own_hooks_see_a_whole_checkpoint(tmp_path: Path) -> None:
    class Watching(Sized):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.seen = set(checkpoint["state_dict"])

    module = fitted(tmp_path / "x.ckpt", Watching(6), lora())
    loaded = lightning_ft.load_from_checkpoint(Watching, tmp_path / "x.ckpt")
    assert loaded.seen == set(module.state_dict())


def test_a_setup_that_asks_for_a_trainer_is_passed_by(tmp_path: Path) -> None:
    class Asking(Sized):
        def setup(self, stage: str) -> None:
            self.epochs = self.trainer.max_epochs

    module = fitted(tmp_path / "x.ckpt", Asking(6), lora())
    assert same(lightning_ft.load_from_checkpoint(Asking, tmp_path / "x.ckpt"), module)


def test_a_setup_that_fails_for_another_reason_is_an_error(tmp_path: Path) -> None:
    class Failing(Sized):
        def setup(self, stage: str) -> None:
            if stage == "predict":
                raise RuntimeError("no such file")

    fitted(tmp_path / "x.ckpt", Failing(6), lora())
    with pytest.raises(RuntimeError, match="no such file"):
        lightning_ft.load_from_checkpoint(Failing, tmp_path / "x.ckpt")


# ---------------------------------------------------------------------------------------------------- merge


class Shift(Injected):
    """Has no fold."""

    method, acts_on, slot = "SHIFT", "outputs", "shift"
    adds: ClassVar = {"offset": "offset"}

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.offset


@pytest.mark.parametrize("place", ["0", "2"])
def test_a_merge_that_one_layer_refuses_changes_none(place: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    LoRA(r=2, backbone=".").inject(model)
    for _, layer in injected_modules(model):
        nn.init.normal_(layer.lora_B)
    attach(model, place, Shift, 1, {"offset": torch.ones(4)})
    before = {key: value.clone() for key, value in model.state_dict().items()}
    classes, x = [type(m) for m in model], torch.randn(2, 4)
    out = model(x)
    with pytest.raises(NotImplementedError, match="SHIFT can't be merged"):
        lightning_ft.merge(model)
    assert [type(m) for m in model] == classes
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(x), out)


class Falcon(nn.Linear):
    """As Hugging Face's FalconLinear: W x + b in its own words."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class Halved(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


@pytest.mark.parametrize(
    ("kind", "method", "merges"),
    [
        (Falcon, LoRA(r=2, backbone="."), True),
        (Halved, LoRA(r=2, backbone="."), False),
        (Halved, IA3(["0"], [], backbone="."), True),
    ],
)
def test_a_linear_layer_with_its_own_forward_is_merged_if_that_keeps_its_outputs(
    kind: Any, method: FineTuning, merges: bool
) -> None:
    model, x = nn.Sequential(kind(4, 4)), torch.randn(3, 4)
    method.inject(model)
    for name in injected_names(model):
        nn.init.normal_(model.get_parameter(name))
    before = model(x)
    if merges:
        assert lightning_ft.merge(model) == ["0"]
    else:
        with pytest.raises(NotImplementedError, match=r"'0' can't be merged: Halved has a forward of its own"):
            lightning_ft.merge(model)
        assert injected_names(model)
    torch.testing.assert_close(model(x), before)


def test_a_part_of_a_model_can_be_merged_alone() -> None:
    model = tiny.bert()
    LoRA(r=2, target_modules=["query"]).inject(model)
    for _, layer in injected_modules(model):
        nn.init.normal_(layer.lora_B)
    before = model(tiny.TOKENS).last_hidden_state
    assert lightning_ft.merge(model.encoder.layer[0]) == ["attention.self.query"]
    assert {name.split(".lora")[0] for name in injected_names(model)} == {"encoder.layer.1.attention.self.query"}
    torch.testing.assert_close(model(tiny.TOKENS).last_hidden_state, before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_merge_holds_one_folded_weight_at_a_time_and_no_graph(
    use_dora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Tensor]] = []

    def folded(layer: Any, weight: Tensor) -> dict[str, Tensor]:
        assert not any(one() is not None for one in made[:-1]), "all but the last, which is about to be let go of"
        tensors = original(layer, weight)
        assert not tensors["weight"].requires_grad
        made.append(weakref.ref(tensors["weight"]))
        return tensors

    model = tiny.bert()
    LoRA(r=2, use_dora=use_dora, target_modules=["query", "key"]).inject(model)
    kind = LoRA.layers[int(use_dora)]
    original: Any = kind.folded
    monkeypatch.setattr(kind, "folded", folded)
    assert len(lightning_ft.merge(model)) == len(made) == 4


def trained_lora(*targets: str) -> Any:
    model = tiny.bert()
    LoRA(r=2, target_modules=list(targets)).inject(model)
    for _, layer in injected_modules(model):
        nn.init.normal_(layer.lora_B)
    return model


def test_a_reversible_merge_keeps_what_it_changed_and_no_more() -> None:
    model = trained_lora("query")
    lightning_ft.merge(model, reversible=True)
    kept = [b for m in model.modules() for k, b in vars(m).items() if k == "_before_merge_by_lightning_ft"]
    assert {key for before in kept for key in before.values} == {"weight"}
    assert {key for before in kept for key in before.tensors} == {"lora_A", "lora_B"}


@pytest.mark.parametrize("again", [{}, {"reversible": True}])
def test_a_second_merge_makes_the_first_final_unless_there_is_nothing_in_it(again: dict[str, Any]) -> None:
    model = trained_lora("query")
    lightning_ft.merge(model, reversible=True)
    assert lightning_ft.merge(model, **again) == []
    if again:
        assert len(lightning_ft.unmerge(model)) == 2
    else:
        with pytest.raises(InjectionError, match="merged for good"):
            lightning_ft.unmerge(model)


def test_only_the_last_of_two_merges_can_be_undone() -> None:
    model = trained_lora("query")
    lightning_ft.merge(model, reversible=True)
    once = {key: value.clone() for key, value in model.state_dict().items()}
    LoRA(r=1, target_modules=["value"]).inject(model)
    with pytest.raises(InjectionError, match=r"was injected again after the merge \(its base is frozen\)"):
        lightning_ft.unmerge(model)
    lightning_ft.merge(model, reversible=True)
    assert all("value" in name for name in lightning_ft.unmerge(model))
    lightning_ft.merge(model)
    assert all(torch.equal(value, once[key]) for key, value in model.state_dict().items())


def test_a_merged_model_that_moved_is_unmerged_where_it_is() -> None:
    model = trained_lora("query")
    lightning_ft.merge(model, reversible=True)
    lightning_ft.unmerge(model.to("meta", torch.bfloat16))
    added = injected_names(model)
    assert added
    for name, parameter in model.named_parameters():
        assert parameter.device.type == "meta"
        assert parameter.dtype == (torch.float32 if name in added else torch.bfloat16)


def test_a_merge_without_layers_thaws_and_can_be_undone() -> None:
    module = make(BertInInit)
    HeadOnly().inject(module)
    trained = [p.requires_grad for p in module.parameters()]
    assert lightning_ft.merge(module, reversible=True) == []
    assert all(p.requires_grad for p in module.parameters())
    assert lightning_ft.unmerge(module) == []
    assert [p.requires_grad for p in module.parameters()] == trained


def test_merging_what_carries_nothing_does_nothing() -> None:
    model = make(lambda: Sized(6))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert lightning_ft.merge(model) == []
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_after_a_merge_the_whole_model_is_saved(tmp_path: Path) -> None:
    module = make(BertInInit)
    trainer(LoRA(r=2), max_epochs=2).fit(module)
    lightning_ft.merge(module)
    assert all(p.requires_grad for p in module.parameters()), "as before the injection"
    lightning_ft.save_adapter(module, tmp_path / "whole")
    fresh = make(BertInInit)
    lightning_ft.load_adapter(fresh, tmp_path / "whole")
    for key, value in module.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value), key


def test_a_folder_without_the_head_is_loaded_with_a_warning(tmp_path: Path) -> None:
    module = make(BertInInit)
    LoRA(r=2).inject(module)
    folder = lightning_ft.save_adapter(module, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({k: v for k, v in tensors.items() if "lora" in k}, folder / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match=r"no values for the head \(classifier"):
        lightning_ft.load_adapter(make(BertInInit), folder)


def test_a_loaded_adapter_trains_on_with_the_same_callback_and_with_no_other(tmp_path: Path) -> None:
    module = make(BertInInit)
    LoRA(r=2, modules_to_save=["pooler"]).inject(module)
    lightning_ft.save_adapter(module, tmp_path / "adapter")
    fresh = make(BertInInit)
    lightning_ft.load_adapter(fresh, tmp_path / "adapter")
    before = fresh.model.bert.encoder.layer[0].attention.self.query.lora_A.detach().clone()
    trainer(LoRA(r=2, modules_to_save=["pooler"]), max_epochs=1).fit(fresh)
    assert not torch.equal(fresh.model.bert.encoder.layer[0].attention.self.query.lora_A, before)
    with pytest.raises(InjectionError, match="pooler"):
        LoRA(r=2).inject(fresh)
