"""Tables, pictures and folders to whatever logger there is: one small helper that every logger survives."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only  # type: ignore[attr-defined]

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def heat_map(values: Mapping[str, int], top: int, label: str) -> Figure:
    """A picture of one number a module: a column for each layer of the model, a row for each kind of module in it.

    Args:
        values: the numbers, by the modules' paths, in the model's order.
        top: the number that has the darkest shade; 0 has the lightest.
        label: what the numbers are.
    """
    from matplotlib.figure import Figure

    cells = dict(zip(_places(list(values)), values.values(), strict=True))
    layers, kinds = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))
    grid = [[cells.get((layer, kind), float("nan")) for layer in layers] for kind in kinds]
    names = 0.085 * max(map(len, kinds))  # inches
    figure = Figure(figsize=(max(4.0, names + 1.6 + 0.45 * len(layers)), 1.3 + 0.42 * len(kinds)), layout="constrained")
    axes = figure.add_subplot(xlabel="layer", facecolor="0.9")
    image = axes.imshow(grid, cmap="Blues", vmin=0, vmax=top, aspect="auto")
    axes.set_xticks(range(len(layers)), layers)
    axes.set_yticks(range(len(kinds)), kinds)
    for (layer, kind), value in cells.items():
        color = "white" if value > 0.6 * top else "black"
        axes.text(layers.index(layer), kinds.index(kind), str(value), ha="center", va="center", color=color)
    figure.colorbar(image, ax=axes, label=label)
    return figure


def confusion_matrix(counts: Any, names: Sequence[str]) -> Figure:
    """A picture of what was taken for what: a row a true label, a column a predicted one, shaded by the row's share.

    Args:
        counts: an array (labels, labels) of whole numbers.
        names: of the labels, in order.
    """
    from matplotlib.figure import Figure

    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    n = len(names)
    size = 2.2 + 0.55 * max(n, 3)
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(n), names, rotation=45 if n > 4 else 0, ha="right" if n > 4 else "center")
    axes.set_yticks(range(n), names)
    axes.set(xlabel="predicted", ylabel="true")
    for i in range(n):
        for j in range(n):
            color = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, f"{int(counts[i, j])}", ha="center", va="center", color=color)
    figure.colorbar(image, ax=axes, label="share of the true label", shrink=0.8)
    return figure


def _places(paths: Sequence[str]) -> list[tuple[str, str]]:
    """The layer and the kind of each module: of ``bert.encoder.layer.0.attention.query`` it's 0, ``attention.query``.

    Where there are several lists of layers (an encoder and a decoder) the kind says which; a module that is in none
    has no layer.
    """
    parts = [path.split(".") for path in paths]
    levels = zip(*(path[:-2] for path in parts), strict=False)
    shared = sum(1 for _ in takewhile(lambda names: len({*names}) == 1 and not names[0].isdigit(), levels))
    split = []
    for path in (path[shared:] for path in parts):
        number = next((i for i, part in enumerate(path) if part.isdigit()), None)
        split.append(("", "", path) if number is None else (".".join(path[:number]), path[number], path[number + 1 :]))
    several = len({before for before, layer, _ in split if layer}) > 1
    return [
        (layer, ".".join([before, *kind]).strip(".") if several or not kind else ".".join(kind))
        for before, layer, kind in split
    ]


@rank_zero_only
def log_figure(loggers: Iterable[Any], name: str, figure: Figure, step: int) -> None:
    """Log a matplotlib figure as ``name``: as an image where the logger shows images, else as a PNG file."""
    for logger in loggers:
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(logger, "log_image"):
            logger.log_image(name, [figure], step=step)
        elif hasattr(experiment, "add_figure"):
            experiment.add_figure(name, figure, step, close=False)
        elif (path := _file(logger, name, "png")) is not None:
            figure.savefig(path, dpi=150, bbox_inches="tight")


@rank_zero_only
def log_table(loggers: Iterable[Any], name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Log a table as ``name``: as a table where the logger shows tables, else as a CSV file."""
    for logger in loggers:
        if hasattr(logger, "log_table"):
            logger.log_table(name, columns=list(columns), data=[list(row) for row in rows])
        elif (path := _file(logger, name, "csv")) is not None:
            with path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([columns, *rows])


@rank_zero_only
def log_folder(loggers: Iterable[Any], name: str, folder: Path, kind: str) -> None:
    """Log a folder as an artifact of this kind, where the logger keeps artifacts; the folder stays anyway."""
    for logger in loggers:
        if hasattr(logger, "use_artifact"):
            logger.experiment.log_artifact(str(folder), name=re.sub(r"[^a-zA-Z0-9_.-]", "-", name), type=kind)


def _file(logger: Any, name: str, ending: str) -> Path | None:
    folder = getattr(logger, "log_dir", None)
    if folder is None:
        return None
    path = Path(folder) / f"{name.replace('/', '_')}.{ending}"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
