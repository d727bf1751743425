"""A moving average of the weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


class Averaging(WeightAveraging):
    """Lightning's WeightAveraging by an exponential moving average, ``w̄ ← w̄ + (1 - decay) (w - w̄)``.

    The average is validated, kept in checkpoints, and what is left when the fit is over; training goes on without it.
    What is frozen stays as it is to the bit. Under EMAWeightAveraging it doesn't: ``decay · w + (1 - decay) · w`` isn't
    quite w, and an adapter would be saved over other weights than the base's. It comes after the method's callback.

    Args:
        decay: the average is over the last 1 / (1 - decay) steps or so.
        start: the step with which it begins; what is validated before is the model as it was.
        device: where the average is kept; by default where the model is.
    """

    def __init__(self, decay: float = 0.99, start: int = 10, device: str | int | None = None) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"Averaging: decay must be at least 0 and below 1, not {decay!r}.")
        # Buffers are copied, not averaged: some are whole numbers (positions).
        super().__init__(device=device, use_buffers=False, avg_fn=partial(_nearer, share=1 - decay))
        self.start = start

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """After each step from ``start`` on."""
        return step_idx is not None and step_idx >= self.start


def _nearer(average: Tensor, now: Tensor, _: Any, share: float) -> Tensor:
    return torch.lerp(average, now, share) if average.is_floating_point() else now
