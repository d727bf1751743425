"""rsLoRA, DoRA, PiSSA, OLoRA, LoRA+, patterns, biases, convolutions: against naive maths and stock PEFT."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from foreign import BertInInit, Classifier, make, trainer, vector_data
from lightning.pytorch.strategies import SingleDeviceStrategy
from reference.lora import dora_linear, residual_linear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lightning_ft
from lightning_ft import InjectionError, LoRA, load_adapter, save_adapter
from lightning_ft.injection import find_base, injected_modules
from lightning_ft.methods.lora import LoRALayer, principal_part, qr_part

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:PiSSA changes the base weights"),
    pytest.mark.filterwarnings("ignore:OLoRA changes the base weights"),
]

R, ALPHA, IN, OUT = 2, 5.0, 6, 4


def conv1d() -> nn.Module:
    layer = Conv1D(OUT, IN)
    nn.init.normal_(layer.weight)
    return layer


def adapted(layer: nn.Module, **settings: Any) -> Any:
    """A layer with LoRA whose every tensor is random, in fp64."""
    torch.manual_seed(3)
    model = nn.Sequential(layer.double())
    LoRA(**{"r": R, "alpha": ALPHA, "backbone": ".", "target_modules": ["0"], **settings}).inject(model)
    with torch.no_grad():
        for key in (*layer._mixins[0].adds, *layer._mixins[0].keeps):
            tensor = getattr(layer, key)
            tensor.data = torch.randn_like(tensor, dtype=torch.float64)
    return layer


KINDS: dict[str, Callable[[], nn.Module]] = {"Linear": lambda: nn.Linear(IN, OUT), "Conv1D": conv1d}
each_kind = pytest.mark.parametrize("kind", KINDS)


# ----------------------------------------------------------------------------------------------- the maths


def agree(layer: Any, x: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    """Outputs and the gradients of what trains and of x are the reference's."""
    out = layer(x)
    torch.testing.assert_close(out, expected, atol=1e-11, rtol=1e-11)
    cotangent = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, leaves, cotangent), torch.autograd.grad(expected, leaves, cotangent), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize(("kind", "use_rslora"), [("Linear", False), ("Conv1D", True)])
def test_dora_is_that_of_the_paper(kind: str, use_rslora: bool) -> None:
    layer = adapted(KINDS[kind](), use_dora=True, use_rslora=use_rslora)
    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    weight = layer.weight.T if kind == "Conv1D" else layer.weight
    s = ALPHA / (math.sqrt(R) if use_rslora else R)
    own = (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
    agree(layer, x, dora_linear(x, weight, *own, s) + layer.bias, [x, *own])


@each_kind
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_pissa_and_olora_train_beside_the_rest_of_the_weight(kind: str, init: str) -> None:
    layer = adapted(KINDS[kind](), init_lora_weights=init)
    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    weight = layer.weight.T if kind == "Conv1D" else layer.weight
    tensors = (layer.lora_A, layer.lora_B, layer.lora_A0, layer.lora_B0)
    agree(layer, x, residual_linear(x, weight, *tensors, ALPHA / R) + layer.bias, [x, layer.lora_A, layer.lora_B])


def test_pissa_starts_from_the_best_approximation_and_olora_from_q_and_r() -> None:
    w = torch.randn(7, 5)
    a, b = principal_part(w, 2)
    singular = torch.linalg.svdvals(w)
    assert torch.linalg.matrix_norm(w - b @ a, 2).item() == pytest.approx(singular[2].item(), rel=1e-5)  # Eckart-Young
    torch.testing.assert_close(a @ a.T, b.T @ b)  # shared evenly
    a, b = qr_part(w, 5)
    torch.testing.assert_close(b @ a, w)
    torch.testing.assert_close(b.T @ b, torch.eye(5), atol=1e-5, rtol=0)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize(
    ("shape", "padding_mode"),
    [((1, 9), "zeros"), ((2, 9, 8), "circular"), ((3, 6, 7, 5), "zeros")],
    ids=["1d", "2d", "3d"],
)
def test_a_convolution_with_lora_is_one_with_the_changed_kernel(
    shape: tuple[int, ...], padding_mode: str, use_dora: bool
) -> None:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[shape[0] - 1]
    layer = adapted(kind(IN, OUT, 3, stride=2, padding=1, dilation=1, padding_mode=padding_mode), use_dora=use_dora)
    x = torch.randn(2, IN, *shape[1:], dtype=torch.float64)
    delta = torch.einsum("orx,rik->oik", layer.lora_B.flatten(2), layer.lora_A.flatten(2)).view_as(layer.weight)
    kernel = layer.weight + ALPHA / R * delta
    if use_dora:
        m, norm = layer.lora_magnitude_vector.flatten(), kernel.flatten(1).norm(dim=1)
        kernel = kernel * (m / norm).view(-1, *(1 for _ in shape))
    expected = layer._conv_forward(x, kernel, layer.bias)
    torch.testing.assert_close(layer(x), expected, atol=1e-11, rtol=1e-11)
    lightning_ft.merge(model := nn.Sequential(layer))
    torch.testing.assert_close(model(x), expected, atol=1e-11, rtol=1e-11)


class Same(nn.Conv2d):
    """As timm's: it pads by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(nn.functional.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 4, 3, groups=2), Same(4, 4, 3)], ids=["grouped", "own forward"])
def test_a_convolution_that_does_more_is_no_target(layer: nn.Module) -> None:
    with pytest.raises(InjectionError, match="can't adapt"):
        LoRA(target_modules=["0"], backbone=".").inject(nn.Sequential(layer))


# ---------------------------------------------------------------------- against stock PEFT, as it is trained

TARGETS = {"bert": ["query", "output.dense", "word_embeddings"], "gpt2": ["c_attn", "mlp.c_proj"]}
BUILDS: dict[str, Callable[[], Any]] = {"bert": tiny.bert_classifier, "gpt2": tiny.gpt2}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"0.*query": 3, "c_proj": 1}, "alpha_pattern": {"query": 9, "c_proj": 3}},
    "biases of targets": {"bias": "lora_only"},
    "all biases": {"bias": "all", "use_dora": True},
}


def patterns_for(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """A pattern that matches nothing is an error here."""
    keep = "query" if name == "bert" else "c_proj"
    return {
        key: {p: v for p, v in value.items() if keep in p} if key.endswith("_pattern") else value
        for key, value in settings.items()
    }


def losses(model: Any, optimizer: torch.optim.Optimizer, steps: int = 10) -> list[Tensor]:
    """The logits at each step of a small training."""
    model.eval()  # GPT-2 has dropout
    seen = []
    for step in range(steps):
        optimizer.zero_grad()
        logits = model(input_ids=(tiny.TOKENS + step) % 40).logits
        logits.square().mean().backward()
        optimizer.step()
        seen.append(logits.detach())
    return seen


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2, eps=1e-3)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.parametrize(
    ("name", "variant"), [*(("bert", variant) for variant in VARIANTS), ("gpt2", "patterns"), ("gpt2", "all biases")]
)
def test_ten_steps_are_those_of_stock_peft_from_our_files(name: str, variant: str, tmp_path: Path) -> None:
    ours = BUILDS[name]()
    settings = patterns_for(name, VARIANTS[variant])
    LoRA(r=R, alpha=ALPHA, target_modules=TARGETS[name], **settings).inject(ours)
    with torch.no_grad():
        for _, layer in injected_modules(ours):
            for key in layer._mixins[0].adds:
                getattr(layer, key).add_(0.1 * torch.randn_like(getattr(layer, key)))
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(BUILDS[name](), tmp_path, is_trainable=True)
    assert sum(p.numel() for p in theirs.parameters() if p.requires_grad) == sum(
        p.numel() for p in ours.parameters() if p.requires_grad
    )
    for mine, stock in zip(losses(ours, adamw(ours)), losses(theirs, adamw(theirs)), strict=True):
        torch.testing.assert_close(mine, stock, atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    again = BUILDS[name]()
    load_adapter(again, tmp_path / "theirs")
    torch.testing.assert_close(tiny.logits(again), tiny.logits(ours), atol=1e-5, rtol=1e-5)


# Not OLoRA on GPT-2: stock PEFT's fails on a Conv1D.
@pytest.mark.parametrize(("name", "init"), [("bert", "pissa"), ("bert", "olora"), ("gpt2", "pissa")])
def test_pissa_and_olora_start_and_train_as_stock_pefts(name: str, init: str, tmp_path: Path) -> None:
    targets = [target for target in TARGETS[name] if "embeddings" not in target]
    config = peft.LoraConfig(
        r=R, lora_alpha=ALPHA, target_modules=targets, init_lora_weights=init, fan_in_fan_out=name == "gpt2",
        task_type="SEQ_CLS" if name == "bert" else "CAUSAL_LM",
    )  # fmt: skip
    theirs = peft.get_peft_model(BUILDS[name](), config)
    ours = BUILDS[name]()
    LoRA(r=R, alpha=ALPHA, target_modules=targets, init_lora_weights=init).inject(ours)
    for mine, stock in zip(losses(ours, adamw(ours)), losses(theirs, adamw(theirs)), strict=True):
        torch.testing.assert_close(mine, stock, atol=1e-4, rtol=1e-4)  # theirs rounds the residual

    # What it saved holds no residual: it is a plain LoRA of twice the rank, over the base as it was.
    save_adapter(ours, tmp_path / "ours")
    plain = peft.PeftModel.from_pretrained(BUILDS[name](), tmp_path / "ours")
    torch.testing.assert_close(tiny.logits(plain), tiny.logits(ours), atol=1e-5, rtol=1e-5)
    loaded = BUILDS[name]()
    load_adapter(loaded, tmp_path / "ours")
    with pytest.raises(InjectionError, match=rf"already carries LORA.*trains on as what it is, \(r={2 * R},"):
        LoRA(r=R, alpha=ALPHA, target_modules=targets, init_lora_weights=init).inject(loaded)
    assert LoRA(r=2 * R, alpha=2 * ALPHA, target_modules=targets).inject(loaded)
    # And theirs, which needs its residual made again, is loaded with it.
    theirs.save_pretrained(tmp_path / "theirs")
    again = BUILDS[name]()
    load_adapter(again, tmp_path / "theirs")
    torch.testing.assert_close(tiny.logits(again), tiny.logits(theirs), atol=1e-5, rtol=1e-5)


def test_convolutions_are_those_of_stock_peft(tmp_path: Path) -> None:
    def net() -> nn.Sequential:
        torch.manual_seed(6)
        return nn.Sequential(nn.Conv1d(3, 4, 3), nn.Unflatten(1, (2, 2)), nn.Conv2d(2, 3, (1, 2)), nn.Flatten())

    for use_dora in (False, True):
        ours = net()
        LoRA(r=R, alpha=ALPHA, target_modules=["0", "2"], use_dora=use_dora, backbone=".").inject(ours)
        with torch.no_grad():
            for p in ours.parameters():
                if p.requires_grad:
                    p.add_(0.3 * torch.randn_like(p))
        x = torch.randn(5, 3, 8)
        save_adapter(ours, tmp_path / str(use_dora), backbone=".")
        stock = peft.PeftModel.from_pretrained(net(), tmp_path / str(use_dora))
        torch.testing.assert_close(ours(x), stock(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("optimizer", [partial(torch.optim.AdamW, weight_decay=0.1), torch.optim.SGD])
def test_lora_plus_is_a_higher_rate_of_b(optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    """Against LoRA+ as its authors write it: a parameter group of its own, under a schedule too."""

    class Scheduled(BertInInit):
        def configure_optimizers(self) -> Any:
            own = [layer for _, layer in injected_modules(self)]
            b = [layer.lora_B for layer in own] if self.split else []
            rest = [p for p in self.parameters() if p.requires_grad and not any(p is other for other in b)]
            made = optimizer([{"params": rest}, *([{"params": b, "lr": 16e-2}] if b else [])], lr=1e-2)
            schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1 / (step + 1))
            return {"optimizer": made, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def fitted(split: bool, ratio: float) -> BertInInit:
        module = make(Scheduled)
        module.split = split
        trainer(LoRA(r=R, loraplus_lr_ratio=ratio), max_epochs=3, accumulate_grad_batches=2).fit(module)
        return module

    lengthened, grouped, usual = fitted(False, 16.0), fitted(True, 1.0), fitted(False, 1.0)
    for (name, mine), theirs in zip(lengthened.named_parameters(), grouped.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    moved = zip(injected_modules(lengthened), injected_modules(usual), strict=True)
    assert not any(torch.equal(one.lora_B, other.lora_B) for (_, one), (_, other) in moved)


def test_where_an_optimizer_steps_on_tensors_of_its_own_it_is_left_alone_and_lora_plus_refused() -> None:
    class Elsewhere(BertInInit):
        def configure_optimizers(self) -> Any:
            self.flat = [nn.Parameter(torch.cat([p.detach().flatten() for p in self.parameters() if p.requires_grad]))]
            return torch.optim.SGD(self.flat, lr=1e-2)

    def deepspeed() -> Any:
        return type("DeepSpeedStrategy", (SingleDeviceStrategy,), {})(device="cpu")

    module = make(Elsewhere)
    run = trainer(LoRA(r=R), max_steps=1, strategy=deepspeed())
    run.fit(module)
    assert run.optimizers[0].param_groups[0]["params"] == module.flat
    with pytest.raises(InjectionError, match=r"DeepSpeedStrategy has it step on other .* Use strategy='ddp'"):
        trainer(LoRA(r=R, loraplus_lr_ratio=16.0), max_steps=1, strategy=deepspeed()).fit(make(Elsewhere))


class TwoBases(Classifier):
    data = staticmethod(lambda: vector_data(8))

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 3))

    def outputs(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


def test_lora_plus_lengthens_the_steps_on_its_own_backbone_alone() -> None:
    def step(**ratios: float) -> list[Tensor]:
        module = make(TwoBases)
        methods = [LoRA(r=R, backbone=name, loraplus_lr_ratio=ratio) for name, ratio in ratios.items()]
        trainer(*methods, max_epochs=1, limit_train_batches=1).fit(module)
        return [layer.lora_B.detach() for _, layer in injected_modules(module)]  # from zero

    plain, lengthened = step(encoder=1, decoder=1), step(encoder=4, decoder=3)
    for one, more, ratio in zip(plain, lengthened, (4, 3), strict=True):
        torch.testing.assert_close(more, ratio * one)
        assert one.any()


# ------------------------------------------------------------------------------- which modules, which ranks


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["query", "value"], "layers_to_transform": 1},
        {"target_modules": ["query", "dense"], "layers_to_transform": [0], "layers_pattern": "layer"},
        {"target_modules": ["query"], "layers_to_transform": []},
        {"target_modules": "all-linear", "exclude_modules": ["key", "intermediate.dense"]},
        {"target_modules": ["query", "key", "value"], "exclude_modules": r".*layer\.0.*"},
        {"target_modules": r".*layer\.1\..*(query|key)", "modules_to_save": ["pooler"]},
        {"target_modules": ["dense"], "modules_to_save": ["pooler", "layer.0.output"]},
        {
            "target_modules": ["query", "key"],
            "rank_pattern": {"key": 3, r"layer\.0.*": 4},
            "alpha_pattern": {"query": 1},
        },
        {"target_modules": ["query"], "rank_pattern": {r"bert.encoder.layer.1.attention.self.query": 7}},
    ],
)
def test_patterns_mean_what_they_mean_to_peft(settings: dict[str, Any]) -> None:
    agree_with_peft(settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"target_modules": ["query", "c_attn"]}, "target_modules: 'c_attn' matches no module"),
        (
            {"target_modules": ["query"], "layers_to_transform": [1, 7]},
            "no layer 7 among the targets; they lie in 0, 1",
        ),
        ({"target_modules": ["query"], "modules_to_save": ["pooler", "norm"]}, "modules_to_save: 'norm' matches no"),
        ({"target_modules": ["query", "key"], "exclude_modules": ["key", "k"]}, "exclude_modules: 'k' matches no"),
    ],
)
def test_what_does_nothing_beside_what_does_something_is_warned_of(settings: dict[str, Any], says: str) -> None:
    with pytest.warns(UserWarning, match=says):
        agree_with_peft(settings)


def agree_with_peft(settings: dict[str, Any]) -> None:
    """The same modules are adapted, with the same ranks and scales, and the same others train."""
    stock = peft.get_peft_model(
        tiny.bert_classifier(), peft.LoraConfig(r=R, lora_alpha=ALPHA, task_type="SEQ_CLS", **copy.deepcopy(settings))
    ).base_model.model
    theirs = {
        name: (m.r["default"], m.scaling["default"])
        for name, m in stock.named_modules()
        if isinstance(m, peft.tuners.lora.LoraLayer)
    }
    ours = tiny.bert_classifier()
    LoRA(r=R, alpha=ALPHA, **settings).inject(ours)
    assert {n: (m.lora.r, m.lora.scaling) for n, m in injected_modules(ours) if isinstance(m, LoRALayer)} == theirs
    trained = {n.replace("modules_to_save.default.", "") for n, p in stock.named_parameters() if p.requires_grad}
    assert {n for n in trained if "lora_" not in n} == {
        n for n, p in ours.named_parameters() if p.requires_grad and "lora_" not in n
    }


def test_a_setting_that_does_nothing_is_an_error() -> None:
    for settings, says in [
        ({"rank_pattern": {"qury": 4}}, "rank_pattern: 'qury' matches none"),
        ({"alpha_pattern": {"value.": 4}}, "alpha_pattern: 'value.' matches none"),
        ({"exclude_modules": ["qury"]}, r"exclude_modules: 'qury' matches no module.*query"),
        ({"exclude_modules": ".*"}, "leaves out all"),
        ({"layers_to_transform": [7]}, "there is no layer 7 among the targets; they lie in 0, 1"),
        ({"layers_to_transform": [0], "layers_pattern": "blocks"}, "no layer 0.*no numbered layers"),
        ({"layers_to_transform": [0], "target_modules": ".*query"}, "write the layers in it"),
        ({"layers_pattern": "layer"}, "say which layers"),
        ({"layers_pattern": "layer", "target_modules": ".*query"}, "say which layers"),
    ]:
        model = tiny.bert()
        with pytest.raises(InjectionError, match=says):
            LoRA(**{"target_modules": ["query"], **settings}).inject(model)
        assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_dora_does_not_go_with_a_split_weight(init: Any) -> None:
    with pytest.raises(ValueError, match=f"use_dora.*'{init}'"):
        LoRA(use_dora=True, init_lora_weights=init)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_weight_is_split_into_no_more_ranks_than_it_has(init: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 5))
    with pytest.raises(InjectionError, match=rf"'{init}'.*5 x 8.*no 6 ranks. Use r=5 at most"):
        LoRA(r=6, init_lora_weights=init, backbone=".").inject(model)
    assert all(p.requires_grad for p in model.parameters())
    assert LoRA(r=6, init_lora_weights=init, rank_pattern={"1": 5}, backbone=".").inject(model)


def test_an_unusual_rank_is_advised_against_once(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(400, 300), nn.Linear(300, 50))
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        LoRA(r=8, backbone=".").inject(model)
        LoRA(r=8, backbone=".").inject(model)
    assert [r.message for r in caplog.records if "usual is" in r.message] == [
        "LoRA: r=8 is 16.0% of the smaller dimension of '1' (50); usual is 1% to 10%, here 1 to 5."
    ]
    caplog.clear()
    assert LoRA(r=1, backbone=".", target_modules=["0"]).inject(nn.Sequential(nn.Linear(8, 8)))  # there is no less
    assert not caplog.records


def test_biases_train_as_asked_and_come_back_with_a_merge() -> None:
    for bias, count in (("none", lambda all_: 0), ("lora_only", lambda all_: 2), ("all", len)):
        model = tiny.bert_classifier()
        LoRA(target_modules=["query"], bias=bias).inject(model)
        biases = [p for part in find_base(model).parts() for n, p in part.named_parameters() if n.endswith("bias")]
        assert sum(p.requires_grad for p in biases) == count(biases)
        for other in {"none", "lora_only", "all"} - {bias}:
            with pytest.raises(InjectionError, match=r"LoRA trained other parts of the base before.*\.bias"):
                LoRA(target_modules=["query"], bias=other).inject(model)
        lightning_ft.merge(model)
        assert all(p.requires_grad for p in model.parameters())
