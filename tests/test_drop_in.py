"""One added line turns a foreign LightningModule into a LoRA fine-tune: nothing else of it changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import CNN, MODULES, Classifier, TorchTransformer, make, trainer
from torch import Tensor

import lightning_ft
from lightning_ft import LoRA
from lightning_ft.injection import injected_names

each_module = pytest.mark.parametrize("kind", MODULES, ids=lambda kind: kind.__name__)


def lora(kind: type[Classifier]) -> LoRA:
    return LoRA(r=2, **MODULES[kind])


def built(kind: type[Classifier]) -> Classifier:
    """The module as it is before training, wherever it builds itself."""
    module = make(kind)
    module.setup("fit")
    module.configure_model()
    return module


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


@each_module
def test_only_what_is_marked_or_head_moves_and_each_of_it_does(kind: type[Classifier]) -> None:
    before = state(built(kind))
    module = make(kind)
    trainer(lora(kind), max_epochs=3).fit(module)
    after = state(module)
    added = injected_names(module)
    assert added
    assert set(after) == set(before) | added
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    of_head = {key for key in before if key.startswith(("head.", "model.classifier", "model.pre_classifier", "embed."))}
    assert moved == of_head
    assert trained == added | {key for key in of_head if key in dict(module.named_parameters())}
    assert all(after[key].abs().sum() > 0 for key in added), "a matrix that began at zero is still there"


@each_module
def test_a_checkpoint_holds_what_trained_alone_and_resumes_as_if_never_interrupted(
    kind: type[Classifier], tmp_path: Path
) -> None:
    first, module = trainer(lora(kind), max_epochs=1), make(kind)
    first.fit(module)
    for weights_only in (True, False):
        first.save_checkpoint(tmp_path / "x.ckpt", weights_only=weights_only)
        trained = {name for name, p in module.named_parameters() if p.requires_grad}
        buffers = {name for name, _ in module.named_buffers() if name.startswith("head.")}
        assert set(torch.load(tmp_path / "x.ckpt")["state_dict"]) == trained | buffers

    whole, resumed = make(kind), make(kind)
    trainer(lora(kind), max_epochs=3).fit(whole)
    assert resumed.strict_loading
    torch.manual_seed(99)  # what is injected begins elsewhere, and must be overwritten
    trainer(lora(kind), max_epochs=3).fit(resumed, ckpt_path=tmp_path / "x.ckpt")
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


@each_module
def test_merging_gives_the_same_outputs_from_the_original_tree(kind: type[Classifier]) -> None:
    original = built(kind)
    module = make(kind)
    trainer(lora(kind), max_epochs=2).fit(module)
    module.eval()
    with torch.no_grad():
        unmerged = module.outputs(module.example())
        assert lightning_ft.merge(module)
        merged = module.outputs(module.example())
    torch.testing.assert_close(merged, unmerged, atol=1e-5, rtol=1e-5)
    assert {name: type(m) for name, m in module.named_modules()} == {
        name: type(m) for name, m in original.named_modules()
    }
    assert list(module.state_dict()) == list(original.state_dict())
    for (name, ours), (_, theirs) in zip(module.named_modules(), original.named_modules(), strict=True):
        if name:  # the root has attributes of Lightning's own by now
            # The base's root remembers that it was merged, so that it's evaluated as it is.
            assert set(vars(ours)) - {"_thawed_by_lightning_ft"} == set(vars(theirs)), name


@pytest.mark.parametrize("kind", [CNN, TorchTransformer])
def test_evaluation_sees_what_training_sees(kind: type[Classifier]) -> None:
    """No fused path skips what was injected; with dropout off and norms evaluating, modes change nothing."""
    module = make(kind)
    trainer(lora(kind), max_epochs=2).fit(module)
    module.eval()
    with torch.no_grad():
        evaluated = module.outputs(module.example())
    graded = module.outputs(module.example())
    copied = copy.deepcopy(module)
    lightning_ft.merge(copied)
    torch.testing.assert_close(evaluated, graded, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(evaluated, copied.outputs(copied.example()), atol=1e-5, rtol=1e-5)


@each_module
def test_every_entry_point_works_and_a_second_fit_goes_on(kind: type[Classifier], tmp_path: Path) -> None:
    module, run = make(kind), trainer(lora(kind), max_epochs=1)
    run.validate(module, verbose=False)
    untrained = run.predict(module)
    run.fit(module)
    run.save_checkpoint(tmp_path / "x.ckpt")
    run.test(module, verbose=False)
    trained = run.predict(module)
    assert not torch.equal(torch.cat(untrained), torch.cat(trained))

    fresh = make(kind)
    torch.testing.assert_close(
        torch.cat(trainer(lora(kind)).predict(fresh, ckpt_path=tmp_path / "x.ckpt")), torch.cat(trained)
    )
    before = state(module)
    trainer(lora(kind), max_epochs=1).fit(module)
    assert set(before) == set(module.state_dict())
    assert any(not torch.equal(before[key], value) for key, value in module.state_dict().items())


@each_module
def test_load_from_checkpoint_gives_the_trained_module(kind: type[Classifier], tmp_path: Path) -> None:
    module, run = make(kind), trainer(lora(kind), max_epochs=1)
    run.fit(module)
    run.save_checkpoint(tmp_path / "x.ckpt")
    torch.manual_seed(7)
    loaded = lightning_ft.load_from_checkpoint(kind, tmp_path / "x.ckpt")
    assert type(loaded) is kind
    assert set(loaded.state_dict()) == set(module.state_dict())
    for key, value in module.state_dict().items():
        if not key.startswith(("body.1", "body.6")) or "running" not in key:
            assert torch.equal(value, loaded.state_dict()[key]), key
    assert any("lora" in vars(m) for m in loaded.modules())


def test_pytorch_lightning_imports_are_served(tmp_path: Path) -> None:
    import pytorch_lightning as pl

    class Foreign(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = torch.nn.Linear(4, 4)
            self.head = torch.nn.Linear(4, 2)

        def setup(self, stage: str) -> None:
            self.was_set_up = True

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return self.head(self.encoder(batch[0])).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=0.1)

    def fit(epochs: int, **more: Any) -> tuple[pl.Trainer, Foreign]:
        torch.manual_seed(0)
        module = Foreign()
        run = pl.Trainer(
            max_epochs=epochs, callbacks=[LoRA(r=2, backbone="encoder", target_modules=".*")], accelerator="cpu",
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        rows = torch.utils.data.TensorDataset(torch.arange(32.0).view(8, 4))
        run.fit(module, torch.utils.data.DataLoader(rows, batch_size=4), **more)
        return run, module

    run, _ = fit(1)
    run.save_checkpoint(tmp_path / "x.ckpt")
    assert set(torch.load(tmp_path / "x.ckpt")["state_dict"]) == {
        "encoder.lora_A", "encoder.lora_B", "head.weight", "head.bias",
    }  # fmt: skip
    _, whole = fit(2)
    _, resumed = fit(2, ckpt_path=tmp_path / "x.ckpt")
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in whole.state_dict().items())
