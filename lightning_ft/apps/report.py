"""What the command line shows: tables and progress, by rich."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import progress
from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from lightning_ft.tasks.task import score_of

if TYPE_CHECKING:
    from lightning_ft.data.quality.findings import Finding

console = Console(highlight=False)

_CODES, _BAR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]"), re.compile(r"\|[^|]*\|")
_STYLES = {"error": "bold red", "warning": "bold yellow", "note": "bold"}
_QUIET_FOR = 30.0  # seconds, where nothing can be drawn over


def scores_table(results: Mapping[str, Any]) -> Table:
    """The result of a run: scores before and after, and what they cost."""
    table = Table(title=escape(f"{results['method']} on {results['data']}"), title_justify="left")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right", style="bold")
    for key, value in results["after"].items():
        if key == "test/loss":  # the scores say more
            continue
        before = results["before"].get(key)
        read = score_of(key).text
        table.add_row(f"test {score_name(key)}", "" if before is None else read(before), read(value))
    table.add_section()
    share = results["trained"] / results["parameters"]
    table.add_row("parameters trained", "", f"{results['trained']:,} of {results['parameters']:,} ({share:.2%})")
    table.add_row("training time", "", f"{results['seconds']:.0f} s")
    table.add_row("peak memory", "", f"{results['peak_memory_mib']:,.0f} MiB")
    table.add_row("saved adapter", "", _size(results["adapter_bytes"]))
    if results["latency"]:
        ms, ratio = results["latency"]["ms"], results["latency"]["ratio"]
        table.add_row("inference", "", f"{ms:.2f} ms a text ({ratio:.2f} × the bare model's)")
    return table


_PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "activations": "activations",
    "loss": "loss (in place of logits)",
    "working": "results on their way",
}


def estimate_table(found: Mapping[str, Any]) -> Table:
    """What a training would take."""
    packed = f" over {found['quantize']}" if found["quantize"] else ""
    title = f"{found['method']}{packed}, {found['precision']}, {found['batch_size']} x {found['tokens']:,} tokens"
    table = Table(title=escape(f"{title}, on {found['device']}"), title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    share = found["trained"] / found["parameters"]
    table.add_row("parameters trained", f"{found['trained']:,} of {found['parameters']:,} ({share:.2%})")
    table.add_row("saved adapter", _size(found["adapter_bytes"]))
    table.add_section()
    for part, name in _PARTS.items():
        table.add_row(name, _size(found["memory"][part]))
    table.add_row("peak memory, the sum", _size(found["peak"]), style="bold")
    if found["limit"] is not None:
        table.add_row(f"largest batch in {_size(found['limit'])}", f"{found['largest_batch']:,} x {found['tokens']:,}")
    table.add_section()
    if found["untimed"] is None:
        table.add_row("a step", f"{found['seconds_per_step']:.3g} s")
        table.add_row("an epoch", f"{found['seconds_per_epoch']:,.0f} s")
    else:
        table.add_row("time", f"not measured: {found['untimed']}")
    return table


def plain(line: str) -> str:
    """A line without a terminal's codes."""
    return _CODES.sub("", line)


class Watch:
    """Shows, while processes run one after another, which one it is and the last that it said.

    On a terminal that is a line at the bottom; elsewhere a line is added now and then.

    Args:
        total: the number of processes.
    """

    def __init__(self, total: int) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.fields[name]}", markup=False),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[said]}", markup=False, table_column=Column(no_wrap=True, ratio=1)),
            console=console,
            transient=True,
            expand=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=total, name="", said="")
        self._total, self._ended, self._name, self._heard = total, 0, "", 0.0

    def __enter__(self) -> Watch:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def begin(self, name: str) -> None:
        """The next one starts."""
        self._name = name
        self._progress.update(self._task, name=name, said="")
        if not console.is_terminal:
            self._print(f"{name} ({self._ended + 1} of {self._total}) …")

    def say(self, line: str) -> None:
        """It said a line, or the state of its progress bar."""
        said = " ".join(_BAR.sub(" ", plain(line)).split())
        if not said:
            return
        self._progress.update(self._task, said=said)
        if not console.is_terminal and time.monotonic() - self._heard > _QUIET_FOR:
            self._print(f"{self._name}: {said}")

    def end(self, line: str) -> None:
        """It has ended; ``line`` says how."""
        self._ended += 1
        self._progress.advance(self._task)
        self._print(line)

    def _print(self, line: str) -> None:
        self._heard = time.monotonic()
        self._progress.console.print(line, markup=False, soft_wrap=True)


def score_name(key: str) -> str:
    """What people call the score with this key; of one task of several, with the task's name."""
    _, *task, _ = key.split("/")
    return " ".join([*task, score_of(key).name])


def predictions_table(texts: Sequence[str], predictions: Sequence[Mapping[str, Any]]) -> Table:
    """In each row a text and what was made of it, but for mappings, which are for files."""
    table = Table(title="Predictions", title_justify="left")
    table.add_column("text", overflow="fold")
    columns = [key for key, value in predictions[0].items() if not isinstance(value, Mapping)]
    for i, column in enumerate(columns):
        number = isinstance(predictions[0][column], float)
        table.add_column(column, style="" if i else "bold", justify="right" if number else "left", overflow="fold")
    for text, prediction in zip(texts, predictions, strict=True):
        table.add_row(Text(text), *(_cell(prediction[column]) for column in columns))
    return table


def task_table(name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """A table of a task's."""
    table = Table(title=name.replace("_", " ").capitalize(), title_justify="left")
    for i, column in enumerate(columns):
        text = bool(rows) and isinstance(rows[0][i], str)
        table.add_column(column, justify="left" if text else "right", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value, ".3f") for value in row))
    return table


def findings_table(findings: Sequence[Finding], rows: Mapping[str, int], data: str) -> Table:
    """What a check found, the worst first."""
    sizes = ", ".join(f"{split} {count:,}" for split, count in rows.items())
    title = f"Check of {data}: {sizes} rows"
    # As wide as its title, which would be broken over the words "Nothing was found."
    table = Table(title=escape(title), title_justify="left", show_lines=True, min_width=len(title))
    table.add_column("")
    table.add_column("split")
    table.add_column("what", overflow="fold")
    for finding in findings:
        said = Text(finding.message)
        for example in finding.examples[:3]:
            said.append(f"\n  {example}", style="dim")
        kind = Text(finding.kind.replace("_", " "), style=_STYLES[finding.severity])
        table.add_row(Text.assemble(kind, f"\n{finding.severity}"), Text(finding.split), said)
    if not findings:
        table.add_row("", "", "Nothing was found.")
    return table


def track(what: str, items: Sequence[Any]) -> Iterable[Any]:
    """Go through items, showing how far it is on a terminal; a few that are soon done aren't worth it."""
    yield from progress.track(items, what, console=console, transient=True, disable=not console.is_terminal)


def _cell(value: Any, form: str = ".2f") -> Text:
    if isinstance(value, float):
        return Text(format(value, form))
    if value is None:
        return Text("")
    return Text(", ".join(map(_said, value)) if isinstance(value, (list, tuple)) else str(value))


def _said(item: Any) -> str:
    """Of a mapping its words: ``Berlin (LOC)`` of ``{"text": "Berlin", "type": "LOC", "start": 7, …}``."""
    if not isinstance(item, Mapping):
        return str(item)
    first, *more = [value for value in item.values() if isinstance(value, str)]
    return f"{first} ({', '.join(more)})" if more else first


def _size(count: int) -> str:
    if count >= 2**30:
        return f"{count / 2**30:.2f} GiB"
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"
