"""ActivationRecompute: the same gradients to the bit, and those outputs aren't kept that can be made again."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from foreign import BertInInit, make, trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_ft import ActivationRecompute, Compile, GradientCheckpointing, LoRA, quantize
from lightning_ft.callbacks.recompute import Recomputation
from lightning_ft.errors import UserError
from lightning_ft.estimate import Saved

TOKENS = tiny.TOKENS.numel()
WIDE = TOKENS * 32 * 4  # bytes of what an activation gives


def step(model: nn.Module, loss: Callable[[Any], Tensor]) -> tuple[dict[str, Tensor], int]:
    """The gradients, and the bytes that were saved for them."""
    model.zero_grad()
    torch.manual_seed(3)
    with Saved(model.parameters()) as saved:
        value = loss(model)
    value.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, saved.bytes


def spared(model: nn.Module, loss: Callable[[Any], Tensor]) -> int:
    """How many bytes fewer are saved with it; the gradients are the same to the bit."""
    plain, size = step(model, loss)
    recomputation = Recomputation(model)
    gradients, less = step(model, loss)
    recomputation.remove()
    assert plain
    assert gradients.keys() == plain.keys()
    for name, gradient in plain.items():
        assert torch.equal(gradients[name], gradient), name
    assert (recomputation.passes, recomputation.spared > 0) == (1, less < size)
    return size - less


def with_lora(model: nn.Module, dropout: float = 0.0) -> Any:
    LoRA(r=2, dropout=dropout, target_modules="all-linear").inject(model)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter)
    return model.train()


def of_model(model: Any) -> Tensor:
    return model(input_ids=tiny.TOKENS)[0].square().mean()


# GELU's output; SiLU's and the product; of GPT-2's GELU, written out, and twice as wide, the product of what is kept.
@pytest.mark.parametrize(
    ("build", "outputs"),
    [
        (tiny.bert_classifier, 1),
        (tiny.distilbert_classifier, 1),
        (tiny.llama_lm, 2),
        (tiny.gemma3_lm, 2),
        (tiny.gpt2, 2),
    ],
)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradients_are_the_same_and_each_layers_output_is_spared(build: Any, outputs: int, dropout: float) -> None:
    model = with_lora(build(), dropout)
    of_model(model)  # from the second pass on query, key and value share a mask
    assert spared(model, of_model) == 2 * outputs * WIDE


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_over_a_packed_base_too(kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    model = tiny.llama_lm()
    quantize(model, kind)
    assert spared(with_lora(model), of_model) == 4 * WIDE


def test_under_autocast_outputs_of_16_bits_are_spared() -> None:
    def loss(model: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return of_model(model).float()

    assert spared(with_lora(tiny.bert_classifier()), loss) == 2 * WIDE // 2


# ------------------------------------------------------------------------------------------- other people's code


class Two(nn.Module):
    """Two layers that train, and between them what a test says."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second, self.between = nn.Linear(8, 8), nn.Linear(8, 8), between
        self.x = torch.randn(4, 3, 8)

    def forward(self) -> Tensor:
        return self.second(self.between(self.first(self.x)))


def of_two(model: Any) -> Tensor:
    return model().square().mean()


def changed(y: Tensor) -> Tensor:
    y = F.gelu(y)
    return y.mul_(2)


def changed_view(y: Tensor) -> Tensor:
    y = F.gelu(y)
    y.view(-1)[:5].zero_()
    return y


OUT = 4 * 3 * 8 * 4  # bytes


@pytest.mark.parametrize(
    ("between", "outputs"),
    [
        (F.gelu, 1),
        (lambda y: F.gelu(y).view(-1, 8), 1),
        (lambda y: F.gelu(y).transpose(0, 1), 0),  # another order of the same
        (lambda y: F.gelu(y)[:2], 0),  # a part of it
        (lambda y: F.silu(F.gelu(y)), 2),  # from what is made again itself
        (lambda y: F.gelu(y) * y, 2),
        (changed, 0),
        (changed_view, 0),
        (lambda y: F.gelu(y.clone().requires_grad_()).clone(), 0),  # the copy is what is kept
        (F.relu, 0),  # whose output its own backward pass reads
        (lambda y: F.silu(y, inplace=False), 1),
        (lambda y: F.leaky_relu(y + 0, inplace=True), 0),
        (lambda y: F.hardtanh(y), 1),
        (lambda y: F.dropout(y, 0.5), 0),
        (lambda y: y * torch.ones(8), 0),  # which keeps the ones alone
        (lambda y: checkpoint(F.gelu, y, use_reentrant=False), 0),
    ],
)
def test_what_lies_between(between: Callable[[Tensor], Tensor], outputs: int) -> None:
    assert spared(Two(between), of_two) == outputs * OUT


def test_used_twice_and_gone_through_twice() -> None:
    def loss(model: Any) -> Tensor:
        y = F.gelu(model.first(model.x))
        return (model.second(y) * model.second(y + 1)).mean() + model.second(y).mean()

    class Whole(Two):
        def forward(self) -> Tensor:
            return loss(self)

    def in_two_goes(model: Any) -> Tensor:
        value = model()
        value.backward(retain_graph=True)
        return value

    assert spared(Whole(F.gelu), in_two_goes) == OUT


@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize("change", ["kept", "source"])
def test_what_is_changed_after_it_was_saved_is_an_error_as_ever(on: bool, change: str) -> None:
    def between(y: Tensor) -> Tensor:
        seen.append(y)
        return F.gelu(y)

    seen: list[Tensor] = []
    model = Two(between)
    if on:
        Recomputation(model)
    value = of_two(model)
    with torch.no_grad():
        (model.second.weight if change == "kept" else seen[0]).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_an_output_that_is_changed_afterwards_is_made_again_as_it_was() -> None:
    gradients = []
    for late in (False, True):
        model, outputs = Two(F.gelu), list[Tensor]()
        model.second.register_forward_pre_hook(lambda _, args, outputs=outputs: outputs.extend(args))
        Recomputation(model)
        value = of_two(model)
        if late:
            outputs[0].detach().add_(1)
        value.backward()
        gradients.append(model.second.weight.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_an_error_in_the_forward_pass_ends_it() -> None:
    def fail(y: Tensor) -> Tensor:
        raise ValueError("in the middle")

    model = Two(fail)
    Recomputation(model)
    with pytest.raises(ValueError, match="in the middle"):
        model()
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    assert torch._C._len_torch_function_stack() == 0


# ------------------------------------------------------------------------------------------------- the callback


class Seen(Callback):
    """Copies in the middle of a fit."""

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:  # type: ignore[no-untyped-def]
        pickle.loads(pickle.dumps(pl_module.model))
        of_model(copy.deepcopy(pl_module.model)).backward()


def test_a_fit_is_the_same_and_leaves_no_trace() -> None:
    ended = []
    for callbacks in ([], [ActivationRecompute(), Seen()]):
        module = make(BertInInit)
        trainer(LoRA(r=2, target_modules="all-linear"), *callbacks, max_epochs=1).fit(module)
        assert not module.model._forward_hooks
        assert not module.model._forward_pre_hooks
        ended.append(module.state_dict())
    for key, value in ended[0].items():
        assert torch.equal(ended[1][key], value), key


def test_what_has_no_effect_is_said() -> None:
    class Parts(BertInInit):
        def outputs(self, x: Tensor) -> Tensor:
            return self.model.classifier(self.model.bert(x).pooler_output)

    def fit(module: Any, *callbacks: Any, targets: Any = None) -> None:
        trainer(LoRA(r=2, target_modules=targets), *callbacks, max_steps=1).fit(module)

    with pytest.raises(UserError, match=r"Parts doesn't call its BertForSequenceClassification.*backbone="):
        fit(make(Parts), ActivationRecompute())
    fit(make(Parts), ActivationRecompute("model.bert"), targets="all-linear")
    with pytest.warns(UserWarning, match="nothing in BertForSequenceClassification is kept that could be"):
        fit(make(BertInInit), ActivationRecompute())  # of query and value alone
    with pytest.raises(UserError, match="saves nothing beside GradientCheckpointing"):
        fit(make(BertInInit), GradientCheckpointing(), ActivationRecompute())
    with pytest.raises(UserError, match=r"doesn't go with torch\.compile"):
        fit(make(BertInInit), ActivationRecompute(), Compile())
    module = make(BertInInit)
    module.model.bert.compile(backend="eager")
    with pytest.raises(UserError, match=r"doesn't go with torch\.compile"):
        fit(module, ActivationRecompute())
