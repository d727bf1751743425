"""The run folder: what `train` leaves behind, and the other commands come back to.

config.yaml     the composed config, with what the task knows of the data
train.log       what was said
metrics/        metrics.csv, test_per_class.csv, test_confusion_matrix.png
checkpoints/    best.ckpt and last.ckpt, of what was trained
adapter/        the adapter with its head, in PEFT's format
results.json    the figures of the table
lr_finder.png   with optimizer.lr=auto, the curve that the rate was read from
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from lightning_ft.apps.errors import RequestError
from lightning_ft.files.card import Facts, Score
from lightning_ft.tasks.task import score_of

CONFIG, ADAPTER, RESULTS, CURVE = "config.yaml", "adapter", "results.json", "lr_finder.png"
ROOT = Path("runs")


def refuse_used(folder: Path) -> None:
    """Raise RequestError if ``folder`` holds a run already, whose files a second one would mix with its own."""
    if (folder / CONFIG).exists():
        raise RequestError(f"'{os.path.relpath(folder)}' holds a run already: name another hydra.run.dir.")


def save_config(folder: Path, config: DictConfig, facts: Mapping[str, Any]) -> None:
    """Write the composed config, interpolations kept, and the facts of the data that the task was made with.

    Raises:
        RequestError: if another run, begun at the same time, has taken the folder.
    """
    copy = OmegaConf.create(OmegaConf.to_container(config, resolve=False))
    for key, value in facts.items():
        OmegaConf.update(copy, f"task.{key}", value, force_add=True)
    for key in ("data.path", "model.name"):
        given = OmegaConf.select(config, key)
        group, _, name = key.partition(".")
        if isinstance(given, str) and Path(given).exists() and not OmegaConf.is_interpolation(config[group], name):
            OmegaConf.update(copy, key, str(Path(given).resolve()))  # the run can be come back to from anywhere
    try:
        with (folder / CONFIG).open("x", encoding="utf-8") as file:
            file.write(OmegaConf.to_yaml(copy))
    except FileExistsError:
        refuse_used(folder)


def find_run(name: str, root: Path = ROOT) -> Path:
    """The folder of a finished run: a path, or ``last`` for the newest one in ``runs/``, of a comparison the best.

    Raises:
        RequestError: if it isn't there, or holds no adapter.
    """
    finished = [path.parent for path in root.glob(f"**/{RESULTS}")]
    if name == "last":
        if not finished:
            raise RequestError(f"there is no finished run in '{root}'; `lightning-ft train` makes one.")
        return max(finished, key=_time)
    folder = Path(name).expanduser()
    if not (folder / CONFIG).is_file() or not (folder / ADAPTER).is_dir():
        newest = [str(path) for path in sorted(finished, key=_time)[-5:]]
        there = f" The newest runs: {', '.join(newest)}." if newest else ""
        raise RequestError(f"run='{name}' isn't the folder of a finished run ({CONFIG}, {ADAPTER}/).{there}")
    return folder


def _time(folder: Path) -> float:
    return (folder / RESULTS).stat().st_mtime


def load_config(folder: Path) -> DictConfig:
    """The config of a run."""
    config = OmegaConf.load(folder / CONFIG)
    assert isinstance(config, DictConfig)
    return config


def needed(folder: Path) -> list[Path]:
    """What coming back to a run needs: its adapter, and its base where that is a folder."""
    return [folder / ADAPTER, Path(load_config(folder).model.name)]


def save_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Write the figures of a run; what isn't a finite number as null, since JSON has no other."""
    (folder / RESULTS).write_text(json.dumps(_finite(results), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def load_results(folder: Path) -> dict[str, Any]:
    """The figures of a run; none where it keeps none."""
    file = folder / RESULTS
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def base_name(config: DictConfig) -> str:
    """What others call a run's base: its name on the hub where it has one, else the folder."""
    return str(config.model.get("hub_name") or config.model.name)


def card_facts(config: DictConfig, results: Mapping[str, Any]) -> Facts:
    """What the model card tells of a run.

    Args:
        config: of the run.
        results: its figures; older ones hold fewer.
    """
    facts: dict[str, Any] = {
        "base": base_name(config),
        "labels": _plain(config.task.get("labels")),
        "template": OmegaConf.select(config, "data.target.template"),
        "scores": _scores(results.get("before", {}), results.get("after", {})),
        "settings": {key: value for key, value in _plain(config.method).items() if key != "_target_"},
        "training": _training(config, results),
        **{key: results.get(key) for key in ("method", "parameters", "trained", "rows", "versions")},
        **results.get("card", {}),
    }
    if isinstance(data := _plain(config.data.get("path")), str):
        local = data.startswith("bundled:") or Path(data).is_absolute() or Path(data).exists()
        facts |= {"data": data, "data_on_hub": not local}
    return cast(Facts, {key: value for key, value in facts.items() if value is not None})


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _scores(before: Mapping[str, float], after: Mapping[str, float]) -> list[Score]:
    kinds = {key: key.removeprefix("test/") for key in after if key != "test/loss"}
    return [
        {"type": kind, "name": score_of(key).name, "before": before.get(key), "after": after[key]}
        for key, kind in kinds.items()
    ]


def _training(config: DictConfig, results: Mapping[str, Any]) -> dict[str, Any]:
    def chosen(key: str) -> Any:
        return OmegaConf.select(config, key)

    def named(key: str) -> str | None:
        target = chosen(f"{key}._target_")
        return target and str(target).rpartition(".")[2]

    return {
        "epochs": results.get("epochs"),
        "steps": results.get("steps"),
        "optimizer": named("optimizer"),
        "learning rate": chosen("optimizer.lr"),
        "schedule": named("scheduler"),
        "batch size": chosen("data.batch_size"),
        "batches accumulated": chosen("trainer.accumulate_grad_batches"),
        "precision": chosen("trainer.precision"),
        "base packed into": chosen("quantize.kind"),
        "seed": chosen("seed"),
    }
