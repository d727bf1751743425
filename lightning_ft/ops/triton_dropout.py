"""Dropout on a GPU whose mask is a function of a seed and a place, so that it's drawn again and never stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _masked(x, base, out, n, alpha, p, seed, adds: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.program_id(0) * block + tl.arange(0, block)
    inside = places < n
    value = tl.load(x + places, mask=inside)
    value = tl.where(tl.rand(seed, places) >= p, value, 0.0)
    if adds:
        value = alpha * value.to(tl.float32) + tl.load(base + places, mask=inside).to(tl.float32)
    tl.store(out + places, value, mask=inside)


def masked(x: Tensor, p: float, seed: int) -> Tensor:
    """``m ∘ x`` for a contiguous ``x`` of fewer than 2³¹ entries, each kept with probability ``1 - p``."""
    out = torch.empty_like(x)
    _masked[(triton.cdiv(x.numel(), _BLOCK),)](x, x, out, x.numel(), 1.0, p, seed, adds=False, block=_BLOCK)
    return out


def add_masked_(out: Tensor, x: Tensor, alpha: float, p: float, seed: int) -> Tensor:
    """``out += alpha · m ∘ x`` with the same m, in place."""
    _masked[(triton.cdiv(x.numel(), _BLOCK),)](x, out, out, x.numel(), alpha, p, seed, adds=True, block=_BLOCK)
    return out
