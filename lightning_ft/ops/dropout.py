"""Dropout on the input of a thin product, without a dropped copy that is kept.

``drop(x) = m ∘ x / (1 - p)``, the entries of m independent and 1 with probability 1 - p. The factor ``1 / (1 - p)``
is left to the caller, who has another one to fold it into. The classes here are ways of knowing m again in the
backward pass.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lightning_ft.ops.imagined import imagined_device


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``L R`` in ``dtype``, not rounded in between where the device can do that."""
    if left.dtype == dtype:
        return left @ right
    if left.is_cuda and dtype == torch.float32 and _HAS_OUT_DTYPE:
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)


_HAS_OUT_DTYPE = hasattr(torch.ops.aten.mm, "dtype")
HAS_TRITON = importlib.util.find_spec("triton") is not None


class Kept:
    """All of x (rows, n): p is 0.

    Attributes:
        saved: the tensors that it takes to know m again; they're autograd's to keep in between.
    """

    def __init__(self, *saved: Tensor) -> None:
        self.saved = saved

    def again(self, saved: Sequence[Tensor]) -> Kept:
        """The same m, of the tensors that autograd kept."""
        return type(self)(*saved) if saved else self

    def times(self, x: Tensor, right: Tensor) -> Tensor:
        """``(m ∘ x) R``: (rows, n) and (n, r) to (rows, r)."""
        return x @ right

    def under(self, left: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``L (m ∘ x)`` in ``dtype``: (r, rows) and (rows, n) to (r, n)."""
        return product(left, x, dtype)

    def add_product_(self, out: Tensor, left: Tensor, right: Tensor, alpha: float) -> Tensor:
        """``out += m ∘ (alpha · L R)`` in place: (rows, n), from (rows, r) and (r, n); ``out`` is contiguous."""
        return out.addmm_(left, right, alpha=alpha)

    def of_product(self, left: Tensor, right: Tensor) -> Tensor:
        """``m ∘ (L R)``: (rows, r) and (r, n) to (rows, n)."""
        return left @ right


class AllBut(Kept):
    """All but what lies at some positions (k,) of x as a vector, which ascend.

    They're few, so that zeros are written there, into a copy: that costs a fraction of what masking all of x does. Of a
    large x some rows are copied at a time, so that it takes no memory to speak of.
    """

    def times(self, x: Tensor, right: Tensor) -> Tensor:
        """``(m ∘ x) R``."""
        out = x.new_empty(len(x), right.shape[1])
        for rows, kept in self._kept(x):
            torch.mm(kept, right, out=out[rows])
        return out

    def under(self, left: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``L (m ∘ x)``."""
        out = x.new_zeros(len(left), x.shape[1], dtype=dtype)
        for rows, kept in self._kept(x):
            out += left[:, rows] @ kept
        return out

    def add_product_(self, out: Tensor, left: Tensor, right: Tensor, alpha: float) -> Tensor:
        """``out += m ∘ (alpha · L R)``."""
        (dropped,), flat = self.saved, out.view(-1)
        before = flat.take(dropped)
        out.addmm_(left, right, alpha=alpha)
        flat.index_copy_(0, dropped, before)
        return out

    def of_product(self, left: Tensor, right: Tensor) -> Tensor:
        """``m ∘ (L R)``."""
        out = left @ right
        out.view(-1).index_fill_(0, self.saved[0], 0)
        return out

    def _kept(self, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Rows of x, some at a time, and what ``m ∘ x`` is there, until the next are asked for."""
        (dropped,), (rows, n) = self.saved, x.shape
        step = max(1, _AT_ONCE // (n * x.dtype.itemsize))
        starts = range(0, rows, step)
        if imagined_device() is None:
            ends = torch.searchsorted(dropped, torch.arange(0, rows, step)[1:] * n).tolist()
        else:
            ends = [len(dropped) * start // rows for start in starts[1:]]
        copy = torch.empty_like(x[:step])
        for start, (begin, end) in zip(starts, pairwise([0, *ends, len(dropped)]), strict=True):
            piece = slice(start, start + step)
            kept = copy[: len(x[piece])].copy_(x[piece])
            kept.view(-1).index_fill_(0, dropped[begin:end] - start * n if start else dropped[begin:end], 0)
            yield piece, kept


_AT_ONCE = 2**23
"""Bytes of x at a time. Much less, and one thread writes the few zeros of a piece alone."""


class Masked(Kept):
    """What a mask (rows, n) of booleans keeps."""

    def times(self, x: Tensor, right: Tensor) -> Tensor:
        """``(m ∘ x) R``."""
        return (x * self.saved[0]) @ right

    def under(self, left: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``L (m ∘ x)``."""
        return product(left, x * self.saved[0], dtype)

    def add_product_(self, out: Tensor, left: Tensor, right: Tensor, alpha: float) -> Tensor:
        """``out += m ∘ (alpha · L R)``."""
        return out.addcmul_(left @ right, self.saved[0], value=alpha)

    def of_product(self, left: Tensor, right: Tensor) -> Tensor:
        """``m ∘ (L R)``."""
        return (left @ right).mul_(self.saved[0])


class Seeded(Kept):
    """What a seed says, with the probability p of being dropped: on a GPU, by a kernel that draws the mask anew."""

    def __init__(self, seed: int, p: float) -> None:
        super().__init__()
        self.seed, self.p = seed, p

    def times(self, x: Tensor, right: Tensor) -> Tensor:
        """``(m ∘ x) R``."""
        return self._masked(x) @ right

    def under(self, left: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``L (m ∘ x)``."""
        return product(left, self._masked(x), dtype)

    def add_product_(self, out: Tensor, left: Tensor, right: Tensor, alpha: float) -> Tensor:
        """``out += m ∘ (alpha · L R)``."""
        from lightning_ft.ops.triton_dropout import add_masked_

        return add_masked_(out, left @ right, alpha, self.p, self.seed)

    def of_product(self, left: Tensor, right: Tensor) -> Tensor:
        """``m ∘ (L R)``."""
        return self._masked(left @ right)

    def _masked(self, x: Tensor) -> Tensor:
        from lightning_ft.ops.triton_dropout import masked

        return masked(x, self.p, self.seed)


class Unsaved(Kept):
    """As :class:`Seeded` for tensors without values: nothing is kept, and a masked copy lives as long as a product."""

    def times(self, x: Tensor, right: Tensor) -> Tensor:
        """``(m ∘ x) R``."""
        return x.clone() @ right

    def under(self, left: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``L (m ∘ x)``."""
        return product(left, x.clone(), dtype)

    def add_product_(self, out: Tensor, left: Tensor, right: Tensor, alpha: float) -> Tensor:
        """``out += m ∘ (alpha · L R)``."""
        return out.add_(left @ right, alpha=alpha)


def keep(x: Tensor, p: float) -> Kept:
    """Draw what of ``x`` (rows, n; contiguous) is kept, each entry with probability ``1 - p``."""
    if p == 0:
        return _ALL
    if (imagined := imagined_device()) is not None and imagined != "cpu":
        return Unsaved()
    if x.is_cuda and HAS_TRITON and x.numel() < 2**31:
        return Seeded(int(torch.randint(2**31 - 1, ())), p)  # of the CPU's numbers: nobody waits for the GPU
    if x.device.type == "cpu" and p <= 0.25 and x.numel() >= 2**14:  # else a mask is as quick
        return AllBut(positions(x.numel(), p))
    return Masked(torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p))


_ALL = Kept()


def positions(n: int, p: float) -> Tensor:
    """Those of ``0 … n-1`` that independent draws with probability ``p`` choose: (k,), ascending.

    From one to the next it's a geometrically distributed step, ``1 + ⌊ln u / ln(1 - p)⌋`` for a uniform u in (0, 1]:
    as many draws as there are positions, and not n.
    """
    if imagined_device() is not None:
        return torch.empty(_enough(n, p), dtype=torch.long)[: round(n * p)]
    found, last = [], -1
    while last < n:
        count = _enough(n - last, p)
        steps = torch.rand(count).neg_().log1p_().mul_(1 / math.log1p(-p)).long().add_(1)
        found.append(steps.cumsum_(0).add_(last))
        last = int(steps[-1])
    drawn = found[0] if len(found) == 1 else torch.cat(found)
    return drawn[: int(torch.searchsorted(drawn, n))]


def _enough(n: int, p: float) -> int:
    """So many steps seldom are too few to get through ``n`` places."""
    return int(n * p + 4 * math.sqrt(n * p * (1 - p))) + 8
