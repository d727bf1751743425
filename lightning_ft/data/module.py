"""TextDataModule: texts and what is to be learned of them, tokenised and batched."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from datasets import Dataset
from torch.utils.data import DataLoader

from lightning_ft.data.batching import LengthBucketedSampler
from lightning_ft.data.sources import DataError, complete, read
from lightning_ft.data.targets import Classes, Columns, Target, check
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
        encoding: of CSV, TSV, JSONL and CoNLL files.
        format: what files are whose ending doesn't say it, e.g. ``"conll"``.

    Attributes:
        reserved: positions to leave free where ``max_length`` isn't given, for the virtual tokens of a soft prompt.

    Raises:
        ValueError: for a batch size below 1.
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
    ) -> None:
        super().__init__()
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be a whole number of at least 1, not {batch_size!r}.")
        self.path, self.columns, self.encoding, self.format = path, Columns(text, label), encoding, format
        self.target = target or Classes()
        self.validation, self.test, self.seed = validation, test, seed
        self.max_length, self.batch_size, self.num_workers = max_length, batch_size, num_workers
        self.reserved = 0
        self._tokenizer_name = tokenizer
        self._splits: dict[str, Dataset] = {}
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
    def splits(self) -> dict[str, Dataset]:
        """The tokenised splits: columns ``input_ids``, ``attention_mask``, …, ``labels``, ``length``."""
        self.setup("fit")
        return self._splits

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
        raw = read(self.path, self.encoding, self.format)
        check(raw, self.target, self.columns, source)
        raw = complete(
            raw, partial(self.target.strata, columns=self.columns), self.validation, self.test, self.seed, source
        )
        self._facts = self.target.facts(raw["train"], self.columns, source)  # of what is left of it
        for split, rows in raw.items():
            self.target.check_known(rows, self.columns, self._facts, f"{source}, {split}, as it was split")
        encoded = {split: self._encode(rows, self._facts, f"{source}, {split}") for split, rows in raw.items()}
        self._splits = {**encoded, "train": self.target.arranged(encoded["train"], self.token_limit)}
        sizes = ", ".join(f"{len(rows):,} {split}" for split, rows in self._splits.items())
        log.info("%s: %s rows; %s", source, sizes, self.target.describe(self._facts))

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of like length, in an order that changes by the epoch."""
        return self._loader(self.splits["train"], self.batch_size, self.seed)

    def val_dataloader(self) -> DataLoader[Any]:
        """The validation split, longest first."""
        return self._loader(self.splits["validation"], 2 * self.batch_size, None)

    def test_dataloader(self) -> DataLoader[Any]:
        """The test split, longest first."""
        return self._loader(self.splits["test"], 2 * self.batch_size, None)

    def scoring_dataloader(self, facts: Mapping[str, Any]) -> DataLoader[Any]:
        """Other data to score a trained model on: its test split, or all of it where it has but one split.

        Args:
            facts: those of the training.
        """
        raw = read(self.path, self.encoding, self.format)
        rows = raw.get("test") or raw[next(iter(raw))]
        check({"test": rows}, self.target, self.columns, str(self.path), facts)
        return self._loader(self._encode(rows, facts, str(self.path)), 2 * self.batch_size, None)

    def texts_dataloader(self, texts: Sequence[str]) -> DataLoader[Any]:
        """Batches of new texts, in their order, for ``Trainer.predict``."""
        encoded = [self.target.inputs(texts[i : i + 1], self.tokenizer, self.token_limit) for i in range(len(texts))]
        rows: Any = [{key: values[0] for key, values in row.items()} for row in encoded]
        return DataLoader(rows, batch_size=self.batch_size, collate_fn=self.target.collator(self.tokenizer))

    def _encode(self, rows: Dataset, facts: Mapping[str, Any], where: str) -> Dataset:
        try:
            return self.target.encode(rows, self.columns, facts, self.tokenizer, self.token_limit)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error

    def _loader(self, rows: Dataset, batch_size: int, seed: int | None) -> DataLoader[Any]:
        return DataLoader(
            rows.remove_columns("length"),
            batch_size=batch_size,
            sampler=LengthBucketedSampler(rows["length"][:], batch_size, seed),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=self.target.collator(self.tokenizer),
        )
