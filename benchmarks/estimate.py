"""What `lightning_ft.estimate` says of a step's memory, beside what the step takes.

    python3 benchmarks/estimate.py                # on the CPU: the process's peak above what it had with the model
    python3 benchmarks/estimate.py --device cuda  # torch.cuda.max_memory_allocated; from a bare checkout

Models are random, from their configs. Each training of a few steps has a process of its own. Prints a line of JSON for
each; the exit status is 1 if one is further off than --within.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # a bare checkout

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, LlamaConfig

from lightning_ft import CausalLM, Classification, FullFineTuning, LoRA
from lightning_ft.callbacks.checkpointing import checkpoint_layers
from lightning_ft.estimate import Imagination, Memory, step_memory

MINILM = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)


def llama(width: int, layers: int, vocabulary: int, inner: int) -> LlamaConfig:
    """A Llama with grouped-query attention."""
    return LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, vocab_size=vocabulary, intermediate_size=inner,
        num_attention_heads=width // 64, num_key_value_heads=width // 256, max_position_embeddings=4096,
    )  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """A training; ``dtype`` is what the base is stored in, ``mixed`` whether autocast is on."""

    config: Any
    batch: int
    tokens: int
    method: Callable[[], Any] = field(default=lambda: LoRA(r=16, target_modules="all-linear", dropout=0.1))
    dtype: torch.dtype = torch.float32
    mixed: bool = False
    checkpointing: bool = False


TINY = {
    BertConfig: BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128),
    LlamaConfig: llama(256, 2, 1000, 512),
}
SMALL, ONE_B = llama(768, 4, 32_000, 2048), llama(2048, 16, 128_256, 8192)
WORKLOADS = {
    "cpu": {
        "minilm lora": Workload(MINILM, 8, 128),
        "minilm full": Workload(MINILM, 8, 128, FullFineTuning),
        "llama lora": Workload(SMALL, 2, 512),
        "llama lora bf16-mixed": Workload(SMALL, 2, 512, mixed=True),
        "llama lora checkpointing": Workload(SMALL, 4, 512, checkpointing=True),
    },
    "cuda": {
        "minilm lora": Workload(MINILM, 256, 128),
        "minilm full": Workload(MINILM, 256, 128, FullFineTuning),
        "1B lora bf16": Workload(ONE_B, 8, 1024, dtype=torch.bfloat16),
        "1B lora bf16-mixed": Workload(ONE_B, 4, 1024, mixed=True),
        "1B lora bf16 checkpointing": Workload(ONE_B, 16, 1024, dtype=torch.bfloat16, checkpointing=True),
        "1B full bf16": Workload(ONE_B, 4, 1024, FullFineTuning, dtype=torch.bfloat16),
    },
}


def built(work: Workload, preserve_rng_state: bool) -> tuple[Any, Callable[[dict[str, Tensor]], Tensor], Any]:
    """The model with its method, the loss of a batch, and the optimizer."""
    is_bert = isinstance(work.config, BertConfig)
    task = Classification(["bad", "good"]) if is_bert else CausalLM(tokenizer="")
    model = (AutoModelForSequenceClassification if is_bert else AutoModelForCausalLM).from_config(
        work.config, dtype=work.dtype
    )
    model.train()
    work.method().inject(model)
    if work.checkpointing:
        checkpoint_layers(model, preserve_rng_state=preserve_rng_state)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def loss(batch: dict[str, Tensor]) -> Tensor:
        kind = batch["input_ids"].device.type
        with torch.autocast(kind, torch.bfloat16) if work.mixed else nullcontext():
            return task.training_loss(model, batch)

    return model, loss, optimizer


def batch_of(work: Workload, device: str) -> dict[str, Tensor]:
    """Rows as long as they may be."""
    ids = torch.ones(work.batch, work.tokens, dtype=torch.long, device=device)
    is_bert = isinstance(work.config, BertConfig)
    return {"input_ids": ids, "labels": torch.ones(work.batch, dtype=torch.long, device=device) if is_bert else ids}


def estimated(work: Workload, device: str) -> Memory:
    """Without values."""
    with Imagination(device).entered():
        model, loss, optimizer = built(work, False)
        batch = batch_of(work, "cpu")
        return step_memory(model, lambda: loss(batch), optimizer, batch.values(), on_gpu=device == "cuda")


def measured(work: Workload, device: str) -> tuple[int, int]:
    """What the model takes, and the peak of two steps above that, in bytes."""
    _train(replace(work, config=TINY[type(work.config)]), device, 1)  # what is loaded at the first step isn't tensors
    return _train(work, device, 2)


def _train(work: Workload, device: str, steps: int) -> tuple[int, int]:
    model, loss, optimizer = built(work, True)
    model.to(device)
    weights = sum(t.nbytes for t in {*model.parameters(), *model.buffers()})
    batch, before = batch_of(work, device), _now(device)
    for _ in range(steps):
        value = loss(batch)
        optimizer.zero_grad()
        value.backward()
        del value
        optimizer.step()
    return weights, _peak(device) - before


def _now(device: str) -> int:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 2**10


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=WORKLOADS, default="cpu")
    parser.add_argument("--only", action="append", help="a workload's name; as often as need be")
    parser.add_argument("--within", type=float, default=0.15, help="the largest error that is let pass")
    parser.add_argument("--measure", action="store_true", help="measure the one in this process")
    given = parser.parse_args()
    works = {name: work for name, work in WORKLOADS[given.device].items() if name in (given.only or (name,))}
    if given.measure:
        print(json.dumps(measured(next(iter(works.values())), given.device)))
        return 0
    worst = 0.0
    for name, work in works.items():
        memory = estimated(work, given.device)
        # The tensors are what is told: glibc would keep holes of up to 32 MiB between them in its heap.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        command = [sys.executable, __file__, "--device", given.device, "--only", name, "--measure"]
        answer = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env=environment,
        )
        weights, above = json.loads(answer.stdout.splitlines()[-1])
        error = (memory.peak - memory.weights) / above - 1
        worst = max(worst, abs(error))
        mib = {part: round(size / 2**20, 1) for part, size in vars(memory).items()}
        line = {"name": name, "device": given.device, "estimated_mib": mib, "measured_weights_mib": weights / 2**20}
        line |= {"above_weights_mib": round(above / 2**20, 1), "error": round(error, 3)}
        print(json.dumps(line), flush=True)
    return int(worst > given.within)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    sys.exit(main())
