"""Head only (linear probing): the base is a fixed feature extractor, the task head alone trains."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from lightning_ft.callbacks.finetuning import FineTuning
from lightning_ft.injection import InjectionError, freeze_all_but


class HeadOnly(FineTuning):
    """Freeze the base and train what lies outside it.

    Args:
        modules_to_save: parts of the base to train as well.
        backbone, quantize: see :class:`~lightning_ft.callbacks.finetuning.FineTuning`.

    Raises:
        InjectionError: on injection, if nothing is left to train.
    """

    peft_type: ClassVar[str] = "PARTIAL"
    plausible_lr: ClassVar[tuple[float, float]] = (1e-4, 1.0)
    decides_alone: ClassVar[bool] = True

    def inject(self, model: nn.Module) -> list[str]:
        """Freeze the base; see :meth:`FineTuning.inject`."""
        base, saved = self.prepare(model)
        freeze_all_but(base, "HeadOnly", saved)
        if not any(p.requires_grad for p in model.parameters()):
            raise InjectionError(
                f"HeadOnly leaves nothing of {type(model).__name__} to train: all of its parameters are in the"
                ' base. Name the base (backbone="encoder"), or what is to be trained (modules_to_save=["fc"]).'
            )
        return []
