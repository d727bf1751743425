"""Two processes train as one does with batches of both: DDP, and FSDP2 with what it saves and resumes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
from commands import python, reviews, write_csv
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file
from tiny import bert_classifier
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import lightning_ft
from lightning_ft import AdaLoRA, Adapter, Averaging, Classification, FineTuner, GradualUnfreezing, LoRA, PromptTuning
from lightning_ft.errors import UserError
from lightning_ft.files.state import whole
from lightning_ft.injection import InjectionError
from lightning_ft.tasks.penalties.l2 import L2

pytestmark = pytest.mark.filterwarnings("ignore:.*in eval mode")  # of which there's no dropout

SCRIPT = '''
import os, sys
from functools import partial
import lightning as L, torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_ft import CausalLM, Classification, FineTuner, LoRA, TextDataModule, save_adapter
from tiny import llama_lm

QUIET = dict(
    accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    num_sanity_val_steps=0,
)

def fit_lm(strategy, devices):
    """A language model trained on batches of four texts, of which as many tokens are learned as the number says."""
    rows = [{"input_ids": torch.arange(1, 9) + i, "labels": torch.arange(1, 9) + i} for i in range(8)]
    for i, row in enumerate(rows):
        row["labels"][: 7 - i] = -100
    module = FineTuner(llama_lm(), CausalLM("unused", generations=0), partial(torch.optim.SGD, lr=0.1))
    how = dict(devices=devices, strategy=strategy, use_distributed_sampler=False)
    trainer = L.Trainer(max_epochs=2, callbacks=[LoRA(r=2)], **how, **QUIET)
    torch.manual_seed(0)
    own = rows[trainer.global_rank :: devices] if devices > 1 else rows
    trainer.fit(module, torch.utils.data.DataLoader(own, batch_size=4 // devices))
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}

def fit(model, folder, strategy, devices, epochs, **more):
    """A module trained on batches of eight rows, of all processes together, and its Trainer."""
    data = TextDataModule(folder, model, batch_size=8 // devices)
    torch.manual_seed(0)
    module = FineTuner(model, Classification(data.labels), partial(torch.optim.AdamW, lr=1e-2))
    module.model.eval()
    trainer = L.Trainer(
        devices=devices, strategy=strategy, max_epochs=epochs, gradient_clip_val=0.5, callbacks=[LoRA(r=4)], **QUIET
    )
    trainer.fit(module, data, **more)
    return module, trainer

if __name__ == "__main__":
    model, folder, out = sys.argv[1:]
    torch.save(fit_lm("ddp", 2), f"{out}/lm{os.environ['LOCAL_RANK']}")
    module, trainer = fit(model, folder, "ddp", 2, 2)
    save_adapter(module, f"{out}/ddp")
    sharding = partial(ModelParallelStrategy, data_parallel_size=2, tensor_parallel_size=1)
    _, trainer = fit(model, folder, sharding(), 2, 1)
    trainer.save_checkpoint(f"{out}/half.ckpt")
    module, trainer = fit(model, folder, sharding(), 2, 2, ckpt_path=f"{out}/half.ckpt")
    save_adapter(module, f"{out}/fsdp")
    scores = trainer.validate(module, TextDataModule(folder, model, batch_size=4), verbose=False)[0]
    if trainer.is_global_zero:
        torch.save(scores, f"{out}/scores")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
'''


@pytest.mark.slow
def test_two_processes_train_as_one_does_with_batches_of_both(tmp_path: Path, tiny_bert_dir: str) -> None:
    folder, script = tmp_path / "data", tmp_path / "script.py"
    folder.mkdir()
    for seed, (split, count) in enumerate((("train", 40), ("validation", 12), ("test", 6))):
        write_csv(folder / f"{split}.csv", reviews(count, seed))
    script.write_text(SCRIPT)
    places = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    cache = str(tmp_path / "cache")
    answer = python(script, tiny_bert_dir, folder, tmp_path, HF_DATASETS_CACHE=cache, PYTHONPATH=places)
    assert answer.returncode == 0, answer.stderr[-3000:]

    own: dict[str, Any] = {"__name__": "script"}
    exec(SCRIPT, own)
    torch.testing.assert_close(torch.load(tmp_path / "lm0"), own["fit_lm"]("auto", 1), rtol=1e-5, atol=1e-5)
    module, trainer = own["fit"](tiny_bert_dir, folder, "auto", 1, 2)
    lightning_ft.save_adapter(module, tmp_path / "one")
    one = load_file(tmp_path / "one" / "adapter_model.safetensors")
    for strategy in ("ddp", "fsdp"):  # that of FSDP2 was interrupted and resumed
        both = load_file(tmp_path / strategy / "adapter_model.safetensors")
        torch.testing.assert_close(both, one, rtol=1e-5, atol=1e-5, msg=lambda said, s=strategy: f"{s}: {said}")
    assert any(value.abs().max() > 0.01 for name, value in one.items() if "lora_B" in name), "nothing was learned"

    half = torch.load(tmp_path / "half.ckpt")
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert trained <= set(half["state_dict"])
    assert len(half["state_dict"]) < len(module.state_dict()) / 2
    resumed, _ = own["fit"](tiny_bert_dir, folder, "auto", 1, 2, ckpt_path=str(tmp_path / "half.ckpt"))
    for name in trained:  # begun by two processes, ended by one
        expected = module.get_parameter(name)
        torch.testing.assert_close(resumed.get_parameter(name), expected, rtol=1e-5, atol=1e-5)
    scores = trainer.validate(module, own["TextDataModule"](folder, tiny_bert_dir, batch_size=8), verbose=False)[0]
    assert torch.load(tmp_path / "scores") == pytest.approx(scores, rel=1e-4)


# ---------------------------------------------------------------- FSDP2 in one process, which has all the parts


@pytest.fixture
def sharding() -> Iterator[partial[ModelParallelStrategy]]:
    with mock.patch.dict(os.environ):
        yield partial(ModelParallelStrategy, data_parallel_size=1, tensor_parallel_size=1)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def loader() -> Any:
    rows: Any = [{"input_ids": torch.arange(1, 8) + i, "labels": torch.tensor(i % 2)} for i in range(4)]
    return torch.utils.data.DataLoader(rows, batch_size=2)


def trainer(strategy: Any, *callbacks: L.Callback, **more: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_steps": 2}
    quiet["use_distributed_sampler"] = False  # which would shuffle
    return L.Trainer(
        accelerator="cpu", devices=1, strategy=strategy, callbacks=list(callbacks), enable_model_summary=False,
        **{**quiet, **more},
    )  # fmt: skip


def finetuner(**more: Any) -> FineTuner:
    task = Classification(["a", "b", "c"])
    return FineTuner(bert_classifier(), task, partial(torch.optim.AdamW, lr=0.01), **more)


@pytest.mark.parametrize(
    "method",
    [LoRA(r=2), LoRA(r=2, init_lora_weights="pissa"), Adapter(), PromptTuning(num_virtual_tokens=3)],
    ids=["lora", "pissa", "adapter", "prompt"],
)
def test_what_shards_hold_is_saved_whole(method: Any, sharding: partial[ModelParallelStrategy], tmp_path: Path) -> None:
    data = loader()
    torch.manual_seed(0)
    whole = finetuner()
    trainer("auto", method).fit(whole, data)
    lightning_ft.save_adapter(whole, tmp_path / "whole")
    torch.manual_seed(0)
    shared = finetuner()
    trainer(sharding(), method).fit(shared, data)
    shared.state_dict()  # parts take the places of what an evaluation has gathered
    assert all(isinstance(parameter, DTensor) for parameter in shared.parameters())
    lightning_ft.save_adapter(shared, tmp_path / "shared")
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("shared", "whole"))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_adapters_keep_fp32_beside_shards_of_bf16(sharding: partial[ModelParallelStrategy]) -> None:
    trained = []
    for strategy in ("auto", sharding()):
        module = finetuner()
        torch.manual_seed(0)
        trainer(strategy, LoRA(r=2), precision="bf16-true").fit(module, loader())
        trained.append({name: whole(p.detach()) for name, p in module.named_parameters() if p.requires_grad})
        assert {p.dtype for name, p in module.named_parameters() if "lora" in name} == {torch.float32}
        assert module.model.bert.embeddings.word_embeddings.weight.dtype is torch.bfloat16
    torch.testing.assert_close(*trained, rtol=0, atol=0)


def test_the_best_checkpoint_is_an_ordinary_one_and_comes_back(
    sharding: partial[ModelParallelStrategy], tmp_path: Path
) -> None:
    module, saved = finetuner(), ModelCheckpoint(tmp_path, filename="kept", save_last=False)
    fit = trainer(sharding(), LoRA(r=2), saved, enable_checkpointing=True, max_epochs=1)
    fit.fit(module, loader())
    trained = {name: whole(p.detach()).clone() for name, p in module.named_parameters() if p.requires_grad}
    kept = torch.load(saved.best_model_path)
    assert set(kept["state_dict"]) >= set(trained)
    assert not [name for name, p in module.named_parameters() if not p.requires_grad and name in kept["state_dict"]]
    for name, value in trained.items():
        assert type(kept["state_dict"][name]) is torch.Tensor
        torch.testing.assert_close(kept["state_dict"][name], value, rtol=0, atol=0)
    moments = kept["optimizer_states"][0]["state"]
    assert len(moments) == len(trained)
    assert all(type(value) is torch.Tensor for state in moments.values() for value in state.values())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(parameter.requires_grad * 2 or 1)
    fit.test(module, loader(), ckpt_path=saved.best_model_path, verbose=False)
    for name, value in trained.items():
        torch.testing.assert_close(whole(module.state_dict()[name]), value, rtol=0, atol=0)


class Own(L.LightningModule):
    """A user's module that shards; where it builds its model, and whether it injects by itself, is the test's."""

    def __init__(self, early: bool, method: LoRA | None = None) -> None:
        super().__init__()
        self.method = method
        self.model = bert_classifier() if early else None

    def configure_model(self) -> None:
        self.model = self.model or bert_classifier()
        if self.method is not None:
            self.method.inject(self)
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Any, index: int) -> Any:
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_module_is_injected_before_it_shards_itself_or_must_inject_itself(
    sharding: partial[ModelParallelStrategy],
) -> None:
    for module in (Own(early=True), Own(early=False, method=LoRA(r=2))):
        module_trainer = trainer(sharding(), LoRA(r=2))
        module_trainer.fit(module, loader())
        trained = {name for name, p in module.named_parameters() if p.requires_grad}
        assert {name.rpartition(".")[2] for name in trained} == {"lora_A", "lora_B", "weight", "bias"}
        assert all(name.startswith("model.classifier") for name in trained if "lora" not in name)
        assert all(p.abs().sum() > 0 for name, p in module.named_parameters() if name.endswith("lora_B"))
        assert all(p.dtype is torch.float32 for p in module.parameters())
    with pytest.raises(InjectionError, match=r"Inject in\s+configure_model\(\), before fully_shard: LoRA"):
        trainer(sharding(), LoRA(r=2)).fit(Own(early=False), loader())


def test_what_cannot_be_sharded_is_refused(sharding: partial[ModelParallelStrategy]) -> None:
    with pytest.raises(UserError, match=r"penalties look at whole weights. Use strategy='ddp'"):
        trainer(sharding(), LoRA(r=2)).fit(finetuner(penalties=[L2(1.0)]), loader())
    for method in (AdaLoRA(), GradualUnfreezing()):
        with pytest.raises(InjectionError, match="shards"):
            trainer(sharding(), method).fit(finetuner(), loader())
    with pytest.raises(InjectionError, match=r"Averaging copies the module, .*Use strategy='ddp'"):
        trainer(sharding(), LoRA(r=2), Averaging()).fit(finetuner(), loader())
    with pytest.raises(InjectionError, match=r"LoRA: FSDP2 can't share out a base that is packed.*Use strategy='ddp'"):
        trainer(sharding(), LoRA(r=2, quantize="nf4")).fit(Own(early=True), loader())
    module = finetuner()
    trainer(sharding(), LoRA(r=2)).fit(module, loader())
    with pytest.raises(InjectionError, match="save_adapter"):
        lightning_ft.merge(module)
