"""Merging into a base whose linear layers are bitsandbytes' Linear4bit."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

import lightning_ft
from lightning_ft import InjectionError, LoRA
from lightning_ft.injection import injected_modules, injected_names

bnb: Any = pytest.importorskip("bitsandbytes", reason="the quantization extra isn't installed")

X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


def base(nested: bool = False, quant_type: str = "nf4", dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Two layers in 4 bits, and a dense one."""
    torch.manual_seed(1)
    layers = [bnb.nn.Linear4bit(64, 64, compress_statistics=nested, quant_type=quant_type) for _ in range(2)]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Linear(64, 3)).to(dtype).to("cpu")


def adapted(change: float, **kind: Any) -> nn.Sequential:
    """With LoRA on all three, whose change of the weights has ``change`` times their norm."""
    model = base(**kind)
    LoRA(r=4, target_modules="all-linear", backbone=".").inject(model)
    for name, layer in injected_modules(model):
        nn.init.normal_(layer.lora_B)
        layer.lora_B.data *= change * dense(base(**kind).get_submodule(name)).norm() / layer.delta().norm()
    return model


def dense(layer: Any) -> Tensor:
    state = getattr(layer.weight, "quant_state", None)
    weight = layer.weight.detach() if state is None else bnb.functional.dequantize_4bit(layer.weight.data, state)
    return weight.float().clone()


def kinds(model: nn.Module) -> list[str]:
    """Our Linear4bit is bitsandbytes', with a forward that changes nothing of it."""
    return [type(module).__name__ for module in model.modules()]


def test_lora_on_4_bits_is_lora_on_the_weights_they_stand_for() -> None:
    model, plain = adapted(0.1), nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Linear(64, 3))
    for name in ("0", "2", "3"):
        layer, other = model.get_submodule(name), plain.get_submodule(name)
        other.weight.data, other.bias.data = dense(layer), layer.bias.detach()
    LoRA(r=4, target_modules="all-linear", backbone=".").inject(plain)
    added = injected_names(model)
    assert added == injected_names(plain)
    for name in added:
        plain.get_parameter(name).data.copy_(model.get_parameter(name))
    model.eval()(X)  # on some CPUs bitsandbytes would now pack the weights anew, and training fail
    for each in (model, plain):
        each.train()(X).square().sum().backward()
    torch.testing.assert_close(model(X), plain(X), atol=1e-5, rtol=1e-5)
    for name in added:
        ours, wanted = model.get_parameter(name).grad, plain.get_parameter(name).grad
        torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-4)
        assert ours.any()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == added


@pytest.mark.parametrize("change", [0.01, 0.1])
def test_a_merge_that_would_lose_the_adapter_is_refused_and_changes_nothing(change: float) -> None:
    model = adapted(change)
    before, out = kinds(model), model(X)
    with pytest.raises(InjectionError, match=r"is \d\.\d+ of the change itself.*dequantize=True.*max_drift=") as error:
        lightning_ft.merge(model, reversible=True)
    assert kinds(model) == before
    assert torch.equal(model(X), out)
    told = re.search(r"merge\(model, max_drift=([\d.]+)\)", str(error.value))
    assert told
    assert lightning_ft.merge(model, max_drift=float(told[1])) == ["0", "2", "3"]


@pytest.mark.parametrize("kind", [{}, {"nested": True}, {"quant_type": "fp4"}, {"dtype": torch.bfloat16}], ids=str)
def test_the_drift_that_is_told_is_that_of_the_merged_weights(
    kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(lightning_ft.adapters, "rank_zero_info", told.append)
    model = adapted(0.5, **kind)
    before = {name: dense(model.get_submodule(name)) for name in ("0", "2", "3")}
    deltas = {name: model.get_submodule(name).delta().detach() for name in before}
    lightning_ft.merge(model)
    assert kinds(model) == kinds(base(**kind))
    assert list(model.state_dict()) == list(base(**kind).state_dict())
    errors = {name: dense(model.get_submodule(name)) - before[name] - delta for name, delta in deltas.items()}
    drift = (errors["0"].norm().square() + errors["2"].norm().square()).sqrt() / (
        deltas["0"].norm().square() + deltas["2"].norm().square()
    ).sqrt()
    assert re.search(r"2 merged layers .* is (\d\.\d\d) of the change", told[0])[1] == f"{drift:.2f}"  # type: ignore[index]
    assert errors["3"].norm() <= 0.01 * deltas["3"].norm(), "the dense one"
    assert 0 < drift < 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_made_dense_the_merge_is_exact(dtype: torch.dtype) -> None:
    model = adapted(0.01, dtype=dtype)
    wanted = {name: (dense(layer := model.get_submodule(name)) + layer.delta()).to(dtype) for name in ("0", "2", "3")}
    out = model(X.to(dtype))
    lightning_ft.merge(model, dequantize=True)
    assert [type(model.get_submodule(name)) for name in wanted] == [nn.Linear] * 3
    assert list(model.state_dict()) == [f"{name}.{key}" for name in wanted for key in ("weight", "bias")]
    assert all(torch.equal(model.get_submodule(name).weight, weight) for name, weight in wanted.items())
    assert set(vars(model[0])) == set(vars(nn.Linear(1, 1)))
    tight = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(model(X.to(dtype)), out, atol=tight, rtol=tight)


def test_an_adapter_that_changes_nothing_costs_nothing() -> None:
    model = base(nested=True)  # where packing again what was unpacked isn't exact
    LoRA(r=2, backbone=".", target_modules=["0", "2"]).inject(model)
    lightning_ft.merge(model)
    for (_, one), (_, other) in zip(model.state_dict().items(), base(nested=True).state_dict().items(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("how", [{"dequantize": True}, {"max_drift": 2.0}], ids=str)
def test_a_reversible_merge_brings_the_packed_weights_back(how: dict[str, Any]) -> None:
    model = adapted(0.05, nested=True)
    before, out = kinds(model), model(X)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    lightning_ft.merge(model, reversible=True, **how)
    assert not torch.equal(model(X), out)
    for each in (copy.deepcopy(model), model):
        assert lightning_ft.unmerge(each) == ["0", "2", "3"]
        assert kinds(each) == before
        assert list(each.state_dict()) == list(state)
        assert all(torch.equal(value, state[key]) for key, value in each.state_dict().items())
        assert torch.equal(each(X), out)
        each.train()(X).sum().backward()


def test_what_bitsandbytes_packed_anew_for_inference_is_taken_back() -> None:
    model, untouched = base().eval(), base()
    with torch.no_grad():
        model(X)  # on a CPU with AVX512-BF16 the weights have another layout now, and can't train
    LoRA(r=2, backbone=".", target_modules=["0"]).inject(model)
    for name in ("0", "2"):
        assert torch.equal(model.get_submodule(name).weight, untouched.get_submodule(name).weight)


def test_hugging_faces_own_4_bits_merge_and_come_back(tmp_path: Any) -> None:
    from transformers import BertForSequenceClassification, BitsAndBytesConfig

    tiny.bert_classifier(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    model = BertForSequenceClassification.from_pretrained(
        tmp_path,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["classifier"]
        ),
    )
    LoRA(r=2).inject(model)
    for _, layer in injected_modules(model):
        nn.init.normal_(layer.lora_B, std=0.1)
    out = tiny.logits(model)
    lightning_ft.merge(model, dequantize=True, reversible=True)
    torch.testing.assert_close(tiny.logits(model), out, atol=1e-4, rtol=1e-4)
    lightning_ft.unmerge(model)
    assert torch.equal(tiny.logits(model), out)


def test_a_bank_over_4_bits_answers_each_row(tmp_path: Any) -> None:
    alone = {}
    for change in (0.1, 0.3):
        model = adapted(change)
        alone[f"{change}"] = model(X)
        lightning_ft.save_adapter(model, tmp_path / f"{change}", ".")
    model = base()
    bank = lightning_ft.AdapterBank(model, ".")
    for name in alone:
        bank.load(name, tmp_path / name)
    with bank.rows(["0.3", None, "0.1"]):
        out = model(X)
    torch.testing.assert_close(out, torch.stack([alone["0.3"][0], base()(X)[1], alone["0.1"][2]]), atol=1e-5, rtol=1e-5)
    bank.close()
    assert torch.equal(model(X), base()(X))
