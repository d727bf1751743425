"""Packed weights for a fit on a CPU: quicker steps for memory."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn  # type: ignore[attr-defined]
from torch import nn

from lightning_ft.injection import Injected, find_base
from lightning_ft.ops import ask_to_pack, bytes_of_packed, forget_packed


class PackedWeights(Callback):
    """Holds the frozen weights beside LoRA and AdaLoRA in oneDNN's order too while any LightningModule is fitted.

    ``L.Trainer(callbacks=[LoRA(), PackedWeights()])``. For fp32 and bf16 on a CPU. Each weight is packed when it's
    first used, its products are compared with the plain ones, and it's held twice more: a line says how much that is.
    What can't be packed, or changes, is computed with as ever (but for a change through ``.data``, which torch doesn't
    count). Sums are rounded otherwise than those of a BLAS.

    Args:
        backbone: path of the base, where it isn't the one Hugging Face model
            (:func:`lightning_ft.injection.find_base`).

    Raises:
        InjectionError: when ``fit`` starts, if there is no base to be found.
    """

    def __init__(self, backbone: str | None = None) -> None:
        self.backbone = backbone
        self._modules: list[nn.Module] = []
        self._told = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask for it."""
        root = find_base(pl_module, self.backbone).root
        self._modules, self._told = [module for module in root.modules() if isinstance(module, Injected)], False
        ask_to_pack(self._modules)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say, once, what was packed."""
        if self._told:
            return
        self._told = True
        if sizes := bytes_of_packed(self._modules):
            rank_zero_info(
                f"PackedWeights: {len(sizes)} frozen weights are held packed too, {sum(sizes) / 2**20:.1f} MiB."
            )
        else:
            rank_zero_warn(
                "PackedWeights: no weight could be packed. That's for frozen linear layers beside LoRA or AdaLoRA, in"
                " fp32 or bf16, not under autocast, on a CPU for which torch has oneDNN: elsewhere leave it out."
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of them."""
        forget_packed(self._modules)
        self._modules = []

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of them."""
        self.teardown(trainer, pl_module, "")
