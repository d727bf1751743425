"""Folders that commands write: whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from lightning_ft.apps.errors import RequestError
from lightning_ft.files.card import TAG
from lightning_ft.files.peft import CARD


@contextmanager
def new_folder(out: str, overwrite: bool | None, needed: Iterable[Path], option: str = "out") -> Iterator[Path]:
    """A folder to fill, which becomes ``out`` when the block is done; if the block fails, all is as it was.

    Args:
        out: where; the folders above it are made.
        overwrite: whether to replace what an earlier such command wrote there; None where that can't be asked for.
        needed: paths that must not be lost by that; those that don't exist play no part.
        option: what the user calls ``out``.

    Raises:
        RequestError: if ``out`` can't be written, or holds what isn't to be replaced.
    """
    target = Path(out).expanduser().resolve()
    check = partial(
        _check, f"{option}='{out}'", target, overwrite, [p.resolve() for p in (Path.cwd(), *needed) if p.exists()]
    )
    check()
    # Beside the target, since only within a file system is a folder renamed at once.
    with tempfile.TemporaryDirectory(prefix=".lightning_ft_", dir=_nearest(target)) as workspace:
        new, old = Path(workspace) / "new", Path(workspace) / "old"
        new.mkdir()
        yield new
        check()  # it took a while
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise


def _check(out: str, target: Path, overwrite: bool | None, needed: list[Path]) -> None:
    if target.exists() and not target.is_dir():
        raise RequestError(f"{out} is a file: name a folder.")
    above = _nearest(target)
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise RequestError(f"{out} can't be written: '{above}' isn't a folder that you may write to.")
    there = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
    if any(target in (path, *path.parents) for path in needed):
        raise RequestError(
            f"{out} is or holds the run, its base, the data, or where you are: name a folder of its own."
        )
    if not there:
        return
    if not overwrite:
        cure = "name another folder" + ("" if overwrite is None else ", or replace it: overwrite=true")
        raise RequestError(f"{out} exists and holds {_some(there)}: {cure}.")
    if not _is_ours(target):
        raise RequestError(
            f"{out} isn't replaced, for it holds more than lightning-ft writes ({_some(there)}): name another"
            " folder, or remove it yourself."
        )


def _nearest(target: Path) -> Path:
    """The first thing above ``target`` that exists."""
    return next(path for path in target.parents if path.exists())


def _is_ours(folder: Path) -> bool:
    """Whether nothing but a model or an adapter that a command wrote is in it: its card says so."""
    card = folder / CARD
    files = all(path.is_file() for path in folder.iterdir())
    return files and card.is_file() and f"- {TAG}\n" in card.read_text(encoding="utf-8", errors="replace")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
