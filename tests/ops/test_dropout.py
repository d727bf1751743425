"""Which entries are dropped, and that products know of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_ft.ops.dropout import AllBut, Kept, keep, positions


def mask_of(kept: Kept, like: Tensor) -> Tensor:
    """The zeros and ones that it stands for."""
    return kept.times(torch.ones_like(like), torch.eye(like.shape[1], dtype=like.dtype))


@pytest.mark.parametrize("p", [0.01, 0.05, 0.2])
def test_positions_are_independent_draws(p: float) -> None:
    n, times = 64, 20_000
    drawn = torch.zeros(times, n)
    for row in drawn:
        found = positions(n, p)
        assert torch.equal(found, found.unique())
        row[found] = 1
    error = (p * (1 - p) / times) ** 0.5
    assert ((drawn.mean(0) - p).abs() < 4.5 * error).all()  # each as often, the first and the last too
    together = (drawn[:, :-1] * drawn[:, 1:]).mean(0)  # and neighbours know nothing of each other
    assert ((together - p * p).abs() < 4.5 * (p * p / times) ** 0.5 + 1e-3).all()
    count = drawn.sum(1)
    assert count.var().item() == pytest.approx(n * p * (1 - p), rel=0.1)


def test_many_positions_are_drawn_to_the_end() -> None:
    found = positions(1_000_000, 0.05)
    assert 0 <= found[0].item() < 500
    assert 999_500 < found[-1].item() < 1_000_000
    assert len(found) / 1_000_000 == pytest.approx(0.05, rel=0.03)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.6])
def test_products_are_those_with_the_mask(p: float) -> None:
    x, right, left = torch.randn(9, 7).double(), torch.randn(7, 3).double(), torch.randn(3, 9).double()
    kept, before = keep(x, p), x.clone()
    mask = mask_of(kept, x)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    torch.testing.assert_close(kept.times(x, right), (mask * x) @ right)
    torch.testing.assert_close(kept.under(left, x, x.dtype), left @ (mask * x))
    out = torch.randn(9, 7).double()
    wanted = out + mask * (0.5 * torch.ones(9, 2).double() @ torch.ones(2, 7).double())
    added = kept.add_product_(out, torch.ones(9, 2).double(), torch.ones(2, 7).double(), 0.5)
    torch.testing.assert_close(added, wanted)
    assert added is out
    torch.testing.assert_close(kept.of_product(left.T, right.T), mask * (left.T @ right.T))
    assert torch.equal(x, before)
    assert x._version == 0  # autograd must not think that it changed


def test_products_by_positions_are_those_with_the_mask_at_once_and_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x, right, left = torch.randn(301, 70), torch.randn(70, 3), torch.randn(3, 301)
    kept = keep(x, 0.1)
    assert isinstance(kept, AllBut)
    mask = torch.ones(x.numel()).index_fill_(0, kept.saved[0], 0).view_as(x)
    assert 0.85 < mask.mean() < 0.95
    for size in (2**20, 9 * 70 * 4):  # at once, and in pieces of nine rows
        monkeypatch.setitem(AllBut.times.__globals__, "_AT_ONCE", size)
        torch.testing.assert_close(kept.times(x, right), (mask * x) @ right)
        torch.testing.assert_close(kept.under(left, x, x.dtype), left @ (mask * x))
    product = left.T @ right.T
    torch.testing.assert_close(kept.add_product_(x.clone(), left.T, right.T, 2.0), x + 2 * mask * product)
    torch.testing.assert_close(kept.of_product(left.T, right.T), mask * product)
