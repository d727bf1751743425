"""Streamed rows: those of the file, in an order of their own, however many readers there are; and few are held."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

import lightning as L
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from torch import Tensor

from lightning_ft.data.module import TextDataModule
from lightning_ft.data.sources import DataError
from lightning_ft.data.streaming import Stream, StreamedRows

Row = dict[str, Any]


def make_rows(count: int, start: int = 0) -> list[Row]:
    """No two are the same to the tiny BERT's tokenizer, which knows letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return [
        {
            "text": f"{letters[i % 26]} {letters[i // 26 % 26]} is{' very' * (i * 7 % 11)} good",
            "label": ("no", "yes")[i % 2],
        }
        for i in range(start, start + count)
    ]


def write(file: Path, rows: list[Row]) -> None:
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix == ".jsonl":
        file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    else:
        with file.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, list(rows[0]), delimiter="\t" if file.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)


def folder(path: Path, ending: str = ".jsonl", train: int = 60) -> Path:
    path.mkdir(exist_ok=True)
    for split, count, start in (("train", train, 0), ("validation", 12, 300), ("test", 14, 400)):
        write(path / f"{split}{ending}", make_rows(count, start))
    return path


def streamed(path: Path, tokenizer: str, **options: Any) -> TextDataModule:
    return TextDataModule(path, tokenizer, streaming=True, **{"batch_size": 4, "buffer": 16, **options})


def tokens(rows: Any) -> list[tuple[int, ...]]:
    return [tuple(row["input_ids"]) for row in rows]


def of_batches(batches: Any) -> list[tuple[int, ...]]:
    return [
        tuple(ids[mask.bool()].tolist())
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


# ---------------------------------------------------------------------- what comes out


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_rows_and_facts_are_those_of_data_that_is_held(tmp_path: Path, tiny_bert_dir: str, ending: str) -> None:
    data = streamed(folder(tmp_path / "data", ending), tiny_bert_dir)
    held = TextDataModule(tmp_path / "data", tiny_bert_dir, batch_size=4)
    assert data.facts == held.facts
    assert data.sizes == held.sizes == {"train": 60, "validation": 12, "test": 14}
    assert Counter(of_batches(data.train_dataloader())) == Counter(tokens(held.splits["train"]))
    for split in ("validation", "test"):
        assert data.splits[split].to_list() == held.splits[split].to_list()


def test_labels_that_look_like_numbers_are_in_their_order(tmp_path: Path, tiny_bert_dir: str) -> None:
    path = tmp_path / "data"
    path.mkdir()
    for split in ("train", "validation", "test"):
        write(path / f"{split}.csv", [{**row, "label": (10, 9)[i % 2]} for i, row in enumerate(make_rows(8))])
    assert streamed(path, tiny_bert_dir).labels == ["9", "10"]


def test_class_labels_keep_their_names(tmp_path: Path, tiny_bert_dir: str) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["pos", "unused", "neg"])})
    path = tmp_path / "data"
    path.mkdir()
    for split in ("train", "validation", "test"):
        rows = [{**row, "label": (0, 2)[i % 2]} for i, row in enumerate(make_rows(8))]
        Dataset.from_list(rows, features=features).to_parquet(path / f"{split}.parquet")
    data = streamed(path, tiny_bert_dir)
    assert data.facts == {"labels": ["pos", "neg"], "label_counts": [4, 4]}
    assert Counter(chain(*(batch["labels"].tolist() for batch in data.train_dataloader()))) == {0: 4, 1: 4}


def test_facts_that_are_given_are_not_read_for(tmp_path: Path, tiny_bert_dir: str) -> None:
    data = streamed(folder(tmp_path / "data"), tiny_bert_dir, known={"labels": ["yes", "no"]}, evaluation_rows=5)
    reads = counted_reads(data)
    assert data.facts == {"labels": ["yes", "no"]}
    assert data.sizes == {"validation": 5, "test": 5}
    assert reads == []
    batch = next(iter(data.train_dataloader()))
    assert len(batch["labels"]) == 4


def orders(data: TextDataModule, epochs: int) -> list[list[tuple[int, ...]]]:
    rows = data.splits["train"]
    found = []
    for rows.epoch in range(epochs):
        found.append(tokens(rows))
    return found


def test_order_is_the_seeds_and_the_epochs(tmp_path: Path, tiny_bert_dir: str) -> None:
    path = folder(tmp_path / "data")
    first = orders(streamed(path, tiny_bert_dir), 3)
    assert orders(streamed(path, tiny_bert_dir), 3) == first
    assert len({*map(tuple, first), *map(tuple, orders(streamed(path, tiny_bert_dir, seed=9), 3))}) == 6
    assert len({frozenset(Counter(order).items()) for order in first}) == 1


def test_batches_are_of_like_length(tmp_path: Path, tiny_bert_dir: str) -> None:
    data = streamed(folder(tmp_path / "data", train=64), tiny_bert_dir, buffer=32, batch_size=8)

    def padding(order: list[tuple[int, ...]]) -> int:
        batches = [order[i : i + 8] for i in range(0, 64, 8)]
        return sum(max(map(len, batch)) - len(row) for batch in batches for row in batch)

    held = TextDataModule(tmp_path / "data", tiny_bert_dir)
    assert padding(orders(data, 1)[0]) < 0.5 * padding(tokens(held.splits["train"]))


def of_reader(rows: StreamedRows, ranks: int, rank: int) -> list[tuple[int, ...]]:
    rows.num_replicas, rows.rank = ranks, rank
    return tokens(rows)


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_processes_have_as_many_rows_and_none_twice(tmp_path: Path, tiny_bert_dir: str, ranks: int) -> None:
    data = streamed(folder(tmp_path / "data"), tiny_bert_dir)
    whole = Counter(orders(data, 1)[0])
    parts = [of_reader(data.splits["train"], ranks, rank) for rank in range(ranks)]
    assert {len(part) for part in parts} == {60 // ranks}
    together = Counter(chain(*parts))
    assert together <= whole
    assert sum(whole.values()) - sum(together.values()) < ranks


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
def test_workers_share_the_rows_too(tmp_path: Path, tiny_bert_dir: str) -> None:
    path = folder(tmp_path / "data")
    data = streamed(path, tiny_bert_dir, num_workers=2)
    assert Counter(of_batches(data.train_dataloader())) == Counter(orders(streamed(path, tiny_bert_dir), 1)[0])


# ---------------------------------------------------------------------- how much is held


def counted_reads(data: TextDataModule) -> list[int]:
    """The numbers of the training rows that are read."""
    reads: list[int] = []
    stream = data.splits["train"].stream
    original = stream.rows

    class Counted:
        features = None

        def iter(self, size: int) -> Iterator[Row]:
            for batch in original.iter(size):
                reads.extend(range(len(batch["text"])))
                yield batch

    data.splits["train"].stream = Stream(Counted(), stream.source, stream.file, stream.encoding)  # type: ignore[arg-type]
    return reads


def test_no_more_than_the_buffer_is_read_ahead(
    tmp_path: Path, tiny_bert_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_ft.data.streaming.READ", 5)
    data = streamed(folder(tmp_path / "data", train=400), tiny_bert_dir, buffer=18)
    reads = counted_reads(data)
    for i, _ in enumerate(islice(iter(data.splits["train"]), 100)):
        assert len(reads) <= (i // 20 + 1) * 20  # 18, in whole batches


def test_the_pass_for_facts_holds_a_chunk(tmp_path: Path, tiny_bert_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_ft.data.streaming.CHUNK", 50)
    sizes: list[int] = []
    chunk = Stream.chunk

    def counted(self: Stream, rows: list[Row]) -> Dataset:
        sizes.append(len(rows))
        return chunk(self, rows)

    monkeypatch.setattr(Stream, "chunk", counted)
    assert streamed(folder(tmp_path / "data", train=420), tiny_bert_dir).facts["label_counts"] == [210, 210]
    assert sizes == [50] * 8 + [20, 12, 14]


# ---------------------------------------------------------------------- in a training


class Recorder(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: dict[int, list[Any]] = {}

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        pass

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.setdefault(self.current_epoch, []).extend(of_batches([batch]))
        return self.layer(torch.ones(1)).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_each_pass_of_a_training_is_another_order(tmp_path: Path, tiny_bert_dir: str) -> None:
    data, module = streamed(folder(tmp_path / "data"), tiny_bert_dir), Recorder()
    L.Trainer(
        accelerator="cpu", max_steps=30, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, data)  # fmt: skip
    assert [module.seen[epoch] for epoch in range(2)] == orders(streamed(tmp_path / "data", tiny_bert_dir), 2)


# ---------------------------------------------------------------------- errors


def test_training_must_have_an_end(tmp_path: Path, tiny_bert_dir: str) -> None:
    trainer = L.Trainer(accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False)
    with pytest.raises(DataError, match=r"trainer\.max_steps"):
        trainer.fit(Recorder(), streamed(folder(tmp_path / "data"), tiny_bert_dir))


def test_splits_must_be_given(tmp_path: Path, tiny_bert_dir: str) -> None:
    write(tmp_path / "a.jsonl", make_rows(10))
    with pytest.raises(DataError, match=r"no split validation and no split test.*files train, validation and test"):
        streamed(tmp_path / "a.jsonl", tiny_bert_dir).setup("fit")


BAD: dict[str, tuple[str, str, str]] = {
    "no text": (".jsonl", json.dumps({"text": " ", "label": "no"}), r"train: row 26 has no text in column 'text'"),
    "no label": (".csv", "words,", r"train: row 26 has no label in column 'label'"),
    "broken JSON": (".jsonl", '{"text": "a"', r"train\.jsonl.*line 26 isn't JSON"),
    "too many fields": (".csv", "a,b,c,d", r"train\.csv.*line 27"),
    "wrong encoding": (".csv", "sch\udcf6n,no", r"train\.csv' isn't utf-8: .* in line 27"),
}


@pytest.mark.parametrize("known", [None, {"labels": ["no", "yes"]}], ids=["before training", "in training"])
@pytest.mark.parametrize(("ending", "line", "message"), BAD.values(), ids=BAD)
def test_a_bad_row_is_told_by_its_number(
    tmp_path: Path, tiny_bert_dir: str, ending: str, line: str, message: str, known: Any
) -> None:
    file = folder(tmp_path / "data", ending) / f"train{ending}"
    lines = file.read_text(encoding="utf-8").splitlines()
    lines[25 + (ending == ".csv")] = line
    file.write_text("\n".join(lines), encoding="utf-8", errors="surrogateescape")
    with pytest.raises(DataError, match=message):
        list(streamed(tmp_path / "data", tiny_bert_dir, known=known).splits["train"])


def test_a_row_of_one_of_several_processes_is_told_by_its_number_too(tmp_path: Path, tiny_bert_dir: str) -> None:
    rows = make_rows(60)
    rows[25]["label"] = "perhaps"
    write(folder(tmp_path / "data") / "train.jsonl", rows)
    data = streamed(tmp_path / "data", tiny_bert_dir, known={"labels": ["no", "yes"]})
    assert len(of_reader(data.splits["train"], 3, 0)) == 20
    with pytest.raises(DataError, match=r"'perhaps' \(row 26"):
        of_reader(data.splits["train"], 3, 25 % 3)
