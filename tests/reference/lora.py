"""LoRA written as in the paper, with matrices and nothing else: what ours is compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def lora_linear(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, r: int, alpha: float) -> Tensor:
    """h = W x + bias + alpha/r · B A x, for x (batch, in), W (out, in), A (r, in), B (out, r)."""
    h = (w + alpha / r * b @ a) @ x.T
    return (h if bias is None else h + bias[:, None]).T


def lora_embedding(tokens: Tensor, w: Tensor, a: Tensor, b: Tensor, r: int, alpha: float) -> Tensor:
    """Rows of W + alpha/r · (B A)ᵀ, for tokens (batch,), W (tokens, width), A (r, tokens), B (width, r)."""
    return (w + alpha / r * (b @ a).T)[tokens]


def dora_linear(x: Tensor, w: Tensor, a: Tensor, b: Tensor, m: Tensor, s: float) -> Tensor:
    """h = W' x with W' = m (V + ΔV) / ‖V + ΔV‖_c, V = W, ΔV = s B A; c: one for each output, a constant."""
    moved = w + s * b @ a
    norm = torch.stack([row.detach().square().sum().sqrt() for row in moved])
    return x @ (moved * (m / norm)[:, None]).T


def residual_linear(x: Tensor, w: Tensor, a: Tensor, b: Tensor, a0: Tensor, b0: Tensor, s: float) -> Tensor:
    """h = W_res x + s B A x with W_res = W - s B₀ A₀ (PiSSA, OLoRA)."""
    return x @ (w - s * b0 @ a0 + s * b @ a).T
