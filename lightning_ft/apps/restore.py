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

    Args:
        folder: the run's.
        data_overrides: options of its data to change; null ones stay.
    """
    config = runs.load_config(folder)
    config.data.update({key: value for key, value in data_overrides.items() if value is not None})
    module = build.finetuner(config, {})  # the config of a run has the facts of its data
    load_adapter(module, folder / runs.ADAPTER, config.method.get("backbone"))
    return module, build.datamodule(config)
