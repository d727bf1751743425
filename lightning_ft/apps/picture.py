"""A comparison to look at: quality over the share of parameters trained, and a bar a method for each other cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter
from matplotlib.transforms import Bbox

from lightning_ft.apps.records import (
    COSTS,
    Cost,
    Record,
    bare_model,
    by_method,
    deviation,
    digits,
    mean,
    title,
)
from lightning_ft.apps.report import score_name
from lightning_ft.tasks.task import score_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation

_SHARE, *_BARS = COSTS

# The places that are tried for a dot's name: so many points away, in these directions, right ones first.
_DISTANCES = (9, 16, 26, 40, 60, 90)
_ANGLES = np.pi / 8 * np.array([0, 1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 6, -6, 7, -7, 8])


def picture(records: Sequence[Record], data: str) -> Figure:
    """The figure; a method has the same colour in all its panels.

    Args:
        records: of which at least one is of a finished run.
        data: the name of what they were trained on.
    """
    groups = by_method(records)
    score = next(iter(groups.values()))[0]["monitor"].replace("val/", "test/", 1)
    palette = colormaps["tab10" if len(groups) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    colors = {method: palette[i % len(palette)] for i, method in enumerate(groups)}
    figure = Figure(figsize=(13, max(5.0, 2.0 + 0.6 * len(groups))), layout="constrained")
    figure.suptitle(title(records, data))
    layout: list[Any] = [["quality", _BARS[0].key, _BARS[1].key], ["quality", _BARS[2].key, _BARS[3].key]]
    panels = figure.subplot_mosaic(layout, width_ratios=[1.7, 1, 1])
    for i, cost in enumerate(_BARS):
        _bars(panels[cost.key], groups, cost, colors)
        panels[cost.key].set_yticks(range(len(groups)), list(groups) if i % 2 == 0 else [""] * len(groups))
    _say_of_latency(panels["latency_ratio"], groups, bare_model(records))
    names = _scatter(panels["quality"], groups, score, colors)
    figure.draw_without_rendering()  # from here on it's known what lies where
    _place(panels["quality"], names, [deviation(group, score) for group in groups.values()])
    return figure


def _bars(axes: Axes, groups: dict[str, list[Record]], cost: Cost, colors: dict[str, Any]) -> None:
    values = [cost.scale * mean(group, cost.key) for group in groups.values()]
    errors = [cost.scale * deviation(group, cost.key) for group in groups.values()]
    bars = axes.barh(range(len(groups)), values, xerr=errors if any(errors) else None, color=list(colors.values()))
    axes.bar_label(bars, [digits(value) for value in values], padding=4)
    axes.set_title(f"{cost.name} ({cost.unit})")
    axes.invert_yaxis()
    if cost.log:
        axes.set_xscale("log")
    axes.margins(x=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _say_of_latency(axes: Axes, groups: dict[str, list[Record]], bare: str | None) -> None:
    unmerged = [bar for bar, g in zip(axes.patches, groups.values(), strict=True) if g[0]["merged"] is False]
    for bar in unmerged:
        bar.set(hatch="///", edgecolor="white", linewidth=0)
    axes.set_xlabel("\n".join(filter(None, [bare, "hatched: can't be merged" if unmerged else None])))


def _scatter(axes: Axes, groups: dict[str, list[Record]], score: str, colors: dict[str, Any]) -> list[Annotation]:
    """A dot a method; returns their names, which lie on the dots."""
    names = []
    for method, group in groups.items():
        at = mean(group, _SHARE.key), mean(group, score)
        axes.errorbar(
            *at, yerr=deviation(group, score) or None, fmt="o", ms=10, mec="white", capsize=3, color=colors[method]
        )
        name = axes.annotate(method, at, (0, 0), textcoords="offset points", ha="center", va="center", fontsize=11)
        name.set(in_layout=False, color=[0.7 * part for part in colors[method]])
        name.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})
        names.append(name)
    axes.set(xscale="log", xlabel="share of parameters trained", ylabel=f"test {score_name(score)}")
    axes.margins(0.16)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
    if score_of(score).percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(alpha=0.3)
    return names


def _place(axes: Axes, names: Sequence[Annotation], errors: Sequence[float]) -> None:
    """Move each name to the nearest place beside its dot where it meets nothing else; if there is none, it stays."""
    point = axes.figure.dpi / 72
    frame, pixels = axes.get_window_extent(), axes.transData.transform
    dots = dict(zip(names, pixels([name.xy for name in names]), strict=True))
    heights = [2 * (pixels((1, error)) - pixels((1, 0)))[1] for error in errors]
    taken = [
        _box(dot, (10 * point, max(height, 10 * point))) for dot, height in zip(dots.values(), heights, strict=True)
    ]
    for distance in _DISTANCES:
        for name, dot in list(dots.items()):
            size = np.array(name.get_window_extent().size)
            shifts = [np.array([np.cos(a), np.sin(a)]) * (distance * point + size / 2) for a in _ANGLES]
            free = [s for s in shifts if _is_free(_box(dot + s, size + 4 * point), frame, taken)]
            if free:
                del dots[name]
                taken.append(_box(dot + free[0], size + 4 * point))
                right, up = (free[0] / point).tolist()
                name.set_position((right, up))
                if distance > _DISTANCES[0]:  # a line says whose it is
                    line = {"arrowstyle": "-", "color": "0.6", "shrinkA": 0, "shrinkB": 5}
                    axes.annotate("", name.xy, (right, up), textcoords="offset points", arrowprops=line, zorder=1)


def _box(center: Any, size: Any) -> Bbox:
    return Bbox([center - np.divide(size, 2), center + np.divide(size, 2)])


def _is_free(box: Bbox, frame: Bbox, taken: Sequence[Bbox]) -> bool:
    inside = frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1
    return inside and box.count_overlaps(taken) == 0
