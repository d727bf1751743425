"""Text data from files, folders, the hub, or the package, with errors that name the file and the row."""

from __future__ import annotations

import codecs
import csv
import difflib
import glob
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from datasets import Dataset, DatasetDict, load_dataset
from datasets.fingerprint import Hasher
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
    path: str | Path | Mapping[str, str | Path],
    encoding: str = "utf-8",
    name: str | None = None,
    format: str | None = None,
) -> dict[str, Dataset]:
    """The splits at ``path``.

    Args:
        path: a file (CSV, TSV, JSONL, Parquet, CoNLL, TXT) as the single split ``train``; a folder of files named
            after their splits; a mapping of split to file; ``bundled:NAME`` for data that comes with the package;
            or a name on the Hugging Face hub. Of a TXT file each paragraph is a row, which blank lines end: its
            lines are the column ``text``.
        encoding: of CSV, TSV, JSONL, CoNLL and TXT files.
        name: of the configuration, where a data set on the hub has several.
        format: what files are whose ending doesn't say it: ``"conll"``, or another of the endings known.

    Raises:
        DataError: if a file is missing, empty or can't be parsed, or nothing is found.
    """
    if format is not None and f".{format}" not in _BUILDERS:
        known = ", ".join(ending[1:] for ending in _BUILDERS)
        raise DataError(f"'{format}' is no format of data; known are {known}.")
    files = locate(path, format)
    if files is None:
        return _read_hub(str(path), name)
    return {split: _read_file(file, encoding, format) for split, file in files.items()}


def locate(path: str | Path | Mapping[str, str | Path], format: str | None = None) -> dict[str, Path] | None:
    """The file of each split at ``path``; None for a name on the hub. See :func:`read`.

    Raises:
        DataError: if there is no train file in a folder, or two files are of one split.
    """
    if isinstance(path, Mapping):
        files: dict[str, Path] = {}
        for name, file in path.items():
            split = _split_name(name)
            if split in files:
                raise DataError(f"Two files are given for {split}: '{files[split]}' and '{file}'.")
            files[split] = Path(file)
        return files
    if str(path).startswith("bundled:"):
        return _files_in(_bundled(str(path).removeprefix("bundled:")))
    local = Path(path).expanduser()
    if local.is_dir():
        return _files_in(local, format)
    if local.is_file() or local.suffix.lower() in _BUILDERS or local.is_absolute() or str(path).startswith("."):
        return {"train": local}
    return None


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


_NUMBERS: ContextVar[tuple[int, int]] = ContextVar("_NUMBERS", default=(1, 1))


@contextmanager
def numbered_rows(first: int, step: int = 1) -> Iterator[None]:
    """In errors, number the rows that are checked from ``first`` on: they are a part of all."""
    token = _NUMBERS.set((first, step))
    try:
        yield
    finally:
        _NUMBERS.reset(token)


def row_number(i: int) -> int:
    """What people call the row with the index ``i`` of those that are checked."""
    first, step = _NUMBERS.get()
    return first + i * step


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


def _files_in(folder: Path, format: str | None = None) -> dict[str, Path]:
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
    return {split: found[split] for split in SPLITS if split in found}


class Parser(NamedTuple):
    """How ``datasets`` reads a file: its builder, and that one's options."""

    builder: str
    options: dict[str, Any]


def parser_of(file: Path, encoding: str, format: str | None = None) -> Parser:
    """How to read a file, of which the first rows are seen to be in order.

    Raises:
        DataError: if it is missing or empty, has an unknown ending, or its first row has more fields than columns.
    """
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
    # A path isn't a pattern, whatever brackets there are in it.
    options: dict[str, Any] = {"data_files": glob.escape(str(file.resolve())), "split": "train"}
    if builder != "parquet":
        options["encoding"] = encoding
    if builder == "csv":
        # "NA", "null" and "None" are words a text may consist of.
        options |= {"sep": "\t" if ending == ".tsv" else ",", "keep_default_na": False}
    return Parser(builder, options)


def _read_file(file: Path, encoding: str, format: str | None) -> Dataset:
    file = file.expanduser()
    builder, options = parser_of(file, encoding, format)
    digest = check_encoding(file, options.get("encoding"))
    if builder in READERS:
        rows = READERS[builder](file, encoding)
        return Dataset(rows.data, rows.info, rows.split, fingerprint=Hasher.hash([digest, builder]))
    if builder == "csv":
        check_width(file, encoding, options["sep"])
    # `datasets` tells a file that it has parsed by path and time: a folder for each content keeps it from taking
    # another's rows for those of a file that was replaced with its old time kept.
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "lightning_ft" / "parsed" / digest[:16]
    try:
        with quiet_bars(0):
            rows = load_dataset(builder, cache_dir=str(cache), **options)
    except Exception as error:  # `datasets` wraps every parser's own
        raise DataError(why_unreadable(file, error, encoding, builder)) from error
    if len(rows) == 0:
        raise DataError(f"'{file}' holds no rows.")
    same = [digest, builder, {key: value for key, value in options.items() if key != "data_files"}]
    return Dataset(rows.data, rows.info, rows.split, fingerprint=Hasher.hash(same))


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


READERS = {"conll": _read_conll, "text": _paragraphs}
"""Of the formats that `datasets` doesn't know as we do."""


def check_encoding(file: Path, encoding: str | None) -> str:
    """A digest of the content, which is decoded too if it's text, so that the line can be named where that fails.

    (``datasets`` would keep the bytes or name a field's.)

    Raises:
        DataError: if the content isn't in this encoding, or there is none of that name.
    """
    try:
        decoder = codecs.getincrementaldecoder(encoding)() if encoding else None
    except LookupError:
        raise DataError(
            f"'{encoding}' isn't an encoding that Python knows; common ones are utf-8, utf-16, latin-1, gb18030."
        ) from None
    line, digest = 1, hashlib.blake2b(digest_size=16)
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(2**20):
                digest.update(chunk)
                if decoder is not None:
                    decoder.decode(chunk)
                    line += chunk.count(b"\n")
        if decoder is not None:
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        line += error.object[: error.start].count(b"\n")
        raise DataError(
            f"'{file}' isn't {encoding}: {error.reason} in line {line}. Name its encoding, e.g. data.encoding=latin-1."
        ) from error
    return digest.hexdigest()


def check_width(file: Path, encoding: str, sep: str) -> None:
    """Raise DataError if the first row has more fields than there are columns: pandas would shift all rows by that."""
    with file.open(encoding=encoding, errors="replace", newline="") as stream:
        reader = csv.reader(stream, delimiter=sep)
        rows = filter(None, reader)
        header, first = next(rows, []), next(rows, [])
    if len(first) > len(header):
        raise DataError(
            f"'{file}': line {reader.line_num} has {len(first)} fields, and there are {len(header)} columns"
            f" ({', '.join(header)}). Put a field that has '{sep.replace(chr(9), 'a tab')}' in it in double quotes."
        )


def why_unreadable(file: Path, error: BaseException, encoding: str, builder: str) -> str:
    """What a parser's error means, with the line of the file."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    if "corresponds to no data" in reason:
        return f"'{file}' holds no rows."
    # The parsers count rows from 0.
    reason = re.sub(r"\brow (\d+)", lambda match: f"line {int(match[1]) + 1}", reason)
    if builder == "json":  # whose parser counts them in each 10 MiB anew
        reason = _json_fault(file, encoding) or reason
    return f"'{file}' can't be read as {builder.upper()}: {reason}"


def _json_fault(file: Path, encoding: str) -> str | None:
    """The first line that isn't JSON, where each line should be."""
    with file.open(encoding=encoding, errors="replace") as lines:
        for i, line in enumerate(lines, 1):
            if i == 1 and line.lstrip("\ufeff \t").startswith("["):
                return None  # one array
            try:
                json.loads(line.lstrip("\ufeff")) if line.strip() else None
            except ValueError as error:
                return f"line {i} isn't JSON: {error}"
    return None


def _read_hub(path: str, name: str | None) -> dict[str, Dataset]:
    loaded = load_from_hub(path, name)
    assert isinstance(loaded, DatasetDict)
    return {split: rows for split, rows in known_splits(loaded).items() if len(rows)}


def load_from_hub(path: str, name: str | None, **options: Any) -> Any:
    """``load_dataset``, with errors that say what else to do.

    Raises:
        DataError: if it isn't there or can't be reached, or has several configurations and none is named.
    """
    try:
        return load_dataset(path, name, **options)
    except Exception as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        if "Config name is missing" in said[0]:
            choices = re.findall(r"'([^']+)'", " ".join(said))
            raise DataError(
                f"'{path}' has several configurations: name one, data.name=... ({', '.join(dict.fromkeys(choices))})."
            ) from error
        raise DataError(
            f"'{path}' is no file or folder here, and can't be had from the Hugging Face hub: {said[0]}."
            f" For a file, give its path with its ending ({', '.join(_BUILDERS)}); for one of several configurations"
            " of a data set on the hub, data.name=..."
        ) from error


def known_splits(splits: Mapping[str, Any]) -> dict[str, Any]:
    """The splits that have a meaning here, under their names here."""
    return {name: rows for split, rows in splits.items() if (name := _ALIASES.get(split, split)) in SPLITS}


def check_column(rows: Dataset, kind: str, column: str, where: str) -> None:
    """Raise DataError unless the rows have the column, which the option ``data.KIND`` names."""
    if column not in rows.column_names:
        raise DataError(
            f"{where}: there is no column '{column}'; the columns are {', '.join(rows.column_names)}."
            f" Name the right one: data.{kind}=...{_did_you_mean(column, rows.column_names)}"
        )


def check_rows(where: str, kind: str, column: str, values: Iterable[Any], good: Callable[[Any], bool]) -> None:
    """Raise DataError if a value of the column isn't ``good``: isn't a ``kind``, as people call it."""
    bad = [(row_number(i), value) for i, value in enumerate(values) if not good(value)]
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
