"""The table and the picture of benchmarks/README.md, made from the results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PICTURE = "speed.png"
BEGIN, END = "<!-- made by python -m benchmarks: begin -->", "<!-- end -->"
ORDER = ["W1", "W1s", "W2-fp32", "W2-bf16", "W3", "W4", "W5", "W6", "W7", "callback"]

FASTER, OF_LIMIT, SAVED, PEAK = "times as fast", "of the limit's time", "of its saved bytes", "of its peak memory"
AIMS = [
    ("W1", "p=0", FASTER, 1.15), ("W1", "p=0", OF_LIMIT, 1.12), ("W1", "p=0", SAVED, 0.80),
    ("W1", "p=0.05", FASTER, 1.38), ("W1", "p=0.05", OF_LIMIT, 1.18), ("W1", "p=0.05", SAVED, 0.55),
    ("W1", "p=0.05", PEAK, 0.55),
    ("W1s", "p=0", FASTER, 1.12), ("W1s", "p=0.05", FASTER, 1.12),
    ("W2-fp32", "p=0", FASTER, 1.05), ("W2-fp32", "p=0", OF_LIMIT, 1.08), ("W2-fp32", "p=0", SAVED, 0.70),
    ("W2-fp32", "p=0.05", FASTER, 1.15), ("W2-fp32", "p=0.05", OF_LIMIT, 1.08), ("W2-fp32", "p=0.05", SAVED, 0.70),
    ("W2-bf16", "p=0", FASTER, 1.12), ("W2-bf16", "p=0", OF_LIMIT, 1.08), ("W2-bf16", "p=0", SAVED, 0.65),
    ("W2-bf16", "p=0.05", FASTER, 1.35), ("W2-bf16", "p=0.05", OF_LIMIT, 1.08), ("W2-bf16", "p=0.05", SAVED, 0.65),
    ("W3", "p=0", FASTER, 1.12), ("W3", "p=0", OF_LIMIT, 1.05), ("W3", "p=0", SAVED, 0.72),
    ("W4", "language model", FASTER, 1.05), ("W4", "language model", SAVED, 0.75),
    ("W5", "default collation", FASTER, 2.5), ("W5", "group_by_length", FASTER, 1.3),
    ("W7", "8 adapters", FASTER, 1.5),
    ("callback", "small batch", FASTER, 0.99), ("callback", "small batch", OF_LIMIT, 1.05),
]  # fmt: skip
"""What the suite is to reach: at least so many times as fast, at most so much of the rest."""


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The results that are there, by workload."""
    return {name: json.loads(path.read_text()) for name in ORDER if (path := folder / f"{name}.json").is_file()}


def write_readme(folder: Path) -> None:
    """Put the table between the marks of the README beside the folder, and the picture into the folder."""
    readme, results = folder.parent / "README.md", read(folder)
    before, after = f"{BEGIN}\n", f"{END}\n"
    if readme.is_file():
        text = readme.read_text(encoding="utf-8")
        before, after = text[: text.index(BEGIN)] + before, text[text.index(END) :]
    readme.write_text(f"{before}\n{section(folder)}\n{after}", encoding="utf-8")
    if results:
        draw(results, folder / PICTURE)


def section(folder: Path) -> str:
    """What is between the marks."""
    results, parts = read(folder), []
    if results:
        picture = f"![How many times as fast as the peer]({folder.name}/{PICTURE})"
        parts += [picture, table(results), aims(results), "\n".join(_measured_on(results))]
    if (gpu := folder / "gpu.json").is_file():
        from benchmarks.gpu import table as gpu_table

        found = json.loads(gpu.read_text())
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        about = f"On a GPU (`benchmarks/gpu.py`; {found['device']}, {found['rounds']} rounds; {versions}):"
        parts += [about, gpu_table(found["workloads"])]
    return "\n\n".join(parts) + "\n"


def table(results: dict[str, dict[str, Any]]) -> str:
    """One line for each variant of ours."""
    lines = [
        "| workload | case | | peer's time / ours | ours / limit | peer / limit | saved MiB: ours | peer |"
        " peak MiB: ours | peer | differs by |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, report in results.items():
        title: str | None = f"**{name}** {report['title']}"
        for case in report["cases"]:
            for variant in case["peer_over_ours"]:
                lines.append(_line(title, case, variant))
                title = None
    return "\n".join(lines)


def aims(results: dict[str, dict[str, Any]]) -> str:
    """What is aimed at, and what was reached: by default, and by the best that can be asked for."""
    lines = ["| aim, against the peer | | aimed at | ours | best variant |", "|---|---|---|---|---|"]
    for name, wanted, figure, bound in AIMS:
        for case in results.get(name, {"cases": []})["cases"]:
            if case["case"] == wanted:
                found = _figures(case, figure)
                best = (max if figure == FASTER else min)(found.values())
                sign = "≥" if figure == FASTER else "≤"
                told = [_told(value, bound, figure) for value in (found["ours"], best)]
                lines.append(f"| {name} {wanted} | {figure} | {sign} {bound:.2f} | {told[0]} | {told[1]} |")
    return "\n".join(lines)


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """How many times as fast as the peer each variant is, with where the limit is."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bars = [
        (f"{name}  {case['case']}" + ("" if variant == "ours" else f"  ({variant})"), ratio, variant == "ours",
         case["over_limit"].get(case["peer"]))
        for name, report in results.items()
        for case in report["cases"]
        for variant, ratio in case["peer_over_ours"].items()
    ]  # fmt: skip
    figure = Figure(figsize=(8, 0.7 + 0.24 * len(bars)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = range(len(bars))
    axes.barh(places, [bar[1] for bar in bars], color=["#4c72b0" if bar[2] else "#a8bbdb" for bar in bars])
    for place, (_, ratio, default, limit) in zip(places, bars, strict=True):
        axes.annotate(f"{ratio:.2f}", (0, place), (4, 0), textcoords="offset points", ha="left", va="center",
                      color="white" if default else "black", fontsize=7)  # fmt: skip
        if limit is not None:
            axes.plot([limit, limit], [place - 0.4, place + 0.4], color="#c44e52", linewidth=2)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(places, [bar[0] for bar in bars], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as the peer; red: the limit, with the peer's loss")
    axes.margins(y=0.01)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _line(title: str | None, case: dict[str, Any], variant: str) -> str:
    peer = case["peer"]

    def of(figure: str, run: str, form: str) -> str:
        value = case.get(figure, {}).get(run)
        return "" if value is None else format(value, form)

    cells = [
        title or "", case["case"] if case["peer"] == "PEFT" else f"{case['case']}, peer: {peer}", variant,
        f"**{of('peer_over_ours', variant, '.2f')}**",
        of("over_limit", variant, ".2f"), of("over_limit", peer, ".2f"),
        of("saved_mib", variant, ",.0f"), of("saved_mib", peer, ",.0f"),
        of("peak_mib", variant, ",.0f"), of("peak_mib", peer, ",.0f"), of("differs", variant, ".0e"),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _figures(case: dict[str, Any], figure: str) -> dict[str, float]:
    """By variant of ours."""
    ours = case["peer_over_ours"]
    if figure == FASTER:
        return ours
    if figure == OF_LIMIT:
        return {name: case["over_limit"][name] for name in ours}
    found = case["saved_mib" if figure == SAVED else "peak_mib"]
    return {name: found[name] / found[case["peer"]] for name in ours}


def _told(value: float, bound: float, figure: str) -> str:
    met = value >= bound if figure == FASTER else value <= bound
    return f"{value:.2f}" if met else f"{value:.2f}, missed"


def _measured_on(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Once for each machine and set of versions."""
    told: dict[str, list[str]] = {}
    for name, report in results.items():
        machine = report["machine"]
        versions = ", ".join(f"{module} {version}" for module, version in report["versions"].items())
        about = (
            f"{machine['cpu']} ({machine['instructions']}), {machine['cores']} cores, {machine['threads']} threads,"
            f" {machine['system']}, Python {machine['python']}; {versions}"
        )
        told.setdefault(about, []).append(f"{name} ({report['rounds']} rounds)")
    for about, names in told.items():
        yield f"{', '.join(names)}: {about}."
