"""A run from the command line: what it leaves behind, that its figures are true, and that one can come back to it."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from commands import LABELS, call, choices, reviews, succeed, tiny_run, write_csv
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ProgressBar
from omegaconf import OmegaConf
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import lightning_ft
from lightning_ft.apps import build, latency, runs
from lightning_ft.apps.errors import RequestError
from lightning_ft.apps.paths import conf_dir

RANK = 4
SIZES = {"train": 120, "validation": 36, "test": 50}
TEXTS = [
    "the screen is very very very good but awful, and it is not what a battery was",
    "good",
    "hate it",
    "the battery is great",
    "a, b [c] 'd' \\ 很好 [bold]x[/bold] [/red]",
    "awful " * 100,
    "the battery is very bad",
]


@dataclass(frozen=True)
class Trained:
    """A run that was made once for all tests here."""

    home: Path
    folder: Path
    arguments: list[str]
    out: str
    module: Any
    """The module in memory when its adapter was saved."""

    @property
    def results(self) -> dict[str, Any]:
        return json.loads((self.folder / "results.json").read_text())

    def metrics(self, name: str) -> list[float]:
        return column(self.folder, name)


def column(folder: Path, name: str) -> list[float]:
    """The values of a metric in the order of their logging."""
    with (folder / "metrics" / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


@pytest.fixture(scope="module")
def trained(tiny_bert_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    home = tmp_path_factory.mktemp("home")
    (home / "data").mkdir()
    for seed, (split, count) in enumerate(SIZES.items()):
        write_csv(home / "data" / f"{split}.csv", reviews(count, seed))
    arguments = tiny_run(
        tiny_bert_dir, Path("data"), "trainer.max_epochs=6", f"method.r={RANK}", "optimizer.lr=0.01",
        "test_before=true", "samples=[good, hate it]",
    )  # fmt: skip
    seen = []

    def save_adapter(module: nn.Module, directory: Path, *more: Any) -> Path:
        seen.append(module)
        return save(module, directory, *more)

    save = lightning_ft.save_adapter
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lightning_ft, "save_adapter", save_adapter)
        out = succeed(*arguments, "hydra.run.dir=runs/first", cwd=home)
    (module,) = seen
    return Trained(home, home / "runs" / "first", arguments, out, module)


@pytest.fixture
def at_home(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> Trained:
    monkeypatch.chdir(trained.home)
    return trained


@pytest.fixture
def some_csv(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "reviews.csv", reviews(36, seed=5))


# -------------------------------------------------------------------------------------- the run's folder


def test_the_folder_holds_what_its_description_says_and_nothing_else(trained: Trained) -> None:
    files = {str(path.relative_to(trained.folder)) for path in trained.folder.rglob("*") if path.is_file()}
    assert files == {
        "config.yaml", "results.json", "train.log",
        "metrics/metrics.csv", "metrics/hparams.yaml", "metrics/test_confusion_matrix.png",
        "metrics/test_per_class.csv", "checkpoints/best.ckpt", "checkpoints/last.ckpt",
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/README.md",
    }  # fmt: skip
    assert (trained.folder / "metrics" / "test_confusion_matrix.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert all((trained.folder / file).stat().st_size > 0 for file in files)
    assert [path.name for path in (trained.home / "runs").iterdir()] == ["first"]
    assert {path.name for path in trained.home.iterdir()} == {"data", "runs"}


def test_what_adalora_took_out_at_the_end_trained_too(run_of: Callable[[str], Path]) -> None:
    folder = run_of("adalora")
    results = json.loads((folder / "results.json").read_text())
    trained, total = f"{results['trained']:,}", f"{results['parameters']:,}"
    assert f"{trained} of {total} parameters train" in (folder / "train.log").read_text(encoding="utf-8")


def test_the_log_says_what_was_done(trained: Trained) -> None:
    log = (trained.folder / "train.log").read_text(encoding="utf-8")
    assert "data: 120 train, 36 validation, 50 test rows; labels bad, good, mixed" in log
    assert f"{trained.results['trained']:,} of {trained.results['parameters']:,} parameters train" in log


def test_every_metric_is_logged(trained: Trained) -> None:
    epochs, steps = 6, 6 * math.ceil(SIZES["train"] / 16)
    for name in (
        "val/loss",
        "val/accuracy",
        "val/f1",
        "cost/trained_share",
        "cost/samples_per_second",
        "cost/peak_memory_mib",
    ):
        assert len(trained.metrics(name)) == epochs, name
    for name in ("train/loss", "lr-AdamW/all", "lr-AdamW/all_no_decay"):
        assert len(trained.metrics(name)) == steps, name
    for name in ("test/loss", "test/accuracy", "test/f1"):
        assert trained.metrics(name) == [pytest.approx(trained.results["after"][name])]
    assert all(math.isfinite(value) for value in trained.metrics("train/loss"))
    assert trained.metrics("train/loss")[-1] < trained.metrics("train/loss")[0]


def test_the_checkpoint_is_of_the_best_epoch_and_of_what_was_trained(trained: Trained) -> None:
    checkpoint = torch.load(trained.folder / "checkpoints" / "best.ckpt")
    f1 = trained.metrics("val/f1")
    assert checkpoint["epoch"] == f1.index(max(f1))
    assert trained.results["validation"]["val/f1"] == pytest.approx(max(f1))
    state = checkpoint["state_dict"]
    assert set(state) == {name for name, p in trained.module.named_parameters() if p.requires_grad}
    assert sum(tensor.numel() for tensor in state.values()) == trained.results["trained"]
    of_base = {f"model.{key}" for key in bare(trained).base_model.state_dict(prefix="bert.")}
    assert not of_base & set(state)


def test_the_adapter_is_the_best_checkpoints(trained: Trained) -> None:
    state = torch.load(trained.folder / "checkpoints" / "best.ckpt")["state_dict"]
    saved = load_file(trained.folder / "adapter" / "adapter_model.safetensors")
    assert torch.equal(saved["base_model.model.classifier.weight"], state["model.classifier.weight"])
    assert sorted(t.sum().item() for t in saved.values()) == sorted(t.sum().item() for t in state.values())


def trained_facts(trained: Trained) -> dict[str, Any]:
    """What the labels of the training rows say, counted by hand."""
    with (trained.home / "data" / "train.csv").open(encoding="utf-8", newline="") as file:
        labels = [row["label"] for row in csv.DictReader(file)]
    return {"labels": list(LABELS), "label_counts": [labels.count(label) for label in LABELS]}


def test_the_config_is_what_was_composed_with_the_facts_and_nothing_of_this_run(trained: Trained) -> None:
    text = (trained.folder / "config.yaml").read_text(encoding="utf-8")
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        composed: Any = OmegaConf.to_container(compose("train", trained.arguments[1:]))
    composed["task"] |= trained_facts(trained)
    composed["data"]["path"] = str(trained.home / "data")  # so that one can come back from anywhere
    assert yaml.safe_load(text) == composed
    assert OmegaConf.to_container(runs.load_config(trained.folder)) == composed
    assert str(trained.folder) not in text


def test_the_configs_groups_build_what_was_trained_without_hydra(at_home: Trained) -> None:
    config = runs.load_config(at_home.folder)
    module = build.finetuner(config, {})
    method = build.method(config)
    method.inject(module)
    assert method.record()["arguments"]["r"] == RANK
    assert [(n, p.shape) for n, p in module.named_parameters()] == [
        (n, p.shape) for n, p in at_home.module.named_parameters()
    ]
    assert build.datamodule(config).labels == list(LABELS)


# --------------------------------------------------------------------------------------- true figures


def bare(trained: Trained) -> Any:
    """The model as it was before."""
    name = runs.load_config(trained.folder).model.name
    return AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(LABELS))


def rows_to_test() -> tuple[list[str], list[str]]:
    """The texts and labels of the test split."""
    texts, labels = zip(*reviews(SIZES["test"], seed=2), strict=True)
    return list(texts), list(labels)


def by_hand(trained: Trained, texts: list[str]) -> torch.Tensor:
    """Probabilities (texts, labels) of the module in memory, one text at a time."""
    tokenizer = AutoTokenizer.from_pretrained(runs.load_config(trained.folder).model.name)
    trained.module.eval()
    with torch.no_grad():
        rows = [
            trained.module.model(**tokenizer(text, truncation=True, max_length=64, return_tensors="pt")).logits
            for text in texts
        ]
    return torch.cat(rows).softmax(-1)


def test_the_scores_are_those_of_the_predictions(at_home: Trained) -> None:
    texts, labels = rows_to_test()
    probabilities = by_hand(at_home, texts)
    predicted = [LABELS[i] for i in probabilities.argmax(1).tolist()]
    after, before = at_home.results["after"], at_home.results["before"]
    assert after["test/accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    assert after["test/f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    of_label = probabilities[range(len(labels)), [LABELS.index(label) for label in labels]]
    assert after["test/loss"] == pytest.approx(-of_label.log().mean().item(), rel=1e-4)
    assert before["test/accuracy"] < after["test/accuracy"] < 1, "the case tests nothing"


def test_the_table_by_class_is_scikit_learns(at_home: Trained) -> None:
    texts, labels = rows_to_test()
    predicted = [LABELS[i] for i in by_hand(at_home, texts).argmax(1).tolist()]
    with (at_home.folder / "metrics" / "test_per_class.csv").open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["label", "precision", "recall", "f1", "examples"]
    expected = precision_recall_fscore_support(labels, predicted, labels=LABELS, zero_division=0)
    for i, row in enumerate(rows):
        assert row[0] == LABELS[i]
        assert [float(value) for value in row[1:]] == pytest.approx([float(values[i]) for values in expected], abs=1e-4)
    assert confusion_matrix(labels, predicted).sum() == sum(int(row[-1]) for row in rows)


def test_the_parameters_are_those_of_the_model_and_of_the_formula(trained: Trained) -> None:
    model = bare(trained)
    lora = sum(RANK * (m.in_features + m.out_features) for m in model.bert.modules() if isinstance(m, nn.Linear))
    head = sum(p.numel() for p in model.classifier.parameters())
    assert trained.results["trained"] == lora + head
    assert trained.results["parameters"] == lora + sum(p.numel() for p in model.parameters())
    share = trained.results["trained"] / trained.results["parameters"]
    assert trained.metrics("cost/trained_share") == [pytest.approx(share)] * 6


def test_the_costs_are_plausible(trained: Trained) -> None:
    results = trained.results
    assert results["adapter_bytes"] == sum(os.path.getsize(file) for file in (trained.folder / "adapter").iterdir())
    assert results["adapter_bytes"] > 4 * results["trained"]  # fp32
    rates = trained.metrics("cost/samples_per_second")
    assert 0 < sum(SIZES["train"] / rate for rate in rates) < results["seconds"]
    peaks = [*trained.metrics("cost/peak_memory_mib"), results["peak_memory_mib"]]
    assert peaks[0] > 50
    assert peaks == sorted(peaks)


def test_the_printed_table_shows_the_figures(trained: Trained) -> None:
    results, out = trained.results, trained.out
    assert "lora on data" in out
    for name, label in (("accuracy", "test accuracy"), ("f1", "test macro F1")):
        before, after = (results[when][f"test/{name}"] for when in ("before", "after"))
        assert re.search(rf"{label} +│ +{before:.1%} │ +{after:.1%} ", out)
    share = results["trained"] / results["parameters"]
    assert f"{results['trained']:,} of {results['parameters']:,} ({share:.2%})" in out
    assert f"{results['peak_memory_mib']:,.0f} MiB" in out
    assert f"{results['adapter_bytes'] / 1024:.0f} KiB" in out
    assert f"The run lies in {Path('runs/first')}\n" in out


def test_samples_are_classified_when_training_is_done(trained: Trained) -> None:
    for text, row in zip(["good", "hate it"], by_hand(trained, ["good", "hate it"]), strict=True):
        assert re.search(rf"│ {text} +│ {LABELS[int(row.argmax())]} +│ +{row.max():.2f} ", trained.out)


# ------------------------------------------------------------------------------------- coming back to it


def scores(out: str) -> list[str]:
    found = re.search(r"accuracy ([\d.]+%), macro F1 ([\d.]+%),\s+loss ([\d.]+)", out)
    assert found, out
    return list(found.groups())


@pytest.mark.parametrize("data", [[], ["data.path=data"], ["data.path=data/test.csv"]], ids=["own", "folder", "file"])
def test_evaluate_gives_the_same_scores(data: list[str], at_home: Trained) -> None:
    out = succeed("evaluate", "run=runs/first", *data)
    after = at_home.results["after"]
    assert scores(out) == [
        f"{after['test/accuracy']:.1%}", f"{after['test/f1']:.1%}", f"{after['test/loss']:.3f}",
    ]  # fmt: skip
    assert all(re.search(rf"│ {label} +│ +[\d.]+ │", out) for label in LABELS)


def test_evaluate_scores_other_data_under_other_names(at_home: Trained, tmp_path: Path) -> None:
    rows = [("good", "good"), ("hate it", "bad"), ("awful", "bad")]
    write_csv(tmp_path / "other.csv", rows, header=["body", "stars"])
    out = succeed("evaluate", "run=runs/first", f"data.path={tmp_path}/other.csv", "data.text=body", "data.label=stars")
    right = [LABELS[i] for i in by_hand(at_home, [t for t, _ in rows]).argmax(1).tolist()]
    assert scores(out)[0] == f"{accuracy_score([label for _, label in rows], right):.1%}"


def test_predict_gives_the_labels_of_the_module_in_memory_in_order(
    at_home: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    monkeypatch.setenv("HOME", str(tmp_path))
    out = succeed("predict", "run=runs/first", "file=~/texts.txt", "out=~/out.jsonl")
    assert f"{len(TEXTS)} predictions written" in out
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["text"] for line in lines] == TEXTS
    for line, expected in zip(lines, by_hand(at_home, TEXTS), strict=True):
        assert line["label"] == LABELS[int(expected.argmax())]
        assert line["probability"] == pytest.approx(expected.max().item(), abs=1e-4)
        assert line["probabilities"] == pytest.approx(dict(zip(LABELS, expected.tolist(), strict=True)), abs=1e-4)


def test_predict_shows_a_text_with_its_label(at_home: Trained) -> None:
    for text in [TEXTS[1], TEXTS[4]]:
        out = succeed("predict", "run=runs/first", f"text={text}")
        row = by_hand(at_home, [text])[0]
        assert f"│ {text} │ {LABELS[int(row.argmax())]} " in out
        assert f"{row.max():.2f}" in out


def test_a_line_of_a_file_may_hold_what_else_ends_lines(at_home: Trained, tmp_path: Path) -> None:
    texts = ["good", "good\u2028bad", "good\x0cbad"]
    (tmp_path / "texts.txt").write_text("\n".join(texts), encoding="utf-8-sig")
    succeed("predict", "run=runs/first", f"file={tmp_path}/texts.txt", f"out={tmp_path}/out.jsonl")
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["text"] for line in lines if line] == texts


def test_last_is_the_newest_run(at_home: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, when in (("b", 3), ("multirun/0", 9), ("c", 6)):
        shutil.copytree(at_home.folder, tmp_path / "runs" / name)
        os.utime(tmp_path / "runs" / name / "results.json", (when, when))
    shutil.copytree(at_home.folder, tmp_path / "runs" / "unfinished")
    (tmp_path / "runs" / "unfinished" / "results.json").unlink()
    monkeypatch.chdir(tmp_path)
    shutil.copytree(at_home.home / "data", "data")
    assert runs.find_run("last") == Path("runs/multirun/0")
    assert succeed("evaluate", "run=last").startswith("runs/multirun/0 on ")


def test_predict_says_what_is_wrong(at_home: Trained) -> None:
    for arguments, said in [
        (["run=nowhere", "text=good"], ["run='nowhere' isn't the folder of a finished run", "runs/first"]),
        (["run=data", "text=good"], ["run='data' isn't the folder of a finished run"]),
        (["run=runs/first"], ["give either text="]),
        (["run=runs/first", "text=good", "file=data/test.csv"], ["give either text="]),
        (["run=runs/first", "text=[good,'']"], ["text 2 of 2 is empty"]),
        (["run=runs/first", "text=[]"], ["there is no text"]),
        (["run=runs/first", "file=nowhere.txt"], ["there is no file 'nowhere.txt'"]),
        (["run=runs/first", "file=runs/first/adapter/adapter_model.safetensors"], ["isn't UTF-8", "at byte"]),
        (["run=runs/first", "text=good", "out=nowhere/out.jsonl"], ["out='nowhere/out.jsonl' can't be written"]),
        (["run=runs/first", "text=good", "out=data"], ["out='data' can't be written"]),
    ]:
        message = call("predict", *arguments).message
        assert all(part in message for part in said), message


def test_evaluate_says_what_is_wrong(at_home: Trained) -> None:
    for arguments, said in [
        (["run=nowhere"], ["run='nowhere' isn't the folder of a finished run"]),
        (["run=runs/first", "data.path=nowhere.csv"], ["no file 'nowhere.csv'"]),
        (["run=runs/first", "data.text=body"], ["no column 'body'"]),
        (["run=runs/first", "data.path=unknown.csv"], ["label 'so-so'", "bad, good, mixed"]),
        (["run=runs/first", "data.paht=x.csv"], ["no option 'data.paht'", "Did you mean 'path'?"]),
    ]:
        write_csv(at_home.home / "unknown.csv", [("good", "good"), ("bad", "so-so")])
        message = call("evaluate", *arguments).message
        (at_home.home / "unknown.csv").unlink()
        assert all(part in message for part in said), message


def test_figures_that_are_no_numbers_are_json_all_the_same(tmp_path: Path) -> None:
    runs.save_results(tmp_path, {"after": {"test/loss": math.nan, "test/f1": 0.5}, "list": [math.inf, 1]})
    assert runs.load_results(tmp_path) == {"after": {"test/loss": None, "test/f1": 0.5}, "list": [None, 1]}


def test_evaluation_is_on_the_accelerator_and_in_the_precision_of_the_run() -> None:
    config = OmegaConf.create({"trainer": {"accelerator": "cpu", "precision": "bf16-mixed", "max_epochs": 3}})
    quiet = build.quiet_trainer(config)
    assert (quiet.accelerator.__class__.__name__, quiet.precision) == ("CPUAccelerator", "bf16-mixed")
    config.trainer.accelerator = "gpu"  # which may not be here
    assert build.quiet_trainer(config).precision == "bf16-mixed"


def test_without_any_run_last_says_how_to_make_one(tmp_path: Path) -> None:
    message = call("predict", "run=last", "text=good").message
    assert "no finished run" in message
    assert "lightning-ft train" in message


# ------------------------------------------------------------------------------------- other compositions

GROUPS = ("precision", "scheduler")
"""Those with several choices; a run of each method is merged and exported in the tests of those commands."""
REFUSED_HERE = ("precision=fp16", "precision=fp16-mixed")
"""They need a GPU: tests/apps/test_precision.py."""
CHOICES = [choice for group in GROUPS for name in choices(group) if (choice := f"{group}={name}") not in REFUSED_HERE]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_trains(choice: str, tiny_bert_dir: str, some_csv: Path) -> None:
    three_steps = ["data.batch_size=64", "trainer.max_epochs=3"]  # one_cycle rises, and must fall
    succeed(*tiny_run(tiny_bert_dir, some_csv, *three_steps, choice, "hydra.run.dir=run"))
    assert all(map(math.isfinite, column(Path("run"), "train/loss")))
    assert len(column(Path("run"), "train/loss")) == 3
    assert len(column(Path("run"), "test/f1")) == 1


@pytest.mark.parametrize(
    ("asked", "rate"),
    [("method=head", 1e-2), ("method=full", 5e-5), ("optimizer.lr=0.125", 0.125)],
)
def test_a_rate_of_null_is_the_methods_own_and_a_given_one_is_used(
    asked: str, rate: float, tiny_bert_dir: str, some_csv: Path
) -> None:
    constant = ["scheduler=constant", "scheduler.warmup=0", "hydra.run.dir=run"]
    succeed(*tiny_run(tiny_bert_dir, some_csv, *constant, asked))
    assert set(column(Path("run"), "lr-AdamW/all")) == {rate}
    assert runs.load_config(Path("run")).optimizer.lr == rate


@pytest.mark.parametrize(
    ("overrides", "rates"),
    [
        ([], [10]),
        (["trainer.enable_progress_bar=false"], []),
        (["+callbacks.bar._target_=lightning.pytorch.callbacks.TQDMProgressBar", "+callbacks.bar.refresh_rate=3"], [3]),
    ],
    ids=str,
)
def test_the_bar_is_drawn_ten_times_a_second_unless_another_or_none_is_asked_for(
    overrides: list[str], rates: list[int]
) -> None:
    places = ["trainer.default_root_dir=x", "callbacks.checkpoint.dirpath=x", "trainer.accelerator=cpu"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("train", [*places, *overrides])
    trainer = instantiate(config.trainer, callbacks=build.callbacks(config), logger=False)
    assert [bar.refresh_rate for bar in trainer.callbacks if isinstance(bar, ProgressBar)] == rates


def test_layer_decay_gives_each_layer_its_rate(tiny_bert_dir: str, some_csv: Path) -> None:
    constant = ["scheduler=constant", "scheduler.warmup=0", "method=full", "optimizer.lr=0.125", "layer_decay=0.5"]
    succeed(*tiny_run(tiny_bert_dir, some_csv, *constant, "hydra.run.dir=run"))
    for exponent, name in enumerate(["head", "layer_2", "layer_1", "layer_0"]):  # two layers over the embeddings
        for group in (name, f"{name}_no_decay"):
            assert set(column(Path("run"), f"lr-AdamW/{group}")) == {0.125 * 0.5**exponent}


@pytest.mark.filterwarnings("ignore:.*could not find the monitored key.*")  # as intended here
def test_without_validation_the_last_weights_are_saved(tiny_bert_dir: str, some_csv: Path) -> None:
    answer = call(*tiny_run(tiny_bert_dir, some_csv, "trainer.max_steps=1", "data.batch_size=4", "hydra.run.dir=run"))
    assert answer.status == 0, answer.err
    assert "No checkpoint was kept" in answer.err
    assert runs.find_run("run") == Path("run")


def test_a_multirun_makes_a_run_of_each_combination(tiny_bert_dir: str, some_csv: Path) -> None:
    each = ["method=lora,head", "seed=0,1", "hydra.sweep.dir=runs/sweep"]
    train, *settings = tiny_run(tiny_bert_dir, some_csv, *each)
    succeed(train, "-m", *settings)
    folders = [runs.find_run(f"runs/sweep/{job}") for job in range(4)]
    configs = [runs.load_config(folder) for folder in folders]
    assert [(config.method._target_, config.seed) for config in configs] == [
        (f"lightning_ft.{method}", seed) for method in ("LoRA", "HeadOnly") for seed in (0, 1)
    ]
    results = [json.loads((folder / "results.json").read_text()) for folder in folders]
    assert [r["method"] for r in results] == ["lora", "lora", "head", "head"]
    assert len({r["after"]["test/loss"] for r in results}) == 4
    assert runs.find_run("last") == folders[-1]
    assert all((folder / "train.log").stat().st_size > 0 for folder in folders)


def test_the_same_seed_gives_the_same_run_and_a_fault_at_its_end_loses_none(
    tiny_bert_dir: str, some_csv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    succeed(*tiny_run(tiny_bert_dir, some_csv, "hydra.run.dir=one"))
    again = tiny_run(tiny_bert_dir, some_csv, "hydra.run.dir=one")
    assert "'one' holds a run already" in call(*again).message
    with monkeypatch.context() as beginning_together:
        beginning_together.setattr(runs, "refuse_used", mock.Mock(side_effect=[None, RequestError("taken")]))
        assert call(*again).message == "taken\n"
    monkeypatch.setattr(latency, "measure", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        call(*tiny_run(tiny_bert_dir, some_csv, "hydra.run.dir=two", "latency=1"))
    assert runs.load_results(Path("two"))["after"] == runs.load_results(Path("one"))["after"]
    one, two = (load_file(f"{name}/adapter/adapter_model.safetensors") for name in ("one", "two"))
    assert set(one) == set(two)
    assert all(torch.equal(tensor, two[key]) for key, tensor in one.items())
