"""Classification: the loss against plain maths and torch, the metrics against scikit-learn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor

from lightning_ft.tasks.classification import Classification

NAMES = ["bad", "fair", "good"]
COUNTS = [50, 30, 8]


def logits_and_labels(rows: int = 40, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator)
    return logits, torch.randint(0, classes, (rows,), generator=generator)


def naive_loss(logits: Tensor, labels: Tensor, weights: Sequence[float], smoothing: float) -> float:
    """Σ_i Σ_c q_ic w_c (-log p_ic) / Σ_i w_{y_i}, where q is the smoothed target."""
    total = norm = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        log_norm = math.log(sum(math.exp(x) for x in row))
        target = [smoothing / len(row) + (1 - smoothing) * (c == label) for c in range(len(row))]
        total += sum(q * w * (log_norm - x) for q, w, x in zip(target, weights, row, strict=True))
        norm += weights[label]
    return total / norm


# ---------------------------------------------------------------------- the loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, [0.0, 1.0, 3.0]], ids=str)
def test_loss_is_the_formula(weights: list[float] | None, smoothing: float) -> None:
    logits, labels = logits_and_labels()
    loss = Classification(NAMES, weights, smoothing).loss(logits, labels)
    assert float(loss) == pytest.approx(naive_loss(logits, labels, weights or [1.0] * 3, smoothing), rel=1e-5)


def test_loss_is_computed_in_fp32() -> None:
    (logits, labels), dtype = logits_and_labels(), torch.bfloat16
    loss = Classification(NAMES).loss(logits.to(dtype), labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, F.cross_entropy(logits.to(dtype).float(), labels))


def test_balanced_is_scikit_learns() -> None:
    task = Classification(NAMES, "balanced", label_counts=COUNTS)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=np.repeat(np.arange(3), COUNTS))
    assert task.weight is not None
    assert task.weight.numpy() == pytest.approx(expected)


def test_weights_by_name_are_weights_in_order() -> None:
    logits, labels = logits_and_labels()
    by_name = Classification(NAMES, {"good": 3.0, "bad": 1.0, "fair": 2.0})
    in_order = Classification(NAMES, [1.0, 2.0, 3.0])
    assert torch.equal(by_name.loss(logits, labels), in_order.loss(logits, labels))


def test_weights_go_with_the_module_and_not_into_its_state() -> None:
    task = Classification(NAMES, [1.0, 2.0, 3.0])
    assert task.state_dict() == {}
    assert task.to("meta").weight.device.type == "meta"


def test_what_makes_no_sense_is_refused() -> None:
    for arguments, message in [
        ({"labels": ["only"]}, "at least two labels.*only"),
        ({"class_weights": "balance"}, "'balanced'.*not 'balance'"),
        ({"class_weights": "balanced"}, "label_counts"),
        ({"class_weights": "balanced", "label_counts": [1, 2, 0]}, "label_counts"),
        ({"class_weights": [1.0, 2.0]}, r"3 numbers.*\[1\.0, 2\.0\]"),
        ({"class_weights": [1.0, 2.0, -1.0]}, "at least 0"),
        ({"class_weights": [0.0, 0.0, 0.0]}, "not all of them 0"),
        ({"class_weights": {"bad": 1.0, "good": 2.0}}, "the labels are.*fair"),
        ({"class_weights": {"bad": 1.0, "fair": 1.0, "good": 2.0, "odd": 2.0}}, "names.*odd"),
        ({"label_smoothing": 1.0}, "label_smoothing.*1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            Classification(**{"labels": NAMES, **arguments})


# ---------------------------------------------------------------------- the metrics

TRUE = [0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 1]
SEEN = {
    "mixed": (TRUE, [0, 0, 1, 2, 1, 0, 2, 2, 2, 1, 0, 1]),
    "perfect": (TRUE, TRUE),
    "one never predicted": (TRUE, [0, 0, 1, 0, 1, 0, 0, 1, 1, 1, 0, 1]),
    "one never there": ([0, 0, 1, 1], [0, 1, 1, 1]),
    "one not there but predicted": ([0, 0, 1, 1], [0, 2, 1, 1]),
}


def scored(true: list[int], predicted: list[int]) -> Classification:
    """A task that was shown these in two batches."""
    task = Classification(NAMES)
    for rows in (slice(None, 3), slice(3, None)):
        logits = 5 * F.one_hot(torch.tensor(predicted[rows]), 3) + torch.rand(len(predicted[rows]), 3)
        task.update("test", logits, torch.tensor(true[rows]))
    return task


@pytest.mark.parametrize("seen", SEEN.values(), ids=SEEN)
def test_scores_are_scikit_learns(seen: tuple[list[int], list[int]]) -> None:
    scores = scored(*seen).scores("test")
    assert set(scores) == {"accuracy", "f1"}
    assert float(scores["accuracy"]) == pytest.approx(accuracy_score(*seen))
    assert float(scores["f1"]) == pytest.approx(f1_score(*seen, average="macro"))


@pytest.mark.parametrize("seen", SEEN.values(), ids=SEEN)
def test_table_is_scikit_learns(seen: tuple[list[int], list[int]]) -> None:
    columns, rows = scored(*seen).tables("test")["per_class"]
    assert columns == ["label", "precision", "recall", "f1", "examples"]
    assert [row[0] for row in rows] == NAMES
    expected = precision_recall_fscore_support(*seen, labels=[0, 1, 2], zero_division=0)
    assert pytest.approx(np.stack(expected), abs=5e-5) == np.array([row[1:] for row in rows]).T


def test_picture_has_the_counts_as_texts_and_the_names_at_the_axes() -> None:
    seen = SEEN["one never there"]
    figure = scored(*seen).pictures("test")["confusion_matrix"]
    axes = figure.axes[0]
    counts = np.zeros((3, 3), dtype=int)
    for text in axes.texts:
        column, row = text.get_position()
        counts[int(row), int(column)] = int(text.get_text())
    assert len(axes.texts) == 9
    assert np.array_equal(counts, confusion_matrix(*seen, labels=[0, 1, 2]))
    assert [label.get_text() for label in axes.get_xticklabels()] == NAMES
    assert [label.get_text() for label in axes.get_yticklabels()] == NAMES
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")


def test_picture_is_shaded_by_the_share_of_the_row() -> None:
    seen = SEEN["mixed"]
    shades = scored(*seen).pictures("test")["confusion_matrix"].axes[0].images[0].get_array()
    assert np.asarray(shades) == pytest.approx(confusion_matrix(*seen, normalize="true"))


def test_stages_count_apart_and_anew_after_a_reset() -> None:
    task = scored(*SEEN["mixed"])
    task.update("val", torch.eye(3), torch.tensor([0, 1, 2]))
    assert float(task.scores("val")["accuracy"]) == 1.0
    assert float(task.scores("test")["accuracy"]) == pytest.approx(accuracy_score(*SEEN["mixed"]))
    task.reset("test")
    task.update("test", torch.eye(3), torch.tensor([0, 0, 2]))
    assert float(task.scores("test")["accuracy"]) == pytest.approx(2 / 3)
    assert task.tables("test")["per_class"][1][0][-1] == 2


# ---------------------------------------------------------------------- predictions and the model


def test_predictions_are_the_softmax_by_name() -> None:
    logits, _ = logits_and_labels()
    model: Any = lambda: SimpleNamespace(logits=logits.bfloat16())  # noqa: E731
    predictions = Classification(NAMES).predict(model, {})
    expected = F.softmax(logits.bfloat16().double(), dim=-1)
    for prediction, row in zip(predictions, expected, strict=True):
        assert list(prediction["probabilities"]) == NAMES
        assert list(prediction["probabilities"].values()) == pytest.approx(row.tolist(), abs=1e-6)
        assert prediction["label"] == NAMES[int(row.argmax())]
        assert prediction["probability"] == max(prediction["probabilities"].values())


def test_built_model_knows_the_labels_and_keeps_the_base(tiny_bert_dir: str) -> None:
    from transformers import AutoModel

    model = Classification(NAMES).build(tiny_bert_dir)
    assert model.num_labels == 3
    assert model.config.id2label == {0: "bad", 1: "fair", 2: "good"}
    assert model.config.label2id == {"bad": 0, "fair": 1, "good": 2}
    base = AutoModel.from_pretrained(tiny_bert_dir).state_dict()
    built = model.base_model.state_dict()
    assert built.keys() == base.keys()
    assert all(torch.equal(built[name], value) for name, value in base.items())


def test_missing_model_is_named_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"'no/such'.*folder.*huggingface\.co"):
        Classification(NAMES).build("no/such")
