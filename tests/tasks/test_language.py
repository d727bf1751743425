"""Language models: loss and perplexity against naive loops, packing against rows alone, generation without padding."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import tiny
import torch
import words
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import BloomConfig, BloomForCausalLM

from lightning_ft import CausalLM, FineTuner, HeadOnly, InjectionError, LoRA, PromptTuning, Seq2SeqLM
from lightning_ft.data.batching import pack
from lightning_ft.data.language import IGNORED, padded
from lightning_ft.errors import UserError
from lightning_ft.tasks.language import check_packing, token_losses

MODELS: dict[str, Callable[..., Any]] = {
    "llama": tiny.llama_lm, "gpt2": partial(tiny.gpt2, n_positions=32), "mistral": tiny.mistral_lm,
    "gemma3": tiny.gemma3_lm, "gpt_neox": tiny.gpt_neox,
}  # fmt: skip
"""Causal language models; two of them see a window of tokens."""


def task(**more: Any) -> CausalLM:
    return CausalLM(words.sentence_piece(), **more)


def example_rows(count: int = 9, longest: int = 9, seed: int = 3) -> list[dict[str, list[int]]]:
    """Rows of uneven length; of each the end is learned, and never the first token."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        ids = torch.randint(3, 40, (2 + i * 5 % (longest - 1),), generator=generator).tolist()
        prompt = 1 + i % (len(ids) - 1)
        rows.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]})
    return rows


def inputs_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in batch.items() if key != "labels"}


@torch.no_grad()
def naive(model: Any, rows: list[dict[str, list[int]]]) -> tuple[list[float], list[bool]]:
    """-log p of each learned token, and whether it's the likeliest: token by token, in plain maths."""
    losses, hits = [], []
    for row in rows:
        for i, label in enumerate(row["labels"]):
            if label != IGNORED:
                logits = model(input_ids=torch.tensor([row["input_ids"][:i]])).logits[0, -1].double().tolist()
                losses.append(math.log(sum(math.exp(x) for x in logits)) - logits[label])
                hits.append(max(range(len(logits)), key=logits.__getitem__) == label)
    return losses, hits


# ---------------------------------------------------------------------- loss and scores


@torch.no_grad()
def test_the_loss_is_the_mean_over_learned_tokens() -> None:
    model, rows = tiny.llama_lm(), example_rows()
    batch = padded(rows, pad=0)
    losses, _ = naive(model, rows)
    assert task().count(batch["labels"]) == len(losses)
    loss = task().loss(task().outputs(model, inputs_of(batch)), batch["labels"])
    assert float(loss) == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert float(loss) == pytest.approx(float(model(**batch).loss), rel=1e-5), "as transformers has it"


def test_the_loss_is_computed_in_fp32_and_without_labels_is_0() -> None:
    logits = torch.randn(2, 3, 5, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.tensor([[IGNORED, 1, 2], [IGNORED, IGNORED, 4]])
    losses, _ = token_losses(logits, labels)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, -logits.float().log_softmax(-1)[labels != IGNORED, [1, 2, 4]])
    nothing = task().loss(logits, torch.full_like(labels, IGNORED))
    nothing.backward()
    assert float(nothing.detach()) == 0.0


@pytest.mark.parametrize("stage", ["val", "test"])
def test_scores_are_those_of_all_tokens_however_they_are_batched(stage: str) -> None:
    model, rows = tiny.llama_lm(), example_rows(14)
    losses, hits = naive(model, rows)
    module = FineTuner(model, task(generations=0))
    run = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    evaluate = run.validate if stage == "val" else run.test
    [scores] = evaluate(module, DataLoader(rows, batch_size=4, collate_fn=partial(padded, pad=0)), verbose=False)
    mean = sum(losses) / len(losses)
    assert scores == {
        f"{stage}/loss": pytest.approx(mean, rel=1e-5),
        f"{stage}/perplexity": pytest.approx(math.exp(mean), rel=1e-5),
        f"{stage}/token_accuracy": pytest.approx(sum(hits) / len(hits)),
    }


def test_stages_count_apart_and_anew_after_a_reset() -> None:
    scored, logits = task(), torch.randn(1, 3, 5)
    labels = torch.tensor([[IGNORED, 1, 2]])
    scored.update("val", logits, labels)
    scored.update("test", torch.zeros(1, 3, 5), labels)
    assert float(scored.scores("test")["perplexity"]) == pytest.approx(5.0)
    scored.reset("val")
    scored.update("val", torch.zeros(1, 3, 5), labels)
    assert float(scored.scores("val")["perplexity"]) == pytest.approx(5.0)


# ---------------------------------------------------------------------- packing


def packed(rows: list[dict[str, list[int]]], limit: int = 16) -> dict[str, Tensor]:
    bins = pack([len(row["input_ids"]) for row in rows], limit)
    assert len(bins) < len(rows)
    joined = [
        {
            "input_ids": [t for i in b for t in rows[i]["input_ids"]],
            "labels": [t for i in b for t in rows[i]["labels"]],
            "position_ids": [p for i in b for p in range(len(rows[i]["input_ids"]))],
        }
        for b in bins
    ]
    return padded(joined, pad=0)


def loss_and_gradients(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = task().loss(task().outputs(model, inputs_of(batch)), batch["labels"])
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_loss_and_gradients_are_those_of_rows_alone(name: str, attention: str) -> None:
    model = MODELS[name](attn_implementation=attention)
    LoRA(r=4, target_modules="all-linear").inject(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    rows = example_rows()
    loss, gradients = loss_and_gradients(model, padded(rows, pad=0))
    same, also = loss_and_gradients(model, packed(rows))
    assert float(same) == pytest.approx(float(loss), rel=1e-5)
    assert gradients.keys() == also.keys()
    assert gradients
    for key, gradient in gradients.items():
        torch.testing.assert_close(also[key], gradient, atol=1e-5, rtol=1e-5, msg=key)


def test_a_model_that_mixes_packed_examples_is_refused() -> None:
    batch = packed(example_rows())
    prompted = tiny.llama_lm()
    PromptTuning(num_virtual_tokens=2, prompt_tuning_init="RANDOM").inject(prompted)
    bloom = tiny.seeded(BloomForCausalLM, tiny.small(BloomConfig, hidden_size=16, n_layer=2, n_head=2))
    for model in (prompted, bloom):
        with pytest.raises(UserError, match=r"[Pp]acked"):
            task().outputs(model, inputs_of(batch))


def test_the_question_whether_a_model_packs_leaves_no_trace() -> None:
    model = tiny.gpt2(resid_pdrop=0.5, embd_pdrop=0.5).train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    check_packing(model, torch.arange(1, 9)[None])
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


# ---------------------------------------------------------------------- generation


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_prompts_in_a_batch_are_completed_as_each_alone(name: str) -> None:
    model, completing = MODELS[name](), task(max_new_tokens=6)
    prompts = [row["input_ids"] for row in example_rows(5)]
    together = completing.predict(model, padded([{"input_ids": prompt} for prompt in prompts], pad=0))
    alone = [
        completing.text(
            model.generate(torch.tensor([p]), max_new_tokens=6, do_sample=False, pad_token_id=0)[0, len(p) :].tolist()
        )
        for p in prompts
    ]
    assert len({*alone}) > 1
    assert [row["completion"] for row in together] == alone


def test_of_rows_with_labels_what_is_before_the_last_learned_tokens_is_completed() -> None:
    model, completing, rows = tiny.llama_lm(), task(max_new_tokens=3), example_rows(5)
    prompts = [{"input_ids": row["input_ids"][: row["labels"].count(IGNORED)]} for row in rows[1:]]
    expected = completing.predict(model, padded(prompts, pad=0))
    assert completing.predict(model, padded(rows[1:], pad=0))[2:] == expected[2:]


def test_generation_ends_at_any_of_the_ends_and_a_strange_one_is_refused() -> None:
    model = tiny.llama_lm(eos_token_id=[7, 8])
    assert task(stop=["c"]).ends(model) == sorted({7, 8, 2, words.sentence_piece().get_vocab()["c"]})
    with pytest.raises(UserError, match=r"no token '<\|im_end\|>'"):
        task(stop=["<|im_end|>"]).ends(model)


def test_sampling_is_passed_on() -> None:
    model, prompt = tiny.llama_lm(), padded([{"input_ids": [5, 6]}], pad=0)
    texts = set()
    for seed in range(5):
        torch.manual_seed(seed)
        texts.add(task(sampling={"do_sample": True, "temperature": 5.0}).predict(model, prompt)[0]["completion"])
    assert len(texts) > 1


@pytest.mark.parametrize("batch_size", [2, 9])
def test_some_rows_are_shown_with_what_is_generated_for_them(tmp_path: Path, batch_size: int) -> None:
    rows = example_rows()
    module = FineTuner(tiny.gpt2(n_positions=9), task(generations=3))  # no more places than the longest row has
    logger = CSVLogger(tmp_path)
    run = L.Trainer(accelerator="cpu", logger=logger, enable_progress_bar=False, enable_model_summary=False)
    loader = DataLoader(rows, batch_size=batch_size, collate_fn=partial(padded, pad=0))
    for evaluate, name in ((run.validate, "val_generations.csv"), (run.test, "test_generations.csv")):
        evaluate(module, loader, verbose=False)
        with (Path(logger.log_dir) / name).open(newline="", encoding="utf-8") as file:
            columns, *shown = csv.reader(file)
        assert columns == ["prompt", "generated", "reference"]
        assert len(shown) == 3
    assert module.task.tables("test") == {}, "nothing is kept"


def test_numbers_out_of_range_are_refused() -> None:
    for wrong in ({"max_new_tokens": 0}, {"generations": -1}, {"generations": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            task(**wrong)


# ---------------------------------------------------------------------- the model


def test_an_encoder_is_refused(tiny_bert_dir: str) -> None:
    with pytest.raises(UserError, match=r"is an encoder \(BertLMHeadModel\).*model\.name"):
        task().build(tiny_bert_dir)


def test_the_pretrained_head_is_frozen_and_alone_there_is_none_to_train(tmp_path: Path) -> None:
    module = FineTuner(words.llama(tmp_path), task())
    LoRA(r=2, target_modules="all-linear").inject(module)
    assert {name.rpartition(".")[2] for name, p in module.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    with pytest.raises(InjectionError, match=r"nothing .*to train.*modules_to_save"):
        HeadOnly().inject(FineTuner(words.llama(tmp_path), task()))
    lm_head = FineTuner(words.llama(tmp_path), task())
    HeadOnly(modules_to_save=["lm_head"]).inject(lm_head)
    assert {name for name, p in lm_head.named_parameters() if p.requires_grad} == {"model.lm_head.weight"}


def test_two_models_are_compared_by_few_enough_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_ft.tasks.language.COMPARED", 4 * 5 * 3)
    logits = torch.randn(4, 9, 5)
    values = task().values(logits)
    assert torch.equal(values, logits[:, [1, 4, 7]].softmax(-1))


# ---------------------------------------------------------------------- sources and targets


def pairs() -> list[dict[str, list[int]]]:
    return [
        {"input_ids": [5, 6, 7, 2], "attention_mask": [1] * 4, "labels": [9, 10, 2]},
        {"input_ids": [8, 2], "attention_mask": [1] * 2, "labels": [11, 12, 13, 14, 2]},
        {"input_ids": [8, 5, 2], "attention_mask": [1] * 3, "labels": [3, 2]},
    ]


def pair_batches(size: int) -> Iterator[dict[str, Any]]:
    from lightning_ft.data.language import Pairs

    collate = Pairs().collator(words.t5_like())
    return (collate(pairs()[i : i + size]) for i in range(0, 3, size))


@torch.no_grad()
def test_an_encoder_decoders_loss_is_its_own() -> None:
    model, answering = tiny.t5(), Seq2SeqLM(words.t5_like())
    (batch,) = pair_batches(3)
    loss = answering.loss(answering.outputs(model, inputs_of(batch)), batch["labels"])
    alone = [
        float(model(input_ids=torch.tensor([p["input_ids"]]), labels=torch.tensor([p["labels"]])).loss) for p in pairs()
    ]
    counts = [len(p["labels"]) for p in pairs()]
    assert answering.count(batch["labels"]) == sum(counts)
    assert float(loss) == pytest.approx(sum(a * n for a, n in zip(alone, counts, strict=True)) / sum(counts), rel=1e-5)


def test_exact_match_is_the_share_of_rows_that_are_answered_as_they_should() -> None:
    model, answering = tiny.t5(), Seq2SeqLM(words.t5_like(), max_new_tokens=6, exact_match=True)
    (batch,) = pair_batches(3)
    said = [row["completion"] for row in answering.predict(model, inputs_of(batch))]
    rows = pairs()
    rows[1]["labels"] = words.t5_like()(said[1])["input_ids"]  # one that it gets right
    expected = sum(answering.text(row["labels"]) == text for row, text in zip(rows, said, strict=True)) / 3
    assert expected >= 1 / 3
    from lightning_ft.data.language import Pairs

    module = FineTuner(model, answering)
    run = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    loader = DataLoader(rows, batch_size=2, collate_fn=Pairs().collator(words.t5_like()))
    [scores] = run.test(module, loader, verbose=False)
    assert scores["test/exact_match"] == pytest.approx(expected)
    [scores] = run.validate(module, loader, verbose=False)
    assert set(scores) == {"val/loss", "val/perplexity", "val/token_accuracy"}


def test_sources_in_a_batch_are_answered_as_each_alone() -> None:
    model, answering = tiny.t5(), Seq2SeqLM(words.t5_like(), max_new_tokens=6)
    (batch,) = pair_batches(3)
    together = answering.predict(model, inputs_of(batch))
    assert together == [row for one in pair_batches(1) for row in answering.predict(model, inputs_of(one))]


@pytest.mark.parametrize("kind", [tiny.llama_lm, tiny.gpt2, tiny.opt, tiny.mistral_lm])
def test_the_loss_in_training_is_that_of_the_logits_which_never_exist(kind: Any) -> None:
    model, task = kind(), CausalLM("unused", generations=0)
    ids = torch.randint(1, 12, (3, 8))
    labels = ids.masked_fill(torch.rand(3, 8) < 0.4, IGNORED)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    wanted = task.loss(task.outputs(model, inputs), labels)
    widths: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _, __, out: widths.append(out.shape[1]))
    ours = task.training_loss(model, {**inputs, "labels": labels})
    assert set(widths) == {1}
    torch.testing.assert_close(ours, wanted)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for mine, other in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(wanted, parameters), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_a_model_that_caps_its_logits_keeps_them() -> None:
    model, task = tiny.gemma3_lm(final_logit_softcapping=2.0), CausalLM("unused", generations=0)
    ids = torch.randint(1, 12, (3, 8))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    state = torch.get_rng_state()
    ours = task.training_loss(model, {**inputs, "labels": ids})
    assert torch.equal(torch.get_rng_state(), state)  # looking drew nothing, so that a resumed run goes on the same
    torch.testing.assert_close(ours, task.loss(model(**inputs).logits, ids))
