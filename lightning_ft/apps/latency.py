"""How long a trained model takes for a text, and how that compares with the bare model."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor

from lightning_ft import merge
from lightning_ft.data.module import TextDataModule
from lightning_ft.injection import InjectionError, twin
from lightning_ft.tasks.finetuner import FineTuner
from lightning_ft.tasks.task import inputs_and_labels

BATCHES = 8


def measure(module: FineTuner, data: TextDataModule, trainer: L.Trainer, rounds: int) -> dict[str, Any]:
    """Time the forward pass alone, on the device and in the precision of the training.

    What methods added is merged first, where it can be: ``module`` is changed. Each pass is followed by one of the bare
    model, for a machine is never equally fast for long: milliseconds of two runs differ by that too, ratios don't.

    Args:
        module: the trained module.
        data: its test split gives at most BATCHES batches, spread over it: the same ones for every method.
        trainer: the one that trained it.
        rounds: how often each batch is timed, after a first time that doesn't count.

    Returns:
        ``ms``: milliseconds a text. ``ratio``: its time over the bare model's. Both are medians over the rounds;
        ``quartiles``: of the ratio. ``batch_size``. ``merged``: None if there was nothing to.
    """
    merged: bool | None = False
    with contextlib.suppress(NotImplementedError, InjectionError):  # packed, it would be lost in the rounding
        merged = bool(merge(module)) or None
    device = trainer.strategy.root_device
    module.to(device).eval()
    loader = data.test_dataloader()
    stride = -(-len(loader) // BATCHES)
    batches = [
        inputs_and_labels(move_data_to_device(dict(batch), device))[0]
        for i, batch in enumerate(loader)
        if i % stride == 0
    ]
    with torch.inference_mode(), trainer.precision_plugin.forward_context(), twin(module) as bare:
        passes = [
            [[_seconds(model, batch, device) for model in (module, bare)] for batch in batches]
            for _ in range(rounds + 1)
        ]
    seconds = np.array(passes[1:]).sum(axis=1)  # (rounds, 2)
    low, ratio, high = np.quantile(seconds[:, 0] / seconds[:, 1], [0.25, 0.5, 0.75]).tolist()
    return {
        "ms": 1000 * float(np.median(seconds[:, 0])) / sum(len(batch["input_ids"]) for batch in batches),
        "ratio": ratio,
        "quartiles": [low, high],
        "batch_size": loader.batch_size,
        "merged": merged,
    }


def _seconds(module: FineTuner, batch: dict[str, Tensor], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    module(**batch)
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    """Until an accelerator has done what it was given to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
