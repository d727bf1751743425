"""LoRA and its kin beside stock PEFT on this machine's CPU: the table and the picture of benchmarks/README.md.

    python -m benchmarks                        # make bench: all of it, in half an hour on 2 cores
    python -m benchmarks --only W1 W2-bf16      # some; the others' results stay as they are
    python -m benchmarks --only                 # none: the table is made anew from the results

Each workload writes benchmarks/results/NAME.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import inference, steps, training
from benchmarks.measure import Case, figures, machine, peak_mib, versions
from benchmarks.models import FULL, TINY, Size
from benchmarks.table import RESULTS, write_readme

SIZES = {"full": FULL, "tiny": TINY}


@dataclass(frozen=True)
class Workload:
    """A part of the suite.

    Attributes:
        title: for the table.
        rounds: how many turns count, unless others are asked for.
        cases: what takes turns in it.
        measure: for one that measures in its own way, the figures of its cases.
        peak: the cases of which memory is measured too, in processes of their own.
        in_bf16: that its products are, which a CPU without instructions for it takes minutes for.
    """

    title: str
    rounds: int
    cases: Callable[[Size], Iterator[Case]] | None = None
    measure: Callable[[Size, int], Iterator[dict[str, Any]]] | None = None
    peak: tuple[str, ...] = ()
    in_bf16: bool = False

    def figures(self, size: Size, rounds: int) -> Iterator[dict[str, Any]]:
        """Of each case."""
        if self.measure is not None:
            yield from self.measure(size, rounds)
        elif self.cases is not None:
            yield from (figures(case, rounds) for case in self.cases(size))


WORKLOADS = {
    "W1": Workload("MiniLM, 32 × 128 tokens, all linear layers, r=8, fp32", 6, steps.encoder, peak=("p=0.05",)),
    "W1s": Workload("W1 at 4 × 32 tokens", 40, steps.small_encoder),
    "W2-fp32": Workload(
        "Llama-style, 768 wide, 4 layers, vocabulary 32,000, 4 × 512 tokens, r=16, fp32", 10,
        partial(steps.language_model, dtype=torch.float32),
    ),
    "W2-bf16": Workload(
        "W2-fp32 in bf16", 10, partial(steps.language_model, dtype=torch.bfloat16), in_bf16=True
    ),
    "W3": Workload(
        "W2-bf16 over NF4 weights", 10,
        partial(steps.language_model, dtype=torch.bfloat16, in_4_bits=True), in_bf16=True,
    ),
    "W4": Workload("prompt tuning, 20 virtual tokens, on W1's and W2's base", 8, steps.prompts),
    "W5": Workload("one epoch of the bundled reviews, with validation and checkpoint", 2, measure=training.epoch),
    "W6": Workload("inference with one adapter", 3, inference.one_adapter),
    "W7": Workload("a batch of 32 × 64 tokens whose rows belong to different adapters", 20, inference.many_adapters),
    "callback": Workload("a step under Lightning, 4 × 32 tokens", 200, measure=training.callback),
}  # fmt: skip


def measure(name: str, size: str, rounds: int | None) -> dict[str, Any]:
    """All figures of a workload, and on what they were measured."""
    work = WORKLOADS[name]
    rounds = rounds or work.rounds
    cases = []
    for found in work.figures(SIZES[size], rounds):
        if found["case"] in work.peak:
            found["peak_mib"] = {run: peak_apart(name, found["case"], run, size) for run in found["seconds"]}
        cases.append(found)
        print(f"{name} {found['case']}: {_short(found)}", flush=True)
        gc.collect()
    return {"title": work.title, "rounds": rounds, "cases": cases, "versions": versions(), "machine": machine()}


def peak_apart(name: str, case: str, run: str, size: str) -> float:
    """How far memory rises in three steps, in MiB, in a process that does nothing else."""
    command = [sys.executable, "-m", "benchmarks", "--size", size, "--threads", str(torch.get_num_threads())]
    done = subprocess.run(
        [*command, "--peak", name, case, run], check=True, capture_output=True, text=True,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, help="how many turns count; each workload has its own number")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", choices=list(SIZES), default="full", help="tiny: to see that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the results' folder; README.md is beside it")
    parser.add_argument("--peak", nargs=3, metavar=("WORKLOAD", "CASE", "RUN"), help="print memory in MiB, no more")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    if options.peak:
        name, wanted, run = options.peak
        cases = WORKLOADS[name].cases
        assert cases is not None
        found = next(case for case in cases(SIZES[options.size]) if case.name == wanted)
        print(peak_mib(found.runs[run]))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    for name in _suitable() if options.only is None else options.only:
        report = measure(name, options.size, options.rounds)
        (options.out / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
        print(f"{name} is done at {time.perf_counter() - begin:.0f} s", flush=True)
    write_readme(options.out)


def _suitable() -> Iterator[str]:
    """The workloads that this machine gets through."""
    for name, work in WORKLOADS.items():
        if not work.in_bf16 or torch.ops.mkldnn._is_mkldnn_bf16_supported():
            yield name
        else:
            print(f"{name} is left out: this CPU has no products in bf16. --only {name} takes hours.", flush=True)


def _short(found: dict[str, Any]) -> str:
    return ", ".join(f"{run} {value:.2f}" for run, value in found["peer_over_ours"].items())


if __name__ == "__main__":
    main()
