"""The README's code runs and its commands compose, as they stand there."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import call, succeed

from lightning_ft import TextDataModule

README = Path(__file__).resolve().parents[1] / "README.md"


@dataclass(frozen=True)
class Block:
    """A fenced block of code, and the HTML comment right above it."""

    language: str
    code: str
    line: int
    """The number of its first line of code, counted from 1."""
    note: str = ""

    @property
    def reason_not_to_run(self) -> str | None:
        """Why it isn't run; None if it is."""
        if not self.note.startswith("not run"):
            return None
        reason = self.note.partition(":")[2].strip()
        assert reason, f"line {self.line}: 'not run' needs a reason: <!-- not run: reason -->"
        return reason

    def commands(self) -> Iterator[list[str]]:
        """The arguments of each line that calls ``lightning-ft``, without comments."""
        for line in self.code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["$"]:
                words = words[1:]
            if words[:1] == ["lightning-ft"]:
                yield words[1:]


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a Markdown text."""
    found, above = [], ""
    lines = iter(enumerate(text.splitlines(), start=1))
    for number, line in lines:
        fence = re.match(r"(\s*)(`{3,}|~{3,})\s*(\w*)", line)
        if fence:
            indent, ticks, language = fence.groups()
            inside = itertools.takewhile(lambda item, end=ticks: item[1].strip() != end, lines)
            code = "".join(f"{content.removeprefix(indent)}\n" for _, content in inside)
            comment = re.fullmatch(r"\s*<!--\s*(.*?)\s*-->\s*", above)
            found.append(Block(language, code, number + 1, comment[1] if comment else ""))
        if line.strip():
            above = line
    return found


def each_of(arguments: list[str]) -> list[list[str]]:
    """The command lines that a multirun stands for; otherwise the one that is given."""
    if not {"-m", "--multirun"} & set(arguments):
        return [arguments]
    single = [argument for argument in arguments if argument not in ("-m", "--multirun")]
    choices = []
    for argument in single:
        key, equals, value = argument.partition("=")
        swept = equals and value[:1] not in "['\""
        choices.append([f"{key}={one}" for one in value.split(",")] if swept else [argument])
    return [list(combination) for combination in itertools.product(*choices)]


BLOCKS = blocks(README.read_text(encoding="utf-8"))
PYTHON = [block for block in BLOCKS if block.language == "python" and block.note != "run"]
SHELL = [block for block in BLOCKS if block.language in ("bash", "sh", "shell", "console")]
CHAIN = [block for block in BLOCKS if block.note == "run"]
"""What needs what the commands before it have left."""
COMMANDS = {shlex.join(words): words for block in SHELL for words in block.commands()}


def at_line(block: Block) -> str:
    return f"line {block.line}"


@pytest.fixture
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is shown is how things are called, which the first words of each review do as well."""
    monkeypatch.setattr(TextDataModule, "token_limit", 12)


def execute(block: Block) -> None:
    source = "\n" * (block.line - 1) + block.code  # errors name the README's line
    exec(compile(source, str(README), "exec"), {"__name__": "readme"})


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.*`tensorboardX` has been removed.*",  # Lightning's default logger says so
    "ignore:.*in eval mode at the start of training.*",  # from_pretrained gives a model in eval mode
)
@pytest.mark.parametrize("block", PYTHON, ids=at_line)
def test_the_code_runs(block: Block, minilm_dir: str, short_texts: None) -> None:
    if block.reason_not_to_run:
        pytest.skip(block.reason_not_to_run)
    execute(block)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_composes(command: str) -> None:
    for arguments in each_of(COMMANDS[command]):
        asked = [] if {"--help", "--version", "--cfg"} & set(arguments) else ["--cfg", "job"]
        assert succeed(*arguments, *asked).strip()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's
def test_what_is_marked_so_runs_one_after_the_other(minilm_dir: str, short_texts: None) -> None:
    short = ["trainer.max_epochs=1", "+trainer.limit_train_batches=2", "trainer.enable_progress_bar=false"]
    short += ["test_before=false"]
    for block in CHAIN:
        if block.language == "python":
            execute(block)
        for app, *arguments in block.commands() if block in SHELL else ():
            succeed(app, *arguments, *(short if app == "train" else []))


@pytest.mark.parametrize("block", [block for block in SHELL if "make " in block.code], ids=at_line)
def test_each_target_of_make_is_there(block: Block) -> None:
    targets = re.findall(r"^([\w-]+):", (README.parent / "Makefile").read_text(), flags=re.MULTILINE)
    for line in block.code.splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            assert set(words[1:]) <= set(targets)


# ------------------------------------------------------------------------------------------ the reader

SAMPLE = """
Text with `inline` code.

```python
x = 1

assert x
```

<!-- not run: needs a cluster -->
```python
cluster()
```
<!-- run -->

```bash
lightning-ft train method=lora \\
    seed=1  # a comment
make demo
lightning-ft predict run=last text="Not a, 'bad' # word"
```
- in a list
  ~~~console
  $ lightning-ft train -m method=lora,head seed=0,1 samples=[a,b]
  ~~~
"""


def test_the_reader_finds_blocks_with_their_lines_and_notes() -> None:
    python, skipped, shell, console = blocks(SAMPLE)
    assert (python.language, python.code, python.line, python.note) == ("python", "x = 1\n\nassert x\n", 5, "")
    assert python.reason_not_to_run is None
    assert (skipped.line, skipped.reason_not_to_run) == (12, "needs a cluster")
    assert shell.note == "run"
    assert list(shell.commands()) == [
        ["train", "method=lora", "seed=1"],
        ["predict", "run=last", "text=Not a, 'bad' # word"],
    ]
    assert (console.language, console.note) == ("console", "")
    assert each_of(next(console.commands())) == [
        ["train", f"method={method}", f"seed={seed}", "samples=[a,b]"] for method in ("lora", "head") for seed in "01"
    ]


def test_a_block_is_not_left_out_without_a_reason() -> None:
    (block,) = blocks("<!-- not run -->\n```python\nx\n```\n")
    with pytest.raises(AssertionError, match="needs a reason"):
        _ = block.reason_not_to_run


def test_a_command_that_does_not_compose_is_found() -> None:
    assert call("train", "method=nothing", "--cfg", "job").status == 1


def test_the_readme_has_code_and_commands() -> None:
    assert PYTHON
    assert COMMANDS
    assert {block.language for block in CHAIN} == {"bash", "python"}
