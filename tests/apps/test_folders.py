"""A folder that a command writes is written whole or not at all, and nothing else is lost by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_ft.apps.errors import RequestError
from lightning_ft.apps.folders import new_folder
from lightning_ft.files.card import TAG


def tree(folder: Path) -> dict[str, str | None]:
    """All that is in a folder, hidden files too."""
    return {str(path.relative_to(folder)): path.read_text() if path.is_file() else None for path in folder.rglob("*")}


def write(out: object, content: str = "new", overwrite: bool = False, needed: list[Path] | None = None) -> None:
    with new_folder(str(out), overwrite, needed or []) as folder:
        (folder / "README.md").write_text(f"- {TAG}\n{content}")
        (folder / content).touch()


def write_half(out: Path) -> None:
    with new_folder(str(out), True, []) as folder:
        (folder / "half").touch()
        raise InterruptedError


def write_twice(out: Path) -> None:
    with new_folder(str(out), False, []) as folder:
        (folder / "mine").touch()
        write(out, "theirs")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder beside which the caller is; it holds what an earlier command wrote, and what none did."""
    folder, elsewhere = tmp_path / "place", tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    write(folder / "earlier", "old")
    (folder / "empty").mkdir()
    (folder / "file").write_text("a file")
    (folder / "project").mkdir()
    (folder / "project" / "thesis.txt").write_text("years of work")
    write(folder / "cloned", "old")
    (folder / "cloned" / ".git").mkdir()
    return folder


@pytest.mark.parametrize("out", ["fresh", "empty", "folders/above/it"])
def test_a_folder_becomes_what_was_written_into_it(out: str, place: Path) -> None:
    before = tree(place)
    write(place / out)
    assert tree(place / out) == {"README.md": f"- {TAG}\nnew", "new": ""}
    above = {str(path): None for path in Path(out).parents if str(path) != "."}
    own = {out: None, f"{out}/README.md": f"- {TAG}\nnew", f"{out}/new": ""}
    assert tree(place) == {**before, **above, **own}
    assert (place / out).stat().st_mode == (place / "project").stat().st_mode


def test_overwriting_replaces_the_whole_of_an_earlier_one(place: Path) -> None:
    write(place / "earlier", "new", overwrite=True)
    assert set(tree(place / "earlier")) == {"README.md", "new"}


@pytest.mark.parametrize("out", ["fresh", "earlier", "empty", "folders/above/it"])
def test_a_failure_leaves_everything_as_it_was(out: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(place)
    with pytest.raises(InterruptedError):
        write_half(place / out)
    assert tree(place) == before

    rename = Path.rename

    def fail(self: Path, target: Any) -> Any:
        if self.name == "new":
            raise OSError("no space")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no space"):
        write(place / out, overwrite=True)
    if out != "folders/above/it":  # the folders above it may stay, empty
        assert tree(place) == before


REFUSED: list[tuple[str, bool, str]] = [
    ("earlier", False, "exists and holds README.md, old: name another folder, or replace it: overwrite=true"),
    ("project", False, "exists and holds thesis.txt"),
    ("project", True, "holds more than lightning-ft writes (thesis.txt)"),
    ("cloned", True, "holds more than lightning-ft writes (.git, README.md, old)"),
    ("file", True, "is a file"),
    ("file/inside", True, "isn't a folder that you may write to"),
    (".", True, "is or holds the run, its base, the data, or where you are"),
    ("../elsewhere", True, "is or holds the run, its base, the data, or where you are"),
    ("needed", True, "is or holds the run, its base, the data, or where you are"),
]


@pytest.mark.parametrize(("out", "overwrite", "said"), REFUSED)
def test_what_must_not_be_lost_is_refused_before_anything_is_done(
    out: str, overwrite: bool, said: str, place: Path
) -> None:
    write(place / "needed", "adapter")
    before = tree(place)
    with pytest.raises(RequestError) as error, new_folder(str(place / out), overwrite, [place / "needed"]):
        pytest.fail("it went on")
    assert said in str(error.value)
    assert tree(place) == before


def test_what_appeared_meanwhile_is_not_lost(place: Path) -> None:
    with pytest.raises(RequestError, match="exists and holds"):
        write_twice(place / "fresh")
    assert set(tree(place / "fresh")) == {"README.md", "theirs"}
