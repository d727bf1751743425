"""``precision=...``: what goes together is told from the config alone; a run over a packed base is like others."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import call, choices, predicted, probabilities, reviews, succeed, tiny_run, write_csv
from hydra import compose, initialize_config_dir
from transformers import AutoModelForSequenceClassification

from lightning_ft.apps import build, precision
from lightning_ft.apps.errors import RequestError
from lightning_ft.apps.paths import conf_dir


def config(*overrides: str) -> Any:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("train", ["model.name=x", *overrides])


GPU = {"device": "cuda", "bf16": True, "tf32": True}
CPU = {"device": "cpu", "bf16": True, "tf32": False}


def told(monkeypatch: pytest.MonkeyPatch, machine: dict[str, Any], *overrides: str) -> tuple[str, list[str]]:
    """The refusal, if there is one, and the advice, as if on this machine."""
    read = precision.read
    monkeypatch.setattr(precision, "read", lambda c: precision.Asked(**{**vars(read(c)), **machine}))
    asked = config(*overrides)
    try:
        precision.check(asked)
    except RequestError as refusal:
        return str(refusal), []
    finally:
        advice = precision.advice(asked)
        monkeypatch.undo()
    return "", advice


@pytest.mark.parametrize("name", choices("precision"))
def test_each_choice_goes_with_lora_where_it_says_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    language = ["task=causal_lm"] if name in ("fp16", "bf16") else []  # else there's a head, which would be rounded
    for machine in (CPU, GPU):
        refusal, advice = told(monkeypatch, machine, f"precision={name}", *language)
        assert bool(refusal) == (machine is CPU and name.startswith("fp16"))
        assert bool(advice) == (machine is CPU and name == "tf32")
    text = (conf_dir() / "precision" / f"{name}.yaml").read_text()
    assert "GPU" in text or "CPU" in text or "Every device" in text or "As nf4" in text


@pytest.mark.parametrize(
    ("machine", "overrides", "cure"),
    [
        (CPU, "precision=fp16", "precision=bf16-mixed"),
        (CPU, "precision=fp16-mixed", "precision=bf16-mixed"),
        (GPU, "precision=fp16", "the task's head in fp16.*precision=fp16-mixed"),
        (GPU, "precision=fp16 method=bitfit task=causal_lm", "parts of the base in fp16"),
        (GPU, "precision=nf4 method=full", "method=lora"),
        (GPU, "precision=int8 method=top_layers", "method=lora"),
        (CPU, "precision=fp4 method=gradual_unfreezing", "method=lora"),
        (CPU, "precision=nf4 regularizer=ewc", "regularizer=kl"),
        (CPU, "precision=int8 regularizer=l2_sp", "regularizer=kl"),
        ({**CPU, "bitsandbytes": False}, "precision=nf4", r"pip install 'lightning-ft\[quantization\]'"),
        ({**CPU, "bitsandbytes": False}, "optimizer=adamw_8bit", r"pip install 'lightning-ft\[quantization\]'"),
        (CPU, "optimizer=paged_adamw_8bit", "optimizer=adamw_8bit"),
        (CPU, "precision=nf4 trainer=fsdp", "FSDP2 shares.*trainer=ddp"),
        (CPU, "+method.quantize=nf4 trainer=fsdp", "FSDP2 shares.*trainer=ddp"),
        (CPU, "+method.quantize={kind:int8} regularizer=ewc", "regularizer=kl"),
        (GPU, "precision=int8 trainer=deepspeed_zero3", "ZeRO-3 shares.*trainer=ddp"),
        (GPU, "precision=nf4 trainer.strategy=deepspeed_stage_3_offload", "ZeRO-3 shares.*trainer=ddp"),
        (CPU, "optimizer=adamw_8bit trainer=fsdp", "optimizer=adamw"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_the_cure(
    machine: dict[str, Any], overrides: str, cure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal, _ = told(monkeypatch, machine, *overrides.split())
    assert re.search(cure, refusal), refusal


def test_what_is_hardly_meant_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "bf16-mixed keeps it in fp32" in told(monkeypatch, GPU, "precision=bf16", "method=full")[1][0]
    assert "precision=fp16-mixed" in told(monkeypatch, {**GPU, "bf16": False}, "precision=bf16-mixed")[1][0]
    assert "TF32 is for" in told(monkeypatch, {**GPU, "tf32": False}, "precision=tf32")[1][0]


def test_a_packed_base_goes_with_devices_that_have_it_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for strategy in ("trainer=ddp", "trainer=deepspeed_zero2", "trainer=default"):
        assert told(monkeypatch, GPU, "precision=nf4", "optimizer=adamw_8bit", strategy) == ("", [])


def test_it_is_refused_before_a_model_or_data_are_read() -> None:
    missing = ["model=hub", "model.name=nowhere", "data=file", "data.path=nothing.csv"]
    assert "quantize={kind: nf4}, not nf4" in call("train", "quantize=nf4", *missing).message
    for app, methods in (("train", "method=full"), ("compare", "methods=[lora,full]")):
        answer = call(app, "precision=nf4", methods, *missing)
        assert "FullFineTuning trains weights of the base, and packed into nf4 they can't" in answer.message


@pytest.mark.parametrize(
    ("overrides", "fused"),
    [
        ("", True),
        ("precision=bf16 trainer=ddp", True),
        ("trainer=fsdp trainer.devices=2", True),
        ("trainer.accelerator=cuda precision=fp16", True),
        ("precision=bf16-mixed", None),  # Lightning would refuse to clip gradients, as in the next two
        ("precision=nf4", None),
        ("trainer.accelerator=cuda precision=fp16-mixed", None),
        ("trainer.accelerator=tpu", None),
        ("trainer=deepspeed_zero2", None),
        ("trainer.strategy=deepspeed_stage_3_offload", None),
        ("precision=fp16-mixed optimizer.fused=true", True),
        ("optimizer.fused=false", False),
        ("optimizer._target_=torch.optim.RMSprop", None),
        ("optimizer=adamw_8bit", None),
    ],
)
def test_adamw_is_fused_wherever_that_can_be_unless_something_else_is_said(overrides: str, fused: bool | None) -> None:
    made: Any = build.optimizer(config(*overrides.split()))
    assert made.keywords.get("fused") is fused


def test_fused_or_not_it_learns_the_same_and_goes_on_from_the_others_state() -> None:
    def after(*parts: tuple[int, str]) -> list[torch.Tensor]:
        """The weights after so many steps of each optimizer, which begins with the state of the one before it."""
        torch.manual_seed(0)
        model, state = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4)), None
        for steps, fused in parts:
            make = build.optimizer(config("optimizer.lr=1e-2", f"optimizer.fused={fused}"))
            optimizer = make([{"params": [*model.parameters()]}])
            if state is not None:
                optimizer.load_state_dict(state)
            for step in range(steps):
                optimizer.zero_grad()
                model(torch.randn(3, 6, generator=torch.Generator().manual_seed(step))).square().sum().backward()
                optimizer.step()
            state = optimizer.state_dict()
        return [parameter.detach() for parameter in model.parameters()]

    wanted = after((10, "false"), (10, "false"))
    for parts in ([(10, "null"), (10, "null")], [(10, "false"), (10, "null")], [(10, "null"), (10, "false")]):
        for one, two in zip(after(*parts), wanted, strict=True):
            torch.testing.assert_close(one, two, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_a_run_over_a_packed_base_is_predicted_evaluated_exported_and_merged(
    tiny_bert_dir: str, tmp_path: Path
) -> None:
    data, folder = write_csv(tmp_path / "reviews.csv", reviews(120, seed=0)), tmp_path / "run"
    options = ["precision=nf4", "method=lora", "optimizer=adamw_8bit", "optimizer.lr=0.02", "latency=1"]
    succeed(*tiny_run(tiny_bert_dir, data, *options, "trainer.max_epochs=3", f"hydra.run.dir={folder}"))
    saved = torch.load(folder / "checkpoints" / "last.ckpt")["state_dict"]
    assert saved
    assert not [key for key in saved if "quant" in key or "absmax" in key]
    assert "accuracy" in succeed("evaluate", f"run={folder}")
    succeed("export", f"run={folder}", "out=exported")
    assert "base packed into: `nf4`" in Path("exported/README.md").read_text()
    said = succeed("merge", f"run={folder}", "out=merged")
    assert "dense where the run had them packed into nf4" in said
    model = AutoModelForSequenceClassification.from_pretrained("merged")
    assert not hasattr(model.config, "quantization_config")
    torch.testing.assert_close(probabilities(model, Path("merged")), predicted(folder), atol=2e-2, rtol=0)  # bf16
