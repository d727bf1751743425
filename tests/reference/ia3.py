"""IA3 written as in the paper, element by element: what ours is compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def rescaled_outputs(x: Tensor, w: Tensor, b: Tensor | None, l: Tensor) -> Tensor:  # noqa: E741
    """l ∘ K with K = W x + b, for x (batch, in), W (out, in), l (out,)."""
    rows = [[l[i] * (w[i] @ row + (0 if b is None else b[i])) for i in range(len(l))] for row in x]
    return torch.stack([torch.stack(row) for row in rows])


def rescaled_inputs(x: Tensor, w: Tensor, b: Tensor | None, l: Tensor) -> Tensor:  # noqa: E741
    """(l ∘ x) W₂, the second linear layer of a feed-forward block, for x (batch, in), W (out, in), l (in,)."""
    rows = [[sum(w[i, j] * l[j] * row[j] for j in range(len(l))) for i in range(len(w))] for row in x]
    out = torch.stack([torch.stack(row) for row in rows])
    return out if b is None else out + b
