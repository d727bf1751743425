"""How good each method is: test accuracy over some seeds, on the bundled reviews or on any data.

    python benchmarks/quality.py --seeds 0 1 2
    python benchmarks/quality.py trainer.max_epochs=3 --data FOLDER_OR_FILE --name pros_cons --methods lora full head

Each method runs at its own default learning rate, from the same seeds, and is scored at its best epoch on
validation. Results go to benchmarks/results/quality_NAME.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def run(method: str, seed: int, data: str, overrides: list[str], threads: int) -> dict[str, float]:
    """One run of the command line in a process of its own, with so many threads; its figures."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "lightning_ft.apps.cli", "train", f"method={method}", f"seed={seed}",
            f"data.path={data}", "data.seed=0", "test_before=false", "trainer.enable_progress_bar=false",
            f"hydra.run.dir={folder}", *overrides,
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stderr}")
        results = json.loads((Path(folder) / "results.json").read_text())
    return {
        "accuracy": results["after"]["test/accuracy"],
        "f1": results["after"]["test/f1"],
        "trained": results["trained"],
        "seconds": results["seconds"],
        "peak_memory_mib": results["peak_memory_mib"],
        "adapter_bytes": results["adapter_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="bundled:reviews_en")
    parser.add_argument("--name", default="reviews_en")
    parser.add_argument("--methods", nargs="+", default=["lora", "full", "head"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side; the cores are shared out")
    parser.add_argument("overrides", nargs="*", help="for every run, e.g. trainer.max_epochs=3")
    arguments = parser.parse_args()

    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    options = arguments.data, arguments.overrides, threads
    with ThreadPoolExecutor(arguments.jobs) as pool:
        futures = {m: [pool.submit(run, m, seed, *options) for seed in arguments.seeds] for m in arguments.methods}
        methods = {}
        for method, of_method in futures.items():
            runs = [future.result() for future in of_method]
            methods[method] = {"mean_accuracy": statistics.mean(r["accuracy"] for r in runs), "runs": runs}
            scores = ", ".join(f"{r['accuracy']:.3f}" for r in runs)
            print(
                f"{method:<6} {methods[method]['mean_accuracy']:.4f}  ({scores})  {runs[0]['seconds']:.0f} s",
                flush=True,
            )

    import lightning
    import torch
    import transformers

    report = {
        "data": arguments.name,
        "seeds": arguments.seeds,
        "overrides": arguments.overrides,
        "methods": methods,
        "versions": {m.__name__: m.__version__ for m in (torch, lightning, transformers)},
        "machine": f"{platform.machine()}, {threads} threads a run, {arguments.jobs} runs side by side",
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"quality_{arguments.name}.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
