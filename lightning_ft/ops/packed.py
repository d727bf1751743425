"""Frozen weights in the order in which oneDNN reads them, for products on a CPU.

A BLAS puts a weight into the order of its kernel at each product, and what is frozen is put there each time alike. Here
that's done once, for ``x Wᵀ`` of the forward pass and ``dy W`` of the backward pass: W is held twice more.

Packed weights are a cache beside a module, and nothing of it: not in its state, nor in copies of it. A weight that has
become another one is computed with as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ft.ops.imagined import imagined_device

_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


class PackedWeight:
    """A frozen W (out, in), packed.

    Args:
        weight: on a CPU, in fp32 or bf16.

    Raises:
        AttributeError, RuntimeError: where torch has no such products.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight, self._version = weight.detach(), weight._version  # held, so that nothing else comes to lie there
        self._forward = torch.ops.mkldnn._reorder_linear_weight(self._weight.contiguous())
        self._backward = torch.ops.mkldnn._reorder_linear_weight(self._weight.t().contiguous())

    @property
    def nbytes(self) -> int:
        """What it takes beside the weight."""
        return 2 * self._weight.nbytes

    def times(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x Wᵀ + bias``: (rows, in) to (rows, out)."""
        return torch.ops.mkldnn._linear_pointwise(x, self._forward, bias, "none", [], "")

    def back(self, grad: Tensor) -> Tensor:
        """``dy W``: (rows, out) to (rows, in)."""
        return torch.ops.mkldnn._linear_pointwise(grad, self._backward, None, "none", [], "")

    def is_of(self, weight: Tensor) -> bool:
        """Whether ``weight`` is what was packed, unchanged."""
        mine = self._weight
        return (
            (mine.data_ptr(), mine.shape, mine.dtype) == (weight.data_ptr(), weight.shape, weight.dtype)
            and mine.stride() == weight.stride()
            and self._version == weight._version
        )

    def is_right(self) -> bool:
        """Whether the products of a few random numbers are those of the weight."""
        generator = torch.Generator().manual_seed(0)  # not the numbers of the training
        out, n = self._weight.shape
        x, grad = (torch.randn(5, size, generator=generator).to(self._weight.dtype) for size in (n, out))
        pairs = ((self.times(x, None), F.linear(x, self._weight)), (self.back(grad), grad @ self._weight))
        tolerance = _TOLERANCE[self._weight.dtype]
        return all(((mine - plain).norm() <= tolerance * plain.norm()).item() for mine, plain in pairs)


_asked: WeakSet[nn.Module] = WeakSet()
_packed: WeakKeyDictionary[nn.Module, PackedWeight] = WeakKeyDictionary()


def ask_to_pack(modules: Iterable[nn.Module]) -> None:
    """Have the frozen weight of each of ``modules`` packed when it's first multiplied by, where that can be done."""
    _asked.update(modules)


def forget_packed(modules: Iterable[nn.Module]) -> None:
    """Compute with the weights of ``modules`` as they are from now on."""
    for module in modules:
        _asked.discard(module)
        _packed.pop(module, None)


def bytes_of_packed(modules: Iterable[nn.Module]) -> list[int]:
    """What the packed weights among those of ``modules`` take, each."""
    return [_packed[module].nbytes for module in modules if module in _packed]


def packed_weight(module: Any, weight: Tensor) -> PackedWeight | None:
    """The packed ``weight`` (out, in) of ``module``; None where there is none, or the weight isn't what it was."""
    if not (_packed or _asked) or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return None
    if module in _asked:
        _asked.discard(module)
        if (fresh := _pack(weight)) is not None:
            _packed[module] = fresh
    packed = _packed.get(module)
    if packed is not None and not packed.is_of(weight):
        forget_packed([module])
        return None
    return packed


def _pack(weight: Tensor) -> PackedWeight | None:
    if weight.device.type != "cpu" or weight.dtype not in _TOLERANCE or imagined_device() is not None:
        return None
    try:
        with torch.inference_mode(False), torch.no_grad():
            packed = PackedWeight(weight)
            return packed if packed.is_right() else None
    except (AttributeError, RuntimeError):  # private operators: there are builds and machines without
        return None
