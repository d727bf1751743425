"""The same text again, exactly or nearly, in one split or in two.

Exactly: the same but for case, spaces and the form of characters (``identity`` in ``findings.py``).
Nearly: of the sets A and B of their runs of five characters, letters and digits alone,

    J(A, B) = |A ∩ B| / |A ∪ B| ≥ t

with t = 0.8: one word in fifteen changed, about. Pairs are found by prefix filtering (Chaudhuri et al. 2006, "A
primitive operator for similarity joins in data cleaning"; Bayardo et al. 2007, "Scaling up all pairs similarity
search"): if J(A, B) ≥ t, and all sets are put in one order, the first |A| - ⌈t|A|⌉ + k of A and as many of B have k in
common; k is 5. In the order from rare to common few other pairs do. Every candidate is verified by its exact J. Unlike
MinHash it misses nothing and needs no seed; only where more than fifty texts share such a rare run, as in data made by
a template, each is compared with the fifty next to it in length.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product

import numpy as np

from lightning_ft.data.quality.findings import (
    Finding,
    Severity,
    Splits,
    Track,
    count,
    each,
    excerpt,
    identity,
    numbered,
)
from lightning_ft.data.sources import SPLITS

Place = tuple[str, int]
"""A split, and an index in it."""

NEARLY = 0.8
_RUN, _FEWEST, _SHARED, _NEIGHBOURS = 5, 20, 5, 50


def same_texts(splits: Splits) -> dict[str, list[Place]]:
    """Where each text stands, by its identity, in the order of the splits and the rows.

    Where a label is a text of its own, a completion say, the two are one: a prompt may well have several.
    """
    places: dict[str, list[Place]] = defaultdict(list)
    for split in sorted(splits, key=_order):
        for i, text in splits[split].readable():
            label = splits[split].labels[i] if splits[split].kind == "text" else None
            places["\n".join(map(identity, [text, label] if label else [text]))].append((split, i))
    return places


def duplicates(splits: Splits, places: Mapping[str, Sequence[Place]], carved: bool = False) -> Iterator[Finding]:
    """Of texts that stand several times in a split, all but the first.

    Args:
        splits: the data.
        places: of :func:`same_texts`.
        carved: whether splits will be carved out of train, in which copies of a row then land.
    """
    found: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for group in places.values():
        first = _firsts(group)
        for split, i in group:
            if i != first[split]:
                found[split].append((i, first[split]))
    for split in sorted(found, key=_order):
        pairs = sorted(found[split])
        rows = tuple(i + 1 for i, _ in pairs)
        cure = "Keep one of each."
        if carved and split == "train":
            cure = "The rows are split by ratio, and copies of one may land in train and in test: keep one of each."
        message = f"{count(len(rows), 'text')} that stood here before: {numbered(rows)}. {cure}"
        examples = [f"row {i + 1} = row {j + 1}: {excerpt(splits[split].texts[i])}" for i, j in pairs[:3]]
        yield Finding("duplicate", "warning", split, rows, message, tuple(examples))


def leaks(splits: Splits, places: Mapping[str, Sequence[Place]]) -> Iterator[Finding]:
    """Of texts that stand in several splits, the rows of the earlier one (train, validation, test)."""
    found: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for group in places.values():
        first = _firsts(group)
        for earlier, i in group if len(first) > 1 else ():
            for later in first:
                if _order(earlier) < _order(later):
                    found[earlier, later].append((i, first[later]))
    for (earlier, later), pairs in _in_order(found):
        message = f"{count(len(pairs), 'text')} that {later} has too"
        yield _shared("leak", "error", splits, (earlier, later), message, pairs, "=")


def near(splits: Splits, places: Mapping[str, Sequence[Place]], track: Track = each) -> Iterator[Finding]:
    """Of texts that are nearly the same, those after the first in a split; and between splits, as :func:`leaks`.

    Of texts that are exactly the same the first of a split stands for all.
    """
    groups = [_firsts(group) for group in places.values()]
    inside: dict[str, dict[int, int]] = defaultdict(dict)
    across: dict[tuple[str, str], dict[int, int]] = defaultdict(dict)
    for a, b in similar(list(places), track=track):
        for (one, i), (other, j) in product(groups[a].items(), groups[b].items()):
            if one == other:
                inside[one].setdefault(max(i, j), min(i, j))
            elif _order(one) < _order(other):
                across[one, other].setdefault(i, j)
            else:
                across[other, one].setdefault(j, i)
    for split in sorted(inside, key=_order):
        pairs = sorted(inside[split].items())
        rows = tuple(i + 1 for i, _ in pairs)
        texts, labels = splits[split].texts, splits[split].labels
        differ = sum(labels[i] != labels[j] for i, j in pairs)
        said = f", {differ:,} with another label" if differ else ""
        message = f"{count(len(rows), 'text')} nearly as an earlier one{said}: {numbered(rows)}."
        examples = [f"row {i + 1}: {excerpt(texts[i])} ≈ row {j + 1}: {excerpt(texts[j])}" for i, j in pairs[:3]]
        yield Finding("near_duplicate", "note", split, rows, f"{message} They add little.", tuple(examples))
    for (earlier, later), found in _in_order({key: list(found.items()) for key, found in across.items()}):
        message = f"{count(len(found), 'text')} nearly as one that {later} has"
        yield _shared("near_leak", "warning", splits, (earlier, later), message, found, "≈")


def similar(texts: Sequence[str], least: float = NEARLY, track: Track = each) -> list[tuple[int, int]]:
    """The pairs (i, j), i < j, of texts with J ≥ ``least``.

    Texts of fewer than 20 runs are too short to tell: of these only pairs that have the same letters and digits.
    """
    letters = [re.sub(r"[\W_]+", " ", text).strip() for text in texts]
    same: dict[str, list[int]] = defaultdict(list)
    for i, text in enumerate(letters):
        if text:
            same[text].append(i)
    pairs = {pair for group in same.values() for pair in combinations(group, 2)}
    long = [text for text in same if len(text) >= _FEWEST + _RUN - 1]
    sets = {text: runs(text) for text in track("looking for near duplicates", long)}
    kept = [text for text, found in sets.items() if len(found) >= _FEWEST]
    for a, b in _candidates([sets[text] for text in kept], least):
        one, other = sets[kept[a]], sets[kept[b]]
        shared = len(np.intersect1d(one, other, assume_unique=True))
        if shared >= least * (len(one) + len(other) - shared):
            pairs |= {(min(pair), max(pair)) for pair in product(same[kept[a]], same[kept[b]])}
    return sorted(pairs)


def runs(text: str) -> np.ndarray:
    """The different runs of five characters of a text, each as a number of 32 bits."""
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    hashed = np.zeros(max(0, len(points) - _RUN + 1), np.uint32)
    for i in range(_RUN):
        hashed = hashed * np.uint32(2654435761) + points[i : i + len(hashed)]  # overflow is what mixes
        hashed ^= hashed >> np.uint32(15)
    return np.unique(hashed)


def _candidates(sets: Sequence[np.ndarray], least: float) -> Iterator[tuple[int, int]]:
    """Pairs that share some of the first, rarest members of their sets, and are of like size."""
    if len(sets) < 2:
        return
    sizes = np.array([len(found) for found in sets])
    owner = np.repeat(np.arange(len(sets)), sizes)
    _, member, often = np.unique(np.concatenate(sets), return_inverse=True, return_counts=True)
    rank = np.empty(len(often), np.int64)
    rank[np.argsort(often, kind="stable")] = np.arange(len(often))
    # One sort: by the set, within it from rare to common.
    order = np.argsort(owner * len(often) + rank[member])
    position = np.arange(len(owner)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    prefix = position < np.repeat(sizes - np.ceil(least * sizes).astype(int) + _SHARED, sizes)
    member, owner = member[order], owner[order]
    used = prefix & (often[member] > 1)
    member, owner = member[used], owner[used]
    order = np.lexsort((sizes[owner], member))  # in each group by size, so that neighbours are the likely ones
    member, owner = member[order], owner[order]
    found = [np.empty(0, np.int64)]
    for shift in range(1, _NEIGHBOURS + 1):
        a, b = owner[:-shift], owner[shift:]
        same = member[:-shift] == member[shift:]
        if not same.any():
            break
        like = same & (sizes[a] >= least * sizes[b])
        a, b = a[like], b[like]
        found.append(np.minimum(a, b) * len(sets) + np.maximum(a, b))
    pairs = np.sort(np.concatenate(found))
    # Sorted, a pair that was found k times stands k - 1 places further on too.
    often_enough = pairs[_SHARED - 1 :][pairs[_SHARED - 1 :] == pairs[: len(pairs) - _SHARED + 1]]
    for pair in dict.fromkeys(often_enough.tolist()):
        yield divmod(pair, len(sets))


def _firsts(group: Sequence[Place]) -> dict[str, int]:
    """The first of a text's places in each split."""
    first: dict[str, int] = {}
    for split, i in group:
        first.setdefault(split, i)
    return first


def _in_order(
    found: Mapping[tuple[str, str], list[tuple[int, int]]],
) -> Iterator[tuple[tuple[str, str], list[tuple[int, int]]]]:
    for splits in sorted(found, key=lambda pair: (_order(pair[0]), _order(pair[1]))):
        yield splits, sorted(found[splits])


def _shared(
    kind: str,
    severity: Severity,
    splits: Splits,
    names: tuple[str, str],
    message: str,
    pairs: Sequence[tuple[int, int]],
    sign: str,
) -> Finding:
    """A finding of what two splits share, in rows of the earlier one."""
    earlier, later = names
    rows = tuple(i + 1 for i, _ in pairs)
    message += f": {numbered(rows)}. Scores there then flatter the model: take them out of {earlier}."
    examples = [
        f"{earlier} row {i + 1} {sign} {later} row {j + 1}: {excerpt(splits[earlier].texts[i])}" for i, j in pairs[:3]
    ]
    return Finding(kind, severity, earlier, rows, message, tuple(examples))


def _order(split: str) -> int:
    return SPLITS.index(split) if split in SPLITS else len(SPLITS)
