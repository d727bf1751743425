"""Several tasks from the command line: for each text, and on a data set each."""

from __future__ import annotations

import json
from pathlib import Path

from commands import call, reviews, succeed, tiny_run, write_csv

from lightning_ft.apps import runs

CLASSES = "_target_:lightning_ft.Classification"
TASKS = f"task.tasks={{mood:{{{CLASSES}}},size:{{{CLASSES}}}}}"
LABELLED = "_target_:lightning_ft.data.targets.Classes"


def scored(folder: str) -> set[str]:
    return set(runs.load_results(Path(folder))["after"]) - {"test/loss"}


SCORES = {f"test/{task}/{score}" for task in ("mood", "size") for score in ("accuracy", "f1")}


def test_several_labels_of_a_text_are_learned_scored_and_predicted(tiny_bert_dir: str, tmp_path: Path) -> None:
    rows = [(text, label, "large" if "very" in text else "small") for text, label in reviews(90, seed=1)]
    data = write_csv(tmp_path / "both.csv", rows, header=["text", "mood", "big"])
    each = f"{{mood:{{{LABELLED}}},size:{{{LABELLED}}}}}"
    target = f"data.target={{_target_:lightning_ft.data.targets.Several,targets:{each}}}"
    asked = ["task=multitask", TASKS, target, "data.label={mood:mood,size:big}", "monitor=val/size/f1", "mode=max"]
    out = succeed(*tiny_run(tiny_bert_dir, data, *asked, "hydra.run.dir=run"))
    assert "test mood accuracy" in out
    assert scored("run") == SCORES
    succeed("predict", "run=run", "text=very good", "out=said.jsonl")
    said = json.loads(Path("said.jsonl").read_text())
    assert (said["mood"]["label"], said["size"]["label"]) < ("z", "z")
    assert "mood accuracy" in succeed("evaluate", "run=run")
    assert "heads of several tasks" in call("merge", "run=run", "out=merged").message
    succeed("export", "run=run", "out=exported")


def test_each_task_may_have_data_of_its_own(tiny_bert_dir: str, tmp_path: Path) -> None:
    moods = write_csv(tmp_path / "moods.csv", reviews(60, seed=1))
    sizes = [(text, "large" if "very" in text else "small") for text, _ in reviews(40, seed=2)]
    both = {"mood": moods, "size": write_csv(tmp_path / "sizes.csv", sizes)}
    module = f"_target_:lightning_ft.TextDataModule,tokenizer:'{tiny_bert_dir}'"
    sources = ",".join(f"{name}:{{{module},path:'{path}'}}" for name, path in both.items())
    ours = ("data=file", "data.path", "data.batch_size")
    arguments = [a for a in tiny_run(tiny_bert_dir, moods) if not a.startswith(ours)]
    succeed(*arguments, "data=several", f"data.sources={{{sources}}}", "task=multitask", TASKS, "hydra.run.dir=run")
    assert scored("run") == SCORES
    assert runs.load_results(Path("run"))["rows"]["test"] == 12 + 8
    succeed("predict", "run=run", "text=good")
    checked = ["check", "data=several", f"data.sources={{{sources}}}", "task=multitask", TASKS, "model=hub"]
    assert "one data set" in call(*checked, f"model.name={tiny_bert_dir}").message
