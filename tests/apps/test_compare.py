"""A comparison: its runs differ in the method alone, its figures are theirs, and one that fails stops no other."""

from __future__ import annotations

import csv
import json
import random
import statistics
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml
from commands import Made, call, choices, reviews, succeed, tiny_run, write_csv
from matplotlib.image import imread
from matplotlib.text import Annotation
from omegaconf import OmegaConf

import lightning_ft
from lightning_ft import Classification, FineTuner, LoRA, TextDataModule
from lightning_ft.apps import compare, latency, loggers, records, report
from lightning_ft.apps.picture import picture
from lightning_ft.injection import injected_modules

METHODS = ["lora", "broken", "head"]
RATE = 0.5


class Compared(Made):
    """A comparison that was made once for all tests here; ``broken`` is a method that fails when it's injected."""

    @property
    def records(self) -> dict[str, dict[str, Any]]:
        return {record["method"]: record for record in self.record["records"]}

    def results(self, method: str) -> dict[str, Any]:
        return json.loads((self.folder / method / "results.json").read_text())


def asking(model: str, data: Path, *overrides: str) -> list[str]:
    return ["compare", *tiny_run(model, data, *overrides)[1:]]


@pytest.fixture(scope="module")
def compared(tiny_bert_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    home = tmp_path_factory.mktemp("it's, odd")  # a name that means something in Hydra's grammar
    data = write_csv(home / "re, views.csv", reviews(120, seed=0))
    (home / "own" / "method").mkdir(parents=True)
    (home / "own" / "method" / "broken.yaml").write_text("_target_: lightning_ft.LoRA\ntarget_modules: nowhere\n")
    (home / "datasets.py").write_text("raise ImportError('a file of the user, not the package')\n")
    more = [f"methods=[{','.join(METHODS)}]", "hydra.run.dir=runs/compare", "latency=2"]
    more += [f"+rates.broken={RATE}", "--config-dir=own"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HF_DATASETS_CACHE", str(home / "cache"))
        bar = "trainer.enable_progress_bar=true"
        answer = call(*asking(tiny_bert_dir, data, "trainer.max_epochs=2", bar, *more), cwd=home)
    return Compared(home, answer, "compare")


# ------------------------------------------------------------------------------------------- a comparison


def test_the_runs_differ_in_the_method_and_its_rate_alone(compared: Compared) -> None:
    lora, head = (yaml.safe_load((compared.folder / method / "config.yaml").read_text()) for method in ("lora", "head"))
    for config, method, target in ((lora, "lora", "LoRA"), (head, "head", "HeadOnly")):
        assert config.pop("method")["_target_"] == f"lightning_ft.{target}"
        assert config["optimizer"].pop("lr") == config["rates"][method]
    assert lora == head
    assert lora["rates"]["broken"] == RATE
    assert lora["data"]["seed"] == lora["seed"]


def test_every_method_got_the_same_steps_and_the_same_test_rows(compared: Compared) -> None:
    done = [compared.records[method] for method in ("lora", "head")]
    assert {record["steps"] for record in done} == {2 * -(-done[0]["rows_train"] // 16)}
    rows = []
    for method in ("lora", "head"):
        with (compared.folder / method / "metrics" / "test_per_class.csv").open(newline="") as file:
            rows.append([(row["label"], row["examples"]) for row in csv.DictReader(file)])
    assert rows[0] == rows[1]
    assert sum(int(examples) for _, examples in rows[0]) == done[0]["rows_test"]


def test_a_record_says_what_the_runs_own_results_say(compared: Compared) -> None:
    for method in ["lora", "head"]:
        record, results = compared.records[method], compared.results(method)
        for part in ("after", "validation"):
            assert {key: record[key] for key in results[part]} == results[part]
        for key in ("seconds", "peak_memory_mib", "adapter_bytes", "parameters", "trained", "steps", "lr"):
            assert record[key] == results[key], key
        assert record["trained_share"] == results["trained"] / results["parameters"]
        assert record["latency_ms"] == results["latency"]["ms"] > 0
        assert record["adapter_bytes"] == sum(
            f.stat().st_size for f in (compared.folder / method / "adapter").iterdir()
        )


def test_the_csv_holds_the_records_of_the_json(compared: Compared) -> None:
    with (compared.folder / "compare.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    asked = [{key: str(value) for key, value in r.items() if value is not None} for r in compared.records.values()]
    assert [{key: value for key, value in row.items() if value} for row in rows] == asked


def test_what_was_merged_is_told_from_what_there_was_nothing_to_merge_of(compared: Compared) -> None:
    assert (compared.records["lora"]["merged"], compared.records["head"]["merged"]) == (True, None)


def test_a_method_that_fails_stops_no_other_and_says_why(compared: Compared) -> None:
    assert [(method, record["status"]) for method, record in compared.records.items()] == [
        ("lora", "finished"), ("broken", "failed"), ("head", "finished"),
    ]  # fmt: skip
    assert "nowhere" in compared.records["broken"]["reason"]
    log = compared.folder / "broken" / "console.log"
    assert "nowhere" in log.read_text()
    assert compared.answer.message.startswith("1 of 3 runs failed")
    assert str(log.relative_to(compared.home)) in compared.answer.message
    assert not (compared.folder / "broken" / "results.json").exists()


def test_it_shows_which_method_is_on_and_the_comparison_at_the_end(compared: Compared) -> None:
    out = compared.answer.out
    shown = [f"{method} ({i + 1} of 3)" for i, method in enumerate(METHODS)] + ["trained", "failed", "nowhere"]
    assert all(part in out for part in shown), out
    assert imread(compared.folder / "compare.png").size
    console = (compared.folder / "lora" / "console.log").read_text(encoding="utf-8")
    assert "Epoch 1" in console
    assert "\r" not in console, "of a progress bar, every state"
    assert "\x1b" not in console
    assert "Validation DataLoader" not in console


def test_one_can_come_back_to_its_runs_and_the_last_is_the_best(compared: Compared) -> None:
    here = compared.home
    succeed("predict", "run=runs/compare/head", "text=good", cwd=here)
    best = max(("lora", "head"), key=lambda m: compared.records[m]["val/f1"])
    assert f"{best}: run=runs/compare/{best}, or run=last" in compared.answer.out
    said = succeed("evaluate", "run=last", cwd=here)
    assert said.startswith(f"runs/compare/{best} on ")
    assert f"accuracy {compared.records[best]['test/accuracy']:.1%}" in said


def test_what_all_runs_have_in_common_is_written_once(compared: Compared) -> None:
    about = compared.record
    assert about["data"].endswith("re, views.csv")
    assert "trainer.max_epochs=2" in about["overrides"]
    assert about["versions"]["lightning_ft"] == lightning_ft.__version__
    assert about["hardware"]["threads"] >= 1


def test_loggers_get_the_table_and_the_picture(compared: Compared, monkeypatch: pytest.MonkeyPatch) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.got: dict[str, Any] = {}

        def log_table(self, name: str, columns: list[str], data: list[list[Any]]) -> None:
            self.got["table"] = (name, [dict(zip(columns, row, strict=True)) for row in data])

        def log_image(self, name: str, images: list[Any], step: int) -> None:
            self.got["image"] = (name, len(images))

        def log_hyperparams(self, about: dict[str, Any]) -> None:
            self.got["about"] = about

        def finalize(self, status: str) -> None:
            self.got["status"] = status

    recorder = Recorder()
    monkeypatch.setattr(loggers, "wandb", lambda: recorder)
    config = OmegaConf.create({"logger": {"wandb": {"_target_": "lightning_ft.apps.loggers.wandb"}}})
    found = list(compared.records.values())
    compare._show(config, compared.folder, found, {"data": "x"})
    name, rows = recorder.got["table"]
    assert (name, [row["method"] for row in rows]) == ("compare/table", METHODS)
    assert recorder.got["image"] == ("compare/picture", 1)
    assert (recorder.got["about"], recorder.got["status"]) == ({"data": "x"}, "success")


# ----------------------------------------------------------------------------- what is said before any run


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[compare.Run]:
    """The runs that were started; none is really made, and every one ends with a score that its seed tells."""
    started: list[compare.Run] = []

    def train(run: compare.Run, say: Any) -> dict[str, Any]:
        started.append(run)
        return finished(run.method, run.seed, 0.5 + 0.1 * run.seed)

    monkeypatch.setattr(compare, "_train", train)
    monkeypatch.setattr(compare.os, "utime", lambda path: None)
    return started


def finished(method: str, seed: int, score: float, share: float = 0.01, merged: bool | None = None) -> dict[str, Any]:
    costs = {cost.key: 2.0 for cost in records.COSTS} | {"latency_ms": 2.0}
    name = {"method": method, "seed": seed, "folder": method, "status": "finished", "steps": 8, "merged": merged}
    scores = {f"{split}/{kind}": score for split in ("test", "val") for kind in ("accuracy", "f1")}
    return {**name, "monitor": "val/f1", "mode": "max", "test/loss": 1.0, **scores, **costs, "trained_share": share}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "reviews.csv", reviews(60, seed=0))


def test_what_is_wrong_is_said_before_any_run(tiny_bert_dir: str, data: Path, made: list[compare.Run]) -> None:
    (data.parent / "there" / "full").mkdir(parents=True)
    (data.parent / "compared").mkdir()
    (data.parent / "compared" / "compare.json").write_text("{}")
    for override, said in [
        ("methods=[lora,haed]", ["no method 'haed'", *choices("method"), "Did you mean head?"]),
        ("methods=[lora,lora]", ["methods must be a list of different values"]),
        ("methods=[]", ["methods must be a list"]),
        ("seeds=[0,first]", ["seed must be a whole number from 0", "not first"]),
        ("seed=-1", ["seed must be a whole number from 0", "not -1"]),
        ("latency=1.5", ["latency must be a whole number of rounds", "not 1.5"]),
        ("optimizer.lr=high", ["the learning rate must be a number", "not high"]),
        ("~rates.head", ["'head' has no learning rate", "+rates.head=..."]),
        ("hydra.run.dir=there", ["'there/full' is there already"]),
        ("hydra.run.dir=compared", ["'compared' holds a comparison already"]),
        *((argument, ["methods=["]) for argument in ("method=lora", "method.r=4", "++method.r=4")),
        ("trainer.precision=bf61", ["bf61"]),
        ("optimizer.rl=1", ["no option 'optimizer.rl'", "'optimizer' has"]),
        ("data.text=body", ["no column 'body'"]),
    ]:
        message = call(*asking(tiny_bert_dir, data, override)).message
        assert all(part in message for part in said), message
        assert not made


def test_a_run_for_each_method_and_seed_in_a_folder_of_its_own(
    tiny_bert_dir: str, data: Path, made: list[compare.Run]
) -> None:
    out = succeed(*asking(tiny_bert_dir, data, "methods=[lora,head]", "seeds=[0,3]", "hydra.run.dir=compare"))
    assert [(run.method, run.seed) for run in made] == [("lora", 0), ("head", 0), ("lora", 3), ("head", 3)]
    assert [run.folder.name for run in made] == ["lora_seed0", "head_seed0", "lora_seed3", "head_seed3"]
    for run in made:
        assert {f"method={run.method}", f"seed={run.seed}", "trainer.max_epochs=1"} <= set(run.arguments)
        assert "data.seed=0" in run.arguments, "each seed would be tested on other rows"
        assert not [argument for argument in run.arguments if argument.startswith(("methods", "seeds"))]
    deviation = statistics.stdev([50, 80])
    assert out.count(f"65.0 ± {deviation:.1f}") == 4  # two scores of two methods
    assert "run=compare/lora\n" in out, "run=last knows those in runs/ alone"


# ------------------------------------------------------------------------------------- a run's process


def process(code: str, monkeypatch: pytest.MonkeyPatch, say: Any = lambda line: None) -> tuple[dict[str, Any], str]:
    """Have ``code`` run in the place of a run; returns the record and what is kept of its output."""
    script = Path("script.py")
    script.write_text(code, encoding="utf-8")
    monkeypatch.setattr(compare, "_TRAIN", str(script))
    record = compare._train(compare.Run("lora", 0, Path("run"), []), say)
    return record, (Path("run") / compare.CONSOLE).read_text(encoding="utf-8")


def test_of_a_progress_bar_every_state_is_heard_and_the_last_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    code = r"print('\r50%|█ | 1/2', end='\r'); print('100%|██| 2/2\nlightning-ft train: the end'); raise SystemExit(1)"
    record, kept = process(code, monkeypatch, heard.append)
    assert [line.strip() for line in heard if line.strip()] == [
        "50%|█ | 1/2",
        "100%|██| 2/2",
        "lightning-ft train: the end",
    ]
    assert kept == "100%|██| 2/2\nlightning-ft train: the end\n"
    assert record == {"status": "failed", "reason": "the end"}


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_process_that_was_killed_is_said_to_have_been(monkeypatch: pytest.MonkeyPatch) -> None:
    record, _ = process("import os; os.kill(os.getpid(), 9)", monkeypatch)
    assert record == {"status": "failed", "reason": "ended by SIGKILL (out of memory?)"}


def test_an_interruption_ends_the_process_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # within the test's time, not in an hour
        process("import time; print('on', flush=True); time.sleep(3600)", monkeypatch, interrupt)


# ---------------------------------------------------------------------------------------------- latency


@pytest.fixture
def trained(tiny_bert_dir: str, data: Path) -> tuple[FineTuner, TextDataModule, L.Trainer]:
    texts = TextDataModule(data, tokenizer=tiny_bert_dir, batch_size=2)
    module = FineTuner(tiny_bert_dir, Classification(texts.labels))
    LoRA(r=2).inject(module)
    return module, texts, L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)


def _refuse(module: FineTuner) -> list[str]:
    raise NotImplementedError


def test_the_same_batches_without_labels_are_timed_after_a_first_round(
    trained: tuple[FineTuner, TextDataModule, L.Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, texts, _ = trained
    clock = iter([9.0, 1.0, 2.0, 5.0])  # of the rounds; the first doesn't count
    seen: list[tuple[int, ...]] = []
    now = 0.0

    def seconds(model: Any, batch: dict[str, Any], device: Any) -> float:
        nonlocal now
        assert set(batch) == {"input_ids", "attention_mask"}
        if model is not module:
            return now / 2  # the bare one, right after
        if len(seen) % 3 == 0:  # three batches a round
            now = next(clock)
        seen.append(tuple(batch["input_ids"].flatten().tolist()))
        return now

    monkeypatch.setattr(latency, "_seconds", seconds)
    found = latency.measure(*trained, rounds=3)
    assert len(seen) == 12
    assert seen[:3] == seen[3:6] == seen[6:9] == seen[9:]
    assert found["ms"] == pytest.approx(1000 * 3 * 2.0 / len(texts.splits["test"]))
    assert [found["ratio"], *found["quartiles"]] == [2.0] * 3  # however fast the machine was
    assert module.training is False


def test_the_bare_model_is_timed_beside_it(
    trained: tuple[FineTuner, TextDataModule, L.Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[list[str]] = []
    monkeypatch.setattr(latency, "merge", _refuse)
    monkeypatch.setattr(
        latency, "_seconds", lambda model, *_: timed.append([n for n, _ in injected_modules(model)]) or 1.0
    )
    latency.measure(*trained, rounds=1)
    assert all(timed[::2])
    assert not any(timed[1::2])


def test_what_cannot_be_merged_is_timed_as_it_is(
    trained: tuple[FineTuner, TextDataModule, L.Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "merge", _refuse)
    found = latency.measure(*trained, rounds=1)
    assert found["merged"] is False
    assert found["ms"] > 0
    assert list(injected_modules(trained[0]))


# ------------------------------------------------------------------------------------- table and picture


def test_the_best_is_of_the_method_with_the_best_mean_on_the_validation_rows() -> None:
    scores = {"a": (0.9, 0.1), "b": (0.6, 0.7), "c": (0.5, 0.6)}
    found = [finished(method, seed, score) for method, both in scores.items() for seed, score in enumerate(both)]
    found = [{**record, "test/accuracy": 0.5, "test/f1": -record["val/f1"]} for record in found]
    found.append({"method": "d", "seed": 0, "folder": "d", "status": "failed", "reason": "x"})
    best = records.best(found)
    assert best is not None
    assert (best["method"], best["seed"]) == ("b", 1)
    assert records.best(found[-1:]) is None
    lowest = records.best([{**record, "mode": "min"} for record in found])
    assert lowest is not None
    assert (lowest["method"], lowest["seed"]) == ("a", 1)


def test_the_table_says_what_failed() -> None:
    found = [
        {"method": method, "seed": seed, "folder": "a", "status": "failed", "reason": "x"}
        for method in "ab"
        for seed in (0, 1)
    ]
    for runs, said in ((found, "failed"), ([finished("a", 2, 0.5), *found], "(1 of 3 seeds)")):
        with report.console.capture() as captured:
            report.console.print(records.table(runs, "/a/long/path" * 20))
        assert said in captured.get()
        assert captured.get().count("path: ") == 1, "the title is one line"


@pytest.mark.parametrize("count", [1, 12])
def test_no_name_in_the_picture_meets_another_or_a_dot(count: int) -> None:
    draw = random.Random(count)
    methods = [f"{'method' * draw.randint(1, 2)}_{i}"[:11] for i in range(count)]
    found = [
        finished(m, 0, draw.gauss(0.8, 0.02), 10 ** draw.uniform(-4, 0), merged=draw.choice([True, False]))
        for m in methods
    ]
    figure = picture(found, "data")
    figure.draw_without_rendering()
    (axes,) = [a for a in figure.axes if a.get_xlabel() == "share of parameters trained"]
    names = [child for child in axes.texts if isinstance(child, Annotation) and child.get_text()]
    boxes = [name.get_window_extent() for name in names]
    dots = axes.transData.transform([name.xy for name in names])
    assert {name.get_text() for name in names} == set(methods)
    assert all(one.count_overlaps(boxes) == 1 for one in boxes)
    assert not any(box.contains(*dot) for box in boxes for dot in dots)


def test_a_picture_of_runs_without_latency_is_drawn() -> None:
    found = [{**finished("lora", 0, 0.5), "latency_ms": None, "latency_ratio": None}]
    assert picture(found, "data").axes
