"""The benchmarks run, compare like with like, and their README says what their results say."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="the bench extra isn't installed")
pytest.importorskip("accelerate", reason="the bench extra isn't installed")
pytest.importorskip("bitsandbytes", reason="the quantization extra isn't installed")

from benchmarks import __main__ as suite
from benchmarks import measure, table
from benchmarks.models import TINY

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the peers

EXACT = {"W1", "W1s", "W2-fp32", "W4", "W6", "W7"}


@pytest.mark.parametrize("name", suite.WORKLOADS)
def test_a_workload_runs_and_both_compute_the_same(name: str, tiny_bert_dir: str, tmp_path: Path) -> None:
    rows = [{"text": "it is good " * (i % 5 + 1), "label": "positive" if i % 2 else "negative"} for i in range(80)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    size = dataclasses.replace(TINY, data=str(tmp_path / "rows.jsonl"), model=tiny_bert_dir)
    cases = list(suite.WORKLOADS[name].figures(size, 1))
    assert cases
    for case in cases:
        assert "ours" in case["peer_over_ours"]
        assert all(value > 0 and math.isfinite(value) for value in case["seconds"].values())
        assert all(value > 0 for value in case.get("saved_mib", {}).values())
        assert all(0 < value < 2 for value in case.get("validation_loss", {}).values())
        for variant, difference in case.get("differs", {}).items():
            assert difference < (1e-5 if name in EXACT else 0.1), (case["case"], variant)
    compared = {case["case"] for case in cases if case.get("differs")}
    assert compared == COMPARED[name]


COMPARED = {
    "W1": {"p=0", "DoRA", "AdaLoRA", "IA3"},
    "W1s": {"p=0"},
    "W2-fp32": {"p=0"},
    "W2-bf16": {"p=0"},
    "W3": {"p=0"},
    "W4": {"language model"},
    "W5": set(),
    "W6": {"generation", "generation, merged", "classification", "classification, merged"},
    "W7": {"2 adapters"},
    "callback": set(),
}


def test_a_difference_is_seen() -> None:
    """Else the agreement above would mean nothing."""
    ours = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([4.0])}
    assert measure.largest_difference(ours, {**ours, "a": torch.tensor([1.5, 2.0])}) == 0.25
    with pytest.raises(AssertionError, match="not the same"):
        measure.largest_difference(ours, {"a": ours["a"]})


def test_saved_bytes_are_those_of_different_tensors_that_arent_parameters() -> None:
    layer = torch.nn.Linear(256, 1024, bias=False)
    x = torch.randn(512, 256, requires_grad=True)

    def loss(model: torch.nn.Module) -> torch.Tensor:
        out = model(x)  # keeps x and the weight
        return (out * out).sum()  # keeps out, twice

    assert measure.saved_mib(measure.Step(layer, loss)) == 512 * (256 + 1024) * 4 / 2**20


def test_times_are_compared_turn_by_turn() -> None:
    times = {"PEFT": [2.0, 30.0, 4.0], "ours": [1.0, 10.0, 4.0], "limit": [1.0, 5.0, 2.0]}
    found = measure.ratios(times)
    assert found["peer_over_ours"] == {"ours": 2.0}
    assert found["over_limit"] == {"PEFT": 2.0, "ours": 2.0}
    found = measure.ratios({**times, "other limit": [4.0, 60.0, 8.0]}, limits={"PEFT": "other limit"})
    assert found["peer_over_ours"] == {"ours": 2.0}
    assert found["over_limit"] == {"PEFT": 0.5, "ours": 2.0}


def test_steps_of_loops_alternate_and_each_has_its_own_time() -> None:
    order = []

    def loop(name: str, seconds: float) -> Callable[[Iterable[int]], None]:
        def run(batches: Iterable[int]) -> None:
            for batch in batches:
                order.append((name, batch))
                time.sleep(seconds)

        return run

    found = measure.step_by_step({"slow": loop("slow", 0.2), "quick": loop("quick", 0)}, [1, 2, 3, 4], warm_up=1)
    assert order == [(name, batch) for batch in (1, 2, 3, 4) for name in ("slow", "quick")]
    assert {name: len(seconds) for name, seconds in found.items()} == {"slow": 2, "quick": 2}
    assert min(found["slow"]) >= 0.2
    assert min(found["quick"]) < 0.1


@pytest.mark.parametrize("first", [True, False])
def test_a_loop_that_fails_or_ends_early_ends_the_others(first: bool) -> None:
    def fails(batches: Iterable[int]) -> None:
        next(iter(batches))
        raise KeyError("gone")

    def ends(batches: Iterable[int]) -> None:
        next(iter(batches))

    for loop, cause in ((fails, KeyError), (ends, ValueError)):
        loops = [loop, list] if first else [list, loop]
        with pytest.raises(RuntimeError, match="A loop has failed") as caught:
            measure.step_by_step(dict(zip("ab", loops, strict=True)), range(5), warm_up=1)
        assert isinstance(caught.value.__cause__, cause)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux's own count")
def test_a_peak_is_what_a_step_takes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert 60 < measure.peak_mib(lambda: torch.ones(2**24)) < 80
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--size", "tiny", "--threads", "1", "--peak", "W1", "p=0", "ours"])
    suite.main()
    assert float(capsys.readouterr().out.splitlines()[-1]) >= 0


def a_report(ratio: float) -> dict[str, Any]:
    case = {
        "case": "p=0", "peer": "PEFT", "seconds": {"limit": 1.0, "PEFT": ratio, "ours": 1.0},
        "peer_over_ours": {"ours": ratio}, "over_limit": {"ours": 1.05, "PEFT": 1.3},
        "saved_mib": {"limit": 100.0, "PEFT": 200.0, "ours": 120.0}, "differs": {"ours": 1.5e-6},
    }  # fmt: skip
    return {
        "title": "a title", "rounds": 3, "cases": [case], "versions": {"torch": "9.9"}, "machine": measure.machine(),
    }  # fmt: skip


def test_the_readme_is_made_from_the_results(tmp_path: Path) -> None:
    folder, readme = tmp_path / "results", tmp_path / "README.md"
    folder.mkdir()
    readme.write_text(f"Before.\n{table.BEGIN}\nold\n{table.END}\nAfter.\n")
    gpu = {"workloads": [{"workload": "8B", "error": "no room"}], "rounds": 8, "device": "a card", "versions": {}}
    (folder / "gpu.json").write_text(json.dumps(gpu))
    for ratio in (1.23, 1.02):
        (folder / "W1.json").write_text(json.dumps(a_report(ratio)))
        table.write_readme(folder)
        text = readme.read_text()
        assert text.startswith("Before.\n")
        assert text.endswith("After.\n")
        assert "old" not in text
        line = next(line for line in text.splitlines() if "a title" in line)
        assert f" p=0 | ours | **{ratio:.2f}** | 1.05 | 1.30 | 120 | 200 |" in line
        assert ("| ≥ 1.15 | 1.23 |" in text) == (ratio > 1.15)
        assert "| ≤ 0.80 | 0.60 |" in text
        assert "torch 9.9" in text
        assert "a card" in text
        assert "| 8B | no room |" in text
    assert (folder / table.PICTURE).read_bytes().startswith(b"\x89PNG")


def test_what_is_committed_agrees() -> None:
    text = (table.RESULTS.parent / "README.md").read_text(encoding="utf-8")
    made = text[text.index(table.BEGIN) + len(table.BEGIN) : text.index(table.END)]
    assert made.strip() == table.section(table.RESULTS).strip()
