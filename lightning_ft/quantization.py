"""A frozen base in 4 bits, by bitsandbytes (QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314).

A block of weights is stored as one scale and 16 levels. A change that is smaller than the steps between the levels
is rounded away when the sum is packed again, so that a merge has to look at what is left of it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ft.injection import is_4bit, is_conv1d, is_whole
from lightning_ft.ops import Linear


def frozen_linear(module: Any, x: Tensor) -> Linear | None:
    """What ``module`` computes of ``x``, as a frozen linear layer; None where it isn't one, or is left to itself.

    Left to itself is one whose forward is its own, whose weight trains or is spread over devices, and one in 4 bits
    while nothing trains, for which bitsandbytes has kernels.
    """
    weight, forward = module.weight, getattr(module, "_original", type(module)).forward
    if forward is nn.Linear.forward:
        return Linear(weight, module.bias) if is_whole(weight) and not weight.requires_grad else None
    if is_4bit(module):
        from bitsandbytes.nn import Linear4bit

        if forward is not Linear4bit.forward or not torch.is_grad_enabled():
            return None
        unpack = partial(_unpacked, state=weight.quant_state)
        return Linear(weight.data, module.bias, unpack, module.compute_dtype if module.compute_type_is_set else x.dtype)
    if is_conv1d(module) and is_whole(weight) and not weight.requires_grad:
        return Linear(weight.T, module.bias)
    return None


def dense_weight(module: Any) -> Tensor:
    """The weight of ``module``, of a ``Linear4bit`` too: (out, in), in the dtype that it was quantized from."""
    return _dense(module.weight) if is_4bit(module) else module.weight.detach()


def repacked(module: Any, dense: Tensor) -> tuple[Tensor, float, float]:
    """``dense`` packed as the weight of ``module`` is, and what is lost by it.

    Args:
        module: a ``Linear4bit``.
        dense: (out, in).

    Returns:
        The packed weight, the norm of its error, and that of the change from the module's weight to ``dense``.
    """
    from bitsandbytes.nn import Params4bit

    weight, state = module.weight, module.weight.quant_state
    change = torch.linalg.vector_norm(dense - _dense(weight)).item()
    if change == 0:  # packing isn't idempotent where the scales are packed too
        return weight, 0.0, 0.0
    packed = Params4bit(
        dense,
        requires_grad=False,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=weight.quant_storage,
    ).to(dense.device)
    packed.quant_state.dtype = state.dtype
    return packed, torch.linalg.vector_norm(_dense(packed) - dense).item(), change


def set_weight(module: Any, weight: Tensor) -> None:
    """Give a ``Linear4bit`` another weight: a packed one, or a dense one, with which it becomes an ``nn.Linear``."""
    if hasattr(weight, "quant_state"):
        module.weight, module.quant_state = weight, weight.quant_state
        return
    dtype = module.weight.quant_state.dtype
    module.__class__ = nn.Linear
    for name in _OF_LINEAR4BIT:
        vars(module).pop(name, None)
    module.weight = nn.Parameter(weight.to(dtype))
    if module.bias is not None and module.bias.dtype != dtype:  # Linear4bit casts it on the way
        module.bias = nn.Parameter(module.bias.detach().to(dtype), module.bias.requires_grad)


_OF_LINEAR4BIT = ("compute_dtype", "compute_type_is_set", "quant_state", "quant_storage", "support_avx512bf16_for_cpu")


def _dense(weight: Any) -> Tensor:
    return _unpacked(weight.data, weight.quant_state)


def _unpacked(packed: Tensor, state: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(packed, state)
