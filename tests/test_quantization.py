"""A base in 4 or 8 bits: what is packed and how, training over it, loading into it, merging into it."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

import lightning_ft
from lightning_ft import AdaLoRA, BitFit, Classification, FineTuner, InjectionError, LoRA
from lightning_ft.callbacks.finetuning import count_parameters
from lightning_ft.injection import find_base, injected_modules, injected_names, is_quantized
from lightning_ft.quantization import QuantizationError, dense_weight, to_pack

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


# --------------------------------------------------------------------------------------- packing a base ourselves


def packed_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if is_quantized(module)}


def by_hand(weight: Any) -> Tensor:
    """QLoRA, equation 2: each value is a level times the scale of its block of 64; two levels lie in a byte."""
    state, scales = weight.quant_state, weight.quant_state.absmax
    if state.nested:
        scales = bnb.functional.dequantize_blockwise(scales, state.state2) + state.offset
    levels = torch.stack([weight.data.flatten() >> 4, weight.data.flatten() & 15], dim=1).flatten().long()
    values = state.code[levels] * scales.repeat_interleave(state.blocksize)[: len(levels)]
    return values[: state.shape.numel()].view(state.shape)


def as_dense(model: nn.Module) -> nn.Module:
    """A copy over the weights that the packed ones stand for, by bitsandbytes' own functions or the formula."""
    copied: Any = copy.deepcopy(model)
    for name in packed_names(copied):
        layer = copied.get_submodule(name)
        plain = nn.Linear(layer.in_features, layer.out_features)
        if hasattr(layer, "SCB"):  # LLM.int8(), section 2.1
            plain.weight = nn.Parameter(layer.weight.float() * layer.SCB[:, None] / 127)
        else:
            plain.weight = nn.Parameter(by_hand(layer.weight))
        plain.bias = layer.bias
        copied.set_submodule(name, plain)
    return copied


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", {"kind": "nf4", "double": False}], ids=str)
def test_packed_layers_compute_with_what_they_stand_for_before_and_after_an_evaluation(kind: Any) -> None:
    model = tiny.bert_classifier(hidden_size=64, intermediate_size=96)
    pretrained = copy.deepcopy(model)
    LoRA(r=2, quantize=kind).inject(model)
    reference: Any = as_dense(model)  # without what was injected
    for name in packed_names(model):
        difference = (reference.get_submodule(name).weight - pretrained.get_submodule(name).weight).norm()
        assert 0 < difference < (0.01 if kind == "int8" else 0.15) * pretrained.get_submodule(name).weight.norm()
    LoRA(r=2).inject(reference)
    for each in (model, reference):
        for _, layer in injected_modules(each):
            torch.manual_seed(1)
            nn.init.normal_(layer.lora_A), nn.init.normal_(layer.lora_B)

    def gradients(each: Any) -> dict[str, Tensor]:
        each.zero_grad()
        each.train()(input_ids=tiny.TOKENS).logits.square().sum().backward()
        return {name: p.grad.clone() for name, p in each.named_parameters() if p.requires_grad}

    before, wanted = gradients(model), gradients(reference)
    torch.testing.assert_close(tiny.logits(model), tiny.logits(reference), atol=1e-5, rtol=1e-4)
    for name, after in gradients(model).items():
        assert torch.equal(after, before[name])
        torch.testing.assert_close(after, wanted[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "variant", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}]
)
def test_what_starts_from_the_weight_starts_from_the_packed_one(variant: dict[str, Any]) -> None:
    model = tiny.bert_classifier()
    lightning_ft.quantize(model, "nf4")
    before = tiny.logits(model)
    LoRA(r=2, **variant).inject(model)
    torch.testing.assert_close(tiny.logits(model), before, atol=1e-6, rtol=1e-6)
    layer: Any = next(layer for _, layer in injected_modules(model))
    if "use_dora" in variant:
        torch.testing.assert_close(layer.lora_magnitude_vector.data, by_hand(layer.weight).norm(dim=1))


def test_only_linear_layers_of_the_frozen_base_are_packed() -> None:
    bert = tiny.bert_classifier()
    LoRA(r=2, quantize="nf4", modules_to_save=["pooler"]).inject(bert)
    linear = {name for name, module in bert.named_modules() if isinstance(module, nn.Linear)}
    assert packed_names(bert) == linear - {"bert.pooler.dense", "classifier"}
    assert {n for n, p in bert.named_parameters() if p.requires_grad} == injected_names(bert) | {
        f"{name}.{key}" for name in ("bert.pooler.dense", "classifier") for key in ("weight", "bias")
    }
    lm = tiny.llama_lm()
    assert not any(name.startswith("lm_head") for name in to_pack(find_base(lm)))
    t5 = tiny.t5()
    before = tiny_t5(t5)
    lightning_ft.quantize(t5, "int8")  # its feed-forward casts to the dtype of wo
    assert packed_names(t5)
    assert not any(name.endswith(".wo") for name in packed_names(t5))
    torch.testing.assert_close(tiny_t5(t5), before, atol=0.3, rtol=0.05)


def tiny_t5(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tiny.TOKENS, decoder_input_ids=tiny.TOKENS).logits


def test_torchs_own_encoder_evaluates_as_it_trains() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2)
    model = nn.Sequential(encoder, nn.Linear(16, 3))
    BitFit(backbone="0", target_modules=["norm1"], quantize="int8").inject(model)  # injects nothing
    assert packed_names(model) == {f"0.layers.{i}.{name}" for i in (0, 1) for name in ("linear1", "linear2")}
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), model.train()(x), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_biases_of_packed_layers_train_in_fp32_whatever_is_computed_in(kind: str) -> None:
    model, plain = tiny.bert_classifier(), tiny.bert_classifier()
    BitFit(quantize=kind).inject(model)
    reference: Any = as_dense(model)
    for each in (model, reference):
        with torch.autocast("cpu", torch.bfloat16):
            each.train()(input_ids=tiny.TOKENS).logits.square().sum().backward()
    for name, parameter in plain.named_parameters():
        ours, wanted = model.get_parameter(name), reference.get_parameter(name)
        if name.endswith("bias"):
            assert ours.dtype == torch.float32
            assert torch.equal(ours, parameter), "not rounded"
            torch.testing.assert_close(ours.grad, wanted.grad, atol=2e-2, rtol=0.1)


@pytest.mark.parametrize("shape", [(16, 16), (5, 16), (3, 48), (64, 96), (3, 65), (64, 172), (7, 64)])
def test_a_block_that_reaches_into_two_rows_has_one_scale(shape: tuple[int, int]) -> None:
    model = nn.Sequential(nn.Linear(shape[1], shape[0]), nn.Linear(shape[0], 2))
    lightning_ft.quantize(model, {"kind": "nf4", "double": False}, backbone="0")
    layer: Any = model[0]
    torch.testing.assert_close(dense_weight(layer), by_hand(layer.weight), atol=1e-6, rtol=1e-6)
    x = torch.randn(4, shape[1])
    torch.testing.assert_close(layer(x), x @ by_hand(layer.weight).T + layer.bias, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "share"), [("nf4", 0.14), ("fp4", 0.14), ("int8", 0.26)])
def test_the_memory_of_a_packed_base_and_its_true_counts(kind: str, share: float) -> None:
    model = tiny.bert_classifier(hidden_size=384, intermediate_size=1536)
    counts, linears = count_parameters(model), to_pack(find_base(model))
    whole = sum(model.get_submodule(name).weight.numel() * 4 for name in linears)
    lightning_ft.quantize(model, kind)
    held = sum(
        value.numel() * value.element_size()
        for key, value in model.state_dict().items()
        if any(key.startswith(f"{name}.") for name in linears) and not key.endswith(".bias") and "_map" not in key
    )  # the levels are the same for all layers
    assert held / whole < share
    assert count_parameters(model)[0] == counts[0]


def test_what_zero_3_has_shared_out_counts_as_the_whole() -> None:
    layer: Any = nn.Linear(4, 3)
    for parameter in layer.parameters():
        parameter.ds_numel = parameter.numel()
        parameter.data = torch.empty(0)
    assert count_parameters(layer) == (15, 15)


def test_a_refused_method_leaves_the_base_dense() -> None:
    import foreign

    module = foreign.make(foreign.BertInInit)
    before, state = kinds(module), {key: value.clone() for key, value in module.state_dict().items()}
    methods = LoRA(r=2, quantize="nf4"), AdaLoRA(target_modules=["nothing_like_it"])
    with pytest.raises(InjectionError, match="nothing_like_it"):
        foreign.trainer(*methods).fit(module)
    assert kinds(module) == before
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    assert all(p.requires_grad for p in module.parameters())


def test_what_cannot_be_packed_is_refused_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("nf5", {"double": True}, {"kind": "nf4", "bits": 4}):
        with pytest.raises(QuantizationError, match="must be one of nf4, fp4, int8"):
            LoRA(quantize=wrong)  # type: ignore[arg-type]
    with pytest.raises(QuantizationError, match=r"GPT2LMHeadModel has no nn.Linear.*precision=bf16-mixed"):
        lightning_ft.quantize(tiny.gpt2(), "nf4")
    adapted_ = tiny.bert_classifier()
    LoRA(r=2).inject(adapted_)
    with pytest.raises(InjectionError, match="carries an adapter over its dense weight: merge or remove"):
        lightning_ft.quantize(adapted_, "nf4")
    other = tiny.bert_classifier()
    lightning_ft.quantize(other, "int8")
    with pytest.raises(InjectionError, match="is packed already, and not as"):
        LoRA(r=2, quantize="nf4").inject(other)
    with pytest.raises(InjectionError, match=r"pooler.dense.weight', which is packed into 4 or 8 bits and can't train"):
        LoRA(r=2, modules_to_save=["pooler"]).inject(other)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(QuantizationError, match=r"pip install 'lightning-ft\[quantization\]'"):
        LoRA(r=2, quantize="nf4").inject(tiny.bert_classifier())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_weights_packed_as_they_are_read_are_those_packed_in_place(kind: str, tiny_bert_dir: str) -> None:
    torch.manual_seed(0)
    read = FineTuner(tiny_bert_dir, Classification(["no", "yes"]), quantize=kind)
    torch.manual_seed(0)
    module = FineTuner(tiny_bert_dir, Classification(["no", "yes"]))
    lightning_ft.quantize(module, kind)
    assert packed_names(read) == packed_names(module) != set()
    for name in packed_names(read):
        ours, theirs = (dense_weight(each.get_submodule(name)) for each in (module, read))
        # Hugging Face tells the scales of 8 bits in fp16.
        torch.testing.assert_close(ours, theirs, atol=0 if kind == "nf4" else 2e-3, rtol=0)
    assert {type(m).__name__ for m in read.modules()} == {type(m).__name__ for m in module.modules()}
    with pytest.raises(ValueError, match="this model is there already"):
        FineTuner(module.model, Classification(["no", "yes"]), quantize=kind)


def test_8_bits_take_a_merge_that_4_bits_would_lose() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))
    LoRA(r=4, target_modules="all-linear", backbone=".", quantize="int8").inject(model)
    for _, layer in injected_modules(model):
        nn.init.normal_(layer.lora_B, std=0.02)
    out = model(X)
    lightning_ft.merge(model, reversible=True, max_drift=0.3)
    assert packed_names(model) == {"0", "2"}
    torch.testing.assert_close(model(X), out, atol=2e-2, rtol=2e-2)
    lightning_ft.unmerge(model)
    assert torch.equal(model(X), out)


def test_adamw_in_8_bits_resumes_to_the_bit(tmp_path: Any) -> None:
    import foreign

    class Wide(foreign.BertInInit):  # whose tensors are large enough to have their state in 8 bits
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny.bert_classifier(hidden_size=64, intermediate_size=64).train()

        def configure_optimizers(self) -> Any:
            return bnb.optim.AdamW8bit(self.parameters(), lr=1e-2)

    def fit(epochs: int, **more: Any) -> Any:
        module, run = foreign.make(Wide), foreign.trainer(LoRA(r=64), max_epochs=epochs)
        run.fit(module, **more)
        run.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module, run

    whole, run = fit(3)
    state = next(iter(run.optimizers[0].state.values()))
    assert state["state1"].dtype == torch.uint8
    fit(2)
    resumed, _ = fit(3, ckpt_path=tmp_path / "2.ckpt")
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())
