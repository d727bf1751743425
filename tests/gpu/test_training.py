"""Whole fits on a GPU: every precision, 4-bit bases, checkpointing, resuming.

``python3 -m pytest tests/gpu -o filterwarnings=default`` in a bare checkout, without the project installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import tiny
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ft import AdaLoRA, Adapter, CausalLM, FineTuner, GradientCheckpointing, LigerKernels, LoRA, PromptTuning
from lightning_ft.injection import injected_names

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

needs_liger = pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="no Liger")
needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="no bitsandbytes")


def module(**more: Any) -> FineTuner:
    """A Llama wide enough for packed weights, that learns to repeat what it is given."""
    model = tiny.llama_lm(hidden_size=128, intermediate_size=256, vocab_size=64, **more)
    return FineTuner(model, CausalLM("unused", generations=0), lambda groups: torch.optim.AdamW(groups, lr=1e-2))


def data(rows: int = 64) -> DataLoader[Any]:
    half = torch.randint(1, 64, (rows, 8), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([half, half], dim=1)
    return DataLoader([{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids], 16)


def fit(tuner: FineTuner, callbacks: Sequence[Any], precision: Any = "32-true", steps: int = 12, **more: Any) -> Any:
    L.seed_everything(0, verbose=False)
    checkpoint = more.pop("ckpt_path", None)
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        accelerator="gpu", devices=1, precision=precision, max_steps=steps, callbacks=list(callbacks), **silent, **more
    )
    trainer.fit(tuner, data(), data(16), ckpt_path=checkpoint)
    return trainer


def loss_of(tuner: FineTuner) -> float:
    batch = next(iter(data()))
    tuner.cuda()
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        return tuner.task.loss(
            tuner(**{k: v.cuda() for k, v in batch.items() if k != "labels"}), batch["labels"].cuda()
        ).item()


def frozen(tuner: FineTuner) -> dict[str, Tensor]:
    added = injected_names(tuner)
    return {n: p.detach().cpu().clone() for n, p in tuner.named_parameters() if n not in added}


METHODS = {
    "lora": lambda **more: LoRA(r=8, dropout=0.05, target_modules="all-linear", **more),
    "dora": lambda **more: LoRA(r=8, use_dora=True, target_modules="all-linear", **more),
    "adalora": lambda **more: AdaLoRA(target_modules="all-linear", tinit=2, tfinal=2, **more),
    "adapter": lambda **more: Adapter(reduction_factor=4, **more),
    "prompt": lambda **more: PromptTuning(4, **more),
}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-mixed"])
@pytest.mark.parametrize("method", list(METHODS))
def test_a_method_learns_under_a_precision_and_leaves_the_base_alone(method: str, precision: str) -> None:
    tuner = module()
    before = loss_of(tuner)
    callback = METHODS[method]()
    trainer = fit(tuner, [callback], precision)
    assert loss_of(tuner) < before
    added = injected_names(tuner)
    assert added
    assert {tuner.get_parameter(name).dtype for name in added} == {torch.float32}
    fresh = module().to(torch.bfloat16 if precision == "bf16-true" else torch.float32)
    for name, value in frozen(tuner).items():
        assert torch.equal(value, fresh.get_parameter(name).detach().cpu()), name
    assert trainer.callback_metrics["val/loss"].isfinite()


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("method", ["lora", "dora", "adapter", "prompt"])
def test_a_packed_base_trains_and_resumes_to_the_same(method: str, kind: str, tmp_path: Path) -> None:
    whole, part = module(), module()
    before = loss_of(module())
    fit(whole, [METHODS[method](quantize=kind)], "bf16-mixed", 8)
    stopped = fit(part, [METHODS[method](quantize=kind)], "bf16-mixed", 4)
    stopped.save_checkpoint(tmp_path / "x.ckpt")
    again = module()
    fit(again, [METHODS[method](quantize=kind)], "bf16-mixed", 8, ckpt_path=tmp_path / "x.ckpt")
    assert loss_of(whole) < before
    if method != "lora":  # whose dropout is drawn otherwise
        for name in injected_names(whole):
            torch.testing.assert_close(
                again.get_parameter(name).cpu(), whole.get_parameter(name).cpu(), atol=2e-3, rtol=0.05
            )


def test_checkpointing_gives_the_same_gradients_and_takes_less() -> None:
    grads, peaks = [], []
    for more in ([], [GradientCheckpointing()]):
        tuner = module(num_hidden_layers=8)
        torch.cuda.reset_peak_memory_stats()
        fit(tuner, [METHODS["lora"](), *more], steps=4)
        peaks.append(torch.cuda.max_memory_allocated())
        grads.append({name: tuner.get_parameter(name).detach().cpu() for name in injected_names(tuner)})
    for name, value in grads[0].items():
        torch.testing.assert_close(grads[1][name], value, atol=1e-4, rtol=1e-3)
    assert peaks[1] < peaks[0]


@needs_liger
def test_ligers_kernels_train_as_torch_does() -> None:
    added = []
    for more in ([], [LigerKernels()]):
        tuner = module(num_hidden_layers=4)
        fit(tuner, [LoRA(r=8, target_modules="all-linear"), *more], steps=4)
        added.append({name: tuner.get_parameter(name).detach().cpu() for name in injected_names(tuner)})
    for name, value in added[0].items():
        torch.testing.assert_close(added[1][name], value, atol=1e-4, rtol=1e-3)
