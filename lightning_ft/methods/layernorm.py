"""LayerNorm tuning: the norms alone are trained (Zhao et al. 2023, https://arxiv.org/abs/2312.11420, section 2).

Of ``γ ∘ (x - μ) / σ + β``, each norm learns its ``γ`` and ``β`` (an RMSNorm its ``γ``). Nothing is added to the model,
so that inference costs what it did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from lightning_ft.callbacks.finetuning import FineTuning
from lightning_ft.injection import InjectionError, train_own


def vectors(module: nn.Module) -> list[str]:
    """The names of a norm's own γ and β; nothing of a module that isn't a norm, or of a BatchNorm.

    Each library has norms of its own (``LlamaRMSNorm``, ``T5LayerNorm``), and each calls them so.
    """
    kind = type(module).__name__
    if "Norm" not in kind or "BatchNorm" in kind:
        return []
    return [name for name, parameter in module.named_parameters(recurse=False) if parameter.ndim == 1]


class LayerNormTuning(FineTuning):
    """Train the norms of the base (Zhao et al. 2023, https://arxiv.org/abs/2312.11420): layer, RMS and group norms.

    Args:
        target_modules: the norms to train: names or ends of names, or a regular expression; by default all.
        exclude_modules: what of them is left out.
        modules_to_save, backbone, quantize: see :class:`~lightning_ft.callbacks.finetuning.FineTuning`.

    Raises:
        InjectionError: on injection, see :meth:`FineTuning.inject`; and if the base has no norms.
    """

    peft_type: ClassVar[str] = "PARTIAL"
    trains_of_base = "vectors"
    plausible_lr: ClassVar[tuple[float, float]] = (1e-4, 5e-2)

    def __init__(
        self,
        target_modules: str | Sequence[str] | None = None,
        *,
        exclude_modules: str | Sequence[str] | None = None,
        modules_to_save: Sequence[str] | None = None,
        backbone: str | None = None,
        quantize: str | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(modules_to_save, backbone, quantize)
        self.target_modules, self.exclude_modules = target_modules, exclude_modules

    def inject(self, model: nn.Module) -> list[str]:
        """Freeze all of the base but the norms; see :meth:`FineTuning.inject`."""
        base, saved = self.prepare(model)
        if not any(vectors(module) for _, module in base.named_modules()):
            raise InjectionError(f"{type(base.root).__name__} has no layer, RMS or group norms with weights to train.")
        return train_own(base, "LayerNormTuning", vectors, self.target_modules, self.exclude_modules, saved)
