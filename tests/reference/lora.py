"""LoRA written as in the paper, with matrices and nothing else: what ours is compared with."""

from __future__ import annotations

from torch import Tensor


def lora_linear(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, r: int, alpha: float) -> Tensor:
    """h = W x + bias + alpha/r · B A x, for x (batch, in), W (out, in), A (r, in), B (out, r)."""
    h = (w + alpha / r * b @ a) @ x.T
    return (h if bias is None else h + bias[:, None]).T


def lora_embedding(tokens: Tensor, w: Tensor, a: Tensor, b: Tensor, r: int, alpha: float) -> Tensor:
    """Rows of W + alpha/r · (B A)ᵀ, for tokens (batch,), W (tokens, width), A (r, tokens), B (width, r)."""
    return (w + alpha / r * (b @ a).T)[tokens]
