"""Efficiency: its figures against counts and a clock of the test's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BatchEncoding

from lightning_ft import AdaLoRA
from lightning_ft.callbacks import efficiency
from lightning_ft.callbacks.efficiency import Efficiency
from lightning_ft.callbacks.finetuning import count_parameters

TRAIN_SECONDS, VALIDATION_SECONDS = 2.0, 50.0


class Clock:
    """Stands still unless moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(efficiency, "time", clock)
    return clock


class Module(L.LightningModule):
    """A half-frozen module whose steps take the clock's time."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.frozen = nn.Linear(7, 5).requires_grad_(False)
        self.head = nn.Linear(5, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.clock.now += TRAIN_SECONDS
        return self.head(self.frozen(torch.ones(2, 7, device=self.device))).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.clock.now += VALIDATION_SECONDS

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.head.parameters(), lr=0.1)


class Keep(L.Callback):
    """The figures of each epoch."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.epochs.append({k: float(v) for k, v in trainer.logged_metrics.items()})


def fit(
    clock: Clock,
    rows: int = 10,
    collate: Callable[[list[Any]], Any] | None = None,
    ckpt_path: Path | None = None,
    callbacks: Sequence[L.Callback] = (),
    **options: Any,
) -> tuple[Efficiency, list[dict[str, float]]]:
    callback, keep = Efficiency(), Keep()
    trainer = L.Trainer(
        **{"max_epochs": 2, "enable_checkpointing": False, "accelerator": "cpu", **options},
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback, keep, *callbacks],
    )
    loader = DataLoader(torch.zeros(rows, 7), batch_size=4, collate_fn=collate)
    trainer.fit(Module(clock), loader, loader, ckpt_path=ckpt_path)
    return callback, keep.epochs


def test_three_figures_are_logged_each_epoch(clock: Clock) -> None:
    _, epochs = fit(clock)
    assert len(epochs) == 2
    for logged in epochs:
        assert set(logged) == {"cost/trained_share", "cost/samples_per_second", "cost/peak_memory_mib"}


def test_share_is_what_trains_of_all(clock: Clock) -> None:
    _, epochs = fit(clock)
    frozen, trained = 7 * 5 + 5, 5 * 3 + 3
    assert epochs[-1]["cost/trained_share"] == pytest.approx(trained / (frozen + trained))


def test_what_a_method_unfreezes_on_the_way_or_takes_out_at_the_end_trained_too(clock: Clock) -> None:
    class Unfreeze(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            pl_module.frozen.requires_grad_(trainer.current_epoch == 1)

    callback, _ = fit(clock, callbacks=[Unfreeze()], max_epochs=3)
    assert (callback.trained, callback.parameters) == (58, 58)

    found: list[L.LightningModule] = []
    keep = L.Callback()
    keep.on_fit_end = lambda trainer, module: found.append(module)  # type: ignore[method-assign]
    method = AdaLoRA(4, 2, backbone="frozen", target_modules="frozen")
    callback, _ = fit(clock, callbacks=[method, keep])
    added, head, base = 4 * (7 + 5 + 1), 5 * 3 + 3, 7 * 5 + 5
    assert (callback.trained, callback.parameters) == (added + head, added + head + base)
    assert count_parameters(found[0])[1] == added // 2 + head


@pytest.mark.parametrize(("rows", "options"), [(4, {}), (10, {"val_check_interval": 1})], ids=str)
def test_throughput_is_samples_over_the_time_of_training_alone(
    clock: Clock, rows: int, options: dict[str, Any]
) -> None:
    _, epochs = fit(clock, rows, **options)
    steps = -(-rows // 4)
    assert [logged["cost/samples_per_second"] for logged in epochs] == [
        pytest.approx(rows / (steps * TRAIN_SECONDS))
    ] * 2


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_fit_that_resumes_within_an_epoch_counts_what_is_left_of_it(clock: Clock, tmp_path: Path) -> None:
    """Lightning then calls no on_train_epoch_start."""
    saving: Any = {
        "callbacks": [ModelCheckpoint(tmp_path, filename="x", every_n_train_steps=1)],
        "enable_checkpointing": True,
    }
    fit(clock, 8, max_steps=1, **saving)
    _, epochs = fit(clock, 8, max_steps=2, ckpt_path=tmp_path / "x.ckpt", **saving)
    assert epochs[0]["cost/samples_per_second"] == pytest.approx(4 / TRAIN_SECONDS)


def test_seconds_are_those_of_the_whole_fit(clock: Clock) -> None:
    callback, _ = fit(clock, rows=10, num_sanity_val_steps=0)
    assert callback.seconds == pytest.approx(2 * 3 * (TRAIN_SECONDS + VALIDATION_SECONDS))


def test_memory_is_what_the_process_held_at_most(clock: Clock) -> None:
    resource = pytest.importorskip("resource")
    callback, epochs = fit(clock)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 2**20 if efficiency.sys.platform == "darwin" else 2**10
    assert epochs[0]["cost/peak_memory_mib"] == pytest.approx(peak / unit, rel=0.2)
    assert epochs[-1]["cost/peak_memory_mib"] <= callback.peak_memory_mib * 1.0001 <= peak / unit * 1.001


def test_memory_is_of_the_device_that_trained_though_the_module_has_left_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it has in on_fit_end, where the Trainer has moved it to the CPU."""
    asked: list[torch.device] = []
    monkeypatch.setattr(efficiency, "peak_memory_mib", lambda device: asked.append(device) or 1.0)
    run: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda", 0)))
    Efficiency().on_fit_end(run, Module(Clock()))
    assert asked == [torch.device("cuda", 0)]


@pytest.mark.gpu
def test_memory_of_a_fit_on_a_gpu_is_the_gpus(clock: Clock) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    callback, _ = fit(clock, accelerator="gpu", devices=1)
    assert 0 < callback.peak_memory_mib == torch.cuda.max_memory_allocated() / 2**20


@pytest.mark.gpu
def test_memory_of_a_gpu_is_its_allocators() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda")
    torch.cuda.reset_peak_memory_stats()
    before = efficiency.peak_memory_mib(device)
    held = torch.zeros(2**18, device=device)
    del held
    assert efficiency.peak_memory_mib(device) == pytest.approx(before + 1, abs=0.1)


BATCHES: dict[str, Callable[[list[Any]], Any]] = {
    "tensor": torch.stack,
    "pair": lambda rows: (torch.stack(rows), torch.zeros(len(rows))),
    "mapping": lambda rows: {"input_ids": torch.stack(rows), "labels": torch.zeros(len(rows))},
    "tokenizer's": lambda rows: BatchEncoding({"input_ids": torch.stack(rows), "labels": torch.zeros(len(rows))}),
    "nested": lambda rows: {"inputs": {"x": torch.stack(rows)}, "y": torch.zeros(len(rows))},
}


def test_samples_are_counted_in_any_batch(clock: Clock) -> None:
    for collate in BATCHES.values():
        _, epochs = fit(clock, rows=10, collate=collate)
        assert epochs[0]["cost/samples_per_second"] == pytest.approx(10 / (3 * TRAIN_SECONDS))


def test_batch_of_an_unknown_kind_does_not_stop_the_training(clock: Clock) -> None:
    _, epochs = fit(clock, collate=lambda rows: SimpleNamespace(x=torch.stack(rows)))
    assert epochs[0]["cost/trained_share"] > 0
