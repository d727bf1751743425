"""Regression: losses against torch, scores in the data's units against scikit-learn and scipy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

from lightning_ft.tasks.regression import LOSSES, Regression

MEAN, STD = 2000.0, 12.5


def drawn(rows: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    """Standardised outputs and labels that have something to do with each other; some labels are equal."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randn(rows, generator=generator).round(decimals=1)
    return labels + 0.5 * torch.randn(rows, generator=generator), labels


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_torchs_of_standardised_values_in_fp32(name: str) -> None:
    outputs, labels = drawn()
    loss = Regression(MEAN, STD, name).loss(outputs.bfloat16(), labels)
    assert loss.dtype == torch.float32
    distance = (outputs.bfloat16().double() - labels).abs()
    by_hand = {
        "mse": distance.square(),
        "l1": distance,
        "huber": torch.where(distance < 1, distance.square() / 2, distance - 0.5),
    }
    assert float(loss) == pytest.approx(float(by_hand[name].mean()), rel=1e-5)


def test_scores_are_scikit_learns_in_the_datas_units() -> None:
    task, (outputs, labels) = Regression(MEAN, STD), drawn()
    for rows in (slice(None, 7), slice(7, None)):
        task.update("test", outputs[rows], labels[rows])
    true, predicted = (MEAN + STD * values.double().numpy() for values in (labels, outputs))
    scores = {name: float(value) for name, value in task.scores("test").items()}
    assert scores == {
        "rmse": pytest.approx(root_mean_squared_error(true, predicted), rel=1e-5),
        "mae": pytest.approx(mean_absolute_error(true, predicted), rel=1e-5),
        "r2": pytest.approx(r2_score(true, predicted), rel=1e-4),
        "spearman": pytest.approx(spearmanr(true, predicted).statistic, rel=1e-4),
    }


def test_stages_count_apart_and_anew_after_a_reset() -> None:
    task, (outputs, labels) = Regression(), drawn()
    task.update("val", labels, labels)
    task.update("test", outputs, labels)
    assert float(task.scores("val")["rmse"]) == 0.0
    assert float(task.scores("test")["rmse"]) > 0.1
    task.reset("test")
    task.update("test", labels, labels)
    assert float(task.scores("test")["rmse"]) == 0.0


@pytest.mark.parametrize(("outputs", "labels"), [([0.5], [0.0]), ([0.5, 0.5], [0.0, 1.0]), ([0.0, 1.0], [0.5, 0.5])])
def test_scores_that_are_not_defined_are_zero(outputs: list[float], labels: list[float]) -> None:
    task = Regression()
    task.update("val", torch.tensor(outputs), torch.tensor(labels))
    scores = task.scores("val")
    assert float(scores["spearman"]) == float(scores["r2"]) == 0.0
    assert float(scores["mae"]) == 0.5


def test_predictions_are_in_the_datas_units() -> None:
    logits = drawn(4)[0][:, None]
    model: Any = lambda: SimpleNamespace(logits=logits)  # noqa: E731
    task = Regression(MEAN, STD)
    assert [row["value"] for row in task.predict(model, {})] == pytest.approx((MEAN + STD * logits[:, 0]).tolist())
    assert torch.equal(task.values(task.outputs(model, {})), logits[:, 0])


def test_picture_has_a_dot_a_row_in_the_datas_units() -> None:
    task, (outputs, labels) = Regression(MEAN, STD), drawn()
    task.update("test", outputs, labels)
    axes = task.pictures("test")["true_and_predicted"].axes[0]
    dots = np.asarray(axes.collections[0].get_offsets())
    assert dots == pytest.approx(np.stack([MEAN + STD * labels.numpy(), MEAN + STD * outputs.numpy()], axis=1))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("true", "predicted")


def test_built_model_has_one_output_and_is_no_classifier_to_transformers(tiny_bert_dir: str) -> None:
    model = Regression(MEAN, STD).build(tiny_bert_dir)
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")
    batch = {"input_ids": torch.tensor([[2, 7, 3], [2, 8, 3]])}
    outputs = Regression().outputs(model, batch)
    assert outputs.shape == (2,)
    assert F.mse_loss(outputs, torch.zeros(2)) >= 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"loss": "rmse"}, "mse, huber, l1, not 'rmse'"), ({"std": 0.0}, "std"), ({"mean": float("nan")}, "nan")],
)
def test_what_makes_no_sense_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Regression(**arguments)
