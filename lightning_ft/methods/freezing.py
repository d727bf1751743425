"""Freezing schedules: the upper layers alone train, from the start or one more each epoch.

Lower layers hold what is general, upper ones what is particular to the task (Howard & Ruder 2018,
https://arxiv.org/abs/1801.06146, section 3.3): train the last layer first, and in every epoch unfreeze the next lower
one, so that what was pretrained isn't forgotten while the new head is still random.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from torch import nn

from lightning_ft.callbacks.finetuning import FineTuning, check_count
from lightning_ft.injection import Base, InjectionError, find_base, freeze_all_but, layer_depths, match_modules


def freeze_below(base: Base, method: str, saved: Sequence[str], start: int, end: int | None) -> list[str]:
    """Train the top ``end`` layers of the base (None: all of it), what comes after them, and ``saved``.

    Returns:
        Paths, in the model that was searched, of the modules that train.

    Raises:
        InjectionError: if the base has no stack of layers, or fewer than ``start`` or ``end``.
    """
    depths = layer_depths(base.root, base.frozen)
    kind, layers = type(base.root).__name__, max(depths.values(), default=0)
    if not depths:
        raise InjectionError(
            f"{method} needs a stack of layers (an nn.ModuleList of two or more), and {kind} has none."
            " HeadOnly(modules_to_save=[...]) trains the parts that you name."
        )
    if (most := max(start, end or 0)) > layers:
        raise InjectionError(f"{method}: {kind} has {layers} layers, not {most}. FullFineTuning trains all of it.")
    trained = [name for name, depth in depths.items() if end is None or depth > layers - end]
    freeze_all_but(base, method, saved, trained)
    return [base.prefixed(path) for path in dict.fromkeys(name.rpartition(".")[0] for name in trained)]


class TopLayers(FineTuning):
    """Train the top layers of the base, what comes after them (a pooler, the last norm), and the head.

    Args:
        k: how many layers; of each stack, where an encoder and a decoder have one each.
        modules_to_save, backbone: see :class:`~lightning_ft.callbacks.finetuning.FineTuning`.

    Raises:
        ValueError: if ``k`` isn't a whole number of at least 1.
        InjectionError: on injection, see :meth:`FineTuning.inject`; and if the base has no stack of so many layers.
    """

    peft_type: ClassVar[str] = "PARTIAL"
    plausible_lr: ClassVar[tuple[float, float]] = (5e-6, 2e-3)
    decides_alone: ClassVar[bool] = True
    trains_of_base = "weights"

    def __init__(
        self, k: int = 2, *, modules_to_save: Sequence[str] | None = None, backbone: str | None = None
    ) -> None:
        super().__init__(modules_to_save, backbone)
        check_count("TopLayers: k", k)
        self.k = k

    def inject(self, model: nn.Module) -> list[str]:
        """Freeze the lower layers; see :meth:`FineTuning.inject`."""
        base = find_base(model, self.backbone)
        return freeze_below(base, "TopLayers", match_modules(base, self.modules_to_save), self.k, self.k)


class GradualUnfreezing(FineTuning):
    """Train the top layer and the head, and in every epoch one layer more, from the top down.

    ULMFiT (Howard & Ruder 2018, https://arxiv.org/abs/1801.06146, section 3.3). What waits for its turn is in the
    optimizer and in checkpoints from the start, so that schedules and resuming know one set of parameters. It gets
    no gradient until then, and optimizers pass it by: no momentum, no weight decay. Which layers wait follows from
    the epoch alone, so that a resumed fit goes on with the same.

    Under DDP what waits is unused: ``Trainer(strategy="ddp_find_unused_parameters_true")``.

    Args:
        start: how many layers train in the first epoch, with what comes after them (a pooler, the last norm).
        every_n_epochs: how many epochs pass until one more trains.
        max_layers: how many train in the end; None: all, and one step later the embeddings.
        modules_to_save, backbone: see :class:`~lightning_ft.callbacks.finetuning.FineTuning`; what is named there
            doesn't wait.

    Raises:
        ValueError: for a number that isn't a whole one of at least 1, or ``max_layers`` below ``start``.
        InjectionError: on injection, see :meth:`FineTuning.inject`; and if the base has no stack of so many layers.
    """

    peft_type: ClassVar[str] = "PARTIAL"
    plausible_lr: ClassVar[tuple[float, float]] = (5e-6, 2e-3)
    decides_alone: ClassVar[bool] = True
    trains_of_base = "weights"

    def __init__(
        self,
        start: int = 1,
        every_n_epochs: int = 1,
        max_layers: int | None = None,
        *,
        modules_to_save: Sequence[str] | None = None,
        backbone: str | None = None,
    ) -> None:
        super().__init__(modules_to_save, backbone)
        most = start if max_layers is None else max_layers
        for name, value in {"start": start, "every_n_epochs": every_n_epochs, "max_layers": most}.items():
            check_count(f"GradualUnfreezing: {name}", value)
        if most < start:
            raise ValueError(f"GradualUnfreezing: max_layers={max_layers} is less than start={start}.")
        self.start, self.every_n_epochs, self.max_layers = start, every_n_epochs, max_layers
        self._waiting: list[nn.Parameter] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See :class:`FineTuning`.

        Raises:
            InjectionError: under a strategy that shards parameters.
        """
        if stage == "fit" and trainer.strategy.restore_checkpoint_after_setup:  # as Lightning does for those
            raise InjectionError(
                f"GradualUnfreezing changes what trains as it goes, and {type(trainer.strategy).__name__} fixes that"
                " when it shards. Use strategy='ddp_find_unused_parameters_true', or TopLayers."
            )
        super().setup(trainer, pl_module, stage)

    def inject(self, model: nn.Module) -> list[str]:
        """Freeze what never trains; see :meth:`FineTuning.inject`. What trains later is held back within a fit."""
        base = find_base(model, self.backbone)
        saved = match_modules(base, self.modules_to_save)
        return freeze_below(base, "GradualUnfreezing", saved, self.start, self.max_layers)

    def describe(self, model: nn.Module, names: Sequence[str]) -> str:
        """What trains in the end, and how it gets there."""
        layers = f"{self.start} top layer{'s' if self.start > 1 else ''}"
        step = f"{self.every_n_epochs} epochs" if self.every_n_epochs > 1 else "epoch"
        return f"{layers} at first, one more each {step}; in the end {super().describe(model, names)}"

    def waiting(self, model: nn.Module, epoch: int) -> list[nn.Parameter]:
        """The parameters whose turn comes after this epoch, the first of which is 0."""
        base = find_base(model, self.backbone)
        depths = layer_depths(base.root, base.frozen)
        lowest = max(depths.values()) - self.start - epoch // self.every_n_epochs
        below = [base.root.get_parameter(name) for name, depth in depths.items() if depth <= lowest]
        saved = [base.root.get_submodule(name) for name in match_modules(base, self.modules_to_save)]
        at_once = {id(parameter) for module in saved for parameter in module.parameters()}
        return [parameter for parameter in below if parameter.requires_grad and id(parameter) not in at_once]

    def without_gradient(self, model: nn.Module) -> list[nn.Parameter]:
        """Those that wait."""
        return self._waiting

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See :class:`FineTuning`; and say what trains, where it is more than before."""
        before, self._waiting = self._waiting, self.waiting(pl_module, trainer.current_epoch)
        self._hold_back()
        super().on_train_epoch_start(trainer, pl_module)
        if len(self._waiting) != len(before):
            rank_zero_info(f"GradualUnfreezing: epoch {trainer.current_epoch}: {super().describe(pl_module, [])}")
        self._let_go()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """See :class:`FineTuning`; the layers that wait are frozen for as long as the batch trains.

        No longer, so that whatever looks at the module in between, a checkpoint above all, sees one set of
        trained parameters.
        """
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._hold_back()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """See :class:`FineTuning`; let them go."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._let_go()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let them go, if it is saved while a batch trains."""
        self._let_go()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See :class:`FineTuning`."""
        self._let_go()
        self._waiting = []
        super().teardown(trainer, pl_module, stage)

    def _hold_back(self) -> None:
        for parameter in self._waiting:
            parameter.requires_grad_(False)
            parameter.grad = None

    def _let_go(self) -> None:
        for parameter in self._waiting:
            parameter.requires_grad_(True)
