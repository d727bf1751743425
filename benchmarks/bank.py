"""A batch whose rows belong to different adapters, our AdapterBank beside stock PEFT's `adapter_names`.

    python benchmarks/bank.py

The model is a random MiniLM-L6 (384 wide, 6 layers), batch 32 x 64 tokens, r=8 on all linear layers, fp32, with a head
for each adapter. Time in turns (A B C A B C …) in one process: ours with the adapters of all rows gathered and
multiplied at once, ours with each adapter answering its rows, and PEFT. Writes benchmarks/results/bank.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import torch
import transformers
from torch import Tensor, nn

import lightning_ft
from lightning_ft import AdapterBank
from lightning_ft.injection import Injected
from lightning_ft.methods.lora import LoRALinear

RESULTS = Path(__file__).parent / "results" / "bank.json"
LINEARS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
ROWS, TOKENS = 32, 64


def base() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).eval()


def both(adapters: int) -> tuple[nn.Module, AdapterBank, Any]:
    """The same adapters in a bank, with its model, and in PEFT's model."""
    settings = peft.LoraConfig(r=8, target_modules=LINEARS, task_type="SEQ_CLS", init_lora_weights=False)
    theirs = peft.get_peft_model(base(), settings, adapter_name="user0")
    for i in range(1, adapters):
        theirs.add_adapter(f"user{i}", settings)
    model = base()
    bank = AdapterBank(model)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        for i in range(adapters):
            bank.load(f"user{i}", Path(folder) / f"user{i}")
    return model, bank, theirs.eval()


def in_turns(runs: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, taken in turns; the first two rounds warm up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: found[2:] for name, found in times.items()}


def switching(bank: AdapterBank) -> float:
    """Microseconds that a switch takes."""
    names = bank.names * 1000
    start = time.perf_counter()
    for name in names:
        bank.use(name)
    seconds = time.perf_counter() - start
    bank.use(None)
    return seconds / len(names) * 1e6


def main() -> None:
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--adapters", type=int, nargs="+", default=[8, 32])
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    tokens = torch.randint(0, 30522, (ROWS, TOKENS))

    workloads = {}
    for adapters in arguments.adapters:
        model, bank, theirs = both(adapters)
        names = [f"user{i % adapters}" for i in torch.randperm(ROWS).tolist()]

        def ours(model: Any = model, bank: AdapterBank = bank, names: list[str] = names) -> Tensor:
            with bank.rows(names):
                return model(input_ids=tokens).logits

        def grouped(ours: Callable[[], Tensor] = ours) -> Tensor:
            with mock.patch.object(LoRALinear, "for_rows", Injected.for_rows):
                return ours()

        def peft_mixed(theirs: Any = theirs, names: list[str] = names) -> Tensor:
            return theirs(input_ids=tokens, adapter_names=names).logits

        def bare(model: Any = model) -> Tensor:
            return model(input_ids=tokens).logits

        with torch.inference_mode():
            difference = float((ours() - peft_mixed()).abs().max())
            times = in_turns({"ours": ours, "grouped": grouped, "peft": peft_mixed, "bare": bare}, arguments.rounds)
        ratios = {
            name: statistics.median(b / a for a, b in zip(times["ours"], times[name], strict=True)) for name in times
        }
        workloads[f"adapters={adapters}"] = {
            "speed_up_over_peft": ratios["peft"],
            "speed_up_over_groups": ratios["grouped"],
            "time_over_bare_base": 1 / ratios["bare"],
            "seconds": {name: statistics.median(found) for name, found in times.items()},
            "output_difference_to_peft": difference,
            "switch_microseconds": switching(bank),
        }
        print(
            f"{adapters} adapters: {ratios['peft']:.2f} times as fast as PEFT, {ratios['grouped']:.2f} times as row"
            f" groups, {1 / ratios['bare']:.2f} of the bare base's time (median of {arguments.rounds} rounds)"
        )

    capability = torch.backends.cpu.get_cpu_capability()
    report = {
        "workloads": workloads,
        "rounds": arguments.rounds,
        "versions": {m.__name__: m.__version__ for m in (lightning_ft, torch, transformers, peft)},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {capability}",
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
