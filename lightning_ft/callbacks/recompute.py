"""Activation recompute: what a cheap function makes of tensors that are kept anyway isn't kept, but made again.

For the backward pass a layer after an activation keeps its input, ``gelu(x)``, and gelu keeps x: the same twice, at the
widest place of a transformer. Where it's gated, ``silu(g) ∘ u``, kept are g, silu(g), u and their product. Here it's x,
or g and u, and the rest is computed again from them when the backward pass asks for it, to the bit.
(:class:`lightning_ft.GradientCheckpointing` keeps less still, and runs whole layers again.)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lightning_ft.callbacks.checkpointing import GradientCheckpointing
from lightning_ft.callbacks.compile import Compile
from lightning_ft.errors import UserError
from lightning_ft.injection import find_base, is_compiled

# Pointwise, without random numbers, nothing to autocast; their backward passes read what goes in, not what comes out.
_CHEAP = frozenset({F.gelu, F.silu, F.mish, F.leaky_relu, F.hardswish, F.relu6, F.hardtanh, torch.mul, Tensor.mul})

# ------------------------------------------------------------------------------------------- what autograd holds


class _Kept(NamedTuple):
    """A tensor as it was saved."""

    tensor: Tensor
    version: int

    def value(self) -> Tensor:
        if self.tensor._version != self.version:  # who has hooks has to look himself
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: of"
                f" shape {list(self.tensor.shape)}, it's at version {self.tensor._version}, and version {self.version}"
                " was saved."
            )
        return self.tensor


class _Packed(NamedTuple):
    """What hooks around ours made of a tensor, and make the tensor of."""

    packed: Any
    unpack: Callable[[Any], Tensor]

    def value(self) -> Tensor:
        return self.unpack(self.packed)


class _Again(NamedTuple):
    """What a function makes of such."""

    function: Callable[..., Tensor]
    arguments: tuple[Any, ...]
    more: Mapping[str, Any]

    def value(self) -> Tensor:
        arguments = (a.value() if isinstance(a, _Kept | _Packed | _Again) else a for a in self.arguments)
        with torch.no_grad():
            return self.function(*arguments, **self.more)


_Saved: TypeAlias = "dict[tuple[int, Any], _Kept | _Packed | _Again]"


class _Note(NamedTuple):
    """How a tensor is made again, as long as it lives and is what it was."""

    tensor: weakref.ref[Tensor]
    version: int
    again: _Again

    def tells(self, saved: Tensor) -> bool:
        """Whether it's about ``saved``: an alias of the tensor, or the same in another shape."""
        tensor = self.tensor()
        return (
            tensor is not None
            and (tensor.numel(), tensor.dtype, self.version) == (saved.numel(), saved.dtype, saved._version)
            and tensor.is_contiguous()
            and saved.is_contiguous()
        )


def _place(tensor: Tensor) -> tuple[int, Any]:
    """Where it lies, which an alias of it shares."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset()


class _Recomputing(TorchFunctionMode):
    """Within it autograd saves how to make a tensor again where what it's made of is saved too."""

    def __init__(self) -> None:
        super().__init__()
        self.spared = 0  # tensors that weren't kept
        self._notes: dict[tuple[int, Any], _Note] = {}
        self._saved: _Saved | None = None  # by the cheap function that is running
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda packed: packed())

    def __enter__(self) -> _Recomputing:
        outermost = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # since torch 2.8
        self._outer = outermost and outermost(False)
        self._hooks.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hooks.__exit__(*error)
        self._notes.clear()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        more = kwargs or {}
        if func not in _CHEAP:
            return func(*args, **more)
        saved: _Saved = {}
        self._saved = saved
        try:
            out = func(*args, **more)
        finally:
            self._saved = None
        if saved and not any(isinstance(value, Tensor) for value in more.values()):
            self._note(out, _Again(func, args, more), saved)
        return out

    def _note(self, out: Tensor, how: _Again, saved: _Saved) -> None:
        """Note how ``out`` is made, if what it's made of is all ``saved`` and it isn't itself."""
        parts = [saved.get(_place(a)) if isinstance(a, Tensor) else a for a in how.arguments]
        if _place(out) not in saved and None not in parts:
            again = how._replace(arguments=tuple(parts))
            self._notes[_place(out)] = _Note(weakref.ref(out), out._version, again)

    def _pack(self, tensor: Tensor) -> Callable[[], Tensor]:
        place = _place(tensor)
        note = self._notes.get(place)
        again = note.again if note is not None and note.tells(tensor) else None
        held = again or self._keep(tensor)
        if self._saved is not None:
            self._saved[place] = held
        if again is None:
            return held.value
        self.spared += 1
        return partial(_in_shape, again, tensor.shape)

    def _keep(self, tensor: Tensor) -> _Kept | _Packed:
        if self._outer is None:
            return _Kept(tensor, tensor._version)
        pack, unpack = self._outer
        return _Packed(pack(tensor), unpack)


def _in_shape(again: _Again, shape: torch.Size) -> Tensor:
    return again.value().view(shape)


class Recomputation:
    """Recomputes activations in each forward pass of a module in which autograd takes part.

    Args:
        module: any. What is compiled or checkpointed in it stays as it is.

    Attributes:
        passes: forward passes so far.
        spared: how many tensors weren't kept in them.
    """

    def __init__(self, module: nn.Module) -> None:
        self.passes = self.spared = 0
        self._running: list[_Recomputing] = []
        self._handles: list[RemovableHandle] = [
            module.register_forward_pre_hook(self._begin),
            module.register_forward_hook(self._end, always_call=True),  # after an error too
        ]

    def remove(self) -> None:
        """Leave the module as it was."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            self.passes += 1
            self._running.append(_Recomputing().__enter__())

    def _end(self, *_: Any) -> None:
        if self._running:
            running = self._running.pop()
            running.__exit__(None, None, None)
            self.spared += running.spared


# ------------------------------------------------------------------------------------------------ the callback


class ActivationRecompute(Callback):
    """Has a fit of any LightningModule not keep what activations give, with the same gradients to the bit.

    ``L.Trainer(callbacks=[LoRA(), ActivationRecompute()])``, with whatever method. Computed again are GELU, SiLU, Mish,
    products and their like, where what they're made of is kept anyway. The outputs of ReLU, tanh or dropout are kept:
    their own backward passes read them.

    Args:
        backbone: path of the base, where it isn't the one Hugging Face model
            (:func:`lightning_ft.injection.find_base`).

    Raises:
        InjectionError: when ``fit`` starts, if there is no base to be found.
        UserError: when ``fit`` starts, beside :class:`GradientCheckpointing`, which keeps none of them, or what is
            compiled, which does the like itself; after the first batch, if the module didn't call its base.
    """

    def __init__(self, backbone: str | None = None) -> None:
        self.backbone = backbone
        self._root: Any = None
        self._recomputation: Recomputation | None = None
        self._seen = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switch it on."""
        _check(trainer, pl_module)
        self._root, self._seen = find_base(pl_module, self.backbone).root, False
        self._recomputation = Recomputation(self._root)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """See, once, that it had an effect."""
        if self._seen or self._recomputation is None:
            return
        self._seen = True
        if not self._recomputation.passes:
            raise UserError(
                f"ActivationRecompute: {type(pl_module).__name__} doesn't call its {type(self._root).__name__}, but"
                ' parts of it, so that all is kept. Name what it calls: ActivationRecompute(backbone="model.bert").'
            )
        if not self._recomputation.spared:
            rank_zero_warn(
                f"ActivationRecompute: nothing in {type(self._root).__name__} is kept that could be computed again. Its"
                " activations are of another kind (ReLU's output is read by its own backward pass), or nothing that"
                " follows them keeps its input (layers without an adapter don't), or its layers are checkpointed."
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the model as it was."""
        if self._recomputation is not None:
            self._recomputation.remove()
            self._recomputation = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the model as it was."""
        self.teardown(trainer, pl_module, "")


def _check(trainer: Any, module: nn.Module) -> None:
    if any(isinstance(callback, GradientCheckpointing) for callback in trainer.callbacks):
        raise UserError(
            "ActivationRecompute saves nothing beside GradientCheckpointing, which keeps no activation of a layer:"
            " leave one of them out."
        )
    compiled = any(is_compiled(part) for part in module.modules())
    if compiled or any(isinstance(callback, Compile) for callback in trainer.callbacks):
        raise UserError(
            "ActivationRecompute doesn't go with torch.compile, which decides itself what it keeps and what it computes"
            " again: leave one of them out."
        )
