"""TextDataModule: labelled texts, tokenised and batched."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorWithPadding

from lightning_ft.data.batching import LengthBucketedSampler
from lightning_ft.data.sources import DataError, check, complete, label_names, quiet_bars, read, row_labels
from lightning_ft.tasks.pretrained import load_pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class TextDataModule(L.LightningDataModule):
    """Texts with a label each, from files or the hub.

    Args:
        path: where the data is: see :func:`lightning_ft.data.sources.read`.
        tokenizer: a folder or a name on the hub; usually the model's.
        text: the column of the text.
        label: the column of the label; strings or whole numbers.
        validation: share of the rows for validation, where the data has no such split.
        test: share of the rows for the test, where the data has no such split.
        seed: of the split and the shuffling.
        max_length: longer texts are cut to this many tokens; by default what the model takes, at most 512.
        batch_size: in training; evaluation uses twice as many.
        num_workers: processes that make batches; 0 is best for texts, which are tokenised beforehand.
        encoding: of CSV, TSV and JSONL files.

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
        label: str = "label",
        validation: float = 0.1,
        test: float = 0.2,
        seed: int = 0,
        max_length: int | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        encoding: str = "utf-8",
    ) -> None:
        super().__init__()
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be a whole number of at least 1, not {batch_size!r}.")
        self.path, self.text, self.label, self.encoding = path, text, label, encoding
        self.validation, self.test, self.seed = validation, test, seed
        self.max_length, self.batch_size, self.num_workers = max_length, batch_size, num_workers
        self.reserved = 0
        self._tokenizer_name = tokenizer
        self._splits: dict[str, Dataset] = {}
        self._labels: list[str] = []

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; where it has no token for padding, it pads with the end of the text."""
        tokenizer = load_pretrained(AutoTokenizer, self._tokenizer_name)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    @property
    def token_limit(self) -> int:
        """How many tokens of a text are read."""
        return self.max_length or min(self.tokenizer.model_max_length, 512) - self.reserved

    @property
    def labels(self) -> list[str]:
        """The names of the labels in the order of their ids; read from the data."""
        self.setup("fit")
        return self._labels

    @property
    def label_counts(self) -> list[int]:
        """How often each label occurs in training, in the order of the ids."""
        self.setup("fit")
        counts = Counter(self._splits["train"]["labels"])
        return [counts[i] for i in range(len(self._labels))]

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
        raw = read(self.path, self.encoding)
        check(raw, self.text, self.label, source)
        raw = complete(raw, self.label, self.validation, self.test, self.seed, source)
        self._labels = label_names(raw["train"], self.label)
        if len(self._labels) < 2:
            raise DataError(
                f"{source}: column '{self.label}' has only one label, '{self._labels[0]}': nothing to learn."
            )
        self._splits = {split: self._encode(rows) for split, rows in raw.items()}
        sizes = ", ".join(f"{len(rows):,} {split}" for split, rows in self._splits.items())
        log.info("%s: %s rows; labels %s", source, sizes, ", ".join(self._labels[:20]))

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of like length, in an order that changes by the epoch."""
        return self._loader(self.splits["train"], self.batch_size, self.seed)

    def val_dataloader(self) -> DataLoader[Any]:
        """The validation split, longest first."""
        return self._loader(self.splits["validation"], 2 * self.batch_size, None)

    def test_dataloader(self) -> DataLoader[Any]:
        """The test split, longest first."""
        return self._loader(self.splits["test"], 2 * self.batch_size, None)

    def scoring_dataloader(self, labels: Sequence[str]) -> DataLoader[Any]:
        """Other data to score a trained model on: its test split, or all of it where it has but one split.

        Args:
            labels: the model's, in the order of their ids.
        """
        raw = read(self.path, self.encoding)
        rows = raw.get("test") or raw[next(iter(raw))]
        check({"test": rows}, self.text, self.label, str(self.path), known=labels)
        self._labels = list(labels)
        return self._loader(self._encode(rows), 2 * self.batch_size, None)

    def texts_dataloader(self, texts: Sequence[str]) -> DataLoader[Any]:
        """Batches of new texts, in their order, for ``Trainer.predict``."""
        rows = [self._tokenize(list(texts[i : i + 1])) for i in range(len(texts))]
        single = [{key: values[0] for key, values in row.items() if key != "length"} for row in rows]
        return DataLoader(single, batch_size=self.batch_size, collate_fn=DataCollatorWithPadding(self.tokenizer))  # type: ignore[arg-type]

    def _encode(self, rows: Dataset) -> Dataset:
        ids = {name: i for i, name in enumerate(self._labels)}
        names = row_labels(rows, self.label)

        def encode(batch: dict[str, list[Any]], rows: list[int]) -> dict[str, Any]:
            return {**self._tokenize(batch[self.text]), "labels": [ids[names[row]] for row in rows]}

        with quiet_bars(len(rows)):
            return rows.map(
                encode, batched=True, with_indices=True, remove_columns=rows.column_names, desc="tokenising"
            )

    def _tokenize(self, texts: list[str]) -> dict[str, Any]:
        encoded = dict(self.tokenizer(texts, truncation=True, max_length=self.token_limit))
        return {**encoded, "length": [len(ids) for ids in encoded["input_ids"]]}

    def _loader(self, rows: Dataset, batch_size: int, seed: int | None) -> DataLoader[Any]:
        return DataLoader(
            rows.remove_columns("length"),
            batch_size=batch_size,
            sampler=LengthBucketedSampler(rows["length"][:], batch_size, seed),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=DataCollatorWithPadding(self.tokenizer),
        )
