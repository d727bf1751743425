"""Task: what a FineTuner learns. One room a task: its loss, its head, its metrics, in that order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor, nn

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel

    from lightning_ft.quantization import Quantization

Batch = Mapping[str, Any]
Table = tuple[list[str], list[list[Any]]]
"""Columns and rows."""

NOT_INPUTS = ("labels", "extra")
"""What of a batch the model never sees: what is to be learned, and what predictions need to be read."""


class Task(nn.Module, ABC):
    """The head, the loss and the metrics of what is learned.

    A batch holds the model's inputs and ``labels``; what ``labels`` are is an agreement with the
    :class:`lightning_ft.data.targets.Target` that made them. ``stage`` is ``"val"`` or ``"test"``.
    """

    plain: ClassVar[bool] = True
    """Whether model and head are one Hugging Face model, which others load."""

    new_head: ClassVar[bool] = True
    """Whether it trains a head that wasn't pretrained."""

    likelihood_factor: float = 1.0
    """The negative log likelihood, where the noise is 1, over the loss: 1/2 for a squared error."""

    tables_after: ClassVar[tuple[str, ...]] = ("test",)
    """The stages whose tables are logged."""

    @abstractmethod
    def build(self, name: str, quantize: Quantization | None = None) -> PreTrainedModel:
        """The pretrained model with a new head; errors as of :func:`lightning_ft.tasks.pretrained.load_pretrained`.

        Args:
            name: a folder or a name on the hub.
            quantize: how what's pretrained of it is packed as it is read; None: it isn't.
        """

    def outputs(self, model: nn.Module, inputs: Batch) -> Any:
        """What the model says of a batch: its logits."""
        return model(**inputs).logits

    @abstractmethod
    def loss(self, outputs: Any, labels: Any) -> Tensor:
        """A scalar, computed in fp32."""

    def training_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of a batch in training, where nobody asks for the outputs: the same, however it's come by."""
        inputs, labels = inputs_and_labels(batch)
        return self.loss(self.outputs(model, inputs), labels)

    def count(self, labels: Any) -> int:
        """Of how many things the loss of a batch is the mean."""
        return len(labels)

    def outside(self) -> list[nn.Module]:
        """Heads that aren't in the model."""
        return []

    def waiting(self) -> list[nn.Module]:
        """Heads that a batch may leave without a gradient."""
        return []

    def end_epoch(self, batches: float) -> None:
        """Hear that an epoch of training ends, which has so many batches; it may have been cut short, or resumed."""

    @abstractmethod
    def update(self, stage: str, outputs: Any, labels: Any) -> None:
        """Count a batch in the metrics of ``stage``."""

    def observe(self, stage: str, model: nn.Module, batch: Batch) -> None:
        """Look at a batch of ``stage`` with the model at hand, for what its outputs alone don't tell."""

    @abstractmethod
    def scores(self, stage: str) -> dict[str, Tensor]:
        """The metrics of ``stage`` since the last reset; their names are those of :data:`SCORES`."""

    @abstractmethod
    def reset(self, stage: str) -> None:
        """Begin counting anew."""

    def tables(self, stage: str) -> dict[str, Table]:
        """More to read of ``stage`` than fits into scores, by name."""
        return {}

    def pictures(self, stage: str) -> dict[str, Figure]:
        """What of ``stage`` people would rather look at, by name."""
        return {}

    @abstractmethod
    def predict(self, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        """For each row of a batch, what the model makes of it, in plain values."""

    compared: str = "probability"
    """What one of :meth:`values` is called."""

    def values(self, outputs: Any) -> Tensor:
        """The numbers by which two models are compared: probabilities (rows, ...)."""
        return outputs.float().softmax(dim=-1)

    def card(self) -> dict[str, Any]:
        """What a model card says of the head, beside its labels, under keys of ``lightning_ft.files.card.Facts``."""
        return {}


class Score(NamedTuple):
    """How a score is read."""

    name: str
    percent: bool = True
    better: str = "max"

    def text(self, value: float) -> str:
        """A value for people."""
        return f"{value:.1%}" if self.percent else f"{value:.3f}"


SCORES = {
    "accuracy": Score("accuracy"),
    "f1": Score("macro F1"),
    "entity_f1": Score("entity F1"),
    "entity_precision": Score("entity precision"),
    "entity_recall": Score("entity recall"),
    "f1_micro": Score("micro F1"),
    "average_precision": Score("mAP"),
    "recall_at_precision": Score("recall at fixed precision"),
    "qwk": Score("QWK", percent=False),
    "mae": Score("MAE", percent=False, better="min"),
    "rmse": Score("RMSE", percent=False, better="min"),
    "r2": Score("R²", percent=False),
    "spearman": Score("Spearman", percent=False),
    "loss": Score("loss", percent=False, better="min"),
    "perplexity": Score("perplexity", percent=False, better="min"),
    "token_accuracy": Score("token accuracy"),
    "exact_match": Score("exact match"),
}
"""Every score that a task may give."""


def score_of(key: str) -> Score:
    """How the score with this key is read: ``test/f1``, or ``val/TASK/f1`` of one task of several."""
    *_, name = key.split("/")
    return SCORES.get(name, Score(name, percent=False))


def inputs_and_labels(batch: Batch) -> tuple[dict[str, Any], Any]:
    """What the model is given of a batch, and what it should make of that; None where nobody knows."""
    return {key: value for key, value in batch.items() if key not in NOT_INPUTS}, batch.get("labels")
