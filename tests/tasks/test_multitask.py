"""MultiTask: what several models with a head each would say and learn, with one trunk that runs once."""

from __future__ import annotations

import copy
import math
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ft import L2, HeadOnly, LoRA, load_adapter, save_adapter
from lightning_ft.data.mixing import MixedBatches, MultiTaskDataModule
from lightning_ft.data.module import TextDataModule
from lightning_ft.data.sources import DataError
from lightning_ft.data.targets import Classes, Several
from lightning_ft.tasks.classification import Classification
from lightning_ft.tasks.finetuner import FineTuner
from lightning_ft.tasks.multitask import DynamicWeightAverage, Fixed, MissingTaskError, MultiTask, Uncertainty
from lightning_ft.tasks.task import Task

MOOD, SIZE = ["bad", "fair", "good"], ["large", "small"]


def make_task(**options: Any) -> MultiTask:
    return MultiTask({"mood": Classification(MOOD), "size": Classification(SIZE)}, **options)


def make_module(model: str, task: Task | None = None, **options: Any) -> FineTuner:
    torch.manual_seed(3)
    return FineTuner(model, task or make_task(), partial(torch.optim.AdamW, lr=5e-3), **options)


def make_batch(rows: int = 6) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(5, 60, (rows, 7), generator=generator)
    labels = {"mood": torch.arange(rows) % 3, "size": torch.arange(rows) % 2}
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


def apart(module: FineTuner) -> dict[str, Any]:
    """For each task a Hugging Face model of its own, with the weights that it shares with the others."""
    models = {}
    for name, kinds in (("mood", MOOD), ("size", SIZE)):
        model: Any = Classification(kinds).build(module.model.config._name_or_path)
        model.base_model.load_state_dict(module.model.state_dict())
        assert isinstance(module.task, MultiTask)
        model.classifier.load_state_dict(module.task.heads[name].classifier.state_dict())
        models[name] = model.train()
    return models


def without_dropout(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0


def test_outputs_and_gradients_are_those_of_a_model_for_each_task(tiny_bert_dir: str) -> None:
    module, batch = make_module(tiny_bert_dir, make_task(weighting=Fixed({"mood": 0.3}))), make_batch()
    models = apart(module)
    for each in (module, *models.values()):
        without_dropout(each)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    outputs = module(**inputs)
    module.task.loss(outputs, batch["labels"]).backward()
    total = torch.zeros(())
    for weight, (name, model) in zip((0.3, 1.0), models.items(), strict=True):
        logits = model(**inputs).logits
        assert torch.equal(outputs[name], logits)
        total = total + weight * nn.functional.cross_entropy(logits, batch["labels"][name])
    total.backward()
    for key, parameter in module.model.named_parameters():
        gradients = [dict(model.base_model.named_parameters())[key].grad for model in models.values()]
        expected = sum(g for g in gradients if g is not None)
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)
    for name, model in models.items():
        torch.testing.assert_close(module.task.heads[name].classifier.weight.grad, model.classifier.weight.grad)


def test_the_trunk_runs_once_and_its_outputs_are_not_kept(tiny_bert_dir: str) -> None:
    module, batch, runs = make_module(tiny_bert_dir), make_batch(), []
    module.model.register_forward_hook(lambda *_: runs.append(1))
    module.task.loss(module(**inputs_of(batch)), batch["labels"]).backward()
    with torch.no_grad():
        module.predict_step(batch, 0)
    assert len(runs) == 2
    assert copy.deepcopy(module.task) is not module.task, "a graph would not be copied"


@torch.no_grad()
def test_predictions_are_each_tasks_own(tiny_bert_dir: str) -> None:
    module, batch = make_module(tiny_bert_dir).eval(), make_batch()
    models = apart(module)
    rows = module.predict_step(batch, 0)
    for name, kinds in (("mood", MOOD), ("size", SIZE)):
        own = Classification(kinds).predict(models[name].eval(), batch)
        assert [row[name]["label"] for row in rows] == [row["label"] for row in own]


# ------------------------------------------------------------------------------------------ weightings


def losses(**values: float) -> dict[str, Tensor]:
    return {name: torch.tensor(value, requires_grad=True) for name, value in values.items()}


def test_uncertainty_is_kendalls_sum() -> None:
    class Squared(Classification):
        likelihood_factor = 0.5

    weighting = Uncertainty()
    weighting.prepare({"a": Classification(MOOD), "b": Squared(SIZE)})
    with torch.no_grad():
        weighting.log_variances["a"].fill_(0.7)
        weighting.log_variances["b"].fill_(-0.4)
    sigma = {"a": math.exp(0.35), "b": math.exp(-0.2)}
    expected = 2.0 / sigma["a"] ** 2 + math.log(sigma["a"]) + 3.0 / (2 * sigma["b"] ** 2) + math.log(sigma["b"])
    assert weighting(losses(a=2.0, b=3.0)).item() == pytest.approx(expected)
    assert weighting(losses(b=3.0)).item() == pytest.approx(3.0 / (2 * sigma["b"] ** 2) + math.log(sigma["b"]))


def test_uncertainties_train_beside_an_adapter(tiny_bert_dir: str) -> None:
    task = make_task(weighting=Uncertainty())
    module = make_module(tiny_bert_dir, task)
    fit(module, [make_batch()] * 4, callbacks=[LoRA(r=2)])
    assert isinstance(task.weighting, Uncertainty)
    assert all(s.item() != 0 for s in task.weighting.log_variances.values())


def test_dynamic_weights_are_the_papers() -> None:
    weighting = DynamicWeightAverage(temperature=2.0)
    weighting.prepare({"a": Classification(MOOD), "b": Classification(SIZE)})
    assert weighting.weights == {"a": 1.0, "b": 1.0}
    weighting.end_epoch({"a": 2.0, "b": 4.0})
    assert weighting.weights == {"a": 1.0, "b": 1.0}
    weighting.end_epoch({"a": 1.0, "b": 3.8})
    raised = {"a": math.exp(1.0 / 2.0 / 2.0), "b": math.exp(3.8 / 4.0 / 2.0)}
    expected = {name: 2 * value / sum(raised.values()) for name, value in raised.items()}
    assert weighting.weights == pytest.approx(expected)
    assert weighting(losses(a=1.0, b=2.0)).item() == pytest.approx(expected["a"] + 2 * expected["b"])
    again = DynamicWeightAverage()
    again.prepare({"a": Classification(MOOD), "b": Classification(SIZE)})
    again.load_state_dict(weighting.state_dict())
    assert again.weights == weighting.weights


def test_dynamic_weights_hear_the_mean_loss_of_each_epoch(tiny_bert_dir: str) -> None:
    weighting = DynamicWeightAverage()
    module = make_module(tiny_bert_dir, make_task(weighting=weighting))
    without_dropout(module)
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.ndim == 1)  # little changes
    with torch.no_grad():
        first = nn.functional.cross_entropy(module(**inputs_of(make_batch()))["mood"], make_batch()["labels"]["mood"])
    fit(module, [make_batch()], max_epochs=1)
    assert float(weighting.history[0, 0]) == pytest.approx(float(first), rel=1e-4)


def inputs_of(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in batch.items() if key != "labels"}


def fit(module: FineTuner, batches: list[Any], val: list[Any] | None = None, **options: Any) -> L.Trainer:
    quiet: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    bars = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(**{**quiet, **bars, "max_epochs": 1, **options})
    trainer.fit(module, DataLoader(batches, batch_size=None), val and DataLoader(val, batch_size=None))  # type: ignore[arg-type]
    return trainer


def test_settings_that_make_no_sense_are_refused() -> None:
    for wrong in ({"mood": -1.0}, {"moood": 1.0}):
        with pytest.raises(ValueError, match="mood, size"):
            make_task(weighting=Fixed(wrong))
    with pytest.raises(ValueError, match="two tasks"):
        MultiTask({"mood": Classification(MOOD)})
    with pytest.raises(ValueError, match="temperature"):
        DynamicWeightAverage(0)


# ----------------------------------------------------------------------------------- epochs and scores


def test_an_epoch_that_is_cut_short_need_not_have_all_tasks(tiny_bert_dir: str) -> None:
    whole = make_batch()
    lacking = {**whole, "labels": {"mood": whole["labels"]["mood"]}}
    trainer = fit(make_module(tiny_bert_dir), [lacking, whole], max_steps=1, max_epochs=-1)
    assert trainer.global_step == 1


def test_penalties_reach_the_heads(tiny_bert_dir: str) -> None:
    module = make_module(tiny_bert_dir, penalties=[L2(1.0)])
    before = sum(float(p.detach().square().sum()) for p in module.task.parameters())
    fit(module, [make_batch()] * 9, callbacks=[HeadOnly()])
    assert sum(float(p.detach().square().sum()) for p in module.task.parameters()) < before


@pytest.mark.parametrize("stage", ["train", "val"])
def test_a_task_without_data_in_an_epoch_is_an_error(tiny_bert_dir: str, stage: str) -> None:
    whole = make_batch()
    lacking = {**whole, "labels": {"mood": whole["labels"]["mood"]}}
    batches = {"train": [whole], "val": [whole], stage: [lacking]}
    with pytest.raises(MissingTaskError, match=f"{stage} data of an epoch had no row for size"):
        fit(make_module(tiny_bert_dir), batches["train"], batches["val"])


def test_scores_are_each_tasks_behind_its_name(tiny_bert_dir: str) -> None:
    trainer = fit(make_module(tiny_bert_dir), [make_batch()], [make_batch()])
    expected = {f"val/{task}/{score}" for task in ("mood", "size") for score in ("accuracy", "f1")}
    assert set(trainer.callback_metrics) == {"train/loss", "val/loss", *expected}


def test_an_adapter_with_several_heads_is_saved_and_loaded(tiny_bert_dir: str, tmp_path: Path) -> None:
    module = make_module(tiny_bert_dir)
    fit(module, [make_batch()] * 3, callbacks=[LoRA(r=2)])
    save_adapter(module, tmp_path / "adapter")
    torch.manual_seed(9)
    fresh = FineTuner(tiny_bert_dir, make_task())
    load_adapter(fresh, tmp_path / "adapter")
    with torch.no_grad():
        said, again = (each.eval()(**inputs_of(make_batch())) for each in (module, fresh))
    assert all(torch.equal(said[name], again[name]) for name in said)


# ----------------------------------------------------------------------------------------------- data


def write(path: Path, rows: int, **columns: list[str]) -> Path:
    texts = [f"the battery is {'very ' * (i % 5)}good" for i in range(rows)]
    cells = [[values[i % len(values)] for i in range(rows)] for values in columns.values()]
    lines = [",".join(row) for row in [("text", *columns), *zip(texts, *cells, strict=True)]]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_several_labels_of_each_text_reach_the_batch(tiny_bert_dir: str, tmp_path: Path) -> None:
    file = write(tmp_path / "both.csv", 60, mood=MOOD, big=SIZE)
    target = Several({"mood": Classes(), "size": Classes()})
    data = TextDataModule(file, tiny_bert_dir, label={"mood": "mood", "size": "big"}, target=target, batch_size=8)
    assert data.facts["tasks"]["mood"]["labels"] == MOOD
    seen = [tuple(map(int, row)) for b in data.train_dataloader() for row in zip(*b["labels"].values(), strict=True)]
    train = Counter((row["mood"], row["size"]) for row in data.splits["train"]["labels"])
    assert Counter(seen) == train
    assert next(iter(data.texts_dataloader(["good"]))).keys() >= {"input_ids", "attention_mask"}
    with pytest.raises(DataError, match=r"data\.label must name the column of each task, \{mood: COLUMN, size"):
        TextDataModule(file, tiny_bert_dir, label="mood", target=target).setup("fit")


def test_batches_of_several_data_sets_are_of_one_each_and_every_row_is_seen(tiny_bert_dir: str, tmp_path: Path) -> None:
    sources = {
        "mood": TextDataModule(write(tmp_path / "a.csv", 60, label=MOOD), tiny_bert_dir, batch_size=8),
        "size": TextDataModule(write(tmp_path / "b.csv", 30, label=SIZE), tiny_bert_dir, batch_size=8),
    }
    data = MultiTaskDataModule(sources)
    for loader, split in ((data.train_dataloader(), "train"), (data.test_dataloader(), "test")):
        seen: Counter[str] = Counter()
        for batch in loader:
            ((name, labels),) = batch["labels"].items()
            seen[name] += len(labels)
        assert seen == {name: len(source.splits[split]) for name, source in sources.items()}
    module = make_module(tiny_bert_dir)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", max_epochs=2, enable_model_summary=False, **quiet)
    epochs: list[int] = []
    sampled = MixedBatches.__iter__
    with mock.patch.object(MixedBatches, "__iter__", lambda self: epochs.append(self.epoch) or sampled(self)):
        trainer.fit(module, data)
    assert epochs == [0, 1], "Lightning tells the epoch"
    assert {"val/mood/f1", "val/size/f1"} <= set(trainer.callback_metrics)


@pytest.mark.parametrize(("temperature", "shares"), [(1.0, (90, 10)), (2.0, (75, 25)), (math.inf, (50, 50))])
def test_shares_of_the_data_sets_go_by_the_temperature(temperature: float, shares: tuple[int, int]) -> None:
    sampler = MixedBatches([[3] * 900, [5] * 100], batch_size=10, temperature=temperature)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 100
    counts = Counter(rows[0] >= 900 for rows in batches)
    assert (counts[False], counts[True]) == shares
    assert all(len({row >= 900 for row in rows}) == 1 for rows in batches)
    small = Counter(row for rows in batches for row in rows if row >= 900)
    assert max(small.values()) - min(small.values()) <= 1
    assert list(sampler) == batches, "a resumed run sees the same"
    sampler.set_epoch(1)
    assert list(sampler) != batches
