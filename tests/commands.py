"""The command line for tests: called in this process, or in a fresh one; and a small data set to give it."""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import logging
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from lightning_ft.apps.cli import main
from lightning_ft.apps.paths import conf_dir

LABELS = ("bad", "good", "mixed")


@dataclass(frozen=True)
class Answer:
    """What a command answered."""

    status: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The one message of an error, which ends what was said; there is no traceback."""
        assert self.status == 1, self
        assert "Traceback" not in self.err
        said, *messages = re.split(r"^lightning-ft \w+: ", self.err, flags=re.MULTILINE)
        assert len(messages) == 1, self.err
        assert "rror" not in said.replace("Error executing job with overrides:", ""), said
        return messages[0]


@dataclass(frozen=True)
class Made:
    """What a command that was run once for many tests answered, and wrote to ``runs/NAME`` below ``home``."""

    home: Path
    answer: Answer
    name: str

    @property
    def folder(self) -> Path:
        """What it wrote."""
        return self.home / "runs" / self.name

    @property
    def record(self) -> dict[str, Any]:
        """``NAME.json`` there."""
        return json.loads((self.folder / f"{self.name}.json").read_text(encoding="utf-8"))


def call(*arguments: object, cwd: Path | None = None) -> Answer:
    """Run ``lightning-ft ARGUMENTS`` in this process, and put back what it changes there."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ),
        _logging_kept(),
        _one_thread(),
        _inside(cwd or Path.cwd()),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as end:  # Hydra's, after help
            status = int(end.code or 0)
    return Answer(status, out.getvalue(), err.getvalue())


def succeed(*arguments: object, cwd: Path | None = None) -> str:
    """:func:`call` what must succeed; returns its output."""
    answer = call(*arguments, cwd=cwd)
    assert answer.status == 0, answer.err
    return answer.out


def python(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )


def choices(group: str) -> list[str]:
    """The choices of a group of the configuration."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def reviews(count: int, seed: int) -> list[tuple[str, str]]:
    """Texts in the words of the tiny BERT, with a label each; some are labelled wrongly."""
    generator = random.Random(seed)
    rows = []
    for i in range(count):
        label = LABELS[i % len(LABELS)]
        bad, good = generator.choice(["bad", "awful", "hate it"]), generator.choice(["good", "great", "love it"])
        said = {"bad": bad, "good": good, "mixed": f"{good} but {bad}"}[label]
        text = f"the {generator.choice(['battery', 'screen'])} is {'very ' * generator.randrange(4)}{said}"
        rows.append((text, generator.choice(LABELS) if generator.random() < 0.1 else label))
    return rows


def write_csv(path: Path, rows: Sequence[Sequence[object]], header: Sequence[str] = ("text", "label")) -> Path:
    """Write a table with its header."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def tiny_run(model: str, data: Path, *overrides: str) -> list[str]:
    """The arguments of a short, quiet run of ``train``; of two values for a key, the later one holds."""
    return [
        "train", "model=hub", f"model.name={model}", "data=file", f"data.path={data}", "data.batch_size=16",
        "test_before=false", "trainer.accelerator=cpu", "trainer.max_epochs=1", "trainer.log_every_n_steps=1",
        "trainer.enable_progress_bar=false", *overrides,
    ]  # fmt: skip


TEXTS = ["the screen is very very good but awful", "good", "hate it", "很好", "the battery is " + "very " * 90 + "bad"]
"""The last one is longer than the tiny BERT reads."""


@functools.cache
def predicted(run: Path) -> torch.Tensor:
    """What ``lightning-ft predict`` says of TEXTS: probabilities (texts, labels)."""
    with tempfile.TemporaryDirectory() as folder:
        texts, out = Path(folder) / "texts.txt", Path(folder) / "predictions.jsonl"
        texts.write_text("\n".join(TEXTS), encoding="utf-8")
        succeed("predict", f"run={run}", f"file={texts}", f"out={out}")
        lines = out.read_text(encoding="utf-8").splitlines()
    return torch.tensor([list(json.loads(line)["probabilities"].values()) for line in lines])


def probabilities(model: Any, folder: Path) -> torch.Tensor:
    """What a Hugging Face model says of TEXTS, cut and padded by the tokenizer in ``folder``."""
    from transformers import AutoTokenizer

    batch = AutoTokenizer.from_pretrained(folder)(TEXTS, truncation=True, padding=True, return_tensors="pt")
    model.eval()
    with torch.no_grad():
        return model(**batch).logits.softmax(-1)


@contextlib.contextmanager
def _logging_kept() -> Iterator[None]:
    """Hydra replaces the root's handlers, and the app sets levels and filters of Lightning's."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    names = ("lightning", "lightning.pytorch", "lightning.pytorch.utilities.rank_zero")
    others = [(logger, logger.level, logger.handlers[:], logger.filters[:]) for logger in map(logging.getLogger, names)]
    try:
        yield
    finally:
        for handler in root.handlers:
            if handler not in handlers:
                handler.close()
        root.handlers[:], root.level = handlers, level
        for logger, its_level, its_handlers, its_filters in others:
            logger.setLevel(its_level)
            logger.handlers[:], logger.filters[:] = its_handlers, its_filters


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Threads cost more than they help with models of this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
