"""Frozen linear layers in 4 and 8 bits.

Needs bitsandbytes: whoever imports this does so inside the function that needs it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes import matmul_4bit
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit as Linear4bitOfBitsandbytes
from bitsandbytes.nn import Params4bit
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from lightning_ft.ops import Linear


class Linear4bit(Linear4bitOfBitsandbytes):
    """bitsandbytes' own, with a forward that changes nothing of the layer.

    The original casts a bias in place to the dtype that it computes in, sums a bias' gradient over the rows alone, and
    packs its weight anew in eval mode on CPUs with AVX512-BF16, after which it can't train.

    It computes in the dtype of autocast where that is on, in ``compute_dtype`` where one was set, else in its input's.
    """

    own = ("compute_dtype", "compute_type_is_set", "quant_state", "quant_storage", "support_avx512bf16_for_cpu")
    """The attributes that an ``nn.Linear`` hasn't."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        autocast = _autocast_dtype(x)
        dtype = autocast or self.compute_dtype or x.dtype
        if _misread(self.weight, self.weight.quant_state):
            out = _Linear.apply(x.to(dtype), self)
        else:
            out = matmul_4bit(x.to(dtype), self.weight, quant_state=self.weight.quant_state)
        return _plus(out, self.bias).to(autocast or x.dtype)

    def dense(self) -> Tensor:
        """The weight that the packed one stands for: (out, in), in the dtype that it was quantized from."""
        return _from_4bit(self.weight.data, self.weight.quant_state)

    def as_linear(self, x: Tensor) -> Linear:
        """What it computes of ``x``, for :func:`lightning_ft.ops.lora_linear`."""
        unpack = partial(_from_4bit, state=self.weight.quant_state)
        return Linear(self.weight.data, self.bias, unpack, self.compute_dtype or x.dtype)

    def pack(self, dense: Tensor) -> dict[str, Any]:
        """What of the layer holds a weight, were it ``dense`` (out, in), packed as its own is."""
        state = self.weight.quant_state
        kind = {"blocksize": state.blocksize, "compress_statistics": state.nested, "quant_type": state.quant_type}
        return packed_4bit(dense.to(state.dtype), quant_storage=self.weight.quant_storage, **kind)

    @staticmethod
    def unpack(packed: dict[str, Any]) -> Tensor:
        """The weight that :meth:`pack` packed."""
        return _from_4bit(packed["weight"].data, packed["quant_state"])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self.weight.quant_state.dtype = _dtype_after(fn, self.weight.quant_state.dtype, self.weight.device)
        return self


class Linear8bit(nn.Linear):
    """A weight of int8, with a scale for each output: ``W[i] = SCB[i] / 127 * weight[i]`` (LLM.int8(), section 2.1).

    https://arxiv.org/abs/2208.07339. Inputs are not rounded, so that training and evaluation compute the same.
    """

    own = ("SCB", "dense_dtype")
    SCB: Tensor  # (out,)
    dense_dtype: torch.dtype

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return _plus(_Linear.apply(x.to(_autocast_dtype(x) or x.dtype), self), self.bias)

    def dense(self) -> Tensor:
        """The weight that the packed one stands for: (out, in), in the dtype that it was quantized from."""
        return _unpacked(self.weight.detach(), self.SCB, self.dense_dtype)

    def as_linear(self, x: Tensor) -> Linear:
        """What it computes of ``x``, for :func:`lightning_ft.ops.lora_linear`."""
        unpack = partial(_unpacked, scale=self.SCB, dtype=self.dense_dtype)
        return Linear(self.weight.detach(), self.bias, unpack, x.dtype)

    def pack(self, dense: Tensor) -> dict[str, Any]:
        """What of the layer holds a weight, were it ``dense`` (out, in)."""
        return packed_8bit(dense, self.dense_dtype)

    @staticmethod
    def unpack(packed: dict[str, Any]) -> Tensor:
        """The weight that :meth:`pack` packed."""
        return _unpacked(packed["weight"].detach(), packed["SCB"], torch.float32)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        scale = self.SCB  # moves between devices, and isn't rounded
        super()._apply(fn, recurse)
        self.SCB = scale.to(self.SCB.device)
        self.dense_dtype = _dtype_after(fn, self.dense_dtype, scale.device)
        return self


class _Linear(torch.autograd.Function):
    """``x Wᵀ`` with the W that a packed layer stands for, of which nothing is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dense().to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.dense().to(grad.dtype), None


def packed_4bit(dense: Tensor, **kind: Any) -> dict[str, Any]:
    """What a :class:`Linear4bit` holds of a weight; ``kind`` is that of bitsandbytes' ``Params4bit``."""
    if type(dense).__name__ == "FakeTensor":  # without values, and no Params4bit can be made of it
        with unset_fake_temporarily():
            quantize_4bit(torch.zeros(1, 64), **kind)  # makes the tables that bitsandbytes keeps for good
        packed, state = quantize_4bit(dense, **kind)
        weight: Any = nn.Parameter(packed, requires_grad=False)
        weight.quant_state = state
    else:
        weight = Params4bit(dense, requires_grad=False, **kind).to(dense.device)
    return {"weight": weight, "quant_state": weight.quant_state}


def packed_8bit(dense: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """What a :class:`Linear8bit` holds of a weight (out, in)."""
    scale = dense.detach().abs().amax(dim=1).float().clamp(min=torch.finfo(torch.float32).tiny)
    levels = (dense.detach().float() * (127 / scale)[:, None]).round().to(torch.int8)
    return {"weight": nn.Parameter(levels, requires_grad=False), "SCB": scale, "dense_dtype": dtype}


def _misread(data: Tensor, state: Any) -> bool:
    """Whether bitsandbytes (0.50, on CPUs with AVX512) would take wrong scales where a block reaches into two rows."""
    return data.device.type == "cpu" and state.shape[-1] % state.blocksize != 0


def _from_4bit(data: Tensor, state: Any) -> Tensor:
    if not _misread(data, state):
        return dequantize_4bit(data, state)
    in_a_row = copy.copy(state)
    in_a_row.shape = torch.Size((1, math.prod(state.shape)))
    return dequantize_4bit(data, in_a_row).view(state.shape)


def _unpacked(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (weight * (scale / 127)[:, None]).to(dtype)


def _dtype_after(fn: Callable[[Tensor], Tensor], dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What ``fn``, which a module applies to its tensors, makes of ``dtype``."""
    return fn(torch.empty(0, dtype=dtype, device=device)).dtype


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _plus(out: Tensor, bias: Tensor | None) -> Tensor:
    return out if bias is None else out + bias.to(out.dtype)
