from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
import torch
from torch import Tensor, nn

import lightning_ft
from lightning_ft import IA3, AdaLoRA, LoRA
from lightning_ft.injection import (
    Injected,
    InjectionError,
    attach,
    detach,
    find_base,
    freeze_base,
    injected_modules,
    injected_names,
    match_modules,
    thaw,
    unfreeze,
)


class Shift(Injected):
    method, acts_on, slot = "SHIFT", "outputs", "shift"
    adds: ClassVar = {"offset": "offset"}

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.offset


class Scale(Injected):
    method, acts_on, slot = "SCALE", "inputs", "scale"
    adds: ClassVar = {"factor": "factor", "extra": "extra"}

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor * self.extra


def values(mixin: type[Injected]) -> dict[str, Tensor]:
    return dict(zip(mixin.adds, (torch.full((4,), x) for x in VALUES[mixin]), strict=True))


VALUES = {Shift: [3.0], Scale: [5.0, 7.0]}


class Doubling(nn.Linear):
    """A user's own layer, with a forward and attributes of its own."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return 2 * super().forward(x)


def put(model: nn.Module, name: str, *mixins: type[Injected], settings: Any = 1) -> None:
    for mixin in mixins:
        attach(model, name, mixin, settings, values(mixin))


def net(layer: Callable[[], nn.Module] = lambda: nn.Linear(4, 4)) -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(layer(), nn.Tanh(), nn.Sequential(layer(), nn.Linear(4, 4)))


X = torch.linspace(-1, 1, 12).view(3, 4)


def tree(model: nn.Module) -> list[Any]:
    """Everything of the modules but the values: names, classes, attributes, keys in their order."""
    modules = [(name, type(m), set(vars(m)), list(m._parameters)) for name, m in model.named_modules()]
    return [modules, list(model.state_dict())]


# --------------------------------------------------------------------------------------- attach and detach


@pytest.mark.parametrize(
    ("layer", "name"), [(lambda: nn.Linear(4, 4), "0"), (Doubling, "2.0")], ids=["Linear", "subclass"]
)
def test_attaching_keeps_what_was_and_detaching_leaves_no_trace(layer: Callable[[], nn.Module], name: str) -> None:
    model = net(layer)
    before, state, plain = tree(model), copy.deepcopy(model.state_dict()), model.get_submodule(name)(X)
    module, kind = model.get_submodule(name), type(model.get_submodule(name))

    put(model, name, Shift)
    assert model.get_submodule(name) is module
    assert isinstance(module, kind)
    assert isinstance(module, Shift)
    assert type(module).__name__ == kind.__name__
    assert torch.equal(module(X), plain + 3)
    assert set(model.state_dict()) == {*state, f"{name}.offset"} == {*state} | injected_names(model)
    assert [n for n, _ in injected_modules(model)] == [name]
    assert "shift=1" in repr(module)

    detach(model, name)
    assert tree(model) == before
    assert torch.equal(module(X), plain)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_the_forward_of_a_users_subclass_still_runs() -> None:
    model = net(Doubling)
    put(model, "0", Shift, Scale)
    module = model[0]
    expected = (2 * nn.functional.linear(X, module.weight, module.bias) + 3) * 35
    torch.testing.assert_close(module(X), expected)
    assert module.calls == 1


@pytest.mark.parametrize(("first", "removed_first"), [(Shift, Shift), (Shift, Scale), (Scale, Shift)])
def test_two_methods_stack_and_come_off_in_either_order(first: type[Injected], removed_first: type[Injected]) -> None:
    second = Scale if first is Shift else Shift
    stays = Scale if removed_first is Shift else Shift
    model = net()
    before, plain = tree(model), model[0](X)
    alone = {Shift: plain + 3, Scale: plain * 35}

    put(model, "0", first, second)
    torch.testing.assert_close(model[0](X), plain * 35 + 3 if second is Shift else (plain + 3) * 35)
    detach(model, "0", removed_first)
    assert isinstance(model[0], stays)
    assert not isinstance(model[0], removed_first)
    assert injected_names(model) == {f"0.{key}" for key in stays.adds}
    torch.testing.assert_close(model[0](X), alone[stays])
    detach(model, "0", stays)
    assert tree(model) == before


def test_attaching_twice_with_equal_settings_is_attaching_once() -> None:
    model = net()
    put(model, "0", Shift, Scale)
    with torch.no_grad():
        model[0].offset.fill_(1.0)  # has been trained
    before = tree(model)
    put(model, "0", Shift)
    assert tree(model) == before
    assert model[0].offset.eq(1).all()
    with pytest.raises(InjectionError, match="'0' already carries SHIFT with 1; asked for 2"):
        put(model, "0", Shift, settings=2)
    assert tree(model) == before


def test_detaching_what_is_not_there_does_nothing() -> None:
    model = net()
    before = tree(model)
    detach(model, "0")
    put(model, "0", Shift)
    detach(model, "0", Scale)
    assert isinstance(model[0], Shift)
    detach(model, "0")
    assert tree(model) == before


def test_a_module_that_stands_in_two_places_is_one_module() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    put(model, "0", Shift)
    put(model, "2", Shift)
    assert [n for n, _ in injected_modules(model)] == ["0"]
    detach(model, "2")
    assert type(shared) is nn.Linear


@pytest.mark.parametrize("kind", [nn.MultiheadAttention, nn.TransformerEncoderLayer])
def test_what_multihead_attention_never_calls_is_refused(kind: Any) -> None:
    model = nn.ModuleDict({"part": kind(4, 2)})
    name = next(n for n, _ in model.named_modules() if n.endswith("out_proj"))
    before = tree(model)
    with pytest.raises(InjectionError, match=f"'{name}' can't be adapted: nn.MultiheadAttention"):
        put(model, name, Shift)
    assert tree(model) == before


def test_a_forward_that_was_replaced_on_the_instance_is_refused() -> None:
    model = net()
    model[0].forward = lambda x: x
    with pytest.raises(InjectionError, match=r"'0' can't be adapted: its forward was replaced"):
        put(model, "0", Shift)
    assert type(model[0]) is nn.Linear


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "normed", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm, nn.utils.weight_norm]
)
@pytest.mark.parametrize("method", [LoRA, AdaLoRA, IA3])
def test_a_weight_that_is_computed_is_refused_with_the_cure(normed: Callable[..., nn.Module], method: Any) -> None:
    model = nn.ModuleDict({"fc": normed(nn.Linear(4, 4))})
    before = tree(model)
    more = {"feedforward_modules": []} if method is IA3 else {}
    with pytest.raises(InjectionError, match=r"'fc' computes its weight.*remove_parametrizations.*remove_weight_norm"):
        method(target_modules=["fc"], backbone=".", **more).inject(model)
    assert tree(model) == before
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("seed", range(2))
def test_any_sequence_of_changes_keeps_the_tree(seed: int) -> None:
    dice = random.Random(seed)
    model = net(Doubling)
    before, names = tree(model), ["0", "2.0", "2.1"]
    for _ in range(75):
        name, mixin = dice.choice(names), dice.choice([Shift, Scale])
        if dice.random() < 0.6:
            put(model, name, mixin)
        else:
            detach(model, name, dice.choice([mixin, None]))
        carried = {n: set(type(m)._mixins) for n, m in injected_modules(model)}
        assert injected_names(model) == {
            f"{n}.{key}" for n, mixins in carried.items() for mixin in mixins for key in mixin.adds
        }
        assert set(model.state_dict()) == {*before[1]} | injected_names(model)
    for name in names:
        detach(model, name)
    assert tree(model) == before


@pytest.mark.parametrize("seed", range(2))
def test_any_sequence_of_injecting_and_merging_keeps_tree_and_outputs(seed: int) -> None:
    dice = random.Random(seed)
    model = net().double()
    before, names = tree(model), ["0", "2.0", "2.1"]
    before[0][0][2].add("_thawed_by_lightning_ft")  # on the root: what was merged is evaluated as it is
    for _ in range(12):
        subset = sorted(dice.sample(names, dice.randint(1, 3)))
        for _ in range(dice.randint(1, 3)):
            assert LoRA(r=2, target_modules="|".join(subset), backbone=".").inject(model) == subset
        for _, layer in injected_modules(model):
            nn.init.normal_(layer.lora_B)
        expected = model(X.double())
        assert lightning_ft.merge(model) == subset
        assert tree(model) == before
        torch.testing.assert_close(model(X.double()), expected, atol=1e-5, rtol=1e-5)


# ----------------------------------------------------------------------------------------- copies and files


def through_torch_save(model: nn.Module, folder: Path) -> nn.Module:
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


@pytest.mark.parametrize(
    "again",
    [
        lambda model, _: copy.deepcopy(model),
        lambda model, _: pickle.loads(pickle.dumps(model)),
        through_torch_save,
    ],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_is_the_same_and_its_own(again: Callable[[nn.Module, Path], nn.Module], tmp_path: Path) -> None:
    model = net(Doubling)
    put(model, "0", Shift, Scale)
    put(model, "2.1", Shift)
    model[0].weight.requires_grad_(False)
    made = again(model, tmp_path)
    assert tree(made) == tree(model)
    assert torch.equal(made(X), model(X))
    assert [p.requires_grad for p in made.parameters()] == [p.requires_grad for p in model.parameters()]
    assert not {p.data_ptr() for p in made.parameters()} & {p.data_ptr() for p in model.parameters()}
    with torch.no_grad():
        made[0].offset.fill_(100.0)
    assert model[0].offset.eq(3).all()
    for name in ("0", "2.1"):
        detach(made, name)
    assert tree(made) == tree(net(Doubling))


# --------------------------------------------------------------------------------------- dtypes and devices


def stacked_with_gradients() -> nn.Sequential:
    model = net()
    put(model, "0", Shift, Scale)
    model[0](X).square().sum().backward()
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_was_added_follows_a_change_of_dtype_but_not_below_fp32(dtype: torch.dtype) -> None:
    model = stacked_with_gradients()
    gradients = {key: p.grad.clone() for key, p in model[0].named_parameters()}
    parameters = dict(model[0].named_parameters())
    method = {torch.bfloat16: "bfloat16", torch.float64: "double"}[dtype]
    for cast in (lambda: model.to(dtype), getattr(model, method), lambda: model.to("cpu", dtype)):
        cast()
        for key, p in model[0].named_parameters():
            added = key in ("offset", "factor", "extra")
            assert p.dtype == p.grad.dtype == (torch.promote_types(dtype, torch.float32) if added else dtype), key
            assert p is parameters[key]  # the optimizer's
            if added:
                assert torch.equal(p.grad.float(), gradients[key])
    assert model[0].offset.eq(3).all()
    assert {p.dtype for p in model.float().parameters()} == {torch.float32}


def test_what_is_asked_to_be_held_in_bf16_is_whatever_the_module_is_cast_to() -> None:
    model = net()
    attach(model, "0", Shift, 1, values(Shift), torch.bfloat16)
    attach(model, "0", Scale, 1, values(Scale))
    of_base = {"weight", "bias"}
    for dtype, shift, scale in (
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float64, torch.float64, torch.float64),
    ):
        model.to(dtype)
        found = {key: p.dtype for key, p in model[0].named_parameters()}
        assert found == {**dict.fromkeys(of_base, dtype), "offset": shift, "factor": scale, "extra": scale}
    detach(model, "0", Shift)
    assert model.bfloat16()[0].factor.dtype == torch.float32
    detach(model, "0", Scale)
    assert set(vars(model[0])) == set(vars(net()[0]))


def test_another_fit_may_hold_what_is_there_in_another_dtype() -> None:
    model = tiny.bert_classifier()
    LoRA(r=2).inject(model)
    before = {key: model.get_parameter(key) for key in injected_names(model)}
    LoRA(r=2, adapter_dtype="bfloat16").inject(model)
    assert {key: model.get_parameter(key) for key in injected_names(model)} == before, "an optimizer holds them"
    assert {p.dtype for p in before.values()} == {torch.bfloat16}
    LoRA(r=2).inject(model.to(torch.bfloat16))
    assert {p.dtype for p in before.values()} == {torch.float32}
    with pytest.raises(ValueError, match=r"LoRA: adapter_dtype must be one of float32, bfloat16, not 'float16'"):
        LoRA(adapter_dtype="float16")  # type: ignore[arg-type]


def test_a_move_to_another_device_is_followed_in_fp32() -> None:
    model = stacked_with_gradients()
    model.to(device="meta", dtype=torch.bfloat16)
    added = {key: model.get_parameter(key) for key in injected_names(model)}
    assert {p.device.type for p in model.parameters()} == {p.grad.device.type for p in added.values()} == {"meta"}
    assert {p.dtype for p in added.values()} == {p.grad.dtype for p in added.values()} == {torch.float32}
    assert model[0].weight.dtype == torch.bfloat16
    model.to_empty(device="cpu")
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert {model.get_parameter(key).dtype for key in injected_names(model)} == {torch.float32}


def test_what_is_added_goes_where_the_module_is() -> None:
    model = net().to("meta").bfloat16()
    put(model, "0", Shift)
    assert (model[0].offset.device.type, model[0].offset.dtype) == ("meta", torch.float32)


# ------------------------------------------------------------------------------------------- the fused path


def encoder() -> nn.TransformerEncoder:
    torch.manual_seed(2)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


PADDED = torch.tensor([[False, False, False], [False, False, True]])


@pytest.mark.parametrize(("place", "padding"), [("in an encoder", PADDED), ("is the encoder", None)], ids=str)
def test_the_fused_path_is_left_while_injected_and_restored_after(place: str, padding: Tensor | None) -> None:
    encoding = encoder()
    model, prefix = (encoding, "") if place == "is the encoder" else (nn.Sequential(encoding), "0.")
    names = [f"{prefix}layers.0.linear1", f"{prefix}layers.0.linear2"]
    before = tree(model)
    switches = [encoding.use_nested_tensor, *(x.activation_relu_or_gelu for x in encoding.layers)]
    x = torch.randn(2, 3, 8)

    def evaluated() -> Tensor:
        with torch.no_grad():
            out = encoding(x, src_key_padding_mask=padding)
        return out if padding is None else out[~padding]

    plain = evaluated()
    for name in names:
        width = model.get_submodule(name).out_features
        attach(model, name, Shift, 1, {"offset": torch.linspace(-2, 2, width)})
    assert not torch.allclose(evaluated(), plain, atol=1e-2)
    detach(model, names[0])
    assert not torch.allclose(evaluated(), plain, atol=1e-2)
    detach(model, names[1])
    assert tree(model) == before
    assert switches == [encoding.use_nested_tensor, *(x.activation_relu_or_gelu for x in encoding.layers)]
    assert torch.equal(evaluated(), plain)


# --------------------------------------------------------------------------------------------------- freeze


def training(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_freezing_leaves_the_head_what_was_added_and_what_is_to_be_saved() -> None:
    model = tiny.bert_classifier()
    put_on = "bert.encoder.layer.0.attention.self.query"
    attach(model, put_on, Shift, 1, {"offset": torch.zeros(16)})
    base = find_base(model)
    before = training(model)
    saved = match_modules(base, ["pooler", "layer.1.output"])
    freeze_base(base, "X", saved)
    assert saved == ["bert.encoder.layer.1.output", "bert.pooler"]
    assert training(model) == {
        f"{put_on}.offset",
        *(f"classifier.{n}" for n, _ in model.classifier.named_parameters()),
        *(f"bert.pooler.{n}" for n, _ in model.bert.pooler.named_parameters()),
        *(f"bert.encoder.layer.1.output.{n}" for n, _ in model.bert.encoder.layer[1].output.named_parameters()),
    }
    again = training(model)
    freeze_base(base, "X", saved)
    assert training(model) == again
    assert match_modules(base, "layer.1.output") == saved[:1]
    for wrong in ("poler", ["poler"]):
        with pytest.raises(InjectionError, match=r"modules_to_save: .poler. matches no module.*pooler"):
            match_modules(base, wrong)
    with pytest.raises(InjectionError, match=r"X trained other.*: nothing would be new, .*output.* left out"):
        freeze_base(base, "X")
    assert training(model) == again
    thaw(model)
    assert training(model) == before
    freeze_base(base, "X")
    assert not any("pooler" in name for name in training(model))


def test_integer_parameters_stay_as_they_are() -> None:
    model = nn.Linear(2, 2)
    model.packed = nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    model.requires_grad_(False)
    unfreeze([model])
    assert training(model) == {"weight", "bias"}
