"""What the command line shows: tables, by rich."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

console = Console(highlight=False)


def scores_table(results: Mapping[str, Any]) -> Table:
    """The result of a run: scores before and after, and what they cost."""
    table = Table(title=escape(f"{results['method']} on {results['data']}"), title_justify="left")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right", style="bold")
    for name, label in (("accuracy", "test accuracy"), ("f1", "test macro F1")):
        before = results["before"].get(f"test/{name}")
        table.add_row(label, _percent(before), _percent(results["after"][f"test/{name}"]))
    table.add_section()
    share = results["trained"] / results["parameters"]
    table.add_row("parameters trained", "", f"{results['trained']:,} of {results['parameters']:,} ({share:.2%})")
    table.add_row("training time", "", f"{results['seconds']:.0f} s")
    table.add_row("peak memory", "", f"{results['peak_memory_mib']:,.0f} MiB")
    table.add_row("saved adapter", "", _size(results["adapter_bytes"]))
    return table


def predictions_table(texts: Sequence[str], predictions: Sequence[Mapping[str, Any]]) -> Table:
    """A text, its label and the label's probability in each row."""
    table = Table(title="Predictions", title_justify="left")
    table.add_column("text", overflow="fold")
    table.add_column("label", style="bold")
    table.add_column("probability", justify="right")
    for text, prediction in zip(texts, predictions, strict=True):
        table.add_row(Text(text), Text(prediction["label"]), f"{prediction['probability']:.2f}")
    return table


def per_class_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """Precision, recall and F1 of each label."""
    table = Table(title="Per class", title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == "label" else "right")
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else Text(str(value)) for value in row))
    return table


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _size(count: int) -> str:
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"
