"""FineTuner: the LightningModule for those who have none of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric

from lightning_ft.errors import UserError
from lightning_ft.general import watching
from lightning_ft.injection import Origin, find_base, stacked_layers
from lightning_ft.optim import RateError, parameter_groups, scale_rates
from lightning_ft.quantization import Quantization
from lightning_ft.reporting import log_figure, log_table
from lightning_ft.tasks.penalties.penalty import Ground, Penalty, Step
from lightning_ft.tasks.task import Task, inputs_and_labels

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel


class FineTuner(L.LightningModule):
    """A pretrained Hugging Face model that learns a task. Which parameters train is the callback's affair.

    Args:
        model: a local folder, a name on the hub, or a model with the task's head already on.
        task: what it learns: the head, the loss, the metrics.
        optimizer: makes the optimizer from parameter groups, e.g. ``partial(torch.optim.AdamW, lr=1e-3)``.
            Weight decay is kept off biases and norms.
        scheduler: makes the schedule from the optimizer and the number of steps, e.g.
            ``partial(lightning_ft.optim.linear, warmup=0.1)``; none for a constant rate.
        layer_decay: each layer's learning rate is that of the one above times this (1 for none); the head
            has the full rate (:func:`lightning_ft.optim.parameter_groups`).
        head_lr_ratio: how many times the rate of the base that of the head is.
        penalties: terms beside the task's loss, one of a kind; what they compare with is the base as it is when the
            first fit begins, or a checkpoint is first loaded.
        quantize: pack the pretrained part as it is read: ``"nf4"``, ``"fp4"``, ``"int8"``, or
            ``{"kind": "nf4", "double": False}`` (:mod:`lightning_ft.quantization`); all of its weights are never in
            memory at once. Not for a model that is given, which the method's callback can pack.

    Raises:
        ValueError: for two penalties of a kind.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        task: Task,
        optimizer: Callable[[list[dict[str, Any]]], Optimizer] | None = None,
        scheduler: Callable[[Optimizer, int], LRScheduler] | None = None,
        layer_decay: float = 1.0,
        head_lr_ratio: float = 1.0,
        penalties: Sequence[Penalty] = (),
        quantize: str | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        names = [penalty.name for penalty in penalties]
        if len(set(names)) < len(names):
            raise ValueError(f"FineTuner: each penalty once; there are {', '.join(names)}.")
        if quantize is not None and not isinstance(model, str):
            raise ValueError(
                "FineTuner: quantize packs weights as they're read, and this model is there already. Name its folder,"
                " or let the method pack it: LoRA(quantize=...)."
            )
        packing = None if quantize is None else Quantization.of(quantize)
        self.model = task.build(model, packing) if isinstance(model, str) else model
        # from_pretrained gives a model in eval mode, and Lightning leaves modes alone.
        self.model.train()
        self.task = task
        self.layer_decay, self.head_lr_ratio = layer_decay, head_lr_ratio
        # Of all processes' rows: Lightning's own mean over processes rounds the numbers of rows down.
        self.losses = nn.ModuleDict({stage: MeanMetric() for stage in ("val", "test")})
        self._make_optimizer = optimizer or (lambda groups: torch.optim.AdamW(groups, lr=1e-3))
        self._make_scheduler = scheduler
        self._penalties = [penalty for penalty in penalties if penalty.weight]
        self._origin = Origin()
        self._ground: Ground | None = None

    def forward(self, **inputs: Any) -> Any:
        """The task's outputs: of a classifier the logits (batch, classes), from ``input_ids`` (batch, tokens), …."""
        return self.task.outputs(self.model, inputs)

    def configure_model(self) -> None:
        """Under ModelParallelStrategy share the model's parameters out over the processes, layer by layer (FSDP2).

        Raises:
            UserError: for what needs whole weights.
        """
        if self.device_mesh is not None and not isinstance(self.model, FSDPModule):
            self._refuse_to_shard(self.device_mesh)
            mesh = self.device_mesh["data_parallel"]
            for layer in stacked_layers(self.model):
                fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep of the base what the checkpoint is about to write over."""
        self._remember()

    def on_fit_start(self) -> None:
        """Prepare the penalties, in a fit that resumes too."""
        self._remember()
        if self._penalties:
            self._ground = Ground(self.model, self._origin, self.task.outside())
            for penalty in self._penalties:
                penalty.prepare(self._ground)

    def on_fit_end(self) -> None:
        """Let go of the base as it was, but for what is needed to know it again."""
        self._ground = None

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """The task's loss, and the penalties'."""
        if self._ground is None:
            loss = self.task.training_loss(self.model, batch)
        else:
            inputs, labels = inputs_and_labels(batch)
            with watching(self.model) as seen:
                loss = self.task.loss(self(**inputs), labels)
            step = Step(inputs, self.trainer.fit_loop.total_batch_idx, seen.hidden, seen.logits)
            terms = {f"train/penalty/{p.name}": p.weight * p(self._ground, step) for p in self._penalties}
            self.log_dict({"train/task_loss": loss, **terms})
            loss = loss + torch.stack([*terms.values()]).sum()
        self.log("train/loss", loss, prog_bar=True)
        return self._share_of_mean(loss, batch)

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Count the batch."""
        self._evaluate("val", batch)

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Count the batch."""
        self._evaluate("test", batch)

    def without_gradient(self) -> list[nn.Parameter]:
        """What a step may leave without a gradient, for :class:`lightning_ft.Doctor`."""
        return [parameter for head in self.task.waiting() for parameter in head.parameters()]

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """The task's predictions, one a row."""
        return self.task.predict(self.model, batch)

    def on_train_epoch_end(self) -> None:
        """Tell the task."""
        self.task.end_epoch(self.trainer.num_training_batches)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics, and the tables of a task that has some for validations."""
        self._log_tables("val")
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics, the task's tables and its pictures."""
        self._log_tables("test")
        for name, figure in self.task.pictures("test").items():
            log_figure(self.loggers, f"test/{name}", figure, self.trainer.global_step)
        self._log_scores("test")

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig | Optimizer:
        """The optimizer over what trains, and the schedule by the step."""
        groups = parameter_groups(self, self.model.base_model, self.layer_decay, self.head_lr_ratio)
        optimizer = scale_rates(self._make_optimizer(groups))
        if self._make_scheduler is None:
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        if not steps < float("inf"):
            raise RateError(
                "A learning-rate schedule needs an end: set max_steps in the Trainer, or max_epochs where data has a"
                " length."
            )
        scheduler = self._make_scheduler(optimizer, int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _refuse_to_shard(self, mesh: DeviceMesh) -> None:
        reasons = {
            "tensor_parallel_size must be 1": mesh["tensor_parallel"].size() > 1,
            "penalties look at whole weights": bool(self._penalties),
            "what the task itself learns is outside of the model": any(True for _ in self.task.parameters()),
            "a quantized base can't be shared out": any(not p.is_floating_point() for p in self.model.parameters()),
        }
        if found := [reason for reason, holds in reasons.items() if holds]:
            raise UserError(f"FineTuner can't be sharded by FSDP2: {'; '.join(found)}. Use strategy='ddp'.")

    def _remember(self) -> None:
        if any(penalty.needs_base(self.model) for penalty in self._penalties):
            self._origin.remember(find_base(self.model))

    def _share_of_mean(self, loss: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """A mean over rows or tokens, weighed so that the mean over the processes is that over all of theirs."""
        if self.trainer.world_size == 1:
            return loss
        count = torch.tensor(float(self.task.count(inputs_and_labels(batch)[1])), device=loss.device)
        return loss * (count / self.trainer.strategy.reduce(count.clone(), reduce_op="mean"))

    def _evaluate(self, stage: str, batch: Mapping[str, Any]) -> None:
        inputs, labels = inputs_and_labels(batch)
        outputs = self(**inputs)
        self.task.update(stage, outputs, labels)
        self.task.observe(stage, self.model, batch)
        self._loss_of(stage).update(self.task.loss(outputs, labels), self.task.count(labels))

    def _log_tables(self, stage: str) -> None:
        if stage in self.task.tables_after and self.loggers and not self.trainer.sanity_checking:
            for name, (columns, rows) in self.task.tables(stage).items():
                log_table(self.loggers, f"{stage}/{name}", columns, rows)

    def _log_scores(self, stage: str) -> None:
        if self.trainer.sanity_checking:  # of a few batches, whose scores mean nothing
            self.task.reset(stage)
            self._loss_of(stage).reset()
            return
        # They are of all processes' rows already; else Lightning would advise to say so.
        self.log(f"{stage}/loss", self._loss_of(stage).compute(), sync_dist=True)
        self._loss_of(stage).reset()
        scores = {f"{stage}/{name}": value for name, value in self.task.scores(stage).items()}
        self.log_dict(scores, prog_bar=stage == "val", sync_dist=True)
        self.task.reset(stage)

    def _loss_of(self, stage: str) -> MeanMetric:
        metric = self.losses[stage]
        assert isinstance(metric, MeanMetric)
        return metric
