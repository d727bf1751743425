"""Tiny tokenizers of three kinds, trained on some sentences, and tiny language models that read with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "the cat sat on the mat", "the dog ran to the cat", "a bird sang in the tree", "two and two is four",
    "one and two is three", "what is two and one?", "where is the dog?", "the dog is in the house.",
]  # fmt: skip
PROMPTS = ["what is two and one?", "where is the dog?", "two and two", "the cat"]
COMPLETIONS = ["three", "the dog is in the house.", "is four, not three", "sat"]


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2's: begins texts with nothing, and a space belongs to the word behind it."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>", model_max_length=32)


def sentence_piece() -> PreTrainedTokenizerFast:
    """As Llama's: begins texts with <s>, and as if a space were before them."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>"]
    made.train_from_iterator(
        [*(word for sentence in SENTENCES for word in sentence.split()), "\n"],
        trainers.BpeTrainer(vocab_size=80, special_tokens=special, show_progress=False),
    )
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=32
    )


def word_piece() -> PreTrainedTokenizerFast:
    """As BERT's: [CLS] before a text and [SEP] behind it."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(cleanup=False)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    made.train_from_iterator(
        SENTENCES, trainers.WordPieceTrainer(vocab_size=80, special_tokens=special, show_progress=False)
    )
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", eos_token="[SEP]",
        model_max_length=32,
    )  # fmt: skip


def t5_like() -> PreTrainedTokenizerFast:
    """Sources and targets end with </s>."""
    made = sentence_piece()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    made.pad_token = "<unk>"
    return made


KINDS: dict[str, Any] = {"bytes": byte_level, "pieces": sentence_piece, "words": word_piece}

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %} {{ m.content }}"
    "{{ eos_token }}{% endgeneration %}{% else %} {{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> str:
    """A folder as a pretrained model has it."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def llama(folder: Path) -> str:
    """A folder with a tiny Llama that reads sentence pieces."""
    tokenizer = sentence_piece()
    return save(
        tiny.llama_lm(vocab_size=len(tokenizer), eos_token_id=2, bos_token_id=1, pad_token_id=None), tokenizer, folder
    )
