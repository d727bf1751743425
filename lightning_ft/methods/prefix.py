"""Prefix tuning (Li & Liang 2021, https://arxiv.org/abs/2101.00190).

Every layer's attention sees n keys and values, trained, before those of the text X; the model itself is frozen:

    softmax(Q [P_K; K]ᵀ / √d) [P_V; V]        P_K, P_V (n, d) in each layer (section 4.1, as keys and values)

With ``prefix_projection`` an MLP computes them from inputs E (n, d), which trains more steadily (section 4.3):

    [P_K; P_V of all layers] = W₂ tanh(W₁ E)

Once trained, what it computes is a plain prefix, and as such it is saved. Tokens stand n positions further on, as
behind a prefix in the cache, which is how PEFT does it. Here it is put in where attention gives its keys and values to
the cache and takes them back: the user's masks and caches are for the user's tokens alone, any cache will do, and
gradient checkpointing works.

Of an encoder-decoder the decoder's self-attention sees the prefix. Its layer i has pair 2i mod L of the L pairs that
there are, one for each of the encoder's layers, so that with an even L every second goes unused: as in PEFT. Where
attention has a sliding window the prefix stays in sight; with PEFT the window leaves it behind in longer texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ft.callbacks.finetuning import AdapterDtype, FineTuning, check_count
from lightning_ft.errors import UserError
from lightning_ft.injection import (
    Base,
    Injected,
    InjectionError,
    Layer,
    Trunk,
    VirtualTokens,
    find_trunk,
    inject_layers,
    trunk_at,
)

# ---------------------------------------------------------------------------------------------- the maths


@dataclass(frozen=True, kw_only=True)
class PrefixSettings(VirtualTokens):
    """How many virtual tokens there are, and what of the trunk their layer needs to know."""

    num_layers: int
    num_heads: int  # of keys and values
    num_transformer_submodules: int  # 2 in an encoder-decoder


class PrefixLayer(Injected):
    """A trunk whose attention sees a prefix in every layer."""

    method = "PREFIX_TUNING"
    acts_on = "inputs"
    slot = "prefix_settings"
    adds: ClassVar[Mapping[str, str]] = {"prefix_embeddings": "prompt_embeddings"}

    prefix_settings: PrefixSettings
    prefix_embeddings: nn.Parameter  # (virtual tokens, layers · 2 · heads · head width)
    config: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The trunk's own outputs.

        Of ``attentions`` the prefix's columns are left out; what a row lacks of 1 went to the prefix.

        Raises:
            ValueError: if prefix and tokens are more than the model has positions for.
        """
        n, trunk = self.prefix_settings.num_virtual_tokens, self.prefix_settings.trunk
        inputs = trunk.bound(args, kwargs)
        tokens, past = trunk.tokens(inputs).shape[1], inputs.get("past_key_values")
        seen = int(past.get_seq_length()) if past is not None else 0
        trunk.check_length(seen + tokens, n)
        if "position_ids" in trunk.arguments:
            inputs["position_ids"] = trunk.positions(inputs, tokens, seen, shift=n)
        return_dict = inputs.pop("return_dict", None)
        prefix = _Prefix(self)
        out = super().forward(**inputs, prefix=prefix, return_dict=True)  # type: ignore[misc]
        if not prefix.reached:
            raise InjectionError(f"{type(self).__name__} keeps the prefix from its attention: use another method.")
        if out.get("attentions") is not None:
            out["attentions"] = tuple(a[..., n:] for a in out["attentions"])
        return out.to_tuple() if not (self.config.return_dict if return_dict is None else return_dict) else out

    def prefix_of_layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """The keys and the values of a layer: (heads, virtual tokens, head width) each."""
        settings = self.prefix_settings
        pair = settings.num_transformer_submodules * layer % settings.num_layers
        both = self.flat_prefix(pair).view(settings.num_virtual_tokens, 2, settings.num_heads, -1)
        keys, values = both.permute(1, 2, 0, 3)
        return keys, values

    def flat_prefix(self, pair: int) -> Tensor:
        """The same as it is trained: (virtual tokens, 2 · heads · head width)."""
        return self.prefix_embeddings.chunk(self.prefix_settings.num_layers, dim=1)[pair]

    @classmethod
    def start_prefix(cls, n: int, width: int, layers: int, hidden: int | None) -> dict[str, Tensor]:  # noqa: ARG003
        """Random values, as PEFT's."""
        return {"prefix_embeddings": torch.randn(n, layers * 2 * width)}

    @classmethod
    def file_key(cls, prefix: str, path: str, name: str) -> str:  # noqa: ARG003
        """PEFT's name of the prefix, which stands alone."""
        return name


class ProjectedPrefix(PrefixLayer):
    """The prefix is what an MLP makes of its inputs, and both are trained."""

    adds: ClassVar[Mapping[str, str]] = {
        "prefix_inputs": "prompt_embeddings",
        # Of what computes the prefix PEFT's files hold nothing.
        **{f"prefix_mlp_{i}_{kind}": f"mlp_{i}_{kind}" for i in (0, 1) for kind in ("weight", "bias")},
    }

    prefix_inputs: nn.Parameter  # E: (virtual tokens, width)
    prefix_mlp_0_weight: nn.Parameter  # W₁: (hidden, width)
    prefix_mlp_0_bias: nn.Parameter
    prefix_mlp_1_weight: nn.Parameter  # W₂: (layers · 2 · width, hidden)
    prefix_mlp_1_bias: nn.Parameter

    def flat_prefix(self, pair: int) -> Tensor:
        """What the MLP makes of the inputs for a layer: (virtual tokens, 2 · width)."""
        # By the layer, so that each has a graph of its own, which gradient checkpointing can run through again.
        layers = self.prefix_settings.num_layers
        weight, bias = (p.chunk(layers)[pair] for p in (self.prefix_mlp_1_weight, self.prefix_mlp_1_bias))
        hidden = torch.tanh(F.linear(self.prefix_inputs, self.prefix_mlp_0_weight, self.prefix_mlp_0_bias))
        return F.linear(hidden, weight, bias)

    @classmethod
    def start_prefix(cls, n: int, width: int, layers: int, hidden: int | None) -> dict[str, Tensor]:
        """Inputs and MLP as PEFT starts them."""
        hidden = hidden or width
        mlp = (nn.Linear(width, hidden), nn.Linear(hidden, layers * 2 * width))
        values = {f"prefix_mlp_{i}_{kind}": p for i, part in enumerate(mlp) for kind, p in part.state_dict().items()}
        return {"prefix_inputs": torch.randn(n, width), **values}

    @classmethod
    def in_files(cls, layer: Any) -> dict[str, Tensor]:
        """The prefix that was computed; how is of no more use."""
        layers = range(layer.prefix_settings.num_layers)
        return {"prompt_embeddings": torch.cat([layer.flat_prefix(i).detach() for i in layers], dim=1)}


@dataclass
class _Prefix:
    """What a trunk's forward sends to its attention."""

    trunk: PrefixLayer
    reached: bool = False


_PASTS, _MASKS = ("past_key_values", "layer_past"), ("attention_mask", "mask")
"""What attention calls the cache and the mask that it is given."""

_COUNTED = "past_key_values_length"
"""What embeddings of places call the number of tokens in the cache."""


class PrefixAttention(Injected):
    """A self-attention that sees the prefix of its layer before its own keys and values."""

    method = "PREFIX_TUNING"
    acts_on = "inputs"
    slot = "prefix_arguments"
    adds: ClassVar[Mapping[str, str]] = {}

    prefix_arguments: tuple[str, ...]
    config: Any
    layer_idx: int
    is_causal: bool

    def forward(self, *args: Any, prefix: _Prefix | None = None, **kwargs: Any) -> Any:
        """The attention's own outputs; of (batch, heads, queries, n + keys) weights where it gives them."""
        inputs = {**dict(zip(self.prefix_arguments[: len(args)], args, strict=True)), **kwargs}
        if prefix is not None:  # else the attention was called by itself
            prefix.reached = True
            past, mask = (next(name for name in names if name in self.prefix_arguments) for names in (_PASTS, _MASKS))
            cache = inputs.get(past)
            cache = getattr(cache, "self_attention_cache", cache)
            inputs[past] = _Prefixed(prefix.trunk.prefix_of_layer(self.layer_idx), cache)
            inputs[mask] = self._mask_with_prefix(inputs, inputs.get(mask), cache, prefix.trunk.prefix_settings)
        return super().forward(**inputs)  # type: ignore[misc]

    def _mask_with_prefix(
        self, inputs: Mapping[str, Any], mask: Any, cache: Any, settings: PrefixSettings
    ) -> Tensor | None:
        queries = inputs["hidden_states"].shape[1]
        causal = getattr(self, "is_causal", True) if inputs.get("is_causal") is None else inputs["is_causal"]
        if mask is None and causal and queries > 1 and self.config._attn_implementation == "sdpa":
            # Without a mask sdpa takes the first query for one that sees the first key alone: the prefix's.
            keys = cache.get_mask_sizes(queries, self.layer_idx)[0] if cache is not None else queries
            mask = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=inputs["hidden_states"].device).tril()
        if mask is None:
            return None
        if not isinstance(mask, Tensor):
            raise UserError(
                f"Prefix tuning knows masks that are tensors, not {type(mask).__name__}: use sdpa or eager."
            )
        shown = mask.new_ones if mask.dtype == torch.bool or mask.ndim == 2 else mask.new_zeros
        return torch.cat([shown(*mask.shape[:-1], settings.num_virtual_tokens), mask], dim=-1)


class PrefixPositions(Injected):
    """Embeddings of places that a decoder without position_ids counts by the cache alone: the prefix counts too."""

    method = "PREFIX_TUNING"
    acts_on = "inputs"
    slot = "prefix_positions"
    adds: ClassVar[Mapping[str, str]] = {}

    prefix_positions: tuple[int, tuple[str, ...]]  # how many virtual tokens there are; forward's arguments

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The embeddings, n places further on."""
        n, arguments = self.prefix_positions
        inputs = {**dict(zip(arguments[: len(args)], args, strict=True)), **kwargs}
        moved = {key: inputs[key] + n for key in (_COUNTED, "position_ids") if inputs.get(key) is not None}
        return super().forward(**{**inputs, **moved})  # type: ignore[misc]


@dataclass
class _Prefixed:
    """A cache, or none, to which a layer's attention gives its keys and values, and gets them with the prefix back."""

    prefix: tuple[Tensor, Tensor]
    cache: Any

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values: (batch, heads, n + tokens, head width) each."""
        if self.cache is not None:
            keys, values = self.cache.update(keys, values, *args, **kwargs)
        first_keys, first_values = (p.to(keys.dtype).expand(len(keys), -1, -1, -1) for p in self.prefix)
        return torch.cat([first_keys, keys], dim=2), torch.cat([first_values, values], dim=2)

    def get_seq_length(self, *args: Any) -> int:
        """How many tokens went before, the virtual ones too."""
        return self.prefix[0].shape[1] + (self.cache.get_seq_length(*args) if self.cache is not None else 0)


# ---------------------------------------------------------------------------------------------- the callback


class PrefixTuning(FineTuning):
    """Prefix tuning of a Hugging Face text model (Li & Liang 2021, https://arxiv.org/abs/2101.00190).

    For models whose attention takes a cache: the families of BERT, RoBERTa and Electra, GPT-2, Llama, Gemma, T5, BART
    and most language models; not DistilBERT, DeBERTa or BLOOM. Of an encoder-decoder the decoder has the prefix.

    Args:
        num_virtual_tokens: how many tokens the prefix has.
        prefix_projection: whether an MLP computes it; saved, it is a plain prefix, and loads as one.
        encoder_hidden_size: the MLP's width; by default that of the keys.
        modules_to_save, backbone, quantize, adapter_dtype: see :class:`~lightning_ft.callbacks.finetuning.FineTuning`.

    Raises:
        ValueError: for a value out of its range.
        InjectionError: on injection, if the base isn't such a model.
    """

    peft_type: ClassVar[str] = "PREFIX_TUNING"
    plausible_lr: ClassVar[tuple[float, float]] = (1e-4, 3e-1)
    layers: ClassVar[tuple[type[Injected], ...]] = (PrefixLayer, ProjectedPrefix, PrefixAttention, PrefixPositions)
    inside: ClassVar[str] = "base_model."

    def __init__(
        self,
        num_virtual_tokens: int = 20,
        prefix_projection: bool = False,
        encoder_hidden_size: int | None = None,
        modules_to_save: Sequence[str] | None = None,
        backbone: str | None = None,
        quantize: str | Mapping[str, Any] | None = None,
        adapter_dtype: AdapterDtype = "float32",
    ) -> None:
        super().__init__(modules_to_save, backbone, quantize, adapter_dtype=adapter_dtype)
        check_count("PrefixTuning: num_virtual_tokens", num_virtual_tokens)
        if encoder_hidden_size is not None:
            check_count("PrefixTuning: encoder_hidden_size", encoder_hidden_size)
        if encoder_hidden_size is not None and not prefix_projection:
            raise ValueError("PrefixTuning: encoder_hidden_size is the width of prefix_projection, which is off.")
        self.num_virtual_tokens = num_virtual_tokens
        self.prefix_projection = prefix_projection
        self.encoder_hidden_size = encoder_hidden_size

    def inject(self, model: nn.Module) -> list[str]:
        """Freeze the base and put a prefix into its attention; see :meth:`FineTuning.inject`."""
        base, saved = self.prepare(model)
        trunk, submodules = find_trunk(base, "PrefixTuning"), 1
        layers = config_of(base, trunk).num_hidden_layers
        if trunk.decoder is not None:
            trunk, submodules = trunk_at(base, trunk.decoder), 2
        config = config_of(base, trunk)
        attentions = self_attentions(base, trunk, config.num_hidden_layers)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        n, hidden = self.num_virtual_tokens, self.encoder_hidden_size
        layer = ProjectedPrefix if self.prefix_projection else PrefixLayer
        settings = PrefixSettings(
            n, trunk, hidden, num_layers=layers, num_heads=heads, num_transformer_submodules=submodules
        )
        plan = {trunk.name: Layer(layer, settings, partial(layer.start_prefix, n, width, layers, hidden))}
        plan |= {name: Layer(PrefixAttention, arguments, dict) for name, arguments in attentions.items()}
        plan |= {name: Layer(PrefixPositions, (n, arguments), dict) for name, arguments in counted(base, trunk).items()}
        return inject_layers(base, plan, "PrefixTuning", saved, dtype=self.added_dtype)

    # ---------------------------------------------------------------------------------- in PEFT's files

    @staticmethod
    def to_peft(layers: Mapping[str, Injected], base: Base) -> dict[str, Any]:  # noqa: ARG004
        """The fields of PEFT's ``adapter_config.json``."""
        settings = next(layer.prefix_settings for layer in layers.values() if isinstance(layer, PrefixLayer))
        flat = next(layer.flat_prefix(0) for layer in layers.values() if isinstance(layer, PrefixLayer))
        return {
            "num_virtual_tokens": settings.num_virtual_tokens,
            "token_dim": flat.shape[1] // 2,
            "num_layers": settings.num_layers,
            "num_attention_heads": settings.num_heads,
            "num_transformer_submodules": settings.num_transformer_submodules,
            "prefix_projection": False,
            "encoder_hidden_size": settings.encoder_hidden_size or flat.shape[1] // 2,
        }

    @classmethod
    def from_peft(
        cls,
        config: Mapping[str, Any],
        targets: Sequence[str],  # noqa: ARG003
        modules_to_save: Sequence[str],
        backbone: str | None,
    ) -> PrefixTuning:
        """The method that PEFT's ``config`` describes; its files hold a plain prefix."""
        return cls(config["num_virtual_tokens"], modules_to_save=modules_to_save, backbone=backbone)


def config_of(base: Base, trunk: Trunk) -> Any:
    """The trunk's config, whose numbers of layers and heads are the decoder's if it is one."""
    module: Any = base.root.get_submodule(trunk.name)
    return module.config.get_text_config(decoder="past_key_values" in trunk.arguments)


def self_attentions(base: Base, trunk: Trunk, num_layers: int) -> dict[str, tuple[str, ...]]:
    """The paths of the modules in which a trunk's layers attend to their own tokens, with their forwards' arguments.

    Raises:
        InjectionError: if there isn't one in every layer that takes a cache of keys and values.
    """
    module = base.root.get_submodule(trunk.name)
    takes: dict[str, tuple[int, tuple[str, ...]]] = {}
    for name, part in module.named_modules(prefix=trunk.name):
        index, arguments = getattr(part, "layer_idx", None), forward_arguments(part)
        takes_both = all(set(names) & set(arguments) for names in (_PASTS, _MASKS))
        # With a config of its own it attends by transformers' common functions.
        if takes_both and isinstance(index, int) and hasattr(part, "config"):
            takes[name] = (index, arguments)
    found: dict[int, tuple[str, tuple[str, ...]]] = {}
    for name, (index, arguments) in takes.items():
        if not any(other.startswith(f"{name}.") for other in takes):  # else it is a layer that passes them on
            found.setdefault(index, (name, arguments))  # behind it comes the attention to an encoder
    if sorted(found) != list(range(num_layers)):
        raise InjectionError(
            f"PrefixTuning puts keys and values before those of each self-attention, and {type(module).__name__} has"
            f" no place for them: of its {num_layers} layers {len(found)} take a cache as transformers' common"
            " attention does. Use PromptTuning or another method."
        )
    return dict(found.values())


def counted(base: Base, trunk: Trunk) -> dict[str, tuple[str, ...]]:
    """The paths of embeddings of places that only the cache counts, with their forwards' arguments."""
    modules = base.root.get_submodule(trunk.name).named_modules(prefix=trunk.name)
    arguments = {name: forward_arguments(module) for name, module in modules if "position_ids" not in trunk.arguments}
    return {name: names for name, names in arguments.items() if _COUNTED in names}


def forward_arguments(module: nn.Module) -> tuple[str, ...]:
    """Their names, in order."""
    return tuple(signature(module.forward).parameters)
