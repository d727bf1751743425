"""Targets of language models: completions of prompts, chats, plain texts, and pairs of a source and a target text.

The ``labels`` of the first three are the row's own tokens where they are to be learned, and IGNORED elsewhere; their
task is :class:`lightning_ft.CausalLM`. That of pairs is :class:`lightning_ft.Seq2SeqLM`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from datasets import Dataset

from lightning_ft.data.batching import pack
from lightning_ft.data.sources import DataError, check_column, check_rows, quiet_bars
from lightning_ft.data.targets import Columns, Facts, LabelKind, Target, check_texts, mapped

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

IGNORED = -100
"""The label of a token that isn't to be learned."""


# ------------------------------------------------------------------------------------------ tokens


class Fitted(NamedTuple):
    """A prompt and its completion, in tokens."""

    prompt: list[int]
    completion: list[int]


def fit(prompt: list[int], completion: int, limit: int, opening: int) -> tuple[list[int], int]:
    """Cut a prompt, and if need be its completion, to ``limit`` tokens in all.

    The prompt loses what is furthest from the completion, its beginning, but never more than leaves it half of
    ``limit``; what the completion then still has too much, it loses at its end.

    Args:
        prompt: its tokens.
        completion: how many tokens follow it.
        limit: how many both may have.
        opening: so many tokens a text begins with by itself (``<s>``): they stay.

    Returns:
        The prompt, and how many tokens of the completion are left.
    """
    room = max(limit - completion, min(len(prompt), limit // 2))
    cut = max(0, len(prompt) - room)
    kept = [*prompt[:opening], *prompt[opening + cut :]]
    return kept, max(0, min(completion, limit - len(kept)))


def continued(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], completions: Sequence[str]) -> list[Fitted]:
    """Prompts and completions in tokens, without special ones; a prompt has those that it has by itself.

    So it's the same where a completion is yet to be generated. The completion's are what the tokens of the whole have
    beyond that: many a tokenizer would begin a text by itself as if a space were before it. Where a token would reach
    over the seam, the completion too has the tokens that it has by itself.
    """
    heads, wholes = (
        tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        for texts in (list(prompts), [p + c for p, c in zip(prompts, completions, strict=True)])
    )
    return [
        Fitted(head, whole[len(head) :])
        if whole[: len(head)] == head and len(whole) > len(head)
        else Fitted(head, tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        for head, whole, text in zip(heads, wholes, completions, strict=True)
    ]


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer begins a text with."""
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    return whole[: next(i for i in range(len(whole) + 1) if whole[i : i + len(bare)] == bare)]


def end(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends a text.

    Raises:
        DataError: if there is none.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"The tokenizer of '{tokenizer.name_or_path}' has no eos_token, by which a model learns where a text ends."
            " Use a language model's tokenizer, or name the token in its tokenizer_config.json."
        )
    return int(tokenizer.eos_token_id)


def padded(rows: Sequence[Mapping[str, Any]], pad: int) -> dict[str, torch.Tensor]:
    """Encoded rows as a batch: (rows, tokens) each.

    Rows that are to be learned are padded on the right; prompts on the left, for generation goes on at the right.
    Packed rows have no ``attention_mask``: their ``position_ids`` tell what sees what.
    """
    longest, left = max(len(row["input_ids"]) for row in rows), "labels" not in rows[0]

    def together(values: Sequence[list[int]], fill: int) -> torch.Tensor:
        pads = [[fill] * (longest - len(value)) for value in values]
        return torch.tensor([[*p, *v] if left else [*v, *p] for p, v in zip(pads, values, strict=True)])

    fills = {"input_ids": pad, "labels": IGNORED, "position_ids": 0}
    batch = {key: together([row[key] for row in rows], fill) for key, fill in fills.items() if key in rows[0]}
    if "position_ids" not in batch:
        batch["attention_mask"] = together([[1] * len(row["input_ids"]) for row in rows], 0)
    return batch


# ------------------------------------------------------------------------------------------ targets


class LanguageTarget(Target):
    """What is to be learned is the row's own tokens, all or some.

    Args:
        packing: whether rows of training hold several short examples, up to the limit of tokens. Each has positions of
            its own, and sees itself alone. Rows of evaluation hold one.
    """

    label_kind: ClassVar[LabelKind | None] = "text"
    learns: ClassVar[str]

    def __init__(self, packing: bool = False) -> None:
        self.packing = packing

    def facts(self, rows: Dataset, columns: Columns, where: str) -> dict[str, Any]:
        """None: what a language model says is in its vocabulary."""
        return {}

    def describe(self, facts: Facts) -> str:
        """What is learned."""
        return self.learns

    def arranged(self, rows: Dataset, limit: int) -> Dataset:
        """Packed, where that is asked for: ``position_ids`` begin anew with each example."""
        if not self.packing:
            return rows

        def joined(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            lengths = batch["length"]
            bins = pack(lengths, limit)
            tokens = {key: [[t for i in b for t in batch[key][i]] for b in bins] for key in ("input_ids", "labels")}
            places = [[place for i in b for place in range(lengths[i])] for b in bins]
            return {**tokens, "position_ids": places, "length": [len(row) for row in places]}

        with quiet_bars(len(rows)):
            packed = rows.map(joined, batched=True, batch_size=10_000, remove_columns=rows.column_names, desc="packing")
        log.info(
            "%s examples are packed into %s rows of at most %s tokens", f"{len(rows):,}", f"{len(packed):,}", limit
        )
        return packed

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Makes a batch of encoded rows: see :func:`padded`."""
        return partial(padded, pad=tokenizer.pad_token_id or 0)


class Completions(LanguageTarget):
    """Completions of prompts, of which the completions alone are learned, and where they end.

    The prompt's tokens are those of ``template`` up to ``{completion}``, the white space right before that left out,
    which belongs to the completion: prompts are tokenised the same in training and for generation. Too long rows are
    cut by :func:`fit`.

    Args:
        template: how prompt and completion make a text; ends with ``{completion}``.
        new_tokens: how many tokens a prompt that is to be completed leaves room for.
        packing: see :class:`LanguageTarget`.

    Raises:
        ValueError: for a template without the two, each once.
    """

    learns = "completions are learned"

    def __init__(self, template: str = "{prompt} {completion}", new_tokens: int = 64, packing: bool = False) -> None:
        super().__init__(packing)
        head, *tail = template.split("{completion}")
        if head.count("{prompt}") != 1 or tail != [""]:
            raise ValueError(
                f"template must have {{prompt}} once and end with {{completion}}, as in '{{prompt}} {{completion}}'; it"
                f" is {template!r}."
            )
        self.head, self.new_tokens = head.rstrip(), new_tokens
        self.gap = head[len(self.head) :]

    def check(self, rows: Dataset, columns: Columns, where: str) -> None:
        """A prompt and a completion in each row, both texts."""
        check_texts(rows, columns, where)
        _check_texts(rows, "label", "completion", columns.label, where)

    def inputs(self, texts: Sequence[Any], tokenizer: PreTrainedTokenizerBase, limit: int) -> dict[str, list[Any]]:
        """Prompts to be completed."""
        start, prompts = opening(tokenizer), [self.head.replace("{prompt}", text) for text in texts]
        ids = tokenizer(prompts, add_special_tokens=False, verbose=False)["input_ids"]
        return {"input_ids": [fit([*start, *p], self.new_tokens, limit, len(start))[0] for p in ids]}

    def encode(
        self, rows: Dataset, columns: Columns, facts: Facts, tokenizer: PreTrainedTokenizerBase, limit: int
    ) -> Dataset:
        """Prompts and completions as one; a completion's end is the token that ends texts."""
        start, stop = opening(tokenizer), end(tokenizer)

        def encode(batch: dict[str, list[Any]], _: list[int]) -> dict[str, list[Any]]:
            prompts = [self.head.replace("{prompt}", text) for text in batch[columns.text]]
            pairs = continued(tokenizer, prompts, [self.gap + text for text in batch[columns.label]])
            whole = [Fitted([*start, *prompt], [*completion, stop]) for prompt, completion in pairs]
            cut = [fit(p, len(c), limit, len(start)) for p, c in whole]
            kept = [Fitted(p, c[:left]) for (p, left), (_, c) in zip(cut, whole, strict=True)]
            return _learned(
                [[*p, *c] for p, c in kept],
                [[*[False] * len(p), *[True] * len(c)] for p, c in kept],
                [len(p) + len(c) for p, c in whole],
            )

        return _whole(mapped(rows, encode), rows, columns.text, limit)


class Texts(LanguageTarget):
    """Texts that are learned whole, every token but the first, and where they end.

    Longer ones are cut into blocks, of which each begins with the last token of the one before: so every token is
    learned once, whatever the limit.
    """

    label_kind = None
    cuts = False

    learns = "whole texts are learned"

    def check(self, rows: Dataset, columns: Columns, where: str) -> None:
        """A text in each row."""
        check_texts(rows, columns, where)

    def inputs(self, texts: Sequence[Any], tokenizer: PreTrainedTokenizerBase, limit: int) -> dict[str, list[Any]]:
        """Texts to go on with: of longer ones the last half of the limit."""
        start = opening(tokenizer)
        ids = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return {"input_ids": [fit([*start, *text], limit, limit, len(start))[0] for text in ids]}

    def encode(
        self, rows: Dataset, columns: Columns, facts: Facts, tokenizer: PreTrainedTokenizerBase, limit: int
    ) -> Dataset:
        """Blocks of at most ``limit`` tokens, in the order of the texts."""
        start, stop = opening(tokenizer), end(tokenizer)
        if limit < 2:
            raise DataError(f"max_length={limit} leaves no token to learn behind another: give at least 2.")

        def encode(batch: dict[str, list[Any]], _: list[int]) -> dict[str, list[Any]]:
            ids = tokenizer(batch[columns.text], add_special_tokens=False, verbose=False)["input_ids"]
            whole = [[*start, *text, stop] for text in ids]
            blocks = [text[i : i + limit] for text in whole for i in range(0, len(text) - 1, limit - 1)]
            learned = _learned(blocks, [[True] * len(block) for block in blocks], [])
            return {key: learned[key] for key in ("input_ids", "labels")}

        return mapped(rows, encode)


class Chats(LanguageTarget):
    """Chats, of which the assistant's messages are learned. A row's text is a list of messages ``{role, content}``.

    A chat is written by the tokenizer's chat template. What of it is the assistant's is said by the template where it
    has ``{% generation %}``; else it's what each of the assistant's messages adds to those before it, and to the
    words by which the template asks for an answer. Longer chats lose their end.

    Args:
        chat_template: a template in Jinja, or a file that holds one; by default the tokenizer's own.
        system: a first message by ``system`` for chats that are to be answered.
        new_tokens: how many tokens a chat that is to be answered leaves room for.
        packing: see :class:`LanguageTarget`.
    """

    label_kind = None

    learns = "the assistant's messages are learned"

    def __init__(
        self, chat_template: str | None = None, system: str | None = None, new_tokens: int = 64, packing: bool = False
    ) -> None:
        super().__init__(packing)
        self.chat_template, self.system, self.new_tokens = chat_template, system, new_tokens

    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Give the tokenizer the template."""
        if self.chat_template is not None:
            given = self.chat_template
            is_file = "{" not in given and Path(given).expanduser().is_file()
            tokenizer.chat_template = Path(given).expanduser().read_text(encoding="utf-8") if is_file else given
        if not isinstance(tokenizer.chat_template, str):
            raise DataError(
                f"The tokenizer of '{tokenizer.name_or_path}' has no chat template: give one,"
                " data.target.chat_template=FILE (Jinja), or use a model that was made for chats."
            )

    def check(self, rows: Dataset, columns: Columns, where: str) -> None:
        """In each row messages with a role and a content, among them one by the assistant."""
        check_column(rows, "text", columns.text, where)
        check_rows(
            where, "chat ([{role, content}, ...], one by the assistant)", columns.text, rows[columns.text], _is_chat
        )

    def inputs(self, texts: Sequence[Any], tokenizer: PreTrainedTokenizerBase, limit: int) -> dict[str, list[Any]]:
        """Chats to be answered: a text is a first message by the user."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        chats = [[*first, {"role": "user", "content": text}] for text in texts]
        ids = [_tokens(tokenizer, chat, add_generation_prompt=True) for chat in chats]
        return {"input_ids": [fit(chat, self.new_tokens, limit, 0)[0] for chat in ids]}

    def encode(
        self, rows: Dataset, columns: Columns, facts: Facts, tokenizer: PreTrainedTokenizerBase, limit: int
    ) -> Dataset:
        """Chats as the template writes them, cut at the end."""
        by_template = re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.chat_template) is not None
        learn = by_generation_mask if by_template else by_prefixes

        def encode(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
            chats = zip(indices, batch[columns.text], strict=True)
            whole = [learn(tokenizer, chat, f"row {row + 1} ({_start(chat)})") for row, chat in chats]
            return _learned(
                [ids[:limit] for ids, _ in whole], [mine[:limit] for _, mine in whole], [len(ids) for ids, _ in whole]
            )

        return _whole(mapped(rows, encode), rows, columns.text, limit)


def by_generation_mask(
    tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, Any]], where: str
) -> tuple[list[int], list[bool]]:
    """A chat's tokens, and which are the assistant's by the template's ``{% generation %}``.

    Raises:
        DataError: if the template marks fewer messages than the assistant has.
    """
    marked: Any = tokenizer.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    mask = [bool(mine) for mine in marked["assistant_masks"]]
    runs = sum(mine and not before for before, mine in zip([False, *mask], mask, strict=False))
    turns = sum(message["role"] == "assistant" for message in chat)
    if runs != turns:
        raise DataError(
            f"{where}: the chat template marks {runs} stretches as the assistant's, who has {turns} messages: see its"
            " {% generation %}."
        )
    return list(marked["input_ids"]), mask


def by_prefixes(
    tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, Any]], where: str
) -> tuple[list[int], list[bool]]:
    """A chat's tokens, and which are the assistant's: what a message adds to the chat before it that asks for one.

    Raises:
        DataError: if the template writes the beginning of a chat otherwise when the chat goes on.
    """
    whole = _tokens(tokenizer, chat)
    mask = [False] * len(whole)
    for i, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        before, after = _tokens(tokenizer, chat[:i], add_generation_prompt=True), _tokens(tokenizer, chat[: i + 1])
        if whole[: len(after)] != after or after[: len(before)] != before:
            raise DataError(
                f"{where}: what of message {i + 1} is the assistant's can't be told, for the chat template writes the"
                " beginning of a chat otherwise when it goes on. Mark it in the template, {% generation %}..."
                "{% endgeneration %} around the assistant's words: data.target.chat_template=FILE."
            )
        mask[len(before) : len(after)] = [True] * (len(after) - len(before))
    return whole, mask


class Pairs(Target):
    """A target text for each source text. Its task is Seq2SeqLM. Both are cut at the end to the limit of tokens."""

    label_kind = "text"

    def check(self, rows: Dataset, columns: Columns, where: str) -> None:
        """Two texts in each row."""
        check_texts(rows, columns, where)
        _check_texts(rows, "label", "target text", columns.label, where)

    def facts(self, rows: Dataset, columns: Columns, where: str) -> dict[str, Any]:
        """None: what a language model says is in its vocabulary."""
        return {}

    def describe(self, facts: Facts) -> str:
        """What is learned."""
        return "target texts are learned"

    def encode(
        self, rows: Dataset, columns: Columns, facts: Facts, tokenizer: PreTrainedTokenizerBase, limit: int
    ) -> Dataset:
        """The source as the model's input, the target's tokens as ``labels``."""

        def encode(batch: dict[str, list[Any]], _: list[int]) -> dict[str, list[Any]]:
            labels = tokenizer(text_target=batch[columns.label], truncation=True, max_length=limit)["input_ids"]
            return {**self.inputs(batch[columns.text], tokenizer, limit), "labels": labels}

        return mapped(rows, encode)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Makes a batch; the target's tokens are there twice: as ``labels``, and as what the decoder is given."""
        return partial(_pairs, tokenizer)


def _pairs(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]) -> dict[str, Any]:
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

    if "labels" not in rows[0]:
        return dict(DataCollatorWithPadding(tokenizer)(rows))
    batch = dict(DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)(rows))
    return {**batch, "targets": batch["labels"]}


def _learned(ids: list[list[int]], mask: list[list[bool]], whole: list[int]) -> dict[str, list[Any]]:
    """Columns of rows: tokens, labels where ``mask`` says so, and how many tokens there were before they were cut."""
    labels = [
        [token if i and mine else IGNORED for i, (token, mine) in enumerate(zip(row, of_row, strict=True))]
        for row, of_row in zip(ids, mask, strict=True)
    ]  # nothing is before the first token of a text: packed, that of another would be
    return {"input_ids": ids, "labels": labels, "whole": whole}


def _whole(encoded: Dataset, rows: Dataset, text: str, limit: int) -> Dataset:
    """Say how many rows were cut; DataError if of one nothing is left to learn."""
    for i, labels in enumerate(encoded["labels"]):
        if all(label == IGNORED for label in labels):
            raise DataError(
                f"row {i + 1} ({_start(rows[i][text])}) has {encoded['whole'][i]:,} tokens, and in the first"
                f" {limit} is nothing to learn. Shorten or remove it, or allow more: data.max_length=..."
            )
    cut = sum(length > limit for length in encoded["whole"])
    if cut:
        log.warning("%s of %s rows are longer than %s tokens, and are cut.", f"{cut:,}", f"{len(rows):,}", limit)
    return encoded.remove_columns("whole")


def _tokens(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, Any]], **options: Any) -> list[int]:
    tokens: Any = tokenizer.apply_chat_template(
        chat, tokenize=True, return_dict=True, tokenizer_kwargs={"verbose": False}, **options
    )
    return list(tokens["input_ids"])


def _check_texts(rows: Dataset, option: str, kind: str, column: Any, where: str) -> None:
    check_column(rows, option, column, where)
    check_rows(where, kind, column, rows[column], lambda value: isinstance(value, str) and bool(value.strip()))


def _is_chat(value: Any) -> bool:
    messages = value if isinstance(value, list) else []
    texts = all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    )
    said = [m["content"].strip() for m in messages if m["role"] == "assistant"] if texts else []
    return bool(said) and all(said)


def _start(value: Any) -> str:
    text = value if isinstance(value, str) else str(value[0]["content"])
    return repr(text if len(text) <= 40 else f"{text[:40]}…")
