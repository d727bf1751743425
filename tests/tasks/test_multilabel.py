"""Multi-label classification: the loss against plain maths, the metrics against scikit-learn and a naive search."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score, precision_score, recall_score
from torch import Tensor

from lightning_ft.tasks.multilabel import MultiLabelClassification

NAMES = ["late", "broken", "rude", "never"]
"""The last one occurs in no row that is scored."""


def drawn(rows: int = 60) -> tuple[Tensor, Tensor]:
    """Logits, and labels that have something to do with them."""
    generator = torch.Generator().manual_seed(4)
    labels = (torch.rand(rows, 4, generator=generator) < torch.tensor([0.5, 0.3, 0.1, 0.0])).float()
    return torch.randn(rows, 4, generator=generator) + 2 * labels - 1, labels


def seen(**options: Any) -> MultiLabelClassification:
    """A task that was shown these in two batches."""
    task, (logits, labels) = MultiLabelClassification(NAMES, **options), drawn()
    for rows in (slice(None, 13), slice(13, None)):
        task.update("test", logits[rows], labels[rows])
    return task


def naive_recall(scores: Any, true: Any, least: float) -> tuple[float, float]:
    """The highest recall of any threshold with that precision, and the highest such threshold; 0 and NaN if none."""
    best = (0.0, math.nan)
    for threshold in sorted(set(scores), reverse=True):
        found = scores >= threshold
        if true[found].mean() >= least and true[found].sum() / true.sum() > best[0]:
            best = (float(true[found].sum() / true.sum()), float(threshold))
    return best


# ---------------------------------------------------------------------- the loss


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 3.0, 0.5]], ids=str)
def test_loss_is_the_formula(weights: list[float] | None) -> None:
    """-(w y log σ(z) + (1 - y) log(1 - σ(z))), over rows and labels."""
    logits, labels = drawn()
    total = 0.0
    for row, there in zip(logits.tolist(), labels.tolist(), strict=True):
        for z, y, w in zip(row, there, weights or [1.0] * 4, strict=True):
            share = 1 / (1 + math.exp(-z))
            total -= w * y * math.log(share) + (1 - y) * math.log(1 - share)
    loss = MultiLabelClassification(NAMES, weights).loss(logits, labels)
    assert float(loss) == pytest.approx(total / logits.numel(), rel=1e-5)
    assert MultiLabelClassification(NAMES, weights).loss(logits.bfloat16(), labels).dtype == torch.float32


def test_balanced_makes_up_for_rarity_up_to_the_cap() -> None:
    counts = {"label_counts": [50, 10, 1, 100], "row_count": 100}
    task = MultiLabelClassification(NAMES, "balanced", **counts, max_pos_weight=25)
    assert task.pos_weight is not None
    assert task.pos_weight.tolist() == pytest.approx([1.0, 9.0, 25.0, 0.01])
    assert task.state_dict() == {}
    by_name = MultiLabelClassification(NAMES, {"never": 0.01, "late": 1, "rude": 25, "broken": 9})
    assert torch.equal(by_name.loss(*drawn()), task.loss(*drawn()))


def test_what_makes_no_sense_is_refused() -> None:
    for arguments, message in [
        ({"labels": []}, "needs labels"),
        ({"labels": ["a", "a"]}, "each of them once"),
        ({"threshold": 1.0}, "threshold"),
        ({"min_precision": 0.0}, "min_precision"),
        ({"pos_weight": "balance"}, "'balanced'.*not 'balance'"),
        ({"pos_weight": "balanced"}, "label_counts.*row_count"),
        ({"pos_weight": "balanced", "label_counts": [1, 1, 0, 1], "row_count": 3}, "label_counts"),
        ({"pos_weight": "balanced", "label_counts": [1] * 4, "row_count": 3, "max_pos_weight": 0}, "max_pos_weight"),
        ({"pos_weight": [1.0]}, r"pos_weight must be 4 numbers"),
        ({"pos_weight": {"late": 1.0}}, "the labels are.*rude"),
    ]:
        with pytest.raises(ValueError, match=message):
            MultiLabelClassification(**{"labels": NAMES, **arguments})


# ---------------------------------------------------------------------- the metrics


@pytest.mark.parametrize("threshold", [0.5, 0.3])
def test_scores_are_scikit_learns_over_the_labels_that_occur(threshold: float) -> None:
    logits, labels = drawn()
    scores, true = logits.sigmoid().numpy(), labels.numpy().astype(int)
    given = (scores > threshold).astype(int)
    recalls = [naive_recall(scores[:, i], true[:, i], 0.8)[0] for i in range(3)]
    assert 0 < np.mean(recalls) < 1
    assert given[:, 3].any()
    found = seen(threshold=threshold, min_precision=0.8).scores("test")
    assert {name: float(value) for name, value in found.items()} == {
        "f1": pytest.approx(f1_score(true[:, :3], given[:, :3], average="macro"), rel=1e-5),
        "f1_micro": pytest.approx(f1_score(true, given, average="micro"), rel=1e-5),
        "average_precision": pytest.approx(average_precision_score(true[:, :3], scores[:, :3]), rel=1e-5),
        "recall_at_precision": pytest.approx(np.mean(recalls), rel=1e-5),
    }


def test_table_has_the_metrics_and_the_threshold_of_each_label() -> None:
    logits, labels = drawn()
    scores, true = logits.sigmoid().numpy(), labels.numpy().astype(int)
    columns, rows = seen(min_precision=0.8).tables("test")["per_label"]
    assert columns == [
        "label", "precision", "recall", "f1", "average_precision", "recall_at_precision", "threshold", "examples",
    ]  # fmt: skip
    for i, row in enumerate(rows[:3]):
        of_label = true[:, i], scores[:, i] > 0.5
        recall, threshold = naive_recall(scores[:, i], true[:, i], 0.8)
        expected = [
            precision_score(*of_label), recall_score(*of_label), f1_score(*of_label),
            average_precision_score(true[:, i], scores[:, i]), recall,
        ]  # fmt: skip
        assert row[:1] + row[-1:] == [NAMES[i], true[:, i].sum()]
        assert row[1:-2] == pytest.approx(expected, abs=5e-5)
        assert row[-2] == (pytest.approx(threshold, abs=5e-5) if recall else None)
    assert rows[3] == ["never", *[None] * 6, 0]


def test_a_precision_that_no_threshold_reaches_is_a_recall_of_zero() -> None:
    task = MultiLabelClassification(["a"])
    task.update("test", torch.tensor([[2.0], [1.0]]), torch.tensor([[0.0], [1.0]]))
    assert float(task.scores("test")["recall_at_precision"]) == 0.0
    assert task.tables("test")["per_label"][1][0][5:] == [0.0, None, 1]


def test_rows_without_any_label_have_scores_and_a_picture() -> None:
    task = MultiLabelClassification(NAMES)
    task.update("val", torch.ones(3, 4), torch.zeros(3, 4))
    assert {float(value) for value in task.scores("val").values()} == {0.0}
    assert not task.pictures("val")["precision_recall"].axes[0].get_legend_handles_labels()[0]
    task.reset("val")
    task.update("val", *drawn())
    assert float(task.scores("val")["f1"]) > 0


def test_picture_has_a_line_for_each_label_that_occurs() -> None:
    figure = seen().pictures("test")["precision_recall"]
    axes = figure.axes[0]
    logits, labels = drawn()
    handles, names = axes.get_legend_handles_labels()
    assert [name.partition(" (")[0] for name in names] == NAMES[:3]
    for i, line in enumerate(handles):
        assert isinstance(line, type(axes.lines[0]))
        area = -np.sum(np.diff(line.get_xdata()) * np.asarray(line.get_ydata())[:-1])
        assert area == pytest.approx(average_precision_score(labels[:, i], logits[:, i]), abs=1e-5)


# ---------------------------------------------------------------------- predictions and the model


def test_predictions_are_the_labels_above_the_threshold_likeliest_first() -> None:
    logits = torch.tensor([[0.1, 2.0, -3.0, -0.2], [-1.0, -1.0, -1.0, -1.0]])
    model: Any = lambda: SimpleNamespace(logits=logits)  # noqa: E731
    first, second = MultiLabelClassification(NAMES).predict(model, {})
    assert first["labels"] == ["broken", "late"]
    assert second["labels"] == []
    assert list(first["probabilities"]) == NAMES
    assert list(first["probabilities"].values()) == pytest.approx(logits[0].sigmoid().tolist())
    assert MultiLabelClassification(NAMES, threshold=0.4).predict(model, {})[0]["labels"] == ["broken", "late", "never"]


def test_built_model_is_multi_label_to_transformers(tiny_bert_dir: str) -> None:
    model = MultiLabelClassification(NAMES).build(tiny_bert_dir)
    assert model.config.problem_type == "multi_label_classification"
    assert list(model.config.id2label.values()) == NAMES
