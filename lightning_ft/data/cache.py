"""Tokenised data is kept on disk, and used again wherever the same would come out.

``datasets`` tells what it has done before by pickles of functions and by the times of files. Those of a tokenizer and
a closure differ from run to run, and files are replaced with their times kept. Here the content decides.
"""

from __future__ import annotations

import atexit
import functools
import inspect
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
from datasets import Dataset
from datasets.fingerprint import Hasher

from lightning_ft.data.sources import quiet_bars
from lightning_ft.data.targets import Target

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_ft.data.targets import Columns


def encoded(
    rows: Dataset,
    target: Target,
    columns: Columns,
    facts: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
    keep: bool = True,
) -> tuple[Dataset, bool]:
    """``target.encode(...)``, from disk where it was done before; and whether it was.

    Args:
        rows: a split, whose fingerprint says what is in it (:func:`lightning_ft.data.sources.read`).
        target: what encodes it.
        columns: those of the data.
        facts: those of the training.
        tokenizer: the model's.
        limit: in tokens.
        keep: whether to look for it, and to leave it for others. Otherwise it's on disk while this process lasts.
    """
    code = [_code(type(part)) for part in _targets(target)]
    keep = keep and None not in code
    # What must be the same for the same to come out.
    what = [rows._fingerprint, vars(target), code, columns, dict(facts), fingerprint(tokenizer), limit, _versions()]
    root = cache_dir() if keep else _scratch()
    place = root / Hasher.hash(what)
    if keep and place.is_dir():
        return Dataset.load_from_disk(place), True
    made = target.encode(rows, columns, facts, tokenizer, limit)
    root.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix="unfinished_", dir=root))
    with quiet_bars(len(made)):
        made.save_to_disk(unfinished)
    _forget(made, rows)
    if not keep:
        return Dataset.load_from_disk(unfinished), False
    try:
        unfinished.rename(place)  # at once: nobody sees half of it
    except OSError:  # another process was as quick
        shutil.rmtree(unfinished)
    return Dataset.load_from_disk(place), False


def cache_dir() -> Path:
    """Where tokenised data is kept: beside what ``datasets`` keeps (``HF_DATASETS_CACHE``). It may be deleted."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "lightning_ft" / "tokenised"


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Tells tokenizers that make other tokens apart, wherever they lie."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state: Any = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    if backend is not None:  # what the last call left behind
        state = {key: value for key, value in state.items() if key not in ("truncation", "padding")}
    settings = [getattr(tokenizer, name, None) for name in ("truncation_side", "padding_side", "chat_template")]
    name = None if backend is not None else tokenizer.name_or_path
    about = [type(tokenizer).__qualname__, name, settings, {k: str(v) for k, v in tokenizer.special_tokens_map.items()}]
    return Hasher.hash([json.dumps(state, sort_keys=True), about])


def _targets(value: Any) -> Iterator[Target]:
    """A target, and those that it's made of."""
    if isinstance(value, Target):
        yield value
        value = vars(value)
    if isinstance(value, (Mapping, list, tuple)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _targets(part)


def _code(kind: type) -> str | None:
    """Of what encodes: a fingerprint of the files that say how; None where they can't be read."""
    try:
        return Hasher.hash([inspect.getsource(sys.modules[c.__module__]) for c in kind.__mro__ if c is not object])
    except (OSError, TypeError):  # typed into an interpreter
        return None


@functools.cache
def _versions() -> list[str]:
    from lightning_ft import __version__

    return [__version__, *(version(library) for library in ("transformers", "tokenizers", "datasets"))]


@functools.cache
def _scratch() -> Path:
    folder = tempfile.mkdtemp(prefix="lightning_ft_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _forget(made: Dataset, rows: Dataset) -> None:
    """Remove what ``map`` wrote on the way, which nobody will find again."""
    files = {file["filename"] for file in made.cache_files} - {file["filename"] for file in rows.cache_files}
    for file in files:
        if os.path.basename(file).startswith("cache-"):
            os.unlink(file)
