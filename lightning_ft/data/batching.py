"""Batches of texts of like length, and rows of several: little of a batch is padding, and the order is shuffled."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class LengthBucketedSampler(Sampler[int]):
    """An order of the rows in which any ``batch_size`` in a row are of like length.

    Shuffle all rows, cut them into buckets of some batches, sort each bucket by length, cut it into batches
    and shuffle the batches. The order depends on ``seed`` and the epoch alone, so that a resumed run sees it
    again. A short last batch stays last, so that an ordinary DataLoader cuts at the same places.

    Args:
        lengths: the number of tokens of each row.
        batch_size: of the DataLoader.
        seed: of the shuffling; None for no shuffling, longest first (for evaluation).
        bucket_batches: batches a bucket. More means less padding and less mixing.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int | None = 0, bucket_batches: int = 32) -> None:
        self.lengths = torch.as_tensor(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.bucket_batches = bucket_batches
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        if self.seed is None:
            return iter(self.lengths.argsort(descending=True, stable=True).tolist())
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self), generator=generator)
        buckets = order.split(self.batch_size * self.bucket_batches)
        batches = [
            batch
            for bucket in buckets
            for batch in bucket[self.lengths[bucket].argsort(descending=True, stable=True)].split(self.batch_size)
        ]
        short = [batches.pop()] if len(batches[-1]) < self.batch_size else []
        mixed = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        return iter(torch.cat([*mixed, *short]).tolist())


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
