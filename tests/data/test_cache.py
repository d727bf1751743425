"""Tokenised data is reused where the same would come out, and only there."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from lightning_ft.data import cache
from lightning_ft.data.module import TextDataModule
from lightning_ft.data.targets import Classes, Several

ROWS = [(f"the battery is {'very ' * (i % 5)}good {i}", ("bad", "good")[i % 2]) for i in range(40)]


def write(file: Path, rows: list[tuple[str, str]] = ROWS) -> Path:
    file.write_text("\n".join(["text,label", *(f"{text},{label}" for text, label in rows)]), encoding="utf-8")
    return file


@pytest.fixture(autouse=True)
def _a_cache_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of rows that were tokenised."""
    seen: list[int] = []
    encode = Classes.inputs

    def inputs(self: Classes, texts: Any, *more: Any) -> Any:
        seen.append(len(texts))
        return encode(self, texts, *more)

    monkeypatch.setattr(Classes, "inputs", inputs)
    return seen


def splits(path: Path, tokenizer: str, **options: Any) -> dict[str, list[dict[str, Any]]]:
    return {split: rows.to_list() for split, rows in TextDataModule(path, tokenizer, **options).splits.items()}


def test_the_second_time_nothing_is_tokenised_and_it_is_said(
    tmp_path: Path, tiny_bert_dir: str, counted: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path / "a.csv")
    first = splits(file, tiny_bert_dir)
    assert sum(counted) == len(ROWS)
    with caplog.at_level(logging.INFO):
        assert splits(file, tiny_bert_dir) == first
    assert sum(counted) == len(ROWS)
    assert [r.getMessage().split("(")[0] for r in caplog.records if "before" in r.getMessage()] == [
        f"{file}: {len(rows)} rows were tokenised before: reused " for rows in first.values()
    ]


def test_a_call_in_between_changes_nothing(tmp_path: Path, tiny_bert_dir: str, counted: list[int]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert_dir)
    before = cache.fingerprint(tokenizer)
    tokenizer(["good", "very good"], padding=True, truncation=True, max_length=7)  # leaves its mark on the tokenizer
    assert cache.fingerprint(tokenizer) == before


def test_the_same_content_elsewhere_is_the_same(tmp_path: Path, tiny_bert_dir: str, counted: list[int]) -> None:
    splits(write(tmp_path / "a.csv"), tiny_bert_dir)
    splits(write(tmp_path / "b.csv"), tiny_bert_dir)
    assert sum(counted) == len(ROWS)


def test_a_file_replaced_with_its_old_time_is_read_anew(tmp_path: Path, tiny_bert_dir: str) -> None:
    file = write(tmp_path / "a.csv")
    first, time = splits(file, tiny_bert_dir), file.stat().st_mtime_ns
    write(file, [(text.replace("good", "nice"), label) for text, label in ROWS])  # as long, too
    os.utime(file, ns=(time, time))
    second = splits(file, tiny_bert_dir)
    assert second != first
    assert second == splits(write(tmp_path / "b.csv", [(t.replace("good", "nice"), y) for t, y in ROWS]), tiny_bert_dir)


def changed_tokenizer(folder: str, to: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(to)
    backend = Tokenizer.from_file(str(to / "tokenizer.json"))
    backend.normalizer = None
    backend.save(str(to / "tokenizer.json"))
    return str(to)


class Other(Classes):
    """With a setting."""

    def __init__(self, setting: int) -> None:
        self.setting = setting


@pytest.mark.parametrize(
    "other", [{"max_length": 5}, {"seed": 1}, {"target": Other(1)}, {"target": Other(2)}, "tokenizer", "label"]
)
def test_whatever_else_would_come_out_is_tokenised(
    tmp_path: Path, tiny_bert_dir: str, counted: list[int], other: Any
) -> None:
    file = write(tmp_path / "a.csv")
    splits(file, tiny_bert_dir)
    splits(file, tiny_bert_dir, target=Other(0))
    counted.clear()
    if other == "tokenizer":
        splits(file, changed_tokenizer(tiny_bert_dir, tmp_path / "tokenizer"))
    elif other == "label":
        splits(write(file, [(text, {"bad": "awful"}.get(label, label)) for text, label in ROWS]), tiny_bert_dir)
    else:
        splits(file, tiny_bert_dir, **other)
    assert sum(counted) == len(ROWS)


@pytest.mark.parametrize("changed", ["other code", None])
def test_the_code_of_each_of_several_targets_counts(
    tmp_path: Path, tiny_bert_dir: str, monkeypatch: pytest.MonkeyPatch, changed: str | None
) -> None:
    file, code = write(tmp_path / "a.csv"), cache._code
    options: dict[str, Any] = {"target": Several({"one": Other(0)}), "label": {"one": "label"}}
    first = splits(file, tiny_bert_dir, **options)
    assert len(list(cache.cache_dir().iterdir())) == 3
    monkeypatch.setattr(cache, "_code", lambda kind: changed if kind is Other else code(kind))
    assert splits(file, tiny_bert_dir, **options) == first
    assert len(list(cache.cache_dir().iterdir())) == (6 if changed else 3)


def test_nothing_is_kept_or_looked_for_where_it_is_switched_off(
    tmp_path: Path, tiny_bert_dir: str, counted: list[int]
) -> None:
    file = write(tmp_path / "a.csv")
    first = splits(file, tiny_bert_dir, cache=False)
    assert not cache.cache_dir().exists()
    splits(file, tiny_bert_dir)
    assert splits(file, tiny_bert_dir, cache=False) == first
    assert sum(counted) == 3 * len(ROWS)


def test_one_entry_a_split_is_left_and_nothing_beside(tmp_path: Path, tiny_bert_dir: str) -> None:
    file = write(tmp_path / "a.csv")
    for _ in range(2):
        splits(file, tiny_bert_dir)
    assert len(list(cache.cache_dir().iterdir())) == 3
    assert not list((tmp_path / "cache").rglob("cache-*.arrow"))


class Late(Classes):
    """While it encodes, another process does, and is done first."""

    others = 1

    def encode(self, *arguments: Any) -> Any:
        if Late.others:
            Late.others -= 1
            rows, *rest = arguments
            cache.encoded(rows, self, *rest)
        return super().encode(*arguments)


def test_of_two_processes_at_once_both_have_it_and_one_leaves_it(tmp_path: Path, tiny_bert_dir: str) -> None:
    file = write(tmp_path / "a.csv")
    assert splits(file, tiny_bert_dir, target=Late()) == splits(file, tiny_bert_dir, cache=False)
    assert Late.others == 0
    assert len(list(cache.cache_dir().iterdir())) == 3
