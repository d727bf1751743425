"""Batches of texts of like length, and rows of several: little of a batch is padding, and the order is shuffled."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler


class LengthBucketedSampler(DistributedSampler[int]):
    """An order of the rows in which any ``batch_size`` in a row are of like length.

    Shuffle all rows, cut them into buckets of some batches, sort each bucket by length, cut it into batches
    and shuffle the batches. The order depends on ``seed`` and the epoch alone, so that a resumed run sees it
    again. A short last batch stays last, so that an ordinary DataLoader cuts at the same places.

    Of several processes each takes its part of every batch, which is theirs together and that many times as large: all
    have texts of like length at the same time. In training all have as many batches, for which at most
    ``num_replicas - 1`` rows come twice; in evaluation no row does (:func:`evaluation_batch_size`). It's a
    DistributedSampler, for Lightning deals the rows of any other out to the processes, which would break the batches.

    Args:
        lengths: the number of tokens of each row.
        batch_size: of the DataLoader.
        seed: of the shuffling; None for no shuffling, longest first (for evaluation).
        bucket_batches: batches a bucket. More means less padding and less mixing.
        num_replicas: how many processes share the rows.
        rank: which of them this is.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int | None = 0,
        bucket_batches: int = 32,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        self.lengths = torch.as_tensor(lengths)
        super().__init__(self.lengths, num_replicas, rank, shuffle=seed is not None, seed=seed or 0)  # type: ignore[arg-type]
        self.batch_size = batch_size
        self.bucket_batches = bucket_batches

    def __len__(self) -> int:
        return len(range(self.rank, self._total, self.num_replicas))

    def __iter__(self) -> Iterator[int]:
        order = self._order()
        again = (
            order.repeat(self.num_replicas)[-(self._total - len(order)) :] if self._total > len(order) else order[:0]
        )
        return iter(torch.cat([order, again])[self.rank :: self.num_replicas].tolist())

    @property
    def _total(self) -> int:
        """The rows of all processes: in training each has as many."""
        rows = len(self.lengths)
        return rows + -rows % self.num_replicas if self.shuffle else rows

    def _order(self) -> Tensor:
        """Of all processes' rows."""
        if not self.shuffle:
            return self.lengths.argsort(descending=True, stable=True)
        size = self.batch_size * self.num_replicas
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator)
        buckets = order.split(size * self.bucket_batches)
        batches = [
            batch
            for bucket in buckets
            for batch in bucket[self.lengths[bucket].argsort(descending=True, stable=True)].split(size)
        ]
        short = [batches.pop()] if len(batches[-1]) < size else []
        mixed = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        return torch.cat([*mixed, *short])


def pack(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Share rows out to as few bins of ``limit`` tokens as best-fit decreasing finds (Johnson 1974).

    Longest first, each goes where it leaves the least room: at most 11/9 of the best number of bins, and 1.

    Args:
        lengths: of the rows; none above ``limit``.
        limit: tokens a bin.

    Returns:
        The rows of each bin, in order.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, bin), the fullest first
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(rooms, (lengths[row], 0))
        left, chosen = rooms.pop(at) if at < len(rooms) else (limit, len(bins))
        if chosen == len(bins):
            bins.append([])
        bins[chosen].append(row)
        insort(rooms, (left - lengths[row], chosen))
    return [sorted(rows) for rows in bins]


def evaluation_batch_size(rows: int, batch_size: int, num_replicas: int) -> int:
    """The next size to ``batch_size`` with which all processes have as many batches and no row comes twice.

    A process with a batch less than others would leave them waiting for it, and with rows that come twice scores
    would be of other rows than the data's.

    Args:
        rows: of all processes; at least as many as there are processes.
        batch_size: wanted.
        num_replicas: how many processes share the rows.
    """
    # What is left for the last batch has to be none, or a row for each. All rows in one batch always fit.
    sizes = chain(range(batch_size, 0, -1), range(batch_size + 1, rows + 1))
    return next((size for size in sizes if not 0 < rows % (size * num_replicas) < num_replicas), batch_size)
