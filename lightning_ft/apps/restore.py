"""A run's module and data, from its folder."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from lightning_ft import load_adapter
from lightning_ft.apps import build, runs
from lightning_ft.data.module import TextDataModule
from lightning_ft.tasks.finetuner import FineTuner


def restore(folder: Path, data_overrides: DictConfig) -> tuple[FineTuner, TextDataModule]:
    """The fine-tuned module and the (unread) data of the run in ``folder``.

    Raises:
        ValueError: if an override isn't an option of the run's data.
    """
    config = runs.load_config(folder)
    for key, value in data_overrides.items():
        if key not in config.data:
            raise ValueError(f"there is no option 'data.{key}'; data has {', '.join(map(str, config.data))}.")
        config.data[key] = value
    module = build.finetuner(config, config.task.labels, [1] * len(config.task.labels))
    load_adapter(module, folder / runs.ADAPTER, config.method.get("backbone"))
    return module, build.datamodule(config)
