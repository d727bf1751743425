"""Layers of one input against plain autograd under one mask, and against themselves each alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_ft.ops import Linear, lora_linear
from lightning_ft.ops import shared_input as room
from lightning_ft.ops.dropout import keep

pytestmark = pytest.mark.skipif(room._top_hooks is None, reason="torch before 2.8: every layer computes its own")

P = 0.05
RANKS, SCALINGS = (4, 2, 3), (0.7, 0.7, 1.3)


@pytest.fixture(autouse=True)
def _nothing_seen() -> None:
    forget()


def forget() -> None:
    """Have the next pass be a first one."""
    room._recent.input = None
    room._together.clear()


class Layers:
    """Three LoRA layers."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(0)
        self.linears = [Linear(torch.randn(16, 24, dtype=dtype), torch.randn(16, dtype=dtype)) for _ in RANKS]
        self.a = [torch.randn(r, 24, dtype=dtype).requires_grad_() for r in RANKS]
        self.b = [torch.randn(16, r, dtype=dtype).requires_grad_() for r in RANKS]

    def __call__(self, *inputs: Tensor, p: float = P) -> list[Tensor]:
        return [
            lora_linear(x, linear, a, b, s, p)
            for x, linear, a, b, s in zip(inputs, self.linears, self.a, self.b, SCALINGS, strict=False)
        ]

    def naive(self, x: Tensor, masks: Sequence[Tensor | float]) -> list[Tensor]:
        return [
            F.linear(x, linear.weight, linear.bias) + s * F.linear(F.linear(x * mask, a), b)
            for linear, a, b, s, mask in zip(self.linears, self.a, self.b, SCALINGS, masks, strict=True)
        ]

    def gradients(self, outs: list[Tensor], x: Tensor) -> tuple[Tensor | None, ...]:
        leaves = (x, *self.a, *self.b)
        for leaf in leaves:
            leaf.grad = None
        torch.stack([(i + 1) * out.double().square().sum() for i, out in enumerate(outs)]).sum().backward()
        return tuple(leaf.grad for leaf in leaves)


def an_input(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 100, 24, dtype=dtype).requires_grad_()


def draws(x: Tensor, count: int) -> list[Tensor]:
    """The masks that are drawn one after the other from this seed on."""
    torch.manual_seed(5)
    rows = x.detach().reshape(-1, 24)
    ones, identity = torch.ones_like(rows), torch.eye(24, dtype=rows.dtype)
    return [keep(rows, P).times(ones, identity).view_as(x) / (1 - P) for _ in range(count)]


def passed(layers: Layers, *inputs: Tensor, **more: Any) -> list[Tensor]:
    """What they give from that seed on."""
    torch.manual_seed(5)
    return layers(*inputs, **more)


def assert_same(mine: tuple[Tensor | None, ...], others: tuple[Tensor | None, ...]) -> None:
    for one, other in zip(mine, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("earlier", [0, 1, 3])
def test_values_and_gradients_are_autograds_under_one_mask(earlier: int) -> None:
    layers = Layers()
    for _ in range(earlier):
        x = an_input()
        passed(layers, x, x, x)
    x = an_input()
    ours = passed(layers, x, x, x)
    masks = draws(x, 1) * 3 if earlier else draws(x, 3)  # the first pass doesn't know yet
    wanted = layers.naive(x, masks)
    torch.testing.assert_close(ours, wanted)
    assert_same(layers.gradients(ours, x), layers.gradients(wanted, x))


@pytest.mark.parametrize("frozen", ["x", "a", "b"])
def test_a_gradient_that_nobody_wants_changes_nothing_of_the_others(frozen: str) -> None:
    layers = Layers()
    x = an_input()
    passed(layers, x, x, x)
    x = an_input()
    {"x": x, "a": layers.a[1], "b": layers.b[1]}[frozen].requires_grad_(False)
    ours, wanted = passed(layers, x, x, x), layers.naive(x, draws(x, 1) * 3)
    leaves = [tensor for tensor in (x, *layers.a, *layers.b) if tensor.requires_grad]
    grads = [torch.autograd.grad(torch.stack(outs).square().sum(), leaves) for outs in (ours, wanted)]
    assert_same(*grads)


def test_a_layer_that_does_not_come_or_gets_another_input_is_right() -> None:
    layers = Layers()
    x, y = an_input(), an_input()
    passed(layers, x, x, x)
    x = an_input()
    two = passed(layers, x, x)  # the third doesn't come
    grads = layers.gradients(two, x)
    assert_same(grads, layers.gradients(layers.naive(x, draws(x, 1) * 3)[:2], x))
    assert grads[3] is None  # its A was in the product: not a zero, by which an optimizer would decay it
    passed(layers, x, x, x)
    x = an_input()
    first, second, third = passed(layers, x, y, x)
    masks = draws(x, 3)
    torch.testing.assert_close([first, third], layers.naive(x, [masks[0], masks[1], masks[2]])[::2])
    torch.testing.assert_close(second, layers.naive(y, [masks[0], masks[1], masks[2]])[1])


def test_an_input_that_changes_in_between_is_another() -> None:
    layers = Layers()
    x = an_input()
    passed(layers, x, x, x)
    x = an_input().detach()
    passed(layers, x)
    x.mul_(2)
    second = lora_linear(x, layers.linears[1], layers.a[1], layers.b[1], SCALINGS[1], P)
    torch.testing.assert_close(second, layers.naive(x, draws(x, 2)[1:] * 3)[1])


def test_other_settings_are_computed_alone() -> None:
    layers = Layers()
    x = an_input()
    passed(layers, x, x, x)
    x, ones = an_input(), [1.0] * 3
    passed(layers, x)
    evaluated = lora_linear(x, layers.linears[1], layers.a[1], layers.b[1], SCALINGS[1], 0.0)
    torch.testing.assert_close(evaluated, layers.naive(x, ones)[1])
    passed(layers, x)
    rescaled = lora_linear(x, layers.linears[2], layers.a[2], layers.b[2], 2 * SCALINGS[2], P)
    frozen, plain = layers.naive(x, [0.0] * 3)[2], layers.naive(x, draws(x, 2)[1:] * 3)[2]
    torch.testing.assert_close(rescaled, frozen + 2 * (plain - frozen))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("early_stop", [True, False])
def test_checkpointing_draws_the_same_again(use_reentrant: bool, early_stop: bool) -> None:
    layers = Layers()
    x = an_input()

    def run(x: Tensor) -> Tensor:
        return torch.stack(layers(x, x, x))

    for _ in range(3):
        grads = []
        for again in (False, True):
            torch.manual_seed(3)
            with torch.utils.checkpoint.set_checkpoint_early_stop(early_stop):
                forget()  # the plain pass draws as a first one does
                out = checkpoint(run, x, use_reentrant=use_reentrant) if again else run(x)
                grads.append(layers.gradients(list(out), x))
        assert_same(*grads)


def test_a_cast_and_what_is_dropped_are_kept_once() -> None:
    layers = Layers(torch.float32)
    sizes = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    found = []
    for p, half in ((P, False), (0.0, True)):
        forget()
        for _ in range(2):
            x = an_input(torch.float32)
            own = {
                t.untyped_storage().data_ptr() for t in (x, *layers.a, *layers.b, *(n.weight for n in layers.linears))
            }
            sizes.clear()
            precision = torch.autocast("cpu", torch.bfloat16) if half else nullcontext()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), precision:
                outs = layers(x, x, x, p=p)
            found.append(sum(size for pointer, size in sizes.items() if pointer not in own))
            del outs
    assert found[1] < found[0]
    thin = sum(RANKS) * 2 * (200 + 24 + 16)  # h, A and B in 16 bits
    assert found[2] == found[3] == 2 * x.numel() + thin


def test_nothing_is_held_of_an_input_that_all_have_fetched() -> None:
    layers = Layers()
    for _ in range(2):
        x = an_input()
        outs = passed(layers, x, x, x)
    assert room._recent.input is not None
    assert not room._recent.input.waiting
    del outs, x
    assert room._recent.input.x.tensor() is None
