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

_AT_ONCE = {"cpu": 2**24}
_AT_ONCE_ELSEWHERE = 2**27
"""How many logits there are at a time: 64 MiB of them in fp32 on a CPU, 256 MiB in 16 bits on a GPU."""

_IN_CACHE = 2**19
"""How many of them a CPU makes gradients of at a time, in several passes: 2 MiB in fp32."""


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
        logits = hidden.new_empty(min(rows, len(hidden)), len(weight))
        for start in range(0, len(hidden), rows):
            h, y = hidden[start : start + rows], labels[start : start + rows]
            p = torch.mm(h, weight.T, out=logits[: len(h)])
            if bias is not None:
                p += bias
            total += _loss_and_gradient_(p, y, any(wanted))
            if db is not None:
                db += p.sum(0, dtype=db.dtype)
            if dh is not None:
                torch.mm(p, weight, out=dh[start : start + rows])
            if dw is not None:
                dw += p.T @ h
        ctx.save_for_backward(dh, dw, db)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dh, dw, db = ctx.saved_tensors
        dw, db = (None if d is None else (d * grad).to(ctx.dtype) for d in (dw, db))
        return None if dh is None else dh * grad.to(dh.dtype), dw, db, None


def _loss_and_gradient_(logits: Tensor, labels: Tensor, wants_gradient: bool) -> Tensor:
    """The sum over the rows; ``P``, where it's wanted, is written over the logits."""
    if logits.is_cuda and HAS_TRITON:
        from lightning_ft.ops.triton_cross_entropy import cross_entropy_

        return cross_entropy_(logits, labels, wants_gradient).sum()
    on_cpu, imagined = device_type(logits) == "cpu", imagined_device() is not None
    if imagined and not on_cpu:  # what that kernel leaves
        return logits.sum(dtype=torch.float32)
    rows = max(1, _IN_CACHE // logits.shape[1]) if on_cpu else len(logits)
    if imagined:  # no values: the first turn takes what each does
        logits, labels = logits[:rows], labels[:rows]
    scratch = None if logits.dtype == torch.float32 else torch.empty_like(logits[:rows], dtype=torch.float32)
    total = torch.zeros((), device=logits.device)
    for piece, chosen in zip(logits.split(rows), labels[:, None].split(rows), strict=True):
        exact = piece if scratch is None else scratch[: len(piece)].copy_(piece)
        torch.log_softmax(exact, 1, out=exact)
        total -= exact.gather(1, chosen).sum()
        if wants_gradient:
            exact.exp_().scatter_add_(1, chosen, torch.full_like(chosen, -1, dtype=exact.dtype))
            if scratch is not None:
                piece.copy_(exact)
    return total
