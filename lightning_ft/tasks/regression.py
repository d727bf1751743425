"""Regression: a number for each text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional import mean_absolute_error, mean_squared_error, r2_score, spearman_corrcoef

from lightning_ft.tasks.pretrained import load_classifier
from lightning_ft.tasks.rows import StageRows
from lightning_ft.tasks.task import Batch, Task, inputs_and_labels

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel

    from lightning_ft.quantization import Quantization

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": F.mse_loss, "huber": F.huber_loss, "l1": F.l1_loss}
"""Functions of outputs and labels, both standardised, to their mean."""


class Regression(Task):
    """A head with one output, and the metrics of it. What is learned is z = (value - mean) / std.

    A new head gives numbers about 0, and losses and gradients of the size that learning rates are made for, whatever
    the data's units; so do z, also where values are rounded to 16 bits. Scores, pictures and predictions are in the
    data's units. A batch's ``labels`` are z, as :class:`lightning_ft.data.targets.Numbers` makes them.

    Args:
        mean: of the values in training.
        std: their standard deviation.
        loss: ``"mse"``; ``"huber"`` (Huber 1964, https://doi.org/10.1214/aoms/1177703732, linear beyond one standard
            deviation) or ``"l1"`` where some values are far off.

    Raises:
        ValueError: for another loss, or a mean and a deviation that can't be ones.
    """

    compared = "standardised value"

    def __init__(self, mean: float = 0.0, std: float = 1.0, loss: str = "mse") -> None:
        super().__init__()
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, not '{loss}'.")
        if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
            raise ValueError(f"mean must be a number, and std one above 0, not {mean} and {std}.")
        self.mean, self.std = float(mean), float(std)
        self._loss = LOSSES[loss]
        self.likelihood_factor = 0.5 if loss == "mse" else 1.0  # huber's half is in it
        self.rows = StageRows()

    def build(self, name: str, quantize: Quantization | None = None) -> PreTrainedModel:
        """The pretrained model with a new head of one output; errors as of :func:`load_classifier`."""
        return load_classifier(name, quantize, **self.card()["head"])

    def outputs(self, model: nn.Module, inputs: Batch) -> Tensor:
        """z of each row, (batch,)."""
        return model(**inputs).logits[:, 0]

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Outputs and labels, z (batch,) both, to a scalar, computed in fp32."""
        return self._loss(outputs.float(), labels.float())

    def update(self, stage: str, outputs: Tensor, labels: Tensor) -> None:
        """Keep a batch for the scores of ``stage``."""
        self.rows[stage].update(outputs, labels.float())

    def scores(self, stage: str) -> dict[str, Tensor]:
        """RMSE and MAE in the data's units, R² and Spearman's rank correlation.

        The last two are 0 of a single row, and Spearman's where all outputs or all labels are the same.
        """
        outputs, labels = self.rows[stage].all()
        several = len(labels) > 1
        return {
            "rmse": self.std * mean_squared_error(outputs, labels, squared=False),
            "mae": self.std * mean_absolute_error(outputs, labels),
            "r2": r2_score(outputs, labels) if several else outputs.new_zeros(()),
            "spearman": spearman_corrcoef(outputs, labels) if several else outputs.new_zeros(()),
        }

    def reset(self, stage: str) -> None:
        """Begin counting anew."""
        self.rows[stage].reset()

    def pictures(self, stage: str) -> dict[str, Figure]:
        """A dot a row: what is true, and what was predicted; right ones lie on the line."""
        from matplotlib.figure import Figure

        predicted, true = (self.mean + self.std * z.cpu().double().numpy() for z in self.rows[stage].all())
        figure = Figure(figsize=(5, 5), layout="constrained")
        axes = figure.add_subplot(xlabel="true", ylabel="predicted")
        axes.scatter(true, predicted, s=14, alpha=0.5, edgecolors="none")
        axes.axline((self.mean, self.mean), slope=1, color="0.5", linewidth=1)
        axes.grid(alpha=0.3)
        return {"true_and_predicted": figure}

    def predict(self, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        """For each row the value, in the data's units."""
        inputs, _ = inputs_and_labels(batch)
        return [{"value": self.mean + self.std * z} for z in self.values(self.outputs(model, inputs)).tolist()]

    def values(self, outputs: Tensor) -> Tensor:
        """z of each row, which are comparable whatever the units are."""
        return outputs.float()

    def card(self) -> dict[str, Any]:
        """The head, and how its output becomes a value."""
        return {
            "head": {"num_labels": 1, "problem_type": "regression"},  # by which transformers' pipeline leaves it as is
            "reading": f"Its logit is standardised: the value is {self.mean!r} + {self.std!r} * logit.",
        }
