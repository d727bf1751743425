"""The best checkpoint of those that count."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_ft.callbacks.finetuning import FineTuning


class BestCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint by whose ``monitor`` a checkpoint counts once every method has settled.

    While AdaLoRA's ranks are above their budget, a model may score better than any that keeps to it. ``save_last``
    saves at all times.
    """

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Whether the present model is among the best."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        settled = all(callback.settled for callback in callbacks if isinstance(callback, FineTuning))
        return settled and super().check_monitor_top_k(trainer, current)
