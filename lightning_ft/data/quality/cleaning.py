"""A cleaned copy: what goes, what is replaced, and what was done."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset

from lightning_ft.data.quality.duplicates import leaks, same_texts
from lightning_ft.data.quality.findings import Splits
from lightning_ft.data.quality.labels import contradictions, empty
from lightning_ft.data.quality.privacy import redacted
from lightning_ft.data.sources import DataError
from lightning_ft.data.targets import Columns, by_name


@dataclass(frozen=True)
class Cleaning:
    """What is done to a split.

    Attributes:
        texts: what stands in place of a text, by its index.
        labels: the same of a label that is a text.
        removed: why a row goes, by its index: a kind of finding.
        replaced: how many personal data of each kind were replaced, in rows that stay or go.
    """

    texts: dict[int, str] = field(default_factory=dict)
    removed: dict[int, str] = field(default_factory=dict)
    replaced: Counter[str] = field(default_factory=Counter)
    labels: dict[int, str] = field(default_factory=dict)

    def said(self) -> str:
        """In words."""
        removed = Counter(self.removed.values())
        parts = [f"{n:,} {kind.replace('_', ' ')} removed" for kind, n in removed.items()]
        parts += [f"{n:,} [{kind}]" for kind, n in self.replaced.items()]
        return ", ".join(parts) or "as it was"


def plan(splits: Splits) -> dict[str, Cleaning]:
    """What to do to each split, so that of what can be removed a check finds no more.

    Personal data are replaced first: texts may be the same without. Then go rows without a text or a label; rows that
    contradict each other, all of them, for which is right nobody knows; rows that are in a later split too; and of
    texts that stand several times in a split all but the first.
    """
    cleanings = {}
    for split, data in splits.items():
        # Tags belong to the words as they are.
        texts, replaced = redacted(data.texts if data.kind != "tags" else ())
        labels, more = redacted(data.labels if data.kind == "text" else ())
        cleanings[split] = Cleaning(texts, {}, replaced + more, labels)
    new = {
        split: replace(
            data,
            texts=[cleanings[split].texts.get(i, text) for i, text in enumerate(data.texts)],
            labels=[cleanings[split].labels.get(i, label) for i, label in enumerate(data.labels)],
        )
        for split, data in splits.items()
    }
    places = same_texts(new)
    for finding in (*empty(new), *contradictions(new, places), *leaks(new, places)):
        for row in finding.rows:
            cleanings[finding.split].removed.setdefault(row - 1, finding.kind)
    for group in places.values():
        kept: set[str] = set()
        for split, i in group:  # of those that are left the first stays
            if i not in cleanings[split].removed:
                if split in kept:
                    cleanings[split].removed[i] = "duplicate"
                kept.add(split)
    return cleanings


def write(raw: Mapping[str, Dataset], columns: Columns, cleanings: Mapping[str, Cleaning], folder: Path) -> None:
    """Write a file ``SPLIT.jsonl`` for each split, and ``changes.json``, which says what was done to which row.

    All columns are kept; labels of the hub are written by name.

    Raises:
        DataError: if nothing would be left of a split.
    """
    changes: dict[str, Any] = {}
    for split, rows in raw.items():
        cleaning = cleanings[split]
        if len(cleaning.removed) == len(rows):
            raise DataError(f"Nothing would be left of {split} when cleaned: {cleaning.said()}.")
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for i, row in enumerate(rows):
                if i in cleaning.removed:
                    continue
                row = {key: by_name(rows.features[key], value) for key, value in row.items()}
                if i in cleaning.texts:
                    row[columns.text] = _put_back(row[columns.text], cleaning.texts[i])
                if i in cleaning.labels:
                    row[columns.label] = cleaning.labels[i]
                file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
        by_kind: dict[str, list[int]] = {}
        for i, kind in sorted(cleaning.removed.items()):
            by_kind.setdefault(kind, []).append(i + 1)
        redactions = [i + 1 for i in sorted({*cleaning.texts, *cleaning.labels}) if i not in cleaning.removed]
        changes[split] = {"rows_removed": by_kind, "rows_redacted": redactions, "redactions": dict(cleaning.replaced)}
    (folder / "changes.json").write_text(json.dumps(changes, indent=2) + "\n", encoding="utf-8")


def _put_back(value: Any, text: str) -> Any:
    """The text in the form that its value has: of a chat each message gets its lines, for no pattern spans two."""
    if isinstance(value, str) or not all(isinstance(message, dict) for message in value):
        return text
    lines, messages = iter(text.split("\n")), []
    for message in value:
        content = str(message.get("content", ""))
        new = "\n".join(islice(lines, content.count("\n") + 1))
        messages.append({**message, "content": new} if new != content else message)
    return messages
