"""A check: planted faults are told with their rows, the data stay as they are, and a cleaned copy is clean."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from commands import Made, call, succeed, tiny_run, write_csv

from lightning_ft.apps import check
from lightning_ft.apps.errors import RequestError
from lightning_ft.data.quality.findings import KINDS, SEVERITIES
from lightning_ft.data.sources import read

WORDS = "screen battery case box lens film engine door shop clock lamp chair bread water road river stone".split()


def texts(rows: int, start: int = 0) -> list[tuple[str, str]]:
    """Different texts in the words that the tiny BERT has, or spells; the last words are a number in base 17."""

    def spelt(i: int) -> str:
        return " ".join(WORDS[(i * 37 + 11 * k + i // 17**k) % 17] for k in range(9))

    return [(f"{('bad', 'good')[i % 2]} {spelt(start + i)}", ("bad", "good")[i % 2]) for i in range(rows)]


class Checked(Made):
    """A check of planted data that was made once for all tests here."""

    @property
    def found(self) -> set[tuple[str, str, tuple[int, ...]]]:
        return {(f["kind"], f["split"], tuple(f["rows"])) for f in self.record["findings"]}


def asking(model: str, data: Path, *overrides: str) -> list[str]:
    return ["check", *tiny_run(model, data, *overrides)[1:]]


def data_folder(home: Path, planted: bool) -> Path:
    train, test = texts(60), texts(24, start=1000)
    if planted:
        train[4] = train[2]  # a duplicate
        train[7] = test[3]  # a leak
        train[10] = (train[11][0], train[10][1])  # a contradiction
        train[20] = ("", "good")
        train[30] = ("write to <b>anna@example.com</b> about the bread", "good")
        test[5] = ("call 555-234-5678 & ask for the door", "good")
    home.mkdir(parents=True)
    write_csv(home / "train.csv", train)
    write_csv(home / "test.csv", test)
    return home


PLANTED = {
    ("duplicate", "train", (5, 12)), ("leak", "train", (8,)), ("contradiction", "train", (11, 12)),
    ("empty", "train", (21,)), ("personal_data", "train", (31,)), ("personal_data", "test", (6,)),
}  # fmt: skip


@pytest.fixture(scope="module")
def checked(tiny_bert_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Checked:
    home = tmp_path_factory.mktemp("home")
    data = data_folder(home / "my, data", planted=True)
    answer = call(
        *asking(tiny_bert_dir, data, "check.fix=it's, clean", "check.fail_on=leak,empty", "hydra.run.dir=runs/check"),
        cwd=home,
    )
    return Checked(home, answer, "check")


def test_what_was_planted_is_found_with_its_rows(checked: Checked) -> None:
    assert checked.found >= PLANTED
    assert {kind for kind, *_ in checked.found - PLANTED} <= {"suspicious_label"}


def test_the_terminal_shows_every_finding(checked: Checked) -> None:
    out = " ".join(checked.answer.out.split())
    for finding in checked.record["findings"]:
        assert finding["kind"].replace("_", " ") in out
    assert "train 60, test 24" in out
    assert "runs/check" in out


def test_it_fails_on_what_it_was_told_to_and_only_after_all_is_written(checked: Checked) -> None:
    assert checked.answer.message.startswith("the data have what check.fail_on names: empty in train, leak in train.")
    assert "21" in checked.answer.message
    assert (checked.folder / "check.html").exists()
    assert (checked.home / "it's, clean" / "train.jsonl").exists()


class Page(HTMLParser):
    """Knows which elements are open, and what a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.fetched += [value for key, value in attrs if key in ("src", "href", "xlink:href") and value[:1] != "#"]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_holds_all_and_needs_nothing_else(checked: Checked) -> None:
    page = Page()
    page.feed((checked.folder / "check.html").read_text(encoding="utf-8"))
    assert (page.open, page.fetched) == ([], [])
    for finding in checked.record["findings"]:
        assert all(example in page.text for example in (finding["message"], *finding["examples"]))
    assert all(words in page.text for words in ("Length of the texts", "Share of each label", "embeddings give"))
    assert "<b>[EMAIL]</b>" in page.text, "what looks like HTML is text"


def test_personal_data_are_in_none_of_what_is_written(checked: Checked) -> None:
    written = [file for folder in (checked.folder, checked.home / "it's, clean") for file in folder.rglob("*.*")]
    assert len(written) >= 5
    for text in (checked.answer.out, *(file.read_text(encoding="utf-8") for file in written)):
        assert "anna@" not in text
        assert "555-234" not in text


def test_the_copy_is_clean_and_the_data_as_they_were(checked: Checked, tiny_bert_dir: str, tmp_path: Path) -> None:
    again = data_folder(tmp_path / "again", planted=True)
    for name in ("train.csv", "test.csv"):
        assert (checked.home / "my, data" / name).read_bytes() == (again / name).read_bytes()
    copy = checked.home / "it's, clean"
    removed = json.loads((copy / "changes.json").read_text())["train"]["rows_removed"]
    assert removed == {"duplicate": [5], "leak": [8], "contradiction": [11, 12], "empty": [21]}
    rows = read(copy)
    assert (len(rows["train"]), len(rows["test"])) == (55, 24)
    assert rows["test"]["text"][5] == "call [PHONE] & ask for the door"
    succeed(*asking(tiny_bert_dir, copy, "check.fail_on=[error,warning]", "check.labels=false"), cwd=tmp_path)


def test_clean_data_pass(tiny_bert_dir: str, tmp_path: Path) -> None:
    data = data_folder(tmp_path / "clean", planted=False)
    out = succeed(*asking(tiny_bert_dir, data, "check.fail_on=[error,warning,note]", "check.labels=false"))
    assert "Nothing was found." in out
    (folder,) = Path("runs").iterdir()
    assert re.fullmatch(r"check_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d-\d{6}", folder.name)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("check.fail_on=leek", "check.fail_on names 'leek'"),
        ("check.fail_on=[leak,worning]", "Did you mean 'warning'?"),
        ("check.fix=data", "check.fix='data' is or holds"),
        ("check.fix=full", "check.fix='full' exists and holds x.txt: name another folder."),
        ("data.text=body", "no column 'body'"),
        ("check.lables=false", "Did you mean 'labels'?"),
    ],
)
def test_what_makes_no_sense_is_said(override: str, said: str, tiny_bert_dir: str, tmp_path: Path) -> None:
    data = data_folder(tmp_path / "data", planted=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x.txt").write_text("mine")
    assert said in call(*asking(tiny_bert_dir, data, "check.labels=false", override)).message


def test_every_kind_and_severity_may_be_named_to_fail_on() -> None:
    from omegaconf import OmegaConf

    for word in (*KINDS, *SEVERITIES):
        assert check.fail_on(OmegaConf.create({"check": {"fail_on": word}})) == {word}
    with pytest.raises(RequestError, match="it may name"):
        check.fail_on(OmegaConf.create({"check": {"fail_on": ["x"]}}))


# ---------------------------------------------------------------------------------------- before training


def test_train_says_in_a_line_that_nothing_was_found_or_what_was(tiny_bert_dir: str, tmp_path: Path) -> None:
    clean, planted = (data_folder(tmp_path / str(planted), planted) for planted in (False, True))
    quick = ["+trainer.limit_train_batches=1"]
    answer = call(*tiny_run(tiny_bert_dir, clean, *quick))
    assert answer.status == 0, answer.err
    assert [line for line in answer.err.splitlines() if "Data check" in line] == ["Data check: nothing to complain of."]
    answer = call(*tiny_run(tiny_bert_dir, planted, "check.fail_on=leak"))
    assert "Data check, leak in train: 1 text that test has too" in answer.err
    assert "check.fail_on names: leak in train." in answer.err
    assert answer.status == 1


def test_train_can_do_without(tiny_bert_dir: str, tmp_path: Path) -> None:
    data = data_folder(tmp_path / "data", planted=True)
    answer = call(*tiny_run(tiny_bert_dir, data, "check.before_training=false", "check.fail_on=leak"))
    assert "Data check" not in answer.err
    assert "row 21 has no text" in answer.message
