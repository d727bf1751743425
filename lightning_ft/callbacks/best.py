"""The best checkpoint of those that count."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_ft.callbacks.finetuning import FineTuning


class BestCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint by whose ``monitor`` a checkpoint counts once every method has settled.

    While AdaLoRA's ranks are above their budget, a model may score better than any that keeps to it. ``save_last``
    saves at all times.

    Args:
        restore: put the best checkpoint's weights back into the module when a fit is over. (``lightning-ft train``
            tests and saves the best ones without it.)
        arguments: of ModelCheckpoint, by name.
    """

    def __init__(self, *, restore: bool = False, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.restore = restore

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore, if asked to and there is a best one."""
        if self.restore and self.best_model_path:
            trainer.strategy.barrier()  # until it's written
            checkpoint = trainer.strategy.load_checkpoint(self.best_model_path)
            trainer.strategy.load_model_state_dict(checkpoint, strict=pl_module.strict_loading)

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Whether the present model is among the best."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        settled = all(callback.settled for callback in callbacks if isinstance(callback, FineTuning))
        return settled and super().check_monitor_top_k(trainer, current)
