"""What the differentiable functions here have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def first_order(gradients: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """A backward pass in plain operations, of dtypes that the forward pass has settled.

    Raises:
        RuntimeError: for ``create_graph=True``, whose second derivative would be a wrong one.
    """

    @functools.wraps(gradients)
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("LoRA's linear layers have no second derivative (create_graph=True).")
        kind = next((grad.device.type for grad in grads if grad is not None), "cpu")
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return gradients(ctx, *grads)
        return gradients(ctx, *grads)

    return backward


def cast(tensor: Any, dtype: torch.dtype) -> Any:
    """``tensor`` in ``dtype``, itself where it is; None stays None."""
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def as_rows(x: Tensor) -> Tensor:
    """(..., n) as (rows, n), contiguous."""
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.is_contiguous() else rows.contiguous()
