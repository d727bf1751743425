"""LoRA on a linear layer against plain autograd, in each way in which it's computed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_ft.ops import Linear, lora_linear
from lightning_ft.ops.dropout import keep

S = 0.7
FEW, MANY = 6, 200  # of the many tokens, W + s B A is made in one product


def tensors(tokens: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Linear, Tensor, Tensor]:
    x = torch.randn(2, tokens // 2, 24, dtype=dtype)
    linear = Linear(torch.randn(16, 24, dtype=dtype), torch.randn(16, dtype=dtype))
    a, b = torch.randn(4, 24, dtype=dtype), torch.randn(16, 4, dtype=dtype)
    for tensor in (x, a, b):
        tensor.requires_grad_()
    return x, linear, a, b


def naive(x: Tensor, linear: Linear, a: Tensor, b: Tensor, mask: Tensor | float = 1.0) -> Tensor:
    return F.linear(x, linear.weight, linear.bias) + S * F.linear(F.linear(x * mask, a), b)


def same_mask(x: Tensor, p: float) -> Tensor:
    torch.manual_seed(5)
    rows = x.detach().reshape(-1, x.shape[-1])
    ones, identity = torch.ones_like(rows), torch.eye(rows.shape[1], dtype=rows.dtype)
    return keep(rows, p).times(ones, identity).view_as(x) / (1 - p)


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_values_and_gradients_are_autograds(tokens: int, p: float) -> None:
    x, linear, a, b = tensors(tokens)
    torch.manual_seed(5)
    ours = lora_linear(x, linear, a, b, S, p)
    wanted = naive(x, linear, a, b, same_mask(x, p))
    torch.testing.assert_close(ours, wanted)
    out = torch.randn_like(ours)
    for mine, other in zip(
        torch.autograd.grad(ours, (x, a, b), out), torch.autograd.grad(wanted, (x, a, b), out), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize("trains", ["x", "a", "b", "bias"])
def test_a_gradient_that_nobody_wants_changes_nothing_of_the_others(trains: str, tokens: int) -> None:
    x, linear, a, b = tensors(tokens)
    assert linear.bias is not None
    named = {"x": x, "a": a, "b": b, "bias": linear.bias}
    for name, tensor in named.items():
        tensor.requires_grad_(name == trains)
    results = [function(x, linear, a, b, *more) for function, more in ((lora_linear, (S,)), (naive, ()))]
    mine, other = (torch.autograd.grad(out.square().sum(), named[trains])[0] for out in results)
    torch.testing.assert_close(mine, other)


def test_what_is_saved_is_x_and_a_thin_product() -> None:
    x, linear, a, b = tensors(1000, torch.float32)
    sizes = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append((tensor.data_ptr(), tensor.numel()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lora_linear(x, linear, a, b, S, 0.05)
    own = {t.data_ptr() for t in (x, linear.weight, a, b)}
    assert sum(numel for pointer, numel in sizes if pointer not in own) < 4 * 1000 + 0.06 * x.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype_and_leaves_gradients_in_theirs(dtype: torch.dtype) -> None:
    x, linear, a, b = tensors(MANY, torch.float32)
    with torch.autocast("cpu", dtype):
        ours, wanted = lora_linear(x, linear, a, b, S), naive(x, linear, a, b)
    assert ours.dtype == dtype
    close = {"rtol": 0.05, "atol": 0.05 * wanted.abs().max().item()}
    torch.testing.assert_close(ours, wanted.to(dtype), **close)
    for tensor, grad, other in zip(
        (x, a, b),
        torch.autograd.grad(ours.float().sum(), (x, a, b)),
        torch.autograd.grad(wanted.float().sum(), (x, a, b)),
        strict=True,
    ):
        assert grad.dtype == tensor.dtype == torch.float32
        torch.testing.assert_close(grad, other, rtol=0.05, atol=0.05 * other.abs().max().item())


def test_a_small_change_of_a_bf16_base_is_not_lost() -> None:
    # In bf16, W + 1e-4 is W for most entries: the sum of both terms must be made after the products.
    x, linear, a, b = tensors(MANY, torch.float32)
    half = Linear(linear.weight.bfloat16(), None)
    with torch.no_grad():
        b.mul_(1e-4)
        x16 = x.bfloat16()
        base = F.linear(x16.double(), half.weight.double())
        change = lora_linear(x16, half, a, b, S).double() - base
        wanted = S * F.linear(F.linear(x16.double(), a.double()), b.double())
        rounding = F.linear(x16, half.weight).double() - base
    fitted = (change * wanted).sum() / wanted.square().sum()
    noise = rounding.norm() / wanted.norm() / wanted.numel() ** 0.5
    assert abs(fitted.item() - 1) < 5 * noise.item()


def test_checkpointing_and_double_use_are_autograds() -> None:
    x, _, a, _ = tensors(MANY)
    square = Linear(torch.randn(24, 24).double())
    wide = torch.randn(24, 4).double().requires_grad_()

    def twice(x: Tensor) -> Tensor:
        return lora_linear(lora_linear(x, square, a, wide, S, 0.1), square, a, wide, S, 0.1)

    grads = []
    for run in (twice, lambda x: checkpoint(twice, x, use_reentrant=False)):
        torch.manual_seed(3)
        grads.append(torch.autograd.grad(run(x).square().sum(), (x, a, wide)))
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine, other)


def test_x_may_be_a_view_with_gaps_and_the_rank_zero() -> None:
    _, linear, a, b = tensors(MANY)
    x = torch.randn(24, 9).double().T.requires_grad_()
    torch.testing.assert_close(lora_linear(x, linear, a, b, S, 0.0), naive(x, linear, a, b))
    lora_linear(x, linear, a, b, S, 0.1).sum().backward()
    none = lora_linear(x, linear, a[:0], b[:, :0], S, 0.1)
    torch.testing.assert_close(none, F.linear(x, linear.weight, linear.bias))
