"""What a checkpoint holds, and which ones are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import BertInInit, TrunkInSetup, make, trainer
from omegaconf import OmegaConf
from torch import nn

from lightning_ft import FullFineTuning, HeadOnly, LoRA, load_adapter, load_from_checkpoint, save_adapter
from lightning_ft.callbacks.checkpoint_io import METADATA
from lightning_ft.callbacks.finetuning import FineTuning
from lightning_ft.files.state import StateError

METHODS: dict[str, Callable[[], FineTuning]] = {
    "lora": lambda: LoRA(
        r=2, target_modules=("query", "value"), modules_to_save=["pooler"], rank_pattern=OmegaConf.create({"query": 3})
    ),
    "head": HeadOnly,
    "full": FullFineTuning,
}
each_method = pytest.mark.parametrize("name", METHODS)


def trained(name: str, path: Path, **more: Any) -> BertInInit:
    module, run = make(BertInInit), trainer(METHODS[name](), max_epochs=1)
    run.fit(module)
    run.save_checkpoint(path, **more)
    return module


def resume(name: str, path: Path, module: Any = None) -> BertInInit:
    module = module or make(BertInInit)
    trainer(METHODS[name](), max_epochs=1).fit(module, ckpt_path=path)
    return module


def changed(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    checkpoint = torch.load(path)
    change(checkpoint)
    torch.save(checkpoint, path)
    return path


@each_method
def test_the_record_is_of_plain_values(name: str, tmp_path: Path) -> None:
    trained(name, tmp_path / "x.ckpt", weights_only=name == "head")
    (record,) = torch.load(tmp_path / "x.ckpt", weights_only=True)[METADATA]
    assert set(record) == {"method", "arguments", "base"}
    assert record["method"] == type(METHODS[name]()).__name__
    if name == "lora":
        assert record["arguments"]["target_modules"] == ["query", "value"]
        assert record["arguments"]["modules_to_save"] == ["pooler"]
        assert record["arguments"]["rank_pattern"] == {"query": 3}

    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(type(key) is str and plain(item) for key, item in value.items())
        return all(map(plain, value)) if type(value) is list else type(value) in (str, int, float, bool, type(None))

    assert plain(record)


@pytest.mark.parametrize("name", ["lora", "head"])
def test_a_bare_models_checkpoint_is_refused_or_completes(name: str, tmp_path: Path) -> None:
    """It has everything that HeadOnly trains, and nothing of LoRA's."""
    bare, run = make(BertInInit), trainer(max_epochs=1)
    run.fit(bare)
    run.save_checkpoint(tmp_path / "bare.ckpt", weights_only=True)
    if name == "lora":
        with pytest.raises(StateError, match=r"bare\.ckpt' has no value for 8 trained tensors.*lora_") as error:
            resume(name, tmp_path / "bare.ckpt")
        assert "load it into the module first" in str(error.value)
    else:
        module = make(BertInInit)
        trainer(HeadOnly()).validate(module, ckpt_path=tmp_path / "bare.ckpt", verbose=False)
        assert all(torch.equal(value, module.state_dict()[key]) for key, value in bare.state_dict().items())


@each_method
def test_a_checkpoint_that_lacks_something_trained_is_refused(name: str, tmp_path: Path) -> None:
    trained(name, tmp_path / "x.ckpt")
    changed(tmp_path / "x.ckpt", lambda c: c["state_dict"].pop("model.classifier.bias"))
    with pytest.raises(StateError, match=r"no value for 1 trained tensors, model\.classifier\.bias"):
        resume(name, tmp_path / "x.ckpt")


def test_a_key_that_the_module_has_not_is_still_lightnings_error(tmp_path: Path) -> None:
    trained("lora", tmp_path / "x.ckpt")
    changed(tmp_path / "x.ckpt", lambda c: c["state_dict"].update({"model.other": torch.zeros(1)}))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*model\.other"):
        resume("lora", tmp_path / "x.ckpt")


def test_a_checkpoint_over_other_base_weights_is_refused(tmp_path: Path) -> None:
    trained("lora", tmp_path / "x.ckpt")
    other = make(BertInInit)
    with torch.no_grad():
        other.model.bert.encoder.layer[1].output.dense.weight.add_(1e-3)
    with pytest.raises(StateError, match=r"x\.ckpt' was trained over other pretrained weights"):
        resume("lora", tmp_path / "x.ckpt", other)
    another_head = make(BertInInit)
    nn.init.normal_(another_head.model.classifier.weight)
    resume("lora", tmp_path / "x.ckpt", another_head)


def test_a_base_in_another_dtype_is_not_taken_for_other_weights(tmp_path: Path) -> None:
    module = trained("lora", tmp_path / "x.ckpt")
    half = make(BertInInit)
    half.model.bert.to(torch.bfloat16)
    run = trainer(METHODS["lora"](), precision="bf16-mixed")
    run.validate(half, ckpt_path=tmp_path / "x.ckpt", verbose=False)
    for key, value in module.named_parameters():
        if value.requires_grad:
            torch.testing.assert_close(half.get_parameter(key).float(), value, atol=1e-2, rtol=1e-2)


def test_a_full_fine_tune_resumes_whatever_the_base_was(tmp_path: Path) -> None:
    module = trained("full", tmp_path / "x.ckpt")
    torch.manual_seed(99)
    resumed = resume("full", tmp_path / "x.ckpt", BertInInit())
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize("name", ["lora", "head"])
def test_base_weights_that_a_checkpoint_holds_are_loaded(name: str, tmp_path: Path) -> None:
    """As in one that was completed by hand."""
    module = trained(name, tmp_path / "x.ckpt")
    key = "model.bert.encoder.layer.0.output.dense.weight"
    assert key not in torch.load(tmp_path / "x.ckpt")["state_dict"]
    whole = {**module.state_dict(), key: module.state_dict()[key] + 1}
    changed(tmp_path / "x.ckpt", lambda c: c.update(state_dict=whole))
    resumed = resume(name, tmp_path / "x.ckpt")
    assert all(torch.equal(value, resumed.state_dict()[k]) for k, value in whole.items())


def test_frozen_values_come_from_the_live_model_and_leave_it_alone(tmp_path: Path) -> None:
    module = trained("lora", tmp_path / "x.ckpt")
    resumed = make(BertInInit)
    before = {key: (id(p), p.clone()) for key, p in resumed.named_parameters()}
    resume("lora", tmp_path / "x.ckpt", resumed)
    for key, parameter in resumed.named_parameters():
        if not parameter.requires_grad:
            assert (id(parameter), True) == (before[key][0], torch.equal(parameter, before[key][1]))
        assert torch.equal(parameter, module.get_parameter(key))


def test_a_trunk_that_setup_builds_is_filled_in_too(tmp_path: Path) -> None:
    module, run = make(TrunkInSetup), trainer(LoRA(r=2), max_epochs=1)
    run.fit(module)
    run.save_checkpoint(tmp_path / "x.ckpt")
    fresh = make(TrunkInSetup)
    trainer(LoRA(r=2)).validate(fresh, ckpt_path=tmp_path / "x.ckpt", verbose=False)
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in module.state_dict().items())


class Twice(BertInInit):
    """Its trunk has a second name, which comes first."""

    def __init__(self) -> None:
        super().__init__()
        model = self.model
        del self.model
        self.encoder, self.model = model.bert, model


class TwiceBehind(BertInInit):
    """The second name comes last."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = self.model.bert


@pytest.mark.parametrize("kind", [Twice, TwiceBehind])
def test_a_base_with_a_second_name_is_found_and_left_out_under_both(kind: type[BertInInit], tmp_path: Path) -> None:
    module, run = make(kind), trainer(LoRA(r=2), max_epochs=1)
    run.fit(module)
    run.save_checkpoint(tmp_path / "x.ckpt")
    trained = {name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    assert set(torch.load(tmp_path / "x.ckpt")["state_dict"]) == trained
    torch.manual_seed(7)
    loaded, folder = load_from_checkpoint(kind, tmp_path / "x.ckpt"), save_adapter(module, tmp_path / "adapter")
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in module.state_dict().items())
    plain = make(BertInInit)
    load_adapter(plain, folder)
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in plain.state_dict().items())
