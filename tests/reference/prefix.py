"""Prefix tuning written as in the paper, head by head: what ours is compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, p_k: Tensor, p_v: Tensor, causal: bool) -> Tensor:
    """softmax(Q [P_K; K]ᵀ / √d) [P_V; V] of one head, for Q, K, V (T, d) and P_K, P_V (n, d)."""
    scores = q @ torch.cat([p_k, k]).T / q.shape[1] ** 0.5
    if causal:
        for row in range(len(q)):
            scores[row, len(p_k) + row + 1 :] = -torch.inf
    return torch.softmax(scores, dim=1) @ torch.cat([p_v, v])


def projected(e: Tensor, w: list[Tensor], b: list[Tensor]) -> Tensor:
    """The prefix of all layers, W₂ tanh(W₁ E), for E (n, d)."""
    return torch.tanh(e @ w[0].T + b[0]) @ w[1].T + b[1]
