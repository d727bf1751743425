"""BitFit: the bias terms alone are trained (Ben Zaken et al. 2022, https://arxiv.org/abs/2106.10199).

Each linear layer ``W x + b`` and each norm keeps its weight, and learns its ``b``. Nothing is added to the model, so
that inference costs what it did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from lightning_ft.callbacks.finetuning import FineTuning
from lightning_ft.injection import InjectionError, train_own


def biases(module: nn.Module) -> list[str]:
    """The names of a module's own bias vectors: ``bias``, ``in_proj_bias``, ``q_bias``, ``bias_ih_l0``."""
    added = {key for mixin in getattr(module, "_mixins", ()) for key in mixin.adds}
    return [
        name
        for name, parameter in module.named_parameters(recurse=False)
        if "bias" in name.split("_") and parameter.ndim == 1 and name not in added
    ]


class BitFit(FineTuning):
    """Train the biases of the base (Ben Zaken et al. 2022, https://arxiv.org/abs/2106.10199).

    Args:
        target_modules: the modules whose biases train, norms among them: names or ends of names, or a regular
            expression; by default all. The paper's subset (section 3) is ``["query", "intermediate.dense"]`` in BERT.
        exclude_modules: what of them is left out.
        modules_to_save, backbone, quantize: see :class:`~lightning_ft.callbacks.finetuning.FineTuning`.

    Raises:
        InjectionError: on injection, see :meth:`FineTuning.inject`; and if the base has no biases, as Llama and T5.
    """

    peft_type: ClassVar[str] = "PARTIAL"
    trains_of_base = "vectors"
    plausible_lr: ClassVar[tuple[float, float]] = (1e-4, 3e-2)

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
        """Freeze all of the base but the biases; see :meth:`FineTuning.inject`."""
        base, saved = self.prepare(model)
        if not any(biases(module) for _, module in base.named_modules()):
            raise InjectionError(
                f"{type(base.root).__name__} has no biases that BitFit could train. LayerNormTuning and IA3 train as"
                " few parameters, and need none."
            )
        return train_own(base, "BitFit", biases, self.target_modules, self.exclude_modules, saved)
