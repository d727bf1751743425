"""What the base could do: before, during and after it learned something else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]

from lightning_ft.general import (
    GENERAL_EN,
    agreement,
    embeddings,
    encode,
    evaluating,
    is_causal_lm,
    neighbours,
    perplexity,
    read_texts,
)
from lightning_ft.injection import find_base
from lightning_ft.reporting import log_figure, log_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Probe = Callable[[LightningModule], Mapping[str, float]]


class Retention(Callback):
    """Logs what is left of the base's ability, beside the task's scores; for any project with a Hugging Face model.

    Of a causal language model it is ``retention/perplexity``, on general text. Of any other model it's
    ``retention/neighbours``: each text has k nearest neighbours among the general texts, by the embeddings that the
    model gives them, and this is the share of them that it has in the base too: 1 as long as nothing changed, and by
    chance alone k / (texts - 1). Both look at the trunk (and a pretrained head), whatever head the task has.

    It's measured when the first fit begins, with each validation (or at the end of an epoch, where there's none), and
    on the weights that a later ``trainer.test`` tests, as ``test/retention/...``. When the fit is over the loggers get
    a table and a picture. Nothing of the training depends on it.

    Args:
        probe: something else to measure: gets the LightningModule, evaluating and without gradients, and returns
            numbers by name.
        texts: general text: a list, a file with one text a line, or ``"bundled:general_en"``.
        every_n_epochs: how often.
        k: of the neighbours.
        max_texts: of a longer file, that many are used, spread evenly over it.
        max_length: longer texts are cut to this many tokens.
        batch_size: of what it does.
        tokenizer: by default the model's.
        backbone: path of the base, where it must be named.

    Attributes:
        history: a row for each measurement: ``step``, ``epoch``, retention, and the task's scores of that validation.
    """

    def __init__(
        self,
        probe: Probe | None = None,
        texts: str | Path | Sequence[str] = GENERAL_EN,
        every_n_epochs: int = 1,
        k: int = 10,
        max_texts: int = 200,
        max_length: int = 128,
        batch_size: int = 32,
        tokenizer: str | None = None,
        backbone: str | None = None,
    ) -> None:
        for name, value in {"every_n_epochs": every_n_epochs, "k": k, "max_texts": max_texts}.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"Retention: {name} must be a whole number of at least 1, not {value!r}.")
        self.probe, self.texts, self.every_n_epochs, self.k = probe, texts, every_n_epochs, k
        self.max_texts, self.max_length, self.batch_size = max_texts, max_length, batch_size
        self.tokenizer, self.backbone = tokenizer, backbone
        self.history: list[dict[str, float]] = []
        self._rows: list[dict[str, list[int]]] = []
        self._neighbours: torch.Tensor | None = None  # in the base

    def measure(self, pl_module: LightningModule) -> dict[str, float]:
        """What the module can do now, by name; of an encoder's first measurement all is kept."""
        if self.probe is not None:
            with evaluating(pl_module):
                return {name: float(value) for name, value in self.probe(pl_module).items()}
        model = find_base(pl_module, self.backbone).root
        if not self._rows:
            texts = read_texts(self.texts)
            step = max(len(texts) / self.max_texts, 1.0)
            texts = [texts[int(i * step)] for i in range(min(self.max_texts, len(texts)))]
            if len(texts) <= self.k:
                raise ValueError(f"Retention: there are {len(texts)} texts, and k={self.k} neighbours need more.")
            self._rows = encode(texts, model, self.tokenizer, self.max_length)
        if is_causal_lm(model):
            return {"perplexity": perplexity(model, self._rows, self.batch_size)}
        found = neighbours(embeddings(model, self._rows, self.batch_size), self.k)
        if self._neighbours is None:
            self._neighbours = found
        return {"neighbours": agreement(self._neighbours, found)}

    # ------------------------------------------------------------------ Lightning's hooks

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the base; a fit that goes on, resumed or not, knows it already."""
        if not self.history:
            self._keep(trainer, self.measure(pl_module))
            for logger in trainer.loggers:
                logger.log_metrics(_named(self.history[0]), step=trainer.global_step)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Measure at the first batch: by then callbacks that average weights have put those in that are validated."""
        if batch_idx == dataloader_idx == 0 and self._validates(trainer) and self._is_due(trainer):
            self._measure_and_log(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the task's scores beside it."""
        if self.history and self._validates(trainer) and self.history[-1]["step"] == trainer.global_step:
            scores = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val")}
            self.history[-1].update(scores)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, if no validation of this step did."""
        if self.history[-1]["step"] != trainer.global_step and self._is_due(trainer):
            self._measure_and_log(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The table and the picture, and one line."""
        columns = list(dict.fromkeys(key for row in self.history for key in row))
        log_table(trainer.loggers, "retention", columns, [[row.get(key) for key in columns] for row in self.history])
        log_figure(trainer.loggers, "retention", self.figure(), trainer.global_step)
        first, last = self.history[0], self.history[-1]
        kept = ", ".join(f"{key} {first[key]:.3f} → {last[key]:.3f}" for key in first if key not in ("step", "epoch"))
        rank_zero_info(f"Retention of the base over {int(last['step'])} steps: {kept}")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the weights that are tested, if the base is known to compare them with."""
        if self.history:
            pl_module.log_dict(
                {f"test/retention/{name}": value for name, value in self.measure(pl_module).items()}, sync_dist=True
            )

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints: what the base could do, which can't be measured later."""
        return {"history": [dict(row) for row in self.history], "neighbours": self._neighbours}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from it."""
        self.history, self._neighbours = state_dict["history"], state_dict["neighbours"]

    def figure(self) -> Figure:
        """Retention by the step, a panel for each number."""
        from matplotlib.figure import Figure

        names = [key for key in self.history[0] if key not in ("step", "epoch")]
        figure = Figure(figsize=(6, 0.6 + 2.4 * len(names)), layout="constrained")
        for i, name in enumerate(names):
            axes = figure.add_subplot(len(names), 1, i + 1, xlabel="step", ylabel=name)
            axes.plot([row["step"] for row in self.history], [row[name] for row in self.history], marker="o")
            axes.grid(alpha=0.3)
        return figure

    # ------------------------------------------------------------------

    @staticmethod
    def _validates(trainer: Trainer) -> bool:
        """Whether a validation is one of the training's."""
        return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking

    def _is_due(self, trainer: Trainer) -> bool:
        return (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def _measure_and_log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._keep(trainer, self.measure(pl_module))
        pl_module.log_dict(_named(self.history[-1]), on_step=False, on_epoch=True, batch_size=1, sync_dist=True)

    def _keep(self, trainer: Trainer, found: Mapping[str, float]) -> None:
        self.history.append({"step": trainer.global_step, "epoch": trainer.current_epoch, **found})


def _named(row: Mapping[str, float]) -> dict[str, float]:
    return {f"retention/{name}": value for name, value in row.items() if name not in ("step", "epoch")}
