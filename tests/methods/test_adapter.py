from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import torch
import torch.nn.functional as F
from foreign import (
    MODULES,
    BertInInit,
    Classifier,
    DistilBertInConfigureModel,
    ManualTwoOptimizers,
    TorchTransformer,
    make,
    trainer,
)
from lightning import Callback
from reference.adapter import Weights, put_behind, put_beside
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig
from transformers.models.auto import CONFIG_MAPPING

import lightning_ft
from lightning_ft import Adapter, InjectionError, LoRA, drop_adapters
from lightning_ft.injection import injected_modules, injected_names
from lightning_ft.methods.adapter import AdapterLayer

K = 3


class Stack(NamedTuple):
    """A model's layers, and what is where in each: paths in the layer."""

    layer: str
    attention: tuple[str, ...]
    """The modules that attentions end with."""
    first: str
    """The module that the feed-forward begins with, and below the one that it ends with."""
    last: str
    block: str
    """The module that is, or ends, the feed-forward."""


def of_bert(model: str) -> list[Stack]:
    layer = f"{model}.encoder.layer.{{}}."
    return [Stack(layer, ("attention.output.dense",), "intermediate.dense", "output.dense", "output")]


def of_t5(block: str) -> tuple[str, str, str]:
    return f"{block}.wi", f"{block}.wo", block


MODELS: dict[str, tuple[Callable[[], Any], list[Stack]]] = {
    "bert": (tiny.bert_classifier, of_bert("bert")),
    "roberta": (tiny.roberta_classifier, of_bert("roberta")),
    "distilbert": (
        tiny.distilbert_classifier,
        [Stack("distilbert.transformer.layer.{}.", ("attention.out_lin",), "ffn.lin1", "ffn.lin2", "ffn")],
    ),
    "gpt2": (tiny.gpt2, [Stack("transformer.h.{}.", ("attn.c_proj",), "mlp.c_fc", "mlp.c_proj", "mlp")]),
    "llama": (tiny.llama, [Stack("layers.{}.", ("self_attn.o_proj",), "mlp.gate_proj", "mlp.down_proj", "mlp")]),
    "t5": (
        tiny.t5,
        [
            Stack("encoder.block.{}.layer.", ("0.SelfAttention.o",), *of_t5("1.DenseReluDense")),
            Stack("decoder.block.{}.layer.", ("0.SelfAttention.o", "1.EncDecAttention.o"), *of_t5("2.DenseReluDense")),
        ],
    ),
}  # fmt: skip


def places(name: str, placement: str) -> dict[str, tuple[str, str]]:
    """What is adapted in a model of two layers: where an adapter belongs, what reads its x, and what gives its h."""
    found: dict[str, tuple[str, str]] = {}
    for stack in MODELS[name][1]:
        for layer in (stack.layer.format(i) for i in range(2)):
            first, last, block = (f"{layer}{part}" for part in (stack.first, stack.last, stack.block))
            if placement == "houlsby":
                found |= {f"{layer}{end}": (f"{layer}{end}", f"{layer}{end}") for end in stack.attention}
            found |= {block: (first, last)} if placement == "parallel" else {last: (last, last)}
    return found


def outputs(model: Any) -> Tensor:
    more = {"decoder_input_ids": tiny.TOKENS} if getattr(model.config, "is_encoder_decoder", False) else {}
    return model(input_ids=tiny.TOKENS, **more)[0]


def train(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Adapters as training would leave them."""
    torch.manual_seed(3)
    for name in sorted(injected_names(model)):  # a set has another order in each process
        parameter = model.get_parameter(name)
        parameter.data = torch.randn(parameter.shape, dtype=dtype) / 3


def weights(layer: Any) -> Weights:
    own = (layer.adapter_down, layer.adapter_down_bias, layer.adapter_up, layer.adapter_up_bias)
    return Weights(*(parameter.detach().clone().requires_grad_() for parameter in own))


def agree(ours: Any, theirs: Any, pairs: list[tuple[Any, Weights]], run: Callable[[Any], Tensor]) -> None:
    """The two give the same outputs, and gradients of the same adapters."""
    torch.testing.assert_close(run(ours), run(theirs), atol=1e-9, rtol=1e-9)
    cotangent = torch.randn_like(run(ours))
    for model in (ours, theirs):
        (run(model) * cotangent).sum().backward()
    for layer, reference in pairs:
        for key, wanted in zip(layer.adds, reference, strict=True):
            assert wanted.grad is not None
            assert wanted.grad.any()
            torch.testing.assert_close(getattr(layer, key).grad, wanted.grad, atol=1e-8, rtol=1e-8)


# ------------------------------------------------------------------------------------- the maths, and where


@pytest.mark.parametrize(
    ("name", "placement"),
    [*itertools.product(MODELS, ["houlsby", "parallel"]), ("bert", "pfeiffer"), ("t5", "pfeiffer")],
)
def test_outputs_and_gradients_are_those_of_the_paper_on_every_architecture(name: str, placement: Any) -> None:
    build = MODELS[name][0]
    ours, theirs = build().double(), build().double()
    with torch.no_grad():
        bare = outputs(ours)
        wanted = places(name, placement)
        touched = Adapter(placement, bottleneck=K, non_linearity="gelu").inject(ours)
        assert sorted(touched) == sorted(wanted)
        assert torch.equal(outputs(ours), bare)
        train(ours, torch.float64)
        assert (outputs(ours) - bare).abs().max() > 1e-3
    pairs = [(ours.get_submodule(path), weights(ours.get_submodule(path))) for path in touched]
    for path, (_, reference) in zip(touched, pairs, strict=True):
        first, last = (theirs.get_submodule(part) for part in wanted[path])
        if placement == "parallel":
            put_beside(first, last, reference, 4.0, F.gelu)
        else:
            put_behind(last, reference, F.gelu)
    agree(ours, theirs, pairs, outputs)


NAMED_BY_HAND = {
    "a block, behind its norm": (tiny.bert, "pfeiffer", "encoder.layer.1.output", None),
    "attention, which gives a tuple": (tiny.bert, "pfeiffer", "encoder.layer.1.attention.self", None),
    "attention, called by keyword": (tiny.llama, "parallel", "layers.0.self_attn", "layers.0.self_attn"),
    "a linear layer, 16 to 32": (tiny.llama, "parallel", "layers.1.mlp.up_proj", "layers.1.mlp.up_proj"),
    "BERT's attention": (tiny.bert, "parallel", "encoder.layer.0.attention.output", "encoder.layer.0"),
}
"""A module, and for a parallel adapter one whose input is the x that it must read."""


@pytest.mark.parametrize("what", NAMED_BY_HAND)
def test_other_modules_can_be_named(what: str) -> None:
    build, placement, target, reads = NAMED_BY_HAND[what]
    ours, theirs = build().double(), build().double()
    adapter = Adapter(placement, reduction_factor=5, target_modules=[target], non_linearity="tanh")
    assert adapter.inject(ours) == [target]
    train(ours, torch.float64)
    layer = ours.get_submodule(target)
    assert layer.adapter_down.shape[0] == 16 // 5
    reference = weights(layer)
    if reads is None:
        put_behind(theirs.get_submodule(target), reference, torch.tanh)
    else:  # before the norm, where the module ends with one
        last = f"{target}.dense" if "bert" in what.lower() else target
        put_beside(theirs.get_submodule(reads), theirs.get_submodule(last), reference, 4.0, torch.tanh)
    agree(ours, theirs, [(layer, reference)], outputs)


@pytest.mark.parametrize("targets", [["linear2"], ["self_attn", "linear2"]])
def test_torchs_own_encoder_is_adapted_in_evaluation_too(targets: list[str]) -> None:
    ours, theirs = make(TorchTransformer).double(), make(TorchTransformer).double()
    touched = Adapter(bottleneck=K, target_modules=targets, backbone="encoder").inject(ours)
    assert len(touched) == 2 * len(targets)
    train(ours, torch.float64)
    pairs = [(ours.get_submodule(path), weights(ours.get_submodule(path))) for path in touched]
    for path, (_, reference) in zip(touched, pairs, strict=True):
        put_behind(theirs.get_submodule(path), reference, F.relu)
    agree(ours, theirs, pairs, lambda module: module.outputs(module.example()))
    with torch.no_grad():
        torch.testing.assert_close(ours.eval().outputs(ours.example()), theirs.outputs(theirs.example()))


CONFIGS = {
    "electra": {},
    "opt": {},
    "bloom": {"n_layer": 2},
    "qwen3": {},
    "vit": {},
    "modernbert": {},
    "mpnet": {},
    "albert": {"num_hidden_groups": 2},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_other_architectures_are_known_by_their_names(kind: str) -> None:
    config: PreTrainedConfig = CONFIG_MAPPING[kind](**{"num_hidden_layers": 2, **CONFIGS[kind]})
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    ends = Adapter("houlsby").inject(model)
    assert len(ends) == 4
    assert all(model.get_submodule(name).adapter_up.shape[0] == config.hidden_size for name in ends)


def test_the_down_projection_starts_as_in_the_papers() -> None:
    def start(placement: Any) -> Tensor:
        model = nn.Sequential(nn.Linear(400, 400))
        Adapter(placement, bottleneck=100, target_modules=["0"], backbone=".").inject(model)
        return model[0].adapter_down

    gaussian, uniform = start("houlsby"), start("parallel")
    assert gaussian.abs().max() <= 2e-2
    assert gaussian.std().item() == pytest.approx(0.88e-2, rel=0.03)  # of a normal one cut off at two of its own
    assert 0.99 / 20 < uniform.abs().max() <= 1 / 20
    assert uniform.std().item() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.03)


def test_dropout_falls_on_the_bottleneck_in_training_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    Adapter(bottleneck=1, dropout=0.25, target_modules=["0"], backbone=".").inject(model)
    with torch.no_grad():
        for key in ("adapter_down_bias", "adapter_up"):
            getattr(model[0], key).fill_(1.0)
        model[0].adapter_down.zero_()
        model[0].weight.zero_()
        model[0].bias.zero_()
    assert model.eval()(torch.randn(3, 4)).eq(1).all()
    out = model.train()(torch.randn(2000, 4))
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert out.mean().item() == pytest.approx(1, abs=0.05)
    assert (out == out[:, :1]).all()


# -------------------------------------------------------------------------------------------- with others


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_lora_on_the_same_modules_goes_in_before_or_after(precision: torch.dtype) -> None:
    methods = [LoRA(r=2, target_modules=["output.dense"]), Adapter("houlsby", bottleneck=K)]
    one, other, apart = (tiny.bert_classifier().to(precision) for _ in range(3))
    for model, order in ((one, methods), (other, methods[::-1])):
        assert {name for method in order for name in method.inject(model)} == set(places("bert", "houlsby"))
    train(one)
    other.load_state_dict(one.state_dict())
    assert torch.equal(outputs(one), outputs(other))

    for name, layer in injected_modules(one):  # W + s B A, then the adapter
        apart.get_submodule(name).weight.data = layer.folded(layer.weight)["weight"].detach().to(precision)  # type: ignore
        put_behind(apart.get_submodule(name), Weights(*(w.to(precision) for w in weights(layer))), F.relu)
    loose = 1e-5 if precision == torch.float32 else 5e-2
    torch.testing.assert_close(outputs(one), outputs(apart), atol=loose, rtol=loose)


@pytest.mark.parametrize(
    ("name", "placement", "with_lora"),
    [("t5", "houlsby", False), ("gpt2", "parallel", True), ("bert", "houlsby", True)],
)
def test_files_bring_it_back(name: str, placement: Any, with_lora: bool, tmp_path: Path) -> None:
    build = MODELS[name][0]
    model, fresh = build(), build()
    adapter = Adapter(placement, reduction_factor=3, non_linearity="swish", scaling=0.7, dropout=0.1)
    adapted = adapter.inject(model)
    if with_lora:
        LoRA(r=2, target_modules=adapted if placement != "parallel" else None).inject(model)
    train(model)
    lightning_ft.save_adapter(model, tmp_path / "adapter")
    lightning_ft.load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(outputs(fresh.eval()), outputs(model.eval()))
    assert adapter.inject(fresh) == adapted  # the same settings

    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config = next(c for c in config.get("methods", [config]) if c["peft_type"] == "BOTTLENECK")
    assert {key: config[key] for key in ("placement", "reduction_factor", "bottleneck", "scaling")} == {
        "placement": placement, "reduction_factor": 3, "bottleneck": None, "scaling": 0.7,
    }  # fmt: skip
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    layer = model.get_submodule(adapted[0])
    for key in ("down.weight", "down.bias", "up.weight", "up.bias"):
        own = getattr(layer, f"adapter_{key.replace('.weight', '').replace('.', '_')}")
        assert torch.equal(tensors[f"base_model.model.{adapted[0]}.adapter_{key}"], own)
    assert "PeftModel" not in (tmp_path / "adapter" / "README.md").read_text()


def test_a_bank_answers_each_row_with_its_own_adapter(tmp_path: Path) -> None:
    for seed, (name, width) in enumerate({"one": 2, "other": 5}.items()):
        model = tiny.bert()
        Adapter("houlsby", bottleneck=width).inject(model)
        train(model)
        model.encoder.layer[0].output.dense.adapter_up.data.mul_(1 + seed)
        lightning_ft.save_adapter(model, tmp_path / name)
    model = tiny.bert()
    bank = lightning_ft.AdapterBank(model)
    bank.load("one", tmp_path / "one")
    bank.load("other", tmp_path / "other")
    alone = {}
    with torch.no_grad():
        for row, name in enumerate(("other", "one")):
            bank.use(name)
            alone[row] = outputs(model)[row]
        with bank.rows(["other", "one"]):
            both = outputs(model)
    torch.testing.assert_close(both, torch.stack([alone[0], alone[1]]), atol=1e-6, rtol=1e-6)
    assert not torch.allclose(alone[0], alone[1])


FOREIGN = [
    *((kind, MODULES[kind]) for kind in (DistilBertInConfigureModel, ManualTwoOptimizers)),
    (TorchTransformer, {"backbone": "encoder", "target_modules": ["self_attn", "linear2"]}),
]


@pytest.mark.parametrize(("kind", "where"), FOREIGN, ids=lambda value: getattr(value, "__name__", ""))
def test_one_line_adapts_a_foreign_module(kind: type[Classifier], where: dict[str, Any], tmp_path: Path) -> None:
    def fit(epochs: int, **more: Any) -> tuple[Any, Classifier]:
        module, run = make(kind), trainer(Adapter(bottleneck=K, non_linearity="gelu", **where), max_epochs=epochs)
        run.fit(module, **more)
        return run, module.eval()

    run, _ = fit(1)
    run.save_checkpoint(tmp_path / "x.ckpt")
    torch.manual_seed(99)  # what is injected begins elsewhere, and must be overwritten
    _, module = fit(3, ckpt_path=tmp_path / "x.ckpt")
    bare = make(kind)
    bare.setup("fit")
    bare.configure_model()
    base, after = bare.state_dict(), module.state_dict()
    added, trained = injected_names(module), {name for name, p in module.named_parameters() if p.requires_grad}
    moved = {key for key in base if not torch.equal(base[key], after[key])}
    assert moved | added == trained | {key for key, _ in module.named_buffers() if key in moved}
    assert all(key.startswith(("head.", "model.classifier", "model.pre_classifier", "embed.")) for key in moved)
    assert all(after[key].any() for key in added), "what began at zero is still there"
    with torch.no_grad():
        evaluated = module.outputs(module.example())  # no fused path skips it
    torch.testing.assert_close(evaluated, module.outputs(module.example()), atol=1e-6, rtol=1e-5)


# --------------------------------------------------------------------------------------------- AdapterDrop


class Deep(BertInInit):
    def __init__(self) -> None:
        super().__init__()
        self.model = tiny.bert_classifier(num_hidden_layers=4).train()


class Spy(Callback):
    """What is left out in each batch, and what the model then gives."""

    def __init__(self) -> None:
        self.left_out: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        out = [layer.adapter_left_out for _, layer in injected_modules(pl_module)]  # type: ignore[attr-defined]
        assert out == sorted(out, reverse=True), "the lowest ones"
        self.left_out.append(sum(out))
        if sum(out) and self.left_out.count(sum(out)) == 5:  # trained by then
            copied = copy.deepcopy(pl_module.model)
            drop_adapters(copied, sum(out))
            with torch.no_grad():
                given = pl_module.model(input_ids=batch[0]).logits
                assert torch.equal(given, copied(input_ids=batch[0]).logits)
                assert not torch.equal(given, pl_module.model.eval()(input_ids=batch[0]).logits)
            pl_module.model.train()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        full = copy.deepcopy(pl_module.model).eval()
        for _, layer in injected_modules(full):
            layer.adapter_left_out = False  # type: ignore[attr-defined]
        with torch.no_grad():
            tokens = pl_module.example()
            assert torch.equal(pl_module.model(input_ids=tokens).logits, full(input_ids=tokens).logits)


def dropped(seed: int, **more: Any) -> tuple[list[int], Deep]:
    module, spy = make(Deep), Spy()
    torch.manual_seed(seed)
    trainer(Adapter(bottleneck=K, adapter_drop=2), spy, **{"max_epochs": 20, **more}).fit(module)
    return spy.left_out, module


def test_each_batch_leaves_out_a_number_of_lowest_layers_drawn_anew() -> None:
    left_out, module = dropped(1)
    assert len(left_out) == 60
    assert all(10 <= left_out.count(k) <= 30 for k in (0, 1, 2))
    assert left_out[:12] == dropped(1, max_epochs=4)[0]
    assert left_out[:12] != dropped(2, max_epochs=4)[0]
    assert not any("adapter_left_out" in vars(layer) for _, layer in injected_modules(module))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_in_time_every_adapter_trains(accumulate: int) -> None:
    left_out, module = dropped(1, accumulate_grad_batches=accumulate, max_epochs=4)
    assert len(left_out) == 12
    assert all(module.state_dict()[name].any() for name in injected_names(module))


def test_gradient_checkpointing_sees_the_same_adapters() -> None:
    class Checkpointed(Deep):
        def __init__(self) -> None:
            super().__init__()
            self.model.activation_checkpointing_enable()

    def fit(kind: type[Deep]) -> dict[str, Tensor]:
        module = make(kind)
        torch.manual_seed(1)
        trainer(Adapter("houlsby", bottleneck=K, adapter_drop=3), max_epochs=3).fit(module)
        return module.state_dict()

    plain, again = fit(Deep), fit(Checkpointed)
    assert all(torch.equal(value, again[key]) for key, value in plain.items())


def test_dropped_adapters_are_gone_from_each_stack_and_from_files(tmp_path: Path) -> None:
    model, zeroed, fresh = (tiny.t5(num_layers=3, num_decoder_layers=2) for _ in range(3))
    for each in (model, zeroed):
        adapted = Adapter("houlsby").inject(each)
        train(each)
    lowest = [f"{stack}.block.0." for stack in ("encoder", "decoder")]
    for name, layer in injected_modules(zeroed):
        if name.startswith(tuple(lowest)):
            layer.adapter_up.data.zero_()  # type: ignore[attr-defined]
            layer.adapter_up_bias.data.zero_()  # type: ignore[attr-defined]
    gone = drop_adapters(model, 1)
    assert gone == [name for name in adapted if name.startswith(tuple(lowest))]
    assert {name for name, _ in injected_modules(model)} == set(adapted) - set(gone)
    assert torch.equal(outputs(model), outputs(zeroed))
    lightning_ft.save_adapter(model, tmp_path / "adapter")
    lightning_ft.load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(outputs(fresh), outputs(model))
    with pytest.raises(InjectionError, match="no adapters in its first 1 layers"):
        drop_adapters(fresh, 1)


# ---------------------------------------------------------------------------------------- what is refused


def test_a_bad_argument_is_an_error_with_its_value() -> None:
    for argument, value in [
        ("placement", "lohse"),
        ("bottleneck", 0),
        ("bottleneck", "8"),
        ("reduction_factor", math.nan),
        ("non_linearity", "sine"),
        ("scaling", 0),
        ("dropout", 1),
        ("adapter_drop", -1),
        ("adapter_drop", 0.5),
    ]:
        with pytest.raises(ValueError, match=rf"Adapter: {argument} must be .*, not {value!r}\."):
            Adapter(**{argument: value})


def test_two_widths_are_one_too_many() -> None:
    with pytest.raises(ValueError, match="bottleneck and reduction_factor both say the width"):
        Adapter(bottleneck=8, reduction_factor=16)


def test_what_cannot_be_is_refused_and_changes_nothing() -> None:
    for build, settings, message in [
        (tiny.bert, {"reduction_factor": 17}, "reduction_factor=17 leaves nothing of the 16 features of 'encoder"),
        (
            tiny.bert,
            {"adapter_drop": 2},
            "adapter_drop=2 would leave out all.* in layer 2 of the stack.* it can be 1 at most",
        ),
        (tiny.bert, {"target_modules": ["LayerNorm"]}, "modules that this method can't adapt .LayerNorm."),
        (tiny.bert, {"target_modules": ["encoder.layer"]}, "modules that this method can't adapt .ModuleList."),
        (
            lambda: nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))}),
            {"backbone": ".", "target_modules": ["a"]},
            "modules that this method can't adapt .Sequential.",
        ),
        (lambda: nn.Linear(4, 4), {"backbone": "."}, r"end in Linear isn't known.*target_modules"),
        (
            lambda: make(TorchTransformer),
            {"backbone": "encoder", "target_modules": ["out_proj"]},
            "nn.MultiheadAttention reads its weight and never calls its forward",
        ),
        (
            lambda: AutoModel.from_config(CONFIG_MAPPING["opt"](**OPT)),
            {"placement": "parallel"},
            "OPTModel has no feed-forward module.* Use another placement",
        ),
    ]:
        model = build()
        with pytest.raises(InjectionError, match=message):
            Adapter(**settings).inject(model)
        assert not any(isinstance(module, AdapterLayer) for module in model.modules())
        assert all(p.requires_grad for p in model.parameters())


OPT = {"hidden_size": 16, "num_attention_heads": 2, "ffn_dim": 32, "num_hidden_layers": 2, "vocab_size": 50}
OPT |= {"word_embed_proj_dim": 16, "max_position_embeddings": 16}


@pytest.mark.parametrize("other", [{"bottleneck": 4}, {"placement": "parallel"}])
def test_a_second_injection_with_other_settings_is_an_error(other: dict[str, Any]) -> None:
    model, settings = tiny.bert(), {"bottleneck": K}
    Adapter(**settings).inject(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InjectionError, match="already carries"):
        Adapter(**{**settings, **other}).inject(model)
    assert set(model.state_dict()) == set(before)


def test_what_is_trained_whole_and_what_is_excluded_gets_no_adapter() -> None:
    model = tiny.bert()
    settings = {"modules_to_save": ["layer.0.output"], "exclude_modules": ["attention.output.dense"]}
    assert Adapter("houlsby", **settings).inject(model) == ["encoder.layer.1.output.dense"]
    assert Adapter("parallel", layers_to_transform=1).inject(tiny.gpt2()) == ["transformer.h.1.mlp"]
