"""Weights of labels in a loss, as people name them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def in_order(labels: Sequence[str], weights: Sequence[float] | Mapping[str, float], argument: str) -> Tensor:
    """The weight of each label, (labels,).

    Args:
        labels: in the order of their ids.
        weights: one a label, by name or in that order.
        argument: what it's called, for the message.

    Raises:
        ValueError: if the weights don't fit the labels, or none is above 0.
    """
    if isinstance(weights, Mapping):
        if set(weights) != set(labels):
            raise ValueError(f"{argument} names {sorted(weights)}; the labels are {sorted(labels)}.")
        weights = [weights[label] for label in labels]
    if len(weights) != len(labels) or min(weights) < 0 or max(weights) == 0:
        raise ValueError(
            f"{argument} must be {len(labels)} numbers of at least 0, not all of them 0, not {list(weights)}."
        )
    return torch.tensor(weights, dtype=torch.float32)
