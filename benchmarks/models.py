"""The models: random ones of two shapes, and over the weights of one base our method's and PEFT's, of like values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

from benchmarks.measure import largest_difference
from lightning_ft.callbacks.recompute import Recomputation
from lightning_ft.injection import Injected, injected_modules
from lightning_ft.ops import ask_to_pack

OF_BERT = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
OF_LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _pack(model: Any) -> None:
    ask_to_pack([module for module in model.modules() if isinstance(module, Injected)])


OPT_IN: dict[str, Callable[[Any], Any]] = {
    "ours, packed": _pack,
    "ours, recompute": Recomputation,
    "ours, packed, recompute": lambda model: (_pack(model), Recomputation(model)),
}
"""What can be asked for beside the defaults, by its name in the tables: does it to an injected model."""


@dataclass(frozen=True)
class Size:
    """How large the models and batches are.

    Attributes:
        bert, llama: of the configs.
        rows, tokens: of a batch for the encoder.
        few_rows, few_tokens: of a small one.
        lm_rows, lm_tokens: of one for the language model.
        new_tokens: to generate.
        adapters: how many share a batch.
        data, model: for whole epochs; the model's folder, None for MiniLM.
    """

    bert: Mapping[str, Any]
    llama: Mapping[str, Any]
    rows: int
    tokens: int
    few_rows: int
    few_tokens: int
    lm_rows: int
    lm_tokens: int
    new_tokens: int
    adapters: tuple[int, ...]
    data: str = "bundled:reviews_en"
    model: str | None = None


FULL = Size(
    bert={"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    llama={
        "hidden_size": 768, "num_hidden_layers": 4, "num_attention_heads": 12, "intermediate_size": 2048,
        "vocab_size": 32_000,
    },
    rows=32, tokens=128, few_rows=4, few_tokens=32, lm_rows=4, lm_tokens=512, new_tokens=32, adapters=(8, 32),
)  # fmt: skip
TINY = Size(
    bert={
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "vocab_size": 200,
    },
    llama={  # as wide as one block of 4 bits: bitsandbytes (0.50) misreads on CPUs what is narrower
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
        "vocab_size": 200,
    },
    rows=3, tokens=8, few_rows=2, few_tokens=4, lm_rows=2, lm_tokens=8, new_tokens=3, adapters=(2,),
)  # fmt: skip


def bert(size: Size) -> Any:
    """A frozen random classifier of two labels."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**size.bert, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return transformers.BertForSequenceClassification(config).requires_grad_(False).train()


def llama(size: Size, dtype: torch.dtype = torch.float32, in_4_bits: bool = False) -> Any:
    """A frozen random language model."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**size.llama, use_cache=False)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False).train()
    return to_nf4(model) if in_4_bits else model


def to_nf4(model: Any) -> Any:
    """Its linear layers but the head in NF4, as transformers makes them of a BitsAndBytesConfig."""
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in OF_LLAMA:
            layer = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=module.weight.dtype,
                quant_type="nf4", device="meta",
            )  # fmt: skip
            packed = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            layer.weight = packed.to(module.weight.device)
            # Or a forward pass in evaluation packs the weights anew, and the next step of training fails.
            layer.support_avx512bf16_for_cpu = False
            model.set_submodule(name, layer)
    model.is_loaded_in_4bit = True  # PEFT asks it
    return model


def twin(model: Any, own: str = "classifier") -> Any:
    """A second tree of modules over the same weights, but for a head of its own."""
    tensors = chain(model.named_parameters(), model.named_buffers())
    shared = {id(tensor): tensor for name, tensor in tensors if not name.startswith(own)}
    return copy.deepcopy(model, shared)


def pair(base: Any, method: Any, settings: peft.PeftConfig, opt_in: bool = False) -> dict[str, Any]:
    """PEFT's model, and ours with the same values in what was injected, random ones; with what can be asked for too."""
    theirs = peft.get_peft_model(twin(base), settings)
    given = _of_peft(theirs)
    models = {"PEFT": theirs}
    with torch.no_grad():
        for parameter in given.values():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
        for name, prepare in {"ours": lambda _: None, **(OPT_IN if opt_in else {})}.items():
            models[name] = model = twin(base)
            method.inject(model)
            for key, parameter in _matched(_of_ours(model), given).items():
                parameter.copy_(given[key].view_as(parameter))
            prepare(model)
    return {name: model.train() for name, model in models.items()}


def limit(base: Any) -> Any:
    """The frozen base: a forward pass, and the gradient of what the first layer is given."""
    model = twin(base)
    model.get_input_embeddings().register_forward_hook(lambda _, __, out: out.requires_grad_())
    return model


def gradient_difference(ours: Any, theirs: Any) -> float:
    """How far the gradients of what was injected are from PEFT's, after a backward pass of both."""
    given: dict[str, Any] = {key: parameter.grad for key, parameter in _of_peft(theirs).items()}
    return largest_difference(
        {key: parameter.grad for key, parameter in _matched(_of_ours(ours), given).items()}, given
    )


def _of_ours(model: nn.Module) -> dict[str, nn.Parameter]:
    """What was injected, by its names in PEFT's files."""
    return {
        f"{path}.{key}".removesuffix(".weight"): getattr(layer, name)
        for path, layer in injected_modules(model)
        for name, key in layer.adds.items()
    }


def _of_peft(model: nn.Module) -> dict[str, nn.Parameter]:
    """The same of PEFT's; not the head, of which it keeps copies."""
    return {
        name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight"): parameter
        for name, parameter in model.named_parameters()
        if ".default" in name and "modules_to_save" not in name and parameter.requires_grad
    }


def _matched(ours: dict[str, nn.Parameter], theirs: Mapping[str, Tensor | nn.Parameter | None]) -> dict[str, Any]:
    """Ours by the names of theirs; a prompt is the only one of its model, and goes by several names."""
    if len(ours) == len(theirs) == 1:
        return dict(zip(theirs, ours.values(), strict=True))
    if set(ours) != set(theirs):
        raise AssertionError(f"not the same parameters: {sorted(set(ours) ^ set(theirs))[:6]}")
    return ours
