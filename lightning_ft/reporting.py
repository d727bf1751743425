"""Tables, pictures and folders to whatever logger there is: one small helper that every logger survives."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only  # type: ignore[attr-defined]

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
