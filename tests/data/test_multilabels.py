"""MultiLabels: lists and strings of labels, what is refused, and how rare labels are shared out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, List

from lightning_ft.data.module import TextDataModule
from lightning_ft.data.multilabels import MultiLabels
from lightning_ft.data.sources import DataError, complete
from lightning_ft.data.targets import Columns, check

COLUMNS = Columns("text", "labels")
LISTS = [["late", "broken"], [], ["rude"], ["late"]]
FACTS = {"labels": ["broken", "late", "rude"], "label_counts": [1, 2, 1], "row_count": 4}


def rows_of(values: list[Any]) -> Dataset:
    return Dataset.from_dict({"text": [f"words {i}" for i in range(len(values))], "labels": values})


@pytest.mark.parametrize(
    ("separator", "values"),
    [
        (None, LISTS),
        (None, [["late", "broken", " late"], [], ["rude"], ["late"]]),
        (";", ["late; broken", "", "rude;", " late ;late"]),
        (" | ", ["late | broken", "  ", "rude", "late"]),
    ],
    ids=["lists", "twice in a list", "strings", "words between"],
)
def test_lists_and_strings_say_the_same(separator: str | None, values: list[Any]) -> None:
    target, rows = MultiLabels(separator), rows_of(values)
    assert check({"train": rows}, target, COLUMNS, "source") == FACTS
    assert target.labels(rows, COLUMNS, FACTS) == [[1, 1, 0], [0, 0, 0], [0, 0, 1], [0, 1, 0]]


def test_labels_of_the_hub_are_known_by_their_names() -> None:
    names = ["rude", "late", "broken"]
    rows = rows_of([[1, 2], [], [0], [1]]).cast_column("labels", List(ClassLabel(names=names)))
    assert check({"train": rows}, MultiLabels(), COLUMNS, "source") == FACTS
    assert MultiLabels().labels(rows, COLUMNS, FACTS) == [[1, 1, 0], [0, 0, 0], [0, 0, 1], [0, 1, 0]]
    with pytest.raises(DataError, match="row 1 has"):  # -1 is the hub's "no label"
        check(
            {"train": rows_of([[-1]]).cast_column("labels", rows.features["labels"])}, MultiLabels(), COLUMNS, "source"
        )


def test_numbers_are_labels_too() -> None:
    rows = rows_of([[3, 10], [3], []])
    assert check({"train": rows}, MultiLabels(), COLUMNS, "source")["labels"] == ["10", "3"]
    assert check({"train": rows_of([3, 10])}, MultiLabels(";"), COLUMNS, "source")["labels"] == ["10", "3"]


@pytest.mark.parametrize(
    ("separator", "values", "message"),
    [
        (None, ["late;broken", "rude"], r"row 1 has 'late;broken' in column 'labels'.*data\.target\.separator"),
        (None, [["late"], None], "row 2 has no list of labels in column 'labels'"),
        (";", ["late", None], "row 2 has no list of labels"),
        (None, [["late"], [" "]], "row 2 has .*no list of labels"),
        (None, [["late"], ["rude", None]], "row 2 has .*no list of labels"),
        (None, [[], []], "no row has a label in column 'labels': nothing to learn"),
    ],
)
def test_what_is_no_list_is_named(separator: str | None, values: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check({"train": rows_of(values)}, MultiLabels(separator), COLUMNS, "source")


def test_a_label_that_training_never_saw_is_named() -> None:
    splits = {"train": rows_of(LISTS), "test": rows_of([[], ["late", "odd"]])}
    with pytest.raises(DataError, match=r"source, test: the label 'odd' \(row 2"):
        check(splits, MultiLabels(), COLUMNS, "source")


def test_an_empty_separator_is_refused() -> None:
    with pytest.raises(ValueError, match="separator"):
        MultiLabels("")


def test_each_split_has_each_label_that_is_not_very_rare() -> None:
    often = [["late"], ["late", "broken"], [], []] * 40
    rows = rows_of([*often, *[["rude", "late"]] * 10, *[["broken", "odd"]] * 12])
    splits = complete({"train": rows}, lambda split: MultiLabels().strata(split, COLUMNS), 0.1, 0.2, 0, "source")
    assert sum(map(len, splits.values())) == len(rows)
    for split in splits.values():
        assert {label for row in split["labels"] for label in row} == {"late", "broken", "rude", "odd"}


def test_a_label_too_rare_to_share_out_goes_with_the_rest() -> None:
    rows = rows_of([*[["late"], []] * 20, ["odd", "late"]])
    assert Counter(MultiLabels().strata(rows, COLUMNS)) in ({"late": 21, "no label": 20}, {"late": 20, "no label": 21})


def test_where_training_gets_none_of_a_rare_label_it_is_said(tmp_path: Path, tiny_bert_dir: str) -> None:
    lines = [f"words {i},{'late' if i % 2 else 'rude'}" for i in range(60)]
    lines[7] = "words 7,odd"
    (tmp_path / "data.csv").write_text("\n".join(["text,labels", *lines]), encoding="utf-8")
    said = set()
    for seed in range(12):
        data = TextDataModule(tmp_path / "data.csv", tiny_bert_dir, label="labels", target=MultiLabels(";"), seed=seed)
        try:
            assert "odd" in data.labels
        except DataError as error:
            said.add(str(error))
            assert "as it was split: the label 'odd'" in str(error)  # noqa: PT017 - refusing is as good
    assert said


def test_batches_have_a_yes_or_no_for_each_label(tmp_path: Path, tiny_bert_dir: str) -> None:
    for split in ("train", "validation", "test"):
        rows_of(LISTS).to_json(tmp_path / f"{split}.jsonl")
    data = TextDataModule(tmp_path, tiny_bert_dir, label="labels", target=MultiLabels())
    assert data.facts == FACTS
    (batch,) = data.test_dataloader()
    assert batch["labels"].is_floating_point()
    assert sorted(batch["labels"].tolist()) == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 1, 0]]
