"""GradientCheckpointing: what it refuses, and how it leaves models. That gradients stay is in the contract."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import tiny
from foreign import CNN, GPT2, BertInInit, make, trainer
from torch import Tensor, nn

from lightning_ft import GradientCheckpointing, InjectionError, LoRA


class Interrupted(GPT2):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        assert not self.lm.config.use_cache
        assert all(block.gradient_checkpointing for block in self.lm.transformer.h)
        if batch_idx == 1:
            raise RuntimeError("in the middle")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("kind", [GPT2, Interrupted])
def test_models_are_as_they_were_afterwards(kind: Any) -> None:
    module = make(kind)
    module.lm.transformer.h[1].gradient_checkpointing = True
    hooks = {name: dict(part._forward_hooks) for name, part in module.named_modules()}
    callback = GradientCheckpointing()
    for _ in range(2):
        run = trainer(LoRA(r=2, target_modules="all-linear"), callback, max_epochs=1)
        if kind is Interrupted:
            with pytest.raises(RuntimeError, match="in the middle"):
                run.fit(module)
        else:
            run.fit(module)
        assert module.lm.config.use_cache
        assert [block.gradient_checkpointing for block in module.lm.transformer.h] == [False, True]
        assert {name: dict(part._forward_hooks) for name, part in module.named_modules()} == hooks


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_what_would_have_no_effect_is_refused() -> None:
    with pytest.raises(InjectionError, match=r"CNN holds no Hugging Face model.*torch\.utils\.checkpoint"):
        trainer(GradientCheckpointing()).fit(make(CNN))
    with pytest.raises(InjectionError, match=r"BertForSequenceClassification is in eval mode.*model\.train\(\)"):
        trainer(LoRA(r=2), GradientCheckpointing()).fit(eval_bert())
    module = make(BertInInit)
    module.model.__class__ = type("Bare", (type(module.model),), {"supports_gradient_checkpointing": False})
    with pytest.raises(InjectionError, match="Bare has no gradient checkpointing"):
        trainer(GradientCheckpointing()).fit(module)


def eval_bert() -> L.LightningModule:
    module = make(BertInInit)
    module.model.eval()
    return module


def test_of_several_models_each_is_checkpointed() -> None:
    class Two(BertInInit):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.ModuleDict({"inner": tiny.bert().train()})

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            assert self.model.is_activation_checkpointing
            assert self.other["inner"].is_activation_checkpointing
            return super().training_step(batch, batch_idx)

    trainer(GradientCheckpointing(), max_epochs=1).fit(make(Two))
