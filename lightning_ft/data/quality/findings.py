"""What is looked at, rows; and what is said of them, findings.

Rows are counted from 1 within their split, a header not included, as everywhere in :mod:`lightning_ft.data`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from datasets import Dataset

from lightning_ft.data.sources import check_column
from lightning_ft.data.targets import Columns, LabelKind, Target

Severity = Literal["error", "warning", "note"]
Track = Callable[[str, Sequence[Any]], Iterable[Any]]
"""Goes through a sequence and shows how far it is: called with what is done, and the sequence."""

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")

KINDS = {
    "empty": "rows without a text, or with something else in its place",
    "no_label": "rows without a label",
    "unseen_label": "labels that training never shows",
    "contradiction": "the same text with different labels",
    "leak": "rows of one split that are in a later one too: scores on these flatter the model",
    "duplicate": "the same text again in one split",
    "near_leak": "texts of one split that are nearly the same as one in a later split",
    "near_duplicate": "texts that are nearly the same as another of their split",
    "imbalance": "labels that are much rarer than others",
    "suspicious_label": "rows whose label the base's own embeddings speak against",
    "truncation": "texts that are longer than what the model reads",
    "unknown_tokens": "texts in a writing that the base's tokenizer doesn't know",
    "personal_data": "e-mail addresses, phone numbers, ids and the like in the texts, or in labels that are texts",
}
"""What is looked for, the worst first."""


@dataclass(frozen=True)
class Rows:
    """The rows of a split, or of a part of it.

    Attributes:
        texts: of each row; whatever stands there, a text or not.
        labels: of each row; None where there is none.
        kind: what a label is: one class (a string), several classes (a tuple of strings), a number, tags (a string
            of as many words as the text), or a text of its own.
        labelled: whether a row needs a label.
        cut: whether of a text that is longer than the limit of tokens something isn't learned.
    """

    texts: Sequence[Any]
    labels: Sequence[Any]
    kind: LabelKind = "class"
    labelled: bool = True
    cut: bool = True

    def readable(self) -> Iterator[tuple[int, str]]:
        """The index and the text of each row that has one."""
        return ((i, text) for i, text in enumerate(self.texts) if is_text(text))

    def written(self) -> Iterator[tuple[int, str]]:
        """As :meth:`readable`; then the index and the label of each row whose label is a text of its own."""
        yield from self.readable()
        yield from ((i, y) for i, y in enumerate(self.labels) if self.kind == "text" and is_text(y))

    def classes(self) -> Iterator[str]:
        """Each class of each row; nothing where labels aren't classes."""
        for label in self.labels:
            if label is not None and self.kind in ("class", "classes"):
                yield from [label] if isinstance(label, str) else label


Splits = Mapping[str, Rows]


@dataclass(frozen=True)
class Finding:
    """Something found in a split.

    Attributes:
        kind: one of :data:`KINDS`.
        severity: an error is wrong or misleads for sure, a warning may; a note is good to know.
        split: where.
        rows: the rows, counted from 1; none where it's about the split as a whole.
        message: what, and what to do about it.
        examples: some of it, personal data replaced.
    """

    kind: str
    severity: Severity
    split: str
    rows: tuple[int, ...]
    message: str
    examples: tuple[str, ...] = ()


def rows_of(raw: Mapping[str, Dataset], target: Target, columns: Columns, source: str = "the data") -> dict[str, Rows]:
    """The texts and labels of raw splits: all that the checks know of the data.

    A list of words is a text with spaces between; of several labels that are learned apart, each is named.

    Raises:
        DataError: if a column isn't there.
    """
    named = columns.label if isinstance(columns.label, Mapping) else {"": columns.label}
    labelled = target.label_kind is not None and columns.label is not None
    options = [("text", columns.text), *(("label", column) for column in named.values() if labelled)]
    found = {}
    for split, rows in raw.items():
        for option, column in options:
            check_column(rows, option, column, f"{source}, {split}")
        labels = target.readings(rows, columns) if labelled else [None] * len(rows)
        texts = [_joined(text) for text in rows[columns.text]]
        found[split] = Rows(texts, labels, target.label_kind or "text", labelled, target.cuts)
    return found


def is_text(value: Any) -> bool:
    """Whether it's a text with something in it."""
    return isinstance(value, str) and value.strip() != ""


def identity(text: str) -> str:
    """What texts have in common that are the same but for case, spaces and the form of their characters (NFKC)."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def excerpt(text: str, most: int = 90) -> str:
    """The beginning of a text, in one line."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 1]}…"


def numbered(rows: Sequence[int], most: int = 10) -> str:
    """The numbers of rows, in words."""
    said = ", ".join(str(row) for row in rows[:most])
    return f"row{'s' if len(rows) > 1 else ''} {said}" + (f", … ({len(rows):,} in all)" if len(rows) > most else "")


def count(rows: int, what: str = "row") -> str:
    """So many rows, in words."""
    return f"{rows:,} {what}{'' if rows == 1 else 's'}"


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """By severity, then by kind."""
    kinds = list(KINDS)
    return sorted(findings, key=lambda found: (SEVERITIES.index(found.severity), kinds.index(found.kind)))


def without_examples_of(findings: Iterable[Finding], redacted: Callable[[str], str]) -> list[Finding]:
    """The findings, ``redacted`` applied to what they show of the data."""
    return [replace(found, examples=tuple(redacted(example) for example in found.examples)) for found in findings]


def each(_: str, items: Sequence[Any]) -> Iterable[Any]:
    """The :data:`Track` that shows nothing."""
    return items


def _joined(text: Any) -> Any:
    if isinstance(text, (list, tuple)) and text:
        if all(isinstance(word, str) for word in text):
            return " ".join(text)
        if all(isinstance(message, dict) for message in text):  # of a chat
            return "\n".join(str(message.get("content", "")) for message in text)
    return text
