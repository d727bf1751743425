"""Buckets by length: every row once, in an order of its own, with little padding."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from torch.utils.data import DistributedSampler

from lightning_ft.data.batching import LengthBucketedSampler, evaluation_batch_size

SIZES = [(1, 4), (4, 4), (65, 8), (200, 16), (7, 1)]
"""Rows, and the size of a batch."""


def random_lengths(rows: int) -> list[int]:
    return torch.randint(3, 60, (rows,), generator=torch.Generator().manual_seed(rows)).tolist()


def batches(order: list[int], batch_size: int) -> list[list[int]]:
    """As a DataLoader cuts them."""
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def padding(order: list[int], lengths: list[int], batch_size: int) -> int:
    cut = batches(order, batch_size)
    return sum(max(lengths[i] for i in batch) - lengths[j] for batch in cut for j in batch)


@pytest.mark.parametrize("seed", [None, 7])
def test_order_is_a_permutation(seed: int | None) -> None:
    for (rows, batch_size), bucket_batches in itertools.product([(0, 4), *SIZES], [1, 3, 100]):
        sampler = LengthBucketedSampler(random_lengths(rows), batch_size, seed, bucket_batches)
        assert sorted(sampler) == list(range(rows))
        assert len(sampler) == rows


def test_order_differs_by_epoch_and_seed_and_by_nothing_else() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = LengthBucketedSampler(random_lengths(100), 8, seed)
        sampler.set_epoch(epoch)
        assert list(sampler) == list(sampler)
        return list(sampler)

    assert order(3, epoch=5) == order(3, epoch=5)
    orders = [tuple(order(seed, epoch)) for seed in (0, 1000) for epoch in range(4)]
    assert len(set(orders)) == len(orders)


def test_order_leaves_torchs_own_generator_alone() -> None:
    before = torch.get_rng_state()
    list(LengthBucketedSampler(random_lengths(50), 8))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("bucket_batches", [3, 1_000], ids=["several buckets", "one bucket"])
@pytest.mark.parametrize(("rows", "batch_size"), SIZES)
def test_each_batch_is_a_slice_of_one_sorted_bucket(rows: int, batch_size: int, bucket_batches: int) -> None:
    lengths, epoch, seed = random_lengths(rows), 2, 11
    sampler = LengthBucketedSampler(lengths, batch_size, seed, bucket_batches)
    sampler.set_epoch(epoch)
    # The documented first step: shuffle all rows, cut them into buckets.
    shuffled = torch.randperm(rows, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
    slices = [
        set(part)
        for bucket in batches(shuffled, batch_size * bucket_batches)
        for part in batches(sorted(bucket, key=lambda i: -lengths[i]), batch_size)
    ]
    assert all(set(batch) in slices for batch in batches(list(sampler), batch_size))


def test_batches_of_like_length_are_shuffled_among_themselves() -> None:
    lengths = random_lengths(200)
    order = list(LengthBucketedSampler(lengths, 10, bucket_batches=1_000))
    longest = [max(lengths[i] for i in batch) for batch in batches(order, 10)]
    assert longest != sorted(longest)
    assert longest != sorted(longest, reverse=True)


def test_padding_is_less_than_in_a_random_order() -> None:
    rows, batch_size, bucket_batches = 512, 16, 4
    lengths = random_lengths(rows)
    for epoch in range(3):
        sampler = LengthBucketedSampler(lengths, batch_size, bucket_batches=bucket_batches)
        sampler.set_epoch(epoch)
        at_random = torch.randperm(rows, generator=torch.Generator().manual_seed(100 + epoch)).tolist()
        bucketed = padding(list(sampler), lengths, batch_size)
        assert bucketed < 0.5 * padding(at_random, lengths, batch_size)


def test_without_seed_the_longest_come_first_in_every_epoch() -> None:
    lengths = [3, 9, 5, 9, 1]
    sampler = LengthBucketedSampler(lengths, 2, seed=None)
    first = list(sampler)
    sampler.set_epoch(1)
    assert first == list(sampler) == sorted(range(5), key=lambda i: -lengths[i])


# ---------------------------------------------------------------------- several processes


def of_ranks(lengths: list[int], batch_size: int, ranks: int, seed: int | None, epoch: int = 0) -> list[list[int]]:
    orders = []
    for rank in range(ranks):
        sampler = LengthBucketedSampler(lengths, batch_size, seed, num_replicas=ranks, rank=rank)
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert len(sampler) == len(orders[-1])
    return orders


RANKS = [(rows, size, ranks) for rows, size in [(1, 4), *SIZES, (67, 8)] for ranks in (2, 3, 5)]


@pytest.mark.parametrize(("rows", "batch_size", "ranks"), RANKS)
def test_processes_share_all_rows_in_as_many_batches_each(rows: int, batch_size: int, ranks: int) -> None:
    orders = of_ranks(random_lengths(rows), batch_size, ranks, seed=3)
    assert len({len(order) for order in orders}) == 1
    counts = Counter(itertools.chain(*orders))
    assert set(counts) == set(range(rows))
    assert sum(counts.values()) - rows < ranks


@pytest.mark.parametrize(("rows", "batch_size", "ranks"), RANKS)
def test_what_processes_see_at_once_is_a_batch_of_one_process(rows: int, batch_size: int, ranks: int) -> None:
    lengths = random_lengths(rows)
    orders = [batches(order, batch_size) for order in of_ranks(lengths, batch_size, ranks, seed=3, epoch=2)]
    whole = LengthBucketedSampler(lengths, batch_size * ranks, seed=3)
    whole.set_epoch(2)
    expected = batches(list(whole), batch_size * ranks)
    seen = [list(itertools.chain(*together)) for together in zip(*orders, strict=True)]
    assert [set(batch) for batch in seen[:-1]] == [set(batch) for batch in expected[:-1]]
    assert set(seen[-1]) >= set(expected[-1])  # and rows again, where it wasn't enough
    assert len(seen[-1]) - len(expected[-1]) < ranks


@pytest.mark.parametrize(("rows", "wanted", "ranks"), [*RANKS, (9, 4, 4), (5, 2, 2), (13, 3, 2)])
def test_in_evaluation_each_row_comes_once_and_batches_are_as_many(rows: int, wanted: int, ranks: int) -> None:
    if rows < ranks:
        return
    size = evaluation_batch_size(rows, wanted, ranks)
    orders = of_ranks(random_lengths(rows), size, ranks, seed=None)
    assert Counter(itertools.chain(*orders)) == Counter(range(rows))
    assert len({len(batches(order, size)) for order in orders}) == 1


def test_lightning_does_not_deal_its_rows_out_again() -> None:
    assert isinstance(LengthBucketedSampler([1, 2], 1), DistributedSampler)  # as its data connector asks
