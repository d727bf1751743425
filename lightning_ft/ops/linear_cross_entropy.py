"""Cross-entropy of a language model's head, some rows at a time.

    L = Σ_i  logsumexp(W h_i) - (W h_i)[y_i]        h (n, d), W (V, d)

The logits (n, V) are most of what a step of a language model holds: written as torch operations there are several of
them at once. Here a piece of them exists at a time, and since the derivative of L is known as soon as they are, it is
taken there and then (as in Liger Kernel, https://arxiv.org/abs/2410.10989, section 3.2):

    ∂L/∂h = P W      ∂L/∂W = Pᵀ h      P = softmax(h Wᵀ) - onehot(y)

What is kept for the backward pass is of the size of h, and of W where it trains.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_ft.ops.dropout import HAS_TRITON
from lightning_ft.ops.imagined import device_type, imagined_device

_AT_ONCE = {"cpu": 2**25}
_AT_ONCE_ELSEWHERE = 2**27
"""How many logits there are at a time: 128 MiB of them in fp32 on a CPU, 256 MiB in 16 bits on a GPU."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None) -> Tensor:
    """The sum over all rows of the cross-entropy of ``softmax(hidden Wᵀ + bias)``, in fp32.

    Products are in the dtype of autocast where it's on, else in that of ``weight``; the rest is in fp32.

    Args:
        hidden: (n, d).
        weight, bias: (V, d) and (V,).
        labels: (n,), from 0 to V - 1.

    Returns:
        A scalar.
    """
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(kind, enabled=False):
        return _LinearCrossEntropy.apply(hidden, weight, bias, labels)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[:3]
        dh = torch.empty_like(hidden) if wanted[0] else None
        dw, db = (
            torch.zeros_like(tensor, dtype=torch.float32) if wants and tensor is not None else None
            for wants, tensor in zip(wanted[1:], (weight, bias), strict=True)
        )
        total = torch.zeros((), device=hidden.device)
        rows = max(1, _AT_ONCE.get(device_type(hidden), _AT_ONCE_ELSEWHERE) // len(weight))
        for start in range(0, len(hidden), rows):
            piece = slice(start, start + rows)
            logits = hidden[piece] @ weight.T
            if bias is not None:
                logits += bias
            loss, p = _losses_and_gradients(logits, labels[piece], any(wanted))
            total += loss
            if p is None:
                continue
            if db is not None:
                db += p.sum(0, dtype=db.dtype)
            if dh is not None:
                torch.mm(p, weight, out=dh[piece])
            if dw is not None:
                dw += p.T @ hidden[piece]
            del logits, p  # else they'd be there beside the next ones
        ctx.save_for_backward(dh, dw, db)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dh, dw, db = ctx.saved_tensors
        dw, db = (None if d is None else (d * grad).to(ctx.dtype) for d in (dw, db))
        return None if dh is None else dh * grad.to(dh.dtype), dw, db, None


def _losses_and_gradients(logits: Tensor, labels: Tensor, wants_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """The sum over the rows, and ``P`` in the dtype of the logits, which may be written over."""
    if logits.is_cuda and HAS_TRITON:
        from lightning_ft.ops.triton_cross_entropy import cross_entropy_

        return cross_entropy_(logits, labels, wants_gradient).sum(), logits if wants_gradient else None
    if imagined_device() not in (None, "cpu"):  # what that kernel leaves
        return logits.sum(dtype=torch.float32), logits if wants_gradient else None
    dtype, chosen = logits.dtype, labels[:, None]
    logits = logits.float()
    likelihood = logits.logsumexp(dim=1, keepdim=True)
    loss = (likelihood - logits.gather(1, chosen)).sum()
    if not wants_gradient:
        return loss, None
    p = logits.sub_(likelihood).exp_()
    return loss, p.scatter_add_(1, chosen, torch.full_like(chosen, -1, dtype=p.dtype)).to(dtype)
