from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import peft
import pytest
import tiny
import torch
from reference.lora import lora_embedding, lora_linear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lightning_ft
from lightning_ft import InjectionError, LoRA
from lightning_ft.injection import injected_modules, injected_names
from lightning_ft.methods.lora import LoRALayer

R, ALPHA, IN, OUT, TOKENS = 3, 6.0, 5, 7, 11
PADDING = 2


def conv1d() -> nn.Module:
    layer = Conv1D(OUT, IN)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(IN, OUT),
    "Linear without bias": lambda: nn.Linear(IN, OUT, bias=False),
    "Conv1D": conv1d,
    "Embedding": lambda: nn.Embedding(TOKENS, OUT),
    "Embedding with padding": lambda: nn.Embedding(TOKENS, OUT, padding_idx=PADDING),
}
each_layer = pytest.mark.parametrize("kind", LAYERS)


def adapted(
    kind: str, dtype: torch.dtype = torch.float64, trained: bool = True, **settings: Any
) -> tuple[nn.Sequential, Any]:
    """A model of one layer with LoRA, and that layer; ``trained``: with random A and B, of ``dtype`` too."""
    torch.manual_seed(4)
    model = nn.Sequential(LAYERS[kind]()).to(dtype)
    if dtype == torch.float64:  # values that fp32 can't hold
        nn.init.normal_(model[0].weight)
    LoRA(**{"r": R, "alpha": ALPHA, "backbone": ".", "target_modules": ["0"], **settings}).inject(model)
    layer = model[0]
    if trained:
        with torch.no_grad():
            for p in (layer.lora_A, layer.lora_B):
                p.data = p.data.to(torch.promote_types(dtype, torch.float32))
                nn.init.normal_(p)
            if getattr(layer, "padding_idx", None) is not None:
                layer.lora_A[:, PADDING] = 0  # where training leaves it
    return model, layer


def inputs(kind: str) -> Tensor:
    if "Embedding" in kind:
        return torch.tensor([[0, 1, PADDING, 1], [10, PADDING, 3, 3]])
    return torch.randn(2, 4, IN, dtype=torch.float64)


def reference(kind: str, layer: Any, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    if "Embedding" in kind:
        return lora_embedding(x.flatten(), layer.weight, a, b, R, ALPHA).view(*x.shape, OUT)
    weight = layer.weight.T if kind == "Conv1D" else layer.weight
    return lora_linear(x.view(-1, IN), weight, layer.bias, a, b, R, ALPHA).view(*x.shape[:-1], OUT)


# ----------------------------------------------------------------------------------------------- the maths


@each_layer
def test_outputs_and_gradients_are_those_of_the_paper(kind: str) -> None:
    model, layer = adapted(kind)
    x = inputs(kind)
    a, b = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    cotangent = torch.randn(*x.shape[:2], OUT, dtype=torch.float64)
    if x.is_floating_point():
        x.requires_grad_()

    expected = reference(kind, layer, x, a, b)
    wanted = torch.autograd.grad((expected * cotangent).sum(), [a, b, *([x] if x.requires_grad else [])])
    out = model(x)
    found = torch.autograd.grad(
        (out * cotangent).sum(), [layer.lora_A, layer.lora_B, *([x] if x.requires_grad else [])]
    )
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    if kind == "Embedding with padding":
        assert not found[0][:, PADDING].any()
        wanted[0][:, PADDING] = 0
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    assert not model[0].weight.requires_grad


@each_layer
def test_merging_adds_the_update_to_the_weight_and_rounds_once(kind: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model, layer = adapted(kind, dtype)
        layer.lora_B.data.mul_(1e-2)  # small beside W, as it is
        before, product = layer.weight.detach().clone(), ALPHA / R * layer.lora_B @ layer.lora_A
        delta = (product.T if kind == "Conv1D" or "Embedding" in kind else product).detach()
        wide = torch.promote_types(dtype, torch.float32)
        assert lightning_ft.merge(model) == ["0"]
        assert layer.weight.dtype == dtype
        assert torch.equal(layer.weight, (before.to(wide) + delta).to(dtype))
        if dtype == torch.bfloat16:
            assert not torch.equal(layer.weight, before + delta.to(dtype))  # what rounding twice would give


# ------------------------------------------------------------------------------------------------- dropout


def with_identities(p: float) -> tuple[nn.Sequential, Any]:
    """A layer whose adapter adds ``x / 2``."""
    model = nn.Sequential(nn.Linear(4, 4))
    LoRA(r=4, alpha=2, dropout=p, backbone=".").inject(model)
    with torch.no_grad():
        model[0].lora_A.copy_(torch.eye(4))
        model[0].lora_B.copy_(torch.eye(4))
    return model, model[0]


def test_dropout_drops_inputs_of_the_adapter_alone() -> None:
    model, layer = with_identities(0.25)
    x = torch.rand(500, 4) + 1
    model.train()
    base = nn.functional.linear(x, layer.weight, layer.bias)
    share = (model(x) - base) / (x / 2)
    dropped = share.abs() < 1e-4
    torch.testing.assert_close(share[~dropped], torch.full_like(share[~dropped], 1 / 0.75), atol=1e-3, rtol=0)
    assert 0.2 < dropped.float().mean() < 0.3
    assert 0.3 < dropped.any(dim=1).float().mean() < 0.95  # elements fall, not rows
    assert not torch.equal(model(x), model(x))


def test_dropout_keeps_the_expectation_and_ends_with_training() -> None:
    model, layer = with_identities(0.5)
    x = torch.rand(1, 4).expand(20_000, 4)
    expected = nn.functional.linear(x, layer.weight, layer.bias) + x / 2
    torch.testing.assert_close(model.train()(x).mean(0), expected[0], atol=2e-2, rtol=0)
    torch.testing.assert_close(model.eval()(x), expected)


def test_before_training_dropout_changes_nothing() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(9, 4)
    before = model(x)
    LoRA(dropout=0.5, backbone=".").inject(model)
    assert torch.equal(model.train()(x), before)


# ----------------------------------------------------------------------------------------------- the start


def wide(init: str, kind: str = "Linear") -> Any:
    model = nn.Sequential(nn.Linear(400, 30) if kind == "Linear" else nn.Embedding(400, 30))
    LoRA(r=20, init_lora_weights=init, backbone=".", target_modules=["0"]).inject(model)
    return model[0]


def test_kaiming_starts_a_uniform_within_its_bound() -> None:
    a = wide("kaiming").lora_A
    bound = 1 / math.sqrt(400)  # sqrt(6 / ((1 + 5) fan_in))
    assert 0.99 * bound < a.abs().max() <= bound
    assert a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert abs(a.mean()) < 0.03 * bound


def test_gaussian_starts_a_with_the_std_of_one_over_r() -> None:
    a = wide("gaussian").lora_A
    assert a.std().item() == pytest.approx(1 / 20, rel=0.03)
    assert a.abs().max() > 3 / 20


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_one_of_the_two_matrices_starts_at_zero(init: str) -> None:
    linear, embedding = wide(init), wide(init, "Embedding")
    assert not linear.lora_B.any()
    assert not embedding.lora_A.any()
    assert embedding.lora_B.std().item() == pytest.approx(1, rel=0.1)
    assert [tuple(p.shape) for p in (linear.lora_A, linear.lora_B)] == [(20, 400), (30, 20)]
    assert [tuple(p.shape) for p in (embedding.lora_A, embedding.lora_B)] == [(20, 400), (30, 20)]


def test_layers_start_differently_and_as_seeded() -> None:
    def made(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        LoRA(backbone=".").inject(model)
        return model

    one, same, other = made(1), made(1), made(2)
    assert torch.equal(one[0].lora_A, same[0].lora_A)
    assert not torch.equal(one[0].lora_A, other[0].lora_A)
    assert not torch.equal(one[0].lora_A, one[1].lora_A)


# ------------------------------------------------------------------------------------------- what is refused


def test_a_bad_argument_is_an_error_with_its_value() -> None:
    for argument, value in [
        ("r", 1.5),
        ("r", "8"),
        ("alpha", 0),
        ("alpha", math.nan),
        ("dropout", 1),
        ("dropout", "0.1"),
        ("init_lora_weights", "xavier"),
    ]:
        with pytest.raises(ValueError, match=rf"LoRA: {argument} must be .*, not {value!r}\."):
            LoRA(**{argument: value})


@pytest.mark.parametrize("other", [{"r": 4}, {"target_modules": ["query", "key"]}])
def test_a_second_injection_with_other_settings_is_an_error(other: dict[str, Any]) -> None:
    model = tiny.bert()
    settings = {"r": 2, "alpha": 4, "target_modules": ["query"]}
    LoRA(**settings).inject(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InjectionError, match=r"(?i)already carries lora"):
        LoRA(**{**settings, **other}).inject(model)
    assert set(model.state_dict()) == set(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    lightning_ft.merge(model)
    assert LoRA(**{**settings, **other}).inject(model)


@pytest.mark.parametrize(
    ("target", "build", "other"),
    [("wte", tiny.gpt2, "lm_head"), ("lm_head", tiny.gpt2, "wte"), ("shared", tiny.t5, "embed_tokens")],
)
def test_a_tied_weight_is_refused_with_the_cure(target: str, build: Callable[[], Any], other: str) -> None:
    model = build()
    with pytest.raises(InjectionError, match=rf"'\S*{target}' shares .*{other}.*tie_word_embeddings=False"):
        LoRA(target_modules=[target]).inject(model)
    assert not injected_names(model)


def test_an_untied_one_is_not() -> None:
    model = tiny.gpt2(tie_word_embeddings=False)
    LoRA(target_modules=["wte", "lm_head"]).inject(model)
    for _, layer in injected_modules(model):
        nn.init.normal_(layer.lora_A)
        nn.init.normal_(layer.lora_B)
    before = tiny.logits(model)
    lightning_ft.merge(model)
    torch.testing.assert_close(tiny.logits(model), before, atol=1e-4, rtol=1e-4)


# ----------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "Embedding"])
def test_autocast_computes_in_bf16_and_gives_fp32_gradients(kind: str) -> None:
    model, layer = adapted(kind, torch.float32)
    x = inputs(kind)
    x = x.float() if x.is_floating_point() else x
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype == (torch.float32 if "Embedding" in kind else torch.bfloat16)
    torch.testing.assert_close(out.float(), exact, atol=0.2, rtol=0.05)
    assert not torch.equal(out.float(), exact)
    out.float().square().sum().backward()
    for p in (layer.lora_A, layer.lora_B):
        assert p.grad.dtype == torch.float32
        assert p.grad.any()


@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "Embedding"])
def test_a_low_precision_base_keeps_its_dtype_and_the_adapter_fp32(kind: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model, layer = adapted(kind, dtype)
        x = inputs(kind)
        out = model(x.to(dtype) if x.is_floating_point() else x)
        assert out.dtype == dtype
        out.float().sum().backward()
        assert {layer.lora_A.dtype, layer.lora_A.grad.dtype, layer.lora_B.grad.dtype} == {torch.float32}


# ------------------------------------------------------------------------------------- agreement with PEFT


MODELS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "bert": (tiny.bert_classifier, ["query", "value", "output.dense", "word_embeddings"]),
    "gpt2": (tiny.gpt2, ["c_attn", "mlp.c_proj"]),
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_peft(name: str) -> None:
    build, target_modules = MODELS[name]
    config = peft.LoraConfig(
        r=R, lora_alpha=ALPHA, target_modules=target_modules, init_lora_weights=False, fan_in_fan_out=name == "gpt2"
    )
    theirs = peft.get_peft_model(build(), config)
    ours = build()
    touched = LoRA(r=R, alpha=ALPHA, target_modules=target_modules).inject(ours)
    pairs = []
    for path in touched:
        layer, stock = ours.get_submodule(path), theirs.base_model.model.get_submodule(path)
        for key in "AB":
            table = getattr(stock, f"lora_embedding_{key}") or getattr(stock, f"lora_{key}")
            value = table["default"]
            value = value if isinstance(value, Tensor) else value.weight
            getattr(layer, f"lora_{key}").data.copy_(value)
            pairs.append((getattr(layer, f"lora_{key}"), value))
    assert {type(layer).__mro__[1] for _, layer in injected_modules(ours)} <= set(LoRA.layers)
    assert len(pairs) == 2 * len(touched) == 2 * sum(isinstance(m, LoRALayer) for m in ours.modules())
    bare = tiny.logits(build())
    torch.testing.assert_close(tiny.logits(ours), tiny.logits(theirs), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(tiny.logits(ours), bare, atol=1e-3)

    for model in (ours, theirs):
        model(input_ids=tiny.TOKENS).logits.square().mean().backward()
    for mine, stock in pairs:
        torch.testing.assert_close(mine.grad, stock.grad, atol=1e-5, rtol=1e-5)
        assert mine.grad.any()
