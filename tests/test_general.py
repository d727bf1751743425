"""General text: what is read, and what a model makes of it, against naive counts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from lightning_ft.general import (
    GENERAL_EN,
    GeneralTextError,
    agreement,
    collate,
    embed,
    embeddings,
    encode,
    evaluating,
    hidden_states,
    is_causal_lm,
    neighbours,
    perplexity,
    read_texts,
)

TEXTS = ["the battery is good", "it broke", "not bad and not great"]


def test_the_bundled_texts_are_two_hundred_different_sentences() -> None:
    texts = read_texts(GENERAL_EN)
    assert len(set(texts)) == len(texts) == 200
    assert all(text.endswith(".") and 4 <= len(text.split()) <= 30 for text in texts)


def test_texts_are_a_list_or_lines_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "lines.txt"
    file.write_text("one\n\n  two \n很好\n", encoding="utf-8")
    assert read_texts(file) == read_texts(str(file)) == ["one", "two", "很好"]
    assert read_texts(["a", " ", "b"]) == ["a", "b"]


def test_what_cannot_be_read_is_said_with_the_file_and_the_line(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text\nx\n")
    (tmp_path / "latin.txt").write_bytes(b"one\ntw\xf6\n")
    (tmp_path / "empty.txt").write_text("\n \n")
    wrong: dict[Any, str] = {
        "nothing.txt": "no file.*nothing.txt.*bundled:general_en", "bundled:other": "no file.*bundled:general_en",
        tmp_path / "rows.csv": "is a table", tmp_path / "latin.txt": "UTF-8.*line 2",
        tmp_path / "empty.txt": "no text", (): "empty",
    }  # fmt: skip
    for texts, message in wrong.items():
        with pytest.raises(GeneralTextError, match=message):
            read_texts(texts)
    with pytest.raises(GeneralTextError, match="tokenizer="):
        encode(["a"], tiny.bert(), None, 8)


def test_perplexity_is_that_of_each_token_alone(tiny_bert_dir: str) -> None:
    model = tiny.llama_lm(vocab_size=100)
    rows = encode(TEXTS, model, tiny_bert_dir, 32)
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor(row["input_ids"])
        for t in range(1, len(ids)):
            with torch.no_grad():
                total -= float(model(input_ids=ids[None, :t]).logits[0, -1].log_softmax(-1)[ids[t]])
            count += 1
    assert perplexity(model, rows, batch_size=2) == pytest.approx(math.exp(total / count), rel=1e-4)


@pytest.mark.parametrize("kind", [tiny.bert_classifier, tiny.distilbert_classifier, tiny.gpt2_classifier, tiny.t5])
def test_an_embedding_is_the_mean_of_a_text_alone(kind: Any, tiny_bert_dir: str) -> None:
    model = kind(vocab_size=100)
    rows = encode(TEXTS, model, tiny_bert_dir, 32)
    together = embeddings(model, rows, batch_size=3)
    for row, found in zip(rows, together, strict=True):
        with torch.no_grad():
            hidden = hidden_states(model, collate([row], torch.device("cpu")))[0].mean(0)
        torch.testing.assert_close(found, hidden / hidden.norm(), rtol=1e-4, atol=1e-5)
    assert embed(torch.ones(2, 3, 4), None).norm(dim=-1).tolist() == pytest.approx([1, 1])
    assert not is_causal_lm(model)
    assert is_causal_lm(tiny.llama_lm())
    assert is_causal_lm(tiny.gpt2())


def test_agreement_is_the_share_of_neighbours_that_stayed() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.nn.functional.normalize(torch.randn(30, 8, generator=generator), dim=1) for _ in range(2))
    near = [
        [set(sorted((j for j in range(30) if j != i), key=lambda j: -float(e[i] @ e[j]))[:5]) for i in range(30)]
        for e in (one, other)
    ]
    naive = sum(len(a & b) for a, b in zip(*near, strict=True)) / (30 * 5)
    assert agreement(neighbours(one, 5), neighbours(other, 5)) == pytest.approx(naive)
    assert agreement(neighbours(one, 5), neighbours(one, 5)) == 1.0


def test_modes_are_each_modules_own_afterwards() -> None:
    model = tiny.bert().train()
    model.encoder.eval()
    before = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == before
