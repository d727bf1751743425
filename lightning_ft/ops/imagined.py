"""Tensors without values (torch's FakeTensor), of which only shapes are asked, and the device that they stand for.

A CPU's are all that a machine without a GPU can make, so that what an operation does on a GPU must be told.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_DEVICE: ContextVar[str | None] = ContextVar("imagined_device", default=None)


def imagined_device() -> str | None:
    """The type of the device that tensors stand for; None where they are what they are."""
    return _DEVICE.get()


def device_type(x: Tensor) -> str:
    """The type of the device of ``x``, or that which it stands for."""
    return imagined_device() or x.device.type


@contextmanager
def standing_for(device: str) -> Iterator[None]:
    """Within the block tensors have no values, and stand for those of a device of this type."""
    token = _DEVICE.set(device)
    try:
        yield
    finally:
        _DEVICE.reset(token)
