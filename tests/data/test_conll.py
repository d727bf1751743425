"""CoNLL files: what is read, and errors that name the file and the line."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_ft.data.sources import DataError, read

ROWS = [{"words": ["New", "York", "#1"], "tags": ["B-LOC", "I-LOC", "O"]}, {"words": ["#", "so"], "tags": ["O", "O"]}]

FILES = {
    "tabs": "New\tB-LOC\nYork\tI-LOC\n#1\tO\n\n#\tO\nso\tO\n",
    "spaces": "New B-LOC\nYork  I-LOC\n#1 O\n\n\n# O\nso O",
    "four columns": "-DOCSTART- -X- O O\n\nNew NNP I-NP B-LOC\nYork NNP I-NP I-LOC\n#1 X O O\n\n# X O O\nso X O O\n",
    "comments": "# id = 1\nNew\tB-LOC\nYork\tI-LOC\n#1\tO\n\n# text = # so\n#\tO\nso\tO\n\n",
    "a tab between sentences": "New\tB-LOC\nYork\tI-LOC\n#1\tO\n\t\n#\tO\nso\tO\n",
    "another system's lines": "New\tB-LOC\r\nYork\tI-LOC\r\n#1\tO\r\n\r\n#\tO\r\nso\tO\r\n",
    "a byte order mark": "\ufeffNew\tB-LOC\nYork\tI-LOC\n#1\tO\n\n#\tO\nso\tO\n",
    "no blank line before a document": "New X B-LOC\nYork X I-LOC\n#1 X O\n-DOCSTART- X O\n# X O\nso X O\n",
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_words_and_tags_are_read(tmp_path: Path, content: str) -> None:
    file = tmp_path / "x.conll"
    file.write_bytes(content.encode())
    assert read(file)["train"].to_list() == ROWS


def test_words_may_have_spaces_and_odd_characters_where_tabs_divide(tmp_path: Path) -> None:
    (tmp_path / "x.conll").write_text("New York\tB-LOC\na\u2028b\xa0c\tO\n", encoding="utf-8", newline="")
    assert read(tmp_path / "x.conll")["train"]["words"] == [["New York", "a\u2028b\xa0c"]]


def test_a_format_is_for_files_and_folders_whose_ending_does_not_say_it(tmp_path: Path) -> None:
    for name in ("train.tsv", "devel.tsv", "test.annotated"):
        (tmp_path / name).write_text(FILES["tabs"])
    splits = read(tmp_path, format="conll")
    assert {split: rows.to_list() for split, rows in splits.items()} == dict.fromkeys(
        ("train", "validation", "test"), ROWS
    )
    assert read(tmp_path / "test.annotated", format="conll")["train"].to_list() == ROWS
    with pytest.raises(DataError, match=r"test\.annotated.*ending.*data\.format"):
        read(tmp_path / "test.annotated")
    with pytest.raises(DataError, match=r"'xml' is no format.*conll"):
        read(tmp_path, format="xml")


def test_plain_tags_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.conll").write_text("a DET\ndog NOUN\n")
    assert read(tmp_path / "x.conll")["train"]["tags"] == [["DET", "NOUN"]]


REFUSED = {
    "a missing tag": (b"New\tB-LOC\nYork\n", "line 2.*'York'.*2 fields divided by tabs"),
    "a field too many": (b"a B-LOC\n\nb c O\n", "line 3.*'b c O'.*2 fields divided by spaces"),
    "one column": (b"a\nb\n", "line 1.*2 fields"),
    "an empty tag": (b"a\tO\nb\t\n", "line 2"),
    "an empty word": (b"a\tO\n\tO\n", "line 2"),
    "no BIO": (b"a\tO\nb\tB-LOC\n\nc\tLOC\nd\tLOC\n", "line 4.*'LOC' isn't O"),
    "encoding": (b"a\tO\nb\xff\tO\n", "isn't utf-8.*line 2"),
    "nothing": (b"\n# a comment\n\n", "holds no rows"),
    "empty": (b"", "is empty"),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_errors_name_the_file_and_the_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.conll").write_bytes(content)
    with pytest.raises(DataError, match=rf"(?s)x\.conll.*{message}"):
        read(tmp_path / "x.conll")


@pytest.mark.parametrize(
    ("name", "sentences", "entities"),
    [("wnut17/wnut17train.conll", 3394, 1975), ("ncbi_disease/train.tsv", 5424, 5134)],
)
def test_real_files_are_read_whole(shared_data: Path, name: str, sentences: int, entities: int) -> None:
    rows = read(shared_data / name, format="conll")["train"]
    assert len(rows) == sentences
    assert sum(tag.startswith("B-") for row in rows["tags"] for tag in row) == entities
