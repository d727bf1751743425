"""Multi-label classification: any number of labels a text, or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.classification import (
    binary_average_precision,
    binary_f1_score,
    binary_precision,
    binary_precision_recall_curve,
    binary_recall,
    binary_recall_at_fixed_precision,
)

from lightning_ft.tasks.pretrained import load_classifier, named_outputs
from lightning_ft.tasks.rows import StageRows
from lightning_ft.tasks.task import Batch, Table, Task, inputs_and_labels
from lightning_ft.tasks.weights import in_order

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel

    from lightning_ft.quantization import Quantization

_METRICS = ("precision", "recall", "f1", "average_precision", "recall_at_precision", "threshold")
"""Of each label; the threshold is that of the recall at the precision asked for."""

_DRAWN = 20
"""How many labels a picture has at most."""


class MultiLabelClassification(Task):
    """A yes or no for each label: a sequence-classification head, binary cross-entropy, and the metrics of it.

    Means over labels (``f1``, ``average_precision``, ``recall_at_precision``) are over those that occur in the rows
    that are scored: of the others recall isn't defined. ``f1_micro`` counts the decisions of all labels together. All
    are 0 where no row has a label.

    Args:
        labels: in the order of their ids.
        pos_weight: how much more a label counts where it is there than where it isn't, in the loss: one number a
            label, by name or in order, or ``"balanced"`` for rows without it / rows with it, at most
            ``max_pos_weight``: as if it were there in half of the rows.
        max_pos_weight: the cap of ``"balanced"``, so that a label with few examples doesn't drown the others.
        threshold: above which probability a label is given.
        min_precision: ``recall_at_precision`` is the share of a label's rows that are found where the threshold is
            such that at least this share of what is found is right; 0 where no threshold is. For each label it's the
            best threshold for the scored rows: one to be used must be chosen on other rows than it is judged by.
        label_counts: in how many rows each label occurs in training, in order; needed for ``"balanced"``.
        row_count: how many rows training has; needed for ``"balanced"``.

    Raises:
        ValueError: if there is no label, weights don't fit, or a share is none.
    """

    def __init__(
        self,
        labels: Sequence[str],
        pos_weight: str | Sequence[float] | Mapping[str, float] | None = None,
        max_pos_weight: float = 20.0,
        threshold: float = 0.5,
        min_precision: float = 0.9,
        label_counts: Sequence[int] | None = None,
        row_count: int | None = None,
    ) -> None:
        super().__init__()
        if not labels or len(set(labels)) < len(labels):
            raise ValueError(f"MultiLabelClassification needs labels, each of them once, not {list(labels)}.")
        if not 0 < threshold < 1 or not 0 < min_precision <= 1:
            raise ValueError(f"threshold and min_precision must be shares, not {threshold} and {min_precision}.")
        self.labels = list(labels)
        self.threshold, self.min_precision = threshold, float(min_precision)
        weight = _pos_weight(self.labels, pos_weight, max_pos_weight, label_counts, row_count)
        self.register_buffer("pos_weight", weight, persistent=False)
        self.pos_weight: Tensor | None
        self.rows = StageRows()

    def build(self, name: str, quantize: Quantization | None = None) -> PreTrainedModel:
        """The pretrained model with a new head for these labels; errors as of :func:`load_classifier`."""
        return load_classifier(name, quantize, **named_outputs(self.labels), **self.card()["head"])

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Binary cross-entropy: logits and labels, 0 or 1, (batch, labels) both, to a scalar, computed in fp32."""
        return F.binary_cross_entropy_with_logits(logits.float(), labels.float(), pos_weight=self.pos_weight)

    def update(self, stage: str, logits: Tensor, labels: Tensor) -> None:
        """Keep a batch for the scores of ``stage``."""
        self.rows[stage].update(self.values(logits), labels.long())

    def scores(self, stage: str) -> dict[str, Tensor]:
        """Macro and micro F1, mean average precision, and the mean recall at the precision asked for."""
        probabilities, labels = self.rows[stage].all()
        micro = binary_f1_score(probabilities.flatten(), labels.flatten(), self.threshold)
        values = self._per_label(stage)
        f1, precision, recall = (
            values[name].nanmean().nan_to_num() for name in ("f1", "average_precision", "recall_at_precision")
        )
        return {"f1": f1, "f1_micro": micro, "average_precision": precision, "recall_at_precision": recall}

    def reset(self, stage: str) -> None:
        """Begin counting anew."""
        self.rows[stage].reset()

    def tables(self, stage: str) -> dict[str, Table]:
        """Of each label the metrics, the threshold of the recall at the precision asked for, and the examples.

        None where a label doesn't occur, and for a threshold that there isn't.
        """
        examples = self.rows[stage].all()[1].sum(dim=0).tolist()
        values = {name: column.tolist() for name, column in self._per_label(stage).items()}
        rows = [
            [label, *(_rounded(column[i]) for column in values.values()), examples[i]]
            for i, label in enumerate(self.labels)
        ]
        return {"per_label": (["label", *values, "examples"], rows)}

    def pictures(self, stage: str) -> dict[str, Figure]:
        """The precision for each recall, a line a label; of many labels those with the most examples."""
        from matplotlib.figure import Figure

        probabilities, labels = (part.cpu() for part in self.rows[stage].all())
        examples = labels.sum(dim=0)
        scores = self._per_label(stage)["average_precision"].tolist()
        most = examples.argsort(descending=True, stable=True)[:_DRAWN].tolist()
        drawn = sorted(i for i in most if examples[i])
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot(xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.02))
        axes.axhline(self.min_precision, color="0.5", linewidth=1, linestyle="--")
        for i in drawn:
            precision, recall, _ = binary_precision_recall_curve(probabilities[:, i], labels[:, i])
            axes.step(recall, precision, where="post", label=f"{self.labels[i]} ({scores[i]:.2f})")
        if drawn:
            figure.legend(title="average precision", loc="outside right upper", fontsize="small")
        axes.grid(alpha=0.3)
        return {"precision_recall": figure}

    def predict(self, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        """For each row the labels above the threshold, likeliest first, and all probabilities."""
        inputs, _ = inputs_and_labels(batch)
        predictions = []
        for row in self.values(self.outputs(model, inputs)).tolist():
            found = dict(zip(self.labels, row, strict=True))
            likeliest = sorted(found, key=found.__getitem__, reverse=True)
            given = [label for label in likeliest if found[label] > self.threshold]  # as torchmetrics counts
            predictions.append({"labels": given, "probabilities": found})
        return predictions

    def values(self, outputs: Tensor) -> Tensor:
        """The probability of each label, (rows, labels)."""
        return outputs.float().sigmoid()

    def card(self) -> dict[str, Any]:
        """The head, beside its labels, and how its outputs are read."""
        return {
            "head": {"problem_type": "multi_label_classification"},  # by which transformers' pipeline takes the sigmoid
            "reading": f"A label's probability is the sigmoid of its logit; it is given above {self.threshold:g}."
            f" Recall at fixed precision is that at a precision of at least {self.min_precision:g}.",
        }

    def _per_label(self, stage: str) -> dict[str, Tensor]:
        """Metrics, (labels,) each; NaN of a label that doesn't occur."""
        probabilities, labels = self.rows[stage].all()
        unknown = [torch.tensor(float("nan"), device=labels.device)] * len(_METRICS)
        found = [
            _metrics(scores, true, self.threshold, self.min_precision) if true.any() else unknown
            for scores, true in zip(probabilities.unbind(dim=1), labels.unbind(dim=1), strict=True)
        ]
        return {name: torch.stack(values) for name, values in zip(_METRICS, zip(*found, strict=True), strict=True)}


def _metrics(probabilities: Tensor, labels: Tensor, threshold: float, min_precision: float) -> list[Tensor]:
    """Those of a label that occurs, scalars; from (rows,) each."""
    return [
        binary_precision(probabilities, labels, threshold),
        binary_recall(probabilities, labels, threshold),
        binary_f1_score(probabilities, labels, threshold),
        binary_average_precision(probabilities, labels),
        *binary_recall_at_fixed_precision(probabilities, labels, min_precision),
    ]


def _rounded(value: float) -> float | None:
    return None if value != value else round(value, 4)


def _pos_weight(
    labels: list[str],
    weights: str | Sequence[float] | Mapping[str, float] | None,
    most: float,
    counts: Sequence[int] | None,
    rows: int | None,
) -> Tensor | None:
    if weights is None:
        return None
    if not isinstance(weights, str):
        return in_order(labels, weights, "pos_weight")
    if weights != "balanced":
        raise ValueError(f"pos_weight must be 'balanced', or a number for each label, not '{weights}'.")
    if counts is None or rows is None or len(counts) != len(labels) or not 1 <= min(counts) <= max(counts) <= rows:
        raise ValueError(
            "pos_weight='balanced' needs label_counts, in how many rows each label occurs in training, and row_count."
        )
    if not most > 0:
        raise ValueError(f"max_pos_weight must be above 0, not {most}.")
    # A label that every row has would weigh nothing.
    return torch.tensor([min(max(rows - count, 1) / count, most) for count in counts], dtype=torch.float32)
