from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from foreign import BertInInit, TorchTransformer, make, trainer
from reference.prefix import attention, projected
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask

import lightning_ft
from lightning_ft import InjectionError, LoRA, PrefixTuning, PromptTuning, load_adapter, save_adapter
from lightning_ft.injection import injected_names

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

N, LAYERS = 3, 2
# With weights this large attention is no mean over all tokens: who attends to what shows.
SHARP = {"initializer_range": 0.4}
TEXTS = [[5, 6, 7, 8, 9], [3, 4], [20]]

MODELS: dict[str, Callable[..., Any]] = {
    "bert": partial(tiny.bert_classifier, **SHARP),
    "roberta": partial(tiny.roberta, **SHARP),
    "electra": partial(tiny.electra, **SHARP),
    "gpt2": partial(tiny.gpt2, n_positions=32, **SHARP),
    "llama": partial(tiny.llama_lm, **SHARP),
    "gpt_neox": partial(tiny.gpt_neox, **SHARP),
    "opt": tiny.opt,
    "mistral": partial(tiny.mistral_lm, **SHARP),
    "gemma3": partial(tiny.gemma3_lm, **SHARP),
}
ALONE = list(MODELS)
MODELS |= {"t5": partial(tiny.t5, num_layers=3, dropout_rate=0.0), "bart": tiny.bart}
GENERATORS = ["gpt2", "llama", "opt", "gemma3", "t5", "bart"]
each_generator = pytest.mark.parametrize("name", GENERATORS)
each_attention = pytest.mark.parametrize("kind", ["sdpa", "eager"])


def prefix_of(model: Any) -> nn.Parameter:
    return next(p for name, p in model.named_parameters() if name.endswith("prefix_embeddings"))


def with_prefix(model: Any, **settings: Any) -> Any:
    PrefixTuning(N, **settings).inject(model)
    return model.eval()


def padded(side: str) -> tuple[Tensor, Tensor]:
    """The texts as a batch, and its mask."""
    ids, mask = torch.zeros(2, len(TEXTS), max(map(len, TEXTS)), dtype=torch.long)
    for row, text in enumerate(TEXTS):
        place = slice(0, len(text)) if side == "right" else slice(-len(text), None)
        ids[row, place] = torch.tensor(text)
        mask[row, place] = 1
    return ids, mask


def close(ours: Any, theirs: Any, **more: Any) -> None:
    torch.testing.assert_close(ours, theirs, **{"atol": 1e-5, "rtol": 1e-5, **more})


# ----------------------------------------------------------------------------------------------- the maths


@each_attention
@pytest.mark.parametrize("name", ["bert", "gpt2"])
@torch.no_grad()
def test_attention_is_that_of_the_paper(name: str, kind: str) -> None:
    model = with_prefix(MODELS[name](attn_implementation=kind))
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    kinds = {"bert": "BertSelfAttention", "gpt2": "GPT2Attention"}
    attentions = [module for module in model.modules() if type(module).__name__ == kinds[name]]
    for module in attentions:
        module.register_forward_hook(lambda module, x, out: seen.__setitem__(module.layer_idx, (x[0][0], out[0][0])))
    model(input_ids=torch.tensor(TEXTS[:1]))
    assert len(seen) == LAYERS
    p = prefix_of(model).view(N, LAYERS, 2, 2, 8)  # of two heads, 8 wide
    for layer, module in enumerate(attentions):
        x, out = seen[layer]
        if name == "bert":
            q, k, v = (project(x) for project in (module.query, module.key, module.value))
        else:
            q, k, v = module.c_attn(x).split(16, dim=1)
        heads = [
            attention(
                *(y[:, 8 * h : 8 * h + 8] for y in (q, k, v)), *p[:, layer, :, h].unbind(1), causal=name == "gpt2"
            )
            for h in (0, 1)
        ]
        expected = torch.cat(heads, dim=1)
        close(out, expected if name == "bert" else module.c_proj(expected))


def test_the_projection_is_that_of_the_paper_and_of_peft() -> None:
    model = tiny.bert(**SHARP)
    PrefixTuning(N, prefix_projection=True, encoder_hidden_size=5).inject(model)
    sizes = {"num_virtual_tokens": N, "token_dim": 16, "num_layers": LAYERS, "encoder_hidden_size": 5}
    stock = peft.PrefixEncoder(peft.PrefixTuningConfig(prefix_projection=True, **sizes))
    mine = [model.prefix_inputs, *(p for i in (0, 1) for p in mlp_of(model, i))]
    for ours, theirs in zip(mine, stock.parameters(), strict=True):
        theirs.data.copy_(ours)
    assert len(mine) == len(injected_names(model))
    e, w1, b1, w2, b2 = mine
    expected = projected(e, [w1, w2], [b1, b2])
    close(torch.cat([model.flat_prefix(layer) for layer in range(LAYERS)], dim=1), expected)
    close(stock(torch.arange(N)), expected)
    cotangent = torch.randn_like(expected)
    flat = torch.cat([model.flat_prefix(layer) for layer in range(LAYERS)], dim=1)
    close(torch.autograd.grad((flat * cotangent).sum(), mine), torch.autograd.grad((expected * cotangent).sum(), mine))


def mlp_of(model: Any, i: int) -> tuple[Tensor, Tensor]:
    return model.get_parameter(f"prefix_mlp_{i}_weight"), model.get_parameter(f"prefix_mlp_{i}_bias")


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "sdpa") for name in ALONE), ("bert", "eager"), ("gpt2", "eager"), ("llama", "eager")]
)
@torch.no_grad()
def test_each_row_of_a_batch_is_what_its_text_gives_alone(name: str, kind: str) -> None:
    model = with_prefix(MODELS[name](attn_implementation=kind)).base_model
    bare = MODELS[name](attn_implementation=kind).base_model
    for ids, mask in (padded("right"), padded("left")):
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state
        for row, text in enumerate(TEXTS):
            alone = model(torch.tensor([text])).last_hidden_state[0]
            close(states[row][mask[row].bool()], alone)
            assert not torch.allclose(bare(torch.tensor([text])).last_hidden_state[0], alone, atol=1e-2)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
@torch.no_grad()
def test_all_outputs_are_the_models_own(name: str) -> None:
    model, bare = (MODELS[name](attn_implementation="eager").base_model for _ in "ab")
    with_prefix(model)
    ask = {"output_hidden_states": True, "output_attentions": True}
    ids = torch.tensor(TEXTS[:1])
    out, whole = model(ids, **ask), bare(ids, **ask)
    assert type(out) is type(whole)
    assert list(out) == list(whole)
    close(out.to_tuple()[0], out.hidden_states[-1])
    for ours, theirs in zip(out.attentions, whole.attentions, strict=True):
        assert ours.shape == theirs.shape
        assert (ours.sum(-1) < 1).all()  # the rest went to the prefix
    close(model(inputs_embeds=bare.get_input_embeddings()(ids)).last_hidden_state, out.last_hidden_state)
    assert type(model(ids, return_dict=False)) is tuple
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()


# ---------------------------------------------------------------------------------------------- generation


def generate(model: Any, ids: Tensor, mask: Tensor | None = None, **more: Any) -> Tensor:
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model.generate(ids, attention_mask=mask, max_new_tokens=6, **{"do_sample": False, **more})


def greedy(model: Any, text: list[int]) -> list[int]:
    """Six tokens, each the likeliest, by hand."""
    made: list[int] = []
    for _ in range(6):
        if model.config.is_encoder_decoder:
            start = [model.config.decoder_start_token_id, *made]
            out = model(input_ids=torch.tensor([text]), decoder_input_ids=torch.tensor([start]))
        else:
            out = model(input_ids=torch.tensor([text + made]))
        made.append(int(out.logits[0, -1].argmax()))
    return made


@each_generator
@each_attention
@torch.no_grad()
def test_generating_with_a_cache_is_generating_without_and_by_hand(name: str, kind: str) -> None:
    model = with_prefix(MODELS[name](attn_implementation=kind))
    ids, mask = padded("right" if model.config.is_encoder_decoder else "left")
    tokens = generate(model, ids, mask)
    assert torch.equal(generate(model, ids, mask, use_cache=False), tokens)
    assert tokens[:, -6:].tolist() == [greedy(model, text) for text in TEXTS]
    beams = generate(model, ids, mask, num_beams=2)
    assert torch.equal(generate(model, ids, mask, num_beams=2, use_cache=False), beams)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@torch.no_grad()
def test_a_cache_holds_the_users_tokens_alone_and_can_be_gone_on_with(name: str) -> None:
    model = with_prefix(MODELS[name]())
    ids = torch.tensor(TEXTS[:1])
    assert model(ids, use_cache=False).past_key_values is None
    first = generate(model, ids, return_dict_in_generate=True)
    assert first.past_key_values.get_seq_length() == first.sequences.shape[1] - 1
    static = generate(model, ids, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, first.sequences)
    longer = torch.cat([first.sequences, torch.tensor([[7, 8]])], dim=1)
    assert torch.equal(generate(model, longer, past_key_values=first.past_key_values), generate(model, longer))


# ------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", ["roberta", "gpt2"])
def test_too_long_a_text_is_an_error_with_the_numbers(name: str) -> None:
    model = with_prefix(MODELS[name]()).base_model
    limit = 15 if name == "roberta" else 32  # RoBERTa's first position is behind the padding's
    assert model(torch.ones(1, limit - N, dtype=torch.long)).last_hidden_state.shape[1] == limit - N
    with pytest.raises(ValueError, match=rf"are {limit + 1}, .* positions for {limit}.* to {limit - N} tokens"):
        model(torch.ones(1, limit - N + 1, dtype=torch.long))


def test_a_base_without_a_place_for_keys_and_values_is_refused() -> None:
    for build, backbone, says in [
        (tiny.distilbert_classifier, None, "DistilBertModel has no place for them: of its 2 layers 0 take a cache"),
        (tiny.bloom, None, "BloomModel has no place for them: of its 2 layers 0 take a cache"),
        (lambda: make(TorchTransformer), "encoder", "TransformerEncoder isn't one"),
    ]:
        model = build()
        with pytest.raises(InjectionError, match=rf"{says}.* another method"):
            PrefixTuning(backbone=backbone).inject(model)
        assert all(p.requires_grad for p in model.parameters())
        assert not injected_names(model)


def test_a_model_that_keeps_the_prefix_from_its_attention_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_prefix(tiny.bert())
    forward = model.encoder.forward
    monkeypatch.setattr(model.encoder, "forward", lambda *args, prefix, **kwargs: forward(*args, **kwargs))
    with pytest.raises(InjectionError, match="BertModel keeps the prefix from its attention"):
        model(tiny.TOKENS)


def test_a_mask_that_is_no_tensor_is_refused() -> None:
    model = with_prefix(tiny.gpt2())
    mask = create_block_mask(lambda b, h, q, k: q >= k, 2, None, 7, 7, device="cpu")
    with pytest.raises(ValueError, match="masks that are tensors, not BlockMask"):
        model.transformer.h[0].attn(torch.zeros(2, 7, 16), attention_mask=mask, prefix=spied(model))


def spied(model: Any) -> Any:
    """What the trunk sends to its attention."""
    sent: list[Any] = []
    with model.transformer.h[0].register_forward_pre_hook(
        lambda module, args, kwargs: sent.append(kwargs["prefix"]), with_kwargs=True
    ):
        model(tiny.TOKENS)
    return sent[0]


def test_a_bad_argument_is_an_error_with_its_value() -> None:
    for settings, says in [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens must be a whole number of at least 1, not 0"),
        ({"encoder_hidden_size": "8", "prefix_projection": True}, "encoder_hidden_size must be .* not '8'"),
        ({"encoder_hidden_size": 8}, "encoder_hidden_size is the width of prefix_projection, which is off"),
    ]:
        with pytest.raises(ValueError, match=says):
            PrefixTuning(**settings)


def test_a_prompt_and_a_prefix_are_refused_together() -> None:
    model = with_prefix(tiny.bert())
    with pytest.raises(InjectionError, match="carries PREFIX_TUNING, and PROMPT_TUNING would act on its inputs too"):
        PromptTuning(N).inject(model)


# ------------------------------------------------------------------------------------- agreement with PEFT

TASKS = {"bert": "SEQ_CLS", **dict.fromkeys(("gpt2", "llama", "gpt_neox", "opt"), "CAUSAL_LM")}
TASKS |= dict.fromkeys(("t5", "bart"), "SEQ_2_SEQ_LM")
each_task = pytest.mark.parametrize("name", TASKS)
projected_or_not = pytest.mark.parametrize(
    ("name", "projection"),
    [("bert", False), ("bert", True), ("gpt2", False), ("llama", True), ("opt", False), ("t5", True), ("bart", False)],
)


def batch_for(name: str) -> dict[str, Tensor]:
    ids, mask = padded("right")
    labels = torch.tensor([0, 1, 2]) if name == "bert" else ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def stock(name: str, **settings: Any) -> Any:
    """PEFT's, of the same model."""
    config = peft.PrefixTuningConfig(task_type=TASKS[name], num_virtual_tokens=N, **settings)
    return peft.get_peft_model(MODELS[name](), config)


def weights(theirs: Any, ours: Any) -> list[tuple[Tensor, Tensor]]:
    """What trains in both, ours beside PEFT's."""
    prefix = (prefix_of(ours), theirs.prompt_encoder["default"].embedding.weight)
    if not hasattr(ours, "classifier"):
        return [prefix]
    head = theirs.base_model.classifier.modules_to_save["default"]
    return [prefix, (ours.classifier.weight, head.weight), (ours.classifier.bias, head.bias)]


@each_task
def test_outputs_gradients_and_ten_steps_are_those_of_peft(name: str) -> None:
    theirs, ours = stock(name), with_prefix(MODELS[name]())
    pairs = weights(theirs, ours)
    for mine, stocks in pairs:
        mine.data.copy_(stocks)
    batch = batch_for(name)
    optimizers = [torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.0) for ps in zip(*pairs, strict=True)]
    for step in range(10):
        outs = [model.eval()(**batch) for model in (ours, theirs)]
        kept = slice(None) if name == "bert" else batch["attention_mask"].bool()
        close(outs[0].logits[kept], outs[1].logits[kept])
        close(outs[0].loss, outs[1].loss)
        for optimizer, out in zip(optimizers, outs, strict=True):
            optimizer.zero_grad()
            out.loss.backward()
        for mine, stocks in pairs:
            close(mine.grad, stocks.grad)
            assert mine.grad.any(), step
        for optimizer in optimizers:
            optimizer.step()
        for mine, stocks in pairs:
            close(mine, stocks)


@torch.no_grad()
def logits(model: Any, name: str) -> Tensor:
    return model.eval()(**batch_for(name)).logits


@projected_or_not
def test_stock_peft_loads_ours(name: str, projection: bool, tmp_path: Path) -> None:
    model = with_prefix(MODELS[name](), prefix_projection=projection)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(MODELS[name](), tmp_path)
    kept = slice(None) if name == "bert" else batch_for(name)["attention_mask"].bool()
    close(logits(theirs, name)[kept], logits(model, name)[kept])
    keys = {"base_model.classifier.weight", "base_model.classifier.bias"} if name == "bert" else set()
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert set(tensors) == {"prompt_embeddings"} | keys
    layers = {"t5": 3, "bart": 4}.get(name, LAYERS)
    assert tensors["prompt_embeddings"].shape == (N, layers * 2 * (8 if name == "llama" else 16))


@projected_or_not
def test_ours_loads_stock_pefts(name: str, projection: bool, tmp_path: Path) -> None:
    theirs = stock(name, prefix_projection=projection)
    theirs.save_pretrained(tmp_path / "theirs")
    model = MODELS[name]()
    load_adapter(model, tmp_path / "theirs")
    kept = slice(None) if name == "bert" else batch_for(name)["attention_mask"].bool()
    close(logits(model, name)[kept], logits(theirs, name)[kept])
    save_adapter(model, tmp_path / "ours")
    mine, stocks = (json.loads((tmp_path / x / "adapter_config.json").read_text()) for x in ("ours", "theirs"))
    for key in set(mine) - {"prefix_projection", "modules_to_save", "base_model_name_or_path"}:
        assert mine[key] == stocks[key], key


# -------------------------------------------------------------------------------------- with others, in training


def test_lora_and_a_prefix_train_and_load_together(tmp_path: Path) -> None:
    run, module = trainer(LoRA(r=2), PrefixTuning(N, prefix_projection=True), max_epochs=1), make(BertInInit)
    run.fit(module)
    run.save_checkpoint(tmp_path / "x.ckpt")
    torch.manual_seed(7)
    loaded = lightning_ft.load_from_checkpoint(BertInInit, tmp_path / "x.ckpt")
    save_adapter(module, tmp_path / "both")
    fresh = make(BertInInit)
    load_adapter(fresh, tmp_path / "both")
    for other in (loaded, fresh):
        close(other.eval().outputs(tiny.TOKENS), module.eval().outputs(tiny.TOKENS), atol=1e-6)


def test_dropout_of_a_model_in_eval_mode_stays_off() -> None:
    module = make(BertInInit)
    module.model.eval()
    modes: list[bool] = []
    attention = module.model.bert.encoder.layer[0].attention.self
    attention.register_forward_hook(lambda module, *_: modes.append(module.training))
    with pytest.warns(UserWarning, match="in eval mode"):
        trainer(PrefixTuning(N), max_epochs=1).fit(module)
    assert modes
    assert not any(modes)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_base_in_bf16_keeps_its_dtype_and_the_prefix_fp32(name: str) -> None:
    model = with_prefix(MODELS[name]()).bfloat16()
    out = model(input_ids=tiny.TOKENS)[0]
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert prefix_of(model).dtype == prefix_of(model).grad.dtype == torch.float32
    assert prefix_of(model).grad.any()


@pytest.mark.parametrize("reentrant", [True, False])
@projected_or_not
def test_gradient_checkpointing_gives_the_prefix_its_gradient(name: str, projection: bool, reentrant: bool) -> None:
    def gradients(model: Any) -> list[Tensor]:
        model(**batch_for(name)).loss.backward()
        return [p.grad for key, p in model.named_parameters() if key in injected_names(model)]

    model = with_prefix(MODELS[name](), prefix_projection=projection).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    expected = gradients(copy.deepcopy(model))
    model.enable_input_require_grads()  # without which reentrant checkpointing gives no layer a gradient
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    close(gradients(model), expected)
    assert all(grad.any() for grad in expected)
