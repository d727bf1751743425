"""Layers that are given one and the same input (query, key and value; gate and up) share what is made of it alone.

Its cast to the dtype of products is made once, and kept once. Under dropout they share a mask, and the thin product:

    h = (h₁ h₂ …) = drop(x) (s₁A₁; s₂A₂; …)ᵀ        dA = dhᵀ drop(x)        dx = m ∘ (dh sA) / (1 - p) + Σᵢ dyᵢ Wᵢ

for what of such a layer costs beside the frozen one passes over x. It's computed in the first one's turn, which has to
know who will follow: those that had the same tensor in one pass are taken to have it in the next. One that doesn't
come, or comes with something else, loses nothing but a thin product. The first pass draws a mask for each of them.

Not where a pass may be run again (checkpointing), which has to save the same tensors and draw the same numbers.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_ft.ops.autograd import as_rows, cast, first_order
from lightning_ft.ops.dropout import Kept, keep
from lightning_ft.ops.imagined import imagined_device


class _Layer(NamedTuple):
    """A layer that had an input: its A, weakly, and its s."""

    a: weakref.ref[Tensor]
    scaling: float


class _AsItWas(NamedTuple):
    """A tensor, weakly, at one of its versions."""

    tensor: weakref.ref[Tensor]
    version: int

    @classmethod
    def of(cls, x: Tensor) -> _AsItWas:
        return cls(weakref.ref(x), x._version)

    def is_now(self, x: Tensor) -> bool:
        return self.tensor() is x and self.version == x._version


class _Input(NamedTuple):
    """What layers had, and how; which these were; and what isn't fetched yet of what is shared."""

    x: _AsItWas
    how: tuple[float, torch.dtype]
    layers: dict[int, _Layer]
    waiting: dict[int, tuple[Tensor, float, Tensor]]  # with A itself, whose id no other then has


class _Cast(NamedTuple):
    """The rows of a tensor in another dtype."""

    x: _AsItWas
    rows: weakref.ref[Tensor]  # which is autograd's to keep


class _Recent(threading.local):
    cast: _Cast | None = None
    input: _Input | None = None


_recent = _Recent()
_together: Any = WeakTensorKeyDictionary()
"""The layers of an input, by the A of the first."""


def rows_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` (..., n) as (rows, n) in ``dtype``, without a graph: for layers of one input one and the same tensor."""
    if x.dtype == dtype or not torch.is_grad_enabled():  # without a graph nothing is kept
        return as_rows(cast(x.detach(), dtype))
    recent = _recent.cast
    if recent is not None and recent.x.is_now(x):
        rows = recent.rows()
        if rows is not None and rows.dtype == dtype:
            return rows
    rows = as_rows(x.detach().to(dtype))
    _recent.cast = _Cast(_AsItWas.of(x), weakref.ref(rows))
    return rows


def thin_product(x: Tensor, rows: Tensor, a: Tensor, scaling: float, dropout: float) -> Tensor | None:
    """``s / (1 - p) · A (m ∘ x)``, (rows, r), where a layer shares it; None where it's alone, or not known yet.

    Args:
        x: (..., in), as the layer is given it.
        rows: of :func:`rows_of`.
        a: the layer's A (r, in), by which it is known.
        scaling: its s.
        dropout: p.
    """
    if _shares_nothing():
        return None
    how, recent = (dropout, rows.dtype), _recent.input
    if recent is None or recent.how != how or not recent.x.is_now(x):
        if recent is not None:
            _remember(recent)
        recent = _recent.input = _Input(_AsItWas.of(x), how, {}, {})
        _compute(recent, x, rows, a, scaling)
    recent.layers[id(a)] = _Layer(weakref.ref(a), scaling)
    _, of, found = recent.waiting.pop(id(a), (a, scaling, None))
    return found if of == scaling else None


def _remember(past: _Input) -> None:
    layers = [layer for layer in past.layers.values() if layer.a() is not None]
    if len(layers) > 1:
        _together[layers[0].a()] = layers
    elif layers:
        _together.pop(layers[0].a(), None)


def _compute(recent: _Input, x: Tensor, rows: Tensor, a: Tensor, scaling: float) -> None:
    """For all layers that are expected to have ``x``, of which that with ``a`` is the first."""
    dropout, _ = recent.how
    expected = [(layer.a(), layer.scaling) for layer in _together.get(a, ())[1:]]
    layers = [(a, scaling), *((b, s) for b, s in expected if b is not None and _is_like(b, a))]
    if len(layers) == 1:
        return
    products = _Thin.apply(x, rows, dropout, [s / (1 - dropout) for _, s in layers], *(each for each, _ in layers))
    for (each, s), h in zip(layers, products, strict=True):
        recent.waiting[id(each)] = (each, s, h)


def _is_like(b: Tensor, a: Tensor) -> bool:
    return (b.dtype, b.device, b.shape[1], type(b)) == (a.dtype, a.device, a.shape[1], type(a))


def _shares_nothing() -> bool:
    """In a pass that checkpointing may run a second time, and in one without values, which is always a first."""
    if _top_hooks is None or imagined_device() is not None or torch._C._current_graph_task_id() != -1:
        return True
    hooks = _top_hooks(True)
    return hooks is not None and hooks[0].__module__ == torch.utils.checkpoint.__name__


_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # since torch 2.8


class _Thin(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows: Tensor, dropout: float, scalings: Sequence[float], *factors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.x, ctx.a_dtype = (x.shape, x.dtype), factors[0].dtype
        ctx.scalings, ctx.ranks = scalings, [len(a) for a in factors]
        sa = cast(torch.cat([a * s for a, s in zip(factors, scalings, strict=True)]), rows.dtype)
        ctx.kept = kept = keep(rows, dropout)
        h = kept.times(rows, sa.t())
        ctx.save_for_backward(rows, sa, *kept.saved)
        kept.saved = ()
        return h.split(ctx.ranks, 1)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        rows, sa, *saved = ctx.saved_tensors
        (shape, x_dtype), (wants_x, _, _, _, *wants_a) = ctx.x, ctx.needs_input_grad
        kept: Kept = ctx.kept.again(saved)
        # A layer that wasn't run has none: nor has its A one then.
        dh = [rows.new_zeros(len(rows), r) if g is None else g for g, r in zip(grads, ctx.ranks, strict=True)]
        thin = torch.cat(dh, 1)
        wanted = [wants and grad is not None for wants, grad in zip(wants_a, grads, strict=True)]
        da = kept.under(thin.t(), rows, ctx.a_dtype).split(ctx.ranks) if any(wanted) else (sa,) * len(grads)
        das = [part * s if wants else None for part, s, wants in zip(da, ctx.scalings, wanted, strict=True)]
        dx = cast(kept.of_product(thin, sa).view(shape), x_dtype) if wants_x else None
        return dx, None, None, None, *das
