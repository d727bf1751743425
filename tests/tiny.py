"""Tiny Hugging Face models with random weights, the same each time."""

from __future__ import annotations

from typing import Any

import torch
from foreign import BERT, VOCABULARY, small
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BloomConfig,
    BloomModel,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertModel,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

TOKENS = torch.arange(1, 15).view(2, 7) % VOCABULARY


def seeded(kind: Any, config: Any) -> Any:
    torch.manual_seed(11)
    return kind(config).eval()


def bert(**more: Any) -> BertModel:
    return seeded(BertModel, small(BertConfig, **{**BERT, **more}))


def bert_classifier(**more: Any) -> BertForSequenceClassification:
    return seeded(BertForSequenceClassification, small(BertConfig, **{**BERT, **more}))


def roberta_classifier() -> RobertaForSequenceClassification:
    return seeded(RobertaForSequenceClassification, small(RobertaConfig, **BERT))


def distilbert_classifier(**more: Any) -> DistilBertForSequenceClassification:
    sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 16}
    return seeded(DistilBertForSequenceClassification, small(DistilBertConfig, **{**sizes, **more}))


def roberta(**more: Any) -> RobertaModel:
    """Its position ids begin behind the padding id, 0 here."""
    return seeded(RobertaModel, small(RobertaConfig, **{**BERT, **more}))


def electra(**more: Any) -> ElectraModel:
    """Its embeddings are narrower than its layers."""
    return seeded(ElectraModel, small(ElectraConfig, **{**BERT, "embedding_size": 8, **more}))


def gpt2(**more: Any) -> GPT2LMHeadModel:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
    return seeded(GPT2LMHeadModel, small(GPT2Config, **{**sizes, **more}))


def gpt2_classifier(**more: Any) -> GPT2ForSequenceClassification:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    return seeded(GPT2ForSequenceClassification, small(GPT2Config, **{**sizes, **more}))


LLAMA = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def llama(**more: Any) -> LlamaModel:
    return seeded(LlamaModel, small(LlamaConfig, **{**LLAMA, **more}))


def llama_lm(**more: Any) -> LlamaForCausalLM:
    """With grouped-query attention: two heads share their keys and values."""
    grouped = {"num_key_value_heads": 1, "max_position_embeddings": 32, "eos_token_id": None}
    return seeded(LlamaForCausalLM, small(LlamaConfig, **{**LLAMA, **grouped, **more}))


def mistral_lm(**more: Any) -> MistralForCausalLM:
    """With a window of four tokens."""
    sizes = {**LLAMA, "num_key_value_heads": 1, "max_position_embeddings": 32, "sliding_window": 4}
    return seeded(MistralForCausalLM, small(MistralConfig, **{**sizes, "eos_token_id": None, **more}))


def gemma3_lm(**more: Any) -> Gemma3ForCausalLM:
    """With a window of four tokens in one of its two layers."""
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
    sizes = {**LLAMA, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32, **kinds}
    return seeded(Gemma3ForCausalLM, small(Gemma3TextConfig, **{**sizes, "eos_token_id": None, **more}))


def gpt_neox(**more: Any) -> GPTNeoXForCausalLM:
    sizes = {**LLAMA, "max_position_embeddings": 32, "eos_token_id": None}
    return seeded(GPTNeoXForCausalLM, small(GPTNeoXConfig, **{**sizes, **more}))


def opt(init_std: float = 0.4, **more: Any) -> OPTForCausalLM:
    """Its head calls the decoder past the trunk."""
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    rest = {"ffn_dim": 32, "max_position_embeddings": 32, "eos_token_id": None, "dropout": 0.0, "init_std": init_std}
    return seeded(OPTForCausalLM, small(OPTConfig, **{**sizes, **rest, **more}))


def bart(**more: Any) -> BartForConditionalGeneration:
    """Four layers over two; its decoder takes no position ids."""
    both = {"layers": 4, "attention_heads": 2, "ffn_dim": 32}
    sizes = {f"{half}_{key}": value for half in ("encoder", "decoder") for key, value in both.items()}
    rest = {"d_model": 16, "decoder_layers": 2, "max_position_embeddings": 32, "dropout": 0.0, "init_std": 0.4}
    tokens = {"decoder_start_token_id": 2, "forced_eos_token_id": None}
    return seeded(BartForConditionalGeneration, small(BartConfig, **{**sizes, **rest, **tokens, **more}))


def bloom(**more: Any) -> BloomModel:
    """Biases by distance, and no positions."""
    return seeded(BloomModel, small(BloomConfig, **{"hidden_size": 16, "n_layer": 2, "n_head": 2, **more}))


def deberta(**more: Any) -> DebertaV2Model:
    """Biases by distance, and no positions."""
    biases = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
    return seeded(DebertaV2Model, small(DebertaV2Config, **{**BERT, **biases, **more}))


def modernbert(**more: Any) -> ModernBertModel:
    """With a window of two tokens on either side in one of its two layers."""
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)
    kinds = {"global_attn_every_n_layers": 2, "local_attention": 4}
    return seeded(ModernBertModel, small(ModernBertConfig, **{**LLAMA, **kinds, **special, **more}))


T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}


def t5(**more: Any) -> T5ForConditionalGeneration:
    return seeded(T5ForConditionalGeneration, small(T5Config, **{**T5, **more}))


def t5_encoder(**more: Any) -> T5EncoderModel:
    return seeded(T5EncoderModel, small(T5Config, **{**T5, **more}))


def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=tokens).logits
