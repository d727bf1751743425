"""The models that come with the package: small, whole, described, and good for what they're there for."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import lightning_ft
from lightning_ft.data.language import Completions
from lightning_ft.data.numbers import Grades
from lightning_ft.data.sources import read
from lightning_ft.data.targets import Classes, Columns, Several, check

MODELS = Path(lightning_ft.__file__).parent / "models"


@pytest.mark.parametrize("name", ["tiny_lm", "char_zh"])
def test_it_has_a_card_and_is_small(name: str) -> None:
    files = list((MODELS / name).iterdir())
    assert sum(file.stat().st_size for file in files) < 4 * 2**20
    card = (MODELS / name / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: ")
    assert f"examples/pretrain_{name}.py" in card


def test_the_language_model_has_learned_english_and_stops_at_ends() -> None:
    model = AutoModelForCausalLM.from_pretrained(MODELS / "tiny_lm").eval()
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "tiny_lm")
    rows = read("bundled:reviews_en")["test"]["text"][:40]  # which it has not seen
    losses, tokens = 0.0, 0
    for text in rows:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        with torch.no_grad():
            losses += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
        assert tokenizer.decode(ids[0], skip_special_tokens=True) == text
    assert math.exp(losses / tokens) < 0.1 * len(tokenizer), "guessing has as many as there are tokens"


def test_the_character_model_reads_a_character_as_a_token() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "char_zh")
    assert tokenizer.tokenize("电池太差了！") == list("电池太差了!")
    assert AutoModel.from_pretrained(MODELS / "char_zh").config.vocab_size == len(tokenizer)


def test_the_essays_have_grades_and_traits_and_share_no_text() -> None:
    splits = read("bundled:essay_grading")
    target = Several({"score": Grades(), "argument": Classes(), "language": Classes()})
    columns = Columns("text", {name: name for name in target.targets})
    facts = check(splits, target, columns, "essays")
    assert facts["tasks"]["score"]["grades"] == [1, 2, 3, 4, 5, 6]
    assert all(len(facts["tasks"][name]["labels"]) == 3 for name in ("argument", "language"))
    texts = [text for rows in splits.values() for text in rows["text"]]
    assert len(texts) == len(set(texts)) >= 300


def test_the_instructions_share_no_prompt() -> None:
    splits = read("bundled:instruct")
    check(splits, Completions("{prompt} {completion}"), Columns("prompt", "completion"), "instruct")
    prompts = [prompt for rows in splits.values() for prompt in rows["prompt"]]
    assert len(prompts) == len(set(prompts)) >= 300
    assert json.dumps(prompts).isascii()
