"""Sources: the same rows from any file, and errors that name the file, the row or column, and the cure."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets.utils.logging import is_progress_bar_enabled

from lightning_ft.data.sources import DataError, complete, quiet_bars, read
from lightning_ft.data.targets import Classes, Columns, check, label_names, row_labels

COLUMNS = Columns("text", "label")
LABELS = partial(Classes().strata, columns=COLUMNS)

ROWS = [
    {"text": "plain words", "label": "good"},
    {"text": 'a "quoted" word, a comma; a semicolon', "label": "bad"},
    {"text": "two\nlines", "label": "good"},
    {"text": "电池续航太差了！ 🙂", "label": "bad"},
]


Rows = Sequence[dict[str, Any]]


def write_csv(file: Path, rows: Rows, delimiter: str = ",", encoding: str = "utf-8") -> None:
    with file.open("w", newline="", encoding=encoding) as handle:
        writer = csv.DictWriter(handle, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write_tsv(file: Path, rows: Rows) -> None:
    write_csv(file, rows, delimiter="\t")


def write_jsonl(file: Path, rows: Rows, encoding: str = "utf-8") -> None:
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding=encoding)


def write_parquet(file: Path, rows: Rows) -> None:
    pq.write_table(pa.Table.from_pylist(list(rows)), file)


WRITERS: dict[str, Callable[[Path, Rows], None]] = {
    ".csv": write_csv,
    ".tsv": write_tsv,
    ".jsonl": write_jsonl,
    ".parquet": write_parquet,
}


def rows_of(labels: Sequence[Any], text: str = "words") -> Dataset:
    return Dataset.from_dict({"text": [f"{text} {i}" for i in range(len(labels))], "label": list(labels)})


def read_and_check(path: Any, encoding: str = "utf-8", text: str = "text", label: str = "label") -> None:
    check(read(path, encoding), Classes(), Columns(text, label), str(path))


# ---------------------------------------------------------------------- what can be read


@pytest.mark.parametrize("ending", WRITERS)
def test_rows_are_the_same_whatever_the_file(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"reviews{ending}"
    WRITERS[ending](file, ROWS)
    splits = read(file)
    assert list(splits) == ["train"]
    assert splits["train"].to_list() == ROWS


def test_a_json_array_is_read_too(tmp_path: Path) -> None:
    file = tmp_path / "reviews.json"
    file.write_text(json.dumps(ROWS), encoding="utf-8")
    assert read(file)["train"].to_list() == ROWS


def test_folder_and_mapping_give_the_splits_by_any_of_their_names(tmp_path: Path) -> None:
    for name, row in zip(("train", "dev", "test"), ROWS, strict=False):
        write_jsonl(tmp_path / f"{name}.jsonl", [row])
    (tmp_path / "README.md").write_text("not data")
    folder = read(tmp_path)
    mapping = read({"train": tmp_path / "train.jsonl", "val": tmp_path / "dev.jsonl", "test": tmp_path / "test.jsonl"})
    for splits in (folder, mapping):
        assert {split: rows.to_list() for split, rows in splits.items()} == {
            "train": [ROWS[0]],
            "validation": [ROWS[1]],
            "test": [ROWS[2]],
        }


@pytest.mark.parametrize(
    ("ending", "encoding"), [(".csv", "latin-1"), (".csv", "utf-8-sig"), (".jsonl", "utf-16"), (".jsonl", "utf-8-sig")]
)
def test_other_encodings_are_read_when_named(tmp_path: Path, ending: str, encoding: str) -> None:
    file = tmp_path / f"reviews{ending}"
    rows = [{"text": "schön und gut", "label": "good"}, {"text": "café fermé", "label": "bad"}]
    {".csv": write_csv, ".jsonl": write_jsonl}[ending](file, rows, encoding=encoding)
    assert read(file, encoding)["train"].to_list() == rows


@pytest.mark.parametrize(("ending", "column"), [(".csv", "text"), (".tsv", "label")])
def test_words_that_look_like_nothing_remain_text(tmp_path: Path, ending: str, column: str) -> None:
    words = ["NA", "None", "null", "nan", "N/A", "NULL", "n/a", "NaN"]
    other = {"text": "label", "label": "text"}[column]
    file = tmp_path / f"words{ending}"
    WRITERS[ending](file, [{column: word, other: f"x{i % 2}"} for i, word in enumerate(words)])
    read_and_check(file)
    assert read(file)["train"][column] == words


def test_reading_leaves_the_progress_bars_as_they_were(tmp_path: Path) -> None:
    before = is_progress_bar_enabled()
    write_csv(tmp_path / "a.csv", ROWS)
    read(tmp_path / "a.csv")
    with quiet_bars(10):
        assert not is_progress_bar_enabled()
    assert is_progress_bar_enabled() == before


@pytest.mark.parametrize("line", ["\n", "\r\n"])
def test_of_a_text_file_each_paragraph_is_a_row(tmp_path: Path, line: str) -> None:
    lines = ["", "First Citizen:", "Speak, déjà vu.", "", "  ", "\t", "  indented", "# it stays", "", "last"]
    (tmp_path / "play.txt").write_bytes(line.join(lines).encode())
    rows = read(tmp_path / "play.txt")["train"]
    assert rows.to_dict() == {"text": ["First Citizen:\nSpeak, déjà vu.", "  indented\n# it stays", "last"]}
    (tmp_path / "play.txt").write_text(" \n\n \n")
    with pytest.raises(DataError, match=r"play\.txt' holds no rows"):
        read(tmp_path / "play.txt")


# ---------------------------------------------------------------------- what can't

CONTENTS: dict[str, tuple[str, bytes, list[str]]] = {
    "wrong ending": ("notes.doc", b"some words", ["notes.doc", "ending", ".csv, .tsv, .jsonl"]),
    "empty file": ("empty.csv", b"", ["empty.csv", "empty"]),
    "malformed CSV": ("bad.csv", b"text,label\na,1\nb,c,d,1\n", ["bad.csv", "CSV", "line 3"]),
    "malformed Parquet": ("bad.parquet", b"no parquet, this", ["bad.parquet", "PARQUET"]),
    "no text column": (
        "a.csv",
        b"txt,label\na,1\n",
        ["a.csv", "no column 'text'", "txt, label", "data.text=", "mean txt"],
    ),
    "no label column": (
        "a.csv",
        b"text,lable\na,1\n",
        ["a.csv", "no column 'label'", "data.label=", "mean lable"],
    ),
    "empty text": (
        "a.csv",
        b"text,label\na,1\n  ,0\nb,1\n,0\n",
        ["a.csv", "row 2", "no text", "'text'", "2, 4", "Fill or"],
    ),
    "null text": (
        "a.jsonl",
        b'{"text": "a", "label": 1}\n{"label": 0}',
        ["a.jsonl", "row 2", "no text", "Fill or"],
    ),
    "no words": ("a.csv", b"text,label\n3,1\n4,0\n", ["a.csv", "row 1", "3", "no text", "'text'"]),
    "missing label": (
        "a.csv",
        b"text,label\na,1\nb,\nc,0\n",
        ["a.csv", "row 2", "no label", "'label'", "Fill or"],
    ),
    "null label": (
        "a.jsonl",
        b'{"text": "a", "label": "x"}\n{"text": "b", "label": null}',
        ["a.jsonl", "row 2", "no label"],
    ),
}


CONTENTS |= {
    "a field more in every row": (
        "a.csv",
        b"text,label\na,b,1\nc,d,0\n",
        ["a.csv", "line 2 has 3 fields", "2 columns", "text, label", "quotes"],
    ),
    "a comma at each line's end": ("a.csv", b"text,label\n\na,1,\nb,0,\n", ["a.csv", "line 3 has 3 fields"]),
    "a tab more in every row": ("a.tsv", b"text\tlabel\na\tb\t1\n", ["a.tsv", "line 2 has 3 fields", "a tab"]),
    "a field less": ("a.csv", b"text,label\na,1\nb\n", ["a.csv", "row 2", "no label"]),
    "a label of another kind": ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": "b", "label": {"x": 1}}', ["a.jsonl"]),
}


@pytest.mark.parametrize(("name", "content", "parts"), CONTENTS.values(), ids=CONTENTS)
def test_error_names_the_file_and_the_place_and_the_cure(
    tmp_path: Path, name: str, content: bytes, parts: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read_and_check(tmp_path / name)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("name", ["old.csv", "old.jsonl"])
def test_wrong_encoding_is_named_with_its_place(tmp_path: Path, name: str) -> None:
    rows = [{"text": "gut", "label": "x"}, {"text": "schön", "label": "y"}]
    file = tmp_path / name
    {".csv": write_csv, ".jsonl": write_jsonl}[file.suffix](file, rows, encoding="latin-1")
    before = file.read_bytes().partition("ö".encode("latin-1"))[0]
    place = rf"(byte {len(before)}|line {before.count(10) + 1})"
    with pytest.raises(DataError, match=rf"{name}.*utf-8.*{place}\b.*data\.encoding="):
        read_and_check(file)


UNPARSABLE = [
    ("open.csv", 3, 'text,label\na,1\n"b,2\nc,3\n'),
    ("bad.jsonl", 2, '{"text": "a", "label": 1}\n{"text": "b",\n{"text": "c", "label": 1}\n'),
]


@pytest.mark.parametrize(("name", "line", "content"), UNPARSABLE)
def test_place_of_what_cannot_be_parsed_is_counted_from_one(tmp_path: Path, name: str, line: int, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=rf"{name}.*(line|row) {line}\b"):
        read(tmp_path / name)


def test_place_is_counted_in_the_whole_file_where_the_parser_counts_in_parts(tmp_path: Path) -> None:
    line = json.dumps({"text": "words " * 2_000, "label": "x"}) + "\n"
    (tmp_path / "long.jsonl").write_text(line * 1_000 + '{"text": \n' + line)  # parsed 10 MiB at a time
    with pytest.raises(DataError, match=r"long\.jsonl.*line 1001 isn't JSON"):
        read(tmp_path / "long.jsonl")


@pytest.mark.parametrize("folder", ["with [brackets]", "a*b", "what?", "__hidden__", ".dotted"])
def test_a_path_is_no_pattern(tmp_path: Path, folder: str) -> None:
    for name, text in ((folder, "ours"), ("with b", "theirs"), ("aab", "theirs"), ("what!", "theirs")):
        (tmp_path / name).mkdir()
        write_csv(tmp_path / name / "train.csv", [{"text": text, "label": "x"}])
    assert read(tmp_path / folder)["train"]["text"] == ["ours"]
    assert read(tmp_path / folder / "train.csv")["train"]["text"] == ["ours"]


def hub_like(folder: Path, **rows: Rows) -> str:
    """A folder that `datasets` loads as it loads a data set on the hub, with a configuration for each keyword."""
    for name, its in rows.items():
        (folder / name).mkdir(parents=True)
        write_jsonl(folder / name / "train.jsonl", its)
        write_jsonl(folder / name / "test.jsonl", its[:1])
    listed = "".join(
        f"- config_name: {name}\n  data_files:\n  - {{split: train, path: {name}/train.jsonl}}\n"
        f"  - {{split: test, path: {name}/test.jsonl}}\n"
        for name in rows
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")
    return str(folder)


def test_a_configuration_on_the_hub_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_ft.data.sources.locate", lambda *_: None)  # as if it weren't here
    path = hub_like(tmp_path / "hub", one=ROWS[:2], two=ROWS[2:])
    splits = read(path, name="two")
    assert {split: rows.to_list() for split, rows in splits.items()} == {"train": ROWS[2:], "test": ROWS[2:3]}
    with pytest.raises(DataError, match=r"several configurations: name one, data\.name=.*one, two"):
        read(path)


EMPTY = [("head.csv", "text,label\n"), ("blank.jsonl", "\n"), ("list.json", "[]")]


@pytest.mark.parametrize(("name", "content"), EMPTY)
def test_file_without_rows_is_named_as_such(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=f"{name}.*no rows"):
        read(tmp_path / name)


def test_missing_file_gets_its_near_names(tmp_path: Path) -> None:
    write_csv(tmp_path / "reviews.csv", ROWS)
    with pytest.raises(DataError, match=r"review\.csv'.*Did you mean reviews\.csv"):
        read(tmp_path / "review.csv")
    with pytest.raises(DataError, match=r"reviws\.csv'.*Did you mean reviews\.csv"):
        read({"train": tmp_path / "reviws.csv"})


def test_missing_file_in_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.a\.csv"):
        read(tmp_path / "nowhere" / "a.csv")


def test_unknown_encoding_is_named_with_known_ones(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    write_csv(file, [{"text": "schön", "label": "x"}])
    with pytest.raises(DataError, match=r"'utf-99'.*latin-1"):
        read(file, "utf-99")


def test_folder_without_train_says_what_it_holds(tmp_path: Path) -> None:
    write_csv(tmp_path / "dev.csv", ROWS)
    with pytest.raises(DataError, match=r"no train file.*dev\.csv"):
        read(tmp_path)


def test_folder_with_two_files_for_a_split_names_both(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", ROWS)
    write_csv(tmp_path / "val.csv", ROWS)
    write_csv(tmp_path / "dev.csv", ROWS)
    with pytest.raises(DataError, match=r"two files for validation: dev\.csv and val\.csv"):
        read(tmp_path)


def test_unknown_split_is_named_with_known_ones(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", ROWS)
    with pytest.raises(DataError, match=r"'tran'.*train, validation, test"):
        read({"tran": tmp_path / "a.csv"})


def test_two_names_of_one_split_in_a_mapping_are_refused(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", ROWS)
    with pytest.raises(DataError, match="validation"):
        read({"train": tmp_path / "a.csv", "val": tmp_path / "a.csv", "validation": tmp_path / "a.csv"})


def test_unknown_bundled_name_gets_the_known_ones() -> None:
    with pytest.raises(DataError, match=r"'reviews_xx'.*reviews_en, reviews_zh"):
        read("bundled:reviews_xx")


@pytest.mark.parametrize("name", ["nobody/nothing", "imdb"])
def test_unreachable_hub_name_says_why_and_what_else(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=f"'{name}'.*no file or folder.*[Oo]ffline.*path"):
        read(name)


def test_label_that_training_never_saw_is_named_with_its_row() -> None:
    splits = {"train": rows_of(["a", "b"]), "test": rows_of(["a", "c", "b", "c"])}
    with pytest.raises(DataError, match=r"source, test: .*'c' \(row 2, 2 such rows\).*are a, b\..*add examples"):
        check(splits, Classes(), COLUMNS, "source")


def test_known_labels_stand_in_for_those_of_training() -> None:
    check({"test": rows_of(["a", "a"])}, Classes(), COLUMNS, "source", {"labels": ["a", "b"]})
    with pytest.raises(DataError, match=r"'c'.*are a, b"):
        check({"test": rows_of(["a", "c"])}, Classes(), COLUMNS, "source", {"labels": ["a", "b"]})


def test_splits_without_train_are_refused() -> None:
    with pytest.raises(DataError, match="no train split, only test"):
        check({"test": rows_of(["a", "b"])}, Classes(), COLUMNS, "source")


CLASSES = Features({"text": Value("string"), "label": ClassLabel(names=["none", "pos", "neg"])})


def test_the_hubs_minus_one_is_a_missing_label() -> None:
    rows = Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, -1, 2]}, features=CLASSES)
    with pytest.raises(DataError, match=r"row 2.*no label"):
        check({"train": rows}, Classes(), COLUMNS, "source")


def test_label_that_is_no_label_is_named() -> None:
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [["x"], ["y"]]})
    with pytest.raises(DataError, match=r"row 1.*label"):
        check({"train": rows}, Classes(), COLUMNS, "source")


# ---------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([10, 9, -1, 9], ["-1", "9", "10"]),
        (["10", "9", "a", "B"], ["10", "9", "B", "a"]),
        ([True, False], ["False", "True"]),
        ([4.5, 10.0, 4.0], ["4.0", "4.5", "10.0"]),
    ],
    ids=["numbers by value", "words by the alphabet", "false before true", "fractions by value"],
)
def test_labels_are_in_order(labels: list[Any], names: list[str]) -> None:
    rows = rows_of(labels)
    assert label_names(rows, "label") == names
    assert row_labels(rows, "label") == [str(label) for label in labels]


def test_class_labels_keep_the_datas_order_less_what_never_occurs() -> None:
    rows = Dataset.from_dict({"text": ["a", "b", "c"], "label": [2, 1, 1]}, features=CLASSES)
    assert label_names(rows, "label") == ["pos", "neg"]
    assert row_labels(rows, "label") == ["neg", "pos", "pos"]


# ---------------------------------------------------------------------- splits by ratio


def split_texts(splits: dict[str, Dataset]) -> dict[str, list[str]]:
    return {split: list(rows["text"]) for split, rows in splits.items()}


@pytest.mark.parametrize(
    ("counts", "validation", "test"),
    [({"a": 60, "b": 40}, 0.25, 0.25), ({"a": 97, "b": 31, "c": 12}, 0.1, 0.2), ({"a": 500, "b": 11}, 0.2, 0.1)],
)
def test_splits_are_disjoint_complete_and_stratified(counts: dict[str, int], validation: float, test: float) -> None:
    rows = rows_of([label for label, count in counts.items() for _ in range(count)])
    splits = complete({"train": rows}, LABELS, validation, test, 0, "source")
    texts = split_texts(splits)
    assert list(texts) == ["train", "validation", "test"]
    assert sorted(chain(*texts.values())) == sorted(rows["text"])
    for split, share in (("train", 1 - validation - test), ("validation", validation), ("test", test)):
        found = Counter(splits[split]["label"])
        for label, count in counts.items():
            assert abs(found[label] - share * count) < 2  # two cuts, each of them off by less than a row


def test_shares_are_of_all_rows_and_exact_where_they_can_be() -> None:
    rows = rows_of(["a"] * 60 + ["b"] * 40)
    splits = complete({"train": rows}, LABELS, 0.1, 0.2, 0, "source")
    counts = {split: Counter(rows["label"]) for split, rows in splits.items()}
    assert counts == {"train": {"a": 42, "b": 28}, "validation": {"a": 6, "b": 4}, "test": {"a": 12, "b": 8}}


def test_splits_depend_on_the_seed_alone() -> None:
    rows = rows_of(["a", "b"] * 50)

    def splits(seed: int) -> dict[str, list[str]]:
        return split_texts(complete({"train": rows}, LABELS, 0.1, 0.2, seed, "source"))

    assert splits(1) == splits(1)
    assert splits(1)["test"] != splits(2)["test"]


@pytest.mark.parametrize("given", [("validation",), ("test",), ("validation", "test")])
def test_given_splits_are_taken_as_given(given: tuple[str, ...]) -> None:
    splits = {"train": rows_of(["a", "b"] * 50)} | {split: rows_of(["a", "b"] * 3, split) for split in given}
    done = complete(splits, LABELS, 0.1, 0.2, 0, "source")
    shares = {"validation": 10, "test": 20}
    for split in ("validation", "test"):
        if split in given:
            assert done[split].to_list() == splits[split].to_list()
        else:
            assert len(done[split]) == shares[split]
    carved = [done[split]["text"][:] for split in done if split not in given]
    assert sorted(chain(*carved)) == sorted(splits["train"]["text"])


def test_too_few_rows_of_a_label_to_split_are_named() -> None:
    for labels in [["a"] * 30 + ["b"], ["a", "b"]]:
        with pytest.raises(DataError, match=r"source: too few rows.*label '[ab]'.*Add rows, or give the splits"):
            complete({"train": rows_of(labels)}, LABELS, 0.1, 0.2, 0, "source")


@pytest.mark.parametrize(("rows", "rare", "validation", "test"), [(20, 3, 0.1, 0.2), (30, 3, 0.5, 0.4)])
def test_every_split_has_every_label_or_is_refused(rows: int, rare: int, validation: float, test: float) -> None:
    labels = ["rare"] * rare + ["often"] * (rows - rare)
    try:
        splits = complete({"train": rows_of(labels)}, LABELS, validation, test, 0, "source")
    except DataError as error:
        assert "'rare'" in str(error)  # noqa: PT017 - refusing is as good
    else:
        assert all(set(split["label"]) == {"rare", "often"} for split in splits.values())


def test_shares_that_make_no_sense_are_named() -> None:
    for validation, test in [(0.0, 0.2), (0.6, 0.4)]:
        with pytest.raises(DataError, match=f"validation={validation} and test={test}"):
            complete({"train": rows_of(["a", "b"] * 50)}, LABELS, validation, test, 0, "source")


def test_rows_without_strata_are_shared_out_by_count() -> None:
    done = complete({"train": rows_of(list(range(100)))}, lambda _: None, 0.1, 0.2, 0, "source")
    assert {split: len(rows) for split, rows in done.items()} == {"train": 70, "validation": 10, "test": 20}
    with pytest.raises(DataError, match="there are 1"):
        complete({"train": rows_of([1])}, lambda _: None, 0.1, 0.2, 0, "source")
