"""What the model sees of the texts: their lengths in tokens, what is cut, and what its tokenizer doesn't know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_ft.data.quality.findings import Finding, Severity, Splits, Track, count, each, excerpt, numbered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OFTEN = 0.05
"""Share of texts that are cut above which it's a warning."""

UNKNOWN, UNREADABLE = 0.01, 0.2
"""Shares of unknown tokens above which it's a warning, an error."""

_BATCH = 500


@dataclass(frozen=True)
class Tokens:
    """The tokens of a split's texts.

    Attributes:
        rows: whose they are, counted from 1.
        lengths: of each text, uncut, with the special tokens.
        unknown: of each text.
        characters: of each text, without spaces.
    """

    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    unknown: tuple[int, ...]
    characters: tuple[int, ...]


def tokens(
    splits: Splits, tokenizer: PreTrainedTokenizerBase, most: int | None = None, track: Track = each
) -> dict[str, Tokens]:
    """Tokenise each text.

    Args:
        splits: the data.
        tokenizer: the base's.
        most: look at no more texts a split, evenly spread; None for all.
        track: shows how far it is.
    """
    special = tokenizer.num_special_tokens_to_add()
    unk = tokenizer.unk_token_id
    result = {}
    for split, data in splits.items():
        found = list(data.readable())
        if most is not None and len(found) > most:
            found = [found[i * len(found) // most] for i in range(most)]
        lengths, unknown = [], []
        batches = [found[i : i + _BATCH] for i in range(0, len(found), _BATCH)]
        for batch in track(f"tokenising {split}", batches):
            texts = [text for _, text in batch]
            # `verbose` would say of each long text that it's longer than what the model takes.
            for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
                lengths.append(len(ids) + special)
                unknown.append(0 if unk is None else ids.count(unk))
        rows = tuple(i + 1 for i, _ in found)
        characters = tuple(sum(len(word) for word in text.split()) for _, text in found)
        result[split] = Tokens(rows, tuple(lengths), tuple(unknown), characters)
    return result


def truncation(found: Mapping[str, Tokens], limit: int) -> Iterator[Finding]:
    """Texts that are cut at ``limit`` tokens."""
    for split, its in found.items():
        rows = [row for row, length in zip(its.rows, its.lengths, strict=True) if length > limit]
        if rows:
            share = len(rows) / len(its.rows)
            severity: Severity = "warning" if share > OFTEN else "note"
            message = (
                f"{share:.1%} of the texts are longer than the {limit:,} tokens that are read (up to"
                f" {max(its.lengths):,}): {numbered(rows)}. Raise data.max_length as far as the model goes."
            )
            yield Finding("truncation", severity, split, tuple(rows), message)


def unknown_tokens(splits: Splits, found: Mapping[str, Tokens]) -> Iterator[Finding]:
    """Splits of which the tokenizer doesn't know a good part; or which it takes apart into bytes."""
    for split, its in found.items():
        total, characters = sum(its.lengths), sum(its.characters)
        if not total:
            continue
        share = sum(its.unknown) / total
        rows = [row for row, n, of in zip(its.rows, its.unknown, its.lengths, strict=True) if n > UNKNOWN * of]
        examples = tuple(f"row {row}: {excerpt(splits[split].texts[row - 1])}" for row in rows[:3])
        if share > UNREADABLE:
            message = f"{share:.0%} of the tokens are unknown to the base: it can't read this language. Choose another."
            yield Finding("unknown_tokens", "error", split, tuple(rows), message, examples)
        elif share > UNKNOWN:
            message = f"{share:.1%} of the tokens are unknown to the base, in {count(len(rows))}: {numbered(rows)}."
            yield Finding(
                "unknown_tokens", "warning", split, tuple(rows), f"{message} It sees nothing there.", examples
            )
        elif total - sum(its.unknown) > 1.2 * characters:
            message = (
                f"{total / characters:.1f} tokens a character: the base's tokenizer hardly knows this writing, and"
                " takes characters apart. A base for this language reads more of a text, and better."
            )
            yield Finding("unknown_tokens", "note", split, (), message)


def histogram(lengths: Sequence[int], limit: int) -> tuple[list[int], list[int]]:
    """Edges and counts of the lengths in about thirty bins of whole numbers, one edge right behind ``limit``."""
    top = max([*lengths, 1])
    width = max(1, -(-top // 30))
    start = (limit + 1) % width - width if (limit + 1) % width else 0
    edges = list(range(start, top + width + 1, width))
    counts = [0] * (len(edges) - 1)
    for length in lengths:
        counts[(length - start) // width] += 1
    return edges, counts
