"""Which settings of a run's precision go together: told from the config alone, before a model or data are loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from lightning_ft.apps.errors import RequestError
from lightning_ft.quantization import INSTALL, Quantization


@dataclass(frozen=True)
class Asked:
    """What the rules look at.

    Attributes:
        device: where the run will be: ``cpu``, ``cuda``, ``mps``, ….
        precision: the Trainer's.
        matmul: of products of fp32.
        packed: what the base is packed into; empty if it isn't.
        method: the class of the method, and ``layer``: whether it adds something to the base.
        trains_weights: whether it trains weights of the base's layers.
        rounds: what trains and isn't fp32 if the model isn't, in words; empty if there's nothing.
        optimizer: the class of the optimizer.
        penalty: a penalty that compares weights, or empty.
        shares: by what the devices share the weights out, ``FSDP2`` or ``ZeRO-3``; empty if each has them whole.
        bitsandbytes: whether it's installed.
        bf16: whether the device computes in bf16, and ``tf32``: in TF32.
    """

    device: str
    precision: str
    matmul: str
    packed: str
    method: str
    trains_weights: bool
    rounds: str
    optimizer: str
    penalty: str
    shares: str
    bitsandbytes: bool
    bf16: bool
    tf32: bool


class Rule(NamedTuple):
    """When it applies, and what is said then, with the names of :class:`Asked` in braces."""

    holds: Callable[[Asked], bool]
    message: str


REFUSED = (
    Rule(
        lambda a: a.device == "cpu" and a.precision.startswith("16"),
        "trainer.precision={precision} needs a GPU; a CPU would train in bf16 instead, or to NaN. Use"
        " precision=bf16-mixed.",
    ),
    Rule(
        lambda a: a.precision == "16-true" and bool(a.rounds),
        "trainer.precision=16-true would train {rounds} in fp16, in which the optimizer's squares of gradients are 0."
        " Use precision=fp16-mixed.",
    ),
    Rule(
        lambda a: bool(a.packed) and a.trains_weights,
        "{method} trains weights of the base, and packed into {packed} they can't. Use a method that trains beside them"
        " (method=lora, adalora, adapter, ia3, prefix, prompt, bitfit, head, …), or precision=bf16-mixed.",
    ),
    Rule(
        lambda a: bool(a.packed) and bool(a.penalty),
        "the penalty {penalty} compares weights, and the base's are packed into {packed}. Use regularizer=kl or replay,"
        " which compare outputs, or precision=bf16-mixed.",
    ),
    Rule(
        lambda a: bool(a.packed) and bool(a.shares),
        "{shares} shares weights out, and packed into {packed} they can't be. Use trainer=ddp, or precision=bf16.",
    ),
    Rule(
        lambda a: a.optimizer.startswith("bitsandbytes.") and a.shares == "FSDP2",
        "{optimizer} knows no parts of tensors, which {shares} makes. Use optimizer=adamw, or trainer=ddp.",
    ),
    Rule(
        lambda a: bool(a.packed) and not a.bitsandbytes,
        f"a base in {{packed}} needs bitsandbytes, which isn't installed: {INSTALL}. Or use precision=bf16-mixed.",
    ),
    Rule(
        lambda a: a.optimizer.startswith("bitsandbytes.") and not a.bitsandbytes,
        f"{{optimizer}} needs bitsandbytes, which isn't installed: {INSTALL}. Or use optimizer=adamw.",
    ),
    Rule(
        lambda a: a.device != "cuda" and ".Paged" in a.optimizer,
        "{optimizer} keeps its state where a GPU and the CPU both reach it, and there is no GPU. Use"
        " optimizer=adamw_8bit.",
    ),
)
"""What can't be, with the cure."""

ADVICE = (
    Rule(
        lambda a: a.matmul != "highest" and not a.tf32,
        "matmul_precision={matmul} changes nothing here: TF32 is for NVIDIA GPUs from Ampere on.",
    ),
    Rule(
        lambda a: "bf16" in a.precision and not a.bf16,
        "This GPU has no bf16, and what emulates it is slow: precision=fp16-mixed.",
    ),
    Rule(
        lambda a: a.precision == "bf16-true" and bool(a.rounds),
        "trainer.precision=bf16-true trains {rounds} in bf16, where a step below 1/256 of a weight is lost:"
        " precision=bf16-mixed keeps it in fp32.",
    ),
)
"""What can be, but hardly as it was meant."""

_FUSING = ("cpu", "cuda", "mps")  # of the devices that torch fuses its optimizers for, those that Lightning names


def check(config: DictConfig, device: str | None = None) -> None:
    """Raise RequestError if the config asks for what can't be, on a device of another kind if one is named."""
    asked = read(config)
    asked = replace(asked, device=device or asked.device)
    for rule in REFUSED:
        if rule.holds(asked):
            raise RequestError(rule.message.format(**vars(asked)))


def advice(config: DictConfig) -> list[str]:
    """What is to be said of settings that can be, but hardly as they were meant."""
    asked = read(config)
    return [rule.message.format(**vars(asked)) for rule in ADVICE if rule.holds(asked)]


def fuses(config: DictConfig) -> bool:
    """Whether the optimizer can update all tensors by one kernel.

    With mixed precision Lightning won't clip gradients for that kernel, which could unscale them itself. DeepSpeed
    makes the optimizer's step its own.
    """
    trainer, adamw = config.trainer, config.optimizer._target_ == "torch.optim.AdamW"
    precision = _precision(config)
    mixed = precision.endswith("-mixed") or precision in ("16", "bf16")
    deepspeed = "deepspeed" in str(trainer.get("strategy")).lower()
    return adamw and device_of(trainer.get("accelerator", "auto")) in _FUSING and not mixed and not deepspeed


def read(config: DictConfig) -> Asked:
    """What the rules look at, of the config of a run, and of this machine.

    Raises:
        RequestError, QuantizationError: if ``quantize`` isn't what it can be.
    """
    device = device_of(config.trainer.get("accelerator", "auto"))
    method: Any = get_class(config.method._target_)
    penalties = {name: get_class(node._target_) for name, node in (config.get("regularizer") or {}).items()}
    compares: Any = [name for name, kind in penalties.items() if kind.compares_weights]  # type: ignore[attr-defined]
    return Asked(
        device=device,
        precision=_precision(config),
        matmul=config.get("matmul_precision", "highest"),
        packed=_packed(config),
        method=method.__name__,
        trains_weights=method.trains_of_base == "weights",
        rounds=_rounds(config, method),
        optimizer=str(config.optimizer._target_),
        penalty=compares[0] if compares else "",
        shares=_shares(config.trainer.get("strategy")),
        bitsandbytes=importlib.util.find_spec("bitsandbytes") is not None,
        bf16=device != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False),
        tf32=device == "cuda" and torch.cuda.get_device_capability() >= (8, 0),
    )


def device_of(accelerator: str) -> str:
    """The kind of device that the Trainer's ``accelerator`` means on this machine."""
    if accelerator not in ("auto", "gpu"):
        return accelerator
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _precision(config: DictConfig) -> str:
    return str(config.trainer.get("precision") or "32-true")


def _packed(config: DictConfig) -> str:
    """What the base is packed into, as it's read or by the method's callback; empty if it isn't."""
    quantize: Any = config.get("quantize")
    if quantize and not OmegaConf.is_dict(quantize):
        raise RequestError(f"quantize must be a mapping, quantize={{kind: nf4}}, not {quantize}; or use precision=nf4.")
    asked: Any = quantize or config.method.get("quantize")
    values: Any = OmegaConf.to_container(asked) if OmegaConf.is_dict(asked) else asked
    return Quantization.of(values).kind if values else ""


def _shares(strategy: Any) -> str:
    """By what a Trainer's ``strategy``, a name or a constructor call, has devices share the weights out."""
    name, stage = str(strategy), None
    if OmegaConf.is_dict(strategy):
        name, stage = str(strategy.get("_target_")), strategy.get("stage")
    if "fsdp" in name.lower() or name.endswith("ModelParallelStrategy"):
        return "FSDP2"
    return "ZeRO-3" if stage == 3 or name.startswith("deepspeed_stage_3") else ""


def _rounds(config: DictConfig, method: Any) -> str:
    """What the run trains that has the model's own dtype, where that isn't fp32: all but what methods add."""
    task: Any = get_class(config.task._target_)
    parts = {
        "parts of the base": method.trains_of_base != "nothing",
        "modules_to_save": bool(config.method.get("modules_to_save")),
        "biases of the base": config.method.get("bias", "none") != "none",
        "the task's head": task.new_head,
    }
    return " and ".join(name for name, trains in parts.items() if trains)
