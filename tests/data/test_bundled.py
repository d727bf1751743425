"""The bundled data: complete, and with nothing that a split could know of another."""

from __future__ import annotations

import re
from collections import Counter
from itertools import combinations
from typing import NamedTuple

import pytest
from datasets import Dataset

from lightning_ft.data.multilabels import MultiLabels
from lightning_ft.data.sources import read
from lightning_ft.data.targets import Classes, Columns, Target, check


class Kind(NamedTuple):
    """What a data set is.

    Attributes:
        target: what is to be learned of a row.
        columns: its columns, the text's and the target's first.
        labels: how many there are.
        run: how many words in a row no two splits share.
    """

    target: Target
    columns: tuple[str, ...]
    labels: int
    run: int


DATA = {
    "reviews_en": Kind(Classes(), ("text", "label", "product"), 2, 4),
    "reviews_zh": Kind(Classes(), ("text", "label", "product"), 2, 5),
    "compliance_review": Kind(MultiLabels(), ("text", "labels"), 7, 7),
    "medical_triage": Kind(Classes(), ("text", "label"), 8, 5),
}
REVIEWS = ["reviews_en", "reviews_zh"]
each = pytest.mark.parametrize("name", DATA)


@pytest.fixture(scope="module")
def bundled() -> dict[str, dict[str, Dataset]]:
    return {name: read(f"bundled:{name}") for name in DATA}


def sentences(text: str) -> set[str]:
    return {" ".join(re.findall(r"\w+", part.lower())) for part in re.split(r"[.!?…。！？\n]+", text)} - {""}


def runs(text: str, n: int, chinese: bool) -> set[tuple[str, ...]]:
    """Runs of n words, or of n Chinese characters, whatever stands between them."""
    units = re.findall(r"\w" if chinese else r"[\w'’]+", text.lower())
    return {tuple(units[i : i + n]) for i in range(len(units) - n + 1)}


@each
def test_every_row_has_what_it_needs(bundled: dict[str, dict[str, Dataset]], name: str) -> None:
    splits = bundled[name]
    assert list(splits) == ["train", "validation", "test"]
    kind = DATA[name]
    columns = Columns(*kind.columns[:2])
    facts = check(splits, kind.target, columns, name)
    assert len(facts["labels"]) == kind.labels
    for rows in splits.values():
        assert tuple(rows.column_names) == kind.columns
        assert kind.target.facts(rows, columns, name)["labels"] == facts["labels"]
        assert all(row["text"] == row["text"].strip() for row in rows)


@pytest.mark.parametrize("name", REVIEWS)
def test_every_review_names_a_product(bundled: dict[str, dict[str, Dataset]], name: str) -> None:
    assert all(product.strip() for rows in bundled[name].values() for product in rows["product"])


@pytest.mark.parametrize("name", REVIEWS)
def test_labels_are_balanced_in_each_split(bundled: dict[str, dict[str, Dataset]], name: str) -> None:
    for rows in bundled[name].values():
        counts = Counter(rows["label"])
        assert set(counts) == {"positive", "negative"}
        assert counts["positive"] == counts["negative"]


def test_there_are_enough(bundled: dict[str, dict[str, Dataset]]) -> None:
    assert sum(len(rows) for name in REVIEWS for rows in bundled[name].values()) >= 1_200
    assert all(len(splits["test"]) >= 100 for splits in bundled.values())


def test_no_text_occurs_twice(bundled: dict[str, dict[str, Dataset]]) -> None:
    texts = [text for splits in bundled.values() for rows in splits.values() for text in rows["text"]]
    assert len(set(texts)) == len(texts)


@each
def test_splits_share_no_sentence_and_no_run_of_words(bundled: dict[str, dict[str, Dataset]], name: str) -> None:
    def parts(text: str) -> set[object]:
        whole = sentences(text) if name in REVIEWS else {text.lower()}  # notes have numbers with points in them
        return {*whole, *runs(text, DATA[name].run, chinese=name == "reviews_zh")}

    of = {split: set().union(*map(parts, rows["text"])) for split, rows in bundled[name].items()}
    assert all(of.values())
    for one, other in combinations(of, 2):
        assert not of[one] & of[other], f"{one} and {other} share them"


def test_chinese_test_split_holds_the_battery_as_negative(bundled: dict[str, dict[str, Dataset]]) -> None:
    found = [row["label"] for row in bundled["reviews_zh"]["test"] if row["text"] == "手机电池续航太差了！"]
    assert found == ["negative"]
