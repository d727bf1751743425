"""Tables, pictures and folders to whatever logger there is: one small helper that every logger survives."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only  # type: ignore[attr-defined]

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def heat_map(values: Mapping[str, int], top: int, label: str) -> Figure:
    """A picture of one number a module: a column for each layer of the model, a row for each kind of module in it.

    Args:
        values: the numbers, by the modules' paths.
        top: the number that has the darkest shade; 0 has the lightest.
        label: what the numbers are.
    """
    from matplotlib.figure import Figure

    places = {path: _place(path) for path in values}
    several = len({before for before, _, _ in places.values()}) > 1  # an encoder's layers and a decoder's
    named = {
        path: (layer, f"{before} {kind}".strip() if several or not kind else kind)
        for path, (before, layer, kind) in places.items()
    }
    cells = {named[path]: value for path, value in values.items()}
    layers = sorted({layer for layer, _ in cells})
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    grid = [[cells.get((layer, kind), float("nan")) for layer in layers] for kind in kinds]
    room = 0.085 * max(map(len, kinds))  # inches that the names take
    figure = Figure(figsize=(max(4.0, room + 1.6 + 0.45 * len(layers)), 1.3 + 0.42 * len(kinds)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(grid, cmap="Blues", vmin=0, vmax=top, aspect="auto")
    axes.set_xticks(range(len(layers)), ["" if layer < 0 else str(layer) for layer in layers])
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set(xlabel="layer")
    for row, kind in enumerate(kinds):
        for column, layer in enumerate(layers):
            if (value := cells.get((layer, kind))) is not None:
                color = "white" if value > 0.6 * top else "black"
                axes.text(column, row, str(value), ha="center", va="center", color=color)
    figure.colorbar(image, ax=axes, label=label)
    return figure


def _place(path: str) -> tuple[str, int, str]:
    """``encoder.layer.0.attention.query`` is ``encoder.layer``, 0, ``attention.query``; -1 where there's no number."""
    parts = path.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    layer = int(parts[number]) if number < len(parts) else -1
    return ".".join(parts[:number]), layer, ".".join(parts[number + 1 :])


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
