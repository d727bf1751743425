"""Data sets of several tasks in one training: each batch is of one of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from datasets import Dataset
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, Sampler

from lightning_ft.data.batching import LengthBucketedSampler
from lightning_ft.data.sources import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_ft.data.module import TextDataModule


class MixedBatches(Sampler[list[int]]):
    """Batches of several data sets that lie one behind the other; each batch is of one of them.

    Of all batches in an epoch, as many as the data sets have together, data set k gets a share of
    n_k^(1/T) / Σ n_i^(1/T), where n_k is its number of rows (Raffel et al. 2020, section 3.5.2,
    https://arxiv.org/abs/1910.10683). At T = 1 that is once over every row; the larger T, the more alike are the
    shares, and small data sets are gone through again, in another order.

    Args:
        lengths: of each data set, the number of tokens of each row.
        batch_size: rows a batch.
        temperature: T, at least 1; ``inf`` for equal shares.
        seed: of the order, which changes by the epoch.
    """

    def __init__(
        self, lengths: Sequence[Sequence[int]], batch_size: int, temperature: float = 1.0, seed: int = 0
    ) -> None:
        if not temperature >= 1:
            raise ValueError(f"temperature must be a number of at least 1, not {temperature}.")
        self.sampler = self  # where Lightning looks for what it tells the epoch
        self.starts = [0, *accumulate(map(len, lengths))][:-1]
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0
        self.samplers = [LengthBucketedSampler(each, batch_size, seed) for each in lengths]
        sizes = torch.tensor([len(each) for each in lengths], dtype=torch.float64)
        whole = [-(-len(each) // batch_size) for each in lengths]
        shares = sizes ** (1 / temperature)
        self.counts = (
            whole if temperature == 1 else [max(1, round(float(n))) for n in sum(whole) * shares / shares.sum()]
        )

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self.counts)

    def __iter__(self) -> Iterator[list[int]]:
        streams = [self._batches(k) for k in range(len(self.samplers))]
        order = torch.tensor([k for k, count in enumerate(self.counts) for _ in range(count)])
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        for k in order[torch.randperm(len(order), generator=generator)].tolist():
            yield next(streams[k])

    def _batches(self, k: int) -> Iterator[list[int]]:
        """Those of data set k without an end, each time through in another order."""
        times = -(-self.counts[k] // -(-len(self.samplers[k]) // self.batch_size))
        for time in range(times):
            self.samplers[k].set_epoch(self.epoch * times + time)
            for rows in BatchSampler(self.samplers[k], self.batch_size, drop_last=False):
                yield [self.starts[k] + row for row in rows]


class MultiTaskDataModule(L.LightningDataModule):
    """The data sets of several tasks, one of which each batch is of; for :class:`lightning_ft.MultiTask`.

    Args:
        sources: the data of each task, by its name. All have the tokenizer of the first.
        temperature: of the sampling (:class:`MixedBatches`): 1 in proportion to the data sets' sizes, ``inf`` equally.

    Raises:
        ValueError: for a temperature below 1.
        DataError: in ``setup``, as each data set's own.
    """

    def __init__(self, sources: Mapping[str, TextDataModule], temperature: float = 1.0) -> None:
        super().__init__()
        self.sources, self.temperature = dict(sources), temperature
        MixedBatches([], 1, temperature)  # refuses what makes no sense
        self._first = next(iter(self.sources.values()))

    @property
    def path(self) -> str:
        """Where the data are."""
        return ", ".join(str(source.path) for source in self.sources.values())

    @property
    def parts(self) -> list[TextDataModule]:
        """The data sets."""
        return list(self.sources.values())

    @property
    def sizes(self) -> dict[str, int]:
        """The number of rows of each split, of all data sets together."""
        return {split: len(rows) for split, rows in self.splits.items()}

    @property
    def reserved(self) -> int:
        """Positions to leave free, as in each data set."""
        return self._first.reserved

    @reserved.setter
    def reserved(self, positions: int) -> None:
        for source in self.sources.values():
            source.reserved = positions

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """That of the first data set."""
        return self._first.tokenizer

    @property
    def token_limit(self) -> int:
        """How many tokens of a text are read at most."""
        return max(source.token_limit for source in self.sources.values())

    @property
    def facts(self) -> dict[str, Any]:
        """``tasks``: the facts of each data set, by the task's name."""
        return {"tasks": {name: source.facts for name, source in self.sources.items()}}

    @property
    def splits(self) -> dict[str, Any]:
        """The tokenised splits, the data sets one behind the other."""
        return {split: ConcatDataset(list(self._rows(split).values())) for split in ("train", "validation", "test")}

    def setup(self, stage: str) -> None:
        """Read and tokenise all of them; once."""
        if streamed := [name for name, source in self.sources.items() if source.streaming]:
            raise DataError(f"{streamed[0]}: a data set among several can't be streamed: leave out its streaming=true.")
        if self.trainer is not None and self.trainer.world_size > 1:
            raise DataError("Several data sets are mixed in one process as yet: trainer.devices=1.")
        for source in self.sources.values():
            source.setup(stage)

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of one task each, in an order that changes by the epoch."""
        lengths = [rows["length"][:] for rows in self._rows("train").values()]
        return self._loader("train", MixedBatches(lengths, self._first.batch_size, self.temperature, self._first.seed))

    def val_dataloader(self) -> DataLoader[Any]:
        """All validation splits."""
        return self._in_turn("validation")

    def test_dataloader(self) -> DataLoader[Any]:
        """All test splits."""
        return self._in_turn("test")

    def texts_dataloader(self, texts: Sequence[str]) -> DataLoader[Any]:
        """Batches of new texts, in their order, for ``Trainer.predict``."""
        kinds = {type(source.target).__name__ for source in self.sources.values()}
        if len(kinds) > 1:
            named = " and ".join(sorted(kinds))
            raise DataError(f"{named} read texts each in a way of its own: train the task to predict by alone.")
        return self._first.texts_dataloader(texts)

    def _rows(self, split: str) -> dict[str, Dataset]:
        return {name: source.splits[split] for name, source in self.sources.items()}

    def _in_turn(self, split: str) -> DataLoader[Any]:
        size, batches, start = 2 * self._first.batch_size, [], 0
        for rows in self._rows(split).values():
            sampler = LengthBucketedSampler(rows["length"][:], size, None)
            batches += [[start + row for row in batch] for batch in BatchSampler(sampler, size, drop_last=False)]
            start += len(rows)
        return self._loader(split, batches)

    def _loader(self, split: str, batches: Any) -> DataLoader[Any]:
        rows = {name: _Named(of.remove_columns("length"), name) for name, of in self._rows(split).items()}
        collators = {name: source.target.collator(self.tokenizer) for name, source in self.sources.items()}

        def collate(batch: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
            name = batch[0][0]
            collated = collators[name]([row for _, row in batch])
            return {**collated, "labels": {name: collated["labels"]}}

        return DataLoader(ConcatDataset(list(rows.values())), batch_sampler=batches, collate_fn=collate)


class _Named(torch.utils.data.Dataset[tuple[str, dict[str, Any]]]):
    """Rows, each with the name of its task."""

    def __init__(self, rows: Dataset, name: str) -> None:
        self.rows, self.name = rows, name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[str, dict[str, Any]]:
        return self.name, self.rows[index]
