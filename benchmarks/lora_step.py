"""A LoRA training step, ours beside stock PEFT's: time in turns (A B A B …) in one process, and gradients.

    python benchmarks/lora_step.py            # make bench

The model is a random MiniLM-L6 (384 wide, 6 layers), batch 32 x 128 tokens, r=8 on all linear layers, fp32.
Both start from the same A and B. Writes benchmarks/results/lora_step.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers
from torch import Tensor, nn

import lightning_ft
from lightning_ft import LoRA

RESULTS = Path(__file__).parent / "results" / "lora_step.json"
LINEARS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]


def pair(dropout: float) -> tuple[nn.Module, nn.Module]:
    """The same model twice: with our LoRA, and with PEFT's, from the same values."""
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(transformers.BertForSequenceClassification(config))
    ours, theirs = models
    LoRA(r=8, dropout=dropout, target_modules=LINEARS).inject(ours)
    settings = peft.LoraConfig(
        r=8, lora_alpha=16, lora_dropout=dropout, target_modules=LINEARS, modules_to_save=["classifier"]
    )
    theirs = peft.get_peft_model(theirs, settings)
    values = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lora" in name:  # PEFT's own naming, to copy from
                source = values[f"base_model.model.{name}.default.weight"]
                source.normal_(std=0.02)
                parameter.copy_(source)
    return ours.train(), theirs.train()


def step(model: nn.Module, tokens: Tensor, labels: Tensor) -> Callable[[], None]:
    """A training step without its optimizer, which is the same for both."""

    def run() -> None:
        model.zero_grad()
        nn.functional.cross_entropy(model(input_ids=tokens).logits, labels).backward()

    return run


def in_turns(a: Callable[[], None], b: Callable[[], None], rounds: int) -> list[tuple[float, float]]:
    """Seconds of a and b, taken in turns; the first two rounds warm up."""
    times = []
    for _ in range(rounds + 2):
        pair_of_times = []
        for run in (a, b):
            start = time.perf_counter()
            run()
            pair_of_times.append(time.perf_counter() - start)
        times.append((pair_of_times[0], pair_of_times[1]))
    return times[2:]


def gradient_difference(ours: nn.Module, theirs: nn.Module) -> float:
    """The largest difference of a gradient of A or B, relative to the largest value in it."""
    values = dict(theirs.named_parameters())
    worst = 0.0
    for name, parameter in ours.named_parameters():
        other = values.get(f"base_model.model.{name}.default.weight")
        if other is not None:
            difference = (parameter.grad - other.grad).abs().max() / other.grad.abs().max()
            worst = max(worst, float(difference))
    return worst


def main() -> None:
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    tokens, labels = torch.randint(0, 30522, (32, 128)), torch.randint(0, 2, (32,))

    workloads = {}
    for dropout in (0.0, 0.05):
        ours, theirs = pair(dropout)
        times = in_turns(step(ours, tokens, labels), step(theirs, tokens, labels), rounds)
        ratio = statistics.median(b / a for a, b in times)
        workloads[f"dropout={dropout}"] = {
            "speed_up_over_peft": ratio,
            "seconds": statistics.median(a for a, _ in times),
            "seconds_peft": statistics.median(b for _, b in times),
            "gradient_difference": gradient_difference(ours, theirs) if dropout == 0 else None,
        }
        print(f"dropout={dropout}: {ratio:.2f} times as fast as PEFT (median of {rounds} pairs)")

    capability = torch.backends.cpu.get_cpu_capability()
    report = {
        "workloads": workloads,
        "rounds": rounds,
        "versions": {m.__name__: m.__version__ for m in (lightning_ft, torch, transformers, peft)},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {capability}",
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
