"""IA3: against the paper's equations, and against stock PEFT given the same vectors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as PEFT_FEEDFORWARD,
)
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as PEFT_TARGETS
from reference.ia3 import rescaled_inputs, rescaled_outputs
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lightning_ft
from lightning_ft import IA3, InjectionError
from lightning_ft.injection import injected_modules, injected_names
from lightning_ft.methods.ia3 import usual_modules

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IN, OUT = 5, 7
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(IN, OUT),
    "Linear without bias": lambda: nn.Linear(IN, OUT, bias=False),
    "Conv1D": lambda: Conv1D(OUT, IN),
}
each_layer = pytest.mark.parametrize("kind", LAYERS)
each_side = pytest.mark.parametrize("side", ["output", "input"])


def adapted(kind: str, side: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, Any]:
    """A model of one layer with a random vector, and that layer."""
    torch.manual_seed(4)
    model = nn.Sequential(LAYERS[kind]()).to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    IA3(["0"], ["0"] if side == "input" else [], backbone=".").inject(model)
    layer = model[0]
    layer.ia3_l.data = torch.randn_like(layer.ia3_l, dtype=torch.promote_types(dtype, torch.float32))
    return model, layer


# ----------------------------------------------------------------------------------------------- the maths


@each_layer
@each_side
def test_outputs_and_gradients_are_those_of_the_paper(kind: str, side: str) -> None:
    model, layer = adapted(kind, side)
    x = torch.randn(6, IN, dtype=torch.float64, requires_grad=True)
    l = layer.ia3_l.detach().flatten().requires_grad_()  # noqa: E741
    reference = rescaled_inputs if side == "input" else rescaled_outputs
    expected = reference(x, layer.weight.T if kind == "Conv1D" else layer.weight, layer.bias, l)
    out, cotangent = model(x), torch.randn(6, OUT, dtype=torch.float64)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    found = torch.autograd.grad((out * cotangent).sum(), [layer.ia3_l, x])
    wanted = torch.autograd.grad((expected * cotangent).sum(), [l, x])
    torch.testing.assert_close(found[0].flatten(), wanted[0], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(found[1], wanted[1], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("Linear", torch.float32), ("Linear without bias", torch.float64), ("Conv1D", torch.bfloat16)],
)
@each_side
def test_merging_multiplies_the_weight_and_rounds_once(kind: str, side: str, dtype: torch.dtype) -> None:
    model, layer = adapted(kind, side, dtype)
    weight, l = layer.weight.detach().clone(), layer.ia3_l.detach().flatten()  # noqa: E741
    along_columns = (side == "input") != (kind == "Conv1D")
    expected = weight * l if along_columns else weight * l[:, None]
    bias = None if layer.bias is None else layer.bias.detach() * (l if side == "output" else 1)
    x = torch.randn(3, IN, dtype=dtype)
    before = model(x)
    assert lightning_ft.merge(model) == ["0"]
    assert torch.equal(layer.weight, expected.to(dtype))
    assert bias is None or torch.equal(layer.bias, bias.to(dtype))
    if dtype != torch.bfloat16:
        torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)


@each_side
def test_a_low_precision_base_keeps_its_dtype_and_the_vector_fp32(side: str) -> None:
    model, layer = adapted("Linear", side, torch.bfloat16)
    out = model(torch.randn(3, IN, dtype=torch.bfloat16))
    out.float().sum().backward()
    assert (out.dtype, layer.ia3_l.dtype, layer.ia3_l.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)


def test_vectors_start_at_one_and_at_random_only_if_told() -> None:
    for ones in (True, False):
        model = tiny.bert()
        IA3(init_ia3_weights=ones).inject(model)
        assert {bool((model.get_parameter(name) == 1).all()) for name in injected_names(model)} == {ones}


# ------------------------------------------------------------------------------------------------- targets


def test_the_usual_modules_are_pefts() -> None:
    for model_type, targets in PEFT_TARGETS.items():
        root = nn.Module()
        root.config = type("Config", (), {"model_type": model_type})
        outputs_and_inputs, inputs = usual_modules(root)
        assert (set(outputs_and_inputs), inputs) == (set(targets), PEFT_FEEDFORWARD[model_type]), model_type


def lively(build: Callable[[], Any]) -> Callable[[], Any]:
    """With weights large enough that no activation is lost in the rounding."""

    def built() -> Any:
        model = build()
        for parameter in model.parameters():
            parameter.data *= 10 if parameter.ndim == 2 else 1
        return model

    return built


DISTILBERT = {"target_modules": ["k_lin", "v_lin", "ffn.lin2"], "feedforward_modules": ["ffn.lin2"]}
NAMED = {"target_modules": r".*\.(query|dense)", "feedforward_modules": r".*1.*\.dense"}
CASES: dict[str, tuple[Callable[[], Any], str | None, dict[str, Any]]] = {
    "bert": (lively(tiny.bert_classifier), "SEQ_CLS", {}),
    "gpt2": (lively(tiny.gpt2), "CAUSAL_LM", {}),
    "t5": (lively(tiny.t5), "SEQ_2_SEQ_LM", {}),
    "llama": (lively(tiny.llama), None, {}),
    "named": (lively(tiny.bert_classifier), "SEQ_CLS", {**NAMED, "exclude_modules": ["attention.output.dense"]}),
    "distilbert": (lively(tiny.distilbert_classifier), "SEQ_CLS", DISTILBERT),
}
each_case = pytest.mark.parametrize("case", CASES)


def stock(case: str) -> Any:
    """PEFT's, with random vectors."""
    build, task, settings = CASES[case]
    config = peft.IA3Config(task_type=task, init_ia3_weights=False, fan_in_fan_out=case == "gpt2", **settings)
    return peft.get_peft_model(build(), config).eval()


def vectors_of(theirs: Any) -> dict[str, Tensor]:
    return {
        name.removeprefix("base_model.model.").replace(".ia3_l.default", ".ia3_l"): parameter
        for name, parameter in theirs.named_parameters()
        if "ia3_l" in name
    }


def outputs(model: Any) -> Tensor:
    decoded = {"decoder_input_ids": tiny.TOKENS} if model.config.is_encoder_decoder else {}
    return model(input_ids=tiny.TOKENS, **decoded)[0]


@each_case
def test_outputs_gradients_and_ten_steps_are_those_of_peft(case: str) -> None:
    theirs, (build, _, settings) = stock(case), CASES[case]
    ours = build()
    IA3(**settings).inject(ours)
    vectors = vectors_of(theirs)
    assert set(vectors) == injected_names(ours)
    with torch.no_grad():
        for name, value in vectors.items():
            ours.get_parameter(name).copy_(value)  # the same shape too
    assert not torch.allclose(outputs(ours), outputs(build()), atol=1e-3)
    pairs = [([ours.get_parameter(name) for name in vectors], ours), (list(vectors.values()), theirs)]
    optimizers = [torch.optim.AdamW(parameters, lr=1e-2) for parameters, _ in pairs]
    for _ in range(10):
        for optimizer, (_, model) in zip(optimizers, pairs, strict=True):
            optimizer.zero_grad()
            outputs(model).square().mean().backward()
        torch.testing.assert_close(outputs(ours), outputs(theirs), atol=1e-5, rtol=1e-5)
        for mine, other in zip(*(parameters for parameters, _ in pairs), strict=True):
            torch.testing.assert_close(mine.grad, other.grad, atol=1e-5, rtol=1e-5)
        for optimizer in optimizers:
            optimizer.step()
    for mine, other in zip(*(parameters for parameters, _ in pairs), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------------------- files


@each_case
def test_stock_peft_loads_ours_and_ours_loads_stock_pefts(case: str, tmp_path: Path) -> None:
    build = CASES[case][0]
    theirs = stock(case)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = build()
    lightning_ft.load_adapter(ours, tmp_path / "theirs")
    torch.testing.assert_close(outputs(ours), outputs(theirs), atol=1e-5, rtol=1e-5)
    lightning_ft.save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(build(), tmp_path / "ours")
    torch.testing.assert_close(outputs(again), outputs(theirs), atol=1e-5, rtol=1e-5)
    one, other = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("ours", "theirs"))
    assert set(other) == set(one)
    assert all(torch.equal(one[key], value) for key, value in other.items())
    same = build()
    lightning_ft.load_adapter(same, tmp_path / "ours")
    assert torch.equal(outputs(same), outputs(ours))
    assert [type(m)._mixins for _, m in injected_modules(same)] == [type(m)._mixins for _, m in injected_modules(ours)]


# ----------------------------------------------------------------------------------------- what is refused


def test_what_cannot_be_is_refused_with_the_cure() -> None:
    for settings, says in [
        ({}, "Which modules of Sequential are keys.*feedforward_modules"),
        ({"target_modules": ["0"]}, r"feedforward_modules too \(\[\] for none\)"),
        ({"target_modules": ["1"], "feedforward_modules": []}, "can't adapt .Tanh"),
        ({"target_modules": ["0"], "feedforward_modules": ["2"]}, "feedforward_modules: '2' matches no module"),
        ({"target_modules": ["0"], "feedforward_modules": "2"}, "feedforward_modules='2' names none of the targets"),
    ]:
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        with pytest.raises(InjectionError, match=says):
            IA3(**settings, backbone=".").inject(model)
        assert not injected_names(model)
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_second_injection_on_the_other_side_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    IA3(["0"], [], backbone=".").inject(model)
    with pytest.raises(InjectionError, match="'0' already carries IA3"):
        IA3(["0"], ["0"], backbone=".").inject(model)
