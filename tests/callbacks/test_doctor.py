"""The doctor: each fault is made on purpose, and told with its cause. That every method is well is in the contract."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from foreign import CNN, BertInInit, Classifier, ManualTwoOptimizers, TrunkInSetup, make, trainer
from torch import Tensor, nn

from lightning_ft import Doctor, FullFineTuning, LoRA
from lightning_ft.callbacks.doctor import DoctorError


def adam(module: Any, lr: float = 1e-3) -> Any:
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), lr=lr)
    return module


def faults(module: Any, *callbacks: Any, **more: Any) -> list[str]:
    """What the doctor finds; each is told as a warning or an error with the table."""
    doctor = Doctor()
    with pytest.warns(UserWarning, match=r"Doctor: \d faults? after the first step") as told:
        trainer(*callbacks, doctor, **{"max_steps": 1, **more}).fit(module)
    assert doctor.report is not None
    assert str(told[-1].message) == str(doctor.report)
    assert "MiB" in str(doctor.report)
    with pytest.raises(ValueError, match="on_fault must be one of warn, raise"):
        Doctor("stop")  # type: ignore[arg-type]
    return list(doctor.report.faults)


def well(module: Any, *callbacks: Any, **more: Any) -> str:
    doctor = Doctor(on_fault="raise")
    trainer(*callbacks, doctor, **{"max_steps": 1, **more}).fit(module)
    return str(doctor.report)


def test_all_well_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lightning.pytorch")
    line = well(adam(make(BertInInit)), LoRA(r=2))
    frozen = len(list(make(BertInInit).model.bert.parameters()))
    assert line.startswith(
        f"Doctor: all well after the first step: 10 tensors have a gradient, the frozen base ({frozen} tensors) is"
        " unchanged, "
    )
    assert "trained in float32, frozen in float32, loss 1." in line
    assert line.endswith(", lr 0.001.")
    assert "\n" not in line
    assert [m for m in caplog.messages if "Doctor" in m] == [line]


@pytest.mark.parametrize(("lr", "word"), [(5e-5, "low"), (0.5, "high")])
def test_a_rate_of_another_method_is_told(lr: float, word: str) -> None:
    (fault,) = faults(adam(make(BertInInit), lr), LoRA(r=2))
    assert fault.startswith(f"The learning rate {lr:g} is unusually {word} for LoRA: 0.0001 to 0.01 is usual.")


def test_the_rate_is_that_after_the_warm_up_and_of_the_base() -> None:
    module = adam(make(BertInInit))

    def scheduled(schedule: Any, *groups: Any) -> Any:
        optimizer = torch.optim.AdamW(list(groups) or module.parameters(), lr=1e-3)
        return [optimizer], [{"scheduler": schedule(optimizer), "interval": "step"}]

    warm_up = lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)  # noqa: E731
    cycle = lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=100)  # noqa: E731
    module.configure_optimizers = lambda: scheduled(warm_up)
    assert "lr 0.001" in well(module, LoRA(r=2))
    module.configure_optimizers = lambda: scheduled(cycle)
    assert "lr 0.002" in well(module, LoRA(r=2))
    head = {"params": module.model.classifier.parameters(), "lr": 0.1}
    module.configure_optimizers = lambda: scheduled(warm_up, {"params": module.model.bert.parameters()}, head)
    assert "lr 0.001" in well(module, LoRA(r=2))
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.5)
    assert "lr" not in well(module, LoRA(r=2))


def test_a_pooler_that_nobody_reads_is_named() -> None:
    module = make(TrunkInSetup)
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), lr=1e-4)
    (fault,) = faults(module, FullFineTuning())
    assert "2 of" in fault
    assert "trunk.pooler.dense.weight, trunk.pooler.dense.bias. The pooler's output is read by nobody" in fault


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_reentrant_checkpointing_is_named() -> None:
    module = adam(make(BertInInit))
    module.model.activation_checkpointing_enable({"use_reentrant": True})
    module.model.disable_input_require_grads()
    (fault,) = faults(module, LoRA(r=2))
    assert fault.startswith("8 of 10 trained tensors got no gradient: model.bert.encoder.layer.0.")
    assert "and 3 more. Gradient checkpointing with use_reentrant=True" in fault


class Detached(TrunkInSetup):
    def outputs(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(input_ids=x).last_hidden_state.mean(dim=1).detach())


class Unstable(BertInInit):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        with torch.no_grad():
            self.model.bert.embeddings.word_embeddings.weight.mul_(1.5)
        return super().training_step(batch, batch_idx) * float("nan")


class Forgetful(ManualTwoOptimizers):
    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.detach()


def test_other_causes_are_named() -> None:
    (detached,) = faults(adam(make(Detached)), LoRA(r=2))
    assert "8 of 10 trained tensors got no gradient" in detached
    assert "They aren't on the way from the data to the loss" in detached

    changed, loss = faults(adam(make(Unstable)), LoRA(r=2))
    assert "1 of 39 tensors of the frozen base have changed: bert.embeddings.word_embeddings.weight" in changed
    assert loss.startswith("The loss is nan")

    (nothing,) = faults(make(Forgetful), LoRA(r=2, backbone="encoder", target_modules=["0", "2"]))
    assert "6 of 6 trained tensors" in nothing
    assert "The loss doesn't depend on anything that trains" in nothing

    module = make(TrunkInSetup)
    module.configure_optimizers = lambda: torch.optim.AdamW(module.trunk.parameters(), lr=1e-3)
    (unheld,) = faults(module, LoRA(r=2))
    assert "2 tensors are to train, and no optimizer holds them: head.weight, head.bias." in unheld


def test_it_may_end_the_training() -> None:
    class Broken(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Embedding(50, 3), nn.Linear(3, 3)

        def outputs(self, x: Tensor) -> Tensor:
            return self.used(x).mean(dim=1)

    with pytest.raises(DoctorError, match=r"(?s)2 of 3 trained tensors.*unused\.weight.*optimizer  float32.*MiB"):
        well(Broken())


def test_it_looks_once_after_the_first_step_of_each_fit_whatever_is_accumulated(tmp_path: Path) -> None:
    seen = []

    class Late(BertInInit):
        """Gives the trunk a gradient in its second batch alone."""

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            seen.append((self.trainer.global_step, doctor.report is not None))
            out = self.outputs(batch[0])
            return F.cross_entropy(out if batch_idx == 1 else out.detach() + self.model.classifier.bias, batch[1])

    doctor, module = Doctor(on_fault="raise"), adam(make(Late))
    run = trainer(LoRA(r=2), doctor, accumulate_grad_batches=2, max_epochs=1)
    run.fit(module)
    assert seen == [(0, False), (0, False), (1, True)]
    first = doctor.report
    run.save_checkpoint(tmp_path / "x.ckpt")
    again = trainer(LoRA(r=2), doctor, accumulate_grad_batches=2, max_epochs=2)
    again.fit(adam(make(Late)), ckpt_path=tmp_path / "x.ckpt")
    assert seen[3:] == [(2, False), (2, False), (3, True)]
    assert doctor.report is not None
    assert doctor.report is not first
    assert first is not None
    loss = float(str(first).partition("loss ")[2].split(",")[0])
    torch.manual_seed(7)
    assert loss == pytest.approx(1.1, abs=0.3), "of a batch, not of its share in the step"


def test_the_dtypes_are_told() -> None:
    line = well(adam(make(BertInInit)), LoRA(r=2), precision="bf16-true")
    assert "trained in bfloat16 and float32, frozen in bfloat16" in line  # the head is the user's
    doctor = Doctor()
    module = adam(make(BertInInit))
    trainer(LoRA(r=2), doctor, max_steps=1, precision="bf16-true").fit(module)
    assert doctor.report is not None
    size = lambda trains, dtype: sum(  # noqa: E731
        p.numel() * p.element_size() for p in module.parameters() if p.requires_grad is trains and p.dtype == dtype
    )
    assert doctor.report.dtypes == {
        ("trained", "float32"): size(True, torch.float32),
        ("trained", "bfloat16"): size(True, torch.bfloat16),
        ("frozen", "bfloat16"): size(False, torch.bfloat16),
        ("optimizer", "float32"): 2 * size(True, torch.float32),
        ("optimizer", "bfloat16"): 2 * size(True, torch.bfloat16),
    }


def test_it_drops_into_a_project_without_a_method() -> None:
    class Teacher(CNN):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = nn.Linear(1, 1).requires_grad_(False)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.teacher.weight.lerp_(torch.ones(1, 1), 0.1)
            return super().training_step(batch, batch_idx)

    assert "all well" in well(make(Teacher))
