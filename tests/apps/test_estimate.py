"""`lightning-ft estimate`: what a training takes, beside what the training took."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import call, reviews, succeed, write_csv
from omegaconf import OmegaConf


def asked(model: str | Path, data: Path, *overrides: str) -> list[str]:
    return [
        "estimate", "model=hub", f"model.name={model}", "data=file", f"data.path={data}", "data.batch_size=16",
        "trainer.accelerator=cpu", "out=estimate.json", *overrides,
    ]  # fmt: skip


def estimate(*arguments: str) -> dict[str, Any]:
    succeed(*arguments)
    return json.loads(Path("estimate.json").read_text(encoding="utf-8"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "reviews.csv", reviews(60, seed=0))


@pytest.fixture
def config_alone(tiny_bert_dir: str, tmp_path: Path) -> Path:
    """The model's folder without weights and tokenizer."""
    folder = tmp_path / "config_alone"
    folder.mkdir()
    shutil.copy(Path(tiny_bert_dir) / "config.json", folder)
    return folder


@pytest.mark.parametrize("method", ["lora", "prefix", "full"])
def test_it_is_what_the_training_counted(
    method: str, run_of: Callable[[str], Path], config_alone: Path, tiny_bert_dir: str
) -> None:
    run = run_of(method)
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    path = OmegaConf.load(run / "config.yaml").data.path
    found = estimate(*asked(tiny_bert_dir, path, f"method={method}", "steps=0"))
    assert (found["parameters"], found["trained"]) == (results["parameters"], results["trained"])
    files = [file.stat().st_size for file in (run / "adapter").iterdir() if file.suffix != ".md"]
    assert found["adapter_bytes"] == pytest.approx(sum(files), rel=0.1)
    assert found["peak"] == sum(found["memory"].values())
    bare = estimate(*asked(config_alone, path, f"method={method}", f"tokens={found['tokens']}"))
    assert (bare["parameters"], bare["trained"]) == (found["parameters"], found["trained"])
    for part in ("weights", "gradients", "optimizer"):
        assert bare["memory"][part] == found["memory"][part]
    assert bare["peak"] == pytest.approx(found["peak"], rel=0.01)  # its batch has no types of tokens
    assert "weights" in bare["untimed"]


def test_the_largest_batch_and_the_time(tiny_bert_dir: str, data: Path) -> None:
    found = estimate(*asked(tiny_bert_dir, data, "memory=20MB", "steps=2", "device=cpu"))
    rows = found["largest_batch"]
    assert found["seconds_per_step"] > 0
    assert found["seconds_per_epoch"] > 0
    at = [
        estimate(*asked(tiny_bert_dir, data, f"data.batch_size={n}", "steps=0", "device=cpu"))["peak"]
        for n in (rows, rows + 1)
    ]
    assert at[0] <= 20_000_000 < at[1]
    few = estimate(*asked(tiny_bert_dir, data, "data.batch_size=60", "steps=1", "device=cpu"))  # a batch is an epoch
    assert few["seconds_per_epoch"] == pytest.approx(few["seconds_per_step"], rel=1)


def test_a_language_model_in_16_bits_by_its_config(tmp_path: Path, data: Path) -> None:
    folder = tmp_path / "llama"
    folder.mkdir()
    config = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 500,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    whole = asked(folder, data, "task=text_lm", "tokens=64", "device=cuda")
    found = estimate(*whole)
    fewer = estimate(*whole, "gradient_checkpointing=true")
    assert fewer["memory"]["activations"] < found["memory"]["activations"] / 3
    fewer = estimate(*whole, "activation_recompute=true")
    # Of each layer silu(g) and its product with u aren't kept; rows are as full as tokens says.
    batch = found["batch_size"] * 64
    assert found["memory"]["activations"] - fewer["memory"]["activations"] == 3 * 2 * batch * 128 * 4
    half = estimate(*whole, "trainer.precision=bf16-true")
    assert half["memory"]["gradients"] == found["memory"]["gradients"]  # what is added stays in fp32
    assert half["memory"]["weights"] < 0.7 * found["memory"]["weights"]


def test_what_makes_no_sense_is_said(tiny_bert_dir: str, data: Path) -> None:
    def message(*overrides: str) -> str:
        return call(*asked(tiny_bert_dir, data, "steps=0", *overrides)).message

    assert "80GiB" in message("memory=80")
    assert "Not one row of" in message("memory=1KB")
    assert "cpu or cuda" in message("device=tpu")
    assert "tokens must be" in message("tokens=0")
    assert "steps must be" in message("steps=-1")
    both = message("activation_recompute=true", "gradient_checkpointing=true")
    assert both.startswith("activation_recompute has no part beside gradient_checkpointing: leave one of them out")
