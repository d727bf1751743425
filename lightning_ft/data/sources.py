"""Text data from files, folders, the hub, or the package, with errors that name the file and the row."""

from __future__ import annotations

import codecs
import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from lightning_ft.errors import UserError

SPLITS = ("train", "validation", "test")
_ALIASES = dict.fromkeys(("valid", "val", "dev", "devel", "eval"), "validation")
_BUILDERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".conll": "conll",
    ".txt": "text",
}
_BUNDLED = Path(__file__).parent / "bundled"


class DataError(UserError):
    """The data can't be used as it is; the message names the file, the row or column, and the cure."""


def read(
    path: str | Path | Mapping[str, str | Path], encoding: str = "utf-8", format: str | None = None
) -> dict[str, Dataset]:
    """The splits at ``path``.

    Args:
        path: a file (CSV, TSV, JSONL, Parquet, CoNLL, TXT) as the single split ``train``; a folder of files named
            after their splits; a mapping of split to file; ``bundled:NAME`` for data that comes with the package;
            or a name on the Hugging Face hub. Of a TXT file each paragraph is a row, which blank lines end: its
            lines are the column ``text``.
        encoding: of CSV, TSV, JSONL, CoNLL and TXT files.
        format: what files are whose ending doesn't say it: ``"conll"``, or another of the endings known.

    Raises:
        DataError: if a file is missing, empty or can't be parsed, or nothing is found.
    """
    if format is not None and f".{format}" not in _BUILDERS:
        known = ", ".join(ending[1:] for ending in _BUILDERS)
        raise DataError(f"'{format}' is no format of data; known are {known}.")
    if isinstance(path, Mapping):
        files: dict[str, Path] = {}
        for name, file in path.items():
            split = _split_name(name)
            if split in files:
                raise DataError(f"Two files are given for {split}: '{files[split]}' and '{file}'.")
            files[split] = Path(file)
        return {split: _read_file(file, encoding, format) for split, file in files.items()}
    if str(path).startswith("bundled:"):
        return _read_folder(_bundled(str(path).removeprefix("bundled:")), encoding)
    local = Path(path).expanduser()
    if local.is_dir():
        return _read_folder(local, encoding, format)
    if local.is_file() or local.suffix.lower() in _BUILDERS or local.is_absolute() or str(path).startswith("."):
        return {"train": _read_file(local, encoding, format)}
    return _read_hub(str(path))


def complete(
    splits: dict[str, Dataset],
    strata: Callable[[Dataset], list[str] | None],
    validation: float,
    test: float,
    seed: int,
    source: str,
) -> dict[str, Dataset]:
    """Carve the splits that aren't given out of ``train``, by the seed.

    Args:
        splits: those that are given, ``train`` among them.
        strata: gives a word for each row, its label; each word's rows are shared out alike.
        validation: share of the rows for validation.
        test: share of the rows for the test.
        seed: of the shuffling.
        source: where the rows are from, for the message.

    Raises:
        DataError: if the shares make no sense, or there are too few rows, of a label too, for them.
    """
    if not (0 < validation < 1 and 0 < test < 1 and validation + test < 1):
        raise DataError(f"validation={validation} and test={test} must be shares above 0 that add up to less than 1.")
    train, left = splits["train"], 1.0
    done = dict(splits)
    for name, share in (("test", test), ("validation", validation)):
        if name not in splits:
            train, done[name] = _split(train, strata(train), share / left, seed, source)
            left -= share
    return {"train": train, "validation": done["validation"], "test": done["test"]}


@contextmanager
def quiet_bars(rows: int) -> Iterator[None]:
    """Without the progress bars of ``datasets`` where there is too little to wait for."""
    shown = is_progress_bar_enabled()
    if rows < 20_000:
        disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            enable_progress_bar()


def _split_name(name: str) -> str:
    split = _ALIASES.get(name, name)
    if split not in SPLITS:
        raise DataError(f"'{name}' isn't a split; splits are {', '.join(SPLITS)}.")
    return split


def _bundled(name: str) -> Path:
    folder = _BUNDLED / name
    if not folder.is_dir():
        names = sorted(p.name for p in _BUNDLED.iterdir() if p.is_dir() and not p.name.startswith("_"))
        raise DataError(f"No data set '{name}' comes with the package; there are {', '.join(names)}.")
    return folder


def _read_folder(folder: Path, encoding: str, format: str | None = None) -> dict[str, Dataset]:
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        split = _ALIASES.get(file.stem, file.stem)
        if split in SPLITS and (format or file.suffix.lower() in _BUILDERS):
            if split in found:
                raise DataError(f"'{folder}' has two files for {split}: {found[split].name} and {file.name}.")
            found[split] = file
    if "train" not in found:
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:20]) or "nothing"
        raise DataError(
            f"'{folder}' holds no train file: expected train, validation and test with one of the endings"
            f" {', '.join(_BUILDERS)}; it holds {there}."
        )
    return {split: _read_file(found[split], encoding, format) for split in SPLITS if split in found}


def _read_file(file: Path, encoding: str, format: str | None) -> Dataset:
    file = file.expanduser()
    if not file.is_file():
        near = _did_you_mean(file.name, [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else [])
        raise DataError(f"There is no file '{file}'.{near}")
    ending = f".{format}" if format else file.suffix.lower()
    builder = _BUILDERS.get(ending)
    if builder is None:
        raise DataError(
            f"'{file}' has an ending that isn't known; known are {', '.join(_BUILDERS)}. Of another: data.format=..."
        )
    if file.stat().st_size == 0:
        raise DataError(f"'{file}' is empty.")
    options: dict[str, Any] = {}
    if builder != "parquet":
        _check_encoding(file, encoding)
        options["encoding"] = encoding
    if builder == "conll":
        return _read_conll(file, encoding)
    if builder == "text":
        return _paragraphs(file, encoding)
    if builder == "csv":
        # "NA", "null" and "None" are words a text may consist of.
        options |= {"sep": "\t" if ending == ".tsv" else ",", "keep_default_na": False}
    try:
        with quiet_bars(0):
            rows = load_dataset(builder, data_files=str(file), split="train", **options)
    except Exception as error:  # `datasets` wraps every parser's own
        raise DataError(_why_unreadable(file, builder, error)) from error
    if len(rows) == 0:
        raise DataError(f"'{file}' holds no rows.")
    return rows


def _read_conll(file: Path, encoding: str) -> Dataset:
    """The sentences of a CoNLL file: ``words``, the first fields of its lines, and ``tags``, the last ones.

    Fields are divided by tabs where the first line has one, else by spaces. Blank lines and ``-DOCSTART-`` end a
    sentence; a line that begins with ``#`` and doesn't have the fields of a word is a comment.
    """
    sentences: list[list[list[str]]] = [[]]
    first_lines: dict[str, int] = {}
    divider, width = " +", 0
    with file.open(encoding=encoding) as lines:
        for number, line in enumerate(lines, start=1):
            line = line.lstrip("\ufeff").rstrip("\n")
            if not line.strip() or line.startswith("-DOCSTART-"):
                sentences.append([])
                continue
            if not width and not line.startswith("#"):
                divider = "\t" if "\t" in line else divider
                width = max(2, len(re.split(divider, line.strip(" "))))
            fields = [field.strip() for field in re.split(divider, line.strip(" "))]
            if len(fields) != width and line.startswith("#"):
                continue
            if len(fields) != width or not fields[0] or not fields[-1]:
                raise DataError(
                    f"'{file}', line {number}: {line!r} isn't a word, a tag and what is between them, {width} fields"
                    f" divided by {'tabs' if divider != ' +' else 'spaces'}. Sentences are divided by blank lines."
                )
            sentences[-1].append(fields)
            first_lines.setdefault(fields[-1], number)
    stray = strays(first_lines)
    if stray:
        raise DataError(
            f"'{file}', line {first_lines[stray[0]]}: '{stray[0]}' isn't O, nor does it begin with B- or I- as other"
            " tags do. Correct it."
        )
    filled = [sentence for sentence in sentences if sentence]
    if not filled:
        raise DataError(f"'{file}' holds no rows.")
    return Dataset.from_dict({name: [[f[i] for f in s] for s in filled] for name, i in (("words", 0), ("tags", -1))})


PREFIXED = re.compile("([BIESLU])-(.+)")
"""A tag of an entity: its place there in BIO, BIOES or BILOU, and the type."""


def strays(tags: Iterable[str]) -> list[str]:
    """Those tags that are neither ``O`` nor of an entity, where others are; none where none is of an entity."""
    given = list(tags)
    others = [tag for tag in given if tag != "O" and not PREFIXED.fullmatch(tag)]
    return others if any(map(PREFIXED.fullmatch, given)) else []


def _paragraphs(file: Path, encoding: str) -> Dataset:
    parts = re.split(r"\n(?:[^\S\n]*\n)+", file.read_text(encoding=encoding))
    texts = [part.strip("\n") for part in parts if part.strip()]
    if not texts:
        raise DataError(f"'{file}' holds no rows.")
    return Dataset.from_dict({"text": texts})


def _check_encoding(file: Path, encoding: str) -> None:
    """Decode the file once, so that the line can be named; `datasets` would keep the bytes or name a field's."""
    try:
        decoder = codecs.getincrementaldecoder(encoding)()
    except LookupError:
        raise DataError(
            f"'{encoding}' isn't an encoding that Python knows; common ones are utf-8, utf-16, latin-1, gb18030."
        ) from None
    line = 1
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(2**20):
                decoder.decode(chunk)
                line += chunk.count(b"\n")
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        line += error.object[: error.start].count(b"\n")
        raise DataError(
            f"'{file}' isn't {encoding}: {error.reason} in line {line}. Name its encoding, e.g. data.encoding=latin-1."
        ) from error


def _why_unreadable(file: Path, builder: str, error: BaseException) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    reason = str(cause).strip().splitlines()[0]
    if "corresponds to no data" in reason:
        return f"'{file}' holds no rows."
    # The parsers count rows from 0.
    reason = re.sub(r"\brow (\d+)", lambda match: f"line {int(match[1]) + 1}", reason)
    return f"'{file}' can't be read as {builder.upper()}: {reason}"


def _read_hub(name: str) -> dict[str, Dataset]:
    try:
        loaded = load_dataset(name)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"'{name}' is no file or folder here, and can't be had from the Hugging Face hub: {reason}."
            f" For a file, give its path with its ending ({', '.join(_BUILDERS)})."
        ) from error
    assert isinstance(loaded, DatasetDict)
    return {_ALIASES.get(split, split): rows for split, rows in loaded.items() if _ALIASES.get(split, split) in SPLITS}


def check_column(rows: Dataset, kind: str, column: str, where: str) -> None:
    """Raise DataError unless the rows have the column, which the option ``data.KIND`` names."""
    if column not in rows.column_names:
        raise DataError(
            f"{where}: there is no column '{column}'; the columns are {', '.join(rows.column_names)}."
            f" Name the right one: data.{kind}=...{_did_you_mean(column, rows.column_names)}"
        )


def check_rows(where: str, kind: str, column: str, values: Iterable[Any], good: Callable[[Any], bool]) -> None:
    """Raise DataError if a value of the column isn't ``good``: isn't a ``kind``, as people call it."""
    bad = [(i + 1, value) for i, value in enumerate(values) if not good(value)]
    if bad:
        row, value = bad[0]
        rows = ", ".join(str(i) for i, _ in bad[:10]) + (", …" if len(bad) > 10 else "")
        what = f"no {kind}" if value is None or str(value).strip() == "" else f"{value!r}, which is no {kind},"
        raise DataError(
            f"{where}: row {row} has {what} in column '{column}' ({len(bad)} such rows: {rows}; counted from 1,"
            " a header not included). Fill or remove them."
        )


def _split(rows: Dataset, labels: list[str] | None, share: float, seed: int, source: str) -> tuple[Dataset, Dataset]:
    labels = labels or [""] * len(rows)
    rare, count = min(Counter(labels).items(), key=lambda item: item[1])
    of_which = (
        f"label '{rare}' has {count} of {len(rows)}. Each label needs a row in each split"
        if rare
        else (f"there are {len(rows)}")
    )
    too_few = DataError(
        f"{source}: too few rows to split by ratio: {of_which}. Add rows, or give the splits in files of their own."
    )
    from sklearn.model_selection import train_test_split

    try:
        kept, taken = train_test_split(range(len(rows)), test_size=share, random_state=seed, stratify=labels)
    except ValueError:
        raise too_few from None
    if {labels[i] for i in kept} != set(labels) or {labels[i] for i in taken} != set(labels):
        raise too_few
    return rows.select(sorted(kept)), rows.select(sorted(taken))


def _did_you_mean(wanted: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(near)}?" if near else ""
