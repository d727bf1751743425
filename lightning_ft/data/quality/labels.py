"""Rows that can't be learnt from, labels that contradict each other, and labels that are rare."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from lightning_ft.data.quality.duplicates import Place
from lightning_ft.data.quality.findings import Finding, Severity, Splits, count, excerpt, is_text, numbered

RATIO, FEW = 10, 10
"""Labels are out of balance where one is ten times as frequent as another, or has fewer rows than ten in train."""


def empty(splits: Splits) -> Iterator[Finding]:
    """Rows without a text or without a label."""
    for split, data in splits.items():
        bad = [i for i, text in enumerate(data.texts) if not is_text(text)]
        if bad:
            rows = [i + 1 for i in bad]
            examples = [f"row {i + 1}: {data.texts[i]!r}"[:90] for i in bad[:3]]
            message = f"{count(len(rows))} without a text: {numbered(rows)}. Fill or remove them."
            yield Finding("empty", "error", split, tuple(rows), message, tuple(examples))
        # A row of several classes may well have none of them.
        rows = [i + 1 for i, label in enumerate(data.labels) if label is None and data.labelled]
        if rows:
            message = f"{count(len(rows))} without a label: {numbered(rows)}. Fill or remove them."
            yield Finding("no_label", "error", split, tuple(rows), message)


def unseen(splits: Splits) -> Iterator[Finding]:
    """Classes of other splits that don't occur in train."""
    if "train" not in splits:
        return
    known = set(splits["train"].classes())
    for split, data in splits.items():
        counts = Counter(name for name in data.classes() if name not in known)
        if counts:
            rows = [i + 1 for i, y in enumerate(data.labels) if y is not None and counts.keys() & _classes(y)]
            names = ", ".join(f"'{name}'" for name in list(counts)[:5])
            message = f"{count(len(rows))} with a label that doesn't occur in train ({names}): {numbered(rows)}."
            yield Finding("unseen_label", "error", split, tuple(rows), f"{message} Correct it, or add examples.")


def contradictions(splits: Splits, places: Mapping[str, Sequence[Place]]) -> Iterator[Finding]:
    """Rows whose text has another label elsewhere; where labels are numbers, one that is clearly another.

    Clearly: by more than the standard deviation of all labels. Where the label is a text, an answer say, several are
    no contradiction.
    """
    spread = _spread(splits)
    found: dict[str, list[int]] = {split: [] for split in splits}
    examples: dict[str, list[str]] = {split: [] for split in splits}
    for group in places.values():
        labels = [splits[split].labels[i] for split, i in group]
        kind = splits[group[0][0]].kind
        if len(group) == 1 or not _contradict([label for label in labels if label is not None], kind, spread):
            continue
        where = "; ".join(f"{split} row {i + 1}: {_said(y)}" for (split, i), y in zip(group[:4], labels, strict=False))
        example = f"{excerpt(splits[group[0][0]].texts[group[0][1]], 60)} ({where})"
        for split, i in group:
            found[split].append(i + 1)
        for split in {split for split, _ in group}:
            examples[split].append(example)
    for split, rows in found.items():
        if rows:
            message = f"{count(len(rows))} whose text has another label elsewhere: {numbered(sorted(rows))}."
            message += " Decide for one, or remove them."
            yield Finding("contradiction", "error", split, tuple(sorted(rows)), message, tuple(examples[split][:3]))


def imbalance(splits: Splits) -> Iterator[Finding]:
    """Classes that are much rarer in train than the most frequent one, or too rare to be learnt."""
    counts = label_counts(splits).get("train", {})
    if not counts:
        return
    most = max(counts, key=lambda name: counts[name])
    rare = {name: n for name, n in counts.items() if n * RATIO <= counts[most] or n < FEW}
    if not rare:
        return
    rarer = any(n * RATIO <= counts[most] for n in rare.values())
    severity: Severity = "warning" if rarer else "note"
    beside = f"few rows beside '{most}' with {counts[most]:,}" if rarer else f"fewer than {FEW} rows"
    named = ", ".join(f"'{name}' {n:,}" for name, n in sorted(rare.items(), key=lambda item: item[1])[:8])
    named += ", …" if len(rare) > 8 else ""
    message = (
        f"{count(len(rare), 'label')} of {len(counts)} with {beside}: {named}."
        " Add rows, weigh them (task.class_weights=balanced), and read macro F1 rather than accuracy."
    )
    yield Finding("imbalance", severity, "train", (), message)


def label_counts(splits: Splits) -> dict[str, dict[str, int]]:
    """How often each class occurs in each split, in the order of their names; nothing where labels aren't classes."""
    counts = {split: Counter(data.classes()) for split, data in splits.items()}
    return {split: {name: found[name] for name in sorted(found)} for split, found in counts.items() if found}


def _contradict(labels: Sequence[object], kind: str, spread: float) -> bool:
    if kind == "text":
        return False
    if kind == "number":
        numbers = [float(label) for label in labels]  # type: ignore[arg-type]
        return len(numbers) > 1 and max(numbers) - min(numbers) > spread
    return len(set(labels)) > 1


def _spread(splits: Splits) -> float:
    numbers = [y for data in splits.values() for y in data.labels if isinstance(y, float)]
    return statistics.pstdev(numbers) if numbers else 0.0


def _classes(label: str | tuple[str, ...]) -> set[str]:
    return {label} if isinstance(label, str) else set(label)


def _said(label: object) -> str:
    return ", ".join(label) if isinstance(label, tuple) else str(label)
