"""The bundled reviews: balanced, and with nothing that a split could know of another."""

from __future__ import annotations

import re
from collections import Counter
from itertools import combinations

import pytest
from datasets import Dataset

from lightning_ft.data.sources import read
from lightning_ft.data.targets import Classes, Columns, check

NAMES = ["reviews_en", "reviews_zh"]


@pytest.fixture(scope="module")
def bundled() -> dict[str, dict[str, Dataset]]:
    return {name: read(f"bundled:{name}") for name in NAMES}


def sentences(text: str) -> set[str]:
    return {" ".join(re.findall(r"\w+", part.lower())) for part in re.split(r"[.!?…。！？\n]+", text)} - {""}


def runs(text: str, chinese: bool) -> set[tuple[str, ...]]:
    """Runs of four words, or of five Chinese characters, whatever stands between them."""
    units, n = (re.findall(r"\w", text), 5) if chinese else (re.findall(r"[\w'’]+", text.lower()), 4)
    return {tuple(units[i : i + n]) for i in range(len(units) - n + 1)}


@pytest.mark.parametrize("name", NAMES)
def test_every_row_has_text_label_and_product(bundled: dict[str, dict[str, Dataset]], name: str) -> None:
    splits = bundled[name]
    assert list(splits) == ["train", "validation", "test"]
    check(splits, Classes(), Columns("text", "label"), name)
    for rows in splits.values():
        assert rows.column_names == ["text", "label", "product"]
        assert all(isinstance(row[key], str) and row[key].strip() for row in rows for key in row)


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_balanced_in_each_split(bundled: dict[str, dict[str, Dataset]], name: str) -> None:
    for rows in bundled[name].values():
        counts = Counter(rows["label"])
        assert set(counts) == {"positive", "negative"}
        assert counts["positive"] == counts["negative"]


def test_there_are_enough(bundled: dict[str, dict[str, Dataset]]) -> None:
    assert sum(len(rows) for splits in bundled.values() for rows in splits.values()) >= 1_200


def test_no_text_occurs_twice(bundled: dict[str, dict[str, Dataset]]) -> None:
    texts = [text for splits in bundled.values() for rows in splits.values() for text in rows["text"]]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("name", NAMES)
def test_splits_share_no_sentence_and_no_run_of_words(bundled: dict[str, dict[str, Dataset]], name: str) -> None:
    def parts(text: str) -> set[object]:
        return {*sentences(text), *runs(text, chinese=name == "reviews_zh")}

    of = {split: set().union(*map(parts, rows["text"])) for split, rows in bundled[name].items()}
    assert all(of.values())
    for one, other in combinations(of, 2):
        assert not of[one] & of[other], f"{one} and {other} share them"


def test_chinese_test_split_holds_the_battery_as_negative(bundled: dict[str, dict[str, Dataset]]) -> None:
    found = [row["label"] for row in bundled["reviews_zh"]["test"] if row["text"] == "手机电池续航太差了！"]
    assert found == ["negative"]
