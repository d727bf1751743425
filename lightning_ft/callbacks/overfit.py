"""A plain line at the end: from which step on it over-fitted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from torch import Tensor


class Point(NamedTuple):
    """A validation: the step, the mean training loss since the one before, and the validation's loss."""

    step: int
    train: float
    validation: float


class Verdict(NamedTuple):
    """What the losses say; ``step`` is the one from which on it over-fitted, or None."""

    step: int | None
    line: str


def judge(points: Sequence[Point], tolerance: float = 0.01) -> Verdict:
    """Whether training over-fitted: validation got worse from its best on while training still got better.

    Args:
        points: the validations in order.
        tolerance: by what share of the best the validations after it must be worse, in the mean, so that noise
            doesn't count.
    """
    if len(points) < 2:
        return Verdict(None, f"Over-fitting: {len(points)} validation(s) can't tell; it takes two at least.")
    best = min(points, key=lambda point: point.validation)
    later = points[points.index(best) + 1 :]
    if not later:
        return Verdict(None, f"No over-fitting: the last validation, at step {best.step}, was the best.")
    worse = sum(point.validation for point in later) / len(later)
    losses = f"validation loss {best.validation:.4g} → {later[-1].validation:.4g}"
    training = f"training loss {best.train:.4g} → {later[-1].train:.4g}"
    if worse <= best.validation + tolerance * abs(best.validation):
        return Verdict(None, f"No over-fitting: since step {best.step} validation has stood still ({losses}).")
    if later[-1].train >= best.train:
        return Verdict(
            None,
            f"No over-fitting, but since step {best.step} both got worse ({losses}, {training}): the learning rate may"
            " be too high.",
        )
    return Verdict(best.step, f"Over-fitting from step {best.step} on: {losses}, while {training}.")


class Overfitting(Callback):
    """Watches the losses of training and validation, and says at the end from which step on it over-fitted.

    The step is logged too, as ``overfitting/from_step``, if there is one. It changes nothing.

    Args:
        monitor: the validation loss, by the name under which the module logs it.
        tolerance: see :func:`judge`.

    Attributes:
        points: the validations so far.
    """

    def __init__(self, monitor: str = "val/loss", tolerance: float = 0.01) -> None:
        self.monitor, self.tolerance = monitor, tolerance
        self.points: list[Point] = []
        self._losses: list[Tensor] = []

    @property
    def verdict(self) -> Verdict:
        """What there is to say so far."""
        return judge(self.points, self.tolerance)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the loss; under manual optimization it's what the step returns, if anything."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):  # Lightning has divided it by the number of batches that are accumulated
            scale = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            self._losses.append(loss.detach() * scale)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the validation's."""
        loss = trainer.callback_metrics.get(self.monitor)
        if loss is None or not self._losses or trainer.sanity_checking:
            return
        train = sum(float(value) for value in self._losses) / len(self._losses)
        self.points.append(Point(trainer.global_step, train, float(loss)))
        self._losses = []

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say it."""
        step, line = self.verdict
        if not self.points and self.monitor not in trainer.callback_metrics:
            line = f"Over-fitting: nothing was logged as '{self.monitor}'. Name the validation loss: monitor=..."
        rank_zero_info(line)
        if step is not None:
            for logger in trainer.loggers:
                logger.log_metrics({"overfitting/from_step": step}, step=trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints."""
        return {"points": [list(point) for point in self.points]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from it."""
        self.points = [Point(*point) for point in state_dict["points"]]
