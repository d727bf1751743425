"""Full fine-tuning: every parameter of the base trains. The reference the others are compared with."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from lightning_ft.callbacks.finetuning import FineTuning
from lightning_ft.injection import find_base, refuse_injected, refuse_packed, thaw, unfreeze


class FullFineTuning(FineTuning):
    """Train everything: base and head.

    Args:
        backbone: see :class:`~lightning_ft.callbacks.finetuning.FineTuning`.
    """

    def __init__(self, backbone: str | None = None) -> None:
        super().__init__(backbone=backbone)

    peft_type: ClassVar[str] = "PARTIAL"
    plausible_lr: ClassVar[tuple[float, float]] = (1e-6, 1e-3)
    decides_alone: ClassVar[bool] = True
    trains_of_base = "weights"

    def inject(self, model: nn.Module) -> list[str]:
        """Unfreeze the base; see :meth:`FineTuning.inject`."""
        base = find_base(model, self.backbone)
        refuse_injected(base, "FullFineTuning")
        refuse_packed(base, [name for name, _ in base.named_parameters()], "FullFineTuning")
        thaw(base.root)
        unfreeze(base.parts())
        return []
