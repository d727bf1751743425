"""The frozen layers at the bottom of a text model, as one piece that can be run once and skipped later."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ft.errors import UserError
from lightning_ft.files.state import is_shared_out, samples_of
from lightning_ft.injection import Base, InjectionError, find_trunk, first_tensor, layer_depths, layer_stack


@dataclass
class Pass:
    """A pass through the frozen layers: which were called, by number, and what the last one gave."""

    called: list[int] = field(default_factory=list)
    last: Any = None


class FrozenPrefix:
    """The lowest ``depth`` layers of the text model in ``base``, and what comes before them.

    Nothing of it is changed but for the time of a call, and then by attributes of instances: keys, classes and what is
    injected stay as they are.

    Args:
        base: where the text model is.
        depth: how many layers; None: all below the first one in which something trains.

    Attributes:
        trunk: where the text model is, and what it is called with.
        model: the text model itself, without its head.
        layers: the frozen ones, in order.

    Raises:
        InjectionError: if there is no text model, or no stack of layers in it, or processes share it out, or, where
            ``depth`` is None, if something trains below all layers or in the first.
    """

    def __init__(self, base: Base, depth: int | None = None) -> None:
        self.trunk = find_trunk(base, "TrunkCache")
        self.model: Any = base.root.get_submodule(self.trunk.name)
        if is_shared_out(self.model):
            raise InjectionError(
                "TrunkCache keeps what whole layers put out, and several processes share these out (FSDP2, ZeRO-3)."
                " Use DDP, or leave it out."
            )
        stack = layer_stack(self.model)
        if not stack:
            raise InjectionError(
                f"TrunkCache needs a stack of layers (an nn.ModuleList of two or more), and {type(self.model).__name__}"
                " has none. Leave it out."
            )
        self.layers = stack[: _frozen(self.model, stack) if depth is None else depth]
        above = {module for layer in stack[len(self.layers) :] for module in layer.modules()}
        self._below = [module for module in self.model.modules() if module not in above]
        parameters = {
            f"{i}.{name}": parameter
            for i, module in enumerate(self._below)
            for name, parameter in module.named_parameters(recurse=False)
            if not parameter.requires_grad
        }
        buffers = {f"{i}/{name}": b for i, layer in enumerate(self.layers) for name, b in layer.named_buffers()}
        self._frozen: dict[str, Tensor] = {**parameters, **buffers}
        self._rest: tuple[Any, ...] | None = None  # what layers return beside hidden states; None: not even a tuple

    def digest(self) -> str:
        """A hash of the frozen weights: of some of each tensor's values, and of the sum of all of its bits."""
        digest = hashlib.sha256()
        for name, tensor in self._frozen.items():
            bits = tensor.detach().contiguous().view(_WHOLE[tensor.element_size()])
            total = int(bits.sum(dtype=torch.int64))
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {total}".encode())
            digest.update(samples_of(tensor).numpy().tobytes())
        return digest.hexdigest()

    def versions(self) -> list[int]:
        """How often each frozen weight was written to in place."""
        return [tensor._version for tensor in self._frozen.values()]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """In eval mode is all of the model but the layers above: dropout is off, and the same tokens give the same."""
        training = [module for module in self._below if module.training]
        try:
            for module in training:
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True

    @contextmanager
    def computing(self) -> Iterator[Pass]:
        """Calls of the model are as ever, but for the graph that the frozen layers don't build; for one call."""
        seen = Pass()

        def without_graph(number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            seen.called.append(number)
            with torch.no_grad():
                seen.last = forward(*args, **kwargs)
            return seen.last

        layers = [partial(without_graph, i, layer.forward) for i, layer in enumerate(self.layers)]
        with _calling(self.layers, layers):
            yield seen

    def hidden(self, seen: Pass) -> Tensor:
        """What went into the first layer above: (batch, tokens, width).

        Raises:
            UserError: if the layers weren't called one after the other, each once.
        """
        if seen.called != list(range(len(self.layers))):
            raise self.unfit()
        if isinstance(seen.last, Tensor):
            self._rest = None
            return seen.last
        # Attentions mostly, which nobody reads. Where layers above do (T5's biases), they give something else without.
        hidden: Tensor
        hidden, *others = seen.last
        self._rest = tuple(None if isinstance(value, Tensor) else value for value in others)
        return hidden

    @contextmanager
    def skipping(self, hidden: Tensor) -> Iterator[None]:
        """Calls of the model have ``hidden`` (batch, tokens, width) in place of what the frozen layers would give."""

        def passing(*args: Any, **kwargs: Any) -> Any:
            return self._returned(first_tensor(args, kwargs).detach())

        def entering(*args: Any, **kwargs: Any) -> Any:  # noqa: ARG001
            return self._returned(hidden)

        with _calling(self.layers, [*[passing] * (len(self.layers) - 1), entering]):
            yield

    def unfit(self) -> UserError:
        """What there is to say where layers can't be skipped."""
        return UserError(
            f"TrunkCache: {type(self.model).__name__} can't do without its lower layers: they aren't called one after"
            " the other, or give the layers above more than hidden states. Leave it out."
        )

    def _returned(self, hidden: Tensor) -> Any:
        return hidden if self._rest is None else (hidden, *self._rest)


_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _frozen(model: nn.Module, stack: Sequence[nn.Module]) -> int:
    """How many of the layers are below all that trains."""
    depths = layer_depths(model)
    first = {id(parameter) for parameter in stack[0].parameters()}
    trained = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (depths[name] == 0 or id(parameter) in first)
    ]
    if trained:
        more = f", … ({len(trained)} tensors)" if len(trained) > 3 else ""
        raise InjectionError(
            f"TrunkCache keeps what frozen layers put out, and no layer of {type(model).__name__} has nothing below it"
            f" that trains: {', '.join(trained[:3])}{more}. Train upper layers or the head alone (HeadOnly, TopLayers,"
            " LoRA(layers_to_transform=[...])), or leave TrunkCache out."
        )
    trains = [any(parameter.requires_grad for parameter in layer.parameters()) for layer in stack]
    return [*trains, True].index(True)


@contextmanager
def _calling(modules: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Have the modules run these in place of their own forwards."""
    before: list[Any] = [vars(module).get("forward") for module in modules]
    try:
        for module, forward in zip(modules, forwards, strict=True):
            vars(module)["forward"] = forward
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            vars(module).pop("forward")
            if own is not None:
                vars(module)["forward"] = own
