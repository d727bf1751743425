"""LoRA and QLoRA of Llamas on one GPU, ours beside stock PEFT's: step time, memory, share of the card's peak.

    python3 benchmarks/gpu.py                   # from a bare checkout: nothing need be installed of this project
    python3 benchmarks/gpu.py --shapes tiny --device cpu --rounds 2

Random Llamas of 1B and 8B parameters from their configs, r=16 on all linear layers, AdamW. A step is forward, backward
and update. Those compared share one base, start from the same A and B, see the same tokens, and take turns (A B C …)
in one process:

    ours            LoRA().inject(model), and the loss of the task CausalLM, which makes no logits
    ours_hf_loss    the same with the loss of transformers' own
    peft            get_peft_model(model), with that loss
    limit           the frozen base alone with the loss of CausalLM: forward, and the gradient of its inputs

Memory is what a step needs beside the weights. The share of the peak counts 4 · parameters · tokens operations a step
(no gradient of the weights is computed) and attention's. Writes benchmarks/results/gpu.json.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # a bare checkout

import lightning
import peft
import torch
import transformers
from torch import Tensor, nn

import lightning_ft
from benchmarks.models import OF_LLAMA, limit, pair, to_nf4
from lightning_ft import CausalLM, LoRA

RESULTS = Path(__file__).parent / "results" / "gpu.json"
SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": True},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128_256},
}  # fmt: skip
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 operations a second, from the data sheets."""


@dataclass(frozen=True)
class Workload:
    """One line of the table."""

    shape: str
    batch: int
    tokens: int
    quantize: bool = False
    checkpointing: bool = False
    dropout: float = 0.0

    def __str__(self) -> str:
        parts = [self.shape, "nf4" if self.quantize else "bf16", f"{self.batch}x{self.tokens}"]
        return " ".join(parts + ["checkpointing"] * self.checkpointing + [f"p={self.dropout:g}"] * (self.dropout > 0))


WORKLOADS = [
    Workload("tiny", 2, 32),
    Workload("tiny", 2, 32, dropout=0.05, checkpointing=True),
    Workload("1B", 8, 1024),
    Workload("1B", 8, 1024, dropout=0.05),
    Workload("1B", 8, 1024, quantize=True),
    Workload("1B", 8, 1024, checkpointing=True),
    Workload("8B", 4, 1024, checkpointing=True),
    Workload("8B", 4, 1024, checkpointing=True, quantize=True),
    Workload("8B", 2, 1024),
]


def base_model(work: Workload, device: str) -> Any:
    """A random Llama in bf16, its linear layers but the head in NF4 if asked."""
    config = transformers.LlamaConfig(**SHAPES[work.shape], max_position_embeddings=8192, rope_theta=5e5)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    if work.quantize:
        to_nf4(model)
    model.config.use_cache = False
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.train()


def rivals(work: Workload, device: str) -> dict[str, tuple[Any, Callable[[Any, Tensor], Tensor]]]:
    """For each name the model and its loss."""

    def hf_loss(model: Any, ids: Tensor) -> Tensor:
        return model(input_ids=ids, labels=ids).loss

    task = CausalLM("unused", generations=0)

    def our_loss(model: Any, ids: Tensor) -> Tensor:
        return task.training_loss(model, {"input_ids": ids, "labels": ids})

    base = base_model(work, device)
    settings = peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=work.dropout, target_modules=OF_LLAMA)
    models = pair(base, LoRA(r=16, alpha=32, dropout=work.dropout, target_modules=OF_LLAMA), settings)
    ours, theirs, model = models["ours"], models["PEFT"], limit(base)
    for each in (model, ours, theirs):
        if work.checkpointing:
            each.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return {
        "ours": (ours, our_loss),
        "ours_hf_loss": (ours, hf_loss),
        "peft": (theirs, hf_loss),
        "limit": (model, our_loss),
    }


def gradient_errors(found: dict[str, tuple[Any, Any]], ids: Tensor) -> dict[str, float]:
    """How far gradients of A and B are from those over the same base in fp32, relative to their norm; the median."""
    exact = copy.deepcopy(found["ours"][0]).float()
    values: dict[str, dict[str, Tensor]] = {}
    for name, model, loss in (("exact", exact, found["ours"][1]), *((n, *found[n]) for n in ("ours", "peft"))):
        model.zero_grad()
        loss(model, ids).backward()
        grads = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        values[name] = {
            key.removeprefix("base_model.model.").removesuffix(".default.weight"): g for key, g in grads.items()
        }
        model.zero_grad()
    wanted = values["exact"]
    assert all(set(grads) == set(wanted) for grads in values.values())
    return {
        name: statistics.median(((values[name][key] - g).norm() / g.norm()).item() for key, g in wanted.items())
        for name in ("ours", "peft")
    }


class Clock:
    """Seconds and bytes of a step, on a GPU by its own clock."""

    def __init__(self, device: str) -> None:
        self.cuda = device != "cpu"

    def __call__(self, step: Callable[[], None]) -> tuple[float, int]:
        if not self.cuda:
            start = time.perf_counter()
            step()
            return time.perf_counter() - start, 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3, torch.cuda.max_memory_allocated() - held


def measure(work: Workload, device: str, rounds: int, profile: bool = False) -> dict[str, Any]:
    """All figures of one workload."""
    found, clock = rivals(work, device), Clock(device)
    vocabulary = SHAPES[work.shape]["vocab_size"]
    batches = [torch.randint(0, vocabulary, (work.batch, work.tokens), device=device) for _ in range(3)]
    plain = not (work.dropout or work.quantize or work.checkpointing) and work.shape != "8B"
    errors = gradient_errors(found, batches[0][:1]) if plain else None
    steps, trained = {}, {}
    for name, (model, loss) in found.items():
        parameters = [p for p in model.parameters() if p.requires_grad]
        trained[name] = sum(p.numel() for p in parameters)
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True) if parameters else None
        steps[name] = step_of(model, loss, optimizer, batches)
    if profile:
        for name in ("ours", "limit"):
            show_profile(name, steps[name])
    times: dict[str, list[float]] = {name: [] for name in steps}
    peaks = dict.fromkeys(steps, 0)
    for turn in range(rounds + 2):
        for name, step in steps.items():
            seconds, peak = clock(lambda step=step: next(step))
            if turn >= 2:
                times[name].append(seconds)
                peaks[name] = max(peaks[name], peak)
    base = found["limit"][0]
    linear = sum(shape_of(m)[0] * shape_of(m)[1] for m in base.modules() if isinstance(m, nn.Linear))
    config = base.config
    attention = 2 * 2 * config.num_hidden_layers * config.hidden_size * work.tokens / 2 * 2  # causal, forward and dx
    operations = (4 * linear + attention) * work.batch * work.tokens
    name = torch.cuda.get_device_name() if device != "cpu" else "cpu"
    peak = next((rate for card, rate in PEAK.items() if card in name), None)
    medians = {name: statistics.median(t) for name, t in times.items()}
    against = {
        other: statistics.median(b / a for a, b in zip(times["ours"], times[other], strict=True)) for other in medians
    }
    return {
        "workload": str(work),
        **asdict(work),
        "seconds": medians,
        "tokens_per_second": {n: work.batch * work.tokens / t for n, t in medians.items()},
        "share_of_peak": {n: operations / t / peak for n, t in medians.items()} if peak else None,
        "step_gib": {n: b / 2**30 for n, b in peaks.items()},
        "time_of_others_over_ours": against,
        "trained": trained,
        "gradient_errors": errors,
    }


def shape_of(linear: Any) -> tuple[int, int]:
    return linear.out_features, linear.in_features


def step_of(model: Any, loss: Any, optimizer: Any, batches: list[Tensor]) -> Iterator[None]:
    """Take a step each time it's asked."""
    turn = 0
    while True:
        loss(model, batches[turn % len(batches)]).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        turn += 1
        yield


def show_profile(name: str, step: Iterator[None]) -> None:
    """Where the time of one step goes, by the kernel."""
    from torch.profiler import ProfilerActivity, profile

    next(step), next(step)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        next(step)
        torch.cuda.synchronize()
    averages = seen.key_averages()
    print(name, averages.table(sort_by="self_cuda_time_total", row_limit=14, max_name_column_width=60))
    print(name, averages.table(sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=60))


def table(figures: list[dict[str, Any]]) -> str:
    """For people."""
    lines = ["| workload | PEFT / ours | ours / limit | ours, tokens/s | of peak | GiB a step: ours | PEFT |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in figures:
        if "error" in row:
            lines.append(f"| {row['workload']} | {row['error']} | | | | | |")
            continue
        ratio, share = row["time_of_others_over_ours"], row["share_of_peak"]
        of_peak = f"{share['ours']:.0%}" if share else "–"
        lines.append(
            f"| {row['workload']} | {ratio['peft']:.2f} | {1 / ratio['limit']:.2f} |"
            f" {row['tokens_per_second']['ours']:,.0f} | {of_peak} |"
            f" {row['step_gib']['ours']:.2f} | {row['step_gib']['peft']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", nargs="*", default=["1B", "8B"], choices=list(SHAPES))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--profile", action="store_true", help="also print where the time of one step goes")
    options = parser.parse_args()
    figures: list[dict[str, Any]] = []
    for work in WORKLOADS:
        if work.shape not in options.shapes:
            continue
        start = time.perf_counter()
        try:
            figures.append(measure(work, options.device, options.rounds, options.profile))
        except (ImportError, torch.OutOfMemoryError) as error:
            figures.append({"workload": str(work), "error": f"{type(error).__name__}: {str(error).splitlines()[0]}"})
        gc.collect()
        if options.device != "cpu":
            torch.cuda.empty_cache()
        print(f"{table(figures[-1:]).splitlines()[-1]} {time.perf_counter() - start:.0f} s", flush=True)
    report = {
        "workloads": figures,
        "rounds": options.rounds,
        "device": torch.cuda.get_device_name() if options.device != "cpu" else "cpu",
        "versions": {m.__name__: m.__version__ for m in (lightning_ft, torch, transformers, lightning, peft)},
    }
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(table(figures))


if __name__ == "__main__":
    main()
