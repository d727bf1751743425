"""TextDataModule: texts and what is to be learned of them, tokenised and batched."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from lightning_ft.data import cache
from lightning_ft.data.batching import LengthBucketedSampler, evaluation_batch_size
from lightning_ft.data.sources import SPLITS, DataError, complete, read
from lightning_ft.data.streaming import StreamedRows, StreamLoader, first_rows, open_streams, read_facts
from lightning_ft.data.targets import Classes, Columns, Facts, Target, check
from lightning_ft.tasks.pretrained import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class TextDataModule(L.LightningDataModule):
    """Texts with what is to be learned of each, from files or the hub.

    Args:
        path: where the data is: see :func:`lightning_ft.data.sources.read`.
        tokenizer: a folder or a name on the hub; usually the model's.
        text: the column of the text.
        label: the column of what is to be learned of it.
        target: what that is; by default one of several labels.
        validation: share of the rows for validation, where the data has no such split.
        test: share of the rows for the test, where the data has no such split.
        seed: of the split and the shuffling.
        max_length: longer texts are cut to this many tokens; by default what the model takes, at most 512.
        batch_size: in training; evaluation uses twice as many.
        num_workers: processes that make batches; 0 is best for texts, which are tokenised beforehand.
        encoding: of CSV, TSV, JSONL, CoNLL and TXT files.
        format: what files are whose ending doesn't say it, e.g. ``"conll"``.
        name: of the configuration, where a data set on the hub has several.
        pin_memory: whether batches are made in memory that a GPU reads fast; by default where there is one.
        persistent_workers: whether the processes live on from epoch to epoch; by default they do.
        cache: whether tokenised data is kept on disk for later runs (:mod:`lightning_ft.data.cache`).
        streaming: whether training rows are read as training goes on, for data that doesn't fit in memory
            (:mod:`lightning_ft.data.streaming`). Validation and test rows have files of their own then.
        buffer: of streamed rows, how many are held, shuffled, and put into batches of like length at a time.
        evaluation_rows: of streamed splits, how many of the first rows are validated and tested on.
        known: what the task must know of streamed training rows, which otherwise are read for it once before training.

    Attributes:
        reserved: positions to leave free where ``max_length`` isn't given, for the virtual tokens of a soft prompt.

    Raises:
        ValueError: for a batch size or a buffer below 1.
        DataError: in ``setup``, naming the file, the row or the column, and the cure.
    """

    def __init__(
        self,
        path: str | Path | Mapping[str, str | Path],
        tokenizer: str,
        text: str = "text",
        label: Any = "label",
        target: Target | None = None,
        validation: float = 0.1,
        test: float = 0.2,
        seed: int = 0,
        max_length: int | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        encoding: str = "utf-8",
        format: str | None = None,
        name: str | None = None,
        pin_memory: bool | None = None,
        persistent_workers: bool = True,
        cache: bool = True,
        streaming: bool = False,
        buffer: int = 10_000,
        evaluation_rows: int = 10_000,
        known: Facts | None = None,
    ) -> None:
        super().__init__()
        for option, value in (("batch_size", batch_size), ("buffer", buffer), ("evaluation_rows", evaluation_rows)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{option} must be a whole number of at least 1, not {value!r}.")
        self.path, self.columns = path, Columns(text, label)
        self.encoding, self.name, self.format = encoding, name, format
        self.target = target or Classes()
        self.validation, self.test, self.seed = validation, test, seed
        self.max_length, self.batch_size, self.num_workers = max_length, batch_size, num_workers
        self.pin_memory, self.persistent_workers, self.cache = pin_memory, persistent_workers, cache
        self.streaming, self.buffer, self.evaluation_rows, self.known = streaming, buffer, evaluation_rows, known
        self.reserved = 0
        self._tokenizer_name = tokenizer
        self._splits: dict[str, Any] = {}
        self._sizes: dict[str, int] = {}
        self._facts: dict[str, Any] = {}

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; where it has no token for padding, it pads with the end of the text."""
        tokenizer = load_tokenizer(self._tokenizer_name)
        self.target.prepare(tokenizer)
        return tokenizer

    @property
    def token_limit(self) -> int:
        """How many tokens of a text are read."""
        return self.max_length or min(self.tokenizer.model_max_length, 512) - self.reserved

    @property
    def facts(self) -> dict[str, Any]:
        """What the task must know of the training rows, under the names of its arguments; read from the data."""
        self.setup("fit")
        return self._facts

    @property
    def labels(self) -> list[str]:
        """The names of the labels in the order of their ids, where the target has labels."""
        return self.facts["labels"]

    @property
    def splits(self) -> dict[str, Any]:
        """The tokenised splits: columns ``input_ids``, ``attention_mask``, …, ``labels``, ``length``.

        Data sets, but for training rows that are streamed.
        """
        self.setup("fit")
        return self._splits

    @property
    def sizes(self) -> dict[str, int]:
        """The number of rows of each split; of streamed ones it may not be known."""
        self.setup("fit")
        return self._sizes

    def prepare_data(self) -> None:
        """Of several processes on a machine one tokenises, for all."""
        self.setup("fit")

    @property
    def parts(self) -> list[TextDataModule]:
        """The data sets that it consists of."""
        return [self]

    @cached_property
    def raw(self) -> dict[str, Dataset]:
        """The splits as they are given, read once; errors as of :func:`lightning_ft.data.sources.read`."""
        return read(self.path, self.encoding, self.name, self.format)

    def setup(self, stage: str) -> None:
        """Read, check, split and tokenise; once."""
        if self._splits:
            return
        source = str(self.path)
        if self.target.packing and self.reserved:
            raise DataError(
                f"Packing puts several examples in a row, and the method's {self.reserved} virtual tokens would be"
                " before the first of them alone: data.target.packing=false, or another method."
            )
        splits, self._facts, self._sizes = self._open(source) if self.streaming else self._read(source)
        sizes = ", ".join(f"{count:,} {split}" for split, count in self._sizes.items())
        log.info("%s: %s rows; %s", source, sizes, self.target.describe(self._facts))
        self._splits = splits

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of like length, in an order that changes by the epoch.

        Raises:
            DataError: if data is streamed, and nothing says when training ends.
        """
        rows = self.splits["train"]
        if not self.streaming:
            return self._loader(rows, self.batch_size, self.seed)
        if self.trainer is not None and self.trainer.max_steps < 1:
            raise DataError("Streamed data has no length: say when training ends, trainer.max_steps=...")
        # As its processes are told of the epoch, so of their share.
        rows.num_replicas, rows.rank = self._share
        return StreamLoader(
            rows,
            epoch=lambda: self.trainer.current_epoch if self.trainer else 0,
            batch_size=self.batch_size,
            **{**self._how, "persistent_workers": False},
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """The validation split, longest first."""
        return self._evaluation_loader(self.splits["validation"], "validation")

    def test_dataloader(self) -> DataLoader[Any]:
        """The test split, longest first."""
        return self._evaluation_loader(self.splits["test"], "test")

    def scoring_dataloader(self, facts: Mapping[str, Any]) -> DataLoader[Any]:
        """Other data to score a trained model on: its test split, or all of it where it has but one split.

        Args:
            facts: those of the training.
        """
        rows = self.raw.get("test") or self.raw[next(iter(self.raw))]
        check({"test": rows}, self.target, self.columns, str(self.path), facts)
        return self._evaluation_loader(self._encode(rows, facts, str(self.path)), "test")

    def texts_dataloader(self, texts: Sequence[str]) -> DataLoader[Any]:
        """Batches of new texts, in their order, for ``Trainer.predict``."""
        encoded = [self.target.inputs(texts[i : i + 1], self.tokenizer, self.token_limit) for i in range(len(texts))]
        rows: Any = [{key: values[0] for key, values in row.items()} for row in encoded]
        return DataLoader(rows, batch_size=self.batch_size, collate_fn=self.target.collator(self.tokenizer))

    def _read(self, source: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, int]]:
        """The splits, the facts and the sizes of data that is held whole."""
        raw = self.raw
        check(raw, self.target, self.columns, source)
        raw = complete(
            raw, partial(self.target.strata, columns=self.columns), self.validation, self.test, self.seed, source
        )
        facts = self.target.facts(raw["train"], self.columns, source)  # of what is left of it
        for split, rows in raw.items():
            self.target.check_known(rows, self.columns, facts, f"{source}, {split}, as it was split")
        splits = {split: self._encode(rows, facts, f"{source}, {split}") for split, rows in raw.items()}
        splits["train"] = self.target.arranged(splits["train"], self.token_limit)
        return splits, facts, {split: len(rows) for split, rows in splits.items()}

    def _open(self, source: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, int]]:
        """The same of data whose training rows are streamed."""
        streams = open_streams(self.path, self.encoding, self.name, self.format)
        if missing := [split for split in SPLITS if split not in streams]:
            raise DataError(
                f"{source}: there is no split {' and no split '.join(missing)}, and a stream can't be split by ratio."
                " Give a folder with files train, validation and test."
            )
        train, where, sizes = streams["train"], f"{source}, train", {}
        if self.known is None:
            facts, sizes["train"] = read_facts(train, self.target, self.columns, where)
        else:
            facts = dict(self.known)
        held = {split: first_rows(streams[split], self.evaluation_rows) for split in ("validation", "test")}
        check(held, self.target, self.columns, source, facts)

        def encode(rows: Dataset) -> Dataset:
            self.target.check(rows, self.columns, where)
            self.target.check_known(rows, self.columns, facts, where)
            return self.target.encode(rows, self.columns, facts, self.tokenizer, self.token_limit)

        splits: dict[str, Any] = {"train": StreamedRows(train, encode, self.batch_size, self.buffer, self.seed)}
        splits |= {split: self._encode(rows, facts, f"{source}, {split}") for split, rows in held.items()}
        return splits, facts, sizes | {split: len(rows) for split, rows in held.items()}

    def _encode(self, rows: Dataset, facts: Mapping[str, Any], where: str) -> Dataset:
        try:
            encoded, before = cache.encoded(
                rows, self.target, self.columns, facts, self.tokenizer, self.token_limit, self.cache
            )
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        if before:
            log.info("%s: %s rows were tokenised before: reused (%s)", self.path, f"{len(rows):,}", cache.cache_dir())
        return encoded

    @property
    def _share(self) -> tuple[int, int]:
        """Over how many processes the Trainer's strategy deals out rows, and which of them this is."""
        dealt = (self.trainer.distributed_sampler_kwargs if self.trainer else None) or {}
        return dealt.get("num_replicas", 1), dealt.get("rank", 0)

    @property
    def _how(self) -> dict[str, Any]:
        """What loaders have alike."""
        return {
            "num_workers": self.num_workers,
            "pin_memory": torch.cuda.is_available() if self.pin_memory is None else self.pin_memory,
            "persistent_workers": self.persistent_workers and self.num_workers > 0,
            "collate_fn": self.target.collator(self.tokenizer),
        }

    def _evaluation_loader(self, rows: Dataset, split: str) -> DataLoader[Any]:
        processes, _ = self._share
        if 0 < len(rows) < processes:
            raise DataError(
                f"{self.path}, {split}: {len(rows)} rows are too few for {processes} processes, which need one each."
            )
        return self._loader(rows, evaluation_batch_size(len(rows), 2 * self.batch_size, processes), None)

    def _loader(self, rows: Dataset, batch_size: int, seed: int | None) -> DataLoader[Any]:
        processes, rank = self._share
        sampler = LengthBucketedSampler(rows["length"][:], batch_size, seed, num_replicas=processes, rank=rank)
        return DataLoader(rows.remove_columns("length"), batch_size=batch_size, sampler=sampler, **self._how)
