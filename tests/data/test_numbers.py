"""Numbers and Grades: what they refuse, and what they make of the rest."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from lightning_ft.data.module import TextDataModule
from lightning_ft.data.numbers import Grades, Numbers
from lightning_ft.data.sources import DataError, read
from lightning_ft.data.targets import Columns, Target, check

COLUMNS = Columns("text", "stars")


def rows_of(values: list[Any]) -> Dataset:
    return Dataset.from_dict({"text": [f"words {i}" for i in range(len(values))], "stars": values})


def written(file: Path, values: list[str]) -> str:
    lines = [f"words {i},{value}" for i, value in enumerate(values)]
    file.write_text("\n".join(["text,stars", *lines]) + "\n", encoding="utf-8")
    return str(file)


# ---------------------------------------------------------------------- numbers


@pytest.mark.parametrize("values", [[1, 2, 6], [1.5, -2.0, 1e6], ["1", " 2.5 ", "-3e2"], [1990, 1991, 2024]], ids=str)
def test_numbers_are_standardised_by_the_trainings_mean_and_deviation(values: list[Any]) -> None:
    facts = Numbers().facts(rows_of(values), COLUMNS, "source")
    numbers = list(map(float, values))
    assert facts == {
        "mean": pytest.approx(statistics.fmean(numbers)),
        "std": pytest.approx(statistics.pstdev(numbers)),
    }
    labels = Numbers().labels(rows_of([*values, type(values[0])(7)]), COLUMNS, facts)
    assert [facts["mean"] + facts["std"] * z for z in labels] == pytest.approx([*numbers, 7.0])
    assert sum(labels[:3]) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("bad", ["nan", "inf", "", "about 3", "3,5"])
def test_what_is_no_number_is_named_with_file_row_and_column(tmp_path: Path, bad: str) -> None:
    value = f'"{bad}"' if "," in bad else bad
    path = written(tmp_path / "grades.csv", ["1", "2.5", value, "4"])
    with pytest.raises(DataError, match=rf"grades\.csv, train: row 3 has .*{bad}.*no number.* in column 'stars'"):
        check(read(path), Numbers(), COLUMNS, path)


@pytest.mark.parametrize("bad", [None, True, float("nan"), float("-inf")])
def test_what_is_no_number_in_other_files_is_named_too(bad: Any) -> None:
    rows = rows_of([True, False]) if bad is True else rows_of([1.0, bad])
    with pytest.raises(DataError, match=r"row [12] has .*no number,? in column 'stars'"):
        check({"train": rows}, Numbers(), COLUMNS, "source")


@pytest.mark.parametrize(("target", "value"), [(Numbers(), 3.5), (Grades(), 3)])
def test_a_constant_is_nothing_to_learn(target: Target, value: float) -> None:
    with pytest.raises(
        DataError, match=rf"source: column 'stars' has only one (value|grade), {value}.*nothing to learn"
    ):
        check({"train": rows_of([value] * 5)}, target, COLUMNS, "source")


@pytest.mark.parametrize("target", [Numbers(), Grades()])
def test_a_missing_column_or_text_is_named(target: Target) -> None:
    with pytest.raises(DataError, match=r"no column 'star'.*Did you mean stars"):
        check({"train": rows_of([1, 2])}, target, Columns("text", "star"), "source")
    rows = Dataset.from_dict({"text": ["a", " "], "stars": [1, 2]})
    with pytest.raises(DataError, match="row 2 has no text"):
        check({"train": rows}, target, COLUMNS, "source")


def test_batches_have_standardised_numbers(tmp_path: Path, tiny_bert_dir: str) -> None:
    path = written(tmp_path / "numbers.csv", [str(i / 4) for i in range(40)])
    data = TextDataModule(path, tiny_bert_dir, label="stars", target=Numbers())
    facts = data.facts
    found = [z for batch in data.train_dataloader() for z in batch["labels"].tolist()]
    assert len(found) == 28
    assert statistics.fmean(found) == pytest.approx(0.0, abs=1e-6)
    everywhere = [*found, *(z for split in ("validation", "test") for z in data.splits[split]["labels"])]
    assert sorted(facts["mean"] + facts["std"] * z for z in everywhere) == pytest.approx(
        [i / 4 for i in range(40)], abs=1e-5
    )


# ---------------------------------------------------------------------- grades


@pytest.mark.parametrize("values", [[3, -1, 10, 3], [3.0, -1.0, 10.0, 3.0], ["3", "-1", "10.0", " 3"]], ids=str)
def test_grades_are_in_order_of_their_value_whatever_the_gaps(values: list[Any]) -> None:
    facts = Grades().facts(rows_of(values), COLUMNS, "source")
    assert facts == {"grades": [-1, 3, 10]}
    assert Grades().labels(rows_of(values), COLUMNS, facts) == [1, 0, 2, 1]
    assert Grades().strata(rows_of(values), COLUMNS) == ["3", "-1", "10", "3"]


@pytest.mark.parametrize("bad", ["2.5", "good", "nan", ""])
def test_what_is_no_grade_is_named_with_file_row_and_column(tmp_path: Path, bad: str) -> None:
    path = written(tmp_path / "grades.csv", ["1", bad, "2"])
    with pytest.raises(DataError, match=rf"grades\.csv, train: row 2 has .*{bad}.*no whole number.* in column 'stars'"):
        check(read(path), Grades(), COLUMNS, path)


def test_a_grade_that_training_never_saw_is_named() -> None:
    splits = {"train": rows_of([1, 2, 4]), "test": rows_of([1, 3])}
    with pytest.raises(DataError, match=r"source, test: the label '3' \(row 2.*training, whose labels are 1, 2, 4"):
        check(splits, Grades(), COLUMNS, "source")


def test_each_split_has_each_grade(tmp_path: Path, tiny_bert_dir: str) -> None:
    path = written(tmp_path / "grades.csv", [str((1, 2, 5)[i % 3]) for i in range(60)])
    data = TextDataModule(path, tiny_bert_dir, label="stars", target=Grades())
    assert data.facts == {"grades": [1, 2, 5]}
    assert all(set(split["labels"]) == {0, 1, 2} for split in data.splits.values())
