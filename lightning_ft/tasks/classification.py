"""Classification of a text into one of several labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)

from lightning_ft.reporting import confusion_matrix
from lightning_ft.tasks.pretrained import load_classifier, named_outputs
from lightning_ft.tasks.task import Batch, Table, Task, inputs_and_labels
from lightning_ft.tasks.weights import in_order

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel

    from lightning_ft.quantization import Quantization


class Classification(Task):
    """A sequence-classification head, cross-entropy, and the metrics of it.

    Args:
        labels: the names of the classes, in the order of their ids.
        class_weights: weights of the classes in the loss: one a label, by name or in order, or
            ``"balanced"`` for n / (classes · count), which makes up for imbalance.
        label_smoothing: share of the target spread over all classes (Szegedy et al. 2016,
            https://arxiv.org/abs/1512.00567, section 7).
        label_counts: how often each label occurs in training, in order; needed for ``"balanced"``.

    Raises:
        ValueError: if there are fewer than two labels, or the weights don't fit them.
    """

    def __init__(
        self,
        labels: Sequence[str],
        class_weights: str | Sequence[float] | Mapping[str, float] | None = None,
        label_smoothing: float = 0.0,
        label_counts: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if len(labels) < 2:
            raise ValueError(f"Classification needs at least two labels; there is only {list(labels)}.")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), not {label_smoothing}.")
        self.labels = list(labels)
        self.label_smoothing = label_smoothing
        self.register_buffer("weight", _weights(self.labels, class_weights, label_counts), persistent=False)
        self.weight: Tensor | None
        self.metrics = nn.ModuleDict({stage: _metrics(len(labels)) for stage in ("val", "test")})

    def build(self, name: str, quantize: Quantization | None = None) -> PreTrainedModel:
        """The pretrained model with a new head for these labels; errors as of :func:`load_classifier`."""
        # The problem's type is what transformers' pipeline takes the softmax by.
        return load_classifier(name, quantize, **named_outputs(self.labels), problem_type="single_label_classification")

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy: logits (batch, classes), labels (batch,) to a scalar, computed in fp32."""
        return F.cross_entropy(logits.float(), labels, self.weight, label_smoothing=self.label_smoothing)

    def update(self, stage: str, logits: Tensor, labels: Tensor) -> None:
        """Count a batch in the metrics of ``stage``, ``"val"`` or ``"test"``."""
        self._of(stage).update(logits, labels)

    def scores(self, stage: str) -> dict[str, Tensor]:
        """Accuracy and macro F1 of ``stage`` since the last reset."""
        values = self._of(stage).compute()
        return {"accuracy": values["accuracy"], "f1": values["f1"]}

    def reset(self, stage: str) -> None:
        """Begin counting anew."""
        self._of(stage).reset()

    def tables(self, stage: str) -> dict[str, Table]:
        """Of each class precision, recall, F1, and the number of examples."""
        values = self._of(stage).compute()
        columns = ["precision", "recall", "f1_per_class"]
        support = values["confusion"].sum(dim=1)
        rows = [
            [label, *(round(float(values[c][i]), 4) for c in columns), int(support[i])]
            for i, label in enumerate(self.labels)
        ]
        return {"per_class": (["label", "precision", "recall", "f1", "examples"], rows)}

    def pictures(self, stage: str) -> dict[str, Figure]:
        """The confusion matrix: a row a true label, a column a predicted one, shaded by the share of the row."""
        counts = self._of(stage).compute()["confusion"].cpu().numpy()
        return {"confusion_matrix": confusion_matrix(counts, self.labels)}

    def predict(self, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        """For each row the label, its probability, and all probabilities."""
        inputs, _ = inputs_and_labels(batch)
        probabilities = self.values(self.outputs(model, inputs)).cpu()
        return [
            {
                "label": self.labels[int(row.argmax())],
                "probability": float(row.max()),
                "probabilities": dict(zip(self.labels, row.tolist(), strict=True)),
            }
            for row in probabilities
        ]

    def _of(self, stage: str) -> MetricCollection:
        collection = self.metrics[stage]
        assert isinstance(collection, MetricCollection)
        return collection


def _metrics(classes: int) -> MetricCollection:
    return MetricCollection(
        {
            "accuracy": MulticlassAccuracy(classes, average="micro"),
            "f1": MulticlassF1Score(classes, average="macro"),
            "precision": MulticlassPrecision(classes, average="none"),
            "recall": MulticlassRecall(classes, average="none"),
            "f1_per_class": MulticlassF1Score(classes, average="none"),
            "confusion": MulticlassConfusionMatrix(classes),
        }
    )


def _weights(
    labels: list[str],
    weights: str | Sequence[float] | Mapping[str, float] | None,
    counts: Sequence[int] | None,
) -> Tensor | None:
    if weights is None:
        return None
    if isinstance(weights, str):
        if weights != "balanced":
            raise ValueError(f"class_weights must be 'balanced', or a number for each label, not '{weights}'.")
        if counts is None or len(counts) != len(labels) or min(counts) < 1:
            raise ValueError("class_weights='balanced' needs label_counts: how often each label occurs in training.")
        return torch.tensor([sum(counts) / (len(counts) * count) for count in counts], dtype=torch.float32)
    return in_order(labels, weights, "class_weights")
