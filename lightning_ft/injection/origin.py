"""The base as it was before training, beside the model that trains over it."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ft.injection.surgery import Injected, injected_names, twin
from lightning_ft.injection.targets import Base, InjectionError, is_quantized


class Origin:
    """The pretrained values of what trains of a base; all else of it stays as it was, and needs no copy.

    Under an adapter that is nothing: what was added is left out, and there is the base. In full fine-tuning it's the
    base once more.
    """

    def __init__(self) -> None:
        self._values: dict[str, Tensor] = {}

    def remember(self, base: Base) -> None:
        """Copy what trains of ``base``, but for what was copied before: whatever trains since isn't pretrained now."""
        added = injected_names(base.root)
        for name, parameter in base.named_parameters():
            if parameter.requires_grad and name not in added and name not in self._values:
                self._values[name] = parameter.detach().clone()

    def values(self, base: Base) -> dict[str, Tensor]:
        """The copies by their names in the base's root, where the parameters are now, and in their dtypes."""
        for name, value in self._values.items():
            self._values[name] = value.to(base.root.get_parameter(name))
        return self._values

    def bare(self, base: Base) -> Any:
        """The root of ``base`` as it was, as a second tree of modules over the same tensors: frozen, evaluating.

        Heads are those in training. It goes by no move to another device.
        """
        copies = {id(base.root.get_parameter(name)): value for name, value in self.values(base).items()}
        with twin(base.root) as other:
            pass
        for module in other.modules():
            for key, parameter in module._parameters.items():
                if id(parameter) in copies:
                    module._parameters[key] = nn.Parameter(copies[id(parameter)], requires_grad=False)
        return other.eval()

    def changes(self, base: Base, without: Container[str] = ()) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Each parameter of the base that training changes: its name, as it is now, as it was.

        What methods added is written into it as it is now, and gradients of that reach what trains.

        Args:
            base: in training.
            without: paths of modules, with what was added to them, to leave out.
        """
        values, done = self.values(base), set()
        for path, layer in _layers(base):
            if path in without:
                continue
            for key, now in layer.folded(layer.weight).items():
                name = f"{path}.{key}"
                done.add(name)
                yield name, now, values.get(name, getattr(layer, key).detach())
        for name, before in values.items():
            if name not in done:
                yield name, base.root.get_parameter(name), before

    def squared_change(self, base: Base) -> Tensor:
        """``‖W - W₀‖²`` over all of the base, a scalar; gradients as of :meth:`changes`."""
        # Where nothing of the module's own trains, its layer may know a shorter way than to write the change out.
        short = {path: layer for path, layer in _layers(base) if not _own_trains(layer)}
        parts = [layer.squared_change(layer.weight) for layer in short.values()]
        parts += [(now - before).square().sum() for _, now, before in self.changes(base, short)]
        return torch.stack(parts).sum() if parts else torch.zeros((), device=_device(base))


def refuse_unfoldable(base: Base, who: str) -> None:
    """Raise InjectionError if something in ``base`` changes anything but dense weights, which ``who`` looks at."""
    for path, layer in _layers(base):
        for mixin in layer._mixins:
            if mixin.acts_on != "weights":
                raise InjectionError(
                    f"{who} compares weights, and {mixin.method} changes the {mixin.acts_on} of '{path}'. Use a penalty"
                    " that compares outputs: KL, Replay."
                )
        if is_quantized(layer):
            raise InjectionError(
                f"{who} compares weights, and those of '{path}' are packed. Use a penalty that compares"
                " outputs: KL, Replay."
            )


def _layers(base: Base) -> Iterator[tuple[str, Any]]:
    for path, module in base.named_modules():
        if isinstance(module, Injected):
            yield path, module


def _own_trains(layer: Any) -> bool:
    added = {key for mixin in layer._mixins for key in mixin.adds}
    return any(p.requires_grad for key, p in layer.named_parameters(recurse=False) if key not in added)


def _device(base: Base) -> torch.device:
    return next(parameter for _, parameter in base.named_parameters()).device
