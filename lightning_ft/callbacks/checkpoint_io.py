"""Checkpoints that hold what was trained, and not the frozen base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from torch import nn

from lightning_ft.files.state import (
    check_fingerprint,
    complete_state,
    fingerprint,
    frozen_keys,
    method_keys,
    trained_state,
)
from lightning_ft.injection import Base

METADATA = "lightning_ft"
"""The key of a checkpoint under which the methods that changed its module are recorded."""

_STATES = ("state_dict", "current_model_state")  # the second is WeightAveraging's


class AdapterCheckpointIO(CheckpointIO):
    """Wraps the strategy's CheckpointIO, since its saves and loads alone see every checkpoint.

    (``save_checkpoint(weights_only=True)`` passes the callbacks' own hooks by.) On save, frozen keys are
    left out; on load they're filled in from the live model, so that ``strict=True`` stays meaningful.

    Args:
        inner: the CheckpointIO that reads and writes.
        model: returns the live LightningModule.
        methods: returns, for each method that changes it, where its pretrained base is, and plain values that say
            which method it is (see :data:`METADATA`).
    """

    def __init__(
        self,
        inner: CheckpointIO,
        model: Callable[[], nn.Module],
        methods: Callable[[], Sequence[tuple[Base, dict[str, Any]]]],
    ) -> None:
        self.inner = inner
        self._model, self._methods = model, methods

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write what was trained."""
        self.inner.save_checkpoint(self.reduced(checkpoint), path, storage_options)

    def frozen(self) -> set[str]:
        """The keys of the module's state that are left out."""
        return {key for base, _ in self._methods() for key in frozen_keys(self._model(), base)}

    def reduced(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """``checkpoint`` without frozen keys, and with the methods' records."""
        records: list[dict[str, Any]] = []
        for base, record in self._methods():
            if not any(_of_the_same(record, other) for other in records):
                records.append({**record, "base": fingerprint(base)})
        frozen = self.frozen()
        slim = {key: trained_state(checkpoint[key], frozen) for key in _STATES if key in checkpoint}
        return {**checkpoint, **slim, METADATA: records}

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read it, and fill in the frozen base from the live model.

        Raises:
            StateError: if something that trains has no value, or the base isn't the one trained over.
        """
        checkpoint = self.inner.load_checkpoint(path, *args, **kwargs)
        for base, record in self._methods():
            checkpoint = complete_checkpoint(checkpoint, self._model(), base, record, path)
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        """Delete it."""
        self.inner.remove_checkpoint(path)

    def teardown(self) -> None:
        """Let the inner one finish."""
        self.inner.teardown()


def complete_checkpoint(
    checkpoint: dict[str, Any], model: nn.Module, base: Base, present: dict[str, Any], path: Any
) -> dict[str, Any]:
    """``checkpoint`` with its frozen keys filled in from ``model``; see :class:`AdapterCheckpointIO`."""
    source = f"The checkpoint '{path}'"
    for record in checkpoint.get(METADATA, []):
        if _of_the_same(record, present):
            check_fingerprint(record["base"], fingerprint(base), source)
    frozen, ours = frozen_keys(model, base), method_keys(model, base)
    filled = {key: complete_state(checkpoint[key], model, frozen, ours, source) for key in _STATES if key in checkpoint}
    return {**checkpoint, **filled}


def _of_the_same(record: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two records are of the same method over the same base."""
    return record["method"] == other["method"] and record["arguments"]["backbone"] == other["arguments"]["backbone"]
