"""W6 and W7: inference with an adapter, merged and not, and with many in one batch."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

import lightning_ft
from benchmarks.measure import LIMIT, PEER, Case, largest_difference
from benchmarks.models import OF_BERT, OF_LLAMA, Size, bert, llama, pair, twin
from lightning_ft import AdapterBank, LoRA


def one_adapter(size: Size) -> Iterator[Case]:
    """W6: generation and classification."""
    base = llama(size)
    settings: Any = peft.LoraConfig(r=16, lora_alpha=32, target_modules=OF_LLAMA, task_type="CAUSAL_LM")
    models = pair(base, LoRA(r=16, alpha=32, target_modules=OF_LLAMA), settings)
    ids = torch.randint(0, size.llama["vocab_size"], (8, size.tokens // 2))
    generate = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False, "use_cache": True,
        "max_new_tokens": size.new_tokens, "min_new_tokens": size.new_tokens, "pad_token_id": 0,
    }  # fmt: skip
    yield from _merged_and_not("generation", base, models, lambda model: model.generate(**generate).float())
    base = bert(size)
    settings = peft.LoraConfig(r=8, lora_alpha=16, target_modules=OF_BERT, task_type="SEQ_CLS")
    models = pair(base, LoRA(r=8, alpha=16, target_modules=OF_BERT), settings)
    yield from _merged_and_not("classification", base, models, _classifier(size, size.rows, size.tokens))


def many_adapters(size: Size) -> Iterator[Case]:
    """W7: a batch whose rows belong to different adapters: AdapterBank, and PEFT's ``adapter_names``."""
    classify = _classifier(size, size.rows, size.tokens // 2)
    for count in size.adapters:
        base = bert(size).eval()
        model, bank, theirs = _bank(base, count)
        names = [f"user{i % count}" for i in torch.randperm(size.rows).tolist()]

        def ours(model: Any = model, bank: AdapterBank = bank, names: list[str] = names) -> Tensor:
            with bank.rows(names):
                return classify(model)

        def of_peft(theirs: Any = theirs, names: list[str] = names) -> Tensor:
            return classify(theirs, adapter_names=names)

        runs: dict[str, Callable[[], Tensor]] = {LIMIT: partial(classify, base), PEER: of_peft, "ours": ours}
        yield _case(f"{count} adapters", runs)


def _merged_and_not(name: str, base: Any, models: dict[str, Any], run: Callable[[Any], Tensor]) -> Iterator[Case]:
    for model in (base, *models.values()):
        model.eval()
    bare = partial(run, base)
    yield _case(name, {LIMIT: bare, **{who: partial(run, model) for who, model in models.items()}})
    ours, theirs = copy.deepcopy(models["ours"]), copy.deepcopy(models[PEER]).merge_and_unload()
    lightning_ft.merge(ours)
    yield _case(f"{name}, merged", {LIMIT: bare, PEER: partial(run, theirs), "ours": partial(run, ours)})


def _case(name: str, runs: dict[str, Callable[[], Tensor]]) -> Case:
    runs = {who: _inferring(run) for who, run in runs.items()}
    case = Case(name, dict(runs))
    case.agree = {"ours": lambda: largest_difference({"out": runs["ours"]()}, {"out": runs[PEER]()})}
    return case


def _inferring(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return torch.inference_mode()(run)


def _classifier(size: Size, rows: int, tokens: int) -> Callable[..., Tensor]:
    ids = torch.randint(0, size.bert.get("vocab_size", 30522), (rows, tokens))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return lambda model, **more: model(**batch, **more).logits


def _bank(base: Any, count: int) -> tuple[Any, AdapterBank, Any]:
    """The same adapters in a bank, with its model, and in PEFT's model."""
    settings = peft.LoraConfig(r=8, target_modules=OF_BERT, task_type="SEQ_CLS", init_lora_weights=False)
    theirs: Any = peft.get_peft_model(twin(base), settings, adapter_name="user0")
    for i in range(1, count):
        theirs.add_adapter(f"user{i}", settings)
    model = twin(base)
    bank = AdapterBank(model)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        for i in range(count):
            bank.load(f"user{i}", Path(folder) / f"user{i}")
    return model, bank, theirs.eval()
