"""The command line with task=tagging: train, evaluate, predict, merge, export."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import call, succeed, tiny_run
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForTokenClassification, AutoTokenizer, pipeline

from lightning_ft.apps import runs

TEXT = "The  battery is very good."
LABELS = ["O", "B-OPINION", "I-OPINION", "B-PART", "I-PART"]


def write_sentences(file: Path, count: int, seed: int) -> Path:
    """Sentences in the words of the tiny BERT."""
    generator = random.Random(seed)
    lines = []
    for _ in range(count):
        lines += ["the O", "battery B-PART", *(["works I-PART"] if generator.random() < 0.3 else []), "is O"]
        lines += [*(["not O"] if generator.random() < 0.5 else [])]
        opinion = generator.choice(["good", "bad", "great", "awful"])
        lines += ["very B-OPINION", f"{opinion} I-OPINION"] if generator.random() < 0.5 else [f"{opinion} B-OPINION"]
        lines += [". O", ""]
    file.write_text("\n".join(lines))
    return file


@pytest.fixture(scope="module")
def run(tiny_bert_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("tagging")
    data = write_sentences(home / "reviews.conll", 200, seed=0)
    folder = home / "runs" / "lora"
    more = ["task=tagging", "optimizer.lr=0.02", "trainer.max_epochs=10", "test_before=true"]
    succeed(*tiny_run(tiny_bert_dir, data, *more, f"hydra.run.dir={folder}"), cwd=home)
    return folder


@pytest.fixture(scope="module")
def entities(run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("predicted") / "out.jsonl"
    succeed("predict", f"run={run}", f"text={TEXT}", f"out={out}")
    (line,) = out.read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["text"] == TEXT
    return json.loads(line)["entities"]


def test_a_run_learns_and_keeps_what_it_measured(run: Path) -> None:
    results = runs.load_results(run)
    names = {"entity_f1", "entity_precision", "entity_recall", "accuracy", "loss"}
    assert set(results["after"]) == {f"test/{name}" for name in names}
    assert results["after"]["test/entity_f1"] > 0.9 > results["before"]["test/entity_f1"]
    assert results["monitor"] == "val/entity_f1"
    assert runs.load_config(run).task["labels"] == LABELS
    files = {path.name for path in (run / "metrics").iterdir()}
    assert {"test_per_type.csv", "test_confusion_matrix.png"} <= files


def test_its_card_tells_how_it_is_loaded(run: Path) -> None:
    card = ModelCard.load(run / "adapter" / "README.md")
    assert card.data.pipeline_tag == "token-classification"
    assert "AutoModelForTokenClassification.from_pretrained(" in card.text
    assert f"labels = {json.dumps(LABELS)}" in card.text
    assert "| `entity F1` |" in card.text


def test_evaluate_prints_scores_and_the_table(run: Path) -> None:
    scores = runs.load_results(run)["after"]
    out = succeed("evaluate", f"run={run}")
    assert f"entity F1 {scores['test/entity_f1']:.1%}" in out
    assert re.search(r"OPINION\W+[\d.]+\W+[\d.]+\W+[\d.]+", out)
    other = write_sentences(Path("other.txt"), 30, seed=1)
    assert "entity F1" in succeed("evaluate", f"run={run}", f"data.path={other}", "data.format=conll")


def test_evaluate_says_what_was_not_read(run: Path) -> None:
    assert "Not read" in succeed("evaluate", f"run={run}", "data.max_length=6")


def test_evaluate_refuses_unknown_tags_by_file_and_row(run: Path) -> None:
    Path("other.conll").write_text("the O\n\nbattery B-WHAT\n")
    message = call("evaluate", f"run={run}", "data.path=other.conll").message
    assert re.search(r"other\.conll, test: the label 'B-WHAT' \(row 2", message)


def test_predictions_say_where_entities_are(run: Path, entities: list[dict[str, Any]]) -> None:
    found = [{key: entity[key] for key in ("text", "type", "start", "end")} for entity in entities]
    assert found == [
        {"text": "battery", "type": "PART", "start": 5, "end": 12},
        {"text": "very good", "type": "OPINION", "start": 16, "end": 25},
    ]
    assert all(0.5 < entity["score"] <= 1 for entity in entities)
    assert "battery (PART), very good (OPINION)" in succeed("predict", f"run={run}", f"text={TEXT}")


def test_a_merged_run_is_served_by_transformers(run: Path, entities: list[dict[str, Any]]) -> None:
    assert "BertForTokenClassification" in succeed("merge", f"run={run}", "out=merged")
    served = pipeline("token-classification", "merged", aggregation_strategy="first")(TEXT)
    assert [(e["entity_group"], e["start"], e["end"]) for e in served] == [
        (e["type"], e["start"], e["end"]) for e in entities
    ]
    assert [float(e["score"]) for e in served] == pytest.approx([e["score"] for e in entities], abs=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's
def test_an_exported_run_is_loaded_by_stock_peft(run: Path, tiny_bert_dir: str) -> None:
    succeed("export", f"run={run}", "out=exported")
    succeed("merge", f"run={run}", "out=merged")
    base = AutoModelForTokenClassification.from_pretrained(tiny_bert_dir, id2label=dict(enumerate(LABELS)))
    theirs = PeftModel.from_pretrained(base, "exported").eval()
    merged = AutoModelForTokenClassification.from_pretrained("merged").eval()
    batch = AutoTokenizer.from_pretrained("exported")([TEXT], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(theirs(**batch).logits, merged(**batch).logits, atol=1e-4, rtol=0)
