"""Ordinal: CORN against the paper's loop, scores against scikit-learn and scipy."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from reference import corn
from scipy.stats import spearmanr
from sklearn.metrics import accuracy_score, cohen_kappa_score, confusion_matrix, mean_absolute_error

from lightning_ft.tasks.ordinal import Ordinal, corn_loss, corn_probabilities, quadratic_kappa

GRADES = [-1, 0, 1, 4]
"""With gaps."""


def drawn(rows: int = 60, grades: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the places of grades that have something to do with them."""
    generator = torch.Generator().manual_seed(1)
    ranks = torch.arange(rows) % grades
    logits = torch.randn(rows, grades - 1, generator=generator) + 2.0 * (ranks[:, None] > torch.arange(grades - 1)) - 1
    return logits, ranks


def seen() -> Ordinal:
    """A task that was shown these in two batches."""
    task, (logits, ranks) = Ordinal(GRADES), drawn()
    for rows in (slice(None, 11), slice(11, None)):
        task.update("test", logits[rows], ranks[rows])
    return task


def naively() -> tuple[list[int], list[int], list[float]]:
    """True and predicted grades, and expected ones, one row at a time."""
    logits, ranks = drawn()
    predicted, expected = [], []
    for row in logits.tolist():
        shares = corn.probabilities(row)
        above = [sum(shares[k + 1 :]) for k in range(len(shares) - 1)]
        predicted.append(GRADES[sum(share > 0.5 for share in above)])
        expected.append(sum(share * grade for share, grade in zip(shares, GRADES, strict=True)))
    return [GRADES[rank] for rank in ranks], predicted, expected


# ---------------------------------------------------------------------- the maths


@pytest.mark.parametrize("grades", [2, 4, 7])
def test_loss_is_the_papers(grades: int) -> None:
    logits, ranks = drawn(grades=grades)
    expected = corn.loss(logits.tolist(), ranks.tolist())
    assert float(corn_loss(logits, ranks)) == pytest.approx(expected, rel=1e-5)
    assert float(Ordinal(list(range(grades))).loss(logits.double(), ranks)) == pytest.approx(expected, rel=1e-5)


def test_loss_of_two_grades_is_binary_cross_entropy() -> None:
    logits, ranks = drawn(grades=2)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0], ranks.float())
    torch.testing.assert_close(corn_loss(logits, ranks), expected)


def test_batches_weigh_by_the_questions_asked() -> None:
    task, (logits, ranks) = Ordinal(GRADES), drawn(rows=23)
    parts = [(logits[rows], ranks[rows]) for rows in (slice(None, 5), slice(5, None))]
    total = sum(float(task.loss(*part)) * task.count(part[1]) for part in parts)
    assert total / task.count(ranks) == pytest.approx(float(task.loss(logits, ranks)), rel=1e-5)
    assert task.count(ranks) == sum(min(int(rank) + 1, 3) for rank in ranks)


def test_probabilities_are_the_chains_and_consistent_whatever_the_logits_are() -> None:
    logits = 20 * torch.randn(200, 5, generator=torch.Generator().manual_seed(2))
    found = corn_probabilities(logits)
    assert (found >= 0).all()
    torch.testing.assert_close(found.sum(dim=1), torch.ones(200))
    small = logits[:20] / 10
    torch.testing.assert_close(corn_probabilities(small), torch.tensor([corn.probabilities(r) for r in small.tolist()]))


@pytest.mark.parametrize("grades", [[0, 1, 2, 3], GRADES], ids=["without gaps", "with gaps"])
def test_kappa_is_scikit_learns_over_all_whole_numbers(grades: list[int]) -> None:
    generator = np.random.default_rng(3)
    true, predicted = generator.choice(grades, 80), generator.choice(grades, 80)
    predicted[::2] = true[::2]
    counts = torch.from_numpy(confusion_matrix(true, predicted, labels=grades))
    between = list(range(min(grades), max(grades) + 1))
    expected = cohen_kappa_score(true, predicted, weights="quadratic", labels=between)
    assert float(quadratic_kappa(counts, grades)) == pytest.approx(expected)


def test_kappa_is_one_where_all_agree_and_zero_where_chance_explains_all() -> None:
    assert float(quadratic_kappa(torch.diag(torch.tensor([3, 4])), [1, 2])) == 1.0
    assert float(quadratic_kappa(torch.tensor([[3, 0], [0, 0]]), [1, 2])) == 0.0
    assert float(quadratic_kappa(torch.tensor([[2, 4], [3, 6]]), [1, 2])) == pytest.approx(0.0, abs=1e-6)


# ---------------------------------------------------------------------- the task


def test_scores_are_those_of_the_naive_predictions() -> None:
    true, predicted, expected = naively()
    assert len({*predicted}) == len(GRADES)
    kappa = cohen_kappa_score(true, predicted, weights="quadratic", labels=list(range(-1, 5)))
    assert {name: float(value) for name, value in seen().scores("test").items()} == {
        "qwk": pytest.approx(kappa, rel=1e-5),
        "mae": pytest.approx(mean_absolute_error(true, predicted), rel=1e-5),
        "accuracy": pytest.approx(accuracy_score(true, predicted)),
        "spearman": pytest.approx(spearmanr(true, expected).statistic, rel=1e-4),
    }


def test_table_and_picture_are_of_the_naive_predictions() -> None:
    true, predicted, _ = naively()
    columns, rows = seen().tables("test")["per_grade"]
    assert columns == ["grade", "recall", "mae", "examples"]
    for row, grade in zip(rows, GRADES, strict=True):
        of_grade = [abs(p - t) for t, p in zip(true, predicted, strict=True) if t == grade]
        found = sum(d == 0 for d in of_grade) / len(of_grade)
        assert row == [str(grade), pytest.approx(found, abs=5e-5), pytest.approx(np.mean(of_grade), abs=5e-5), 15]
    axes = seen().pictures("test")["confusion_matrix"].axes[0]
    texts = {(int(t.get_position()[1]), int(t.get_position()[0])): int(t.get_text()) for t in axes.texts}
    counts = confusion_matrix(true, predicted, labels=GRADES)
    assert all(texts[i, j] == counts[i, j] for i, j in itertools.product(range(4), range(4)))
    assert [label.get_text() for label in axes.get_xticklabels()] == ["-1", "0", "1", "4"]


def test_a_single_row_has_scores_and_a_reset_begins_anew() -> None:
    task = seen()
    task.reset("test")
    task.update("test", torch.tensor([[9.0, 9.0, 9.0]]), torch.tensor([3]))
    assert {name: float(value) for name, value in task.scores("test").items()} == {
        "qwk": 0.0, "mae": 0.0, "accuracy": 1.0, "spearman": 0.0,
    }  # fmt: skip


def test_predictions_are_the_naive_ones() -> None:
    logits, _ = drawn()
    model: Any = lambda: SimpleNamespace(logits=logits)  # noqa: E731
    _, predicted, expected = naively()
    for row, logit, grade, mean in zip(
        Ordinal(GRADES).predict(model, {}), logits.tolist(), predicted, expected, strict=True
    ):
        assert row["grade"] == grade
        assert row["expected"] == pytest.approx(mean, abs=1e-5)
        assert list(row["probabilities"]) == ["-1", "0", "1", "4"]
        assert list(row["probabilities"].values()) == pytest.approx(corn.probabilities(logit), abs=1e-6)


def test_built_model_is_a_stock_one_whose_outputs_are_named(tiny_bert_dir: str) -> None:
    model = Ordinal(GRADES).build(tiny_bert_dir)
    assert model.config.id2label == {0: "above -1", 1: "above 0", 2: "above 1"}
    assert model.classifier.out_features == 3  # type: ignore[union-attr]
    assert model.config.problem_type == "multi_label_classification"


@pytest.mark.parametrize("grades", [[1], [2, 1], [1, 1]])
def test_grades_that_do_not_rise_are_refused(grades: list[int]) -> None:
    with pytest.raises(ValueError, match="rising order"):
        Ordinal(grades)
