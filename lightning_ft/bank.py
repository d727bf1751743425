"""AdapterBank: many adapters over one base, switched by name, or mixed row by row in one batch.

Each module that an adapter changes asks the bank's one shared state how to answer. In it lies, for each adapter, the
module as that adapter has it: a module of its own over the base's tensors, which holds what the adapter adds or
replaces and nothing else. The base itself is never written to.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_ft.adapters import inject_from_folder
from lightning_ft.injection import (
    Injected,
    InjectionError,
    all_or_nothing,
    attach,
    detach,
    first_tensor,
    injected_modules,
    injected_names,
    twin,
)

AdaptedModules = Mapping[str, nn.Module]
"""The modules that an adapter changes, by path, as it has them."""


class AdapterBank:
    """Many adapters over one base.

        bank = AdapterBank(model)
        bank.load("alice", "adapters/alice")
        bank.use("alice")                             # every row from here on; None for the bare base
        with bank.rows(["alice", None, "bob"]):       # row by row, each with its own adapter and head
            model(**batch)

    Adapters may differ in method, rank, targets and trained heads. The rows of LoRA's family and of IA3 are answered
    together; those of other methods, and where methods meet in a module, adapter by adapter. What adapts more than
    single layers (prompts) is refused. A head has as many labels as the model's, or the rows' outputs couldn't be one
    tensor. An adapter costs the memory of its own tensors, on the base's device. Adapters don't train in a bank.

    Threads: ``rows`` holds for the thread (or asyncio task) that entered it, so that several may answer at a time.
    ``use`` is for all of them. While adapters are loaded or removed, the model must not run.

    Args:
        model: a LightningModule or Hugging Face model with the pretrained weights; it must carry no method.
        backbone: path of the base, where it was named for training too.
    """

    def __init__(self, model: nn.Module, backbone: str | None = None) -> None:
        self._model, self._backbone = model, backbone
        self._shared = _Shared()
        self._refuse_injected()

    @property
    def names(self) -> list[str]:
        """Of the adapters in it, in the order of loading."""
        return list(self._shared.adapters)

    def __len__(self) -> int:
        return len(self._shared.adapters)

    def __contains__(self, name: object) -> bool:
        return name in self._shared.adapters

    def load(self, name: str, directory: str | Path) -> None:
        """Add the adapter of a folder, ours or stock PEFT's, under a name. What is in use stays in use.

        Raises:
            InjectionError: if the name is taken, or the adapter changes more than single layers.
            FileNotFoundError, StateError, ValueError: as :func:`lightning_ft.load_adapter`.
        """
        if name in self:
            raise InjectionError(f"The bank already holds an adapter '{name}': remove it first, or name this another.")
        self._refuse_injected()
        with twin(self._model) as other:
            adapter = _layers(other, inject_from_folder(other, directory, self._backbone), directory)
        with all_or_nothing(self._model):
            for path in adapter:
                attach(self._model, path, Banked, Seat(self._shared, path), {})
        self._shared.adapters[name] = adapter

    def use(self, name: str | None) -> None:
        """Answer with this adapter from here on, or None: with the bare base.

        Raises:
            InjectionError: if there's no adapter of this name.
        """
        self._shared.active = self._adapter(name)

    @contextmanager
    def rows(self, names: Sequence[str | None], beams: int = 1) -> Iterator[None]:
        """Within the block, row i of each batch is answered by ``names[i]``, and by the bare base where that is None.

        The adapters of the rows are gathered at the first forward, and let go of at the end of the block.

        Args:
            names: one for each row of the batch (the first dimension of what modules get).
            beams: how many copies of a row may follow each other, as ``generate`` makes them: the larger of its
                ``num_beams`` and ``num_return_sequences``.

        Raises:
            InjectionError: if there's no adapter of one of the names; in the block, if a batch has other rows.
        """
        chosen = _Rows([self._adapter(name) for name in names], beams)
        token = _ROWS.set({**_ROWS.get(), id(self._shared): chosen})
        try:
            yield
        finally:
            _ROWS.reset(token)

    def remove(self, name: str) -> None:
        """Let go of an adapter; modules that no other one changes are as they were.

        Raises:
            InjectionError: if there's no adapter of this name, or it's in use.
        """
        adapter = self._adapter(name)
        if adapter is self._shared.active:
            raise InjectionError(f"'{name}' is in use: bank.use(None), or another, first.")
        del self._shared.adapters[name]
        for path in adapter:
            if not any(path in other for other in self._shared.adapters.values()):
                detach(self._model, path, Banked)

    def close(self) -> None:
        """Remove all adapters: the model is the bare base again, without a trace."""
        self.use(None)
        for name in self.names:
            self.remove(name)

    def _adapter(self, name: str | None) -> AdaptedModules:
        if name is None:
            return {}
        if name not in self:
            near = difflib.get_close_matches(str(name), self.names, n=3) or self.names[:10]
            raise InjectionError(f"The bank holds no adapter '{name}'. Near: {', '.join(near) or 'it is empty'}.")
        return self._shared.adapters[name]

    def _refuse_injected(self) -> None:
        carried = {m.method for _, layer in injected_modules(self._model) for m in layer._mixins}
        own = {Banked.method} if self._shared.adapters else set()
        if carried - own:
            raise InjectionError(
                f"The model carries {', '.join(sorted(carried - own))}, and a bank needs the bare base. Merge it first;"
                " or save it, build the model anew and load it into the bank; or close the other bank."
            )


def _layers(model: nn.Module, places: Sequence[tuple[str, Tensor, Tensor]], directory: str | Path) -> AdaptedModules:
    """The modules of ``model``, a twin, that an adapter changes, with its values in them.

    Raises:
        InjectionError: if one has modules inside.
    """
    names = injected_names(model)
    added = {id(parameter) for name, parameter in model.named_parameters() if name in names}
    replaced: dict[int, Tensor] = {}
    with torch.no_grad():
        for _, place, value in places:
            if id(place) in added:
                place.copy_(value)
            elif not torch.equal(place, moved := value.to(place)):  # else it's the base's own
                replaced[id(place)] = nn.Parameter(moved) if isinstance(place, nn.Parameter) else moved
    adapter = {}
    for path, module in model.named_modules():
        tensors: list[dict[str, Any]] = [module._parameters, module._buffers]
        own = [(held, key) for held in tensors for key, tensor in held.items() if id(tensor) in replaced]
        if own or isinstance(module, Injected):
            if any(True for _ in module.children()):
                raise InjectionError(
                    f"'{directory}' changes '{path}', which has modules inside, and a bank holds adapters of single"
                    " layers. load_adapter() can load it into a model of its own."
                )
            for held, key in own:
                held[key] = replaced[id(held[key])]
            adapter[path] = module.eval().requires_grad_(False)
    return adapter


# --------------------------------------------------------------------------------- how a module answers


class _Shared:
    """What all modules of a bank read: its adapters, and the one in use."""

    def __init__(self) -> None:
        self.adapters: dict[str, AdaptedModules] = {}
        self.active: AdaptedModules = {}


@dataclass(frozen=True)
class Seat:
    """A module's place in a bank."""

    shared: _Shared
    path: str

    def __str__(self) -> str:
        return f"({', '.join(name for name, adapter in self.shared.adapters.items() if self.path in adapter)})"


class Banked(Injected):
    """A module that answers as the bank's adapter in use has it, or each row's."""

    method = "BANK"
    acts_on = "weights"
    slot = "bank"
    adds: ClassVar[Mapping[str, str]] = {}
    bank: Seat

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own."""
        shared, path = self.bank.shared, self.bank.path
        rows = _ROWS.get().get(id(shared))
        if rows is not None:
            return rows.answer(self, super().forward, args, kwargs)  # type: ignore[misc]
        layer = shared.active.get(path)
        return (super().forward if layer is None else layer.forward)(*args, **kwargs)  # type: ignore[misc]

    @classmethod
    def check_mergeable(cls, name: str) -> None:  # noqa: ARG003
        """Refused: whose weights would it be?"""
        raise InjectionError("The model is in an AdapterBank: bank.close() first, then load_adapter() and merge().")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for adapter in self.bank.shared.adapters.values():
            if self.bank.path in adapter:
                adapter[self.bank.path]._apply(fn, recurse)
        return super()._apply(fn, recurse)


class _Rows:
    """Whose the rows of a batch are, and, once a module was asked, how it answers them."""

    def __init__(self, adapters: Sequence[AdaptedModules], beams: int) -> None:
        self.adapters, self.beams = adapters, beams
        self.plans: dict[str, Callable[..., Any]] = {}

    def answer(self, module: Any, base: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What ``module`` gives for these arguments; ``base`` is its own forward."""
        path, count = module.bank.path, len(self.adapters)
        first = torch.atleast_1d(first_tensor(args, kwargs))  # which tells the number of rows
        if len(first) not in (count, count * self.beams):
            raise InjectionError(
                f"'{path}' got {len(first)} rows, and bank.rows() {count} names (beams={self.beams}): it takes one for"
                " each row of the batch, which must be the first dimension of what every module gets."
            )
        if path not in self.plans:
            self.plans[path] = self._plan(module, first.device)
        return self.plans[path](base, *args, **kwargs)

    def _plan(self, module: Any, device: torch.device) -> Callable[..., Any]:
        of_rows = [adapter.get(module.bank.path) for adapter in self.adapters]
        layers = list(dict.fromkeys(of_rows))
        index = torch.tensor([layers.index(layer) for layer in of_rows], device=device)
        if len(layers) == 1:
            return lambda base, *args, **kwargs: _forward(layers[0], base)(*args, **kwargs)
        kinds = {_kind(layer, module) for layer in layers if layer is not None}
        kind = kinds.pop() if len(kinds) == 1 else None
        together = kind.for_rows(layers, index) if kind is not None else None
        return together or _by_layer(layers, index)


_ROWS: ContextVar[Mapping[int, _Rows]] = ContextVar("rows of the banks", default={})  # noqa: B039 - never written to


def _kind(layer: Any, module: nn.Module) -> Any:
    """The one thing that ``layer`` carries, if it is all that sets it apart from ``module``."""
    mixins: Sequence[type[Injected]] = getattr(layer, "_mixins", ())
    same = all(layer._parameters[key] is parameter for key, parameter in module._parameters.items())
    return mixins[0] if len(mixins) == 1 and same else None


def _forward(layer: nn.Module | None, base: Callable[..., Any]) -> Callable[..., Any]:
    return base if layer is None else layer.forward


def _by_layer(layers: Sequence[nn.Module | None], index: Tensor) -> Callable[..., Tensor]:
    """Let each layer answer its rows, and put them together."""
    rows = [(index == i).nonzero()[:, 0] for i in range(len(layers))]
    order = torch.cat(rows).argsort()

    def taken(value: Any, of: Tensor, count: int) -> Any:
        """The rows ``of`` a batch of ``count``, each with its copies."""
        if not isinstance(value, Tensor) or value.shape[:1] != (count,):
            return value
        return value.unflatten(0, (len(index), -1))[of].flatten(0, 1)

    def forward(base: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        count = len(first_tensor(args, kwargs))
        parts = [
            _forward(layer, base)(
                *(taken(value, of, count) for value in args),
                **{key: taken(value, of, count) for key, value in kwargs.items()},
            )
            for layer, of in zip(layers, rows, strict=True)
        ]
        if not isinstance(parts[0], Tensor):
            raise InjectionError(
                f"A module that adapters change returns a {type(parts[0]).__name__}, which bank.rows() can't put"
                " together from several. Use bank.use(), one adapter at a time."
            )
        return taken(torch.cat(parts), order, count)

    return forward
