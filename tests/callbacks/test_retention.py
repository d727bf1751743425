"""Retention: 1 while nothing changed, the naive figures afterwards, and no trace in the training."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import tiny
import torch
from foreign import CNN, BertInInit, make, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForSequenceClassification

from lightning_ft import Averaging, BestCheckpoint, HeadOnly, LoRA, Retention
from lightning_ft.general import agreement, embeddings, encode, neighbours, perplexity, read_texts
from lightning_ft.injection import InjectionError

TEXTS = read_texts("bundled:general_en")[::8]


class Encoder(L.LightningModule):
    """A user's module over the tiny BERT; nothing in it is ours."""

    def __init__(self, name: str, lr: float = 1e-2) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2, hidden_dropout_prob=0.0)
        self.model.train()
        self.lr = lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.model(input_ids=batch[0], labels=batch[1]).loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test/loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(5, 60, (16, 7), generator=generator)
        return DataLoader(TensorDataset(tokens, torch.arange(16) % 2), batch_size=4)

    val_dataloader = test_dataloader = train_dataloader


class LM(Encoder):
    """The same over a language model."""

    def __init__(self) -> None:
        L.LightningModule.__init__(self)
        self.model, self.lr = tiny.llama_lm(vocab_size=100).train(), 1e-2

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.model(input_ids=batch[0], labels=batch[0]).loss


def values(retention: Retention, name: str) -> list[float]:
    return [row[name] for row in retention.history]


def test_it_is_one_where_the_base_does_not_change(tiny_bert_dir: str) -> None:
    retention = Retention(texts=TEXTS)
    trainer(HeadOnly(), retention, max_epochs=3).fit(Encoder(tiny_bert_dir))
    assert values(retention, "neighbours") == [1.0] * 4
    assert values(retention, "step") == [0, 4, 8, 12]


@pytest.mark.parametrize("methods", [[], [LoRA(r=2)]], ids=["full", "lora"])
def test_it_is_the_share_of_neighbours_that_stayed(tiny_bert_dir: str, methods: list[Any]) -> None:
    module, retention = Encoder(tiny_bert_dir), Retention(texts=TEXTS, k=5)
    rows = encode(TEXTS, module.model, None, 128)
    before = neighbours(embeddings(module.model, rows), 5)
    fit = trainer(*methods, retention, max_epochs=2)
    fit.fit(module)
    after = agreement(before, neighbours(embeddings(module.model, rows), 5))
    assert values(retention, "neighbours")[-1] == after < 1
    assert float(fit.callback_metrics["retention/neighbours"]) == pytest.approx(after)
    assert set(retention.history[-1]) == {"step", "epoch", "neighbours", "val/loss"}


def test_of_a_language_model_it_is_the_perplexity(tiny_bert_dir: str) -> None:
    module, retention = LM(), Retention(texts=TEXTS, tokenizer=tiny_bert_dir)
    rows = encode(TEXTS, module.model, tiny_bert_dir, 128)
    before = perplexity(module.model, rows)
    trainer(retention, max_epochs=2).fit(module)
    assert values(retention, "perplexity")[0] == before
    assert values(retention, "perplexity")[-1] == perplexity(module.model, rows) != before


def test_the_loggers_get_it_by_the_step_as_a_table_and_as_a_picture(tiny_bert_dir: str, tmp_path: Path) -> None:
    logger, retention = CSVLogger(tmp_path), Retention(texts=TEXTS)
    fit = trainer(retention, logger=logger, log_every_n_steps=1)
    fit.fit(Encoder(tiny_bert_dir))
    [scores] = fit.test(fit.lightning_module, verbose=False)
    assert scores["test/retention/neighbours"] == pytest.approx(values(retention, "neighbours")[-1])
    folder = Path(logger.log_dir)
    assert (folder / "retention.png").stat().st_size > 1000
    with (folder / "retention.csv").open(newline="") as file:
        assert [float(row["neighbours"]) for row in csv.DictReader(file)] == values(retention, "neighbours")
    with (folder / "metrics.csv").open(newline="") as file:
        found = [
            (int(row["step"]), float(row["retention/neighbours"]))
            for row in csv.DictReader(file)
            if row["retention/neighbours"]
        ]
    assert [value for _, value in found] == pytest.approx(values(retention, "neighbours"))
    assert found[0] == (0, 1.0)


def test_training_is_the_same_with_it(tiny_bert_dir: str) -> None:
    states = []
    for callbacks in ([], [Retention(texts=TEXTS)]):
        module = Encoder(tiny_bert_dir)  # attention drops, by the one stream of random numbers
        torch.manual_seed(2)
        trainer(*callbacks).fit(module)
        states.append(module.state_dict())
        assert all(layer.training for layer in module.modules())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_resumed_fit_compares_with_the_base_and_not_with_what_it_resumes(tiny_bert_dir: str, tmp_path: Path) -> None:
    whole = Retention(texts=TEXTS)
    trainer(whole, max_epochs=3).fit(quiet(Encoder(tiny_bert_dir)))
    first, second = Retention(texts=TEXTS), Retention(texts=TEXTS)
    saving = ModelCheckpoint(tmp_path, filename="x")
    trainer(first, saving, max_epochs=2, enable_checkpointing=True).fit(quiet(Encoder(tiny_bert_dir)))
    again = trainer(second, ModelCheckpoint(tmp_path, filename="y"), max_epochs=3, enable_checkpointing=True)
    again.fit(quiet(Encoder(tiny_bert_dir)), ckpt_path=tmp_path / "x.ckpt")
    assert values(second, "neighbours") == values(whole, "neighbours")
    assert values(second, "step") == [0, 4, 8, 12]


def quiet(module: Encoder) -> Encoder:
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return module


def test_without_validation_it_is_measured_at_the_end_of_epochs_every_nth(tiny_bert_dir: str) -> None:
    retention = Retention(texts=TEXTS, every_n_epochs=2)
    trainer(retention, max_epochs=5, limit_val_batches=0).fit(Encoder(tiny_bert_dir))
    assert values(retention, "epoch") == [0, 1, 3]


@pytest.mark.parametrize("averaged_first", [True, False])
def test_it_looks_at_the_weights_that_are_validated(tiny_bert_dir: str, averaged_first: bool) -> None:
    """Those of an average that never moves are the base's, whichever callback comes first."""
    retention, averaging = Retention(texts=TEXTS), Averaging(start=100)
    both = [averaging, retention] if averaged_first else [retention, averaging]
    trainer(*both).fit(Encoder(tiny_bert_dir))
    assert values(retention, "neighbours") == [1.0, 1.0, 1.0]


def test_a_probe_of_ones_own_goes_with_any_module() -> None:
    modes = []

    def probe(module: Any) -> dict[str, float]:
        modes.append(module.training or torch.is_grad_enabled())
        return {"mine": module.body[0].weight.square().sum()}

    retention = Retention(probe)
    fit = trainer(retention)
    fit.fit(make(CNN))
    assert len(values(retention, "mine")) == 3
    assert not any(modes)
    assert "retention/mine" in fit.callback_metrics


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(InjectionError, match="backbone"):
        trainer(Retention()).fit(make(CNN))
    with pytest.raises(ValueError, match="k=10"):
        trainer(Retention(texts=TEXTS[:5])).fit(make(BertInInit))
    with pytest.raises(ValueError, match="every_n_epochs"):
        Retention(every_n_epochs=0)


# ------------------------------------------------------------------------------- the best weights back


class Backwards(Encoder):
    """The longer it trains, the worse it validates."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.training_step([batch[0], 1 - batch[1]], batch_idx))


@pytest.mark.parametrize("methods", [[], [LoRA(r=2)]], ids=["full", "lora"])
def test_the_best_weights_are_restored_if_asked(tiny_bert_dir: str, tmp_path: Path, methods: list[Any]) -> None:
    for restore in (False, True):
        module = quiet(Backwards(tiny_bert_dir))
        keep = BestCheckpoint(dirpath=tmp_path / str(restore), monitor="val/loss", restore=restore)
        fit = trainer(*methods, keep, enable_checkpointing=True, max_epochs=3)
        fit.fit(module)
        [scores] = trainer().validate(module, verbose=False)
        assert keep.best_model_score is not None
        last = float(fit.callback_metrics["val/loss"])
        best = float(keep.best_model_score)
        assert best < last
        assert scores["val/loss"] == pytest.approx(best if restore else last, rel=1e-5)
