"""Liger's kernels: what is changed for a fit is put back, and what can't be is said. tests/gpu has the fits."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import tiny
import torch
from foreign import BertInInit, make, trainer

from lightning_ft import Adapter, LigerKernels, LoRA
from lightning_ft.callbacks import liger
from lightning_ft.callbacks.liger import Change, put_in, undo
from lightning_ft.errors import UserError
from lightning_ft.injection import Injected

needs_liger = pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="Liger isn't installed")


def attributes(model: Any) -> list[dict[str, Any]]:
    """Those of a Llama's modules and of the file of its class, as they are now."""
    from transformers.models.llama import modeling_llama

    return [dict(vars(each)) for each in (modeling_llama, *model.modules())]


@pytest.mark.parametrize(("installed", "said"), [(False, "lightning-ft.liger."), (True, "for a GPU")])
def test_what_is_missing_is_said(installed: bool, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: object() if installed else None)
    with pytest.raises(UserError, match=said):
        trainer(LoRA(r=2), LigerKernels()).fit(make(BertInInit))


def test_attributes_are_put_back_and_those_that_are_new_taken_away() -> None:
    layer = torch.nn.Linear(2, 2)
    before = dict(vars(layer))
    changed = [Change(vars(layer), "in_features", 2), Change(vars(layer), "forward", liger._ABSENT)]
    layer.in_features, layer.forward = 5, torch.relu  # type: ignore[assignment]
    layer.eval()  # by others, meanwhile
    undo(changed)
    assert vars(layer) == {**before, "training": False}


@needs_liger
def test_a_model_and_its_kind_are_as_they_were_after_it() -> None:
    model: Any = tiny.llama_lm()
    before = attributes(model)
    changed = put_in(model)
    assert attributes(model) != before
    assert "forward" in vars(model.model.norm)
    undo(changed)
    assert attributes(model) == before


@needs_liger
def test_what_a_method_put_into_a_module_is_not_passed_over() -> None:
    model: Any = tiny.llama_lm()
    Adapter(target_modules=["mlp"]).inject(model)
    mlp = model.model.layers[0].mlp
    assert isinstance(mlp, Injected)
    changed = put_in(model)
    assert "forward" not in vars(mlp)
    assert "forward" in vars(model.model.layers[0].input_layernorm)
    undo(changed)


@needs_liger
def test_a_gate_that_is_not_silu_stays() -> None:
    model: Any = tiny.llama_lm(hidden_act="gelu")
    changed = put_in(model)
    assert "forward" not in vars(model.model.layers[0].mlp)
    assert "forward" in vars(model.model.norm)
    undo(changed)


@needs_liger
def test_nothing_is_left_where_liger_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import liger as integration

    apply = integration.apply_liger_kernel

    def fails(model: Any, settings: Any) -> None:
        apply(model, settings)
        raise AttributeError("no attribute 'vision_model'")

    monkeypatch.setattr(integration, "apply_liger_kernel", fails)
    model: Any = tiny.llama_lm()
    before = attributes(model)
    with pytest.raises(UserError, match="Liger fails at a LlamaForCausalLM"):
        put_in(model)
    assert attributes(model) == before


@needs_liger
def test_a_model_without_kernels_is_an_error() -> None:
    with pytest.raises(UserError, match="no kernels for a Bert"):
        put_in(make(BertInInit).model)
