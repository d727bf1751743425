"""Targets that are numbers: any of them, or whole ones that are grades."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset

from lightning_ft.data.sources import DataError, check_column, check_rows
from lightning_ft.data.targets import Columns, Facts, Target, check_labels, check_texts


class Numbers(Target):
    """A number a text, or a string that is one. Its task is Regression."""

    label_kind = "number"

    def check(self, rows: Dataset, columns: Columns, where: str) -> None:
        """A text and a finite number in each row."""
        _check(rows, columns, where, "number", _is_number)

    def facts(self, rows: Dataset, columns: Columns, where: str) -> dict[str, Any]:
        """``mean``, and ``std``, the standard deviation of the rows (not an estimate of more than them)."""
        values = torch.tensor(list(map(float, rows[columns.label])), dtype=torch.float64)
        mean, std = float(values.mean()), float(values.std(correction=0))
        if values.min() == values.max() or not (math.isfinite(std) and std > 0):
            raise DataError(
                f"{where}: column '{columns.label}' has only one value, {values[0]:g}, in training: nothing to learn."
            )
        return {"mean": mean, "std": std}

    def labels(self, rows: Dataset, columns: Columns, facts: Facts) -> list[float]:
        """Each row's number, standardised by the training's mean and deviation."""
        return [(float(value) - facts["mean"]) / facts["std"] for value in rows[columns.label]]

    def describe(self, facts: Facts) -> str:
        """Mean and standard deviation."""
        return f"numbers of {facts['mean']:.3g} ± {facts['std']:.3g}"


class Grades(Target):
    """A grade a text: whole numbers, or strings that are ones, whose order counts. Its task is Ordinal."""

    def check(self, rows: Dataset, columns: Columns, where: str) -> None:
        """A text and a whole number in each row."""
        _check(rows, columns, where, "whole number", _is_whole)

    def facts(self, rows: Dataset, columns: Columns, where: str) -> dict[str, Any]:
        """``grades``: those that occur, in rising order."""
        grades = sorted(set(_grades(rows, columns)))
        if len(grades) < 2:
            raise DataError(f"{where}: column '{columns.label}' has only one grade, {grades[0]}: nothing to learn.")
        return {"grades": grades}

    def check_known(self, rows: Dataset, columns: Columns, facts: Facts, where: str) -> None:
        """No grade but those of training."""
        check_labels([[str(grade)] for grade in _grades(rows, columns)], list(map(str, facts["grades"])), where)

    def strata(self, rows: Dataset, columns: Columns) -> list[str]:
        """The grades."""
        return list(map(str, _grades(rows, columns)))

    def labels(self, rows: Dataset, columns: Columns, facts: Facts) -> list[int]:
        """The place of each row's grade among all, from 0."""
        places = {grade: i for i, grade in enumerate(facts["grades"])}
        return [places[grade] for grade in _grades(rows, columns)]

    def describe(self, facts: Facts) -> str:
        """The grades."""
        return f"grades {', '.join(map(str, facts['grades'][:20]))}"


def _check(rows: Dataset, columns: Columns, where: str, kind: str, good: Callable[[Any], bool]) -> None:
    check_texts(rows, columns, where)
    check_column(rows, "label", columns.label, where)
    check_rows(where, kind, columns.label, rows[columns.label], good)


def _grades(rows: Dataset, columns: Columns) -> list[int]:
    return [int(float(value)) for value in rows[columns.label]]


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return False
    try:
        return math.isfinite(float(value))
    except (ValueError, OverflowError):
        return False


def _is_whole(value: Any) -> bool:
    return _is_number(value) and float(value).is_integer()
