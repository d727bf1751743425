from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from foreign import BertInInit, TorchTransformer, TrunkInSetup, make, small, trainer
from reference.prompt import lstm, mlp, prompted
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertModel, AutoTokenizer, DataCollatorWithFlattening

import lightning_ft
from lightning_ft import InjectionError, LoRA, PromptTuning, PTuning, load_adapter, save_adapter
from lightning_ft.files.state import StateError
from lightning_ft.injection import injected_modules, injected_names

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

N = 3
# With weights this large attention is no mean over all tokens: who attends to what shows.
SHARP = {"initializer_range": 0.4}
TEXTS = [[5, 6, 7, 8, 9], [3, 4], [20]]

TRUNKS: dict[str, Callable[..., Any]] = {
    "bert": partial(tiny.bert, **SHARP),
    "roberta": partial(tiny.roberta, **SHARP),
    "distilbert": lambda **more: tiny.distilbert_classifier(**SHARP, **more).distilbert,
    "electra": partial(tiny.electra, **SHARP),
    "gpt2": lambda **more: tiny.gpt2(**SHARP, **more).transformer,
    "llama": lambda **more: tiny.llama_lm(**SHARP, **more).model,
    "t5 encoder": partial(tiny.t5_encoder, initializer_factor=3.0),
    # windows, and biases by distance: these see where padding stands
    "deberta": partial(tiny.deberta, **SHARP),
    "modernbert": lambda **more: tiny.modernbert(initializer_range=0.4, **more),
    "mistral": lambda **more: tiny.mistral_lm(**SHARP, **more).model,
    "gemma3": lambda **more: tiny.gemma3_lm(**SHARP, **more).model,
    "bloom": partial(tiny.bloom, **SHARP),
}
EAGER = ["bert", "gpt2", "llama", "deberta", "bloom"]
EAGER_ALONE = EAGER[3:]

GENERATORS: dict[str, Callable[..., Any]] = {
    "gpt2": partial(tiny.gpt2, n_positions=32, **SHARP),
    "llama": partial(tiny.llama_lm, **SHARP),
    "opt": tiny.opt,
    "mistral": partial(tiny.mistral_lm, **SHARP),
    "gemma3": partial(tiny.gemma3_lm, **SHARP),
    "t5": tiny.t5,
}


def prompts(model: nn.Module) -> nn.Parameter:
    """The prompt of a model."""
    return next(layer.prompt_embeddings for _, layer in injected_modules(model) if hasattr(layer, "prompt_embeddings"))


def with_prompt(model: Any, scale: float = 1.0, **settings: Any) -> Any:
    """The model with a prompt that matters."""
    PromptTuning(**{"num_virtual_tokens": N, **settings}).inject(model)
    nn.init.normal_(prompts(model), std=scale)
    return model.eval()


def padded(side: str) -> tuple[Tensor, Tensor]:
    """The texts as a batch, and its mask."""
    ids, mask = torch.zeros(2, len(TEXTS), max(map(len, TEXTS)), dtype=torch.long)
    for row, text in enumerate(TEXTS):
        place = slice(0, len(text)) if side == "right" else slice(-len(text), None)
        ids[row, place] = torch.tensor(text)
        mask[row, place] = 1
    return ids, mask


def alone(bare: Any, prompt: Tensor, text: list[int]) -> Tensor:
    """The reference: one text, nothing padded, no mask."""
    embedded = bare.get_input_embeddings()(torch.tensor(text))
    return prompted(lambda x: bare(inputs_embeds=x).last_hidden_state, prompt, embedded)


def close(ours: Any, theirs: Any, **more: Any) -> None:
    torch.testing.assert_close(ours, theirs, **{"atol": 1e-5, "rtol": 1e-5, **more})


# ----------------------------------------------------------------------------------------------- the maths


@pytest.mark.parametrize(
    ("name", "attention"),
    [*((name, "sdpa") for name in TRUNKS if name not in EAGER_ALONE), *((name, "eager") for name in EAGER)],
)
@torch.no_grad()
def test_each_row_of_a_batch_is_what_its_text_gives_alone(name: str, attention: str) -> None:
    model = with_prompt(TRUNKS[name](attn_implementation=attention))
    bare = TRUNKS[name](attn_implementation=attention)
    for side in ("right", "left"):
        ids, mask = padded(side)
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state
        assert states.shape[:2] == ids.shape
        for row, text in enumerate(TEXTS):
            expected = alone(bare, prompts(model), text)
            close(states[row][mask[row].bool()], expected)
            assert not torch.allclose(bare(torch.tensor([text])).last_hidden_state[0], expected, atol=1e-2)


@pytest.mark.parametrize("name", ["roberta", "gpt2", "t5 encoder"])
@torch.no_grad()
def test_tokens_can_come_embedded_by_place_and_without_a_mask(name: str) -> None:
    model, bare = with_prompt(TRUNKS[name]()), TRUNKS[name]()
    ids = torch.tensor(TEXTS[:1])
    expected = alone(bare, prompts(model), TEXTS[0])[None]
    close(model(ids).last_hidden_state, expected)
    close(model(inputs_embeds=bare.get_input_embeddings()(ids)).last_hidden_state, expected)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5 encoder"])
@torch.no_grad()
def test_all_outputs_are_the_models_own_for_the_users_tokens(name: str) -> None:
    model, bare = with_prompt(TRUNKS[name](attn_implementation="eager")), TRUNKS[name](attn_implementation="eager")
    ask = {"output_hidden_states": True, "output_attentions": True, "use_cache": False}
    ids = torch.tensor(TEXTS[:1])
    embedded = torch.cat([prompts(model)[None], bare.get_input_embeddings()(ids)], dim=1)
    out, whole = model(ids, **ask), bare(inputs_embeds=embedded, **ask)
    assert type(out) is type(whole)
    assert list(out) == list(whole)
    for ours, theirs in zip(out.hidden_states, whole.hidden_states, strict=True):
        close(ours, theirs[:, N:])
    for ours, theirs in zip(out.attentions, whole.attentions, strict=True):
        close(ours, theirs[..., N:, N:])
    as_tuple = model(ids, return_dict=False, **ask)
    assert type(as_tuple) is tuple
    close(as_tuple, out.to_tuple())
    model.config.return_dict = False
    assert type(model(ids)) is tuple
    assert inspect.signature(model.forward) == inspect.signature(bare.forward)


@pytest.mark.parametrize("build", [tiny.bert, tiny.roberta])
@torch.no_grad()
def test_cls_is_what_the_pooler_reads(build: Callable[..., Any]) -> None:
    model, bare = with_prompt(build(**SHARP)), build(**SHARP)
    ids, mask = padded("right")
    pooled = model(ids, mask).pooler_output
    for row, text in enumerate(TEXTS):
        cls = alone(bare, prompts(model), text)[0]
        close(pooled[row], torch.tanh(bare.pooler.dense(cls)))


@torch.no_grad()
def test_position_and_token_type_ids_of_the_user_count() -> None:
    model, bare = with_prompt(tiny.bert(**SHARP)), tiny.bert(**SHARP)
    ids, places, types = torch.tensor([[5, 6, 7]]), torch.tensor([[4, 2, 0]]), torch.tensor([[0, 1, 1]])
    whole = bare(
        inputs_embeds=torch.cat([prompts(model)[None], bare.get_input_embeddings()(ids)], dim=1),
        position_ids=torch.cat([torch.arange(N)[None], N + places], dim=1),
        token_type_ids=torch.cat([torch.zeros(1, N, dtype=torch.long), types], dim=1),
    )
    mask = torch.ones_like(ids)
    out = model(ids, attention_mask=mask, position_ids=places, token_type_ids=types)
    close(out.last_hidden_state, whole.last_hidden_state[:, N:])


@pytest.mark.parametrize(("kind", "hidden"), [("MLP", None), ("MLP", 5), ("LSTM", 5)])
def test_p_tunings_encoder_is_that_of_the_paper_and_of_peft(kind: str, hidden: int | None) -> None:
    model = tiny.bert()
    PTuning(N, kind, hidden).inject(model)
    sizes = {"token_dim": 16, "num_virtual_tokens": N, "num_transformer_submodules": 1}
    stock = peft.PromptEncoder(
        peft.PromptEncoderConfig(encoder_reparameterization_type=kind, encoder_hidden_size=hidden or 16, **sizes)
    )
    theirs = {name.replace("embedding.weight", "inputs"): p for name, p in stock.named_parameters()}
    places = {f"mlp_head.{2 * i}.": f"mlp_{i}_" for i in range(3)} | {"lstm_head.": "lstm_"}
    pairs = {}
    for name, p in theirs.items():
        key = next((name.replace(old, new) for old, new in places.items() if old in name), name)
        pairs[name.removeprefix("mlp_head.").removeprefix("lstm_head.")] = (model.get_parameter(f"prompt_{key}"), p)
    assert len(pairs) == len(injected_names(model))
    with torch.no_grad():
        for ours, stocks in pairs.values():
            stocks.copy_(ours)
    w = {name: ours for name, (ours, _) in pairs.items()}
    expected = (mlp if kind == "MLP" else lstm)(w.pop("inputs"), w)
    close(model.soft_prompt(), expected)
    close(stock(torch.arange(N)), expected)
    cotangent, parameters = torch.randn_like(expected), [ours for ours, _ in pairs.values()]
    wanted = torch.autograd.grad((expected * cotangent).sum(), parameters)
    close(torch.autograd.grad((model.soft_prompt() * cotangent).sum(), parameters), wanted)


# ----------------------------------------------------------------------------------------------- the start


def test_a_prompt_starts_from_the_vocabulary() -> None:
    model = tiny.bert()
    PromptTuning(9).inject(model)
    rows = model.get_input_embeddings().weight
    assert all(any(torch.equal(row, r) for r in rows) for row in prompts(model))
    assert len(prompts(model).unique(dim=0)) > 1


@pytest.mark.parametrize("n", [2, 9, 30])
def test_a_prompt_starts_from_a_text_as_pefts_does(n: int, tiny_bert_dir: str) -> None:
    text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "is it good or very bad"}
    model = tiny.bert(vocab_size=200)
    model.config.name_or_path = tiny_bert_dir
    config = peft.PromptTuningConfig(
        num_virtual_tokens=n, token_dim=16, num_transformer_submodules=1, tokenizer_name_or_path=tiny_bert_dir, **text
    )
    PromptTuning(n, **text).inject(model)
    assert torch.equal(prompts(model), peft.PromptEmbedding(config, model.get_input_embeddings()).embedding.weight)


def test_a_prompt_starts_from_class_names_and_random_tokens(tiny_bert_dir: str) -> None:
    model, tokenizer = tiny.bert(vocab_size=200), AutoTokenizer.from_pretrained(tiny_bert_dir)
    rows = model.get_input_embeddings().weight
    names = ["very good", "bad"]
    PromptTuning(4, "CLASS_NAMES", class_names=names, tokenizer_name_or_path=tiny_bert_dir).inject(model)
    assert PromptTuning(4, "CLASS_NAMES", class_names="bad").class_names == ["bad"]
    for i, name in enumerate(names):
        ids = tokenizer.convert_tokens_to_ids(name.split())
        close(prompts(model)[i], rows[ids].mean(dim=0))
    assert all(any(torch.equal(row, r) for r in rows) for row in prompts(model)[2:])


def test_a_random_prompt_is_as_wide_as_the_vocabulary() -> None:
    model = tiny.bert()
    PromptTuning(500, "RANDOM").inject(model)
    assert prompts(model).std().item() == pytest.approx(model.get_input_embeddings().weight.std().item(), rel=0.1)
    assert len(prompts(model).unique()) == 500 * 16


# ---------------------------------------------------------------------------------------------- generation


def generate(model: Any, ids: Tensor, mask: Tensor | None = None, **more: Any) -> Tensor:
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model.generate(ids, attention_mask=mask, max_new_tokens=6, **{"do_sample": False, **more})


def greedy(model: Any, text: list[int]) -> list[int]:
    """Six tokens, each the likeliest, by hand."""
    decodes, made = model.config.is_encoder_decoder, []
    for _ in range(6):
        if decodes:
            out = model(input_ids=torch.tensor([text]), decoder_input_ids=torch.tensor([[0, *made]]))
        else:
            out = model(input_ids=torch.tensor([text + made]))
        made.append(int(out.logits[0, -1].argmax()))
    return made


@pytest.mark.parametrize(
    ("name", "attention"), [("gpt2", "sdpa"), ("gpt2", "eager"), ("llama", "sdpa"), ("gemma3", "sdpa"), ("t5", "eager")]
)
@torch.no_grad()
def test_generating_with_a_cache_is_generating_without_and_by_hand(name: str, attention: str) -> None:
    model = with_prompt(GENERATORS[name](attn_implementation=attention))
    ids, mask = padded("left")
    tokens = generate(model, ids, mask)
    assert torch.equal(generate(model, ids, mask, use_cache=False), tokens)
    assert tokens[:, -6:].tolist() == [greedy(model, text) for text in TEXTS]
    beams = generate(model, ids, mask, num_beams=2)
    assert torch.equal(generate(model, ids, mask, num_beams=2, use_cache=False), beams)


@torch.no_grad()
def test_what_a_cache_cannot_tell_is_refused() -> None:
    model = with_prompt(GENERATORS["gpt2"]())
    ids, mask = padded("left")
    with pytest.raises(ValueError, match=r"attention_mask of \(batch, tokens\), and with the default, dynamic cache"):
        generate(model, ids, mask, cache_implementation="static")
    with pytest.raises(ValueError, match=r"attention_mask of \(batch, tokens\)"):
        model(ids, attention_mask=mask[:, None, None])
    first = generate(model, ids[:1], return_dict_in_generate=True)
    longer = torch.cat([first.sequences, torch.tensor([[7, 8]])], dim=1)
    with pytest.raises(ValueError, match=r"generate\(\) can't tell what of input_ids it has seen"):
        generate(model, longer, past_key_values=first.past_key_values)
    cache = model(ids[:1]).past_key_values
    with pytest.raises(ValueError, match="for 3 tokens, and with the cache there are 7"):
        model(ids[:1, :2], attention_mask=mask[:1, :3], past_key_values=cache)
    with pytest.raises(ValueError, match="holds padding alone, and the prompt behind it, where more padding comes"):
        generate(model, ids, mask, prefill_chunk_size=2)


@pytest.mark.parametrize("name", [name for name in GENERATORS if name != "t5"])
@torch.no_grad()
def test_what_a_cached_step_attends_to_is_what_it_would_without_a_cache(name: str) -> None:
    model, ask = with_prompt(GENERATORS[name](attn_implementation="eager")), {"output_attentions": True}
    ids, mask = padded("left")
    cache = model(ids[:, :-1], attention_mask=mask[:, :-1]).past_key_values
    step = model(ids[:, -1:], attention_mask=mask, past_key_values=cache, **ask)
    for ours, whole in zip(step.attentions, model(ids, attention_mask=mask, **ask).attentions, strict=True):
        close(ours, whole[:, :, -1:])


def test_packed_texts_are_refused() -> None:
    model = with_prompt(tiny.gpt2())
    batch = DataCollatorWithFlattening()([{"input_ids": text} for text in TEXTS])
    with pytest.raises(ValueError, match="packed in a row"):
        model(input_ids=batch["input_ids"], position_ids=batch["position_ids"])


# ------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", ["roberta", "distilbert", "gpt2"])
def test_too_long_a_text_is_an_error_with_the_numbers(name: str) -> None:
    model = with_prompt(TRUNKS[name]())
    limit = 15 if name == "roberta" else 16  # RoBERTa's first position is behind the padding's
    assert model(torch.ones(1, limit - N, dtype=torch.long)).last_hidden_state.shape[1] == limit - N
    says = rf"{limit - N + 1} tokens and 3 virtual .* are {limit + 1}, .* positions for {limit}.* to {limit - N} tokens"
    with pytest.raises(ValueError, match=says):
        model(torch.ones(1, limit - N + 1, dtype=torch.long))


def test_a_base_that_takes_no_prompt_is_refused() -> None:
    for build, backbone, named in [
        (lambda: make(TorchTransformer), "encoder", "TransformerEncoder"),
        (tiny.bert, "encoder", "BertEncoder"),
        (lambda: AlbertModel(small(AlbertConfig, hidden_size=16, num_attention_heads=2)), None, "Albert"),
    ]:
        model = build()
        for method in (PromptTuning(backbone=backbone), PTuning(backbone=backbone)):
            with pytest.raises(InjectionError, match=rf"{type(method).__name__}.*{named}.* use another method"):
                method.inject(model)
        assert all(p.requires_grad for p in model.parameters())


def test_a_bad_argument_is_an_error_with_its_value() -> None:
    for make_method, says in [
        (lambda: PromptTuning(0), "num_virtual_tokens must be a whole number of at least 1, not 0"),
        (lambda: PTuning(2.5), "num_virtual_tokens must be a whole number of at least 1, not 2.5"),
        (lambda: PTuning(encoder_hidden_size=0), "encoder_hidden_size must be"),
        (lambda: PTuning(encoder_reparameterization_type="GRU"), "must be one of MLP, LSTM, not 'GRU'"),
        (lambda: PromptTuning(prompt_tuning_init="ZERO"), "must be one of SAMPLE_VOCAB, .*, not 'ZERO'"),
        (lambda: PromptTuning(prompt_tuning_init="TEXT"), "prompt_tuning_init='TEXT' and prompt_tuning_init_text go"),
        (lambda: PromptTuning(prompt_tuning_init_text="x"), "prompt_tuning_init='TEXT' and prompt_tuning_init_text go"),
        (lambda: PromptTuning(class_names=["x"]), "prompt_tuning_init='CLASS_NAMES' and class_names go"),
        (lambda: PromptTuning(1, "CLASS_NAMES", class_names=["x", "y"]), "2 class_names don't fit into"),
    ]:
        with pytest.raises(ValueError, match=says):
            make_method()


def test_a_tokenizer_that_does_not_load_or_fit_is_named(tiny_bert_dir: str, tmp_path: Path) -> None:
    text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "good"}
    for settings, says in (
        ({}, r"doesn't say where it came from.*tokenizer_name_or_path="),
        ({"tokenizer_name_or_path": str(tmp_path)}, rf"The tokenizer {tmp_path} .* can't be loaded.*tokenizer_name"),
        ({"tokenizer_name_or_path": tiny_bert_dir}, r"has a token \d+, and the model embeds 3.*don't belong together"),
    ):
        model = tiny.bert(vocab_size=3)
        with pytest.raises(InjectionError, match=says):
            PromptTuning(**text, **settings).inject(model)
        assert all(p.requires_grad for p in model.parameters())
        assert not injected_names(model)


def test_one_prompt_at_a_time() -> None:
    model = with_prompt(tiny.bert())
    with pytest.raises(InjectionError, match="already carries PROMPT_TUNING with"):
        PromptTuning(N + 1).inject(model)
    with pytest.raises(InjectionError, match="already carries PROMPT_TUNING, and P_TUNING would act on its inputs too"):
        PTuning(N).inject(model)


# ------------------------------------------------------------------------------------- agreement with PEFT

TASKS = {"gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM", "opt": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}
each_task = pytest.mark.parametrize("name", TASKS)


def batch_for(name: str) -> dict[str, Tensor]:
    ids, mask = padded("right")
    labels = ids.masked_fill(mask == 0, -100)
    if TASKS[name] == "CAUSAL_LM":
        labels[:, 0] = -100  # with PEFT the last virtual token is to predict it
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def stock(name: str, **settings: Any) -> Any:
    """PEFT's, of the same model."""
    config = peft.PromptTuningConfig(task_type=TASKS[name], num_virtual_tokens=N, **settings)
    model = peft.get_peft_model(GENERATORS[name](), config)
    nn.init.normal_(model.prompt_encoder["default"].embedding.weight)
    return model


@each_task
def test_outputs_gradients_and_ten_steps_are_those_of_peft(name: str) -> None:
    theirs, ours = stock(name), with_prompt(GENERATORS[name]())
    weight = theirs.prompt_encoder["default"].embedding.weight
    prompts(ours).data.copy_(weight[:N])
    batch = batch_for(name)
    optimizers = [torch.optim.AdamW([p], lr=1e-2, weight_decay=0.0) for p in (prompts(ours), weight)]
    cut = 0 if name == "t5" else N
    for step in range(10):
        outs = [model.eval()(**batch) for model in (ours, theirs)]
        kept = batch["attention_mask"].bool()
        close(outs[0].logits[kept], outs[1].logits[:, cut:][kept])
        close(outs[0].loss, outs[1].loss)
        for optimizer, out in zip(optimizers, outs, strict=True):
            optimizer.zero_grad()
            out.loss.backward()
        close(prompts(ours).grad, weight.grad[:N])
        assert prompts(ours).grad.any(), step
        for optimizer in optimizers:
            optimizer.step()
        close(prompts(ours), weight[:N])


def like_ours(theirs: Any, ours: Any, name: str) -> None:
    """The same loss."""
    with torch.no_grad():
        close(theirs.eval()(**batch_for(name)).loss, ours.eval()(**batch_for(name)).loss)


@pytest.mark.parametrize(
    ("name", "method"), [("gpt2", PromptTuning(N)), ("llama", PTuning(N)), ("t5", PromptTuning(N))]
)
def test_stock_peft_loads_ours(name: str, method: Any, tmp_path: Path) -> None:
    model = GENERATORS[name]()
    method.inject(model)
    save_adapter(model, tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"].shape == (N, 16)
    like_ours(peft.PeftModel.from_pretrained(GENERATORS[name](), tmp_path), model, name)


@each_task
def test_ours_loads_stock_pefts(name: str, tmp_path: Path) -> None:
    theirs = stock(name)
    theirs.save_pretrained(tmp_path / "theirs")
    model = GENERATORS[name]()
    load_adapter(model, tmp_path / "theirs")
    like_ours(theirs, model, name)
    save_adapter(model, tmp_path / "ours")
    mine, stocks = (json.loads((tmp_path / x / "adapter_config.json").read_text()) for x in ("ours", "theirs"))
    for key in set(mine) - {"num_transformer_submodules", "base_model_name_or_path"}:  # PEFT: 2, and leaves one unused
        assert mine[key] == stocks[key], key
    assert set(load_file(tmp_path / "ours" / "adapter_model.safetensors")) == {"prompt_embeddings"}


@pytest.mark.parametrize("method", [PromptTuning(N), PTuning(N), PTuning(N, "LSTM", 5)], ids=["prompt", "mlp", "lstm"])
@torch.no_grad()
def test_stock_peft_makes_the_same_states_of_ours(method: Any, tmp_path: Path) -> None:
    """Of BERT's states: the pooler of PEFT's model reads the first virtual token."""
    model = tiny.bert_classifier(**SHARP)
    method.inject(model)
    save_adapter(model.eval(), tmp_path)
    stock = peft.PeftModel.from_pretrained(tiny.bert_classifier(**SHARP), tmp_path)
    ask = {"input_ids": torch.tensor(TEXTS[:1]), "attention_mask": torch.ones(1, 5), "output_hidden_states": True}
    ours, theirs = model(**ask), stock(**ask)
    close(ours.hidden_states[-1], theirs.hidden_states[-1][:, N:])
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
        "prompt_embeddings", "base_model.classifier.weight", "base_model.classifier.bias",
    }  # fmt: skip
    fresh = tiny.bert_classifier(**SHARP)
    load_adapter(fresh, tmp_path)
    close(fresh(**ask).to_tuple(), ours.to_tuple())


@pytest.mark.parametrize("config", [peft.PromptTuningConfig, peft.PromptEncoderConfig])
@pytest.mark.parametrize("build", [tiny.bert_classifier, tiny.gpt2_classifier])
@torch.no_grad()
def test_a_classifier_of_stock_pefts_pools_otherwise_which_is_said(
    config: Any, build: Callable[..., Any], tmp_path: Path
) -> None:
    theirs = peft.get_peft_model(build(**SHARP), config(task_type="SEQ_CLS", num_virtual_tokens=N)).eval()
    theirs.save_pretrained(tmp_path)
    model = build(**SHARP)
    with pytest.warns(UserWarning, match="was trained to pool virtual tokens or padding, and here it pools the text"):
        load_adapter(model, tmp_path)
    ids, mask = padded("right")
    ours, stocks = (m(input_ids=ids, attention_mask=mask).logits for m in (model, theirs))
    assert not torch.allclose(ours, stocks, atol=1e-2)
    save_adapter(model, tmp_path / "ours")
    load_adapter(build(**SHARP), tmp_path / "ours")  # and of ours nothing need be said


def test_a_loaded_p_tuning_is_a_prompt_that_trains_on(tmp_path: Path) -> None:
    module = make(BertInInit)
    trainer(PTuning(N), max_epochs=1).fit(module)
    save_adapter(module, tmp_path)
    fresh = make(BertInInit)
    load_adapter(fresh, tmp_path)
    before = prompts(fresh).detach().clone()
    trainer(PromptTuning(N), max_epochs=1).fit(fresh)
    assert not torch.equal(prompts(fresh), before)


def test_an_adapter_of_another_size_is_refused(tmp_path: Path) -> None:
    save_adapter(with_prompt(tiny.bert()), tmp_path)
    with pytest.raises(StateError, match=r"prompt_embeddings has shape \(3, 16\), the model's \(3, 32\)"):
        load_adapter(tiny.bert(hidden_size=32), tmp_path)


# -------------------------------------------------------------------------------------- with others, in training


def test_lora_and_a_prompt_train_save_load_and_resume_together(tmp_path: Path) -> None:
    def methods() -> list[Any]:
        return [LoRA(r=2), PromptTuning(N)]

    def states(module: Any) -> Tensor:
        with torch.no_grad():
            return module.eval().outputs(tiny.TOKENS)

    run, module = trainer(*methods(), max_epochs=1), make(BertInInit)
    run.fit(module)
    run.save_checkpoint(tmp_path / "x.ckpt")
    torch.manual_seed(7)
    loaded = lightning_ft.load_from_checkpoint(BertInInit, tmp_path / "x.ckpt")
    assert torch.equal(states(loaded), states(module))

    whole, resumed = make(BertInInit), make(BertInInit)
    trainer(*methods(), max_epochs=2).fit(whole)
    torch.manual_seed(9)
    trainer(*methods(), max_epochs=2).fit(resumed, ckpt_path=tmp_path / "x.ckpt")
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())

    save_adapter(module, tmp_path / "both")
    config = json.loads((tmp_path / "both" / "adapter_config.json").read_text())
    assert config["peft_type"] == "COMBINED"
    assert {method["peft_type"] for method in config["methods"]} == {"LORA", "PROMPT_TUNING"}
    fresh = make(BertInInit)
    load_adapter(fresh, tmp_path / "both")
    close(states(fresh), states(module), atol=1e-6)
    trainer(*methods(), max_epochs=1).fit(fresh.train())


def test_a_trunk_of_the_users_own_and_its_head_travel(tmp_path: Path) -> None:
    module = make(TrunkInSetup)
    trainer(PromptTuning(N, modules_to_save=["pooler"]), max_epochs=1).fit(module)
    save_adapter(module, tmp_path)
    fresh = make(TrunkInSetup)
    fresh.setup("fit")
    load_adapter(fresh, tmp_path)
    for loaded in (fresh.eval(), copy.deepcopy(fresh)):
        assert torch.equal(loaded.outputs(tiny.TOKENS), module.eval().outputs(tiny.TOKENS))


@pytest.mark.parametrize("build", [tiny.bert_classifier, tiny.gpt2])
def test_a_base_in_bf16_keeps_its_dtype_and_the_prompt_fp32(build: Callable[[], Any]) -> None:
    model = with_prompt(build()).bfloat16()
    out = model(input_ids=tiny.TOKENS).logits
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert prompts(model).dtype == prompts(model).grad.dtype == torch.float32
    assert prompts(model).grad.any()


@pytest.mark.parametrize(("name", "reentrant"), [("gpt2", True), ("llama", False), ("t5", True), ("t5", False)])
def test_gradient_checkpointing_gives_the_prompt_its_gradient(name: str, reentrant: bool) -> None:
    def gradient(model: Any) -> Tensor:
        model(**batch_for(name)).loss.backward()
        return prompts(model).grad

    model = with_prompt(GENERATORS[name](**({"dropout_rate": 0.0} if name == "t5" else {}))).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    expected = gradient(copy.deepcopy(model))
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    close(gradient(model), expected)
    assert expected.any()
