"""A frozen base in 4 or 8 bits, by bitsandbytes (QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314).

A block of weights is stored as one scale and 16 levels (in 8 bits, a row as one scale and 255). A change that is
smaller than the steps between the levels is rounded away when the sum is packed again, so that a merge has to look at
what is left of it.

What is packed are the linear layers of the pretrained part. Embeddings, norms, heads, what trains, and what shares its
weight with another module stay as they are.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ft.errors import UserError
from lightning_ft.injection import (
    Base,
    Injected,
    InjectionError,
    find_base,
    is_conv1d,
    is_quantized,
    is_whole,
    leave_fast_path,
    output_embeddings,
    parent_of,
    trained_names,
)
from lightning_ft.ops import Linear, packed_weight

INSTALL = "pip install 'lightning-ft[quantization]'"

_OF_4BIT = ("nf4", "fp4")
KINDS = (*_OF_4BIT, "int8")
"""What a base can be packed into: 4-bit NormalFloat, 4-bit float, 8-bit integers."""


class QuantizationError(UserError, ValueError):
    """A base can't be packed as asked; the message says how it can."""


@dataclass(frozen=True)
class Quantization:
    """How a base is packed.

    Attributes:
        kind: one of :data:`KINDS`.
        double: whether the scales of 4-bit blocks are packed too, into 8 bits (QLoRA, section 3).
    """

    kind: str
    double: bool = True

    @classmethod
    def of(cls, asked: str | Mapping[str, Any]) -> Quantization:
        """From what a user asks for: a kind, or a mapping of the attributes.

        Raises:
            QuantizationError: if it isn't one.
        """
        fields = {"kind": asked} if isinstance(asked, str) else dict(asked)
        unknown = fields.keys() - {"kind", "double"}
        if unknown or fields.get("kind") not in KINDS or not isinstance(fields.get("double", True), bool):
            raise QuantizationError(
                f"quantize must be one of {', '.join(KINDS)}, or {{'kind': 'nf4', 'double': True}}, not {asked!r}."
            )
        return cls(**fields)

    def require(self) -> None:
        """Raise QuantizationError if bitsandbytes isn't installed."""
        if importlib.util.find_spec("bitsandbytes") is None:
            raise QuantizationError(
                f"A base in {self.kind} needs bitsandbytes, which isn't installed: {INSTALL}. Or leave the base as it"
                " is: quantize=None, in a command precision=bf16-mixed."
            )

    def pack(self, dense: Tensor) -> dict[str, Any]:
        """What a layer of this kind holds of a weight (out, in)."""
        from lightning_ft.quantization import layers

        if self.kind in _OF_4BIT:
            return layers.packed_4bit(dense, compress_statistics=self.double, quant_type=self.kind)
        return layers.packed_8bit(dense, dense.dtype)

    def matches(self, module: nn.Module) -> bool:
        """Whether a packed ``module`` is of this kind."""
        state = getattr(module.weight, "quant_state", None)
        return self.kind == "int8" if state is None else (state.quant_type, state.nested) == (self.kind, self.double)


# --------------------------------------------------------------------------------------------- packing a base


def quantize(model: nn.Module, how: str | Mapping[str, Any], backbone: str | None = None) -> None:
    """Pack the linear layers of a model's pretrained part in place, e.g. to load an adapter that was trained over such.

    Args:
        model: any module.
        how: ``"nf4"``, ``"fp4"``, ``"int8"``, or ``{"kind": "nf4", "double": False}``.
        backbone: path of the pretrained part; found by itself where there is just one Hugging Face model.

    Raises:
        QuantizationError, InjectionError: as of :func:`pack`.
    """
    pack(find_base(model, backbone), Quantization.of(how))


def pack(base: Base, how: Quantization, saved: Iterable[str] = ()) -> None:
    """Pack the linear layers of ``base`` in place, one at a time; what is packed already stays so.

    Args:
        base: not injected yet.
        how: as what.
        saved: paths of modules of its root that are to train whole.

    Raises:
        QuantizationError: without bitsandbytes, or if there is nothing to pack.
        InjectionError: if the base is packed otherwise already, or carries something over dense weights.
    """
    how.require()
    settle(base)
    packed = {name: module for name, module in base.named_modules() if is_quantized(module)}
    other = next((name for name, module in packed.items() if not how.matches(module)), None)
    if other is not None:
        raise InjectionError(
            f"'{other}' is packed already, and not as {how}: load the model without quantization, or leave quantize"
            " out."
        )
    names = to_pack(base, saved)
    if not names and not packed:
        raise _nothing_to_pack(base.root, how)
    if carrying := [name for name in names if isinstance(base.root.get_submodule(name), Injected)]:
        raise InjectionError(
            f"'{carrying[0]}' carries an adapter over its dense weight: merge or remove it before the base is packed"
            f" into {how.kind}."
        )
    for name in names:
        leave_fast_path(base.root, name)
        _become_packed(base.root.get_submodule(name), how)


def _nothing_to_pack(root: nn.Module, how: Quantization) -> QuantizationError:
    return QuantizationError(
        f"{type(root).__name__} has no nn.Linear in its pretrained part that could be packed into {how.kind} (GPT-2's"
        " Conv1D is none): leave quantize out, in a command precision=bf16-mixed."
    )


def to_pack(base: Base, saved: Iterable[str] = ()) -> list[str]:
    """The paths, in the root of ``base``, of the dense layers that :func:`pack` packs.

    Plain linear layers that stay frozen and whose own forward is what reads their weight.
    """
    left_out = tuple(f"{name}." for name in saved)
    trained = trained_names(base)
    owners: dict[int, int] = {}
    for module in base.root.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    precise = set(getattr(base.root, "_keep_in_fp32_modules", None) or ())  # T5 casts to the dtype of its wo

    def packs(name: str, module: nn.Module) -> bool:
        return (
            getattr(module, "_original", type(module)) is nn.Linear
            and "weight" in module._parameters
            and owners[id(module.weight)] == 1
            and module is not output_embeddings(base.root)
            and not f"{name}.".startswith(left_out)
            and f"{name}.weight" not in trained
            and not precise & set(name.split("."))
            and not isinstance(parent_of(base.root, name), nn.MultiheadAttention)  # which reads the weight itself
        )

    return [name for name, module in base.named_modules() if packs(name, module)]


def settle(base: Base) -> None:
    """Make bitsandbytes' layers in ``base``, whoever put them there, ours: they train, and evaluate, without a change.

    See :mod:`lightning_ft.quantization.layers`.
    """
    for name, module in base.named_modules():
        if not is_quantized(module) or isinstance(module, Injected):
            continue
        leave_fast_path(base.root, name)
        _settle(module)


def _settle(module: Any) -> None:
    from lightning_ft.quantization.layers import Linear4bit, Linear8bit

    kinds = {kind.__name__ for kind in type(module).__mro__}
    if "Linear4bit" in kinds and type(module) is not Linear4bit:
        module.state_dict()  # takes back what a forward in eval mode did to the weight
        module.__class__ = Linear4bit
    elif "Linear8bitLt" in kinds:
        scale = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
        levels = nn.Parameter(module.weight.data.detach(), requires_grad=False)
        _forget(module, ("state", "index", "source_cls"))
        module._load_state_dict_pre_hooks.clear()
        module.__class__ = Linear8bit
        module.weight, module.dense_dtype = levels, _dtype_beside(module)
        module.register_buffer("SCB", scale.float())


def _dtype_beside(module: nn.Module) -> torch.dtype:
    return torch.float32 if module.bias is None else module.bias.dtype  # type: ignore[return-value]


def _become_packed(module: Any, how: Quantization) -> None:
    from lightning_ft.quantization.layers import Linear4bit, Linear8bit

    packed = how.pack(module.weight.detach())
    if how.kind in _OF_4BIT:
        module.__class__ = Linear4bit
        module.compute_dtype, module.compute_type_is_set = None, False
        module.quant_storage, module.support_avx512bf16_for_cpu = torch.uint8, False
    else:
        module.__class__ = Linear8bit
        module.register_buffer("SCB", packed["SCB"])
    set_weight(module, packed)


# ------------------------------------------------------------------------------- the weights of packed layers


def frozen_linear(module: Any, x: Tensor) -> Linear | None:
    """What ``module`` computes of ``x``, as a frozen linear layer; None where it isn't one, or is left to itself.

    Left to itself is one whose forward is its own, whose weight trains or is spread over devices, and one that is
    packed while nothing trains: bitsandbytes has kernels for that.
    """
    weight, forward = module.weight, getattr(module, "_original", type(module)).forward
    is_linear = forward is nn.Linear.forward  # asked first: it's the usual, and asked at each step
    if not is_linear and is_quantized(module):
        return module.as_linear(x) if torch.is_grad_enabled() else None
    if (weight.requires_grad and torch.is_grad_enabled()) or not is_whole(weight):
        return None
    if not is_linear:
        if not is_conv1d(module):
            return None
        weight = weight.T
    return Linear(weight, module.bias, packed=packed_weight(module, weight))


def dense_weight(module: Any) -> Tensor:
    """The weight of ``module``, of a packed one too: (out, in), in the dtype that it was quantized from."""
    return module.dense() if is_quantized(module) else module.weight.detach()


def repacked(module: Any, dense: Tensor) -> tuple[dict[str, Any], float, float]:
    """``dense`` packed as the weight of ``module`` is, and what is lost by it.

    Args:
        module: a packed layer.
        dense: (out, in).

    Returns:
        What :func:`set_weight` takes, the norm of its error, and that of the change from the module's weight to
        ``dense``.
    """
    change = torch.linalg.vector_norm(dense - module.dense()).item()
    if change == 0:  # packing isn't idempotent where the scales are packed too
        return {}, 0.0, 0.0
    packed = module.pack(dense)
    return packed, torch.linalg.vector_norm(module.unpack(packed) - dense).item(), change


def set_weight(module: Any, weight: Tensor | Mapping[str, Any]) -> None:
    """Give a packed layer another weight: a packed one, or a dense one, with which it becomes an ``nn.Linear``."""
    if not isinstance(weight, Tensor):
        for name, value in weight.items():
            setattr(module, name, value)
        return
    dtype = module.dense().dtype
    own = module.own
    module.__class__ = nn.Linear
    _forget(module, (*own, "source_cls"))
    module.weight = nn.Parameter(weight.to(dtype))
    if module.bias is not None and module.bias.dtype != dtype:  # bitsandbytes casts it on the way
        module.bias = nn.Parameter(module.bias.detach().to(dtype), module.bias.requires_grad)


def dequantize(model: nn.Module) -> list[str]:
    """Make every packed layer of ``model`` an ``nn.Linear`` again, over the weight that the packed one stands for.

    Returns:
        The paths of the layers.
    """
    names = [name for name, module in model.named_modules() if is_quantized(module)]
    for name in names:
        module = model.get_submodule(name)
        set_weight(module, dense_weight(module))
    for module in model.modules():  # Hugging Face would write that it is packed into the config
        if (quantizer := getattr(module, "hf_quantizer", None)) is not None:
            quantizer.remove_quantization_config(module)
            _forget(module, ("is_loaded_in_4bit", "is_loaded_in_8bit"))
    return names


def _forget(module: nn.Module, names: Iterable[str]) -> None:
    for name in names:
        if name in module._buffers:
            del module._buffers[name]
        vars(module).pop(name, None)


def count(parameter: Tensor) -> int:
    """How many weights a parameter stands for: of one that is packed into 4 bits, twice as many as bytes, or more.

    Of one that ZeRO-3 shares out, which is empty between two uses, all of them.
    """
    state = getattr(parameter, "quant_state", None)
    return getattr(parameter, "ds_numel", parameter.numel()) if state is None else math.prod(state.shape)


# ------------------------------------------------------------------------------------ loading into packed layers


def load_quantized(auto_class: Any, name: str, how: Quantization, **kwargs: Any) -> Any:
    """``auto_class.from_pretrained(name, **kwargs)``, its pretrained part packed weight by weight as it is read.

    Args:
        auto_class: an Auto class of transformers.
        name: a local folder or a name on the hub.
        how: as what. A model that was saved packed stays as it is.
        kwargs: passed on.

    Raises:
        QuantizationError: without bitsandbytes, or if there is nothing to pack.
        InjectionError: if it was saved packed, and otherwise.
    """
    how.require()
    from transformers import AutoConfig, BitsAndBytesConfig

    config = AutoConfig.from_pretrained(name, **kwargs)
    if getattr(config, "quantization_config", None) is None:
        with torch.device("meta"):
            model = auto_class.from_config(config)
        wanted = set(to_pack(find_base(model)))
        if not wanted:
            raise _nothing_to_pack(model, how)
        rest = [f"{re.escape(module)}$" for module, _ in model.named_modules() if module not in wanted]
        in_4_bits = how.kind in _OF_4BIT
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=in_4_bits,
            load_in_8bit=not in_4_bits,
            bnb_4bit_quant_type=how.kind if in_4_bits else "nf4",
            bnb_4bit_use_double_quant=how.double,
            llm_int8_skip_modules=rest,
        )
        kwargs["device_map"] = {"": _device()}
    model = auto_class.from_pretrained(name, **kwargs)
    base = find_base(model)
    for _, module in base.named_modules():
        if "compute_dtype" in vars(module):
            vars(module)["compute_dtype"] = None  # the Trainer's counts, not a default
    pack(base, how)
    return model


def _device() -> str:
    """Where weights are packed: an accelerator does it in no time, and each process has its own."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
