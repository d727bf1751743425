"""``lightning-ft estimate``: what a training would take, before it's begun and without the model's weights."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig

from lightning_ft.apps.paths import conf_dir

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_ft.data.module import TextDataModule
    from lightning_ft.estimate import Imagination, Memory
    from lightning_ft.tasks.finetuner import FineTuner

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_STORED = {"bf16-true": "bfloat16", "16-true": "float16", "64-true": "float64"}
"""What a Trainer's precision makes of the weights; the others leave them as they are."""

log = logging.getLogger(__name__)


@hydra.main(config_path=str(conf_dir()), config_name="estimate", version_base="1.3")
def main(config: DictConfig) -> None:
    """Print what a training of this config takes, and write it where ``out`` says."""
    from lightning_ft.apps import build, report

    build.register_resolvers()
    build.tidy_messages(logging.WARNING)
    found = estimate(config)
    report.console.print(report.estimate_table(found))
    if config.out:
        Path(config.out).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def estimate(config: DictConfig) -> dict[str, Any]:
    """What ``estimate.json`` holds.

    Raises:
        RequestError: for an option that makes no sense.
        EstimateError: if the step can't be made without values, or not one row fits.
    """
    from hydra.core.hydra_config import HydraConfig

    from lightning_ft.apps import build, precision
    from lightning_ft.apps.errors import RequestError
    from lightning_ft.estimate import EstimateError, Imagination, largest_batch

    if not isinstance(config.steps, int) or config.steps < 0:
        raise RequestError(f"steps must be a whole number, 0 for no measured time, not {config.steps}.")
    limit = None if config.memory is None else memory_bytes(config.memory)
    name = HydraConfig.get().runtime.choices["method"]
    if config.optimizer.lr is None or config.optimizer.lr == build.AUTO:
        config.optimizer.lr = 1e-3  # any: it changes nothing here
    device = _device(config, limit)
    precision.check(config, device)
    build.savers(config)  # they go together
    data = build.datamodule(config)
    row, tokens = _longest_row(config, data)
    imagination = Imagination(device)
    module, adapter = _imagined(config, data, imagination)
    rows = int(config.data.batch_size)

    def memory(rows: int) -> Memory:
        return _memory(module, _shapes(data, row, rows, tokens), config, imagination)

    found = memory(rows)
    parameters, trained = _counted(module)
    result: dict[str, Any] = {
        "method": name,
        "model": str(config.model.name),
        "data": str(config.data.path),
        "precision": str(config.trainer.precision),
        "quantize": config.quantize.kind if config.quantize else None,
        "device": device,
        "batch_size": rows,
        "tokens": tokens,
        "parameters": parameters,
        "trained": trained,
        "memory": asdict(found),
        "peak": found.peak,
        "adapter_bytes": adapter,
        "limit": limit,
        "largest_batch": None,
        "seconds_per_step": None,
        "seconds_per_epoch": None,
        "untimed": None,
    }
    if limit is not None:
        largest = largest_batch(lambda n: found.peak if n == rows else memory(n).peak, limit)
        if not largest:
            raise EstimateError(
                f"Not one row of {tokens:,} tokens fits into {config.memory}: a step takes"
                f" {memory(1).peak / 2**30:.2f} GiB. Cut texts (data.max_length=...), store less (precision=bf16, nf4),"
                " or keep less (gradient_checkpointing=true)."
            )
        result["largest_batch"] = largest
    return result | _timed(config, data, found.peak, device)


def memory_bytes(text: Any) -> int:
    """``80GiB``, ``24 GB``, ``900MiB`` as bytes.

    Raises:
        RequestError: if it's none of these.
    """
    import re

    from lightning_ft.apps.errors import RequestError

    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B)\s*", str(text), re.IGNORECASE)
    if match is None or match[2].upper() not in _UNITS or not float(match[1]):
        raise RequestError(f"memory must be a number with its unit, 80GiB or 24GB, not '{text}'.")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _device(config: DictConfig, limit: int | None) -> str:
    """The type of the device that is asked about."""
    import torch

    from lightning_ft.apps.errors import RequestError

    if config.device is None:
        on_gpu = torch.cuda.is_available() or limit is not None
        return "cuda" if on_gpu and config.trainer.accelerator != "cpu" else "cpu"
    if config.device not in ("cpu", "cuda"):
        raise RequestError(f"device must be cpu or cuda, not '{config.device}'.")
    return str(config.device)


# ------------------------------------------------------------------------------------------------------ the data


def _longest_row(config: DictConfig, data: TextDataModule) -> tuple[dict[str, Any], int]:
    """The row of training with most tokens, and how many tokens wide its batch is."""
    import torch

    from lightning_ft.apps.errors import RequestError
    from lightning_ft.tasks.pretrained import ModelNotFoundError

    if data.parts != [data] or data.streaming:
        raise RequestError("estimate reads one data set that isn't streamed: data=file data.path=... of some of it.")
    tokens = config.tokens
    if tokens is not None and (not isinstance(tokens, int) or tokens < 1):
        raise RequestError(f"tokens must be a whole number of at least 1, not {tokens}.")
    try:
        _ = data.tokenizer
    except ModelNotFoundError:
        log.warning("There is no tokenizer: rows are taken to be as long as they may be (tokens=...).")
        data.tokenizer = _unknowing()
        data.target.prepare(data.tokenizer)
        data.cache = False
        tokens = tokens or data.token_limit
    rows = data.splits["train"]
    lengths = torch.as_tensor(rows["length"][:])
    return rows.remove_columns("length")[int(lengths.argmax())], tokens or int(lengths.max())


def _unknowing() -> Any:
    """A tokenizer that knows no word."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1}, "<unk>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>", pad_token="</s>")


def _shapes(data: TextDataModule, row: Mapping[str, Any], rows: int, tokens: int) -> dict[str, Tensor]:
    """A batch of so many rows of so many tokens; without a mask, for all of them are full."""
    import torch

    width = len(row["input_ids"])
    batch = data.target.collator(data.tokenizer)([dict(row)] * 2)
    shapes = {
        key: (rows, *(tokens if size == width else size for size in value.shape[1:]))
        for key, value in batch.items()
        if key not in ("attention_mask", "extra", "position_ids")
    }
    return {key: torch.empty(shape, dtype=batch[key].dtype, device="meta") for key, shape in shapes.items()}


# ---------------------------------------------------------------------------------------------------- the memory


def _imagined(config: DictConfig, data: TextDataModule, imagination: Imagination) -> tuple[FineTuner, int]:
    """The module with the method in it, without values, as it's stored in training; and the size of its adapter."""
    import torch

    from lightning_ft.apps import build
    from lightning_ft.callbacks.checkpointing import checkpoint_layers
    from lightning_ft.callbacks.recompute import Recomputation
    from lightning_ft.estimate import store_as
    from lightning_ft.tasks.pretrained import without_weights

    config = config.copy()
    config.scheduler = None
    method = build.method(config)
    facts = data.facts
    if "tokenizer" in config.task:
        facts = {**facts, "tokenizer": data.tokenizer}
    with imagination.entered(), without_weights():
        module = build.finetuner(config, facts)
        method.inject(module)
        if stored := _STORED.get(str(config.trainer.precision)):
            store_as(module, getattr(torch, stored))
        if config.get("gradient_checkpointing"):
            checkpoint_layers(module.model, preserve_rng_state=False)  # there is no random state to preserve
        if config.get("activation_recompute"):
            Recomputation(module.model)
        return module, _adapter_bytes(module, method.backbone)


def _adapter_bytes(module: FineTuner, backbone: str | None) -> int:
    from lightning_ft.adapters import adapter_contents

    config, tensors = adapter_contents(module, backbone)
    header = sum(len(name) + 80 for name in tensors)  # of safetensors: dtype, shape and place of each
    return header + len(json.dumps(config, indent=2)) + sum(tensor.nbytes for tensor in tensors.values())


def _counted(module: FineTuner) -> tuple[int, int]:
    from lightning_ft.callbacks.finetuning import count_parameters

    return count_parameters(module)


def _memory(module: FineTuner, batch: Mapping[str, Tensor], config: DictConfig, imagination: Imagination) -> Memory:
    """The memory of a step; EstimateError if it can't be made without values."""
    import torch
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        UnsupportedFakeTensorException,
    )

    from lightning_ft.estimate import EstimateError, step_memory

    precision = str(config.trainer.precision)
    with imagination.entered():
        tensors = {key: torch.empty(value.shape, dtype=value.dtype) for key, value in batch.items()}

        def loss() -> Tensor:
            # A CPU's autocast, whatever is asked about: 16 bits are 16 bits.
            with torch.autocast("cpu", torch.bfloat16, enabled=precision.endswith("-mixed")):
                return module.task.training_loss(module.model, tensors)

        optimizer = module.configure_optimizers()
        assert isinstance(optimizer, torch.optim.Optimizer)
        try:
            return step_memory(module.model, loss, optimizer, tensors.values(), on_gpu=imagination.device != "cpu")
        except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException) as error:
            raise EstimateError(
                f"The memory of {type(module.model).__name__} can't be told without its weights: what it computes"
                f" depends on values ({error})."
            ) from error


# ------------------------------------------------------------------------------------------------------ the time


def _timed(config: DictConfig, data: TextDataModule, peak: int, device: str) -> dict[str, Any]:
    """The time of a step and of an epoch, of a few steps of training, where that's no great affair."""
    import torch

    from lightning_ft.apps.timing import training_time

    if not config.steps:
        return {"untimed": "steps=0"}
    if not _has_weights(str(config.model.name)):
        return {"untimed": "the model's weights aren't here"}
    if device == "cuda" and not torch.cuda.is_available():
        return {"untimed": "there is no GPU here"}
    if peak > (free := _free_bytes(device)) / 2:
        return {"untimed": f"{free / 2**30:.1f} GiB are free here, and half of that is too little"}
    seconds, tokens = training_time(config, data, device)
    epoch = seconds / tokens * sum(data.splits["train"]["length"])
    return {"seconds_per_step": seconds / config.steps, "seconds_per_epoch": epoch}


def _has_weights(name: str) -> bool:
    """Whether the model is in this folder, or in the cache of the hub, weights and all."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_NAME
    from transformers.utils.hub import cached_file

    names = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME)
    if Path(name).is_dir():
        return any((Path(name) / weights).is_file() for weights in names)
    found = (
        cached_file(name, weights, local_files_only=True, _raise_exceptions_for_missing_entries=False)
        for weights in names
    )
    return any(found)


def _free_bytes(device: str) -> int:
    import os

    import torch

    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") if hasattr(os, "sysconf") else 0
