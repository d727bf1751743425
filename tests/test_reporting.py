"""Reporting: whatever the logger can, and none of them stops a run."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.loggers.logger import DummyLogger
from matplotlib.figure import Figure
from matplotlib.image import imread

from lightning_ft.reporting import heat_map, log_figure, log_folder, log_table

COLUMNS = ["label", "share"]
ROWS: list[list[Any]] = [["good, really", 0.5], ["差", 1.0]]


@pytest.fixture
def figure() -> Figure:
    figure = Figure(figsize=(2, 1))
    figure.add_subplot().plot([1, 2])
    return figure


class Bare(Logger):
    """The least that Lightning asks of a logger."""

    name = "bare"
    version = 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None: ...

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...


class Calls:
    """Keeps what is called with what."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def keep(self, method: str) -> Any:
        return lambda *args, **kwargs: self.calls.append((method, args, kwargs))


class LikeTensorBoard(Bare):
    """Figures by its experiment, nothing else, and a folder."""

    def __init__(self, folder: Path) -> None:
        self.experiment = Calls()
        self.experiment.add_figure = self.experiment.keep("add_figure")
        self.folder = folder

    @property
    def log_dir(self) -> str:
        return str(self.folder)


class LikeWandb(Bare):
    """Images, tables and artifacts; a folder too, which then isn't used."""

    log_dir: str | None = None  # Lightning's is a property

    def __init__(self, folder: Path) -> None:
        self.own = Calls()
        self.log_image, self.log_table = self.own.keep("log_image"), self.own.keep("log_table")
        self.use_artifact = self.own.keep("use_artifact")
        self.experiment = Calls()
        self.experiment.log_artifact = self.experiment.keep("log_artifact")
        self.log_dir = str(folder)


def test_csv_logger_gets_files(tmp_path: Path, figure: Figure) -> None:
    logger = CSVLogger(tmp_path)
    log_figure([logger], "test/confusion", figure, step=3)
    log_table([logger], "test/per_class", COLUMNS, ROWS)
    folder = Path(logger.log_dir)
    assert imread(folder / "test_confusion.png").ndim == 3
    with (folder / "test_per_class.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [COLUMNS, *([str(value) for value in row] for row in ROWS)]


def test_logger_with_figures_gets_them_and_a_file_for_the_table(tmp_path: Path, figure: Figure) -> None:
    logger = LikeTensorBoard(tmp_path / "new")
    log_figure([logger], "test/confusion", figure, step=3)
    log_table([logger], "test/per_class", COLUMNS, ROWS)
    [(method, args, _)] = logger.experiment.calls
    assert (method, args) == ("add_figure", ("test/confusion", figure, 3))
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["test_per_class.csv"]


def test_logger_with_images_tables_and_artifacts_gets_them_all(tmp_path: Path, figure: Figure) -> None:
    logger = LikeWandb(tmp_path / "unused")
    log_figure([logger], "test/confusion", figure, step=3)
    log_table([logger], "test/per_class", COLUMNS, ROWS)
    log_folder([logger], "adapter-a/b c", tmp_path, "adapter")
    assert logger.own.calls == [
        ("log_image", ("test/confusion", [figure]), {"step": 3}),
        ("log_table", ("test/per_class",), {"columns": COLUMNS, "data": ROWS}),
    ]
    [(method, args, kwargs)] = logger.experiment.calls
    assert (method, args) == ("log_artifact", (str(tmp_path),))
    assert kwargs == {"name": "adapter-a-b-c", "type": "adapter"}
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize(
    "logger",
    [
        DummyLogger(),
        pytest.param(Bare()),
    ],
    ids=["Lightning's dummy", "the bare least"],
)
def test_logger_with_none_of_these_survives(tmp_path: Path, figure: Figure, logger: Logger) -> None:
    log_table([logger], "test/per_class", COLUMNS, ROWS)
    log_folder([logger], "adapter", tmp_path, "adapter")
    log_figure([logger], "test/confusion", figure, step=3)
    assert list(tmp_path.iterdir()) == []


def test_each_of_several_loggers_gets_its_own(tmp_path: Path, figure: Figure) -> None:
    loggers = [CSVLogger(tmp_path, "one"), LikeTensorBoard(tmp_path), CSVLogger(tmp_path, "two")]
    log_figure(loggers, "figure", figure, step=0)
    assert sorted(file.parent.parent.name for file in tmp_path.rglob("figure.png")) == ["one", "two"]
    assert len(loggers[1].experiment.calls) == 1
    log_table([], "table", COLUMNS, ROWS)


@pytest.mark.parametrize(
    "name",
    [
        "adapter-2026-01-31_12-00-00",
        "adapter-a/b c:d",
        pytest.param("adapter-größe"),
    ],
)
def test_artifact_names_are_such_as_wandb_takes(tmp_path: Path, name: str) -> None:
    wandb = pytest.importorskip("wandb")
    logger = LikeWandb(tmp_path)
    log_folder([logger], name, tmp_path, "adapter")
    [(_, _, kwargs)] = logger.experiment.calls
    assert wandb.Artifact(**kwargs).name.startswith("adapter-")


@pytest.mark.parametrize(
    ("paths", "columns", "rows"),
    [
        (["bert.encoder.layer.0.query", "bert.encoder.layer.1.query", "bert.encoder.layer.1.output.dense"],
         ["0", "1"], ["query", "output.dense"]),
        (["bert.encoder.layer.0.query", "bert.encoder.layer.1.query", "bert.pooler.dense"],
         ["0", "1", ""], ["query", "pooler.dense"]),
        (["t5.encoder.block.0.layer.1.q", "t5.decoder.block.0.layer.1.q", "t5.decoder.block.10.layer.1.q"],
         ["0", "10"], ["encoder.block.layer.1.q", "decoder.block.layer.1.q"]),
        (["net.encoder.0", "net.encoder.2"], ["0", "2"], ["encoder"]),
        (["h.3.c_attn"], ["3"], ["c_attn"]),
        (["body"], [""], ["body"]),
    ],
    ids=["layers", "a module in none", "two lists of layers", "a Sequential", "one layer", "one module"],
)  # fmt: skip
def test_a_heat_map_has_a_column_for_each_layer_and_a_row_for_each_kind(
    paths: list[str], columns: list[str], rows: list[str]
) -> None:
    axes = heat_map(dict(zip(paths, range(3), strict=False)), 12, "rank").axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == columns
    assert [text.get_text() for text in axes.get_yticklabels()] == rows
    assert [text.get_text() for text in axes.texts] == [str(i) for i in range(len(paths))]
