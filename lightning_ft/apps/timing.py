"""How long steps of training take."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from lightning.pytorch import Callback
from omegaconf import DictConfig

from lightning_ft.apps import build
from lightning_ft.data.module import TextDataModule


class _Clock(Callback):
    """Times steps, but for the first one, and counts their tokens."""

    seconds, tokens, batches = 0.0, 0, 0

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock."""
        self.batches += 1
        self._started = time.perf_counter()

    def on_train_batch_end(self, _: L.Trainer, __: Any, outputs: Any, batch: Any, *___: Any) -> None:
        """Stop it."""
        outputs["loss"].item()  # waits for a GPU
        if self.batches > 1:  # not by batch_idx: an epoch may be a batch long
            self.seconds += time.perf_counter() - self._started
            self.tokens += batch["input_ids"].numel()


def training_time(config: DictConfig, data: TextDataModule, device: str) -> tuple[float, int]:
    """The seconds that ``config.steps`` steps take, after one that doesn't count; and how many tokens they had."""
    config, clock = config.copy(), _Clock()
    config.scheduler = None
    trainer = build.quiet_trainer(
        config,
        accelerator=device,
        callbacks=[build.method(config), *build.savers(config), clock],
        max_epochs=-1,
        max_steps=config.steps + 1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )
    trainer.fit(build.finetuner(config, data.facts), data)
    return clock.seconds, clock.tokens
