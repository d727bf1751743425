"""Ordinal: a grade for each text, where grades have an order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional import spearman_corrcoef
from torchmetrics.functional.classification import multiclass_confusion_matrix

from lightning_ft.reporting import confusion_matrix
from lightning_ft.tasks.pretrained import load_classifier, named_outputs
from lightning_ft.tasks.rows import StageRows
from lightning_ft.tasks.task import Batch, Table, Task, inputs_and_labels

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel

    from lightning_ft.quantization import Quantization


def corn_loss(logits: Tensor, ranks: Tensor) -> Tensor:
    """The loss of CORN (Shi, Cao & Raschka 2021, https://arxiv.org/abs/2111.08851, equation 6).

    Logit k is asked only of the rows that have come so far, S_k = {i: y_i > r_(k-1)}, and all of them for k = 0::

        L = - 1 / Σ_k |S_k| · Σ_k Σ_(i in S_k)  log σ(z_ik) [y_i > r_k] + log(1 - σ(z_ik)) [y_i <= r_k]

    Args:
        logits: z, (batch, K - 1): σ(z_ik) = P(y_i > r_k | y_i > r_(k-1)).
        ranks: y, (batch,): whole numbers from 0 to K - 1.

    Returns:
        A scalar.
    """
    k = torch.arange(logits.shape[1], device=logits.device)
    above = (ranks[:, None] > k).to(logits.dtype)
    losses = F.binary_cross_entropy_with_logits(logits, above, reduction="none")
    return losses[ranks[:, None] >= k].mean()


def corn_probabilities(logits: Tensor) -> Tensor:
    """P(y = r_k) of each rank, (batch, K), from CORN's logits, (batch, K - 1).

    P(y > r_k) = Π_(j <= k) σ(z_j) can only fall with k, so that no probability is below 0, whatever the logits are.
    """
    above = _above(logits)
    return torch.cat([1 - above[:, :1], above[:, :-1] - above[:, 1:], above[:, -1:]], dim=1)


def quadratic_kappa(counts: Tensor, grades: Sequence[int]) -> Tensor:
    """Quadratic weighted kappa (Cohen 1968, https://doi.org/10.1037/h0026256): agreement beyond chance, a scalar.

    1 - Σ_ij w_ij O_ij / Σ_ij w_ij E_ij, where w_ij = (g_i - g_j)², O are the counts and E those that the same margins
    would have by chance. Distances are of the grades themselves: to scikit-learn, which weighs by place, a gap is a
    label that never occurs. It is 0 where all is one grade, true and predicted, of which chance explains all.

    Args:
        counts: (K, K), a row a true grade, a column a predicted one.
        grades: the K of them.
    """
    counts, levels = counts.double(), torch.tensor(grades, dtype=torch.float64, device=counts.device)
    weights = (levels[:, None] - levels).square()
    expected = counts.sum(dim=1, keepdim=True) * counts.sum(dim=0, keepdim=True) / counts.sum()
    by_chance = (weights * expected).sum()
    kappa = 1 - (weights * counts).sum() / by_chance
    return torch.where(by_chance > 0, kappa, 0.0).float()


class Ordinal(Task):
    """Grades by CORN: K - 1 logits of a plain linear head, each of P(above this grade | above the one before).

    Why CORN and not CORAL (Cao, Mirjalili & Raschka 2020, https://arxiv.org/abs/1901.07884), which shares one weight
    vector among its K - 1 outputs: CORN's head is an ordinary linear layer, so that a merged model is a stock Hugging
    Face model; and it is as consistent, by the chain rule, without that restriction. Plain classification would take
    a grade that is off by one for as wrong as one that is off by all.

    Args:
        grades: whole numbers in rising order; there may be gaps between them.

    Raises:
        ValueError: if there are fewer than two, or they don't rise.
    """

    def __init__(self, grades: Sequence[int]) -> None:
        super().__init__()
        if len(grades) < 2 or list(grades) != sorted(set(grades)):
            raise ValueError(f"Ordinal needs at least two grades in rising order, not {list(grades)}.")
        self.grades = list(grades)
        self.register_buffer("levels", torch.tensor(self.grades, dtype=torch.float32), persistent=False)
        self.levels: Tensor
        self.rows = StageRows()

    def build(self, name: str, quantize: Quantization | None = None) -> PreTrainedModel:
        """The pretrained model with a new head of K - 1 outputs; errors as of :func:`load_classifier`."""
        outputs = named_outputs([f"above {grade}" for grade in self.grades[:-1]])
        return load_classifier(name, quantize, **{**outputs, **self.card()["head"]})

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """CORN's: logits (batch, K - 1), labels (batch,), the places of the grades, to a scalar, computed in fp32."""
        return corn_loss(logits.float(), labels)

    def count(self, labels: Tensor) -> int:
        """Of how many questions the loss of a batch is the mean: of a row one more than it has grades below it."""
        return int((labels + 1).clamp(max=len(self.grades) - 1).sum())

    def update(self, stage: str, logits: Tensor, labels: Tensor) -> None:
        """Keep a batch for the scores of ``stage``."""
        self.rows[stage].update(logits, labels)

    def scores(self, stage: str) -> dict[str, Tensor]:
        """Quadratic weighted kappa, MAE in grades and accuracy of the predicted grade; Spearman's of the expected one.

        Spearman's rank correlation is 0 of a single row, and where all are the same.
        """
        logits, labels = self.rows[stage].all()
        counts, true = self._counts(stage), self.levels[labels]
        expected = self._expected(corn_probabilities(logits))
        return {
            "qwk": quadratic_kappa(counts, self.grades),
            "mae": (self.levels[_ranks(logits)] - true).abs().mean(),
            "accuracy": counts.diagonal().sum() / counts.sum(),
            "spearman": spearman_corrcoef(expected, true) if len(true) > 1 else true.new_zeros(()),
        }

    def reset(self, stage: str) -> None:
        """Begin counting anew."""
        self.rows[stage].reset()

    def tables(self, stage: str) -> dict[str, Table]:
        """Of each grade how often it was found, by how much it was missed, and the number of examples."""
        counts = self._counts(stage).cpu().double()
        levels = self.levels.cpu().double()
        examples = counts.sum(dim=1)
        found = counts.diagonal() / examples.clamp(min=1)
        missed = (counts * (levels[:, None] - levels).abs()).sum(dim=1) / examples.clamp(min=1)
        rows = [
            [str(grade), round(float(found[i]), 4), round(float(missed[i]), 4), int(examples[i])]
            for i, grade in enumerate(self.grades)
        ]
        return {"per_grade": (["grade", "recall", "mae", "examples"], rows)}

    def pictures(self, stage: str) -> dict[str, Figure]:
        """The confusion matrix."""
        return {"confusion_matrix": confusion_matrix(self._counts(stage).cpu().numpy(), list(map(str, self.grades)))}

    def predict(self, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        """For each row the grade (the median), the expected one (the mean, a fraction), and all probabilities."""
        inputs, _ = inputs_and_labels(batch)
        logits = self.outputs(model, inputs)
        probabilities = self.values(logits)
        names = list(map(str, self.grades))
        return [
            {"grade": self.grades[rank], "expected": mean, "probabilities": dict(zip(names, row, strict=True))}
            for rank, mean, row in zip(
                _ranks(logits).tolist(),
                self._expected(probabilities).tolist(),
                probabilities.tolist(),
                strict=True,
            )
        ]

    def values(self, outputs: Tensor) -> Tensor:
        """The probability of each grade, (rows, K)."""
        return corn_probabilities(outputs.float())

    def card(self) -> dict[str, Any]:
        """The head, and how its outputs become a grade."""
        grades = ", ".join(map(str, self.grades))
        return {
            # by which transformers' pipeline takes the sigmoid of each logit
            "head": {"num_labels": len(self.grades) - 1, "problem_type": "multi_label_classification"},
            "reading": f"Its grades are {grades}. The sigmoid of logit k is the probability to be above grade k for"
            " what is above the grade before (CORN); the product of the first k is that to be above grade k. The grade"
            " is as many steps above the first as there are products above 0.5.",
        }

    def _expected(self, probabilities: Tensor) -> Tensor:
        return probabilities @ self.levels.to(probabilities.device)

    def _counts(self, stage: str) -> Tensor:
        logits, labels = self.rows[stage].all()
        return multiclass_confusion_matrix(_ranks(logits), labels, len(self.grades))


def _above(logits: Tensor) -> Tensor:
    """P(y > r_k), (batch, K - 1)."""
    return logits.float().sigmoid().cumprod(dim=1)


def _ranks(logits: Tensor) -> Tensor:
    """The predicted rank, (batch,): how many grades it is more likely above than not."""
    return (_above(logits) > 0.5).sum(dim=1)
