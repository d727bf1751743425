"""Tags: words aligned with tokens, tags of other schemes, and what is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lightning_ft.data.module import TextDataModule
from lightning_ft.data.sources import DataError
from lightning_ft.data.tags import Tags, bio
from lightning_ft.data.targets import Columns

COLUMNS = Columns("words", "tags")
FACTS = {"labels": ["O", "B-LOC", "I-LOC"]}
WORDS = ["the", "battery", "xyz", ".", "very", "good"]


def rows_of(*rows: tuple[list[Any] | None, list[Any] | None]) -> Dataset:
    return Dataset.from_dict({"words": [row[0] for row in rows], "tags": [row[1] for row in rows]})


def byte_level(pre_tokenizer: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in which words have a space before them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, show_progress=False, special_tokens=["<pad>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator([" the battery is very good."] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", model_max_length=64)


BYTE_LEVEL = {
    "like GPT-2's": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "like RoBERTa's for words": lambda: pre_tokenizers.ByteLevel(add_prefix_space=True),
    "like Llama 3's": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\w+| ?[^\s\w]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}


@pytest.fixture
def word_piece(tiny_bert_dir: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_bert_dir)


def word_at(encoded: dict[str, Any], tokenizer: Any, i: int) -> str:
    """The token at the first position of word ``i``."""
    return tokenizer.convert_ids_to_tokens(encoded["input_ids"][0])[encoded["extra"][0]["positions"][i]]


# ------------------------------------------------------------------------------- words and tokens


def test_a_words_first_token_stands_for_it(word_piece: PreTrainedTokenizerBase) -> None:
    encoded = Tags().inputs([WORDS], word_piece, 64)
    tokens = word_piece.convert_ids_to_tokens(encoded["input_ids"][0])
    assert tokens == ["[CLS]", "the", "battery", "x", "##y", "##z", ".", "very", "good", "[SEP]"]
    assert encoded["extra"][0]["positions"] == [1, 2, 3, 6, 7, 8]


@pytest.mark.parametrize("kind", BYTE_LEVEL)
def test_byte_level_words_are_as_in_the_middle_of_a_text(kind: str) -> None:
    tokenizer = byte_level(BYTE_LEVEL[kind]())
    encoded = Tags().inputs([WORDS], tokenizer, 64)
    one_by_one = [tokenizer(f" {word}")["input_ids"] for word in WORDS]
    assert encoded["input_ids"][0] == [token for word in one_by_one for token in word]
    starts = [sum(map(len, one_by_one[:i])) for i in range(len(WORDS))]
    assert encoded["extra"][0]["positions"] == starts
    assert word_at(encoded, tokenizer, 1) == "Ġbattery"


def test_words_beyond_the_limit_and_words_without_a_token_have_no_position(word_piece: PreTrainedTokenizerBase) -> None:
    words = ["the", "\u200b", "battery", "xyz", "very", "good"]  # the second is dropped by BERT's normalizer
    positions = Tags().inputs([words], word_piece, 6)["extra"][0]["positions"]
    assert positions == [1, -1, 2, 3, -1, -1]  # [CLS] the battery x ##y [SEP]


def test_a_string_is_cut_into_words_that_know_where_they_are(word_piece: PreTrainedTokenizerBase) -> None:
    text = "The  battery's good -- 很好!"
    (extra,) = Tags().inputs([text], word_piece, 64)["extra"]
    words = ["The", "battery", "'", "s", "good", "-", "-", "很好", "!"]
    assert [text[start:end] for start, end in extra["spans"]] == words
    (listed,) = Tags().inputs([words], word_piece, 64)["extra"]
    assert listed["text"] == " ".join(words)
    assert [listed["text"][start:end] for start, end in listed["spans"]] == words
    assert listed["positions"] == extra["positions"]


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_batch_pads_words_behind_and_tokens_where_the_tokenizer_does(
    word_piece: PreTrainedTokenizerBase, side: str
) -> None:
    word_piece.padding_side = side
    target, rows = Tags(), rows_of((WORDS, ["O", "B-LOC", "I-LOC", "O", "O", "O"]), (["good"], ["O"]))
    encoded = target.encode(rows, COLUMNS, FACTS, word_piece, 6).remove_columns("length")
    batch = target.collator(word_piece)(list(encoded))
    labels = batch["labels"]
    assert labels["tags"].tolist() == [[0, 1, 2, 0, 0, 0], [0, *[-100] * 5]]
    shift = 3 if side == "left" else 0
    assert labels["positions"].tolist() == [[1, 2, 3, -1, -1, -1], [1 + shift, *[-1] * 5]]
    assert labels["count"] == 4
    assert batch["input_ids"][1, labels["positions"][1, 0]] == word_piece.convert_tokens_to_ids("good")
    assert torch.equal(labels["positions"], batch["extra"]["positions"])


def test_a_slow_tokenizer_is_refused() -> None:
    slow: Any = SimpleNamespace(is_fast=False, name_or_path="some/tokenizer")
    with pytest.raises(DataError, match=r"'some/tokenizer'.*slow.*tokenizer\.json"):
        Tags().inputs(["good"], slow, 8)


def test_unread_words_are_told(word_piece: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture) -> None:
    rows = rows_of((WORDS, ["O"] * 6), (["good"], ["O"]))
    with caplog.at_level(logging.WARNING):
        Tags().encode(rows, COLUMNS, FACTS, word_piece, 64)
        assert not caplog.messages
        Tags().encode(rows, COLUMNS, FACTS, word_piece, 6)
    assert "3 words in 1 of 2 texts aren't read" in caplog.text


# ----------------------------------------------------------------------------------------- schemes

SAME = {
    "IOB1": ("I-A I-A B-A I-B O I-B", "B-A I-A B-A B-B O B-B"),
    "BIOES": ("S-A B-A E-A B-B I-B E-B S-B O", "B-A B-A I-A B-B I-B I-B B-B O"),
    "BILOU": ("U-A B-A L-A U-A O", "B-A B-A I-A B-A O"),
    "BIO": ("B-A I-A O B-B B-B I-B", "B-A I-A O B-B B-B I-B"),
    "an I that begins": ("O I-A B-B I-A I-A", "O B-A B-B B-A I-A"),
    "plain": ("DET NOUN NOUN O X-Y", "DET NOUN NOUN O X-Y"),
    "a hyphen in the type": ("S-a-b I-a-b", "B-a-b B-a-b"),
}


@pytest.mark.parametrize(("given", "read"), SAME.values(), ids=SAME)
def test_tags_of_other_schemes_are_read_as_bio(given: str, read: str) -> None:
    assert bio(given.split()) == read.split()
    assert bio(read.split()) == read.split()


def test_the_tags_are_both_of_each_type_or_the_plain_ones() -> None:
    def labels(*tags: str) -> list[str]:
        return Tags().facts(rows_of(*((["x"], [tag]) for tag in tags)), COLUMNS, "x")["labels"]

    assert labels("B-LOC", "I-PER", "O") == ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
    assert labels("S-LOC") == ["O", "B-LOC", "I-LOC"]
    assert labels("VERB", "NOUN") == ["NOUN", "VERB"]
    assert labels("VERB", "O") == ["O", "VERB"]
    with pytest.raises(DataError, match="only one tag, 'O'"):
        labels("O", "O")


def test_tags_kept_as_numbers_are_read_by_their_names() -> None:
    names = ["O", "B-LOC", "I-LOC"]
    features = Features({"words": List(Value("string")), "tags": List(ClassLabel(names=names))})
    rows = Dataset.from_dict({"words": [["a", "b"]], "tags": [[2, 2]]}, features=features)
    target = Tags()
    target.check(rows, COLUMNS, "x")
    assert target.facts(rows, COLUMNS, "x") == FACTS
    assert target.labels(rows, COLUMNS, FACTS) == [[1, 2]]


# ----------------------------------------------------------------------------------------- refusals

GOOD = (["a"], ["B-A"])
REFUSED: dict[str, tuple[Dataset, str]] = {
    "no words": (rows_of(GOOD, ([], [])), r"data, train: row 2 has \[\], which is no list of words"),
    "nothing": (rows_of(GOOD, (None, ["O"])), r"row 2 has no list of words in column 'words'"),
    "a blank word": (rows_of(GOOD, (["a", " "], ["O", "O"])), "row 2 has .*no list of words"),
    "lengths": (rows_of(GOOD, (["a", "b"], ["O"])), "row 2 has 2 words in column 'words' and 1 tags in 'tags'"),
    "numbers": (rows_of((["a"], [1])), r"row 1 has \[1\], which is no list of tags"),
    "strings": (Dataset.from_dict({"words": ["a b"], "tags": ["O O"]}), "row 1 has 'a b', which is no list of words"),
    "no column": (Dataset.from_dict({"text": [["a"]], "tags": [["O"]]}), "no column 'words'"),
    "a stray": (rows_of(GOOD, (["a", "b"], ["O", "LOC"])), "row 2 has the tag 'LOC' in column 'tags'.*B- or I-"),
}


@pytest.mark.parametrize(("rows", "message"), REFUSED.values(), ids=REFUSED)
def test_rows_that_cannot_be_learned_from_are_named(rows: Dataset, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Tags().check(rows, COLUMNS, "data, train")


def write_conll(file: Path, sentences: list[str]) -> Path:
    """Sentences of ``word/TAG``."""
    text = "\n\n".join("\n".join(pair.replace("/", "\t") for pair in s.split()) for s in sentences)
    file.write_text(text + "\n", encoding="utf-8")
    return file


def module(path: Path, tokenizer: str, **options: Any) -> TextDataModule:
    return TextDataModule(path, tokenizer, "words", "tags", Tags(), **options)


def test_a_tag_that_training_does_not_have_is_refused_by_row(tmp_path: Path, tiny_bert_dir: str) -> None:
    write_conll(tmp_path / "train.conll", ["a/B-A"] * 9)
    write_conll(tmp_path / "test.conll", ["a/O", "a/B-A b/I-A", "a/B-B"])
    with pytest.raises(DataError, match=r"test: the label 'B-B' \(row 3, 1 such rows\)"):
        module(tmp_path, tiny_bert_dir).setup("fit")


def test_a_split_that_leaves_training_without_a_type_is_refused(tmp_path: Path, tiny_bert_dir: str) -> None:
    file = write_conll(tmp_path / "x.conll", ["a/B-A"] * 9 + ["a/B-RARE"])

    def outcome(seed: int) -> str:
        data = module(file, tiny_bert_dir, seed=seed)
        try:
            return str(data.labels)
        except DataError as error:
            return str(error).partition("label ")[2][:8]

    assert {outcome(seed) for seed in range(8)} == {"'B-RARE'", "['O', 'B-A', 'I-A', 'B-RARE', 'I-RARE']"}


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_lists_in_other_files_are_the_same_data(tmp_path: Path, tiny_bert_dir: str, ending: str) -> None:
    sentences = [f"the/O battery/B-A {'very/I-A ' * (i % 3)}good/O" for i in range(20)]
    conll = module(write_conll(tmp_path / "x.conll", sentences), tiny_bert_dir)
    rows = rows_of(*(tuple([pair.split("/")[i] for pair in s.split()] for i in (0, 1)) for s in sentences))
    file = tmp_path / f"x{ending}"
    rows.to_parquet(file) if ending == ".parquet" else rows.to_json(file)
    other = module(file, tiny_bert_dir)
    assert {k: list(v) for k, v in conll.splits.items()} == {k: list(v) for k, v in other.splits.items()}
