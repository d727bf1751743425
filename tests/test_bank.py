"""AdapterBank: each row, and each switch, answers as the adapter that is loaded alone."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from foreign import CNN, GPT2, MODULES, BertInInit, Classifier, TorchTransformer, TrunkInSetup, make
from torch import Tensor, nn

import lightning_ft
from lightning_ft import (
    IA3,
    AdaLoRA,
    Adapter,
    AdapterBank,
    BitFit,
    FullFineTuning,
    HeadOnly,
    InjectionError,
    LoRA,
    PromptTuning,
    load_adapter,
    save_adapter,
)
from lightning_ft.bank import Banked
from lightning_ft.callbacks.finetuning import FineTuning
from lightning_ft.files.state import StateError
from lightning_ft.injection import injected_modules

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ROWS = 12
TOKENS = torch.randint(1, 50, (ROWS, 7), generator=torch.Generator().manual_seed(2))

ALIKE: dict[str, FineTuning] = {
    "ann": LoRA(r=2, target_modules="all-linear"),
    "ben": LoRA(r=3, alpha=5, rank_pattern={"query": 1}),
    "cid": LoRA(r=2, use_rslora=True, target_modules=["intermediate.dense", "query"]),
}
DORA = {"ann": LoRA(r=2, use_dora=True, target_modules="all-linear"), "ben": LoRA(r=3, use_dora=True)}
IA3S = {"ann": IA3(), "ben": IA3(["key", "output.dense"], ["output.dense"])}
MIXED: dict[str, FineTuning] = {
    **ALIKE,
    "dan": LoRA(r=2, use_dora=True),
    "eva": IA3(modules_to_save=["pooler"]),
    "fay": LoRA(r=2, bias="lora_only", init_lora_weights="pissa"),
    "gus": LoRA(r=2, target_modules=["word_embeddings", "query"], modules_to_save=["pooler", "LayerNorm"]),
    "hal": HeadOnly(),
    "ida": AdaLoRA(target_modules=["query"]),
    "jon": BitFit(),
    "kim": Adapter(),
}


def saved(folder: Path, methods: dict[str, FineTuning], build: Callable[[], Any], backbone: str | None = None) -> None:
    """A folder for each method, as after training."""
    for seed, (name, method) in enumerate(methods.items()):
        model = build()
        method.inject(model)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        save_adapter(model, folder / name, backbone)


def banked(folder: Path, methods: dict[str, FineTuning], build: Callable[[], Any]) -> tuple[Any, AdapterBank]:
    saved(folder, methods, build)
    model = build()
    bank = AdapterBank(model)
    for name in methods:
        bank.load(name, folder / name)
    return model, bank


def alone(folder: Path, name: str | None, build: Callable[[], Any]) -> Any:
    model = build()
    if name is not None:
        load_adapter(model, folder / name)
    return model


def decoded(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens, decoder_input_ids=tokens).logits


# ------------------------------------------------------------------------------------------------ the laws


@pytest.mark.parametrize("methods", [ALIKE, DORA, IA3S, MIXED], ids=["lora", "dora", "ia3", "mixed"])
def test_switching_is_loading_and_each_row_is_as_it_would_be_alone(
    methods: dict[str, FineTuning], tmp_path: Path
) -> None:
    model, bank = banked(tmp_path, methods, tiny.bert_classifier)
    wanted = {name: tiny.logits(alone(tmp_path, name, tiny.bert_classifier), TOKENS) for name in [None, *methods]}
    for name in [*methods, None]:
        bank.use(name)
        assert torch.equal(tiny.logits(model, TOKENS), wanted[name])
        assert name is None or not torch.allclose(wanted[name], wanted[None], atol=1e-2)
    names = ([*methods, None] * ROWS)[:ROWS]
    for order in (torch.arange(ROWS), torch.randperm(ROWS)):
        rows = [names[i] for i in order]
        with bank.rows(rows):
            for _ in range(2):
                out = tiny.logits(model, TOKENS[order])
        each = [wanted[name][i] for i, name in zip(order, rows, strict=True)]
        torch.testing.assert_close(out, torch.stack(each), atol=1e-5, rtol=1e-5)
    assert torch.equal(tiny.logits(model, TOKENS), wanted[None]), "after the block"
    with bank.rows(["ann"] * ROWS):
        assert torch.equal(tiny.logits(model, TOKENS), wanted["ann"])


@pytest.mark.parametrize("kind", [TrunkInSetup, CNN, GPT2, TorchTransformer])
def test_rows_of_any_module_are_as_they_would_be_alone(kind: type[Classifier], tmp_path: Path) -> None:
    settings = MODULES[kind]
    backbone = settings.get("backbone")

    def build() -> Any:
        module = make(kind)
        module.setup("predict")
        module.configure_model()
        return module.eval()

    saved(tmp_path, {"a": LoRA(r=2, **settings), "b": LoRA(r=1, alpha=7, **settings)}, build, backbone)
    module = build()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    bank = AdapterBank(module, backbone)
    wanted = {None: module.outputs(module.example())}
    for name in ("a", "b"):
        bank.load(name, tmp_path / name)
        other = build()
        load_adapter(other, tmp_path / name, backbone)
        wanted[name] = other.outputs(other.example())
    names = ["b", None, "a", "b", "a"]
    with bank.rows(names):
        out = module.outputs(module.example())
    torch.testing.assert_close(out, torch.stack([wanted[n][i] for i, n in enumerate(names)]), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


class Scaled(nn.Linear):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return scale * super().forward(x)


class ByName(nn.Module):
    """A caller that names its arguments, in an order of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.fc = Scaled(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(scale=2.0, x=x)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (LoRA, {"r": 2}),
        (LoRA, {"r": 2, "use_dora": True}),
        (AdaLoRA, {}),
        (IA3, {"feedforward_modules": []}),
        (IA3, {"feedforward_modules": ["fc"]}),
        (Adapter, {"placement": "parallel"}),
    ],
)
def test_arguments_may_be_named_and_more_than_one(kind: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    method = kind(target_modules=["fc"], backbone=".", **settings)
    saved(tmp_path, {"ann": method, "ben": method}, ByName, ".")
    model, x = ByName(), torch.randn(2, 4)
    bank = AdapterBank(model, ".")
    rows = []
    for i, name in enumerate(("ann", "ben")):
        bank.load(name, tmp_path / name)
        one = ByName()
        load_adapter(one, tmp_path / name, ".")
        assert torch.equal(one(x), one.fc(x, 2.0))
        rows.append(one(x)[i])
    with bank.rows(["ann", "ben"]):
        torch.testing.assert_close(model(x), torch.stack(rows))


def test_an_encoder_and_its_decoder_have_the_same_rows(tmp_path: Path) -> None:
    methods = {"ann": LoRA(r=2), "ben": LoRA(r=2, target_modules=["q", "wo"]), "cid": IA3()}
    model, bank = banked(tmp_path, methods, tiny.t5)
    names = [*methods, None]
    with bank.rows(names):
        out = decoded(model, TOKENS[:4])
    for i, name in enumerate(names):
        torch.testing.assert_close(out[i], decoded(alone(tmp_path, name, tiny.t5), TOKENS[:4])[i], atol=1e-5, rtol=1e-5)


class Full(nn.Linear):
    """Computes in its own dtype, whatever autocast says, and lays its output out in an order of its own."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x).mT.contiguous().mT


class InFull(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.fc = Full(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16], ids=["autocast", "all in bf16"])
@pytest.mark.parametrize("methods", [ALIKE, DORA], ids=["lora", "dora"])
def test_rows_in_bf16_are_those_of_fp32_but_for_rounding(
    methods: dict[str, FineTuning], model_dtype: torch.dtype, tmp_path: Path
) -> None:
    model, bank = banked(tmp_path, methods, tiny.bert_classifier)
    names = ([*methods, None] * ROWS)[: ROWS // 2]
    with bank.rows(names, beams=2):
        wanted = tiny.logits(model, TOKENS)
    model.to(model_dtype)
    with bank.rows(names, beams=2), torch.autocast("cpu", torch.bfloat16, enabled=model_dtype == torch.float32):
        out = tiny.logits(model, TOKENS)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), wanted, atol=3e-2, rtol=3e-2)


def test_rows_of_a_layer_that_autocast_leaves_in_fp32_stay_in_fp32(tmp_path: Path) -> None:
    method = LoRA(r=2, target_modules=["fc"], backbone=".")
    saved(tmp_path, {"ann": method, "ben": method}, InFull, ".")
    model, x = InFull(), torch.randn(2, 3, 4)
    bank = AdapterBank(model, ".")
    for name in ("ann", "ben"):
        bank.load(name, tmp_path / name)
    with bank.rows(["ann", "ben"]):
        wanted = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, wanted, atol=2e-2, rtol=2e-2)


def test_stock_pefts_adapters_answer_a_mixed_batch_as_peft_does(tmp_path: Path) -> None:
    def config(r: int, *targets: str) -> Any:
        return peft.LoraConfig(r=r, target_modules=list(targets), task_type="SEQ_CLS", init_lora_weights=False)

    theirs = peft.get_peft_model(tiny.bert_classifier(), config(2, "query", "value"), adapter_name="ann")
    theirs.add_adapter("ben", config(3, "query", "output.dense"))
    for name, parameter in theirs.named_parameters():
        if "modules_to_save" in name:
            nn.init.normal_(parameter)
    theirs.save_pretrained(tmp_path)
    model = tiny.bert_classifier()
    bank = AdapterBank(model)
    for name in ("ann", "ben"):
        bank.load(name, tmp_path / name)
    names = ["ben", "ann", None, "ann", "ben", "ben", None, "ann", "ben", "ann", "ben", None]
    with bank.rows(names), torch.no_grad():
        ours = tiny.logits(model, TOKENS)
        stock = theirs.eval()(input_ids=TOKENS, adapter_names=[name or "__base__" for name in names]).logits
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("build", "how"),
    [(tiny.gpt2, {}), (tiny.t5, {"num_beams": 2}), (tiny.t5, {"num_beams": 2, "num_return_sequences": 2})],
)
def test_generate_gives_each_row_its_own_text(build: Callable[[], Any], how: dict[str, Any], tmp_path: Path) -> None:
    targets = ["c_attn", "c_proj"] if build is tiny.gpt2 else ["q", "v", "wo"]
    methods = {name: LoRA(r=2, alpha=30, target_modules=targets) for name in ("ann", "ben")}
    model, bank = banked(tmp_path, methods, build)
    tokens, names, copies = TOKENS[:3, :4], ["ben", None, "ann"], how.get("num_return_sequences", 1)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **how}
    texts = {}
    for name in names:
        bank.use(name)
        texts[name] = model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)
    with bank.rows(names, beams=how.get("num_beams", 1)):
        mixed = model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)
    wanted = [texts[name].unflatten(0, (3, copies))[i] for i, name in enumerate(names)]
    assert torch.equal(mixed, torch.cat(wanted))
    assert not torch.equal(texts["ann"], texts[None])


# ---------------------------------------------------------------------------------------- without a trace


def tree(model: nn.Module) -> list[Any]:
    return [(name, type(module), set(vars(module))) for name, module in model.named_modules()]


def test_closing_leaves_no_trace_and_the_base_is_never_touched(tmp_path: Path) -> None:
    original, model = tiny.bert_classifier(), tiny.bert_classifier()
    model.bert.pooler.requires_grad_(False)
    trains, objects = [p.requires_grad for p in model.parameters()], list(model.parameters())
    saved(tmp_path, MIXED, tiny.bert_classifier)
    bank = AdapterBank(model)

    def check() -> None:
        assert list(model.state_dict()) == list(original.state_dict())
        assert all(torch.equal(value, original.state_dict()[key]) for key, value in model.state_dict().items())
        assert [p.requires_grad for p in model.parameters()] == trains
        assert all(one is two for one, two in zip(model.parameters(), objects, strict=True))

    for name in MIXED:
        bank.load(name, tmp_path / name)
        check()
    with bank.rows([*MIXED, None]):
        tiny.logits(model, TOKENS)
    check()
    bank.remove("gus")
    assert type(model.bert.embeddings.word_embeddings) is nn.Embedding, "none but gus changed it"
    assert isinstance(model.classifier, Banked)
    bank.use("ann")
    bank.close()
    check()
    assert tree(model) == tree(original)
    assert torch.equal(tiny.logits(model), tiny.logits(original))


def test_names_tell_what_is_in_it(tmp_path: Path) -> None:
    model, bank = banked(tmp_path, ALIKE, tiny.bert_classifier)
    assert (bank.names, len(bank), "ben" in bank, "dan" in bank) == ([*ALIKE], 3, True, False)
    assert "bank=(ann, ben, cid)" in repr(model.bert.encoder.layer[0].attention.self.query)
    bank.remove("ben")
    assert (bank.names, len(bank), "ben" in bank) == (["ann", "cid"], 2, False)


def test_an_adapter_costs_its_own_tensors_and_no_more(tmp_path: Path) -> None:
    model, bank = banked(tmp_path, {"gus": MIXED["gus"]}, tiny.bert_classifier)
    base = {p.data_ptr() for p in model.parameters()}
    own = [p for m in bank._adapter("gus").values() for p in m.parameters() if p.data_ptr() not in base]
    other = tiny.bert_classifier()
    MIXED["gus"].inject(other)
    assert sum(p.numel() for p in own) == sum(p.numel() for p in other.parameters() if p.requires_grad)


def test_torchs_fused_path_is_left_while_it_is_open(tmp_path: Path) -> None:
    method = LoRA(r=2, backbone="encoder", target_modules=["linear1"])
    saved(tmp_path, {"ann": method}, lambda: make(TorchTransformer), "encoder")
    module = make(TorchTransformer).eval()
    with torch.no_grad():
        before = module.outputs(module.example())
        bank = AdapterBank(module, "encoder")
        bank.load("ann", tmp_path / "ann")
        bank.use("ann")
        assert not torch.allclose(module.outputs(module.example()), before, atol=1e-3)
        bank.close()
        assert tree(module) == tree(make(TorchTransformer))
        assert torch.equal(module.outputs(module.example()), before)


def test_a_change_of_dtype_and_copies_take_the_adapters_with_them(tmp_path: Path) -> None:
    model, bank = banked(tmp_path, MIXED, tiny.bert_classifier)
    bank.use("gus")
    wanted = tiny.logits(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        bank.use("gus")
        assert torch.equal(tiny.logits(again), wanted)
        bank.use(None)
        assert torch.equal(tiny.logits(again), wanted), "a copy is its own"
    model.bfloat16()
    with bank.rows([*MIXED, None]):
        assert tiny.logits(model, TOKENS).dtype == torch.bfloat16
    adapters = [bank._adapter(name) for name in MIXED]
    added = {p.dtype for a in adapters for _, m in a.items() for n, p in m.named_parameters() if n.startswith("lora")}
    assert added == {torch.float32}


def test_threads_have_rows_of_their_own(tmp_path: Path) -> None:
    model, bank = banked(tmp_path, ALIKE, tiny.bert_classifier)
    bank.use("cid")
    found: dict[str, list[Tensor]] = {name: [] for name in ("ann", "ben", "cid")}
    together = threading.Barrier(3)

    def answer(name: str) -> None:
        together.wait()
        for _ in range(5):
            if name == "cid":  # in no block: whichever is in use
                found[name].append(tiny.logits(model, TOKENS))
            else:
                with bank.rows([name] * ROWS):
                    found[name].append(tiny.logits(model, TOKENS))

    threads = [threading.Thread(target=answer, args=(name,)) for name in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, outs in found.items():
        wanted = tiny.logits(alone(tmp_path, name, tiny.bert_classifier), TOKENS)
        assert len(outs) == 5
        assert all(torch.equal(out, wanted) for out in outs)


# ------------------------------------------------------------------------------------------- what is refused


def test_what_a_bank_refuses_changes_nothing(tmp_path: Path) -> None:
    model, bank = banked(tmp_path, ALIKE, tiny.bert_classifier)
    bank.use("ann")
    wanted, state = tiny.logits(model), tree(model)
    saved(tmp_path, {"labels": LoRA(r=2)}, lambda: tiny.bert_classifier(num_labels=5))
    saved(tmp_path, {"gpt2": LoRA(r=2)}, tiny.gpt2)
    for name, error, message in (
        ("labels", StateError, r"classifier.* has shape .5,.*, the model's .3,.*its number of labels"),
        ("gpt2", StateError, "was made for another model"),
        ("nothing", FileNotFoundError, "There is no folder"),
    ):
        with pytest.raises(error, match=message):
            bank.load(name, tmp_path / name)
        assert name not in bank
    for refused, message in (
        (lambda: bank.load("ann", tmp_path / "ann"), "already holds an adapter 'ann'"),
        (lambda: bank.use("anna"), "holds no adapter 'anna'. Near: ann"),
        (lambda: bank.remove("zoe"), "holds no adapter 'zoe'. Near: ann, ben, cid"),
        (lambda: bank.rows(["ann", "bex"]).__enter__(), "holds no adapter 'bex'. Near: ben"),
        (lambda: bank.remove("ann"), "'ann' is in use"),
        (lambda: AdapterBank(model), "carries BANK, and a bank needs the bare base"),
        (lambda: lightning_ft.merge(model), r"bank.close\(\) first"),
        (lambda: save_adapter(model, tmp_path / "x"), "carries BANK, which has no format in files"),
        (lambda: LoRA(r=2).inject(model), "already carries BANK"),
    ):
        with pytest.raises(InjectionError, match=message):
            refused()  # type: ignore[no-untyped-call]
    assert tree(model) == state
    assert torch.equal(tiny.logits(model), wanted)


@pytest.mark.parametrize(("names", "beams"), [(2, 1), (13, 1), (3, 2)])
def test_rows_must_be_as_many_as_the_batch_has(names: int, beams: int, tmp_path: Path) -> None:
    model, bank = banked(tmp_path, ALIKE, tiny.bert_classifier)
    with bank.rows(["ann"] * names, beams), pytest.raises(InjectionError, match=rf"got {ROWS} rows.* {names} names"):
        tiny.logits(model, TOKENS)
    bank.use(None)
    assert torch.equal(tiny.logits(model), tiny.logits(tiny.bert_classifier())), "the block is over"


class Recurrent(Classifier):
    """With a head whose output is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 4))
        self.head = nn.GRU(4, 3, batch_first=True)

    def outputs(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x)[:, None])[0]


def test_rows_of_outputs_that_cannot_be_put_together_are_refused(tmp_path: Path) -> None:
    method = HeadOnly(backbone="encoder")
    saved(tmp_path, {"ann": method, "ben": method}, lambda: make(Recurrent), "encoder")
    module, x = make(Recurrent), torch.randn(2, 8)
    bank = AdapterBank(module, "encoder")
    for name in ("ann", "ben"):
        bank.load(name, tmp_path / name)
    with bank.rows(["ann", "ben"]), pytest.raises(InjectionError, match=r"returns a tuple.*Use bank\.use\(\)"):
        module.outputs(x)
    other = make(Recurrent)
    load_adapter(other, tmp_path / "ben", "encoder")
    bank.use("ben")
    assert torch.equal(module.outputs(x), other.outputs(x))


def test_a_model_that_carries_a_method_is_not_a_bare_base(tmp_path: Path) -> None:
    module = make(BertInInit)
    LoRA(r=2).inject(module)
    with pytest.raises(InjectionError, match="carries LORA, and a bank needs the bare base"):
        AdapterBank(module)
    lightning_ft.merge(module)
    bank = AdapterBank(module)
    LoRA(r=2).inject(module)
    with pytest.raises(InjectionError, match="carries LORA"):
        bank.load("ann", tmp_path)


def test_what_changes_more_than_single_layers_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, {"ann": FullFineTuning(backbone="encoder")}, lambda: make(TorchTransformer), "encoder")
    module = make(TorchTransformer)
    with pytest.raises(InjectionError, match=r"'encoder\.layers\.0\.self_attn', which has modules inside"):
        AdapterBank(module, "encoder").load("ann", tmp_path / "ann")
    assert tree(module) == tree(make(TorchTransformer))
    assert not [name for name, _ in injected_modules(module)]
    saved(tmp_path, {"ben": PromptTuning(2)}, tiny.bert_classifier)
    with pytest.raises(InjectionError, match="changes 'bert', which has modules inside"):
        AdapterBank(tiny.bert_classifier()).load("ben", tmp_path / "ben")
