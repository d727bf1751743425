"""Adapter folders: both ways with stock PEFT, and what is refused."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from foreign import BertInInit, Classifier, TrunkInSetup, make
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_ft import AdapterBank, FullFineTuning, HeadOnly, InjectionError, LoRA, load_adapter, save_adapter
from lightning_ft.files.peft import CARD, CONFIG, WEIGHTS
from lightning_ft.files.state import StateError
from lightning_ft.injection import injected_modules, injected_names

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CASES: dict[str, tuple[Callable[[], Any], str | None, dict[str, Any]]] = {
    "bert": (tiny.bert, None, {"target_modules": ["query", "output.dense"]}),
    "bert classifier": (tiny.bert_classifier, "SEQ_CLS", {"target_modules": ["query", "value"]}),
    "bert classifier and pooler": (
        tiny.bert_classifier,
        "SEQ_CLS",
        {"target_modules": ["query"], "modules_to_save": ["pooler"]},
    ),
    "distilbert classifier": (tiny.distilbert_classifier, "SEQ_CLS", {"target_modules": ["q_lin", "v_lin"]}),
    "embedding": (tiny.bert_classifier, "SEQ_CLS", {"target_modules": ["word_embeddings", "key"]}),
    "gpt2": (tiny.gpt2, "CAUSAL_LM", {"target_modules": ["c_attn", "mlp.c_proj"]}),
    "t5": (tiny.t5, "SEQ_2_SEQ_LM", {"target_modules": ["q", "wo"]}),
}
each_case = pytest.mark.parametrize("case", CASES)


def outputs(model: Any) -> Tensor:
    decoded = {"decoder_input_ids": tiny.TOKENS} if model.config.is_encoder_decoder else {}
    model.eval()
    with torch.no_grad():
        return model(input_ids=tiny.TOKENS, **decoded)[0]


def shaken(model: nn.Module) -> nn.Module:
    """As after training: whatever trains has moved."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def ours(case: str) -> Any:
    build, _, settings = CASES[case]
    model = build()
    LoRA(r=2, alpha=6, **settings).inject(model)
    return shaken(model)


def theirs(case: str, **more: Any) -> Any:
    build, task, settings = CASES[case]
    config = {"task_type": task, "r": 2, "lora_alpha": 6, "fan_in_fan_out": case == "gpt2", **settings, **more}
    config = copy.deepcopy(config)  # PEFT adds to modules_to_save in place
    return shaken(peft.get_peft_model(build(), peft.LoraConfig(**config)))


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())


# ------------------------------------------------------------------------------------ both ways with PEFT


@each_case
def test_stock_peft_loads_ours(case: str, tmp_path: Path) -> None:
    model = ours(case)
    assert save_adapter(model, tmp_path) == tmp_path
    loaded = peft.PeftModel.from_pretrained(CASES[case][0](), tmp_path)
    torch.testing.assert_close(outputs(loaded), outputs(model), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(outputs(model), outputs(CASES[case][0]()), atol=1e-2)


@each_case
def test_ours_loads_stock_pefts_and_writes_the_same(case: str, tmp_path: Path) -> None:
    model = theirs(case)
    model.save_pretrained(tmp_path / "theirs")
    loaded = CASES[case][0]()
    load_adapter(loaded, tmp_path / "theirs")
    torch.testing.assert_close(outputs(loaded), outputs(model), atol=1e-5, rtol=1e-5)
    assert {type(m) for _, m in injected_modules(loaded)} == {type(m) for _, m in injected_modules(ours(case))}
    save_adapter(loaded, tmp_path / "ours")
    mine, stock = (load_file(tmp_path / x / WEIGHTS) for x in ("ours", "theirs"))
    assert set(mine) == set(stock)
    assert all(torch.equal(value, mine[key]) for key, value in stock.items())


@each_case
def test_a_folder_round_trips(case: str, tmp_path: Path) -> None:
    model = ours(case)
    save_adapter(model, tmp_path / "a")
    fresh = CASES[case][0]()
    load_adapter(fresh, tmp_path / "a")
    assert torch.equal(outputs(fresh), outputs(model))
    assert [p.requires_grad for p in fresh.parameters()] == [p.requires_grad for p in model.parameters()]
    save_adapter(fresh, tmp_path / "b")
    for name in (CONFIG, WEIGHTS, CARD):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("init", [True, False, "gaussian", "Gaussian", "orthogonal", "mica", "OLoRA"])
def test_every_init_that_peft_can_make_again_is_loaded(init: Any, tmp_path: Path) -> None:
    model = theirs("bert classifier", init_lora_weights=init)
    model.save_pretrained(tmp_path)
    loaded = tiny.bert_classifier()
    load_adapter(loaded, tmp_path)
    torch.testing.assert_close(outputs(loaded), outputs(model), atol=1e-5, rtol=1e-5)


def test_pefts_config_reads_ours(tmp_path: Path) -> None:
    for case, (build, task, settings) in CASES.items():
        folder = tmp_path / case
        model = build()
        LoRA(r=3, alpha=5, dropout=0.25, **settings).inject(model)
        save_adapter(model, folder)
        config = peft.LoraConfig.from_pretrained(folder)
        assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 5, 0.25)
        assert set(config.target_modules) == {name for name, _ in injected_modules(model)}
        assert (config.peft_type, config.task_type) == ("LORA", task)
        assert (config.bias, config.fan_in_fan_out, config.inference_mode) == ("none", case == "gpt2", True)
        assert (config.auto_mapping is None) == (task is not None)
    expected = {
        "bert": None,
        "bert classifier": ["classifier"],
        "bert classifier and pooler": ["bert.pooler", "classifier"],
        "distilbert classifier": ["pre_classifier", "classifier"],
        "gpt2": None,
    }
    assert {case: config_of(tmp_path / case)["modules_to_save"] for case in expected} == expected


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.parametrize(
    ("build", "target"),
    [(tiny.llama, "embed_tokens"), (lambda: tiny.gpt2(tie_word_embeddings=False), "lm_head")],
)
def test_base_weights_that_peft_adds_to_a_file_are_loaded_and_stay_frozen(
    build: Callable[[], Any], target: str, tmp_path: Path
) -> None:
    """PEFT adds them where an embedding is adapted, in case its vocabulary was extended."""
    config = peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
    model = peft.get_peft_model(build(), config)
    key = f"{target}.base_layer.weight"
    with torch.no_grad():
        model.base_model.model.get_parameter(key)[-1].add_(1)  # a new token's row
    model.save_pretrained(tmp_path)
    assert any(name.endswith(key) for name in load_file(tmp_path / WEIGHTS))
    loaded = build()
    load_adapter(loaded, tmp_path)
    torch.testing.assert_close(outputs(loaded), outputs(model), atol=1e-5, rtol=1e-5)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == injected_names(loaded)

    save_adapter(shaken(loaded), tmp_path / "ours")
    with torch.no_grad():
        fresh = build()
        fresh.get_parameter(f"{target}.weight")[-1].add_(1)
    stock = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours")
    torch.testing.assert_close(outputs(stock), outputs(loaded), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_a_tied_embedding_that_trains_whole_is_the_same_to_stock_peft(tmp_path: Path) -> None:
    model = tiny.gpt2()
    LoRA(r=2, target_modules=["c_attn"], modules_to_save=["wte"]).inject(model)
    save_adapter(shaken(model), tmp_path)
    stock = peft.PeftModel.from_pretrained(tiny.gpt2(), tmp_path)
    torch.testing.assert_close(outputs(stock), outputs(model), atol=1e-5, rtol=1e-5)
    fresh = tiny.gpt2()
    load_adapter(fresh, tmp_path)
    assert torch.equal(outputs(fresh), outputs(model))
    assert fresh.lm_head.weight is fresh.transformer.wte.weight


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("saved", [["lm_head"], ["wte"], ["wte", "lm_head"]])
def test_what_peft_untied_comes_back_untied(saved: list[str], tmp_path: Path) -> None:
    """Its modules_to_save are copies: what trains in one isn't the other's."""
    stock = theirs("gpt2", modules_to_save=saved)
    stock.save_pretrained(tmp_path / "theirs")
    model = tiny.gpt2()
    load_adapter(model, tmp_path / "theirs")
    torch.testing.assert_close(outputs(model), outputs(stock), atol=1e-5, rtol=1e-5)
    trained = {n for n, p in model.named_parameters() if p.requires_grad} - injected_names(model)
    assert trained == {f"{'transformer.' * (name == 'wte')}{name}.weight" for name in saved}
    LoRA(2, 6, target_modules=CASES["gpt2"][2]["target_modules"], modules_to_save=saved).inject(model)  # it trains on
    save_adapter(shaken(model), tmp_path / "ours")
    fresh = tiny.gpt2()
    load_adapter(fresh, tmp_path / "ours")
    assert torch.equal(outputs(fresh), outputs(model))

    bare, base = tiny.gpt2(), outputs(tiny.gpt2())
    bank = AdapterBank(bare)
    bank.load("theirs", tmp_path / "theirs")
    bank.use("theirs")
    torch.testing.assert_close(outputs(bare), outputs(stock), atol=1e-5, rtol=1e-5)
    bank.close()
    assert torch.equal(outputs(bare), base)
    assert bare.lm_head.weight is bare.transformer.wte.weight

    config = config_of(tmp_path / "theirs") | {"r": 3}  # which its tensors aren't
    (tmp_path / "theirs" / CONFIG).write_text(json.dumps(config))
    refused(bare, tmp_path / "theirs", StateError, "has shape")
    assert bare.lm_head.weight is bare.transformer.wte.weight


def test_a_buffer_with_a_second_name_travels(tmp_path: Path) -> None:
    class Aliased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
            self.norm = self.net[1]

    model, fresh = Aliased(), Aliased()
    LoRA(r=2, target_modules=["0"], modules_to_save=["1"], backbone="net").inject(model)
    model.net(torch.randn(8, 4))
    save_adapter(shaken(model), tmp_path, backbone="net")
    load_adapter(fresh, tmp_path, backbone="net")
    x = torch.randn(2, 4)
    assert torch.equal(fresh.eval().net(x), model.eval().net(x))
    assert fresh.norm is fresh.net[1]


def test_an_adapter_in_half_precision_loads_in_fp32(tmp_path: Path) -> None:
    model = ours("bert classifier")
    save_adapter(model, tmp_path)
    half = {key: value.half() for key, value in load_file(tmp_path / WEIGHTS).items()}
    save_file(half, tmp_path / WEIGHTS)
    fresh = tiny.bert_classifier()
    load_adapter(fresh, tmp_path)
    assert {p.dtype for p in fresh.parameters()} == {torch.float32}
    torch.testing.assert_close(outputs(fresh), outputs(model), atol=1e-2, rtol=1e-2)


# ------------------------------------------------------------------------------------- LightningModules


def built(kind: type[Classifier]) -> Any:
    module = make(kind)
    module.setup("fit")
    return module


def test_a_head_outside_the_hugging_face_model_travels_too(tmp_path: Path) -> None:
    module = built(TrunkInSetup)
    LoRA(r=2).inject(module)
    shaken(module).eval()
    save_adapter(module, tmp_path)
    assert {key for key in load_file(tmp_path / WEIGHTS) if not key.startswith("base_model.model.encoder.")} == {
        "lightning_module.head.weight",
        "lightning_module.head.bias",
    }

    fresh = built(TrunkInSetup).eval()
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh.outputs(tiny.TOKENS), module.outputs(tiny.TOKENS))

    stock = peft.PeftModel.from_pretrained(built(TrunkInSetup).trunk, tmp_path)
    torch.testing.assert_close(outputs(stock), outputs(module.trunk), atol=1e-5, rtol=1e-5)


def test_an_adapter_moves_between_a_module_and_the_model_inside_it(tmp_path: Path) -> None:
    module = make(BertInInit)
    LoRA(r=2, target_modules=["key"]).inject(module)
    shaken(module)
    save_adapter(module, tmp_path / "of module")
    save_adapter(module.model, tmp_path / "of model")
    one, other = (load_file(tmp_path / x / WEIGHTS) for x in ("of module", "of model"))
    assert set(one) == set(other)
    bare = make(BertInInit).model
    load_adapter(bare, tmp_path / "of module")
    assert torch.equal(outputs(bare), outputs(module.model))


def test_a_path_is_not_taken_for_the_end_of_another(tmp_path: Path) -> None:
    def net() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))

    model = net()
    assert LoRA(r=2, target_modules="0", backbone=".").inject(model) == ["0"]
    shaken(model)
    save_adapter(model, tmp_path, backbone=".")
    fresh = net()
    load_adapter(fresh, tmp_path, backbone=".")
    x = torch.randn(2, 4)
    assert torch.equal(fresh(x), model(x))
    assert [name for name, _ in injected_modules(fresh)] == ["0"]


def test_a_tied_models_full_fine_tune_is_saved_once_and_loads(tmp_path: Path) -> None:
    model = tiny.gpt2()
    FullFineTuning().inject(model)
    shaken(model)
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    assert sum(value.numel() for value in tensors.values()) == sum(p.numel() for p in model.parameters())
    fresh = tiny.gpt2()
    load_adapter(fresh, tmp_path)
    assert torch.equal(outputs(fresh), outputs(model))
    assert fresh.lm_head.weight is fresh.transformer.wte.weight


# --------------------------------------------------------------------------------------- what is refused


def snapshot(model: nn.Module) -> list[Any]:
    return [
        [(name, type(m)) for name, m in model.named_modules()],
        [(name, p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()],
    ]


def refused(model: nn.Module, folder: Path, error: type[Exception], *says: str) -> None:
    """The error says so, and the model is as it was."""
    names, parameters = snapshot(model)
    with pytest.raises(error) as raised:
        load_adapter(model, folder)
    for part in says:
        assert part in str(raised.value), str(raised.value)
    names_now, parameters_now = snapshot(model)
    assert names_now == names
    for (name, trains, value), (name_now, trains_now, value_now) in zip(parameters, parameters_now, strict=True):
        assert (name, trains) == (name_now, trains_now)
        assert torch.equal(value, value_now), name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_adapter(ours("bert classifier"), tmp_path / "adapter")


@pytest.mark.parametrize(
    ("variant", "named"),
    [
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa_niter_2"}, "init_lora_weights=pissa_niter_2"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    ],
)
@pytest.mark.filterwarnings("ignore:aLoRA is currently only supported for CAUSAL_LM")
@pytest.mark.filterwarnings("ignore:.*LoRA tensor.* have invalid shape")  # PEFT's, on its own lora_bias
def test_other_kinds_of_lora_are_refused_by_name(variant: dict[str, Any], named: str, tmp_path: Path) -> None:
    theirs("bert classifier", **variant).save_pretrained(tmp_path)
    refused(tiny.bert_classifier(), tmp_path, ValueError, "LoRA adapter uses", named, "can't load")


def test_an_init_that_is_not_known_is_refused(folder: Path) -> None:
    (folder / CONFIG).write_text(json.dumps(config_of(folder) | {"init_lora_weights": "new"}))
    refused(tiny.bert_classifier(), folder, ValueError, "LoRA adapter uses init_lora_weights=new", "can't load")


def test_another_method_is_refused_by_name(tmp_path: Path) -> None:
    config = peft.VeraConfig(target_modules=["key"])
    peft.get_peft_model(tiny.bert_classifier(), config).save_pretrained(tmp_path)
    refused(tiny.bert_classifier(), tmp_path, ValueError, str(tmp_path), "VERA", "known here are LORA")


def test_a_missing_folder_or_file_is_named(folder: Path, tmp_path: Path) -> None:
    model = tiny.bert_classifier()
    refused(model, tmp_path / "none", FileNotFoundError, "There is no folder '", "none'")
    (folder / WEIGHTS).unlink()
    refused(model, folder, FileNotFoundError, f"holds no {WEIGHTS} (it holds: README.md, adapter_config.json)")
    torch.save({}, folder / "adapter_model.bin")
    refused(model, folder, FileNotFoundError, f"holds no {WEIGHTS}", "is a pickle, which can run code")
    (folder / CONFIG).unlink()
    refused(model, folder, FileNotFoundError, f"holds no {CONFIG}")


@pytest.mark.parametrize("kept", [0, 200, -1])
def test_a_damaged_file_of_tensors_is_named(kept: int, folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:kept])
    refused(tiny.bert_classifier(), folder, StateError, WEIGHTS, "is damaged or incomplete")


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b"\xff\xfe{}"])
def test_an_invalid_config_is_named(content: bytes, folder: Path) -> None:
    (folder / CONFIG).write_bytes(content)
    refused(tiny.bert_classifier(), folder, StateError, CONFIG, "isn't a valid JSON object")


def test_another_size_of_head_is_refused(folder: Path) -> None:
    for method in (LoRA(r=2, target_modules=["query"]), HeadOnly()):
        module = make(BertInInit)
        method.inject(module)
        save_adapter(module, folder)
        says = ["model.classifier.", "has shape (3", "the model's (5", "number of labels"]
        refused(tiny.bert_classifier(num_labels=5), folder, StateError, *says)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (tiny.gpt2, "it was made for another model"),
        (tiny.bert, "it was made for another model"),
        (lambda: tiny.bert_classifier(num_hidden_layers=1), "encoder.layer.1"),
        (lambda: tiny.bert_classifier(hidden_size=32), "has shape (2, 16), the model's (2, 32)"),
    ],
)
def test_another_architecture_is_refused(build: Callable[[], Any], says: str, folder: Path) -> None:
    refused(build(), folder, StateError, str(folder), says)


def test_another_architectures_head_is_refused(tmp_path: Path) -> None:
    head = tiny.distilbert_classifier()
    HeadOnly().inject(head)
    save_adapter(head, tmp_path)
    refused(tiny.bert_classifier(), tmp_path, StateError, "pre_classifier", "another model or head")


@pytest.mark.parametrize("lost", ["layer.0.attention.self.query.lora_A.weight", "lora_B.weight"])
def test_incomplete_tensors_are_refused(lost: str, folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    kept = {key: value for key, value in tensors.items() if not key.endswith(lost)}
    assert 0 < len(kept) < len(tensors)
    save_file(kept, folder / WEIGHTS)
    refused(tiny.bert_classifier(), folder, StateError, str(folder), "is incomplete", lost)


def test_a_folder_without_adapter_tensors_is_refused(folder: Path) -> None:
    save_file({"base_model.model.classifier.bias": torch.zeros(3)}, folder / WEIGHTS)
    refused(tiny.bert_classifier(), folder, StateError, "adapts no module")


def test_a_config_that_contradicts_its_tensors_is_refused(folder: Path) -> None:
    (folder / CONFIG).write_text(json.dumps({**config_of(folder), "r": 4}))
    refused(tiny.bert_classifier(), folder, StateError, "has shape (2, 16), the model's (4, 16)")


def test_what_is_already_injected_stays_and_takes_values_only_from_its_like(folder: Path, tmp_path: Path) -> None:
    model, other = ours("bert classifier"), tiny.bert_classifier()
    LoRA(r=3, target_modules=["query", "value"]).inject(other)
    save_adapter(other, tmp_path / "r3")
    refused(model, tmp_path / "r3", InjectionError, "already carries", "r=3")
    save_adapter(shaken(model), tmp_path / "like")
    wanted = outputs(model)
    load_adapter(model, folder)
    assert not torch.allclose(outputs(model), wanted, atol=1e-3)
    load_adapter(model, tmp_path / "like")
    assert torch.equal(outputs(model), wanted)


def test_saving_needs_something_trained(tmp_path: Path) -> None:
    model = tiny.gpt2().requires_grad_(False)
    with pytest.raises(InjectionError, match="nothing to save"):
        save_adapter(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_saving_again_replaces_what_is_there(folder: Path) -> None:
    shutil.copytree(folder, folder.parent / "copy")
    model = ours("gpt2")
    save_adapter(model, folder)
    fresh = tiny.gpt2()
    load_adapter(fresh, folder)
    assert torch.equal(outputs(fresh), outputs(model))
