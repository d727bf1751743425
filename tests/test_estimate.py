"""What a step holds, told without values, is what a real one holds."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import bert_classifier, gpt2, llama_lm
from torch import Tensor, nn

from lightning_ft import (
    IA3,
    AdaLoRA,
    Adapter,
    BitFit,
    CausalLM,
    FullFineTuning,
    LoRA,
    PrefixTuning,
    PromptTuning,
    PTuning,
    save_adapter,
)
from lightning_ft.adapters import adapter_contents
from lightning_ft.callbacks.finetuning import count_parameters
from lightning_ft.estimate import (
    Imagination,
    Living,
    Memory,
    Saved,
    largest_batch,
    size_of,
    step_memory,
    store_as,
    weights_of,
)
from lightning_ft.ops.dropout import keep

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "estimate.py"

METHODS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoRA(r=4, target_modules="all-linear"),
    "dora": lambda: LoRA(r=4, use_dora=True),
    "pissa": lambda: LoRA(r=4, init_lora_weights="pissa"),
    "adalora": lambda: AdaLoRA(target_r=4),
    "ia3": IA3,
    "adapter": Adapter,
    "prompt": lambda: PromptTuning(num_virtual_tokens=3),
    "p_tuning": lambda: PTuning(num_virtual_tokens=3),
    "prefix": lambda: PrefixTuning(num_virtual_tokens=3),
    "bitfit": BitFit,
    "full": FullFineTuning,
}


def language_loss(model: Any, ids: Tensor) -> Tensor:
    return CausalLM(tokenizer="").training_loss(model, {"input_ids": ids, "labels": ids})


def classifier_loss(model: Any, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(input_ids=ids).logits, torch.zeros(len(ids), dtype=torch.long))


MODELS = {"bert": (bert_classifier, classifier_loss), "llama": (llama_lm, language_loss), "gpt2": (gpt2, language_loss)}


def saved_of(kind: str, method: Callable[[], Any]) -> tuple[int, tuple[int, int], int]:
    """Of a forward pass: the bytes that it saves, the parameters, and the bytes of the adapter's tensors."""
    make, loss_of = MODELS[kind]
    model = make().train()
    method().inject(model)
    ids = torch.ones(4, 12, dtype=torch.long)
    loss_of(model, ids)  # after which a language task knows what the logits are
    with Saved(weights_of(model)) as saved:
        loss = loss_of(model, ids)
    loss.backward()
    return saved.bytes, count_parameters(model), size_of(adapter_contents(model)[1].values())


@pytest.mark.parametrize(
    ("kind", "method"),
    [("bert", name) for name in METHODS] + [("llama", "lora"), ("llama", "prefix"), ("gpt2", "lora"), ("gpt2", "full")],
)
def test_without_values_as_much_is_saved_as_with_them(kind: str, method: str) -> None:
    with Imagination("cpu").entered():
        imagined = saved_of(kind, METHODS[method])
    real = saved_of(kind, METHODS[method])
    assert imagined[:2] == real[:2]
    if method != "adalora":  # which saves the ranks that it uses, and at first it uses none
        assert imagined[2] == real[2]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_packed_base_is_imagined_packed(kind: str) -> None:
    pytest.importorskip("bitsandbytes")

    def sizes() -> tuple[int, int, tuple[int, int]]:
        model = llama_lm(hidden_size=64, intermediate_size=128).train()
        LoRA(r=4, target_modules="all-linear", quantize=kind).inject(model)
        ids = torch.ones(4, 12, dtype=torch.long)
        language_loss(model, ids)
        with Saved(weights_of(model)) as saved:
            language_loss(model, ids).backward()
        return size_of(weights_of(model)), saved.bytes, count_parameters(model)

    with Imagination("cpu").entered():
        imagined = sizes()
    assert imagined == sizes()


def test_what_dropout_of_a_thin_product_keeps_is_imagined_too() -> None:
    def kept() -> int:
        return size_of(keep(torch.ones(512, 256), 0.1).saved)

    real = kept()
    with Imagination("cpu").entered():
        assert kept() == real > 0
    with Imagination("cuda").entered():
        assert kept() == 0  # there a seed is enough


def memory_of(rows: int = 4, device: str = "cpu", method: Callable[[], Any] = METHODS["lora"], **more: Any) -> Memory:
    with Imagination(device).entered():
        model = llama_lm(**more).train()
        method().inject(model)
        ids = torch.ones(rows, 12, dtype=torch.long)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        return step_memory(model, lambda: language_loss(model, ids), optimizer, [ids], on_gpu=device == "cuda")


def test_the_parts_are_the_models() -> None:
    model = llama_lm()
    LoRA(r=4, target_modules="all-linear").inject(model)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    steps = 4 * sum(p.requires_grad for p in model.parameters())  # Adam counts them for each tensor
    memory = memory_of()
    assert memory.weights == sum(t.nbytes for t in {*model.parameters(), *model.buffers()})
    assert (memory.gradients, memory.optimizer) == (trained, 2 * trained + steps)
    assert memory.peak == sum(vars(memory).values())
    assert min(vars(memory).values()) >= 0


def test_activations_grow_with_rows_and_the_rest_stays() -> None:
    one, two, four = (memory_of(rows, method=METHODS["ia3"]) for rows in (1, 2, 4))
    assert four.activations - two.activations == 2 * (two.activations - one.activations)
    assert (one.weights, one.gradients, one.optimizer) == (four.weights, four.gradients, four.optimizer)


def test_full_fine_tuning_holds_gradients_and_states_of_all() -> None:
    memory = memory_of(method=FullFineTuning)
    weights = sum(p.nbytes for p in llama_lm().parameters())
    assert memory.gradients == weights
    assert memory.optimizer >= 2 * weights


def test_a_language_models_loss_is_not_its_logits() -> None:
    few, many = memory_of(vocab_size=1_000), memory_of(vocab_size=2_000)
    assert few.activations == many.activations
    assert few.loss == many.loss < 4 * 12 * 1_000 * 4


def test_living_storages_are_counted_once_and_until_they_die() -> None:
    kept = torch.zeros(10)
    with Living([kept]) as living:
        a = torch.ones(100)
        b = a.view(10, 10).t()
        assert living.now == 4 * 110
        c = b + 1
        assert living.now == 4 * 210
        del a, b
        assert living.now == 4 * 110
        kept.add_(1)
        died = weakref.ref(c)
        del c
    assert died() is None
    assert (living.now, living.peak) == (4 * 10, 4 * 210)


def test_storing_in_16_bits_leaves_what_was_added_and_keeps_ties() -> None:
    with Imagination("cpu").entered():
        model = llama_lm(tie_word_embeddings=True)
        METHODS["lora"]().inject(model)
        before = size_of(model.parameters())
        store_as(model, torch.bfloat16)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        added = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        assert size_of(model.parameters()) == added + (before - added) // 2
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("limit", [1_000, 1_049, 1_050, 1_051, 5_000, 123_456])
def test_the_largest_batch_fits_and_a_larger_one_does_not(limit: int) -> None:
    asked = []

    def peak_of(rows: int) -> int:
        asked.append(rows)
        return max(500 + 50 * rows, 900 + 10 * rows, 100 * rows - 3_000)

    largest = largest_batch(peak_of, limit)
    assert largest == max(rows for rows in range(5_000) if rows == 0 or peak_of(rows) <= limit)


def test_no_batch_fits() -> None:
    assert largest_batch(lambda rows: 100 + rows, 100) == 0


def test_the_adapters_size_is_its_files(tmp_path: Path) -> None:
    model = bert_classifier()
    LoRA(r=4, target_modules="all-linear").inject(model)
    file = save_adapter(model, tmp_path / "adapter") / "adapter_model.safetensors"
    tensors = adapter_contents(model)[1]
    assert 0 < file.stat().st_size - size_of(tensors.values()) < 200 * len(tensors)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["minilm lora", "llama lora"])
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read as Linux tells it")
def test_a_real_training_takes_what_was_said(name: str) -> None:
    _within(name, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("name", ["minilm lora", "1B lora bf16", "1B lora bf16 checkpointing"])
def test_a_gpu_takes_what_was_said(name: str) -> None:
    _within(name, "cuda")


def _within(name: str, device: str) -> None:
    command = [sys.executable, str(BENCHMARK), "--device", device, "--only", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode in (0, 1), done.stderr
    assert abs(json.loads(done.stdout.splitlines()[-1])["error"]) < 0.15
