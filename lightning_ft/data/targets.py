"""Target: what a row of data says is to be learned. It checks rows, tells what a task must know of them, encodes them.

Each has the task of like name: a Target makes the ``labels`` of a batch, and the task takes them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from datasets import ClassLabel, Dataset, Features
from datasets.fingerprint import generate_random_fingerprint

from lightning_ft.data.sources import DataError, check_column, check_rows, quiet_bars, row_number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Facts = Mapping[str, Any]


class Columns(NamedTuple):
    """The columns of the data: of what is read, and of what is to be learned of it."""

    text: str
    label: Any


LabelKind = Literal["class", "classes", "number", "tags", "text"]
"""What a label is: one class, several classes, a number, a tag for each word, or a text of its own."""


class Target(ABC):
    """What is to be learned of a row. Of a split, rows are counted from 1 in messages."""

    label_kind: ClassVar[LabelKind | None] = "class"
    """None where no column but that of the text is read."""

    cuts: ClassVar[bool] = True
    """Whether of a text that is longer than the limit of tokens something isn't learned."""

    packing: bool = False
    """Whether :meth:`arranged` puts several examples in a row, which virtual tokens before the row don't go with."""

    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> None:  # noqa: B027
        """Give the tokenizer what encoding needs of it, so that it's saved with it; DataError if it can't be had."""

    @abstractmethod
    def check(self, rows: Dataset, columns: Columns, where: str) -> None:
        """Raise DataError, naming the row and the column, unless each row of a split has what it needs.

        Args:
            rows: the split.
            columns: those of the data.
            where: file and split, for the message.
        """

    @abstractmethod
    def facts(self, rows: Dataset, columns: Columns, where: str) -> dict[str, Any]:
        """What the task must know of the training rows, in plain values under the names of its arguments.

        Raises:
            DataError: if there is nothing to learn.
        """

    def facts_of_stream(self, chunks: Iterable[Dataset], columns: Columns, where: str) -> dict[str, Any]:
        """As :meth:`facts`, of rows that come in chunks, once, and are too many to hold.

        Raises:
            DataError: if there is nothing to learn, or it can't be told without holding all rows.
        """
        raise DataError(
            f"{where}: what {type(self).__name__} must know of the rows isn't read from a stream. Say it, under the"
            " names of the task's arguments: data.known.NAME=..."
        )

    def check_known(self, rows: Dataset, columns: Columns, facts: Facts, where: str) -> None:  # noqa: B027
        """Raise DataError if a row of a split has what training, of which ``facts`` are, never saw."""

    def readings(self, rows: Dataset, columns: Columns) -> list[Any]:
        """The label of each row as the checks of :mod:`lightning_ft.data.quality` compare it, by ``label_kind``.

        Rows may be any: nothing has been checked yet. None where there is no label, or something else in its place.
        """
        return [_reading(value, self.label_kind) for value in named(rows, columns.label)]

    def strata(self, rows: Dataset, columns: Columns) -> list[str] | None:
        """A word for each row; rows with the same one are shared out to the splits alike. None to share out at will."""
        return None

    def inputs(self, texts: Sequence[Any], tokenizer: PreTrainedTokenizerBase, limit: int) -> dict[str, list[Any]]:
        """The model's inputs for texts, cut to ``limit`` tokens, as lists of one length."""
        return dict(tokenizer(list(texts), truncation=True, max_length=limit))

    def labels(self, rows: Dataset, columns: Columns, facts: Facts) -> list[Any]:
        """The label of each row, as the model is to learn it."""
        raise NotImplementedError

    def encode(
        self, rows: Dataset, columns: Columns, facts: Facts, tokenizer: PreTrainedTokenizerBase, limit: int
    ) -> Dataset:
        """A split as the model takes it: its inputs, ``labels``, and ``length``, the number of tokens."""
        labels = self.labels(rows, columns, facts)

        def encode(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
            return {**self.inputs(batch[columns.text], tokenizer, limit), "labels": [labels[i] for i in indices]}

        return mapped(rows, encode)

    def arranged(self, rows: Dataset, limit: int) -> Dataset:
        """The encoded rows of training as they go into batches, of at most ``limit`` tokens each."""
        return rows

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Makes a batch of encoded rows."""
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(tokenizer)

    def describe(self, facts: Facts) -> str:
        """What there is to learn, in some words."""
        return ""


class Classes(Target):
    """One of several labels a text; strings or whole numbers. Its task is Classification."""

    def check(self, rows: Dataset, columns: Columns, where: str) -> None:
        """A text and a label in each row."""
        check_texts(rows, columns, where)
        check_column(rows, "label", columns.label, where)
        # -1 is the hub's "no label"
        good = _is_class if isinstance(rows.features[columns.label], ClassLabel) else _is_label
        check_rows(where, "label", columns.label, rows[columns.label], good)

    def facts(self, rows: Dataset, columns: Columns, where: str) -> dict[str, Any]:
        """``labels`` in the order of their ids (the data's own, or numeric, or alphabetical), ``label_counts``."""
        return self.facts_of_stream([rows], columns, where)

    def facts_of_stream(self, chunks: Iterable[Dataset], columns: Columns, where: str) -> dict[str, Any]:
        """The same; only the different labels are held."""
        values: Counter[Any] = Counter()
        for rows in chunks:
            values.update(rows[columns.label])
            feature = rows.features[columns.label]
        kinds = {type(value) for value in values}  # a file's parts may have been taken for numbers, or not
        found = list(values) if len(kinds) == 1 else list(map(str, values))
        features = Features({columns.label: feature}) if isinstance(feature, ClassLabel) else None
        distinct = Dataset.from_dict({columns.label: found}, features)
        labels, counts = label_names(distinct, columns.label), Counter[str]()
        for label, count in zip(row_labels(distinct, columns.label), values.values(), strict=True):
            counts[label] += count
        if len(labels) < 2:
            raise DataError(f"{where}: column '{columns.label}' has only one label, '{labels[0]}': nothing to learn.")
        return {"labels": labels, "label_counts": [counts[label] for label in labels]}

    def check_known(self, rows: Dataset, columns: Columns, facts: Facts, where: str) -> None:
        """No label but those of training."""
        check_labels([[label] for label in row_labels(rows, columns.label)], facts["labels"], where)

    def strata(self, rows: Dataset, columns: Columns) -> list[str]:
        """The labels."""
        return row_labels(rows, columns.label)

    def labels(self, rows: Dataset, columns: Columns, facts: Facts) -> list[int]:
        """The id of each row's label."""
        ids = {name: i for i, name in enumerate(facts["labels"])}
        return [ids[label] for label in row_labels(rows, columns.label)]

    def describe(self, facts: Facts) -> str:
        """The labels."""
        return f"labels {', '.join(facts['labels'][:20])}"


class Several(Target):
    """Several things to be learned of each text; the column of each is named under its name. Its task is MultiTask.

    Args:
        targets: by the names of the tasks. Each has one label a text.
    """

    label_kind = "classes"

    def __init__(self, targets: Mapping[str, Target]) -> None:
        self.targets = dict(targets)

    def check(self, rows: Dataset, columns: Columns, where: str) -> None:
        """What each of them needs."""
        for _, target, own in self._each(columns):
            target.check(rows, own, where)

    def facts(self, rows: Dataset, columns: Columns, where: str) -> dict[str, Any]:
        """``tasks``: the facts of each, by its name."""
        return {"tasks": {name: target.facts(rows, own, where) for name, target, own in self._each(columns)}}

    def check_known(self, rows: Dataset, columns: Columns, facts: Facts, where: str) -> None:
        """That each of them knows what it meets."""
        for name, target, own in self._each(columns):
            target.check_known(rows, own, facts["tasks"][name], where)

    def readings(self, rows: Dataset, columns: Columns) -> list[Any]:
        """The classes of each row, each with the name of its task; None where a task has no label.

        Of numbers only whether they're there: two that differ a little are no contradiction.
        """
        found = [
            [
                (f"{name} {', '.join(value) if isinstance(value, tuple) else value}",)
                if target.label_kind in ("class", "classes") and value is not None
                else (None if value is None else ())
                for value in target.readings(rows, own)
            ]
            for name, target, own in self._each(columns)
        ]
        return [None if None in row else tuple(sum(row, ())) for row in zip(*found, strict=True)]

    def strata(self, rows: Dataset, columns: Columns) -> list[str] | None:
        """Those of the first that has any."""
        found = (target.strata(rows, own) for _, target, own in self._each(columns))
        return next((strata for strata in found if strata is not None), None)

    def labels(self, rows: Dataset, columns: Columns, facts: Facts) -> list[dict[str, Any]]:
        """The labels of each row, by name."""
        each = {name: target.labels(rows, own, facts["tasks"][name]) for name, target, own in self._each(columns)}
        return [dict(zip(each, row, strict=True)) for row in zip(*each.values(), strict=True)]

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """As each of them does it; ``labels`` are by name."""
        collators = {name: target.collator(tokenizer) for name, target in self.targets.items()}

        def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
            inputs = [{key: value for key, value in row.items() if key != "labels"} for row in rows]
            if any("labels" not in row for row in rows):
                return next(iter(collators.values()))(inputs)
            batches = {
                name: collator(
                    [{**given, "labels": row["labels"][name]} for given, row in zip(inputs, rows, strict=True)]
                )
                for name, collator in collators.items()
            }
            last = next(iter(batches.values()))
            return {**last, "labels": {name: batch["labels"] for name, batch in batches.items()}}

        return collate

    def describe(self, facts: Facts) -> str:
        """Each of them."""
        return "; ".join(f"{name}: {t.describe(facts['tasks'][name])}".rstrip(": ") for name, t in self.targets.items())

    def _each(self, columns: Columns) -> Iterator[tuple[str, Target, Columns]]:
        if not isinstance(columns.label, Mapping) or set(columns.label) != set(self.targets):
            raise DataError(
                f"data.label must name the column of each task, {{{', '.join(f'{n}: COLUMN' for n in self.targets)}}},"
                f" not {columns.label}."
            )
        for name, target in self.targets.items():
            yield name, target, Columns(columns.text, columns.label[name])


def mapped(rows: Dataset, encode: Callable[[dict[str, list[Any]], list[int]], dict[str, list[Any]]]) -> Dataset:
    """The rows as ``encode`` makes them of batches of columns and their indices, with their ``length`` in tokens."""

    def with_length(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        encoded = encode(batch, indices)
        return {**encoded, "length": [len(ids) for ids in encoded["input_ids"]]}

    with quiet_bars(len(rows)):
        return rows.map(
            with_length,
            batched=True,
            with_indices=True,
            remove_columns=rows.column_names,
            new_fingerprint=generate_random_fingerprint(),  # what is kept for later, and known by, is data.cache's
            desc="tokenising",
        )


def check(
    splits: Mapping[str, Dataset], target: Target, columns: Columns, source: str, facts: Facts | None = None
) -> Facts:
    """See that every row of all splits can be learned from, or be asked of a model that has learned.

    Args:
        splits: rows by split.
        target: what is to be learned.
        columns: those of the data.
        source: where the rows are from, for the message.
        facts: those of the training; by default those of the train split.

    Returns:
        The facts.

    Raises:
        DataError: naming source, split, row and column, and the cure.
    """
    for split, rows in splits.items():
        target.check(rows, columns, f"{source}, {split}")
    if facts is None:
        if "train" not in splits:
            raise DataError(f"{source}: there is no train split, only {', '.join(splits)}.")
        facts = target.facts(splits["train"], columns, source)
    for split, rows in splits.items():
        target.check_known(rows, columns, facts, f"{source}, {split}")
    return facts


def check_texts(rows: Dataset, columns: Columns, where: str) -> None:
    """Raise DataError unless each row has a text."""
    check_column(rows, "text", columns.text, where)
    check_rows(where, "text", columns.text, rows[columns.text], _is_text)


def check_labels(labels: Sequence[Sequence[str]], known: Sequence[str], where: str) -> None:
    """Raise DataError if a row has a label that isn't among those of training; ``labels`` are each row's."""
    unseen = [(row_number(i), label) for i, row in enumerate(labels) for label in row if label not in set(known)]
    if unseen:
        row, label = unseen[0]
        raise DataError(
            f"{where}: the label '{label}' (row {row}, {len({i for i, _ in unseen})} such rows) doesn't occur in"
            f" training, whose labels are {', '.join(known[:20])}. Correct it, or add examples of it to train."
        )


def by_name(feature: Any, value: Any) -> Any:
    """A value of a column of the hub's labels, or of lists of them, by name; None for -1, "no label". Others stay."""
    inner = getattr(feature, "feature", feature)
    if not isinstance(inner, ClassLabel):
        return value
    if isinstance(value, list):
        return [by_name(inner, one) for one in value]
    return inner.int2str(value) if value is not None and value >= 0 else None


def named(rows: Dataset, column: str) -> list[Any]:
    """A column's values, the hub's labels by name."""
    return [by_name(rows.features[column], value) for value in rows[column]]


def row_labels(rows: Dataset, label: str) -> list[str]:
    """The label of each row, by name."""
    feature = rows.features[label]
    values: list[Any] = list(rows[label])
    return [feature.int2str(value) for value in values] if isinstance(feature, ClassLabel) else [str(v) for v in values]


def label_names(rows: Dataset, label: str) -> list[str]:
    """The labels that occur, in the order of their ids: the data's own order, or numeric, or alphabetical."""
    feature = rows.features[label]
    occurring = set(row_labels(rows, label))
    if isinstance(feature, ClassLabel):
        return [name for name in feature.names if name in occurring]
    values = set(rows[label])
    numeric = all(isinstance(value, (int, float)) for value in values)
    return [str(value) for value in (sorted(values) if numeric else sorted(map(str, values)))]


def _reading(value: Any, kind: LabelKind | None) -> Any:
    if isinstance(value, (list, tuple)):
        names = [str(one) for one in value if one is not None]
        return " ".join(names) if kind == "tags" else tuple(sorted(names))
    if value is None or str(value).strip() in ("", "nan"):
        return None
    if kind != "number":
        return str(value)
    try:
        return float(value) if math.isfinite(float(value)) else None
    except (ValueError, OverflowError):
        return None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_label(value: Any) -> bool:
    return isinstance(value, (str, int, float)) and str(value).strip() != ""


def _is_class(value: Any) -> bool:
    return value is not None and value >= 0
