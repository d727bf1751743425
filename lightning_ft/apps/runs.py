"""The run folder: what `train` leaves behind, and `evaluate` and `predict` come back to.

config.yaml     the composed config, with the labels read from the data
train.log       what was said
metrics/        metrics.csv, test_per_class.csv, test_confusion_matrix.png
checkpoints/    best.ckpt and last.ckpt, of what was trained
adapter/        the adapter with its head, in PEFT's format
results.json    the figures of the table
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from lightning_ft.apps.errors import RequestError

CONFIG, ADAPTER, RESULTS = "config.yaml", "adapter", "results.json"


def save_config(folder: Path, config: DictConfig, labels: list[str]) -> None:
    """Write the composed config, interpolations kept, and the labels that the head was made for."""
    copy = OmegaConf.create(OmegaConf.to_container(config, resolve=False))
    OmegaConf.update(copy, "task.labels", labels, force_add=True)
    for key in ("data.path", "model.name"):
        given = OmegaConf.select(config, key)
        group, _, name = key.partition(".")
        if isinstance(given, str) and Path(given).exists() and not OmegaConf.is_interpolation(config[group], name):
            OmegaConf.update(copy, key, str(Path(given).resolve()))  # the run can be come back to from anywhere
    (folder / CONFIG).write_text(OmegaConf.to_yaml(copy), encoding="utf-8")


def find_run(name: str, root: Path = Path("runs")) -> Path:
    """The folder of a finished run: a path, or ``last`` for the newest one in ``runs/``.

    Raises:
        RequestError: if it isn't there, or holds no adapter.
    """
    if name == "last":
        finished = [path.parent for path in root.glob(f"**/{RESULTS}")]
        if not finished:
            raise RequestError(f"there is no finished run in '{root}'; `lightning-ft train` makes one.")
        return max(finished, key=lambda path: (path / RESULTS).stat().st_mtime)
    folder = Path(name).expanduser()
    if not (folder / CONFIG).is_file() or not (folder / ADAPTER).is_dir():
        runs = sorted(str(path.parent) for path in root.glob(f"**/{RESULTS}"))[-5:]
        there = f" The newest runs: {', '.join(runs)}." if runs else ""
        raise RequestError(f"run='{name}' isn't the folder of a finished run ({CONFIG}, {ADAPTER}/).{there}")
    return folder


def load_config(folder: Path) -> DictConfig:
    """The config of a run."""
    config = OmegaConf.load(folder / CONFIG)
    assert isinstance(config, DictConfig)
    return config
