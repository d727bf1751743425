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
from torch.autograd.function import once_differentiable

from lightning_ft.ops.dropout import Kept, keep


class Linear(NamedTuple):
    """A frozen linear layer.

    Attributes:
        weight, bias: (out, in), or packed, and (out,).
        dense: makes the (out, in) of a packed weight.
        dtype: what it computes in; None for that of the weight.
    """

    weight: Tensor
    bias: Tensor | None = None
    dense: Callable[[Tensor], Tensor] | None = None
    dtype: torch.dtype | None = None


def lora_linear(x: Tensor, linear: Linear, a: Tensor, b: Tensor, scaling: float, dropout: float = 0.0) -> Tensor:
    """``W x + bias + scaling · B A drop(x)``.

    It's computed in one dtype: that of autocast where it's on, else the layer's. Products are summed in fp32 or more,
    and the sum of both terms is rounded once. The gradients of A and B have the dtype of A and B, and where there's no
    autocast the result has that of x.

    Args:
        x: (..., in).
        linear: the frozen layer; no gradient is computed for its weight.
        a, b: (r, in) and (out, r).
        scaling: s.
        dropout: p, the probability that an entry of x is left out of the second term.

    Returns:
        (..., out).
    """
    kind, (weight, bias, dense, dtype) = x.device.type, linear
    given, autocast = x.dtype, torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else dtype or weight.dtype
    x, a, b = x.to(dtype), a.to(dtype), b.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    if dense is None:
        weight = weight.to(dtype)
    with torch.autocast(kind, enabled=False):
        if torch.compiler.is_compiling():  # it fuses what it sees
            out = F.linear(x, weight if dense is None else dense(weight).to(dtype), bias)
            out = out + scaling * F.linear(F.linear(F.dropout(x, dropout), a), b)
        else:
            out = _LoRALinear.apply(x, weight, bias, dense, a, b, scaling, dropout)
    return out if autocast else out.to(given)


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dense: Callable[[Tensor], Tensor] | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        full = weight if dense is None else dense(weight).to(x.dtype)
        kept = keep(rows, dropout)
        ctx.alpha = scaling / (1 - dropout)
        ctx.merged = dropout == 0 and _pays_to_merge(rows, full)
        if ctx.merged:
            h = None
            out = F.linear(rows, torch.addmm(full, b, a, alpha=scaling), bias)
        else:
            h = kept.times(rows, a.T)
            out = F.linear(rows, full, bias).addmm_(h, b.T, alpha=ctx.alpha)
        ctx.save_for_backward(x, weight, a, b, h, *kept.saved)
        ctx.kept, ctx.dense = type(kept), dense
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, a, b, h, *saved = ctx.saved_tensors
        wants_x, _, wants_bias, _, wants_a, wants_b, *_ = ctx.needs_input_grad
        kept: Kept = ctx.kept(*saved)
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        grad = grad.reshape(-1, grad.shape[-1])
        dx = da = db = None
        with torch.autocast(x.device.type, enabled=False):
            dh = grad @ b.T.contiguous().T
            if wants_b:
                h = kept.times(rows, a.T) if h is None else h
                db = (h.T @ grad).mul_(ctx.alpha).T  # in this order: a BLAS is slow at a result of few columns
            if wants_a:
                da = kept.under(dh.T, rows).mul_(ctx.alpha)
            if wants_x:
                full = weight if ctx.dense is None else ctx.dense(weight).to(x.dtype)
                if ctx.merged:
                    dx = grad @ torch.addmm(full, b, a, alpha=ctx.alpha)
                else:
                    dx = kept.add_product_(grad @ full, dh, a, ctx.alpha)
                dx = dx.view(x.shape)
            dbias = grad.sum(0) if wants_bias else None
        return dx, None, dbias, None, da, db, None, None


def _pays_to_merge(rows: Tensor, weight: Tensor) -> bool:
    """Whether one product with ``W + s · B A`` is quicker than a thin one beside that with W, and as exact.

    In less than full fp32 the sum would lose what is small in ``B A`` beside W: nearly all of it, early in training.
    """
    full = rows.dtype in (torch.float32, torch.float64) and torch.get_float32_matmul_precision() == "highest"
    return full and rows.device.type == "cpu" and len(rows) > 2 * weight.numel() // sum(weight.shape)
