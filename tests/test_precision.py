"""Every method under every precision of the command line that works on a CPU."""

from __future__ import annotations

import copy
import functools
import inspect
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from foreign import BertInInit, make, trainer
from hydra import compose, initialize_config_dir
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf
from test_contract import METHODS, acts_on_weights_alone, output
from torch.utils.data import DataLoader, TensorDataset

import lightning_ft
from lightning_ft import InjectionError, LoRA
from lightning_ft.apps.paths import conf_dir
from lightning_ft.callbacks.finetuning import FineTuning
from lightning_ft.files.state import frozen_keys
from lightning_ft.injection import find_base, injected_names, is_quantized

PRECISIONS = ("bf16-mixed", "bf16", "int8", "nf4")
"""fp32 is that of the contract, tf32 the same on a CPU, and fp16 is refused there; fp4 is nf4 with other levels."""


@functools.cache
def precision(name: str) -> tuple[str, Any]:
    """The Trainer's precision, and what packs the base."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("train", [f"precision={name}"])
    return config.trainer.precision, OmegaConf.to_container(config.quantize) if config.quantize else None


def method(name: str, packing: Any) -> FineTuning:
    """One of the contract's, over a base that is packed so."""
    if packing is None:
        return copy.copy(METHODS[name])
    return type(METHODS[name])(**{**METHODS[name].record()["arguments"], "quantize": packing})


def dtype(module: BertInInit) -> torch.dtype:
    return module.model.classifier.weight.dtype


def packs(name: str) -> bool:
    return "quantize" in inspect.signature(type(METHODS[name])).parameters


def test_what_trains_weights_of_the_base_takes_no_packed_one() -> None:
    assert {name for name in METHODS if not packs(name)} == {"full", "top_layers", "gradual_unfreezing"}
    for name, ours in METHODS.items():
        assert packs(name) == (ours.trains_of_base != "weights")
        if not packs(name):
            module = make(BertInInit)
            lightning_ft.quantize(module, "int8")
            with pytest.raises(InjectionError, match=r"packed into 4 or 8 bits and can't train.*LoRA"):
                copy.copy(ours).inject(module)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in PRECISIONS for name in METHODS if kind.startswith("bf16") or packs(name)]
    + [("fp4", "lora"), ("fp4", "bitfit")],
)
def test_fit_validate_resume_save_load_and_merge(name: str, kind: str, tmp_path: Path) -> None:
    of_trainer, packing = precision(kind)

    def fit(module: BertInInit, **more: Any) -> Any:
        saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        run = trainer(method(name, packing), saving, precision=of_trainer, enable_checkpointing=True)
        run.fit(module, **more)
        return run

    # fit: only what trains moves, in fp32 what was added; validations in between change nothing of the base
    module, untouched = make(BertInInit), make(BertInInit)
    if packing is not None:
        lightning_ft.quantize(untouched, packing)
    run = fit(module)
    assert torch.isfinite(run.callback_metrics["val_loss"])
    base = find_base(module)
    assert any(is_quantized(part) for _, part in base.named_modules()) == (packing is not None)
    frozen, before = frozen_keys(module, base), untouched.to(dtype(module)).state_dict()
    assert frozen.isdisjoint(injected_names(module))
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items() if key in frozen)
    assert {module.state_dict()[key].dtype for key in injected_names(module)} <= {torch.float32}

    # resume: to the bit, from a checkpoint without the base
    resumed = make(BertInInit)
    torch.manual_seed(5)
    fit(resumed, ckpt_path=tmp_path / "epoch=0.ckpt")
    whole = module.state_dict()
    assert all(torch.equal(value, whole[key]) for key, value in resumed.state_dict().items())
    saved = torch.load(tmp_path / "epoch=0.ckpt")["state_dict"]
    assert not frozen & set(saved)

    # load: from the checkpoint, and from a folder into a fresh base
    run.save_checkpoint(tmp_path / "last.ckpt")
    torch.manual_seed(7)
    loaded = lightning_ft.load_from_checkpoint(BertInInit, tmp_path / "last.ckpt").to(dtype(module))
    assert torch.equal(output(loaded), output(module))
    lightning_ft.save_adapter(module, tmp_path / "adapter")
    lightning_ft.load_adapter(untouched, tmp_path / "adapter")
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype(module) == torch.float32 else {"atol": 5e-2, "rtol": 5e-2}
    torch.testing.assert_close(output(untouched), output(module), **close)

    # merge: dense, to a plain model; or its refusal
    if not acts_on_weights_alone(METHODS[name]):
        with pytest.raises(NotImplementedError, match="can't be merged"):
            lightning_ft.merge(module)
        return
    wanted = output(module)
    lightning_ft.merge(module, dequantize=True)
    lightning_ft.dequantize(module)
    assert [type(part) for part in module.modules()] == [type(part) for part in make(BertInInit).modules()]
    assert list(module.state_dict()) == list(make(BertInInit).state_dict())
    torch.testing.assert_close(output(module), wanted, **close)


@pytest.mark.parametrize("of_trainer", ["32-true", "bf16-mixed", "bf16-true"])
def test_small_steps_are_not_lost(of_trainer: str) -> None:
    """In bf16 0.05 less 1e-4 is 0.05; 50 such steps of AdamW take what is kept in fp32 to 0.045."""

    class Falling(BertInInit):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return 0 * self.outputs(batch[0]).sum() + sum(p.sum() for p in trained(self))

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=1e-4)

    def trained(module: Any) -> list[Any]:
        return [module.get_parameter(name) for name in injected_names(module)]

    module = make(Falling)
    lora = METHODS["lora"]
    lora.inject(module)
    for parameter in trained(module):
        torch.nn.init.constant_(parameter, 0.05)
    trainer(copy.copy(lora), precision=of_trainer, max_epochs=-1, max_steps=50, limit_val_batches=0).fit(module)
    for parameter in trained(module):
        torch.testing.assert_close(parameter, torch.full_like(parameter, 0.045), atol=2e-4, rtol=0)
    kept_in_bf16 = torch.nn.Parameter(torch.tensor([0.05], dtype=torch.bfloat16))
    steps = torch.optim.Adam([kept_in_bf16], lr=1e-4)
    for _ in range(50):
        kept_in_bf16.grad = torch.ones_like(kept_in_bf16)
        steps.step()
    assert kept_in_bf16.item() == pytest.approx(0.05, abs=2e-4), "the trap"


def test_bf16_and_packed_bases_learn_as_fp32_does() -> None:
    """Over 100 steps of LoRA on a language model whose words follow one another."""
    rows = (torch.arange(8)[:, None] + 3 * torch.arange(12)) % 37 + 1

    class Model(BertInInit):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny.llama_lm(hidden_size=64, intermediate_size=128).train()
            self.losses: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = self.model(input_ids=batch[0], labels=batch[0]).loss
            self.losses.append(loss.item())
            return loss

        def train_dataloader(self) -> Any:
            return DataLoader(TensorDataset(rows), batch_size=8)

    losses = {}
    for kind in ("fp32", "bf16-mixed", "bf16", "nf4"):
        of_trainer, packing = precision(kind)
        module, lora = make(Model), LoRA(r=8, quantize=packing)
        run = trainer(lora, precision=of_trainer, max_epochs=-1, max_steps=100, limit_val_batches=0)
        run.fit(module)
        losses[kind] = torch.tensor(module.losses)
    assert losses["fp32"][-10:].mean() < 0.8 * losses["fp32"][0]
    for kind in ("bf16-mixed", "bf16"):
        assert (losses[kind] / losses["fp32"] - 1).abs().max() < 0.02, kind
    assert losses["nf4"][-10:].mean() < 1.02 * losses["fp32"][-10:].mean()
