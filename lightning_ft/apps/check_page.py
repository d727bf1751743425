"""A check as one HTML page that needs nothing beside itself: the findings, and plots of what was looked at."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping
from html import escape
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lightning_ft.data.quality.confidence import LEAST
from lightning_ft.data.quality.findings import KINDS, Rows, excerpt
from lightning_ft.data.quality.labels import label_counts
from lightning_ft.data.quality.tokens import histogram

if TYPE_CHECKING:
    from lightning_ft.data.quality import Examined
    from lightning_ft.data.quality.findings import Finding

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; } .about { color: #666; }
.finding { border-left: .35rem solid; padding: .1rem 1rem; margin: 1rem 0; background: #f7f7f7; }
.finding h3 { font-size: 1rem; margin: .4rem 0 0; } .finding p { margin: .2rem 0 .5rem; overflow-wrap: anywhere; }
.error { border-color: #c0392b; } .warning { border-color: #d98e04; } .note { border-color: #5b8db8; }
.finding ul { margin: 0 0 .5rem; padding-left: 1.2rem; color: #555; overflow-wrap: anywhere; }
summary { cursor: pointer; color: #555; } .plots { display: flex; flex-wrap: wrap; gap: 1rem; }
.plots svg { flex: 1 1 25rem; max-width: min(100%, 33rem); height: auto; }
td, th { text-align: left; padding: .1rem 1rem .1rem 0; }
"""
_COLORS = {"train": "#3b6ea8", "validation": "#e0a030", "test": "#5a9e6f"}
_MOST_LABELS = 20


def page(found: Examined, rows: Mapping[str, Rows], record: Mapping[str, Any]) -> str:
    """The page.

    Args:
        found: what was found.
        rows: what was looked at.
        record: what check.json says of it.
    """
    sizes = ", ".join(f"{split} {count:,}" for split, count in record["rows"].items())
    title = f"Check of {record['data']}"
    findings = "\n".join(_finding(finding) for finding in found.findings) or "<p>Nothing was found.</p>"
    fixed = "".join(f"<li>{escape(split)}: {escape(said)}</li>" for split, said in (record["fix"] or {}).items())
    fixed = f"<h2>The cleaned copy</h2><ul>{fixed}</ul>" if fixed else ""
    kinds = "".join(f"<tr><td>{kind.replace('_', ' ')}</td><td>{escape(KINDS[kind])}</td></tr>" for kind in KINDS)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>{escape(title)}</h1>
<p class="about">Rows: {sizes}; counted from 1 in each split, a header not included.
Base: {escape(record["model"])}, of which {record["limit"]:,} tokens of a text are read. {escape(record["time"])}.
In what is quoted, personal data are replaced.</p>
<h2>Findings</h2>
{findings}
{fixed}
<h2>Plots</h2>
<div class="plots">{"".join(_svg(figure) for figure in figures(found, rows, record["limit"]))}</div>
<h2>What was looked for</h2>
<table>{kinds}</table>
</body></html>
"""


def figures(found: Examined, rows: Mapping[str, Rows], limit: int) -> list[Figure]:
    """Lengths with the cut; labels by split, where they are classes; how far embeddings agree with them, if asked."""
    drawn = [_plot(lambda axes: _lengths(axes, found, limit))]
    counts = label_counts(rows)
    if counts:
        drawn.append(_plot(lambda axes: _labels(axes, counts)))
    if found.confidence is not None:
        drawn.append(_plot(lambda axes: _confidence(axes, found)))
    return drawn


def _finding(finding: Finding) -> str:
    examples = "".join(f"<li>{escape(example)}</li>" for example in finding.examples)
    examples = f"<ul>{examples}</ul>" if examples else ""
    rows = ", ".join(map(str, finding.rows))
    rows = (
        f"<details><summary>all {len(finding.rows):,} rows</summary>{rows}</details>" if len(finding.rows) > 10 else ""
    )
    return (
        f'<div class="finding {finding.severity}"><h3>{finding.kind.replace("_", " ")} in {escape(finding.split)}'
        f" ({finding.severity})</h3><p>{escape(finding.message)}</p>{examples}{rows}</div>"
    )


def _plot(draw: Callable[[Any], None]) -> Figure:
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    draw(axes)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        figure.legend(loc="outside lower center", ncols=4, frameon=False)  # where it covers nothing
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _lengths(axes: Any, found: Examined, limit: int) -> None:
    lengths = {split: its.lengths for split, its in found.tokens.items()}
    edges, _ = histogram([n for its in lengths.values() for n in its], limit)
    bottom = np.zeros(len(edges) - 1)
    for split, its in lengths.items():
        counts = np.histogram(its, edges)[0]
        axes.bar(edges[:-1], counts, np.diff(edges), bottom, align="edge", color=_COLORS.get(split), label=split)
        bottom = bottom + counts
    if edges[-1] > limit:
        axes.axvline(limit + 1, color="#c0392b", linestyle="--", label=f"cut at {limit:,}")
    axes.set(title="Length of the texts", xlabel="tokens", ylabel="texts", xlim=(max(0, edges[0]), edges[-1]))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def _labels(axes: Any, counts: Mapping[str, Mapping[str, int]]) -> None:
    """The share of each label in each split; of many labels the most frequent and the rarest."""
    total: dict[str, int] = {}
    for its in counts.values():
        for name, n in its.items():
            total[name] = total.get(name, 0) + n
    names = sorted(total, key=lambda name: -total[name])
    if len(names) > _MOST_LABELS:
        names = [*names[: _MOST_LABELS // 2], *names[-_MOST_LABELS // 2 :]]
    height = 0.8 / len(counts)
    for i, (split, its) in enumerate(counts.items()):
        shares = [its.get(name, 0) / sum(its.values()) for name in names]
        axes.barh(np.arange(len(names)) + i * height, shares, height, color=_COLORS.get(split), label=split)
    axes.set_yticks(np.arange(len(names)) + 0.4 - height / 2, [excerpt(name, 24).replace("$", r"\$") for name in names])
    axes.set(title="Share of each label", ylim=(len(names) - height / 2, -0.2 - height / 2))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))


def _confidence(axes: Any, found: Examined) -> None:
    assert found.confidence is not None
    axes.hist(found.confidence.own, np.linspace(0, 1, 41), color=_COLORS["train"], label="rows")
    axes.axvline(LEAST, color="#c0392b", linestyle="--", label=f"{LEAST:.0%}: a suspicious label has no more")
    axes.set(
        title="What the base's embeddings give the label",
        xlabel="cross-validated probability",
        ylabel="rows",
        xlim=(0, 1),
    )
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def _svg(figure: Figure) -> str:
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}), warnings.catch_warnings():
        # The browser has characters that matplotlib's font lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(file, format="svg")
    text = file.getvalue()
    return text[text.index("<svg") :]
