"""Attach what a method adds to a module, take it off again, freeze the rest.

**The one marker.** A module carries something of ours if, and only if, it is an instance of
:class:`Injected`. :func:`attach` changes the class of a module *in place* to a subclass of its own class
(as ``torch.nn.utils.parametrize`` and FSDP2 do), so that the module tree, its state-dict keys,
``isinstance`` and ``.weight`` stay what they were, and :func:`detach` leaves no trace. What is trainable,
saved, counted, merged or removed is derived from the marker and ``requires_grad``, never from names in keys.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_ft.injection.targets import Base, InjectionError, exactly, is_quantized, parent_of, resolve_targets

_FROZEN = "_frozen_by_lightning_ft"
_THAWED = "_thawed_by_lightning_ft"
_BEFORE = "_before_merge_by_lightning_ft"


class Injected:
    """The marker: a mixin that :func:`attach` puts before a module's own class.

    A subclass is one method's layer. It declares what it adds and owns ``forward``, where
    ``super().forward(...)`` is the module as it was.

    Attributes:
        method: the ``peft_type`` of the room that the layer belongs to, e.g. ``"LORA"``.
        acts_on: what of the module it changes: its ``"weights"``, its ``"outputs"``, its ``"inputs"``. Two
            methods can share a module if they act on different things; weights are the innermost.
        slot: name of the instance attribute that holds the layer's settings (a plain, comparable value).
        adds: the parameters that it adds, each with its name in PEFT's files.
        keeps: fixed tensors that it needs beside them, kept as buffers and saved in checkpoints.
        as_vectors: those of :attr:`adds` that are vectors, though they're stored as matrices of one row or column.
    """

    method: ClassVar[str]
    acts_on: ClassVar[str]
    slot: ClassVar[str]
    adds: ClassVar[Mapping[str, str]]
    keeps: ClassVar[tuple[str, ...]] = ()
    as_vectors: ClassVar[tuple[str, ...]] = ()

    held_in: Mapping[str, torch.dtype] = {}
    """By slot, the dtype that holds what was added; fp32 where nothing else was asked for."""
    added_drops: bool | None = None
    """Whether dropout of what was added drops, whatever mode the module was left in; None: as that says."""
    training: bool

    # Set on the classes that `_combine` makes.
    _mixins: ClassVar[tuple[type[Injected], ...]] = ()
    _original: ClassVar[type[nn.Module]]

    @property
    def in_training(self) -> bool:
        """Whether what was added trains; ``training`` would decide on dropout of the module's own (attention) too."""
        return self.training if self.added_drops is None else self.added_drops

    def train(self, mode: bool = True) -> Any:
        """As the module's own; who sets a mode means what was added too."""
        vars(self).pop("added_drops", None)
        return super().train(mode)  # type: ignore[misc]

    def folded(self, weight: Tensor) -> dict[str, Tensor]:
        """The module's own parameters as they are with what was added written into them.

        Args:
            weight: the module's weight, dense.
        """
        raise NotImplementedError

    def squared_change(self, weight: Tensor) -> Tensor:
        """``‖W' - W‖²``, a scalar: how far what was added takes the module's parameters.

        A method that can tell it without writing W' out does so: that is the memory of the weights once more.

        Args:
            weight: as for :meth:`folded`.
        """
        changes = [now - getattr(self, key).detach() for key, now in self.folded(weight).items()]
        return torch.stack([change.square().sum() for change in changes]).sum()

    @classmethod
    def check_mergeable(cls, name: str) -> None:
        """Raise NotImplementedError if what it adds to the module ``name`` is nothing that weights could hold."""
        if cls.acts_on != "weights":
            raise NotImplementedError(
                f"{cls.method} can't be merged: it changes the {cls.acts_on} of '{name}', not its weights. The model"
                " can be served as it is; save_adapter keeps what was trained."
            )

    @classmethod
    def file_key(cls, prefix: str, path: str, name: str) -> str:
        """The key in the files of what is called ``name`` there, of the module at ``path``."""
        return f"{prefix}{path}.{name}"

    @classmethod
    def in_files(cls, layer: Any) -> dict[str, Tensor]:
        """What the files hold of it: the values of :attr:`adds` by their names there, unless a method says more."""
        return {name: getattr(layer, key).detach() for key, name in cls.adds.items()}

    @classmethod
    def for_rows(cls, layers: Sequence[Any], index: Tensor) -> Callable[..., Tensor] | None:  # noqa: ARG003
        """How a module answers a batch whose rows belong to different adapters.

        Args:
            layers: the module as each adapter has it; None is the bare one.
            index: (rows,), which of them a row belongs to.

        Returns:
            A function of the bare module's forward and its input; None if there's nothing quicker than to let each
            layer answer its rows.
        """
        return None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # `module.to(bfloat16)`, as precision plugins call it, must not round what is trained: in bf16 an
        # update of 1e-4 on a weight of 0.05 is lost. Wider dtypes and moves between devices are followed.
        own = {
            id(tensor): self.held_in.get(mixin.slot, torch.float32)
            for mixin in self._mixins
            for name in (*mixin.adds, *mixin.keeps)
            for tensor in (getattr(self, name), getattr(self, name).grad)
            if tensor is not None
        }

        def precisely(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            held_in = own.get(id(tensor), moved.dtype)
            wider = moved.dtype.itemsize > held_in.itemsize
            return moved if moved.dtype == held_in or wider else tensor.to(moved.device, held_in)

        return super()._apply(precisely, recurse)  # type: ignore[misc]

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
    """The class of an ``original`` that carries ``mixins``; the first one's forward is the outermost.

    It has the original's name, under which transformers keeps what it knows of a model, and forward's signature, by
    which callers choose what to pass.
    """
    if not mixins:
        return original
    named = {key: getattr(original, key) for key in ("__module__", "__qualname__", "__doc__")}
    outermost: Any = mixins[0].forward  # type: ignore[attr-defined]
    forward: Any = FunctionType(
        outermost.__code__, outermost.__globals__, "forward", outermost.__defaults__, outermost.__closure__
    )
    forward.__kwdefaults__ = outermost.__kwdefaults__
    forward.__signature__ = signature(original.forward)
    own = {**named, "forward": forward, "_mixins": mixins, "_original": original}
    return type(original.__name__, (*mixins, original), own)


def _new(mixins: tuple[type[Injected], ...], original: Any) -> Any:
    cls = _combine(mixins, original)
    return cls.__new__(cls)


def _added(cls: type) -> list[str]:
    return [name for mixin in cls._mixins for name in (*mixin.adds, *mixin.keeps)]  # type: ignore[attr-defined]


def attach(
    model: nn.Module,
    name: str,
    mixin: type[Injected],
    settings: Any,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Make ``model.get_submodule(name)`` an instance of ``mixin`` too.

    Args:
        model: the model that ``name`` is a path in.
        name: the module to change.
        mixin: what to add; its class attribute ``adds`` names the parameters.
        settings: a plain value, kept on the module as ``mixin.slot``. Attaching the same mixin again
            with equal settings does nothing.
        tensors: a value for each name of ``mixin.adds`` and ``mixin.keeps``; kept on the module's device.
        dtype: what holds them, whatever the module is cast to; a wider one is followed.

    Raises:
        InjectionError: as :func:`check_attachable`.
    """
    if carries(model, name, mixin, settings):
        return
    check_attachable(model, name, mixin)
    module: Any = model.get_submodule(name)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    mixins: Any = getattr(module, "_mixins", ())
    original: Any = getattr(module, "_original", type(module))
    stacked = (*mixins, mixin) if mixin.acts_on == "weights" else (mixin, *mixins)
    module.__class__ = _combine(stacked, original)
    setattr(module, mixin.slot, settings)
    for key in mixin.adds:
        module.register_parameter(key, nn.Parameter(tensors[key].to(device=device, dtype=dtype).contiguous()))
    for key in mixin.keeps:
        module.register_buffer(key, tensors[key].to(device=device, dtype=dtype))
    module.held_in = {**module.held_in, mixin.slot: dtype}
    leave_fast_path(model, name)


def carries(model: nn.Module, name: str, mixin: type[Injected], settings: Any) -> bool:
    """Whether ``model.get_submodule(name)`` is an instance of ``mixin`` already, with these settings.

    Raises:
        InjectionError: if it is one with other settings.
    """
    module: Any = model.get_submodule(name)
    if mixin not in getattr(module, "_mixins", ()):
        return False
    if getattr(module, mixin.slot) != settings:
        raise InjectionError(
            f"'{name}' already carries {mixin.method} with {getattr(module, mixin.slot)}; asked for"
            f" {settings}. Use the same settings, or merge or remove what is there first."
        )
    return True


@dataclass(frozen=True)
class Layer:
    """What is to be put onto one module: the mixin, its settings, and how its tensors start."""

    mixin: type[Injected]
    settings: Any
    start: Callable[[], Mapping[str, Tensor]]


def inject_layers(
    base: Base,
    plan: Mapping[str, Layer],
    method: str,
    saved: Sequence[str] = (),
    parameters: Sequence[str] = (),
    *,
    dtype: torch.dtype = torch.float32,
) -> list[str]:
    """Freeze ``base`` and attach what ``plan`` says, all or nothing; doing it twice is doing it once.

    Args:
        base: where.
        plan: a layer for each path, relative to the base's root; what another method trains whole is left out.
        method: the name of the method that asks, for messages and for :func:`freeze_base`.
        saved, parameters: what of the base trains too, as for :func:`freeze_base`.
        dtype: what holds the added tensors; those that are there already are put into it.

    Returns:
        The paths in the model that was searched.

    Raises:
        InjectionError: if the base carries this method elsewhere or otherwise, or a module can't carry it, or nothing
            is left of the plan.
    """
    plan = _without_whole(base, plan, method)
    kinds = {layer.mixin.method for layer in plan.values()}
    present = [name for name, layer in injected_modules(base.root) if any(m.method in kinds for m in layer._mixins)]
    if present and set(present) != set(plan):
        raise InjectionError(
            f"The model already carries {method} on {len(present)} modules ({', '.join(present[:3])}, …), and this"
            f" {method} names {len(plan)} others. Merge or remove it first."
        )
    new = {name: layer for name, layer in plan.items() if not carries(base.root, name, layer.mixin, layer.settings)}
    for name, layer in new.items():
        check_attachable(base.root, name, layer.mixin)
    of_weights = [name for name, layer in new.items() if layer.mixin.acts_on == "weights"]
    _refuse_computed(base.root, of_weights, method)
    _refuse_tied(base.root, of_weights, method)
    starts = {name: layer.start() for name, layer in new.items()}
    freeze_base(base, method, saved, parameters)  # from here on nothing is refused, and the model changes
    for name, layer in plan.items():
        if name in new:
            attach(base.root, name, layer.mixin, layer.settings, starts[name], dtype)
        else:
            _hold(base.root.get_submodule(name), layer.mixin, dtype)
    return [base.prefixed(name) for name in plan]


def _hold(module: Any, mixin: type[Injected], dtype: torch.dtype) -> None:
    """Have ``dtype`` hold what ``mixin`` added, in the same tensors; a wider one that the module was cast to stays."""
    if module.held_in[mixin.slot] != dtype:
        module.held_in = {**module.held_in, mixin.slot: dtype}
        for tensor in (getattr(module, key) for key in (*mixin.adds, *mixin.keeps)):
            if tensor.dtype.itemsize <= torch.float32.itemsize:
                tensor.grad, tensor.data = None, tensor.data.to(dtype)


def _without_whole(base: Base, plan: Mapping[str, Layer], method: str) -> dict[str, Layer]:
    """What is left of ``plan`` without the modules that another method trains whole: these need no adapter."""
    record = vars(base.root).get(_FROZEN, {"trained": {}})
    whole = {name for other, names in record["trained"].items() if other != method for name in names}
    added = injected_names(base.root)

    def is_whole(path: str) -> bool:
        own = {name for name, _ in base.root.get_submodule(path).named_parameters(prefix=path)} - added
        return bool(own) and own <= whole

    left = {path: layer for path, layer in plan.items() if layer.mixin.acts_on == "inputs" or not is_whole(path)}
    if plan and not left:
        raise InjectionError(
            f"Nothing is left for {method}: another method of this model trains {_few(plan)} whole already"
            " (modules_to_save). Name other modules, or leave one of the two methods out."
        )
    return left


def first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """What a module computes with: the first of the arguments of its forward, named or not, that is a tensor."""
    if args and isinstance(args[0], Tensor):
        return args[0]
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), torch.empty(0))


def detach(model: nn.Module, name: str, mixin: type[Injected] | None = None) -> None:
    """Remove ``mixin`` (default: all) from ``model.get_submodule(name)``: its class and keys are as before."""
    module: Any = model.get_submodule(name)
    removed = tuple(m for m in getattr(module, "_mixins", ()) if mixin is None or issubclass(m, mixin))
    for gone in removed:
        for key in (*gone.adds, *gone.keeps):
            delattr(module, key)
        delattr(module, gone.slot)
        module.held_in = {slot: dtype for slot, dtype in module.held_in.items() if slot != gone.slot}
    if removed:
        kept = tuple(m for m in module._mixins if m not in removed)
        module.__class__ = _combine(kept, module._original)
        if not kept:
            del module.held_in
    _return_to_fast_path(model, name)


def with_values(layer: Any, value_of: Callable[[Tensor], Tensor]) -> Any:
    """A copy of an injected layer in which what was added is what ``value_of`` makes of it; the rest is the same."""
    copied = _new(layer._mixins, layer._original)
    vars(copied).update(vars(layer))
    added = {key: nn.Parameter(value_of(getattr(layer, key).detach()), False) for m in layer._mixins for key in m.adds}
    vars(copied)["_parameters"] = {**layer._parameters, **added}
    return copied


def injected_modules(model: nn.Module) -> Iterator[tuple[str, Injected]]:
    """The modules that carry something of ours, with their paths."""
    for name, module in model.named_modules():
        if isinstance(module, Injected):
            yield name, module


def injected_names(model: nn.Module) -> set[str]:
    """The full names, all that they have, of the parameters and buffers that methods added to ``model``."""
    modules = model.named_modules(remove_duplicate=False)
    return {
        f"{name}.{key}".lstrip(".")
        for name, module in modules
        if isinstance(module, Injected)
        for key in _added(type(module))
    }


def freeze_base(base: Base, method: str, saved: Sequence[str] = (), parameters: Sequence[str] = ()) -> None:
    """Stop training the pretrained base, save what methods added, and what ``method`` trains of it.

    What was frozen is remembered on the root, so that :func:`thaw` can give it back. Doing it twice is doing
    it once; what another method trains goes on training.

    Args:
        base: what to freeze.
        method: who asks.
        saved: paths of modules of its root that train whole.
        parameters: names, in its root, of parameters that train.

    Raises:
        InjectionError: if ``method`` trained other parts of it before, which would go on training unsaid, or a module
            in ``saved`` carries what another method added.
    """
    _refuse_adapted(base, method, saved)
    trained = _trained(base, saved, parameters)
    refuse_packed(base, trained, method)
    record = vars(base.root).get(_FROZEN) or {"parts": [], "parameters": [], "trained": {}}
    before = record["trained"].get(method, trained)
    of_others = {name for other, names in record["trained"].items() if other != method for name in names}
    new = [name for name in trained if name not in before]
    gone = [name for name in before if name not in trained and name not in of_others]
    if new or gone:
        raise InjectionError(
            f"{method} trained other parts of the base before: {_few(new)} would be new, {_few(gone)} left out. Use the"
            " same settings (modules_to_save and the like), or merge first."
        )
    if base.frozen not in record["parts"]:
        record["parts"].append(base.frozen)
        added = injected_names(base.root)
        for name, parameter in base.named_parameters():
            if parameter.requires_grad and name not in added:
                parameter.requires_grad_(False)
                record["parameters"].append(name)
    record["trained"][method] = trained
    setattr(base.root, _FROZEN, record)
    vars(base.root).pop(_THAWED, None)
    unfreeze(base.root.get_submodule(name) for name in saved)
    for name in parameters:
        base.root.get_parameter(name).requires_grad_(True)


def refuse_packed(base: Base, names: Iterable[str], method: str) -> None:
    """Raise InjectionError if one of the parameters that ``method`` is to train is packed into a few bits."""
    for name in names:
        module = base.root.get_submodule(name.rpartition(".")[0])
        if name.endswith(".weight") and is_quantized(module):
            raise InjectionError(
                f"{method} is to train '{name}', which is packed into 4 or 8 bits and can't train. Load the model"
                " without quantization, or use a method that trains beside frozen weights: LoRA and its kin, AdaLoRA,"
                " Adapter, IA3, prompts, BitFit, LayerNormTuning, HeadOnly."
            )


def trained_names(base: Base) -> set[str]:
    """The parameters of the base, by their names in its root, that methods train so far."""
    return {name for names in vars(base.root).get(_FROZEN, {"trained": {}})["trained"].values() for name in names}


def _refuse_adapted(base: Base, method: str, saved: Sequence[str]) -> None:
    """A module that trains whole needs no adapter beside its weights, and files would have no place for it."""
    inside = tuple(f"{name}." for name in saved)
    for path, layer in injected_modules(base.root):
        there = next((mixin for mixin in layer._mixins if mixin.acts_on != "inputs"), None)
        if there is not None and f"{path}.".startswith(inside):
            raise InjectionError(
                f"{method} is to train '{path}' whole (modules_to_save), which carries {there.method} already. Inject"
                f" {method} first, and {there.method} leaves it out; or merge what is there."
            )


def train_own(
    base: Base,
    method: str,
    own: Callable[[nn.Module], list[str]],
    target_modules: str | Sequence[str] | None,
    exclude_modules: str | Sequence[str] | None,
    saved: Sequence[str],
) -> list[str]:
    """:func:`freeze_base` for a method that trains some parameters of each module that it is for.

    Args:
        base: what to freeze.
        method: who asks.
        own: the names of those parameters in a module; none, where the method isn't for it.
        target_modules, exclude_modules: the modules, as for :func:`resolve_targets`; by default all.
        saved: paths of modules of its root that train whole.

    Returns:
        The modules' paths in the model that was searched.
    """
    targets = target_modules or exactly(name for name, module in base.named_modules() if own(module))
    names = resolve_targets(base, targets, lambda module: bool(own(module)), saved, exclude_modules)
    trained = [f"{name}.{key}" for name in names for key in own(base.root.get_submodule(name))]
    freeze_base(base, method, saved, trained)
    return [base.prefixed(name) for name in names]


def freeze_all_but(base: Base, method: str, saved: Sequence[str] = (), parameters: Sequence[str] = ()) -> None:
    """:func:`freeze_base` for a method that says of every parameter of the base if it trains.

    Raises:
        InjectionError: if another method added something to the base, or trains something else of it.
    """
    refuse_injected(base, method)
    own = _trained(base, saved, parameters)
    for other, trained in vars(base.root).get(_FROZEN, {"trained": {}})["trained"].items():
        if other != method and (more := [name for name in trained if name not in own]):
            raise InjectionError(
                f"{_few(more)} of the base would go on training, as {other} left it, and {method} says of all of the"
                " base what trains. Merge first."
            )
    freeze_base(base, method, saved, parameters)


def _trained(base: Base, saved: Sequence[str], parameters: Sequence[str]) -> list[str]:
    """The parameters of the base that lie in ``saved`` modules, or are named."""
    whole, named = tuple(f"{name}." for name in saved), set(parameters)
    return [name for name, _ in base.named_parameters() if name.startswith(whole) or name in named]


def _few(names: Iterable[str]) -> str:
    listed = [*names] or ["nothing"]
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def thaw(model: nn.Module) -> None:
    """Train again what :func:`freeze_base` had frozen in ``model``; only :func:`is_thawed` tells that it had."""
    for root in list(model.modules()):
        if (record := vars(root).pop(_FROZEN, None)) is not None:
            setattr(root, _THAWED, True)
            for name in record["parameters"]:
                root.get_parameter(name).requires_grad_(True)


def is_thawed(base: Base) -> bool:
    """Whether ``base`` was fine-tuned and is a plain model again (merged, above all), not yet to be fine-tuned anew."""
    return _THAWED in vars(base.root)


def frozen_parts(model: nn.Module) -> set[str]:
    """Paths of the pretrained parts that :func:`freeze_base` froze in ``model``, whichever method asked."""
    records = {name: vars(module).get(_FROZEN, {"parts": []}) for name, module in model.named_modules()}
    return {f"{name}.{part}".strip(".") for name in records for parts in records[name]["parts"] for part in parts}


class _Before:
    """A module as it was before a change: what it takes to put it back, to the bit."""

    def __init__(self, module: nn.Module) -> None:
        self.mixins: tuple[type[Injected], ...] = getattr(module, "_mixins", ())
        self.original: Any = getattr(module, "_original", type(module))
        self.attributes = dict(vars(module))
        self.tensors: dict[str, Any] = {**module._parameters, **module._buffers}
        self.values = {key: p.detach().clone() for key, p in module._parameters.items() if p is not None}
        of_base = vars(module).get(_FROZEN, {"parameters": []})["parameters"]
        self.frozen = [name for name in of_base if not module.get_parameter(name).requires_grad]

    def drop_unchanged(self, module: nn.Module) -> None:
        """Keep what ``module`` hasn't any more: attributes and tensors that are gone, values written over."""
        now: dict[str, Any] = {**module._parameters, **module._buffers}
        gone = {key for key, tensor in self.tensors.items() if now.get(key) is not tensor}
        own = vars(module)
        self.attributes = {key: v for key, v in self.attributes.items() if key not in own or own[key] is not v}
        self.values = {key: v for key, v in self.values.items() if key not in gone and not torch.equal(v, now[key])}
        self.tensors = {key: self.tensors[key] for key in self.tensors if key in gone}

    def put_back(self, module: nn.Module) -> None:
        """Make ``module`` what it was, on the device where it is now."""
        device = next((p.device for p in module._parameters.values() if p is not None), None)
        module.__class__ = _combine(self.mixins, self.original)
        vars(module).update(self.attributes)
        for key, tensor in self.tensors.items():
            (module._parameters if isinstance(tensor, nn.Parameter) else module._buffers)[key] = tensor
        for key, value in self.values.items():
            module.get_parameter(key).data.copy_(value)
        for name in self.frozen:
            module.get_parameter(name).requires_grad_(False)
        if device is not None:
            module._apply(lambda tensor: tensor.to(device), recurse=False)


@contextmanager
def remembering(model: nn.Module) -> Iterator[None]:
    """Keep what the block changes of injected modules, on them, so that :func:`bring_back` can undo it.

    It's kept as plain attributes: no key of a state dict shows it, and copies and pickles of the model have it too.
    It costs the memory of what was taken off and of the values that were written over.
    """
    kept = [(m, _Before(m)) for m in model.modules() if isinstance(m, Injected) or _FROZEN in vars(m)]
    yield
    if kept:
        forget(model)
    for module, before in kept:
        before.drop_unchanged(module)
        vars(module)[_BEFORE] = before


def bring_back(model: nn.Module) -> list[str]:
    """Undo the last change under :func:`remembering`; what has been trained since in what it changed is lost.

    Returns:
        Paths of the modules that carry something again.

    Raises:
        InjectionError: if nothing is remembered, or a method has been injected there since. Nothing is changed then.
    """
    changed = [(name, module) for name, module in model.named_modules() if _BEFORE in vars(module)]
    if not changed:
        raise InjectionError(
            "There is nothing to unmerge: the model was merged for good, or never. Only merge(model, reversible=True)"
            " keeps the original weights; otherwise load them again, and load_adapter() what was saved of the method."
        )
    for name, module in changed:
        carried = [mixin.method for mixin in getattr(module, "_mixins", ())]
        if carried or _FROZEN in vars(module):
            raise InjectionError(
                f"'{name}' was injected again after the merge ({', '.join(carried) or 'its base is frozen'}): what was"
                " merged can't come back under it. Merge that too, or load the pretrained weights again."
            )
    for name, module in changed:
        vars(module).pop(_THAWED, None)
        vars(module).pop(_BEFORE).put_back(module)
        if isinstance(module, Injected):
            leave_fast_path(model, name)
    return [name for name, module in changed if isinstance(module, Injected)]


def forget(model: nn.Module) -> None:
    """Let go of what :func:`remembering` keeps: what was changed stays so."""
    for module in model.modules():
        vars(module).pop(_BEFORE, None)


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Put every module of ``model`` back as it was before the block if that raises: its class, its attributes.

    So what was injected is off, what was frozen thawed, what was untied tied, and what was packed dense.
    """
    held = [(m, type(m), dict(vars(m)), dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    marked = [(m, copy.deepcopy(vars(m)[_FROZEN])) for m in model.modules() if _FROZEN in vars(m)]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for module, kind, attributes, parameters, buffers in held:
            module.__class__ = kind
            for now, before in (
                (vars(module), attributes),
                (attributes["_parameters"], parameters),
                (attributes["_buffers"], buffers),
            ):
                now.clear()
                now.update(before)
        for owner, mark in marked:
            setattr(owner, _FROZEN, mark)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        raise


@contextmanager
def twin(model: nn.Module) -> Iterator[Any]:
    """A second tree of modules over the same tensors: what is injected into it, ``model`` doesn't see.

    It carries nothing. After the block the tensors, which are the same, train or don't as before.
    """
    made: dict[nn.Module, nn.Module] = {}

    def again(module: nn.Module) -> nn.Module:
        if module not in made:
            kind = getattr(module, "_original", type(module))
            made[module] = copied = kind.__new__(kind)
            # Parameters, hooks and the like lie in dicts, which the copy may change.
            vars(copied).update({key: copy.copy(v) if isinstance(v, dict) else v for key, v in vars(module).items()})
            vars(copied).pop(_FROZEN, None)
            copied._modules.update({key: c if c is None else again(c) for key, c in module._modules.items()})
        return made[module]

    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield again(model)
    finally:
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


def refuse_injected(base: Base, method: str) -> None:
    """Raise InjectionError if the base carries something that ``method`` adds nothing to and doesn't train."""
    carried = sorted({mixin.method for _, layer in injected_modules(base.root) for mixin in layer._mixins})
    if carried:
        raise InjectionError(
            f"The model carries {', '.join(carried)}, which {method} would go on training. Merge it first,"
            " or take a model without."
        )


def unfreeze(modules: Iterable[nn.Module]) -> None:
    """Train every parameter of ``modules``; integer parameters (packed weights) can't be and are left."""
    for module in modules:
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)


def check_attachable(model: nn.Module, name: str, mixin: type[Injected]) -> None:
    """See that ``mixin`` would run on ``model.get_submodule(name)``, and not go astray.

    Raises:
        InjectionError: if the module's forward isn't the one that runs (``nn.MultiheadAttention.out_proj``, a
            forward replaced on the instance), it is sharded, its weights are packed for inference, or another method
            acts on the same thing of it.
    """
    module, parent = model.get_submodule(name), parent_of(model, name)
    rivals = [other for other in getattr(module, "_mixins", ()) if other.acts_on == mixin.acts_on]
    if rivals:
        raise InjectionError(
            f"'{name}' already carries {rivals[0].method}, and {mixin.method} would act on its {mixin.acts_on} too."
            " Use one of the two there: name other modules, or merge or remove what is there first. An adapter that was"
            f" loaded trains on as what it is, {getattr(module, rivals[0].slot)}: PiSSA and OLoRA are saved as a plain"
            " LoRA of twice the rank, P-tuning as a plain prompt."
        )
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


def _refuse_computed(root: nn.Module, names: Sequence[str], method: str) -> None:
    """A weight that is computed anew at each forward can't take up a change."""
    for name in names:
        if "weight" not in root.get_submodule(name)._parameters:
            raise InjectionError(
                f"'{name}' computes its weight from other parameters (weight_norm, spectral_norm or another"
                f" parametrization), so that what {method} changes of it couldn't be merged. Make it a plain one first:"
                " torch.nn.utils.parametrize.remove_parametrizations(module, 'weight'), or remove_weight_norm(module)."
            )


def _refuse_tied(root: nn.Module, names: Sequence[str], method: str) -> None:
    """A weight that two modules share would be adapted in one of them and, once merged, changed in both."""
    owners: dict[int, list[str]] = {}
    for name, module in root.named_modules():
        if (weight := module._parameters.get("weight")) is not None:
            owners.setdefault(id(weight), []).append(name)
    for sharing in owners.values():
        if len(sharing) > 1 and (target := next((name for name in sharing if name in names), None)) is not None:
            other = next(name for name in sharing if name != target)
            raise InjectionError(
                f"'{target}' shares its weight with '{other}': {method} would adapt the one, and a merge change both."
                f" Leave '{target}' out of target_modules, or untie the two (tie_word_embeddings=False)."
            )


# In eval mode torch's TransformerEncoderLayer hands its weights to one fused kernel and calls no forward of
# its parts; what is injected there would be skipped, in evaluation only, and packed weights misread. These attributes
# switch that off.
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


def leave_fast_path(model: nn.Module, name: str) -> None:
    """Have the modules around the one at ``name`` call its forward, in evaluation too."""
    for module, switch in _fast_paths_around(model, name):
        if _SAVED not in vars(module):
            setattr(module, _SAVED, getattr(module, switch))
            setattr(module, switch, 0)


def _return_to_fast_path(model: nn.Module, name: str) -> None:
    for module, switch in _fast_paths_around(model, name):
        held = any(isinstance(part, Injected) or is_quantized(part) for part in module.modules())
        if _SAVED in vars(module) and not held:
            setattr(module, switch, getattr(module, _SAVED))
            delattr(module, _SAVED)
