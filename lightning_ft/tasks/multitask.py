"""Several tasks over one pretrained trunk."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_ft.errors import UserError
from lightning_ft.tasks.task import Batch, Table, Task, inputs_and_labels

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel

    from lightning_ft.quantization import Quantization


class MissingTaskError(UserError):
    """A task had no data in an epoch."""


class Weighting(nn.Module, ABC):
    """How the losses of several tasks become one."""

    @abstractmethod
    def prepare(self, tasks: Mapping[str, Task]) -> None:
        """Hear which tasks there are. Raise ValueError if that doesn't fit."""

    @abstractmethod
    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The loss of a batch, from those of the tasks that it has."""

    def end_epoch(self, means: Mapping[str, float]) -> None:
        """Hear each task's mean loss in the epoch of training that ends."""


class Fixed(Weighting):
    """L = Σ w_k L_k.

    Args:
        weights: w_k by task; 1 for those that aren't named.
    """

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.weights = dict(weights or {})

    def prepare(self, tasks: Mapping[str, Task]) -> None:
        """Raise ValueError if a weight is negative, or names no task."""
        unknown = set(self.weights) - set(tasks)
        if unknown or any(weight < 0 for weight in self.weights.values()):
            raise ValueError(f"weights must be numbers of at least 0 for {', '.join(tasks)}, not {self.weights}.")

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of a batch's losses, by task."""
        return torch.stack([self.weights.get(name, 1.0) * loss for name, loss in losses.items()]).sum()


class Uncertainty(Weighting):
    """Weights that are learned, by each task's noise σ_k (Kendall, Gal & Cipolla 2018, https://arxiv.org/abs/1705.07115).

    L = Σ c_k exp(-s_k) L_k + s_k / 2 with s_k = log σ_k²; c_k is 1/2 for a squared error, whose likelihood is
    Gaussian (equation 5), and 1 for a cross-entropy (equation 10).
    """

    def prepare(self, tasks: Mapping[str, Task]) -> None:
        """Make s_k, 0 at first, for each task."""
        self.log_variances = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in tasks})
        self.factors = {name: task.likelihood_factor for name, task in tasks.items()}

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The sum for a batch's losses, by task."""
        terms = []
        for name, loss in losses.items():
            s = self.log_variances[name]
            terms.append(self.factors[name] * torch.exp(-s) * loss + s / 2)
        return torch.stack(terms).sum()


class DynamicWeightAverage(Weighting):
    """Weights by how slowly each loss falls (Liu, Johns & Davison 2019, https://arxiv.org/abs/1803.10704, equation 7).

    w_k(t) = K exp(r_k / T) / Σ_i exp(r_i / T) with r_k = L_k(t-1) / L_k(t-2), over the mean losses of the last two
    epochs; 1 in the first two.

    Args:
        temperature: T; the larger, the more alike are the weights.
    """

    def __init__(self, temperature: float = 2.0) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, not {temperature}.")
        self.temperature = temperature

    def prepare(self, tasks: Mapping[str, Task]) -> None:
        """Make room for the mean losses of two epochs, the last one's first; they're saved in checkpoints."""
        self.names = list(tasks)
        self.register_buffer("history", torch.full((2, len(tasks)), math.nan))
        self.history: Tensor

    @property
    def weights(self) -> dict[str, float]:
        """The weights of this epoch."""
        if self.history.isnan().any():
            return dict.fromkeys(self.names, 1.0)
        ratios = self.history[0] / self.history[1]
        return dict(zip(self.names, (len(ratios) * (ratios / self.temperature).softmax(0)).tolist(), strict=True))

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of a batch's losses, by task."""
        weights = self.weights
        return torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()

    def end_epoch(self, means: Mapping[str, float]) -> None:
        """Hear each task's mean loss in the epoch of training that ends."""
        self.history = torch.stack([self.history.new_tensor([means[name] for name in self.names]), self.history[0]])


class MultiTask(Task):
    """Several tasks, each with its own head, over one trunk that all of them train.

    ``labels`` of a batch are by task. A batch need not have all tasks (:class:`MultiTaskDataModule` mixes data sets),
    but an epoch must.

    Args:
        tasks: by name.
        weighting: how their losses become one; :class:`Fixed` weights of 1 by default.

    Raises:
        ValueError: if there are fewer than two tasks, or the weighting doesn't fit them.
    """

    plain = False

    def __init__(self, tasks: Mapping[str, Task], weighting: Weighting | None = None) -> None:
        super().__init__()
        if len(tasks) < 2:
            raise ValueError(f"MultiTask needs at least two tasks; there is {', '.join(tasks) or 'none'}.")
        self.tasks = nn.ModuleDict(dict(tasks))
        self.heads = nn.ModuleDict()
        self.weighting = weighting or Fixed()
        self.weighting.prepare(tasks)
        self._batches = 0  # trained in this epoch
        self._means: Any = nn.ModuleDict({name: MeanMetric() for name in tasks})
        self._seen: dict[str, set[str]] = {}  # by stage, the tasks that had data
        # Hugging Face models that say of the trunk's outputs what their heads make of them. They're no children: what
        # they hold is the trunk's, or among the heads.
        self._headed: dict[str, PreTrainedModel] = {}
        self._given = _Given()

    def build(self, name: str, quantize: Quantization | None = None) -> PreTrainedModel:
        """The trunk; its heads stay here, for they are the tasks'.

        Raises:
            ValueError: if a task's model has no trunk and head to tell apart.
        """
        models = {key: task.build(name, quantize) for key, task in self._tasks()}
        trunks = {key: getattr(model, model.base_model_prefix, None) for key, model in models.items()}
        if lacking := [key for key, trunk in trunks.items() if not isinstance(trunk, nn.Module)]:
            kind = type(models[lacking[0]]).__name__
            raise ValueError(f"The task '{lacking[0]}' can't share a trunk: {kind} has no trunk under its head.")
        # One with a pooler serves those without it too.
        trunk: Any = max(trunks.values(), key=lambda module: len(list(module.parameters())))  # type: ignore[union-attr]
        for key, model in models.items():
            setattr(model, model.base_model_prefix, self._given)
            children = {n: child for n, child in model.named_children() if child is not self._given}
            self.heads[key] = nn.ModuleDict(children)
        self.heads.train()  # from_pretrained gives all in eval mode
        self._headed = models
        return trunk

    def outputs(self, model: nn.Module, inputs: Batch) -> dict[str, Any]:
        """What each task's head makes of a batch; the trunk runs once."""
        with self._given.holding(model(**inputs)):
            return {key: task.outputs(self._headed[key], inputs) for key, task in self._tasks()}

    def loss(self, outputs: Mapping[str, Any], labels: Mapping[str, Any]) -> Tensor:
        """The weighted sum of the losses of those tasks that the batch has labels for."""
        losses = {key: task.loss(outputs[key], labels[key]) for key, task in self._tasks() if key in labels}
        if self.training and torch.is_grad_enabled():
            self._batches += 1
            for key, loss in losses.items():
                self._means[key].update(loss.detach(), self._task(key).count(labels[key]))
        return self.weighting(losses)

    def count(self, labels: Mapping[str, Any]) -> int:
        """The number of rows, of the task that has the most."""
        return max(self._task(key).count(labels[key]) for key in labels)

    def outside(self) -> list[nn.Module]:
        """All heads."""
        return [self.heads]

    def waiting(self) -> list[nn.Module]:
        """All heads: a batch may hold one task's rows. What has none in a whole epoch, :meth:`end_epoch` refuses."""
        return [self.heads]

    def end_epoch(self, batches: float) -> None:
        """See that each task was trained in the epoch, and tell the weighting how it went; of a part say nothing."""
        if self._batches >= batches:
            missing = [key for key, mean in self._means.items() if mean.update_count == 0]
            self._refuse(missing, "train")
            self.weighting.end_epoch({key: float(mean.compute()) for key, mean in self._means.items()})
        self._batches = 0
        for mean in self._means.values():
            mean.reset()

    def update(self, stage: str, outputs: Mapping[str, Any], labels: Mapping[str, Any]) -> None:
        """Count a batch in the metrics of the tasks that it has labels for."""
        for key in labels:
            self._task(key).update(stage, outputs[key], labels[key])
            self._seen.setdefault(stage, set()).add(key)

    def scores(self, stage: str) -> dict[str, Tensor]:
        """Each task's scores, behind its name: ``TASK/f1``.

        Raises:
            MissingTaskError: if a task had no data.
        """
        self._refuse([key for key in self.tasks if key not in self._seen.get(stage, set())], stage)
        return {f"{key}/{name}": value for key, task in self._tasks() for name, value in task.scores(stage).items()}

    def reset(self, stage: str) -> None:
        """Begin counting anew."""
        self._seen.pop(stage, None)
        for _, task in self._tasks():
            task.reset(stage)

    def tables(self, stage: str) -> dict[str, Table]:
        """Each task's tables, behind its name."""
        return self._named(lambda task: task.tables(stage))

    def pictures(self, stage: str) -> dict[str, Figure]:
        """Each task's pictures, behind its name."""
        return self._named(lambda task: task.pictures(stage))

    def predict(self, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        """For each row, what each task predicts, by its name."""
        inputs, _ = inputs_and_labels(batch)
        with self._given.holding(model(**inputs)):
            each = {key: task.predict(self._headed[key], batch) for key, task in self._tasks()}
        return [dict(zip(each, row, strict=True)) for row in zip(*each.values(), strict=True)]

    def values(self, outputs: Mapping[str, Any]) -> Tensor:
        """The tasks' values side by side: (rows, all of them)."""
        return torch.cat([task.values(outputs[key]).flatten(1) for key, task in self._tasks()], dim=1)

    def _task(self, key: str) -> Task:
        task = self.tasks[key]
        assert isinstance(task, Task)
        return task

    def _tasks(self) -> list[tuple[str, Task]]:
        return [(key, self._task(key)) for key in self.tasks]

    def _named(self, of: Callable[[Task], Mapping[str, Any]]) -> dict[str, Any]:
        return {f"{key}/{name}": value for key, task in self._tasks() for name, value in of(task).items()}

    def _refuse(self, missing: list[str], stage: str) -> None:
        if missing:
            raise MissingTaskError(
                f"The {stage} data of an epoch had no row for {', '.join(missing)}: add rows, lower what the Trainer"
                " limits (limit_train_batches, …), or leave the task out."
            )


class _Given(nn.Module):
    """Stands for a trunk that has run already."""

    @contextmanager
    def holding(self, outputs: Any) -> Iterator[None]:
        """While the block runs, ``outputs`` are what the trunk says."""
        self.outputs = outputs
        try:
            yield
        finally:
            del self.outputs  # a graph is neither kept nor copied with the module

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.outputs
