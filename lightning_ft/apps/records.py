"""What a comparison is made of: records, one a run; and the table and the files made of them.

A record is flat, of plain values: ``method``, ``seed``, ``folder`` and ``status``. Of a failed run it has ``reason``;
of a finished one the scores under their own names (``test/accuracy``, …, ``val/accuracy``, …), which of them tells the
best (``monitor``, ``mode``), the :data:`COSTS`, and with these ``parameters``, ``trained``, ``merged`` (None where
there was nothing to merge), ``steps``, ``lr``, ``device``, the rows of the splits, and the quartiles of the latency's
ratio.
"""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from lightning_ft.apps.report import score_name
from lightning_ft.apps.runs import RESULTS
from lightning_ft.files.card import versions
from lightning_ft.tasks.task import score_of

Record = Mapping[str, Any]

COMPARISON = "compare.json"

_MERGED = {True: "yes", False: "no", None: "–"}


class Cost(NamedTuple):
    """A figure of a record that is better the smaller it is, and what people read of it."""

    key: str
    name: str
    short: str
    unit: str
    scale: float = 1.0
    log: bool = False
    """Whether methods differ in it by orders of magnitude."""


COSTS = (
    Cost("trained_share", "parameters trained", "trained", "%", 100),
    Cost("seconds", "training time", "time", "s"),
    Cost("latency_ratio", "inference", "latency", "× bare"),  # two runs' milliseconds tell of the machine's moods too
    Cost("peak_memory_mib", "peak memory in training", "memory", "MiB"),
    Cost("adapter_bytes", "size on disk", "size", "MiB", 2**-20, log=True),
)


def finished(folder: Path) -> dict[str, Any]:
    """What a record says of a finished run, from the run's own results."""
    results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    latency = results["latency"] or {"ms": None, "ratio": None, "quartiles": [None, None], "merged": None}
    low, high = latency["quartiles"]
    return {
        "status": "finished",
        **results["after"],
        **results["validation"],
        "monitor": results["monitor"],
        "mode": results["mode"],
        "trained_share": results["trained"] / results["parameters"],
        **{key: results[key] for key in ("seconds", "peak_memory_mib", "adapter_bytes")},
        "latency_ms": latency["ms"],
        "latency_ratio": latency["ratio"],
        "latency_ratio_q1": low,
        "latency_ratio_q3": high,
        "merged": latency["merged"],
        **{key: results[key] for key in ("parameters", "trained", "steps", "lr", "device")},
        **{f"rows_{split}": count for split, count in results["rows"].items()},
    }


def about(config: DictConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """What all runs of a comparison have in common."""
    return {
        "overrides": list(overrides),
        "data": str(OmegaConf.select(config, "data.path") or "several data sets"),
        "model": str(config.model.name),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": {**versions(), "python": platform.python_version()},
        "hardware": {
            "machine": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
    }


def write(folder: Path, records: Sequence[Record], about: Mapping[str, Any]) -> None:
    """Write compare.csv and compare.json."""
    text = json.dumps({**about, "records": list(records)}, indent=2)
    (folder / COMPARISON).write_text(text + "\n", encoding="utf-8")
    columns, rows = columns_and_rows(records)
    with (folder / "compare.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])


def columns_and_rows(records: Sequence[Record]) -> tuple[list[str], list[list[Any]]]:
    """The records as a table; None where one lacks what another has."""
    columns = list(dict.fromkeys(key for record in records for key in record))
    return columns, [[record.get(key) for key in columns] for record in records]


def scores(records: Iterable[Record]) -> list[str]:
    """The names of the test scores."""
    keys = dict.fromkeys(key for record in records for key in record)
    return [key for key in keys if key.startswith("test/") and key != "test/loss"]


def leading(groups: Mapping[str, Sequence[Record]], score: str, mode: str | None = None) -> str:
    """The method with the best mean of ``score``, which is the largest or, in mode ``min``, the smallest."""
    choose = min if (mode or score_of(score).better) == "min" else max
    return choose(groups, key=lambda method: mean(groups[method], score))


def by_method(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The finished runs of each method that has any, in the order of the records."""
    methods = dict.fromkeys(record["method"] for record in records)
    groups = {m: [r for r in records if r["method"] == m and r["status"] == "finished"] for m in methods}
    return {method: group for method, group in groups.items() if group}


def best(records: Sequence[Record]) -> Record | None:
    """The best run of the method with the best mean, on the validation rows: a choice by the test rows would flatter.

    None if no run came to its end.
    """
    groups = by_method(records)
    if not groups:
        return None
    first = next(iter(groups.values()))[0]
    score, mode = first["monitor"], first["mode"]
    group = groups[leading(groups, score, mode)]
    choose = min if mode == "min" else max
    return choose(group, key=lambda record: float(record[score]))


def describe(record: Record) -> str:
    """One line about a run that has ended."""
    if record["status"] == "failed":
        return f"{record['folder']} failed: {record['reason']}"
    said = [f"{score_name(score)} {score_of(score).text(record[score])}" for score in scores([record])]
    return f"{record['folder']}: {', '.join(said)}; trained in {record['seconds']:,.0f} s"


def table(records: Sequence[Record], data: str) -> Table:
    """A row a method: the means over its seeds, of scores with the standard deviation. The best scores are bold."""
    groups, names = by_method(records), scores(records)
    best_of = {score: mean(groups[leading(groups, score)], score) for score in names} if groups else {}
    result = Table(title=escape(title(records, data)), title_justify="left", box=SIMPLE_HEAD, padding=0)
    result.caption, result.caption_justify = bare_model(records), "left"
    result.add_column("", no_wrap=True)
    headings = [f"{score_name(score)}\n{'%' if score_of(score).percent else ''}" for score in names] + [
        f"{cost.short}\n{cost.unit}" for cost in COSTS
    ]
    for heading in (*headings, "merged"):
        result.add_column(heading, justify="right")
    for method in dict.fromkeys(record["method"] for record in records):
        group, asked = groups.get(method), sum(record["method"] == method for record in records)
        if group is None:
            result.add_row(escape(method), "[red]failed[/red]")
            continue
        cells = []
        for score in names:
            scale, form = (100, ".1f") if score_of(score).percent else (1, ".3f")
            cell = format(scale * mean(group, score), form)
            if len(group) > 1:
                cell += f" ± {format(scale * deviation(group, score), form)}"
            cells.append(f"[bold]{cell}[/bold]" if mean(group, score) == best_of[score] else cell)
        cells += [digits(cost.scale * mean(group, cost.key)) for cost in COSTS]
        name = method if len(group) == asked else f"{method}\n({len(group)} of {asked} seeds)"
        result.add_row(escape(name), *cells, _MERGED[group[0]["merged"]])
    return result


def title(records: Sequence[Record], data: str) -> str:
    """What was compared, in a line."""
    steps = dict.fromkeys(f"{record['steps']:,}" for record in records if record["status"] == "finished")
    seeds = dict.fromkeys(str(record["seed"]) for record in records)
    plural = "s" if len(seeds) > 1 else ""
    data = data if len(data) <= 40 else f"…{data[-39:]}"
    return f"{data}: {' or '.join(steps) or 'no'} steps, seed{plural} {', '.join(seeds)}"


def bare_model(records: Sequence[Record]) -> str | None:
    """How long the model takes without what methods add, in words; None if no run tells."""
    timed = [record for record in records if record.get("latency_ms") is not None]
    if not timed:
        return None
    return f"bare: {digits(statistics.median(r['latency_ms'] / r['latency_ratio'] for r in timed))} ms a text"


def mean(group: Sequence[Record], key: str) -> float:
    """The mean over the runs that have such a figure; NaN if none has."""
    values = [float(record[key]) for record in group if record[key] is not None]
    return statistics.fmean(values) if values else float("nan")


def deviation(group: Sequence[Record], key: str) -> float:
    """The standard deviation over the runs; 0 of one run."""
    values = [float(record[key]) for record in group if record[key] is not None]
    return statistics.stdev(values) if len(values) > 1 else 0.0


def digits(value: float) -> str:
    """A number to three digits or to the unit; nothing for NaN."""
    return "" if math.isnan(value) else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
