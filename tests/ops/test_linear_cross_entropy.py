"""Cross-entropy in pieces against torch's, of logits that are whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_ft.ops import linear_cross_entropy


@pytest.mark.parametrize(("rows", "in_cache"), [(1, 1), (5, 2), (5, 100), (100, 3)])
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradients_are_those_of_whole_logits(
    rows: int, in_cache: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(linear_cross_entropy.__globals__["_AT_ONCE"], "cpu", rows * 11)
    monkeypatch.setitem(linear_cross_entropy.__globals__, "_IN_CACHE", in_cache * 11)
    hidden, weight = torch.randn(13, 8).requires_grad_(), torch.randn(11, 8).requires_grad_()
    offset = torch.randn(11).requires_grad_() if bias else None
    labels = torch.randint(0, 11, (13,))
    ours = linear_cross_entropy(hidden, weight, labels, offset)
    wanted = F.cross_entropy(F.linear(hidden, weight, offset), labels, reduction="sum")
    torch.testing.assert_close(ours, wanted)
    inputs = [tensor for tensor in (hidden, weight, offset) if tensor is not None]
    for mine, other in zip(torch.autograd.grad(3 * ours, inputs), torch.autograd.grad(3 * wanted, inputs), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_bf16_is_as_near_as_torch_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(linear_cross_entropy.__globals__, "_IN_CACHE", 7 * 500)
    hidden, weight = torch.randn(64, 32), torch.randn(500, 32) / 4
    labels = torch.randint(0, 500, (64,))
    exact = hidden.double().requires_grad_()
    wanted = F.cross_entropy(exact @ weight.double().T, labels, reduction="sum")
    (grad,) = torch.autograd.grad(wanted, exact)
    half = hidden.bfloat16().requires_grad_()
    ours = linear_cross_entropy(half, weight.bfloat16(), labels)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(wanted.item(), rel=2e-3)
    (mine,) = torch.autograd.grad(ours, half)
    assert ((mine.double() - grad).norm() / grad.norm()).item() < 0.02
    with torch.autocast("cpu", torch.bfloat16):
        cast = linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(cast, ours)


def test_no_rows_are_no_loss() -> None:
    hidden = torch.randn(0, 8).requires_grad_()
    loss = linear_cross_entropy(hidden, torch.randn(11, 8), torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, 8)
