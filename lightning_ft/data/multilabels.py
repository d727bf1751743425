"""Target of any number of labels a text."""

from __future__ import annotations

from collections import Counter
from typing import Any

from datasets import Dataset

from lightning_ft.data.sources import DataError, check_column, check_rows
from lightning_ft.data.targets import Columns, Facts, Target, check_labels, check_texts, named

_STRATUM = 8
"""Rows that a stratum needs: of ten, a fifth is taken for the test first, and an eighth of the rest for validation."""


class MultiLabels(Target):
    """Any number of labels a text, none too: a list, or a string. Its task is MultiLabelClassification.

    Args:
        separator: what stands between the labels of a string, as in ``"late;broken"``; spaces around labels don't
            count. None where each row has a list, and a string is a mistake.

    Raises:
        ValueError: for an empty separator.
    """

    label_kind = "classes"

    def __init__(self, separator: str | None = None) -> None:
        if separator == "":
            raise ValueError("separator must be what stands between labels, or None where rows have lists.")
        self.separator = separator

    def check(self, rows: Dataset, columns: Columns, where: str) -> None:
        """A text and labels in each row."""
        check_texts(rows, columns, where)
        check_column(rows, "label", columns.label, where)
        values = named(rows, columns.label)
        texts = [(i + 1, value) for i, value in enumerate(values) if isinstance(value, (str, int, float))]
        if self.separator is None and texts:
            row, text = texts[0]
            raise DataError(
                f"{where}: row {row} has {text!r} in column '{columns.label}', where a list of labels is expected. Name"
                " what stands between the labels of a string: 'data.target.separator=;'"
            )
        check_rows(where, "list of labels", columns.label, values, self._is_list)

    def facts(self, rows: Dataset, columns: Columns, where: str) -> dict[str, Any]:
        """``labels`` in alphabetical order, ``label_counts``, in how many rows each is, and ``row_count``."""
        counts = Counter(label for row in self._of(rows, columns) for label in row)
        if not counts:
            raise DataError(f"{where}: no row has a label in column '{columns.label}': nothing to learn.")
        labels = sorted(counts)
        return {"labels": labels, "label_counts": [counts[label] for label in labels], "row_count": len(rows)}

    def check_known(self, rows: Dataset, columns: Columns, facts: Facts, where: str) -> None:
        """No label but those of training."""
        check_labels(self._of(rows, columns), facts["labels"], where)

    def readings(self, rows: Dataset, columns: Columns) -> list[Any]:
        """The labels of each row in alphabetical order; none is a label too, None alone is not."""
        return [self._reading(value) for value in named(rows, columns.label)]

    def strata(self, rows: Dataset, columns: Columns) -> list[str]:
        """The rarest label of each row, by which a rare one gets into each split; or that there is none.

        What fewer rows than can be shared out would be apart by goes with the rest.
        """
        labels = self._of(rows, columns)
        counts = Counter(label for row in labels for label in row)
        rarest = [min(row, key=lambda label: (counts[label], label), default="no label") for row in labels]
        sizes = Counter(rarest)
        most = max(sizes, key=lambda word: (sizes[word], word))
        return [word if sizes[word] >= _STRATUM else most for word in rarest]

    def labels(self, rows: Dataset, columns: Columns, facts: Facts) -> list[list[float]]:
        """For each row a 1 for each label that it has and a 0 for each that it hasn't, in the order of the ids."""
        return [[float(label in row) for label in facts["labels"]] for row in map(set, self._of(rows, columns))]

    def describe(self, facts: Facts) -> str:
        """The labels."""
        return f"labels {', '.join(facts['labels'][:20])}"

    def _of(self, rows: Dataset, columns: Columns) -> list[list[str]]:
        """The labels of each row, each once."""
        return [list(dict.fromkeys(self._parts(value))) for value in named(rows, columns.label)]

    def _parts(self, value: Any) -> list[str]:
        if isinstance(value, list):
            return [str(label).strip() for label in value]
        return [part.strip() for part in str(value).split(self.separator) if part.strip()]

    def _reading(self, value: Any) -> tuple[str, ...] | None:
        if value is None or str(value) == "nan":
            return None
        if self.separator is None and not isinstance(value, list):  # refused in training: here it's a label as it is
            return (str(value).strip(),)
        present = [one for one in value if one is not None] if isinstance(value, list) else value
        return tuple(sorted(set(self._parts(present))))

    def _is_list(self, value: Any) -> bool:
        if isinstance(value, list):
            return all(isinstance(label, (str, int)) and str(label).strip() for label in value)
        return isinstance(value, (str, int, float))
