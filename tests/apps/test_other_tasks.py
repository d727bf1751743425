"""Numbers, grades and several labels on the command line: trained, scored, asked, merged into a stock model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from commands import TEXTS, call, reviews, succeed, tiny_run, write_csv
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lightning_ft.apps import runs

Config = Mapping[str, Any]


class Case(NamedTuple):
    """A task, and what is expected of it.

    Attributes:
        words: what the data have for a review that is bad, good or mixed.
        scores: what ``evaluate`` calls them.
        table: a heading of its table.
        head: what the card of an adapter says that the base is loaded with.
        read: what is made of a stock model's logits, as the model's card says.
        said: the part of a prediction that this is.
    """

    words: Mapping[str, str]
    scores: list[str]
    table: str
    head: str
    read: Callable[[list[float], Config], Any]
    said: Callable[[Config], Any]
    overrides: tuple[str, ...] = ()


def of_chain(logits: list[float], task: Config) -> float:
    """The expected grade: the first, and each step as often as it's taken."""
    above = accumulate(torch.tensor(logits).sigmoid().tolist(), mul)
    steps = [high - low for low, high in zip(task["grades"], task["grades"][1:], strict=False)]
    return task["grades"][0] + sum(step * share for step, share in zip(steps, above, strict=True))


CASES = {
    "regression": Case(
        {"bad": "10", "mixed": "22.5", "good": "40"},
        ["RMSE", "MAE", "R²", "Spearman", "loss"],
        "",
        'num_labels=1, problem_type="regression"',
        lambda logits, task: task["mean"] + task["std"] * logits[0],
        lambda prediction: prediction["value"],
        ("task.loss=huber",),
    ),
    "ordinal": Case(
        {"bad": "1", "mixed": "2", "good": "5"},
        ["QWK", "MAE", "accuracy", "Spearman", "loss"],
        "Per grade",
        'num_labels=2, problem_type="multi_label_classification"',
        of_chain,
        lambda prediction: prediction["expected"],
    ),
    "multilabel": Case(
        {"bad": "bad", "mixed": "good; bad", "good": ""},
        ["macro F1", "micro F1", "mAP", "recall at fixed precision", "loss"],
        "Per label",
        'id2label=dict(enumerate(labels)), problem_type="multi_label_classification"',
        lambda logits, task: torch.tensor(logits).sigmoid().tolist(),
        lambda prediction: list(prediction["probabilities"].values()),
        ("data.target.separator=;", "task.pos_weight=balanced"),
    ),
}


@pytest.fixture(scope="module", params=CASES)
def made(
    request: pytest.FixtureRequest, tiny_bert_dir: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Case, Path]:
    """A finished run of each task, in which what it trained matters."""
    case, home = CASES[request.param], tmp_path_factory.mktemp(request.param)
    data = write_csv(home / "data.csv", [(text, case.words[label]) for text, label in reviews(240, seed=0)])
    asked = [f"task={request.param}", *case.overrides, "optimizer.lr=0.01", "trainer.max_epochs=8", "test_before=true"]
    succeed(*tiny_run(tiny_bert_dir, data, *asked, "hydra.run.dir=run", "samples=[good]"), cwd=home)
    return request.param, case, home / "run"


def test_training_improves_what_it_watches(made: tuple[str, Case, Path]) -> None:
    _, _, run = made
    results = runs.load_results(run)
    score = results["monitor"].replace("val/", "test/")
    before, after = results["before"][score], results["after"][score]
    assert (after < before) == (results["mode"] == "min")
    assert after != before
    assert (run / "checkpoints" / "best.ckpt").is_file()
    assert list((run / "metrics").glob("test_*.png"))


def test_evaluate_says_the_scores_and_the_table(made: tuple[str, Case, Path]) -> None:
    name, case, run = made
    out = succeed("evaluate", f"run={run}")
    found = re.search(r"data\.csv: (.*)", out)
    assert found, out
    assert [re.sub(r" -?[\d.]+%?$", "", part) for part in found[1].split(", ")] == case.scores
    assert case.table in out
    other = write_csv(Path("other.csv"), [("very good", case.words["good"]), ("awful", case.words["bad"])])
    assert "other.csv: " in succeed("evaluate", f"run={run}", f"data.path={other}")
    odd = {"regression": "much", "ordinal": "3", "multilabel": "odd"}[name]
    wrong = write_csv(Path("wrong.csv"), [("very good", odd)])
    assert "row 1" in call("evaluate", f"run={run}", f"data.path={wrong}").message


def test_a_merged_model_and_an_exported_adapter_say_what_the_run_says(
    made: tuple[str, Case, Path], tiny_bert_dir: str
) -> None:
    _, case, run = made
    Path("texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    succeed("predict", f"run={run}", "file=texts.txt", "out=predictions.jsonl")
    assert "Predictions" in succeed("predict", f"run={run}", "text=very good")
    expected = [case.said(json.loads(line)) for line in Path("predictions.jsonl").read_text("utf-8").splitlines()]
    out = succeed("merge", f"run={run}", "out=merged")
    assert ("no probability differs" in out) or ("no standardised value differs" in out)
    succeed("export", f"run={run}", "out=exported")
    task = runs.load_config(run).task

    card = Path("exported/README.md").read_text(encoding="utf-8")
    assert case.head in card
    blocks = [
        code.replace("path/of/this/folder", "exported") for code in re.findall(r"```python\n(.*?)```", card, re.S)
    ]
    names: dict[str, Any] = {}
    for block in blocks[:2]:
        exec(block.replace(f"path/of/{Path(tiny_bert_dir).name}", tiny_bert_dir), names)
    for model in (AutoModelForSequenceClassification.from_pretrained("merged"), names["model"]):
        batch = AutoTokenizer.from_pretrained("merged")(TEXTS, truncation=True, padding=True, return_tensors="pt")
        with torch.no_grad():
            logits = model.eval()(**batch).logits
        said = torch.tensor([case.read(row, task) for row in logits.tolist()])
        torch.testing.assert_close(said, torch.tensor(expected), atol=1e-4, rtol=1e-5)
    assert "logit" in Path("merged/README.md").read_text(encoding="utf-8")
