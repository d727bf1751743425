"""``gradient_checkpointing``, ``compile`` and the like: one key each, for every method; and the doctor, by default."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import call, reviews, succeed, tiny_run, write_csv
from lightning.pytorch import Callback
from transformers import PreTrainedModel

from lightning_ft import ActivationRecompute, PackedWeights
from lightning_ft.apps import build
from lightning_ft.callbacks.compile import Compile


@pytest.fixture
def run(tiny_bert_dir: str, tmp_path: Path) -> list[str]:
    data = write_csv(tmp_path / "reviews.csv", reviews(36, seed=5))
    return tiny_run(tiny_bert_dir, data, "trainer.max_epochs=1")


class Seen(Callback):
    """Whether layers were checkpointed and the model was compiled while it trained."""

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:  # type: ignore[no-untyped-def]
        model: PreTrainedModel = pl_module.model
        self.found = (model.is_activation_checkpointing, model._compiled_call_impl is not None)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    callback, savers = Seen(), build.savers
    monkeypatch.setattr(build, "savers", lambda config: [*savers(config), callback])
    yield callback
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        ([], (False, False)),
        (["gradient_checkpointing=true"], (True, False)),
        (["activation_recompute=true", "packed_weights=true", "method.target_modules=all-linear"], (False, False)),
        (["compile={backend: eager, dynamic: true}", "method=prompt"], (False, True)),
    ],
)
def test_a_run_trains_as_asked_and_the_doctor_finds_it_well(
    run: list[str], seen: Seen, overrides: list[str], found: tuple[bool, bool]
) -> None:
    out = succeed(*run, *overrides, "callbacks.doctor.on_fault=raise", "hydra.run.dir=out")
    assert seen.found == found
    assert "Doctor: all well after the first step" in (Path("out") / "train.log").read_text()
    assert json.loads((Path("out") / "results.json").read_text())["steps"] > 0
    assert out


@pytest.mark.parametrize("wanted", ["maybe", "[1]", "{modus: fast}"])
def test_what_compile_is_not_is_said_before_anything_is_read(run: list[str], wanted: str) -> None:
    message = call(*run, f"compile={wanted}").message
    assert message.startswith("compile must be true, false or arguments of mode, dynamic, fullgraph, backend, backbone")


def test_what_does_not_go_together_is_said_before_anything_is_read(run: list[str]) -> None:
    message = call(*run, "activation_recompute=true", "compile=true").message
    assert message.strip() == "activation_recompute has no part beside compile: leave one of them out."


def test_true_is_with_the_defaults() -> None:
    from omegaconf import OmegaConf

    recompute, packing = build.savers(OmegaConf.create({"activation_recompute": True, "packed_weights": True}))
    assert isinstance(recompute, ActivationRecompute)
    assert isinstance(packing, PackedWeights)
    (callback,) = build.savers(OmegaConf.create({"compile": True}))
    assert isinstance(callback, Compile)
    assert (callback.mode, callback.backend) == (None, "inductor")
    assert build.savers(OmegaConf.create({"compile": False})) == []
