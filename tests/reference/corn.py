"""CORN as the paper says it, one subset and one row at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def loss(logits: Sequence[Sequence[float]], ranks: Sequence[int]) -> float:
    """For each question k the rows that are above the grade before; the mean over all that are asked."""
    total, asked = 0.0, 0
    for k in range(len(logits[0])):
        subset = [i for i, rank in enumerate(ranks) if k == 0 or rank > k - 1]
        for i in subset:
            probability = sigmoid(logits[i][k])
            total -= math.log(probability if ranks[i] > k else 1 - probability)
        asked += len(subset)
    return total / asked


def probabilities(logits: Sequence[float]) -> list[float]:
    """Of each rank: the chain of being above all grades before, and not above this one."""
    found, above = [], 1.0
    for z in logits:
        found.append(above * (1 - sigmoid(z)))
        above *= sigmoid(z)
    return [*found, above]
