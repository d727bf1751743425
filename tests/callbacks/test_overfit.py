"""The line on over-fitting, of made-up curves and of a fit; and the presets beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from foreign import BertInInit, make, trainer
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

from lightning_ft import Averaging, LoRA, Overfitting, Retention, TrunkCache
from lightning_ft.apps.paths import conf_dir
from lightning_ft.callbacks.overfit import Point, judge

CURVES: dict[str, tuple[list[float], list[float], int | None, str]] = {
    "over-fits": (
        [3, 2, 1, 0.5],
        [2, 1, 1.5, 2],
        20,
        "Over-fitting from step 20 on: validation loss 1 → 2, while training",
    ),
    "still gets better": ([3, 2, 1], [3, 2, 1], None, "the last validation, at step 30, was the best"),
    "stands still": ([3, 2, 1, 0.5], [2, 1, 1.001, 1.002], None, "since step 20 validation has stood still"),
    "wobbles": ([3, 2, 1, 0.5, 0.4], [2, 1, 1.2, 0.9, 1.3], 40, "from step 40 on"),
    "diverges": ([1, 2, 3], [1, 2, 3], None, "the learning rate may be too high"),
    "one validation": ([1], [1], None, "can't tell"),
    "none": ([], [], None, "can't tell"),
}


@pytest.mark.parametrize("name", CURVES)
def test_the_line_says_what_the_curves_show(name: str) -> None:
    train, validation, step, line = CURVES[name]
    points = [Point(10 * (i + 1), t, v) for i, (t, v) in enumerate(zip(train, validation, strict=True))]
    verdict = judge(points)
    assert verdict.step == step
    assert line in verdict.line


class Losses(BertInInit):
    """Its losses are given, by the epoch."""

    train_losses, val_losses = (3.0, 2.0, 1.0), (2.0, 1.0, 4.0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 0 * super().training_step(batch, batch_idx) + self.train_losses[self.current_epoch]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.val_losses[min(self.current_epoch, 2)])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_in_a_fit_it_is_the_mean_losses_of_each_epoch_resumed_too(tmp_path: Path, accumulate: int) -> None:
    whole, first, second = Overfitting(), Overfitting(), Overfitting()
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate}
    trainer(whole, max_epochs=3, **options).fit(make(Losses))
    steps = 3 if accumulate == 1 else 2
    assert whole.points == [(steps, 3.0, 2.0), (2 * steps, 2.0, 1.0), (3 * steps, 1.0, 4.0)]
    assert whole.verdict.step == 2 * steps
    saving = ModelCheckpoint(tmp_path, filename="x")
    trainer(first, saving, max_epochs=2, enable_checkpointing=True, **options).fit(make(Losses))
    again = ModelCheckpoint(tmp_path, filename="y")
    trainer(second, again, max_epochs=3, enable_checkpointing=True, **options).fit(
        make(Losses), ckpt_path=tmp_path / "x.ckpt"
    )
    assert second.points == whole.points


# ------------------------------------------------------------------------------------- the presets


def callbacks(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("train", [*overrides])
        del config.callbacks.checkpoint  # it asks Hydra for the run's folder
    return instantiate(config.callbacks, _convert_="all")


def test_presets_go_beside_the_default_ones() -> None:
    names = ["default", "early_stopping", "averaging", "overfit", "retention", "trunk_cache"]
    found = callbacks(f"callbacks=[{','.join(names)}]", "callbacks.early_stopping.patience=5")
    assert {"learning_rate", "efficiency"} < set(found)
    kinds = {
        "early_stopping": EarlyStopping,
        "averaging": Averaging,
        "overfit": Overfitting,
        "retention": Retention,
        "trunk_cache": TrunkCache,
    }
    assert {name: type(found[name]) for name in kinds} == kinds
    assert found["early_stopping"].patience == 5
    assert {path.stem for path in (conf_dir() / "callbacks").glob("*.yaml")} == set(names)


def test_an_average_is_the_moving_one_and_leaves_what_is_frozen_as_it_was() -> None:
    averaging, seen = Averaging(decay=0.9, start=2), Weights()
    module = make(BertInInit)
    before = {key: value.clone() for key, value in {**dict(module.named_buffers()), **module.state_dict()}.items()}
    trainer(LoRA(r=2), averaging, seen, max_epochs=4).fit(module)
    after = {**dict(module.named_buffers()), **module.state_dict()}
    assert all(torch.equal(after[key], value) for key, value in before.items() if not key.startswith("model.class"))
    average = seen.weights[2]
    for weight in seen.weights[3:]:
        average = 0.9 * average + 0.1 * weight
    torch.testing.assert_close(module.model.classifier.weight.detach(), average)
    with pytest.raises(ValueError, match="decay"):
        Averaging(decay=1.0)


class Weights(L.Callback):
    """Of the head, after each step."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.weights.append(pl_module.model.classifier.weight.detach().clone())
