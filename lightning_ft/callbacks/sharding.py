"""Adapter-only checkpoints where the processes share the parameters out: FSDP2, Lightning's ModelParallelStrategy."""

from __future__ import annotations

from abc import ABC, ABCMeta
from collections.abc import Mapping
from typing import Any, cast

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_ft.callbacks.checkpoint_io import AdapterCheckpointIO
from lightning_ft.files.state import whole

_STRATEGY = "ModelParallelStrategy"  # of `lightning` or of `pytorch_lightning`


def shards(strategy: Any) -> bool:
    """Whether a strategy has the module share its parameters out in ``configure_model``."""
    return any(kind.__name__ == _STRATEGY for kind in type(strategy).__mro__)


def exchanges(strategy: Any) -> bool:
    """Whether optimizers step on tensors of the strategy's own in the place of the module's, as under DeepSpeed."""
    return any(kind.__name__ == "DeepSpeedStrategy" for kind in type(strategy).__mro__)


class Gathering(ABC):  # an ABC as Strategy is: else the class of one couldn't be exchanged
    """What a sharding strategy needs to read and write what other strategies do; a mixin.

    Lightning's own goes past the CheckpointIO: it writes the frozen base too, into one file or a folder of each
    process's part, and wants it back. Here all gather what was trained, the first process writes it as an ordinary
    checkpoint, with which one process can go on too, and each takes its part of one that is read.
    """

    lightning_restore_optimizer = True
    checkpoint_io: Any
    is_global_zero: bool
    lightning_module: Any
    optimizers: Any

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's state without the frozen base, on the CPU; in other processes than the first one nothing."""
        frozen = self.checkpoint_io.frozen()
        state = self.lightning_module.state_dict()
        return self._gathered({key: value for key, value in state.items() if key not in frozen})

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The optimizer's state, as it is in one process."""
        return self._gathered(getattr(optimizer, "_optimizer", optimizer).state_dict())

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write it, in the first process."""
        io = cast(AdapterCheckpointIO, self.checkpoint_io)
        reduced = io.reduced(checkpoint)  # to know the base again all processes are needed
        if self.is_global_zero:
            io.inner.save_checkpoint(reduced, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read it, in each process."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Each process takes its part."""
        live = self.lightning_module.state_dict()
        state = {key: _part(value, live.get(key)) for key, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each process takes its part."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            parts = {
                i: {key: _part(value, parameters[i]) for key, value in values.items()}
                for i, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": parts})

    def _gathered(self, state: Any) -> Any:
        def gather(tensor: Tensor) -> Tensor | None:
            value = whole(tensor.detach())
            return value.cpu() if self.is_global_zero else None  # one at a time: all would be the model once more

        gathered = apply_to_collection(state, Tensor, gather)
        return gathered if self.is_global_zero else {}


def gather_checkpoints(strategy: Any) -> None:
    """Make a sharding strategy write and read what was trained, as ordinary checkpoints."""
    if not isinstance(strategy, Gathering):
        kind: Any = type(strategy)
        strategy.__class__ = ABCMeta(kind.__name__, (Gathering, kind), {})


def _part(value: Any, like: Any) -> Any:
    """This process's part of ``value``, if ``like`` is such a part of a tensor of the same shape."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or isinstance(value, DTensor):
        return value
    if value.shape != like.shape:
        return value
    with torch.no_grad():
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
