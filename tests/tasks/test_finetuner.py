"""FineTuner: a short fit, what it logs, and what it gives back."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ft.optim import cosine, linear
from lightning_ft.tasks.classification import Classification
from lightning_ft.tasks.finetuner import FineTuner

NAMES = ["bad", "fair", "good"]
Batch = dict[str, Tensor]


def make_rows(count: int = 14) -> list[Batch]:
    """Rows of six tokens, the last two of them padding in every third row."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(5, 60, (count, 6), generator=generator)
    mask = torch.ones_like(tokens)
    mask[::3, 4:] = 0
    labels = torch.arange(count) % len(NAMES)
    return [
        {"input_ids": ids, "attention_mask": ones, "labels": label}
        for ids, ones, label in zip(tokens, mask, labels, strict=True)
    ]


def loader(batch_size: int = 4) -> DataLoader[Any]:
    """Batches of uneven size: the last one is short."""
    return DataLoader(make_rows(), batch_size=batch_size)


def make_trainer(**options: Any) -> L.Trainer:
    defaults: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    return L.Trainer(**{**defaults, "max_epochs": 2, **options}, enable_progress_bar=False, enable_model_summary=False)


@pytest.fixture
def module(tiny_bert_dir: str) -> FineTuner:
    return FineTuner(tiny_bert_dir, Classification(NAMES), partial(torch.optim.AdamW, lr=5e-3))


@torch.no_grad()
def all_logits(module: FineTuner) -> tuple[Tensor, Tensor]:
    """Of every row, by the Hugging Face model alone."""
    module.model.eval()
    logits = [module.model(**{k: v[None] for k, v in row.items() if k != "labels"}).logits[0] for row in make_rows()]
    return torch.stack(logits), torch.stack([row["labels"] for row in make_rows()])


def loss_of(module: FineTuner) -> float:
    return float(F.cross_entropy(*all_logits(module)))


# ---------------------------------------------------------------------- a fit


def test_short_fit_lowers_the_loss(module: FineTuner) -> None:
    before = loss_of(module)
    module.model.train()
    make_trainer(max_epochs=8).fit(module, loader())
    assert loss_of(module) < 0.5 * before


class Modes(L.Callback):
    """Whether dropout drops, at each step."""

    def __init__(self) -> None:
        self.training: list[bool] = []
        self.validating: list[bool] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.training.append(all(m.training for m in pl_module.modules()))

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.validating.append(any(m.training for m in pl_module.modules()))


@pytest.mark.parametrize("given", ["path", "model"])
def test_model_is_in_train_mode_from_the_start_and_in_every_step(tiny_bert_dir: str, given: str) -> None:
    task = Classification(NAMES)
    model = task.build(tiny_bert_dir)
    assert not model.training  # as from_pretrained leaves it
    module = FineTuner(tiny_bert_dir if given == "path" else model, task)
    assert all(m.training for m in module.modules())
    modes = Modes()
    make_trainer(callbacks=[modes]).fit(module, loader(), loader())
    assert modes.training
    assert all(modes.training)
    assert not any(modes.validating)


def test_training_logs_the_loss_and_validation_the_scores(module: FineTuner) -> None:
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, loader(), loader())
    assert set(trainer.callback_metrics) == {"train/loss", "val/loss", "val/accuracy", "val/f1"}


@pytest.mark.parametrize("stage", ["val", "test"])
def test_logged_values_are_those_of_all_rows(module: FineTuner, stage: str) -> None:
    trainer = make_trainer()
    run = trainer.validate if stage == "val" else trainer.test
    [scores] = run(module, loader(), verbose=False)
    logits, labels = all_logits(module)
    predicted = logits.argmax(dim=-1)
    assert scores == {
        f"{stage}/loss": pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5),
        f"{stage}/accuracy": pytest.approx(accuracy_score(labels, predicted)),
        f"{stage}/f1": pytest.approx(f1_score(labels, predicted, average="macro")),
    }


def test_each_evaluation_counts_anew(module: FineTuner) -> None:
    logits, labels = all_logits(module)
    wrong = [row for row, right in zip(make_rows(), logits.argmax(dim=-1) == labels, strict=True) if not right]
    assert 0 < len(wrong) < len(labels)
    trainer = make_trainer()
    trainer.validate(module, loader(), verbose=False)
    [scores] = trainer.validate(module, DataLoader(wrong, batch_size=4), verbose=False)
    assert scores["val/accuracy"] == 0.0


def test_test_leaves_the_table_and_the_picture_with_the_logger(module: FineTuner, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    make_trainer(logger=logger).test(module, loader(), verbose=False)
    folder = Path(logger.log_dir)
    assert (folder / "test_confusion_matrix.png").stat().st_size > 1000
    with (folder / "test_per_class.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    logits, labels = all_logits(module)
    counts = confusion_matrix(labels, logits.argmax(dim=-1), labels=range(3))
    assert [row["label"] for row in rows] == NAMES
    assert [int(row["examples"]) for row in rows] == counts.sum(axis=1).tolist()
    recall = [counts[i, i] / counts[i].sum() for i in range(3)]
    assert [float(row["recall"]) for row in rows] == pytest.approx(recall, abs=5e-5)


# ---------------------------------------------------------------------- predictions


@pytest.mark.parametrize("labelled", [True, False])
def test_predictions_are_probabilities_in_the_rows_order(module: FineTuner, labelled: bool) -> None:
    rows = [{k: v for k, v in row.items() if labelled or k != "labels"} for row in make_rows()]
    batches = make_trainer().predict(module, DataLoader(rows, batch_size=4))
    assert batches is not None
    predictions = [prediction for batch in batches for prediction in batch]
    logits, _ = all_logits(module)
    assert len(predictions) == len(logits)
    for prediction, row in zip(predictions, logits.softmax(dim=-1), strict=True):
        assert sum(prediction["probabilities"].values()) == pytest.approx(1.0)
        assert list(prediction["probabilities"]) == NAMES
        assert list(prediction["probabilities"].values()) == pytest.approx(row.tolist(), abs=1e-5)
        assert prediction["label"] == NAMES[int(row.argmax())]


# ---------------------------------------------------------------------- optimizer and schedule


class Rates(L.Callback):
    """The rates with which each step of the optimizer is taken."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.rates.append([group["lr"] for group in optimizer.param_groups])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_schedule_rises_to_the_rate_and_ends_at_zero(tiny_bert_dir: str, accumulate: int) -> None:
    module = FineTuner(
        tiny_bert_dir, Classification(NAMES), partial(torch.optim.AdamW, lr=1e-3), partial(cosine, warmup=0.25)
    )
    rates = Rates()
    trainer = make_trainer(max_epochs=4, accumulate_grad_batches=accumulate, callbacks=[rates])
    trainer.fit(module, loader())
    assert len(rates.rates) == trainer.global_step == {1: 16, 3: 8}[accumulate]
    assert rates.rates[0] == pytest.approx([0.0, 0.0])
    assert max(rates.rates) == pytest.approx([1e-3, 1e-3])
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == pytest.approx([0.0, 0.0], abs=1e-9)


def test_without_a_schedule_the_rate_stays(module: FineTuner) -> None:
    rates = Rates()
    make_trainer(callbacks=[rates]).fit(module, loader())
    assert rates.rates == [[5e-3, 5e-3]] * 8


def test_schedule_without_an_end_is_refused(tiny_bert_dir: str) -> None:
    module = FineTuner(tiny_bert_dir, Classification(NAMES), scheduler=linear)
    with pytest.raises(ValueError, match=r"max_steps.*max_epochs"):
        make_trainer(max_epochs=-1).fit(module, loader())


def test_optimizer_takes_only_what_trains(module: FineTuner) -> None:
    module.model.base_model.requires_grad_(False)
    before = {name: p.clone() for name, p in module.named_parameters()}
    trainer = make_trainer()
    trainer.fit(module, loader())
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.model.classifier.parameters()}
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name]) == (not parameter.requires_grad), name
