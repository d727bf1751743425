"""LoRA on a linear layer as one differentiable function.

    y = W x + b + s · B A drop(x)       x (..., in), W (out, in), A (r, in), B (out, r)

Written as torch operations, autograd saves what each of them needs: the dropped copy of x and its mask, the product
before it is scaled, casts. Written as one, it saves x, which the layers around it share, and ``A drop(x)``, which is
thin; the sums are the accumulating products of the BLAS, and dx, dA and dB are

    dh = s · dy B        dA = dhᵀ drop(x)        dB = s · dyᵀ drop(x) Aᵀ        dx = dy W + m ∘ (dh A) / (1 - p)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ft.ops.autograd import as_rows, cast, first_order
from lightning_ft.ops.dropout import Kept, keep, product
from lightning_ft.ops.imagined import device_type
from lightning_ft.ops.packed import PackedWeight
from lightning_ft.ops.shared_input import rows_of, thin_product


class Linear(NamedTuple):
    """A frozen linear layer.

    Attributes:
        weight, bias: (out, in), or packed, and (out,).
        dense: makes the (out, in) of a packed weight.
        dtype: what it computes in; None for that of the weight.
        packed: the weight in an order in which products with it are quicker.
    """

    weight: Tensor
    bias: Tensor | None = None
    dense: Callable[[Tensor], Tensor] | None = None
    dtype: torch.dtype | None = None
    packed: PackedWeight | None = None


def lora_linear(x: Tensor, linear: Linear, a: Tensor, b: Tensor, scaling: float, dropout: float = 0.0) -> Tensor:
    """``W x + bias + scaling · B A drop(x)``.

    It's computed in one dtype: that of autocast where it's on, else the layer's. Products are summed in fp32 or more,
    and the sum of both terms is rounded once. The gradients of A and B have the dtype of A and B, and where there's no
    autocast the result has that of x.

    Args:
        x: (..., in).
        linear: the frozen layer; no gradient is computed for its weight.
        a, b: (r, in) and (out, r).
        scaling: s, not 0.
        dropout: p, the probability that an entry of x is left out of the second term.

    Returns:
        (..., out).
    """
    kind = x.device.type
    autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else linear.dtype or linear.weight.dtype
    if torch.compiler.is_compiling():  # it fuses what it sees
        out = _plainly(x, linear, a, b, scaling, dropout, dtype)
    elif autocast:
        with torch.autocast(kind, enabled=False):
            return _fused(x, linear, a, b, scaling, dropout, dtype)
    else:
        out = _fused(x, linear, a, b, scaling, dropout, dtype)
    return out if autocast or out.dtype == x.dtype else out.to(x.dtype)


def _fused(
    x: Tensor, linear: Linear, a: Tensor, b: Tensor, scaling: float, dropout: float, dtype: torch.dtype
) -> Tensor:
    packed = linear.packed if dtype == linear.weight.dtype else None
    frozen, rows = (linear.weight, linear.bias, linear.dense, packed), rows_of(x, dtype)
    if not torch.is_grad_enabled() and not dropout:
        return _without_graph(rows, linear._replace(packed=packed), a, b, scaling).view(*x.shape[:-1], len(b))
    if dropout and torch.is_grad_enabled():
        h = thin_product(x, rows, a, scaling, dropout)
        if h is not None:
            return _OverShared.apply(x, h, rows, *frozen, b)
    return _LoRALinear.apply(x, rows, *frozen, a, b, scaling, dropout)


def _without_graph(rows: Tensor, linear: Linear, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """What is left of the function where nothing is to be known again: of few tokens Python takes most of the time."""
    weight, bias, dense, _, packed = linear
    a, b, bias = (cast(tensor, rows.dtype) for tensor in (a, b, bias))
    if packed is None and _pays_to_merge(rows, a, b):
        return F.linear(rows, torch.addmm(_full(weight, dense, rows.dtype), b, a, alpha=scaling), bias)
    return _frozen(rows, weight, bias, dense, packed).addmm_(rows @ a.t(), b.t(), alpha=scaling)


def _plainly(
    x: Tensor, linear: Linear, a: Tensor, b: Tensor, scaling: float, dropout: float, dtype: torch.dtype
) -> Tensor:
    low_rank = F.linear(F.linear(F.dropout(x.to(dtype), dropout), a.to(dtype)), b.to(dtype))
    weight = linear.weight if linear.dense is None else linear.dense(linear.weight)
    return F.linear(x.to(dtype), weight.to(dtype), cast(linear.bias, dtype)) + scaling * low_rank


class _LoRALinear(torch.autograd.Function):
    # Where layers are small, what Python does here and the kernels that it starts are what a step costs: so s goes
    # into A, which is cast anyway, and into a product (addmm with beta=0 doesn't read its first argument).

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dense: Callable[[Tensor], Tensor] | None,
        packed: PackedWeight | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        dtype = rows.dtype
        ctx.dense, ctx.packed, ctx.s = dense, packed, scaling / (1 - dropout)
        ctx.x, ctx.dtypes = (x.shape, x.dtype), (a.dtype, b.dtype)
        sa = a * ctx.s if a.dtype == dtype else torch.mul(a, ctx.s, out=torch.empty_like(a, dtype=dtype))
        b, bias = cast(b, dtype), cast(bias, dtype)
        ctx.kept = kept = keep(rows, dropout)
        ctx.merged = dropout == 0 and packed is None and _pays_to_merge(rows, a, b)
        if ctx.merged:
            h = None
            out = F.linear(rows, torch.addmm(_full(weight, dense, dtype), b, sa), bias)
        else:
            h = kept.times(rows, sa.t())
            out = _frozen(rows, weight, bias, dense, packed).addmm_(h, b.t())
        ctx.save_for_backward(rows, weight, sa, b, h, *kept.saved)
        kept.saved = ()
        return out if x.ndim == 2 else out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        rows, weight, sa, b, h, *saved = ctx.saved_tensors
        wants_x, _, _, wants_bias, _, _, wants_a, wants_b, *_ = ctx.needs_input_grad
        kept: Kept = ctx.kept.again(saved)
        grad, (shape, x_dtype), (a_dtype, b_dtype) = as_rows(grad), ctx.x, ctx.dtypes
        dx = da = None
        h = rows @ sa.t() if h is None else h
        dh = torch.addmm(h, grad, _by_columns(b, len(grad)), beta=0, alpha=ctx.s)
        db = _gradient_of_b(grad, h, b_dtype) if wants_b else None
        if wants_a:
            da = kept.under(dh.t(), rows, a_dtype)
        if wants_x:
            if ctx.merged:
                dx = grad @ torch.addmm(_full(weight, ctx.dense, grad.dtype), b, sa)
            else:
                dx = kept.add_product_(_back(grad, weight, ctx.dense, ctx.packed), dh, sa, 1 / ctx.s)
            dx = cast(dx.view(shape), x_dtype)
        dbias = grad.sum(0) if wants_bias else None
        return dx, None, None, dbias, None, None, da, db, None, None


class _OverShared(torch.autograd.Function):
    """``W x + bias + h Bᵀ``: what is left of a layer whose thin product is shared."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h: Tensor,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dense: Callable[[Tensor], Tensor] | None,
        packed: PackedWeight | None,
        b: Tensor,
    ) -> Tensor:
        ctx.dense, ctx.packed, ctx.x, ctx.b_dtype = dense, packed, (x.shape, x.dtype), b.dtype
        b = cast(b, rows.dtype)
        out = _frozen(rows, weight, cast(bias, rows.dtype), dense, packed).addmm_(h, b.t())
        ctx.save_for_backward(weight, b, h)
        return out if x.ndim == 2 else out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        weight, b, h = ctx.saved_tensors
        wants_x, wants_h, _, _, wants_bias, _, _, wants_b = ctx.needs_input_grad
        grad, (shape, x_dtype) = as_rows(grad), ctx.x
        dx = cast(_back(grad, weight, ctx.dense, ctx.packed).view(shape), x_dtype) if wants_x else None
        dh = grad @ _by_columns(b, len(grad)) if wants_h else None
        db = _gradient_of_b(grad, h, ctx.b_dtype) if wants_b else None
        dbias = grad.sum(0) if wants_bias else None
        return dx, dh, None, None, dbias, None, None, db


def _frozen(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dense: Callable[[Tensor], Tensor] | None,
    packed: PackedWeight | None,
) -> Tensor:
    """``x Wᵀ + bias``."""
    return packed.times(rows, bias) if packed else F.linear(rows, _full(weight, dense, rows.dtype), bias)


def _back(
    grad: Tensor, weight: Tensor, dense: Callable[[Tensor], Tensor] | None, packed: PackedWeight | None
) -> Tensor:
    """``dy W``."""
    return packed.back(grad) if packed else grad @ _full(weight, dense, grad.dtype)


def _gradient_of_b(grad: Tensor, h: Tensor, dtype: torch.dtype) -> Tensor:
    """``dyᵀ h``: (out, r). A BLAS is slow at a result of few columns, on a CPU above all."""
    return product(grad.t(), h, dtype) if grad.is_cuda else product(h.t(), grad, dtype).t()


def _by_columns(b: Tensor, rows: int) -> Tensor:
    """``b`` (out, r) stored by columns, where a BLAS is several times slower at its product with many rows."""
    return b if b.is_cuda or rows < 2**9 else b.t().contiguous().t()


def _full(weight: Tensor, dense: Callable[[Tensor], Tensor] | None, dtype: torch.dtype) -> Tensor:
    """The frozen W (out, in)."""
    return cast(weight if dense is None else dense(weight), dtype)


def _pays_to_merge(rows: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether one product with ``W + s · B A`` is quicker than a thin one beside that with W, and as exact.

    In less than full fp32 the sum would lose what is small in ``B A`` beside W: nearly all of it, early in training.
    """
    (_, n), m = a.shape, len(b)
    if len(rows) * (n + m) <= 2 * n * m or rows.dtype.itemsize < 4:
        return False
    return device_type(rows) == "cpu" and torch.get_float32_matmul_precision() == "highest"
