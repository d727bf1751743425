"""Attach what a method adds to a module, take it off again, freeze the rest.

**The one marker.** A module carries something of ours if, and only if, it is an instance of
:class:`Injected`. :func:`attach` changes the class of a module *in place* to a subclass of its own class
(as ``torch.nn.utils.parametrize`` and FSDP2 do), so that the module tree, its state-dict keys,
``isinstance`` and ``.weight`` stay what they were, and :func:`detach` leaves no trace. What is trainable,
saved, counted, merged or removed is derived from the marker and ``requires_grad``, never from names in keys.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_ft.injection.targets import Base, InjectionError, parent_of

_FROZEN = "_frozen_by_lightning_ft"


class Injected:
    """The marker: a mixin that :func:`attach` puts before a module's own class.

    A subclass is one method's layer. It declares what it adds and owns ``forward``, where
    ``super().forward(...)`` is the module as it was.

    Attributes:
        method: the ``peft_type`` of the room that the layer belongs to, e.g. ``"LORA"``.
        slot: name of the instance attribute that holds the layer's settings (a plain, comparable value).
        adds: the parameters that it adds, each with its name in PEFT's files.
    """

    method: ClassVar[str]
    slot: ClassVar[str]
    adds: ClassVar[Mapping[str, str]]

    # Set on the classes that `_combine` makes.
    _mixins: ClassVar[tuple[type[Injected], ...]] = ()
    _original: ClassVar[type[nn.Module]]

    def fold(self) -> None:
        """Write what was added into the module's own weights (called by ``merge``, which then detaches)."""
        raise NotImplementedError(f"{type(self).__name__} can't be merged into the module's weights.")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # `module.to(bfloat16)`, as precision plugins call it, must not touch what is trained: in bf16 an
        # update of 1e-4 on a weight of 0.05 is lost. Moves between devices are followed.
        own = {
            id(tensor)
            for name in _added(type(self))
            for tensor in (self._parameters[name], self._parameters[name].grad)  # type: ignore[attr-defined]
            if tensor is not None
        }

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in own and moved.dtype != tensor.dtype else moved

        return super()._apply(keep_dtype, recurse)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The combined class is made at run time: pickle (and deepcopy) its parts instead.
        reduced: Any = super().__reduce_ex__(protocol)
        return (_new, (self._mixins, self._original), *reduced[2:])

    def extra_repr(self) -> str:
        """The module's own, and the settings of what was added."""
        own = ", ".join(f"{mixin.slot}={getattr(self, mixin.slot)}" for mixin in self._mixins)
        return f"{super().extra_repr()}, {own}"  # type: ignore[misc]


@functools.cache
def _combine(mixins: tuple[type[Injected], ...], original: Any) -> Any:
    """The class of an ``original`` that carries ``mixins``; the first one's forward is the outermost."""
    if not mixins:
        return original
    return type(mixins[0].__name__, (*mixins, original), {"_mixins": mixins, "_original": original})


def _new(mixins: tuple[type[Injected], ...], original: Any) -> Any:
    cls = _combine(mixins, original)
    return cls.__new__(cls)


def _added(cls: type) -> list[str]:
    return [name for mixin in cls._mixins for name in mixin.adds]  # type: ignore[attr-defined]


def attach(model: nn.Module, name: str, mixin: type[Injected], settings: Any, tensors: Mapping[str, Tensor]) -> None:
    """Make ``model.get_submodule(name)`` an instance of ``mixin`` too.

    Args:
        model: the model that ``name`` is a path in.
        name: the module to change.
        mixin: what to add; its class attribute ``adds`` names the parameters.
        settings: a plain value, kept on the module as ``mixin.slot``. Attaching the same mixin again
            with equal settings does nothing.
        tensors: a value for each name of ``mixin.adds``; kept in fp32 on the device of the module's weight.

    Raises:
        InjectionError: if the module already carries this method with other settings, or if its forward
            isn't the one that runs (``nn.MultiheadAttention.out_proj``, a forward replaced on the instance).
    """
    module: Any = model.get_submodule(name)
    if isinstance(module, Injected) and any(issubclass(m, mixin) for m in module._mixins):
        if getattr(module, mixin.slot) != settings:
            raise InjectionError(
                f"'{name}' already carries {mixin.method} with {getattr(module, mixin.slot)}; asked for"
                f" {settings}. Use the same settings, or merge or remove what is there first."
            )
        return
    check_attachable(model, name)

    device = next((p.device for p in module.parameters(recurse=False)), torch.device("cpu"))
    mixins: Any = getattr(module, "_mixins", ())
    original: Any = getattr(module, "_original", type(module))
    module.__class__ = _combine((mixin, *mixins), original)
    setattr(module, mixin.slot, settings)
    for key in mixin.adds:
        value = tensors[key].to(device=device, dtype=torch.float32)
        module.register_parameter(key, nn.Parameter(value))
    _leave_fast_path(model, name)


def detach(model: nn.Module, name: str, mixin: type[Injected] | None = None) -> None:
    """Remove ``mixin`` (default: all) from ``model.get_submodule(name)``: its class and keys are as before."""
    module: Any = model.get_submodule(name)
    removed = tuple(m for m in getattr(module, "_mixins", ()) if mixin is None or issubclass(m, mixin))
    for gone in removed:
        for key in gone.adds:
            delattr(module, key)
        delattr(module, gone.slot)
    if removed:
        kept = tuple(m for m in module._mixins if m not in removed)
        module.__class__ = _combine(kept, module._original)
    _return_to_fast_path(model, name)


def injected_modules(model: nn.Module) -> Iterator[tuple[str, Injected]]:
    """The modules that carry something of ours, with their paths."""
    for name, module in model.named_modules():
        if isinstance(module, Injected):
            yield name, module


def injected_names(model: nn.Module) -> set[str]:
    """The full names of all parameters that methods added to ``model``."""
    return {
        f"{name}.{key}" if name else key for name, module in injected_modules(model) for key in _added(type(module))
    }


def freeze_base(base: Base, saved: Sequence[str] = ()) -> None:
    """Stop training the pretrained base, save what methods added and the modules ``saved`` of its root.

    What was frozen is remembered on the root, so that :func:`thaw` can give it back. Doing it twice is doing
    it once.

    Raises:
        InjectionError: if it was frozen before with other ``saved``, which would then stop training unsaid.
    """
    of_base = [name for name, _ in base.named_modules() if name in saved]
    record = vars(base.root).setdefault(_FROZEN, {"parameters": [], "saved": of_base})
    if record["saved"] != of_base:
        raise InjectionError(
            f"modules_to_save names {', '.join(of_base) or 'nothing'} of the base, and it was fine-tuned before with"
            f" {', '.join(record['saved']) or 'nothing'} in it. Use the same, or merge first."
        )
    added = injected_names(base.root)
    for part in base.frozen:
        for name, parameter in base.root.get_submodule(part).named_parameters(prefix=part):
            if parameter.requires_grad and name not in added:
                parameter.requires_grad_(False)
                record["parameters"].append(name)
    unfreeze(base.root.get_submodule(name) for name in saved)


def thaw(model: nn.Module) -> None:
    """Train again what :func:`freeze_base` had frozen in ``model``, and forget that it had."""
    for root in list(model.modules()):
        for name in vars(root).pop(_FROZEN, {"parameters": []})["parameters"]:
            root.get_parameter(name).requires_grad_(True)


def refuse_injected(base: Base, method: str) -> None:
    """Raise InjectionError if the base carries something that ``method`` adds nothing to and doesn't train."""
    carried = sorted({mixin.method for _, layer in injected_modules(base.root) for mixin in layer._mixins})
    if carried:
        raise InjectionError(
            f"The model carries {', '.join(carried)}, which {method} would go on training. Merge it first."
        )


def unfreeze(modules: Iterable[nn.Module]) -> None:
    """Train every parameter of ``modules``; integer parameters (packed weights) can't be and are left."""
    for module in modules:
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)


def check_attachable(model: nn.Module, name: str) -> None:
    """Raise InjectionError if what is attached to ``model.get_submodule(name)`` would never run, or go astray."""
    module, parent = model.get_submodule(name), parent_of(model, name)
    if any(type(parameter).__name__ == "DTensor" for parameter in module.parameters(recurse=False)):
        raise InjectionError(
            f"'{name}' is sharded already (DTensor): what is injected now would differ between the ranks. Inject in"
            " configure_model(), before fully_shard: LoRA(...).inject(self)."
        )
    if isinstance(parent, nn.MultiheadAttention):
        raise InjectionError(
            f"'{name}' can't be adapted: nn.MultiheadAttention reads its weight and never calls its forward."
            " Leave it out of target_modules."
        )
    if "forward" in vars(module):
        raise InjectionError(
            f"'{name}' can't be adapted: its forward was replaced on the instance (accelerate's device_map"
            " or offloading does so), and what is injected would never run. Load the model without it."
        )


# In eval mode torch's TransformerEncoderLayer hands its weights to one fused kernel and calls no forward of
# its parts; what is injected there would be skipped, in evaluation only. These attributes switch that off.
_FAST_PATH = {
    nn.TransformerEncoder: "use_nested_tensor",
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
}
_SAVED = "_fast_path_before_injection"


def _fast_paths_around(model: nn.Module, name: str) -> Iterator[tuple[nn.Module, str]]:
    parts = name.split(".")
    for depth in range(len(parts)):
        ancestor = model.get_submodule(".".join(parts[:depth]))
        for kind, switch in _FAST_PATH.items():
            if isinstance(ancestor, kind):
                yield ancestor, switch


def _leave_fast_path(model: nn.Module, name: str) -> None:
    for ancestor, switch in _fast_paths_around(model, name):
        if _SAVED not in vars(ancestor):
            setattr(ancestor, _SAVED, getattr(ancestor, switch))
            setattr(ancestor, switch, 0)


def _return_to_fast_path(model: nn.Module, name: str) -> None:
    for ancestor, switch in _fast_paths_around(model, name):
        if _SAVED in vars(ancestor) and not any(injected_modules(ancestor)):
            setattr(ancestor, switch, getattr(ancestor, _SAVED))
            delattr(ancestor, _SAVED)
