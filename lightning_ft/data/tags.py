"""Tags: a tag for each word of a text. Its task is TokenClassification."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from datasets import ClassLabel, Dataset
from torch.nn.utils.rnn import pad_sequence

from lightning_ft.data.sources import PREFIXED, DataError, check_column, check_rows, strays
from lightning_ft.data.targets import Columns, Facts, Target, check_labels

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

IGNORED = -100
"""The tag of no word: what pads a row."""

UNREAD = -1
"""The position of a word that the model doesn't see: it lies beyond the limit, or has no token."""


class Tags(Target):
    """A tag for each word: rows hold a list of words and a list of tags of the same length.

    Tags say where entities are: BIO, or IOB1, BIOES and BILOU, which are read as BIO (:func:`bio`). Where no tag
    begins with such a letter (parts of speech), tags are plain ones, and remain what they are.

    The tokenizer, which must be a fast one, cuts words into tokens. The first token of a word is what is learned of
    and asked for its tag; the others have none. Byte-level tokenizers, to which a space belongs to the word behind
    it, get each word with one, as in the middle of a text.

    ``labels`` of a batch are ``tags`` (batch, words), ids, and ``positions`` (batch, words), the first token of each
    word, both padded; and ``count``, the number of words that have both. ``extra``: ``positions``, ``spans``, where
    words are in the text, a tensor (words, 2) a row, and ``text``.
    """

    label_kind = "tags"

    def check(self, rows: Dataset, columns: Columns, where: str) -> None:
        """As many tags as words in each row, and at least one; no plain tags among BIO's."""
        check_column(rows, "text", columns.text, where)
        check_column(rows, "label", columns.label, where)
        check_rows(where, "list of words", columns.text, rows[columns.text], _is_list_of_words)
        if _names(rows, columns.label) is None:  # else all are strings by their ids
            check_rows(where, "list of tags", columns.label, rows[columns.label], _is_list_of_words)
        tags = row_tags(rows, columns.label)
        sizes = ((len(words), len(row)) for words, row in zip(rows[columns.text], tags, strict=True))
        uneven = [(i, *size) for i, size in enumerate(sizes, start=1) if size[0] != size[1]]
        if uneven:
            number, words, count = uneven[0]
            raise DataError(
                f"{where}: row {number} has {words} words in column '{columns.text}' and {count} tags in"
                f" '{columns.label}' ({len(uneven)} such rows, counted from 1). Each word needs its tag."
            )
        stray = set(strays({tag for row in tags for tag in row}))
        for i, row in enumerate(tags if stray else (), start=1):
            for tag in stray.intersection(row):
                raise DataError(
                    f"{where}: row {i} has the tag '{tag}' in column '{columns.label}', which isn't O, nor begins with"
                    " B- or I- as other tags do. Correct it."
                )

    def facts(self, rows: Dataset, columns: Columns, where: str) -> dict[str, Any]:
        """``labels``: O, and of each type that occurs both tags, ``B-`` and ``I-``, whether they occur or not."""
        found = {tag for row in row_tags(rows, columns.label) for tag in bio(row)}
        types = sorted({match[2] for match in map(PREFIXED.fullmatch, found) if match})
        plain = sorted(found - {"O"})
        tags = [f"{letter}-{name}" for name in types for letter in "BI"] if types else plain
        labels = [*(["O"] if types or "O" in found else []), *tags]
        if len(labels) < 2:
            raise DataError(f"{where}: column '{columns.label}' has only one tag, '{labels[0]}': nothing to learn.")
        return {"labels": labels}

    def check_known(self, rows: Dataset, columns: Columns, facts: Facts, where: str) -> None:
        """No tag but those of training."""
        check_labels([sorted({*bio(row)}) for row in row_tags(rows, columns.label)], facts["labels"], where)

    def inputs(self, texts: Sequence[Any], tokenizer: PreTrainedTokenizerBase, limit: int) -> dict[str, list[Any]]:
        """The model's inputs for texts, or for lists of words, which then are the text with a space between them.

        What a text's words are is said by :data:`WORDS`.

        Raises:
            DataError: for a slow tokenizer, which can't say which word a token is of.
        """
        if not tokenizer.is_fast:
            raise DataError(
                f"The tokenizer '{tokenizer.name_or_path}' ({type(tokenizer).__name__}) is a slow one, and doesn't say"
                " which word a token is of. Tags need a fast one: a folder or a name with a tokenizer.json."
            )
        space = " " if _is_byte_level(tokenizer) else ""
        strings = [text if isinstance(text, str) else " ".join(text) for text in texts]
        spans = [_found(text) if isinstance(text, str) else _joined(text) for text in texts]
        words = [
            [space + text[start:end] for start, end in places] for text, places in zip(strings, spans, strict=True)
        ]
        encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=limit)
        positions = [_first_tokens(encoded.word_ids(i), len(places)) for i, places in enumerate(spans)]
        extra = [
            {"text": text, "spans": places, "positions": first}
            for text, places, first in zip(strings, spans, positions, strict=True)
        ]
        return {**encoded, "extra": extra}

    def labels(self, rows: Dataset, columns: Columns, facts: Facts) -> list[list[int]]:
        """The ids of each row's tags."""
        ids = {tag: i for i, tag in enumerate(facts["labels"])}
        return [[ids[tag] for tag in bio(row)] for row in row_tags(rows, columns.label)]

    def encode(
        self, rows: Dataset, columns: Columns, facts: Facts, tokenizer: PreTrainedTokenizerBase, limit: int
    ) -> Dataset:
        """The inputs, ``labels``, ``extra`` and ``length``; says how many words the model doesn't see."""
        encoded = super().encode(rows, columns, facts, tokenizer, limit)
        unread = [row["positions"].count(UNREAD) for row in encoded["extra"]]
        if any(unread):
            log.warning(
                "%d words in %d of %d texts aren't read (a text is cut to %d tokens). They count as O in the scores:"
                " entities among them are missed.",
                *(sum(unread), len(unread) - unread.count(0), len(unread), limit),
            )
        return encoded

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Pads the inputs as the tokenizer does, and tags and positions behind each row's last word."""
        pad = super().collator(tokenizer)

        def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
            inputs = [{k: v for k, v in row.items() if k not in ("labels", "extra")} for row in rows]
            batch = dict(pad(inputs))
            width, left = batch["input_ids"].shape[1], tokenizer.padding_side == "left"
            shifts = [width - len(row["input_ids"]) if left else 0 for row in rows]
            positions = _padded(
                [_shifted(r["extra"]["positions"], s) for r, s in zip(rows, shifts, strict=True)], UNREAD
            )
            batch["extra"] = {
                "positions": positions,
                "spans": [torch.tensor(row["extra"]["spans"]).view(-1, 2) for row in rows],
                "text": [row["extra"]["text"] for row in rows],
            }
            if "labels" in rows[0]:
                tags = _padded([row["labels"] for row in rows], IGNORED)
                count = int(((positions != UNREAD) & (tags != IGNORED)).sum())
                batch["labels"] = {"tags": tags, "positions": positions, "count": count}
            return batch

        return collate

    def describe(self, facts: Facts) -> str:
        """The tags."""
        return f"tags {', '.join(facts['labels'][:20])}"


def bio(tags: Sequence[str]) -> list[str]:
    """Tags in BIO: the first word of each entity has ``B-TYPE``, the others have ``I-TYPE``.

    Args:
        tags: of a row; BIO, IOB1 (``B-`` only between neighbours of one type), BIOES or BILOU. An ``I-`` that goes on
            with no entity of its type begins one, as CoNLL's script and seqeval count it. Plain tags stay.
    """
    read, before = [], ""
    for tag in tags:
        match = PREFIXED.fullmatch(tag)
        place, name = match.groups() if match else ("", "")
        read.append(f"{'I' if place in 'IEL' and name == before else 'B'}-{name}" if match else tag)
        before = "" if place in "ESLU" else name
    return read


WORDS = re.compile(r"\w+|[^\w\s]")
"""What a word of a text is: a run of letters and digits, or any other sign alone; spaces divide them.

Languages that don't divide words by spaces are to be given as lists of words.
"""


def row_tags(rows: Dataset, label: str) -> list[list[str]]:
    """The tags of each row, by name."""
    names = _names(rows, label)
    return [list(row) if names is None else [names[i] for i in row] for row in rows[label]]


def _names(rows: Dataset, label: str) -> list[str] | None:
    """The names of tags that are kept as numbers."""
    feature = getattr(rows.features[label], "feature", None)
    return feature.names if isinstance(feature, ClassLabel) else None


def _found(text: str) -> list[list[int]]:
    return [[match.start(), match.end()] for match in WORDS.finditer(text)]


def _joined(words: Sequence[str]) -> list[list[int]]:
    spans, start = [], 0
    for word in words:
        spans.append([start, start + len(word)])
        start += len(word) + 1
    return spans


def _first_tokens(word_ids: Sequence[int | None], words: int) -> list[int]:
    """Where each word's first token is; UNREAD for those that have none."""
    first = [UNREAD] * words
    for position in range(len(word_ids) - 1, -1, -1):
        word = word_ids[position]
        if word is not None:
            first[word] = position
    return first


def _is_byte_level(tokenizer: Any) -> bool:
    step = tokenizer.backend_tokenizer.pre_tokenizer
    state = json.loads(step.__getstate__()) if step is not None else {}
    return any(part.get("type") == "ByteLevel" for part in state.get("pretokenizers", [state]))


def _shifted(positions: Sequence[int], shift: int) -> list[int]:
    return [UNREAD if position == UNREAD else position + shift for position in positions]


def _padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True, padding_value=value)


def _is_list_of_words(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(word, str) and word.strip() for word in value)
