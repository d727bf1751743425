"""What a training step holds in memory, found without the memory: it's made on tensors without values.

A step of the real module, with the real method in it, is run on torch's FakeTensors, which have shapes and dtypes and
nothing else, and what would be alive is counted. So nothing is said here of any architecture or method. At its highest,

    peak = weights + gradients + optimizer + activations + loss + working

Lightning's order is that of the step: the gradients of the last step are alive in this one's forward pass, and are let
go before its backward pass.

weights       parameters and buffers, as they're stored, packed ones with their scales
gradients     of what trains
optimizer     its states
activations   what autograd has saved when the model's forward pass is over, without parameters
loss          what the loss saves beyond that; of a language model it takes the place of the logits
working       what else is alive at the highest point: results on their way, gradients of activations

What depends on values is taken as it comes to most: every row is full, every token is learned.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ft.errors import UserError
from lightning_ft.injection import injected_names
from lightning_ft.ops import standing_for


class EstimateError(UserError, RuntimeError):
    """A step can't be made without values, or nothing fits; the message says what can be done."""


@dataclass(frozen=True)
class Memory:
    """The parts of a step's peak, in bytes; see the head of this file."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    working: int

    @property
    def peak(self) -> int:
        """Their sum."""
        return sum(asdict(self).values())


# ------------------------------------------------------------------------------------- tensors without values


class Imagination:
    """Where tensors have no values, and stand for those of a device. Those that are made in it are used in it alone.

    Args:
        device: its type, ``"cpu"`` or ``"cuda"``.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)  # constants that libraries keep

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Within the block it is so."""
        with standing_for(self.device), self._mode, _Unknown(on_gpu=self.device != "cpu"):
            yield


class _Unknown(TorchFunctionMode):
    """What code asks of values: a number is 1, a condition true, a mask keeps all, and of bad things there aren't any.

    What kernels do behind torch's back is written out where it takes memory: on a GPU dropout keeps a mask of bytes,
    and attention has a kernel with dropout in it.
    """

    def __init__(self, on_gpu: bool) -> None:
        super().__init__()
        self._answers: dict[Any, Callable[..., Any]] = {
            Tensor.item: _value,
            Tensor.__int__: lambda x: int(_value(x)),
            Tensor.__float__: lambda x: float(_value(x)),
            Tensor.__bool__: lambda x: bool(_value(x)),
            Tensor.sum: _sum,
            Tensor.any: _any,
            torch.any: _any,
            torch.equal: lambda *_: True,
            Tensor.equal: lambda *_: True,
            Tensor.nonzero: _everywhere,
            torch.nonzero: _everywhere,
            Tensor.__getitem__: _all_or_item,
            Tensor.__deepcopy__: _copied,
        }
        if on_gpu:
            self._answers |= {F.dropout: _dropout_on_gpu, F.scaled_dot_product_attention: _attention_on_gpu}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._answers.get(func, func)(*args, **(kwargs or {}))


def _value(x: Tensor) -> Any:
    return getattr(x, "_holds", 1)


def _sum(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    total = x.sum(*args, **kwargs)
    if x.dtype == torch.bool:
        total._holds = x.numel() // total.numel()  # type: ignore[attr-defined]
    return total


def _any(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    found = x.any(*args, **kwargs)
    found._holds = False  # type: ignore[attr-defined]
    return found


def _everywhere(x: Tensor) -> Tensor:
    return torch.zeros(x.numel(), x.ndim, dtype=torch.long)


def _all_or_item(x: Tensor, index: Any) -> Tensor:
    if _is_mask(index):
        return x.flatten(0, index.ndim - 1).clone()
    if isinstance(index, tuple):
        index = tuple(slice(None) if _is_mask(part) and part.ndim == 1 else part for part in index)
    return x[index]


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool


def _copied(x: Tensor, memo: dict[int, Any]) -> Tensor:
    copy = x.detach().clone()
    memo[id(x)] = copy = nn.Parameter(copy, x.requires_grad) if isinstance(x, nn.Parameter) else copy
    return copy


def _dropout_on_gpu(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:  # noqa: ARG001
    return torch.native_dropout(x, p, True)[0] if training and p > 0 else x


def _attention_on_gpu(*args: Any, dropout_p: float = 0.0, **kwargs: Any) -> Tensor:  # noqa: ARG001
    return F.scaled_dot_product_attention(*args, **kwargs)


def store_as(model: nn.Module, dtype: torch.dtype) -> None:
    """``model.to(dtype)`` for tensors without values, which torch can't change in place; what methods added stays.

    Args:
        model: whose parameters and buffers of floating point are meant.
        dtype: which.
    """
    added, made = injected_names(model), {}
    for path, module in model.named_modules(remove_duplicate=False):
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if tensor is None or not tensor.is_floating_point() or f"{path}.{key}".lstrip(".") in added:
                    continue
                if id(tensor) not in made:
                    cast = tensor.detach().to(dtype)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    # Beside the old one, which lives on for as long as its id is looked up.
                    made[id(tensor)] = (nn.Parameter(cast, tensor.requires_grad) if is_parameter else cast, tensor)
                tensors[key] = made[id(tensor)][0]


# ------------------------------------------------------------------------------------------------- the counting


class Living(TorchDispatchMode):
    """Counts the bytes of all storages that are alive of those it knows, and the most that there were at a time.

    Args:
        known: tensors that are there when it begins.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()
        for tensor in known:
            self._see(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tensors_in(out):
            self._see(tensor)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._alive:
            self._alive.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


class Saved:
    """Counts the bytes that autograd saves within the block, each storage once.

    Args:
        without: tensors that aren't counted: parameters.
    """

    def __init__(self, without: Iterable[Tensor] = ()) -> None:
        self.bytes = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in without}
        self._kept: list[Any] = []  # a storage that is gone would leave its place to another
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __enter__(self) -> Saved:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        self._kept.clear()

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._kept.append(storage)
            self.bytes += storage.nbytes()
        return tensor


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in a tensor, a list, a mapping of such."""
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in inner for tensor in tensors_in(item)]


def size_of(tensors: Iterable[Tensor]) -> int:
    """The bytes of their storages, each once."""
    return sum({storage._cdata: storage.nbytes() for t in tensors for storage in [t.untyped_storage()]}.values())


def weights_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, and the scales of packed ones."""
    own = [*module.parameters(), *module.buffers()]
    states = [getattr(parameter, "quant_state", None) for parameter in own]
    return own + [t for state in states if state is not None for t in tensors_in(_fields(state))]


def _fields(state: Any) -> list[Any]:
    inner = [_fields(value) for value in vars(state).values() if hasattr(value, "absmax")]
    return [*vars(state).values(), *inner]


def step_memory(
    model: nn.Module, loss: Callable[[], Tensor], optimizer: Optimizer, batch: Iterable[Tensor], on_gpu: bool = False
) -> Memory:
    """The memory of a step of training, with Lightning's order of things; within an :class:`Imagination`.

    Args:
        model: in training mode; when its forward is over, what is saved further on is the loss's.
        loss: makes it of the batch.
        optimizer: over what trains.
        batch: the tensors that ``loss`` reads.
        on_gpu: whether the optimizer updates all tensors at once, as torch's do there.
    """
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    for group in optimizer.param_groups:
        if on_gpu and group.get("foreach", False) is None:
            group["foreach"] = True
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()  # which makes its states
    weights = weights_of(model)
    states = tensors_in(list(optimizer.state.values()))
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    parts = {"weights": size_of(weights), "gradients": size_of(gradients), "optimizer": size_of(states)}
    living = Living([*weights, *gradients, *states, *batch])
    del gradients, states
    with living, Saved(weights) as saved:
        after_forward: list[int] = []
        handle = model.register_forward_hook(lambda *_: after_forward.append(saved.bytes))
        try:
            value = loss()
        finally:
            handle.remove()
        whole = saved.bytes
    with living:
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        del value
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    parts |= {"activations": after_forward[-1], "loss": whole - after_forward[-1]}
    return Memory(**parts, working=living.peak - sum(parts.values()))


# ---------------------------------------------------------------------------------------------- the largest batch


def largest_batch(peak_of: Callable[[int], int], limit: int) -> int:
    """The most rows with which a step stays within ``limit`` bytes; 0 if it does with none.

    What a row adds is nearly the same for each, so that a straight line through two sizes finds the place at once.

    Args:
        peak_of: the peak in bytes with so many rows, which rises with them.
        limit: in bytes.
    """
    peaks = {rows: peak_of(rows) for rows in (1, 2)}
    if peaks[1] > limit:
        return 0
    while True:
        fits = max(rows for rows, peak in peaks.items() if peak <= limit)
        over = min((rows for rows, peak in peaks.items() if peak > limit), default=None)
        if over == fits + 1:
            return fits
        first, second = sorted(peaks)[-2:] if over is None else (fits, over)
        slope = max((peaks[second] - peaks[first]) / (second - first), 1)
        guess = first + int((limit - peaks[first]) / slope)
        guess = max(guess, fits + 1) if over is None else min(max(guess, fits + 1), over - 1)
        peaks[guess] = peak_of(guess)
