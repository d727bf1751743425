"""Hidden states of rows, kept under what the rows say, up to a number of bytes."""

from __future__ import annotations

import hashlib
import mmap
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_ft.errors import UserError


class Row(NamedTuple):
    """A row of a batch: a hash of what it says, and its tokens from the first to the last that the mask shows."""

    key: bytes
    start: int
    end: int


def rows_of(inputs: Mapping[str, Any], salt: str) -> list[Row]:
    """The rows of a batch.

    What is as long as the tokens counts from the first to the last token that a two-dimensional ``attention_mask``
    shows, and all else in full. So a row is the same in whatever company it is padded; on the left its tokens have
    other places where there's more padding, and then it's another row.

    Args:
        inputs: ``input_ids`` (batch, tokens), and tensors with a first dimension of 1 or the batch.
        salt: what else it depends on.

    Raises:
        ValueError: if a tensor has another first dimension; it names it.
    """
    batch, tokens = inputs["input_ids"].shape
    tensors = {name: value for name, value in sorted(inputs.items()) if isinstance(value, Tensor)}
    for name, value in tensors.items():
        if value.ndim == 0 or value.shape[0] not in (1, batch):
            raise ValueError(f"{name} has the shape {tuple(value.shape)}")
    spans = _spans(tensors.get("attention_mask"), batch, tokens)
    contents = {name: _bytes(value.expand(batch, *value.shape[1:])) for name, value in tensors.items()}
    whole = {name for name, value in tensors.items() if value.shape[1:] != (tokens,)}
    rows = []
    for i, (start, end) in enumerate(spans):
        digest = hashlib.blake2b(f"{salt} {start} {end - start}".encode(), digest_size=16)
        for name, content in contents.items():  # each of them (batch, bytes)
            size = content.shape[1] // tokens
            part = content[i] if name in whole else content[i, start * size : end * size]
            digest.update(f"{name} {part.nbytes}".encode() + part.tobytes())
        rows.append(Row(digest.digest(), start, end))
    return rows


def padded(values: Sequence[Tensor], rows: Sequence[Row], tokens: int) -> Tensor:
    """The rows' hidden states (tokens of the row, width) as a batch (rows, tokens, width), 0 where a row has none."""
    hidden = values[0].new_zeros(len(rows), tokens, values[0].shape[-1])
    for i, (value, row) in enumerate(zip(values, rows, strict=True)):
        hidden[i, row.start : row.end] = value
    return hidden


class RowStore:
    """Hidden states by their rows' keys: in memory, or in a file of ``folder`` that is gone when the store is.

    Args:
        max_bytes: what doesn't fit any more isn't kept.
        folder: made where there's none.

    Attributes:
        bytes: what is kept.
        refused: how many rows weren't.
    """

    def __init__(self, max_bytes: int, folder: Path | None = None) -> None:
        self.max_bytes, self.folder = max_bytes, folder
        self.clear()

    def clear(self) -> None:
        """Forget all."""
        self._places: dict[bytes, Any] = {}
        self._medium = _Memory() if self.folder is None else _MappedFile(self.folder)
        self.bytes = self.refused = 0

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, row: Row) -> bool:
        return row.key in self._places

    def __getitem__(self, row: Row) -> Tensor:
        return self._medium.read(self._places[row.key])

    def add(self, row: Row, hidden: Tensor) -> None:
        """Keep a row's hidden states (tokens of the row, width), if they fit."""
        if row in self:
            return
        if self.bytes + hidden.nbytes > self.max_bytes:
            self.refused += 1
            return
        self._places[row.key] = self._medium.write(hidden)
        self.bytes += hidden.nbytes


class _Memory:
    def write(self, hidden: Tensor) -> Tensor:
        return hidden.detach().to("cpu", copy=True)

    def read(self, place: Tensor) -> Tensor:
        return place


class _MappedFile:
    """A file without a name, written at its end and read through a map of it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._map: mmap.mmap | None = None
        self._size = 0

    def write(self, hidden: Tensor) -> tuple[int, torch.Size, torch.dtype]:
        hidden = hidden.detach().cpu().contiguous()
        place = self._size
        try:
            self._file.seek(place)
            self._file.write(hidden.view(torch.uint8).numpy().tobytes())
            self._file.flush()
        except OSError as error:
            raise UserError(f"TrunkCache: can't write to {self._folder}: {error}. Lower max_mib.") from error
        self._size += -(-hidden.nbytes // _ALIGNED) * _ALIGNED
        return place, hidden.shape, hidden.dtype

    def read(self, place: tuple[int, torch.Size, torch.dtype]) -> Tensor:
        start, shape, dtype = place
        if shape.numel() == 0:
            return torch.empty(shape, dtype=dtype)
        if self._map is None or start + shape.numel() * dtype.itemsize > len(self._map):
            self._map = mmap.mmap(self._file.fileno(), 0)
        return torch.frombuffer(self._map, dtype=dtype, count=shape.numel(), offset=start).view(shape)


_ALIGNED = 64


def _spans(mask: Tensor | None, batch: int, tokens: int) -> list[tuple[int, int]]:
    """Of each row where the tokens begin that the mask shows, and where they end."""
    if mask is None or mask.ndim != 2 or mask.shape[1] != tokens:
        return [(0, tokens)] * batch
    shown = mask.expand(batch, tokens).bool().int().cpu()
    starts, ends = shown.argmax(dim=1), tokens - shown.flip(1).argmax(dim=1)
    some = shown.any(dim=1)
    return list(zip((starts * some).tolist(), (ends * some).tolist(), strict=True))


def _bytes(value: Tensor) -> Any:
    """A batch of tensors as a NumPy array of (batch, bytes)."""
    return value.detach().cpu().contiguous().view(len(value), -1).view(torch.uint8).numpy()
