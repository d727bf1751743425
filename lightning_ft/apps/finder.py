"""``optimizer.lr=auto``: the learning rate, by Lightning's finder, in a search that leaves no trace on the training."""

from __future__ import annotations

import gc
import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.tuner.tuning import Tuner
from omegaconf import DictConfig
from torch.optim import Optimizer

from lightning_ft.apps import build
from lightning_ft.data.module import TextDataModule
from lightning_ft.optim import RateError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

_BEGIN, _END = 10, 1  # points at the ends of the curve that are left out, as Lightning does
_BETA = 0.98  # of its running mean of the loss


def find_rate(config: DictConfig, data: TextDataModule) -> tuple[float, Figure]:
    """The rate at which the loss falls fastest, over its logarithm, and the curve that it's read from.

    A range test (Smith 2015, https://arxiv.org/abs/1506.01186, section 3.3): from step to step the rate rises
    exponentially from ``lr_finder.min_lr`` to ``lr_finder.max_lr``, for ``lr_finder.steps`` steps or until the loss
    is four times its best. The model, the method and the Trainer are others than those of the run, so that a run at the
    rate that was found is the run to which that rate is given. Groups with rates of their own (``head_lr_ratio``,
    ``layer_decay``) keep their ratios, and the method trains as in the run.

    Args:
        config: of the run; its rate isn't read.
        data: of the run.

    Raises:
        RateError: if the loss falls nowhere.
    """
    wanted = config.lr_finder
    if not 0 < wanted.min_lr < wanted.max_lr:
        raise RateError(f"lr_finder.min_lr={wanted.min_lr} must be above 0 and below lr_finder.max_lr={wanted.max_lr}.")
    if wanted.steps < _BEGIN + _END + 10:
        raise RateError(f"lr_finder.steps={wanted.steps} is too few to see where the loss falls; 100 is usual.")
    config = config.copy()
    config.optimizer.lr, config.scheduler = wanted.min_lr, None
    L.seed_everything(config.seed, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        module = build.finetuner(config, data.facts)
        trainer = _SearchTrainer(
            # The method says what trains, and how.
            keep=[build.method(config), *build.savers(config), _Ratios(wanted.min_lr)],
            default_root_dir=folder,  # Lightning puts the module's first state there
            accelerator=config.trainer.accelerator,
            devices=1,
            precision=config.trainer.get("precision"),
            gradient_clip_val=config.trainer.get("gradient_clip_val"),
            accumulate_grad_batches=config.trainer.get("accumulate_grad_batches", 1),
            max_epochs=-1,
            max_steps=wanted.steps,
            check_val_every_n_epoch=2**31,  # Lightning's finder would validate after each epoch
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        found = Tuner(trainer).lr_find(
            module,
            datamodule=data,
            min_lr=wanted.min_lr,
            max_lr=wanted.max_lr,
            num_training=wanted.steps,
            update_attr=False,
        )
    del module, trainer
    gc.collect()  # the run's peak memory isn't the search's
    assert found is not None
    found.results["loss"] = unbiased(found.results["loss"])
    rate = _where_it_falls(found.results)
    log.info("Learning rate: %.2e is where the loss falls fastest, of %d rates.", rate, len(found.results["lr"]))
    return rate, _picture(found.results, rate)


class _Ratios(Callback):
    """Keeps the ratios of the groups' rates, which the finder sets alike; ``lr`` is the one they were made from."""

    def __init__(self, lr: float) -> None:
        self._lr = lr

    def on_fit_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Before the finder sets them."""
        self._ratios = [group["lr"] / self._lr for group in trainer.optimizers[0].param_groups]

    def on_before_optimizer_step(self, _: L.Trainer, __: L.LightningModule, optimizer: Optimizer) -> None:
        """For this step: the finder's scheduler sets them anew after it."""
        for group, ratio in zip(optimizer.param_groups, self._ratios, strict=True):
            group["lr"] *= ratio


class _SearchTrainer(L.Trainer):
    """Lightning's finder takes all callbacks away while it searches. Those in ``keep`` stay.

    They are set up before it starts; while it searches, the callback in which it looks for its curve comes first.
    """

    def __init__(self, keep: Sequence[Callback], **arguments: Any) -> None:
        self._keep = list(keep)
        super().__init__(**arguments)

    @property
    def callbacks(self) -> list[Callback]:
        """The callbacks in their order."""
        return self._callbacks

    @callbacks.setter
    def callbacks(self, callbacks: list[Callback]) -> None:
        others = [callback for callback in callbacks if callback not in self._keep]
        starting = any(isinstance(callback, LearningRateFinder) for callback in others)
        self._callbacks = [*self._keep, *others] if starting else [*others, *self._keep]


def unbiased(losses: Sequence[float]) -> list[float]:
    """The running means of the loss, as they should be.

    The mean of n losses from 0 on is to be divided by 1 - βⁿ. Lightning counts a step too many and divides by
    1 - βⁿ⁺¹: a curve begins at half the loss and rises, which hides where it falls.
    """
    return [loss * (1 - _BETA ** (n + 1)) / (1 - _BETA**n) for n, loss in enumerate(losses, 1)]


def _where_it_falls(results: Mapping[str, Any]) -> float:
    """The rate at which the loss falls fastest over the rate's logarithm, as the curve is drawn.

    Lightning's own suggestion takes the slope over the rate itself, by which a ripple at 1e-6 is steeper than a fall
    from 5 to 3 between 1e-3 and 1e-2.
    """
    curve = list(zip(results["lr"], results["loss"], strict=True))[_BEGIN:-_END]
    rates, losses = zip(*[point for point in curve if math.isfinite(point[1])] or [(0.0, 0.0)], strict=True)
    if len(rates) < 2 or min(losses) >= losses[0]:
        tried = f"{results['lr'][0]:.0e} to {results['lr'][-1]:.0e}" if results["lr"] else "none"
        raise RateError(
            f"No learning rate was found: the loss falls at none of those tried ({tried}). Give one, optimizer.lr=1e-4,"
            " or search elsewhere: lr_finder.min_lr=..., lr_finder.max_lr=..., lr_finder.steps=..."
        )
    return rates[int(np.argmin(np.gradient(losses, np.log(rates))))]


def _picture(results: Mapping[str, Any], rate: float) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="learning rate", ylabel="loss (running mean)", xscale="log")
    axes.plot(results["lr"], results["loss"])
    loss = results["loss"][results["lr"].index(rate)]
    axes.plot(rate, loss, "o", color="tab:red")
    axes.annotate(f" {rate:.2e}", (rate, loss), va="bottom")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
