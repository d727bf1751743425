"""Targets of language models: what is learned of a row, to the token, by tokenizers of several kinds."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import words
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from lightning_ft.data.batching import pack
from lightning_ft.data.language import IGNORED, Chats, Completions, Pairs, Texts, continued, fit, opening, padded
from lightning_ft.data.module import TextDataModule
from lightning_ft.data.sources import DataError
from lightning_ft.data.targets import Columns, Target

COLUMNS = Columns("prompt", "completion")
ROWS = Dataset.from_dict({"prompt": words.PROMPTS, "completion": words.COMPLETIONS})


@pytest.fixture(params=words.KINDS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return words.KINDS[request.param]()


def encoded(target: Target, rows: Dataset, tokenizer: Any, limit: int = 32, columns: Columns = COLUMNS) -> list[Any]:
    return target.encode(rows, columns, {}, tokenizer, limit).to_list()


def learned(row: dict[str, Any]) -> list[int]:
    """The tokens that are learned; each is the row's own at its place."""
    assert all(label in (IGNORED, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))
    return [label for label in row["labels"] if label != IGNORED]


# ---------------------------------------------------------------------- completions


@pytest.mark.parametrize("template", ["{prompt} {completion}", "Q: {prompt}\nA:\n{completion}", "{prompt}{completion}"])
def test_the_completion_alone_is_learned_and_where_it_ends(tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    target = Completions(template, new_tokens=1)
    rows = encoded(target, ROWS, tokenizer, limit=200)
    prompts = target.inputs(words.PROMPTS, tokenizer, 200)["input_ids"]
    for row, prompt, completion in zip(rows, prompts, words.COMPLETIONS, strict=True):
        *said, last = learned(row)
        assert row["input_ids"] == [*prompt, *said, last], "the prompt is tokenised as it is for generation"
        assert last == tokenizer.eos_token_id
        assert row["length"] == len(row["input_ids"])
        plain = tokenizer.decode(tokenizer(completion, add_special_tokens=False)["input_ids"])
        if template != "{prompt}{completion}":
            assert tokenizer.decode(said).strip() == plain.strip()


def test_a_text_begins_as_the_tokenizer_begins_one_and_has_no_end_in_its_middle(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    special = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    begins = [token for token in tokenizer("cat")["input_ids"] if token in special - {tokenizer.eos_token_id}]
    assert opening(tokenizer) == begins
    for row in encoded(Completions(), ROWS, tokenizer):
        assert row["input_ids"][: len(begins)] == begins
        assert not special & {*row["input_ids"][len(begins) : -1]}


def test_the_whole_is_tokenised_as_one_text_where_no_token_reaches_over_the_seam() -> None:
    """A sentence piece's own space isn't doubled, and a byte-level one stays with its word."""
    for make in words.KINDS.values():
        tokenizer = make()
        for row, prompt, completion in zip(
            encoded(Completions(), ROWS, tokenizer), words.PROMPTS, words.COMPLETIONS, strict=True
        ):
            whole = tokenizer(f"{prompt} {completion}", add_special_tokens=False)["input_ids"]
            assert row["input_ids"] == [*opening(tokenizer), *whole, tokenizer.eos_token_id]


def test_a_token_that_would_reach_over_the_seam_is_not_made() -> None:
    tokenizer = words.byte_level()
    (pair,) = continued(tokenizer, ["the d"], ["og ran"])
    assert pair.prompt == tokenizer("the d")["input_ids"]
    assert tokenizer("the dog ran")["input_ids"][: len(pair.prompt)] != pair.prompt
    assert tokenizer.decode([*pair.prompt, *pair.completion]) == "the dog ran"


def test_cutting_keeps_the_end_of_the_prompt_and_the_beginning_of_the_completion() -> None:
    generator = random.Random(0)
    for _ in range(500):
        start, size, completion = generator.randrange(3), generator.randrange(1, 40), generator.randrange(1, 40)
        limit = generator.randrange(8, 40)
        prompt = list(range(start + size))
        kept, left = fit(prompt, completion, limit, start)
        assert len(kept) + left == min(limit, len(prompt) + completion), "no room is wasted"
        tail = len(kept) - start
        assert kept == prompt[:start] + prompt[len(prompt) - tail :]
        assert left >= 1
        if left < completion:  # the prompt has given what it must
            assert len(kept) == min(len(prompt), limit // 2)
        if len(kept) < len(prompt):  # and nothing more than it had to
            assert len(kept) == max(limit - completion, limit // 2)


def test_long_rows_are_cut_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = words.sentence_piece()
    rows = Dataset.from_dict({"prompt": ["the cat " * 20, "the cat"], "completion": ["sat", "sat"]})
    long, short = encoded(Completions(), rows, tokenizer, limit=12)
    assert (len(long["input_ids"]), long["input_ids"][0]) == (12, tokenizer.bos_token_id)
    assert learned(long) == learned(short)
    assert "1 of 2 rows are longer than 12 tokens, and are cut" in caplog.text
    (prompt,) = Completions(new_tokens=4).inputs(["the cat " * 20], tokenizer, 12)["input_ids"]
    assert (len(prompt), prompt[0]) == (8, tokenizer.bos_token_id)


@pytest.mark.parametrize(
    "template", ["{prompt}", "{completion}", "{prompt} {completion}.", "{prompt}{prompt}{completion}"]
)
def test_a_template_without_the_two_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match=r"once and end with \{completion\}"):
        Completions(template)


def test_a_tokenizer_without_an_end_is_refused(tiny_bert_dir: str) -> None:
    from transformers import AutoTokenizer

    with pytest.raises(DataError, match=r"has no eos_token"):
        encoded(Completions(), ROWS, AutoTokenizer.from_pretrained(tiny_bert_dir))


# ---------------------------------------------------------------------- plain texts


@pytest.mark.parametrize("limit", [2, 3, 7, 200])
def test_of_a_text_every_token_but_the_first_is_learned_once(tokenizer: PreTrainedTokenizerFast, limit: int) -> None:
    text = " ".join(words.SENTENCES)
    rows = encoded(Texts(), Dataset.from_dict({"text": [text]}), tokenizer, limit, Columns("text", None))
    whole = [*opening(tokenizer), *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert [token for row in rows for token in learned(row)] == whole[1:]
    for row in rows:
        assert 2 <= len(row["input_ids"]) <= limit
        assert row["labels"] == [IGNORED, *row["input_ids"][1:]]


# ---------------------------------------------------------------------- chats

CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "two and two?"}, {"role": "assistant", "content": "four"}],
    [
        {"role": "system", "content": "the cat"},
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "one and one"},
    ],
]
OF_CHATS = Columns("messages", None)


def chat_tokenizer(template: str = words.CHATML) -> PreTrainedTokenizerFast:
    tokenizer = words.byte_level()
    Chats(template).prepare(tokenizer)
    return tokenizer


def test_of_a_chat_the_assistants_words_and_their_end_are_learned() -> None:
    tokenizer = chat_tokenizer()
    rows = encoded(Chats(), Dataset.from_dict({"messages": CHATS}), tokenizer, 400, OF_CHATS)
    assert [tokenizer.decode(learned(row)) for row in rows] == [" four<|end|>", " two<|end|> one and one<|end|>"]
    for row, chat in zip(rows, CHATS, strict=True):
        assert tokenizer.decode(row["input_ids"]) == tokenizer.apply_chat_template(chat, tokenize=False)


def test_without_a_mask_they_are_what_each_message_adds() -> None:
    bare = words.CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    one, other = (
        encoded(Chats(), Dataset.from_dict({"messages": CHATS}), chat_tokenizer(template), 400, OF_CHATS)
        for template in (words.CHATML, bare)
    )
    for row, (marked, chat) in zip(other, zip(one, CHATS, strict=True), strict=True):
        assert learned(row) == learned(marked), chat


def test_a_chat_to_be_answered_begins_as_one_that_was() -> None:
    tokenizer = chat_tokenizer()
    (row,) = encoded(Chats(), Dataset.from_dict({"messages": CHATS[:1]}), tokenizer, 400, OF_CHATS)
    (prompt,) = Chats(new_tokens=4).inputs(["two and two?"], tokenizer, 400)["input_ids"]
    assert row["labels"][: len(prompt)] == [IGNORED] * len(prompt)
    assert row["input_ids"][: len(prompt)] == prompt
    (with_system,) = Chats(system="the cat", new_tokens=4).inputs(["one?"], tokenizer, 400)["input_ids"]
    assert tokenizer.decode(with_system) == "<|system|> the cat<|user|> one?<|assistant|>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{{ messages | length }}{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}",
            "message 2.*otherwise",
        ),
        (
            "{{ messages[0].content }}{% if not messages %}{% generation %}{% endgeneration %}{% endif %}",
            "marks 0 .* 1 messages",
        ),
    ],
    ids=["not a beginning", "nothing marked"],
)
def test_where_it_cannot_be_told_what_is_the_assistants_the_row_is_named(template: str, message: str) -> None:
    rows = Dataset.from_dict({"messages": CHATS[:1]})
    with pytest.raises(DataError, match=rf"^row 1 \(.*two and two.*{message}"):
        encoded(Chats(), rows, chat_tokenizer(template), 400, OF_CHATS)


def test_a_chat_of_which_nothing_is_left_to_learn_is_named() -> None:
    rows = Dataset.from_dict({"messages": [CHATS[0], [{"role": "user", "content": "cat " * 90}, CHATS[0][1]]]})
    with pytest.raises(DataError, match=r"^row 2 \(.*cat cat.*first 60 is nothing to learn.*data\.max_length"):
        encoded(Chats(), rows, chat_tokenizer(), 60, OF_CHATS)


def test_a_chat_template_is_needed_and_may_be_a_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no chat template.*data\.target\.chat_template"):
        Chats().prepare(words.byte_level())
    (tmp_path / "chat.jinja").write_text(words.CHATML)
    tokenizer = words.byte_level()
    Chats(str(tmp_path / "chat.jinja")).prepare(tokenizer)
    assert tokenizer.chat_template == words.CHATML


# ---------------------------------------------------------------------- pairs


def test_a_pair_is_a_source_and_a_target_as_the_tokenizer_has_them() -> None:
    tokenizer = words.t5_like()
    rows = encoded(Pairs(), ROWS, tokenizer)
    for row, source, text in zip(rows, words.PROMPTS, words.COMPLETIONS, strict=True):
        assert row["input_ids"] == tokenizer(source)["input_ids"]
        assert row["labels"] == tokenizer(text)["input_ids"]
        assert row["labels"][-1] == tokenizer.eos_token_id
    batch = Pairs().collator(tokenizer)([{k: v for k, v in row.items() if k != "length"} for row in rows])
    assert batch["targets"] is batch["labels"]
    assert [[i for i in row if i != IGNORED] for row in batch["labels"].tolist()] == [row["labels"] for row in rows]
    assert set(Pairs().collator(tokenizer)([{"input_ids": [3, 2]}])) == {"input_ids", "attention_mask"}


# ---------------------------------------------------------------------- batches and packing


def test_rows_are_padded_behind_what_is_learned_and_before_what_is_to_be_completed() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}, {"input_ids": [8], "labels": [IGNORED]}]
    batch = padded(rows, pad=9)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 9]],
        "labels": [[IGNORED, 6, 7], [IGNORED] * 3],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
    }
    prompts = padded([{"input_ids": row["input_ids"]} for row in rows], pad=9)
    assert {key: value.tolist() for key, value in prompts.items()} == {
        "input_ids": [[5, 6, 7], [9, 9, 8]],
        "attention_mask": [[1, 1, 1], [0, 0, 1]],
    }


def test_bins_hold_every_row_once_and_are_few() -> None:
    generator = random.Random(0)
    for rows, limit in ((0, 10), (1, 10), (300, 64), (1000, 512)):
        lengths = [generator.randint(1, limit) if rows < 500 else generator.randint(1, limit // 4) for _ in range(rows)]
        bins = pack(lengths, limit)
        assert sorted(row for rows_of in bins for row in rows_of) == list(range(rows))
        assert all(sum(lengths[row] for row in rows_of) <= limit for rows_of in bins)
        least = max(-(-sum(lengths) // limit), sum(2 * length > limit for length in lengths))
        assert len(bins) <= 11 / 9 * least + 1


def test_packed_rows_are_the_examples_with_places_from_0() -> None:
    tokenizer, target = words.sentence_piece(), Completions(packing=True)
    rows = target.encode(ROWS, COLUMNS, {}, tokenizer, 40)
    packed = target.arranged(rows, 40).to_list()
    assert len(packed) < len(rows)
    found = []
    for row in packed:
        assert row["length"] == len(row["input_ids"]) <= 40
        starts = [i for i, place in enumerate(row["position_ids"]) if place == 0]
        for start, stop in zip(starts, [*starts[1:], row["length"]], strict=True):
            assert row["position_ids"][start:stop] == list(range(stop - start))
            found.append((row["input_ids"][start:stop], row["labels"][start:stop]))
    assert sorted(found) == sorted((row["input_ids"], row["labels"]) for row in rows.to_list())


def test_only_training_is_packed_and_not_behind_virtual_tokens(tmp_path: Path) -> None:
    model = words.llama(tmp_path / "model")
    ROWS.select([0, 1, 2, 3] * 10).to_json(tmp_path / "data.jsonl")

    def data() -> TextDataModule:
        target = Completions(packing=True)
        return TextDataModule(tmp_path / "data.jsonl", model, text="prompt", label="completion", target=target)

    whole = data()
    assert set(next(iter(whole.train_dataloader()))) == {"input_ids", "labels", "position_ids"}
    assert set(next(iter(whole.val_dataloader()))) == {"input_ids", "labels", "attention_mask"}
    behind = data()
    behind.reserved = 4
    with pytest.raises(DataError, match=r"4 virtual tokens.*packing=false"):
        behind.setup("fit")


# ---------------------------------------------------------------------- what can't be learned


@pytest.mark.parametrize(
    ("target", "rows", "message"),
    [
        (Completions(), {"text": ["a", "b"], "label": ["c", " "]}, "row 2 has no completion in column 'label'"),
        (
            Completions(),
            {"text": ["a", "b"], "label": [3, 4]},
            "row 1 has 3, which is no completion, in column 'label'",
        ),
        (Completions(), {"text": ["", "b"], "label": ["c", "d"]}, "row 1 has no text in column 'text'"),
        (Completions(), {"text": ["a"], "answer": ["c"]}, r"no column 'label'.*text, answer.*data\.label"),
        (Texts(), {"text": ["a", None]}, "row 2 has no text in column 'text'"),
        (Pairs(), {"text": ["a"], "label": [""]}, "row 1 has no target text in column 'label'"),
        (Chats(), {"text": [CHATS[0], CHATS[0][:1]]}, "row 2 has .*two and two.*no chat .*by the assistant.*'text'"),
        (Chats(), {"text": ["hello"]}, "row 1 has 'hello', which is no chat"),
    ],
    ids=[
        "empty completion",
        "number",
        "empty prompt",
        "no column",
        "no text",
        "empty target",
        "nobody answers",
        "text",
    ],
)
def test_bad_rows_are_named(target: Target, rows: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(DataError, match=rf"^a\.jsonl, train: .*{message}"):
        target.check(Dataset.from_dict(rows), Columns("text", "label"), "a.jsonl, train")
