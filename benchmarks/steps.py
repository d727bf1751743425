"""W1 to W4: the forward and backward pass of a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import peft
import torch
from torch import Tensor, nn

from benchmarks.measure import LIMIT, PEER, Case, Step
from benchmarks.models import OF_BERT, OF_LLAMA, Size, bert, gradient_difference, limit, llama, pair
from lightning_ft import IA3, AdaLoRA, CausalLM, LoRA, PromptTuning
from lightning_ft.tasks.language import IGNORED

HEAD = ["classifier"]
OURS_WITH_ITS_LOSS, LIMIT_WITH_ITS_LOSS = "ours, loss of transformers", f"{LIMIT}, loss of transformers"


def encoder(size: Size) -> Iterator[Case]:
    """W1: methods on a MiniLM."""
    yield from _lora_of_encoder(size, size.rows, size.tokens, opt_in=True)
    base, loss = bert(size), _classification(size, size.rows, size.tokens)
    shared: dict[str, Any] = {"target_modules": OF_BERT, "modules_to_save": HEAD}
    for name, method, settings in (
        ("DoRA", LoRA(r=8, target_modules=OF_BERT, use_dora=True), peft.LoraConfig(r=8, lora_alpha=16, use_dora=True,
                                                                                **shared)),
        ("AdaLoRA", AdaLoRA(target_modules=OF_BERT, total_step=100),
         peft.AdaLoraConfig(init_r=12, target_r=8, lora_alpha=32, lora_dropout=0.0, total_step=100, **shared)),
        ("IA3", IA3(), peft.IA3Config(target_modules=["key", "value", "output.dense"],
                                      feedforward_modules=["output.dense"], modules_to_save=HEAD)),
    ):  # fmt: skip
        yield _case(name, base, pair(base, method, settings), loss)


def small_encoder(size: Size) -> Iterator[Case]:
    """W1s: the same on a small batch, where what Python does counts."""
    yield from _lora_of_encoder(size, size.few_rows, size.few_tokens)


def language_model(size: Size, dtype: torch.dtype, in_4_bits: bool = False) -> Iterator[Case]:
    """W2 and W3: LoRA on a Llama; PEFT with the loss of transformers, ours with that too, and with our own."""
    base = llama(size, dtype, in_4_bits)
    ours, theirs = _language_losses(size)
    for p in (0.0, 0.05):
        method = LoRA(r=16, alpha=32, dropout=p, target_modules=OF_LLAMA)
        settings = peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=p, target_modules=OF_LLAMA)
        models = pair(base, method, settings)
        case = _case(f"p={p:g}", base, models, ours, theirs, agree=p == 0)
        case.runs[OURS_WITH_ITS_LOSS] = Step(models["ours"], theirs)
        case.limits[OURS_WITH_ITS_LOSS] = case.limits[PEER]
        yield case


def prompts(size: Size) -> Iterator[Case]:
    """W4: prompt tuning on both."""
    base = bert(size)
    settings = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=20)
    # PEFT's classifier pools the first virtual token, ours [CLS]: gradients can't agree.
    yield _case("encoder", base, pair(base, PromptTuning(20), settings), _classification(size, size.rows, size.tokens),
                agree=False)  # fmt: skip
    base = llama(size)
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20)
    yield _case("language model", base, pair(base, PromptTuning(20), settings), *_language_losses(size))


def _lora_of_encoder(size: Size, rows: int, tokens: int, opt_in: bool = False) -> Iterator[Case]:
    base, loss = bert(size), _classification(size, rows, tokens)
    for p in (0.0, 0.05):
        method = LoRA(r=8, alpha=16, dropout=p, target_modules=OF_BERT)
        settings = peft.LoraConfig(
            r=8, lora_alpha=16, lora_dropout=p, target_modules=OF_BERT, modules_to_save=HEAD
        )  # fmt: skip
        yield _case(f"p={p:g}", base, pair(base, method, settings, opt_in), loss, agree=p == 0)


def _case(
    name: str, base: Any, models: dict[str, Any], loss: Any, loss_of_peer: Any = None, agree: bool = True
) -> Case:
    steps = {each: Step(model, loss) for each, model in models.items()}
    steps[PEER].loss = loss_of_peer or loss
    bare = limit(base)
    case = Case(name, {LIMIT: Step(bare, loss), **steps})
    if loss_of_peer:
        case.runs[LIMIT_WITH_ITS_LOSS] = Step(bare, loss_of_peer)
        case.limits[PEER] = LIMIT_WITH_ITS_LOSS
    if agree:
        case.agree = {each: partial(_difference, step, steps[PEER]) for each, step in steps.items() if each != PEER}
    return case


def _difference(ours: Step, theirs: Step) -> float:
    ours()
    theirs()
    return gradient_difference(ours.model, theirs.model)


def _classification(size: Size, rows: int, tokens: int) -> Callable[[Any], Tensor]:
    torch.manual_seed(1)
    batch = {
        "input_ids": torch.randint(0, size.bert.get("vocab_size", 30522), (rows, tokens)),
        "attention_mask": torch.ones(rows, tokens, dtype=torch.long),
    }
    labels = torch.randint(0, 2, (rows,))

    def loss(model: Any) -> Tensor:
        return nn.functional.cross_entropy(model(**batch).logits, labels)

    return loss


def _language_losses(size: Size) -> tuple[Callable[[Any], Tensor], Callable[[Any], Tensor]]:
    """Ours, which makes no logits, and that of transformers."""
    torch.manual_seed(1)
    ids = torch.randint(0, size.llama["vocab_size"], (size.lm_rows, size.lm_tokens))
    batch = {"input_ids": ids, "labels": ids.clone()}
    batch["labels"][:, 0] = IGNORED  # PEFT's prompts learn to say it, ours leave it to the user's text
    task = CausalLM("unused", generations=0)

    def ours(model: Any) -> Tensor:
        return task.training_loss(model, batch)

    def of_transformers(model: Any) -> Tensor:
        return model(**batch).loss

    return ours, of_transformers
