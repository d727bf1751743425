"""TextDataModule: against the tokenizer itself, used by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lightning_ft.data.module import TextDataModule
from lightning_ft.data.sources import DataError

WORDS = ["the", "screen", "is", "great", "and", "it", "works", "but", "a", "battery", "was", "never", "very", "good"]


def make_rows(count: int, labels: Iterable[Any] = ("neg", "pos"), start: int = 0) -> list[dict[str, Any]]:
    """Texts of one to fourteen words, no two the same."""
    names = list(labels)
    return [
        {
            "text": " ".join([*(WORDS * 2)[i : i + 1 + i * 5 % 13], str(start + i)]),
            "label": names[i % len(names)],
        }
        for i in range(count)
    ]


def write(file: Path, rows: list[dict[str, Any]], features: Features | None = None) -> Path:
    data = Dataset.from_list(rows, features=features)
    if file.suffix == ".parquet":
        data.to_parquet(file)
    elif file.suffix == ".jsonl":
        data.to_json(file)
    else:
        data.to_csv(file, index=False, sep="\t" if file.suffix == ".tsv" else ",")
    return file


@pytest.fixture
def tokenizer(tiny_bert_dir: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_bert_dir)


@pytest.fixture
def splits_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "splits"
    folder.mkdir()
    for split, count, start in (("train", 30, 0), ("validation", 11, 100), ("test", 13, 200)):
        write(folder / f"{split}.jsonl", make_rows(count, start=start))
    return folder


def rows_in(batches: Iterable[Mapping[str, Tensor]]) -> list[tuple[tuple[int, ...], int]]:
    """What the model sees of each row: its tokens without padding, and the label."""
    return [
        (tuple(ids[mask.bool()].tolist()), int(label))
        for batch in batches
        for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
    ]


def expected_rows(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]) -> Counter[Any]:
    ids = {"neg": 0, "pos": 1}
    return Counter((tuple(tokenizer(row["text"])["input_ids"]), ids[row["label"]]) for row in rows)


# ---------------------------------------------------------------------- what comes out


@pytest.mark.parametrize("ending", [".tsv", ".jsonl", ".parquet"])
def test_same_rows_give_the_same_data_whatever_the_file(tmp_path: Path, tiny_bert_dir: str, ending: str) -> None:
    def splits(file: Path) -> DatasetDict:
        return DatasetDict(TextDataModule(file, tiny_bert_dir).splits)

    one, other = (splits(write(tmp_path / f"data{e}", make_rows(40))) for e in (".csv", ending))
    assert one.keys() == other.keys()
    assert all(one[split].to_list() == other[split].to_list() for split in one)


def test_given_splits_are_taken_as_given(
    splits_dir: Path, tiny_bert_dir: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    data = TextDataModule(splits_dir, tiny_bert_dir, batch_size=4)
    for loader, count, start in (
        (data.train_dataloader(), 30, 0),
        (data.val_dataloader(), 11, 100),
        (data.test_dataloader(), 13, 200),
    ):
        assert Counter(rows_in(loader)) == expected_rows(tokenizer, make_rows(count, start=start))


def test_carved_splits_together_are_all_rows_and_equal_for_equal_seeds(
    tmp_path: Path, tiny_bert_dir: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    file = write(tmp_path / "data.csv", make_rows(60))

    def rows(seed: int) -> list[list[Any]]:
        data = TextDataModule(file, tiny_bert_dir, seed=seed)
        return [rows_in(loader) for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())]

    assert sum(map(Counter, rows(0)), Counter()) == expected_rows(tokenizer, make_rows(60))
    assert [len(part) for part in rows(0)] == [42, 6, 12]
    assert rows(0) == rows(0)
    assert set(rows(0)[2]) != set(rows(1)[2])


def test_batches_are_padded_as_transformers_pads(
    splits_dir: Path, tiny_bert_dir: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    loader = TextDataModule(splits_dir, tiny_bert_dir, batch_size=2).val_dataloader()
    rows = sorted(make_rows(11, start=100), key=lambda row: -len(tokenizer(row["text"])["input_ids"]))
    batches = list(loader)
    assert [len(batch["labels"]) for batch in batches] == [4, 4, 3]
    for i, batch in enumerate(batches):
        part = rows[4 * i : 4 * i + 4]
        expected = tokenizer([row["text"] for row in part], padding=True, return_tensors="pt")
        assert set(batch) == {*expected, "labels"}
        assert all(torch.equal(batch[key], expected[key]) for key in expected)
        assert batch["labels"].tolist() == [int(row["label"] == "pos") for row in part]


@pytest.mark.parametrize("max_length", [6, None])
def test_long_texts_are_cut_as_transformers_cuts(
    tmp_path: Path, tiny_bert_dir: str, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> None:
    rows = [{**row, "text": row["text"] + " battery" * 70} for row in make_rows(30)]
    data = TextDataModule(write(tmp_path / "data.csv", rows), tiny_bert_dir, max_length=max_length)
    limit = max_length or tokenizer.model_max_length
    expected = Counter(tuple(tokenizer(row["text"], truncation=True, max_length=limit)["input_ids"]) for row in rows)
    found = Counter(tuple(ids) for split in data.splits.values() for ids in split["input_ids"])
    assert found == expected
    assert all(set(split["length"]) == {limit} for split in data.splits.values())


def test_tokenizer_without_padding_pads_with_the_end_of_the_text(tmp_path: Path, tiny_bert_dir: str) -> None:
    bare = AutoTokenizer.from_pretrained(tiny_bert_dir, pad_token=None, eos_token="[SEP]")
    bare.pad_token = None
    bare.save_pretrained(tmp_path / "bare")
    assert AutoTokenizer.from_pretrained(tmp_path / "bare").pad_token is None
    data = TextDataModule(write(tmp_path / "data.csv", make_rows(30)), str(tmp_path / "bare"))
    for batch in data.train_dataloader():
        assert (batch["input_ids"][batch["attention_mask"] == 0] == bare.eos_token_id).all()


@pytest.mark.parametrize(
    ("names", "order"),
    [((10, 9, -1), ["-1", "9", "10"]), (("b", "a", "10"), ["10", "a", "b"])],
    ids=["numbers by value", "words by the alphabet"],
)
def test_labels_are_in_order_and_counted(
    tmp_path: Path, tiny_bert_dir: str, names: tuple[Any, ...], order: list[str]
) -> None:
    rows = make_rows(60, labels=(*names, names[0]))
    data = TextDataModule(write(tmp_path / "data.csv", rows), tiny_bert_dir, validation=0.2, test=0.2)
    assert data.labels == order
    ids = Counter(data.splits["train"]["labels"])
    assert data.facts["label_counts"] == [ids[i] for i in range(3)]
    all_ids = Counter(label for split in data.splits.values() for label in split["labels"])
    assert all_ids == Counter(order.index(str(row["label"])) for row in rows)


def test_class_labels_keep_the_datas_order_and_get_ids_without_gaps(tmp_path: Path, tiny_bert_dir: str) -> None:
    names = ["unused", "pos", "neg"]
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    rows = make_rows(40, labels=(1, 2))
    data = TextDataModule(write(tmp_path / "data.parquet", rows, features), tiny_bert_dir)
    assert data.labels == ["pos", "neg"]
    assert sorted(label for split in data.splits.values() for label in split["labels"]) == [0] * 20 + [1] * 20


def test_other_columns_may_be_named_and_the_rest_is_left_out(tmp_path: Path, tiny_bert_dir: str) -> None:
    rows = [{"review": row["text"], "stars": row["label"], "text": "", "id": 7} for row in make_rows(30)]
    data = TextDataModule(write(tmp_path / "data.csv", rows), tiny_bert_dir, text="review", label="stars")
    assert data.labels == ["neg", "pos"]
    assert not {"review", "stars", "text", "id"} & set(data.splits["train"].column_names)


def test_latin_1_files_are_read_when_named(tmp_path: Path, tiny_bert_dir: str) -> None:
    lines = [f"schön Nr. {i},{('gut', 'übel')[i % 2]}" for i in range(30)]
    (tmp_path / "alt.csv").write_text("\n".join(["text,label", *lines]), encoding="latin-1")
    assert TextDataModule(tmp_path / "alt.csv", tiny_bert_dir, encoding="latin-1").labels == ["gut", "übel"]


# ---------------------------------------------------------------------- the order of training


class Recorder(L.LightningModule):
    """Keeps what it's shown, by epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: dict[int, list[Any]] = {}

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.setdefault(self.current_epoch, []).extend(rows_in([batch]))
        return self.layer(torch.ones(1)).sum()

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(data: TextDataModule, epochs: int, folder: Path, resume: str | None = None) -> Recorder:
    module = Recorder()
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data, ckpt_path=resume)
    trainer.save_checkpoint(folder / "last.ckpt")
    return module


def test_each_epoch_has_every_row_in_an_order_that_a_resumed_run_repeats(
    tmp_path: Path, splits_dir: Path, tiny_bert_dir: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    def data() -> TextDataModule:
        return TextDataModule(splits_dir, tiny_bert_dir, batch_size=4, seed=5)

    whole = train(data(), 2, tmp_path).seen
    assert all(Counter(rows) == expected_rows(tokenizer, make_rows(30)) for rows in whole.values())
    assert whole[0] != whole[1]

    first = train(data(), 1, tmp_path).seen
    rest = train(data(), 2, tmp_path, resume=str(tmp_path / "last.ckpt")).seen
    assert {**first, **rest} == whole
    assert set(rest) == {1}


# ---------------------------------------------------------------------- texts and data to score


def test_new_texts_come_in_their_order(
    splits_dir: Path, tiny_bert_dir: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    texts = [row["text"] for row in make_rows(7)]
    batches = list(TextDataModule(splits_dir, tiny_bert_dir, batch_size=3).texts_dataloader(texts))
    assert [len(batch["input_ids"]) for batch in batches] == [3, 3, 1]
    for i, batch in enumerate(batches):
        expected = tokenizer(texts[3 * i : 3 * i + 3], padding=True, return_tensors="pt")
        assert set(batch) == set(expected)
        assert all(torch.equal(batch[key], expected[key]) for key in expected)


def test_new_texts_need_no_data(tiny_bert_dir: str) -> None:
    assert len(list(TextDataModule("nowhere.csv", tiny_bert_dir).texts_dataloader(["great"]))) == 1


@pytest.mark.parametrize("whole", [True, False], ids=["one split", "its test split"])
def test_other_data_are_scored_by_the_models_ids(
    splits_dir: Path, tiny_bert_dir: str, tokenizer: PreTrainedTokenizerBase, whole: bool
) -> None:
    path = splits_dir / "train.jsonl" if whole else splits_dir
    loader = TextDataModule(path, tiny_bert_dir).scoring_dataloader({"labels": ["pos", "neutral", "neg"]})
    rows = make_rows(30) if whole else make_rows(13, start=200)
    expected = Counter({(ids, 2 - 2 * label): n for (ids, label), n in expected_rows(tokenizer, rows).items()})
    assert Counter(rows_in(loader)) == expected


def test_other_data_with_unknown_labels_are_refused(splits_dir: Path, tiny_bert_dir: str) -> None:
    with pytest.raises(DataError, match=r"'neg'.*pos, great"):
        TextDataModule(splits_dir, tiny_bert_dir).scoring_dataloader({"labels": ["pos", "great"]})


# ---------------------------------------------------------------------- errors


def test_nothing_is_read_before_setup(tiny_bert_dir: str) -> None:
    data = TextDataModule("nowhere.csv", tiny_bert_dir)
    with pytest.raises(DataError, match=r"nowhere\.csv"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (make_rows(30, labels=["same"]), {}, r"data\.csv: column 'label' has only one label, 'same'"),
        (make_rows(2), {}, r"data\.csv: too few rows"),
        (make_rows(30), {"text": "txt"}, r"data\.csv, train: there is no column 'txt'.*Did you mean text"),
        (make_rows(30), {"validation": 0.5, "test": 0.5}, "validation=0.5 and test=0.5"),
    ],
    ids=["one label", "few rows", "no text column", "shares"],
)
def test_errors_name_the_file(
    tmp_path: Path, tiny_bert_dir: str, rows: list[dict[str, Any]], options: dict[str, Any], message: str
) -> None:
    data = TextDataModule(write(tmp_path / "data.csv", rows), tiny_bert_dir, **options)
    for _ in range(2):  # and asking again is no way around it
        with pytest.raises(DataError, match=message):
            _ = data.labels


def test_missing_tokenizer_is_named(monkeypatch: pytest.MonkeyPatch, splits_dir: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"'no/such'.*folder.*huggingface\.co"):
        TextDataModule(splits_dir, "no/such").setup("fit")
