"""IA3: infused adapter by inhibiting and amplifying inner activations (Liu et al. 2022, section 3.3).

https://arxiv.org/abs/2205.05638. Three activations of each layer are rescaled, element by element, by vectors that
are learned: keys, values, and what lies between the two linear layers of the feed-forward block:

    softmax(Q (l_k ∘ K)ᵀ / √d_k) (l_v ∘ V)        (l_ff ∘ γ(W₁ x)) W₂

The vectors start at one, so that training starts from the pretrained model. A vector can be folded into the linear
layer that it stands behind (l ∘ (W x + b)) or before (W (l ∘ x) + b), and inference costs what it did.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_ft.callbacks.finetuning import AdapterDtype, FineTuning
from lightning_ft.injection import (
    Base,
    Injected,
    InjectionError,
    Layer,
    ends_with,
    exactly,
    first_tensor,
    inject_layers,
    is_conv1d,
    match_names,
    plain,
    resolve_targets,
)

# ---------------------------------------------------------------------------------------------- the maths


class IA3Layer(Injected):
    """A linear layer with a vector ``l`` that rescales what comes out of it, or what goes in."""

    method = "IA3"
    acts_on = "weights"
    slot = "ia3"
    adds: ClassVar[Mapping[str, str]] = {"ia3_l": "ia3_l"}
    as_vectors = ("ia3_l",)

    ia3: str
    """What is rescaled: ``"output"`` or ``"input"``."""
    ia3_l: nn.Parameter
    """l, as in PEFT's files: (out, 1) for outputs, (1, in) for inputs."""
    bias: Tensor | None

    def folded(self, weight: Tensor) -> dict[str, Tensor]:
        """``W`` with its rows (for inputs its columns) times ``l``; it broadcasts over the other dimension."""
        return {"weight": weight * (self.ia3_l.T if is_conv1d(self) else self.ia3_l)}  # type: ignore[arg-type]

    @classmethod
    def vectors(cls, layers: Sequence[Any], index: Tensor) -> Callable[[Tensor], Tensor]:
        """A function that rescales (rows, …, n) by the l of the layer of each row: ``layers[index[i]]``, None for 1."""
        some = next(layer.ia3_l for layer in layers if layer is not None)
        l_rows = torch.stack([torch.ones_like(some) if layer is None else layer.ia3_l for layer in layers])[index]

        def rescale(x: Tensor) -> Tensor:
            return (x.reshape(len(index), -1, x.shape[-1]) * l_rows.flatten(1)[:, None]).view(x.shape).to(x.dtype)

        return rescale

    @staticmethod
    def start(shape: tuple[int, int], ones: bool) -> dict[str, Tensor]:
        """Values for what is added: ones, or for tests, random ones."""
        return {"ia3_l": torch.ones(shape) if ones else torch.randn(shape)}


class IA3Output(IA3Layer):
    """``h = l ∘ (W x + b)``, for keys and values."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in) to (..., out)."""
        out: Tensor = super().forward(*args, **kwargs)  # type: ignore[misc]
        return (out * self.ia3_l.flatten()).to(out.dtype)

    def folded(self, weight: Tensor) -> dict[str, Tensor]:
        """``l ∘ W`` and ``l ∘ b``."""
        bias = {} if self.bias is None else {"bias": self.bias.detach() * self.ia3_l.flatten()}
        return {**super().folded(weight), **bias}

    @classmethod
    def for_rows(cls, layers: Sequence[Any], index: Tensor) -> Callable[..., Tensor]:
        """``h_i = l_i ∘ (W x_i + b)`` for row i."""
        rescale = cls.vectors(layers, index)
        return lambda base, *args, **kwargs: rescale(base(*args, **kwargs))


class IA3Input(IA3Layer):
    """``h = W (l ∘ x) + b``, for the second linear layer of a feed-forward block."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in) to (..., out)."""
        return _with_input(lambda x: (x * self.ia3_l.flatten()).to(x.dtype), super().forward, args, kwargs)  # type: ignore[misc]

    @classmethod
    def for_rows(cls, layers: Sequence[Any], index: Tensor) -> Callable[..., Tensor]:
        """``h_i = W (l_i ∘ x_i) + b`` for row i."""
        rescale = cls.vectors(layers, index)
        return lambda base, *args, **kwargs: _with_input(rescale, base, args, kwargs)


def _with_input(
    change: Callable[[Tensor], Tensor], forward: Callable[..., Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor:
    """What ``forward`` gives for these arguments with its input changed, whether that is named or not."""
    x = first_tensor(args, kwargs)
    changed = change(x)
    return forward(
        *(changed if value is x else value for value in args),
        **{key: changed if value is x else value for key, value in kwargs.items()},
    )


def sizes(module: Any) -> tuple[int, int]:
    """The numbers of inputs and outputs of a linear layer."""
    n_in, n_out = module.weight.shape if is_conv1d(module) else (module.in_features, module.out_features)
    return n_in, n_out


def is_linear(module: nn.Module) -> bool:
    """Whether IA3 can rescale it: ``nn.Linear`` and Hugging Face's ``Conv1D``."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


# -------------------------------------------------------------------------------------------- the callback

# Whose outputs and whose inputs are rescaled by default, in each architecture's own names: PEFT's tables, and below
# them some families that name their layers alike.
_USUAL: dict[str, tuple[str, str]] = {
    "bert": ("key value", "output.dense"),
    "roberta": ("key value", "output.dense"),
    "deberta-v2": ("key_proj value_proj", "output.dense"),
    "deberta": ("in_proj", "output.dense"),
    "t5": ("k v", "wo"),
    "mt5": ("k v wi_1", ""),
    "gpt2": ("c_attn", "mlp.c_proj"),
    "gpt_bigcode": ("c_attn", "mlp.c_proj"),
    "gpt_neo": ("q_proj v_proj", "c_proj"),
    "gpt_neox": ("query_key_value", "dense_4h_to_h"),
    "gptj": ("q_proj v_proj", "fc_out"),
    "bloom": ("query_key_value", "mlp.dense_4h_to_h"),
    **dict.fromkeys("falcon RefinedWeb RefinedWebModel".split(), ("query_key_value", "dense_4h_to_h")),
    "opt": ("q_proj k_proj", "fc2"),
    "bart": ("q_proj v_proj", "fc2"),
    "phi": ("q_proj v_proj", "fc2"),
    **dict.fromkeys("llama mistral".split(), ("k_proj v_proj", "down_proj")),
    **dict.fromkeys("llama4 gemma gemma2 gemma3_text qwen2 qwen3".split(), ("q_proj v_proj", "down_proj")),
    "mixtral": ("k_proj v_proj", "w2"),
    **dict.fromkeys("xlm-roberta camembert electra".split(), ("key value", "output.dense")),
    "distilbert": ("k_lin v_lin", "ffn.lin2"),
}


def usual_modules(root: nn.Module) -> tuple[list[str], list[str]] | None:
    """The usual ``target_modules`` and, of them, ``feedforward_modules`` of this architecture, where it has some."""
    usual = _USUAL.get(getattr(getattr(root, "config", None), "model_type", ""))
    if usual is None:
        return None
    outputs, inputs = (names.split() for names in usual)
    return [*outputs, *inputs], inputs


class IA3(FineTuning):
    """Learned vectors that rescale activations (Liu et al. 2022, https://arxiv.org/abs/2205.05638).

    Args:
        target_modules: the linear layers to rescale: names or ends of names, a regular expression, or by default
            those of the architecture (:func:`lightning_ft.injection.resolve_targets`).
        feedforward_modules: which of them are rescaled at their input, written likewise; the others are at their
            output. By default those of the architecture; ``[]`` for none.
        exclude_modules: what of the targets is left out.
        init_ia3_weights: whether the vectors start at one. Random ones are for tests.
        modules_to_save, backbone, quantize, adapter_dtype: see :class:`~lightning_ft.callbacks.finetuning.FineTuning`.

    Raises:
        InjectionError: on injection: see :meth:`FineTuning.inject`; and if the architecture isn't known and the
            modules aren't named.
    """

    peft_type: ClassVar[str] = "IA3"
    plausible_lr: ClassVar[tuple[float, float]] = (1e-3, 1e-1)
    layers: ClassVar[tuple[type[Injected], ...]] = (IA3Output, IA3Input)

    def __init__(
        self,
        target_modules: str | Sequence[str] | None = None,
        feedforward_modules: str | Sequence[str] | None = None,
        *,
        exclude_modules: str | Sequence[str] | None = None,
        init_ia3_weights: bool = True,
        modules_to_save: Sequence[str] | None = None,
        backbone: str | None = None,
        quantize: str | Mapping[str, Any] | None = None,
        adapter_dtype: AdapterDtype = "float32",
    ) -> None:
        super().__init__(modules_to_save, backbone, quantize, adapter_dtype=adapter_dtype)
        self.target_modules, self.feedforward_modules = target_modules, feedforward_modules
        self.exclude_modules = exclude_modules
        self.init_ia3_weights = init_ia3_weights

    def inject(self, model: nn.Module) -> list[str]:
        """Freeze the base and put the vectors into it; see :meth:`FineTuning.inject`."""
        base, saved = self.prepare(model)
        usual = usual_modules(base.root)
        if usual is None and (self.target_modules is None or self.feedforward_modules is None):
            raise InjectionError(
                f"Which modules of {type(base.root).__name__} are keys, values and the second linear layers of its"
                " feed-forward blocks isn't known here. Name them all as target_modules, and the last as"
                " feedforward_modules too ([] for none): IA3(['key', 'value', 'fc2'], ['fc2'])."
            )
        targets, feedforward = usual or ([], [])
        names = resolve_targets(base, self.target_modules or targets, is_linear, saved, self.exclude_modules)
        if self.feedforward_modules is not None:
            inputs = match_names(self.feedforward_modules, names, "feedforward_modules")
            if self.feedforward_modules and not inputs:
                raise InjectionError(f"feedforward_modules={self.feedforward_modules!r} names none of the targets.")
        else:
            inputs = [name for name in names if any(ends_with(name, end) for end in feedforward)]
        plan = {}
        for name in names:
            n_in, n_out = sizes(base.root.get_submodule(name))
            kind, what, shape = (IA3Input, "input", (1, n_in)) if name in inputs else (IA3Output, "output", (n_out, 1))
            plan[name] = Layer(kind, what, partial(kind.start, shape, self.init_ia3_weights))
        return inject_layers(base, plan, "IA3", saved, dtype=self.added_dtype)

    # ---------------------------------------------------------------------------------- in PEFT's files

    @staticmethod
    def to_peft(layers: Mapping[str, Injected], base: Base) -> dict[str, Any]:
        """The fields of PEFT's ``adapter_config.json`` for these layers, by path."""
        return {
            "target_modules": list(layers),
            "feedforward_modules": [name for name, layer in layers.items() if isinstance(layer, IA3Input)],
            "fan_in_fan_out": any(is_conv1d(base.root.get_submodule(name)) for name in layers),
            "init_ia3_weights": True,
        }

    @classmethod
    def from_peft(
        cls, config: Mapping[str, Any], targets: Sequence[str], modules_to_save: Sequence[str], backbone: str | None
    ) -> IA3:
        """The method that PEFT's ``config`` describes, on the modules that its tensors belong to."""
        named = config.get("feedforward_modules") or []
        inputs = [
            name
            for name in targets
            if (re.fullmatch(named, plain(name)) if isinstance(named, str) else plain(name).endswith(tuple(named)))
        ]
        return cls(
            exactly(targets),
            exactly(inputs) if inputs else [],
            modules_to_save=modules_to_save,
            backbone=backbone,
        )
