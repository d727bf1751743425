"""What training costs: the share of parameters trained, throughput, time and memory."""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.exceptions import MisconfigurationException  # type: ignore[attr-defined]

from lightning_ft.callbacks.finetuning import count_parameters

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux


class Efficiency(Callback):
    """Logs, after each epoch, what it cost; drops into any project.

    Logged: ``cost/trained_share`` (of all parameters), ``cost/samples_per_second`` (training alone, without
    validation) and ``cost/peak_memory_mib`` (of the GPU's allocator, or of the process on a CPU).

    Attributes:
        parameters, trained: how many the model had in ``fit``, and how many of them trained at most: methods unfreeze
            some on the way (gradual unfreezing), or take some out at the end (AdaLoRA).
        seconds: how long ``fit`` took, all in all.
        peak_memory_mib: the highest figure so far.
    """

    def __init__(self) -> None:
        self.parameters = self.trained = 0
        self.seconds = 0.0
        self.peak_memory_mib = 0.0
        self._started = self._epoch_started = self._validation_started = 0.0
        self._paused = 0.0
        self._samples = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, and count what trains."""
        self._started = time.perf_counter()
        self.parameters, self.trained = count_parameters(pl_module)
        self.peak_memory_mib = 0.0
        reset_peak_memory(trainer.strategy.root_device)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A fit that resumes within an epoch starts none: it counts from here."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start an epoch's count."""
        self._epoch_started, self._paused, self._samples = time.perf_counter(), 0.0, 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the samples."""
        self._samples += _samples_in(batch)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pause the epoch's clock."""
        self._validation_started = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let it go on."""
        self._paused += time.perf_counter() - self._validation_started

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the epoch's figures."""
        total, trained = count_parameters(pl_module)
        self.trained = max(self.trained, trained)
        seconds = time.perf_counter() - self._epoch_started - self._paused
        self._see_memory(trainer)
        pl_module.log_dict(
            {
                "cost/trained_share": trained / total,
                "cost/samples_per_second": self._samples * trainer.world_size / seconds,
                "cost/peak_memory_mib": self.peak_memory_mib,
            },
            sync_dist=True,
            reduce_fx="max",  # over processes
        )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock. The module has left the device that it trained on by now."""
        self.seconds = time.perf_counter() - self._started
        self._see_memory(trainer)

    def _see_memory(self, trainer: Trainer) -> None:
        # Linux counts approximately: what it says of the peak may fall by a few pages.
        self.peak_memory_mib = max(self.peak_memory_mib, peak_memory_mib(trainer.strategy.root_device))


def _samples_in(batch: Any) -> float:
    """The number of samples, or NaN for a batch of a kind that Lightning can't tell it of."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where tensors differ in size, the first one's is taken
            return extract_batch_size(batch)
    except MisconfigurationException:
        return float("nan")


def reset_peak_memory(device: torch.device) -> None:
    """Count the peak from here on; on a CPU that is Linux's to grant, elsewhere the process's peak counts whole."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            _CLEAR_REFS.write_text("5")


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory in MiB: what the allocator of a CUDA device held, else the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if _STATUS.is_file():
        peak = next((line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:")), None)
        if peak is not None:
            return int(peak.split()[1]) / 2**10
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak_rss / (2**20 if sys.platform == "darwin" else 2**10)
