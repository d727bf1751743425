"""LoRA: low-rank adaptation (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

The pretrained weight W stays as it is; beside it a product of two thin matrices is trained (equation 3):

    h = W x + (alpha / r) · B A x        W (out, in), A (r, in), B (out, r)

A starts random and B at zero, so that training starts from the pretrained model. After training the product
can be folded into W, and inference costs what it did.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ft.callbacks.finetuning import FineTuning
from lightning_ft.injection import (
    Injected,
    InjectionError,
    attach,
    check_attachable,
    find_base,
    freeze_base,
    is_conv1d,
    match_modules,
    resolve_targets,
)

Init = Literal["kaiming", "gaussian"]

# ---------------------------------------------------------------------------------------------- the maths


@dataclass(frozen=True)
class LoRASettings:
    """What a LoRA layer needs to know: rank, alpha and the dropout on its input."""

    r: int
    alpha: float
    dropout: float = 0.0

    @property
    def scaling(self) -> float:
        """alpha / r."""
        return self.alpha / self.r

    def __str__(self) -> str:
        return f"(r={self.r}, alpha={self.alpha:g}, dropout={self.dropout:g})"


class LoRALayer(Injected):
    """``h = W x + (alpha / r) · B A dropout(x)``, beside whatever the module itself computes."""

    method = "LORA"
    slot = "lora"
    adds: ClassVar[Mapping[str, str]] = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}

    lora: LoRASettings
    lora_A: nn.Parameter  # (r, in)
    lora_B: nn.Parameter  # (out, r)
    weight: Tensor
    training: bool

    def forward(self, input: Tensor) -> Tensor:
        """The module's own output plus the low-rank one; shapes are the module's."""
        out = super().forward(input)  # type: ignore[misc]
        # The adapter computes in its own precision, fp32 unless autocast says otherwise.
        return out + (self.lora.scaling * self.low_rank(input)).to(out.dtype)

    def low_rank(self, x: Tensor) -> Tensor:
        """``B A dropout(x)``: (..., in) to (..., out)."""
        x = F.dropout(x.to(self.lora_A.dtype), self.lora.dropout, self.training)
        return F.linear(F.linear(x, self.lora_A), self.lora_B)

    def delta(self) -> Tensor:
        """``(alpha / r) · B A`` in the shape of the module's weight."""
        return self.lora.scaling * (self.lora_B @ self.lora_A)

    @torch.no_grad()
    def fold(self) -> None:
        """``W ← W + (alpha / r) · B A``, summed in fp32 or more."""
        self.weight.copy_(self.weight + self.delta())  # torch adds in the wider of the two dtypes

    @staticmethod
    def sizes(module: Any) -> tuple[int, int]:
        """(in, out) of the module to adapt."""
        return module.in_features, module.out_features

    @staticmethod
    def start(a: Tensor, b: Tensor, init: Init) -> None:
        """A random, B zero."""
        if init == "gaussian":
            nn.init.normal_(a, std=1 / a.shape[0])
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        nn.init.zeros_(b)


class LoRALinear(LoRALayer):
    """LoRA on ``nn.Linear``."""


class LoRAConv1D(LoRALayer):
    """LoRA on Hugging Face's ``Conv1D``, whose weight is stored as (in, out)."""

    def delta(self) -> Tensor:
        """``(alpha / r) · (B A)ᵀ``."""
        return super().delta().T

    @staticmethod
    def sizes(module: Any) -> tuple[int, int]:
        """(in, out) of the module to adapt."""
        return tuple(module.weight.shape)


class LoRAEmbedding(LoRALayer):
    """LoRA on ``nn.Embedding``: a row of W plus ``(alpha / r) · B A[:, token]``; A (r, tokens), B (width, r)."""

    adds: ClassVar[Mapping[str, str]] = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}
    padding_idx: int | None

    def low_rank(self, x: Tensor) -> Tensor:
        """(...) token ids to (..., width). There is no dropout, since ids have none."""
        return F.embedding(x, self.lora_A.T, self.padding_idx) @ self.lora_B.T

    def delta(self) -> Tensor:
        """``(alpha / r) · (B A)ᵀ``. A padding row gets no gradient, so that its column of A stays zero."""
        return super().delta().T

    @staticmethod
    def sizes(module: Any) -> tuple[int, int]:
        """(in, out) of the module to adapt."""
        return module.num_embeddings, module.embedding_dim

    @staticmethod
    def start(a: Tensor, b: Tensor, init: Init) -> None:  # noqa: ARG004
        """A zero, B random, as in the authors' own code: rows of A are met one at a time."""
        nn.init.zeros_(a)
        nn.init.normal_(b)


def layer_for(module: nn.Module) -> type[LoRALayer] | None:
    """The LoRA layer for this kind of module, or None."""
    if isinstance(module, nn.Linear):
        return LoRALinear
    if isinstance(module, nn.Embedding):
        # One with a forward of its own (a scaled one) does more than look rows up.
        return LoRAEmbedding if type(module).forward in (nn.Embedding.forward, LoRALayer.forward) else None
    return LoRAConv1D if is_conv1d(module) else None


# -------------------------------------------------------------------------------------------- the function


def inject_lora(
    model: nn.Module,
    r: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] | None = None,
    init_lora_weights: Init = "kaiming",
    modules_to_save: Sequence[str] | None = None,
    backbone: str | None = None,
) -> list[str]:
    """Freeze the base of ``model`` and put LoRA into it, in place.

    Args and errors are those of :class:`LoRA`.

    Returns:
        Paths of the adapted modules in ``model``.
    """
    settings = _checked(r, alpha, dropout, init_lora_weights)
    base = find_base(model, backbone)
    saved = match_modules(base, modules_to_save)
    names = resolve_targets(base, target_modules, lambda m: layer_for(m) is not None, excluded=saved)
    present = [name for name, module in base.named_modules() if isinstance(module, LoRALayer)]
    if present and set(present) != set(names):
        raise InjectionError(
            f"The model already carries LoRA on {len(present)} modules ({', '.join(present[:3])}, …), and"
            f" target_modules={target_modules!r} names {len(names)} others. Merge or remove it first."
        )
    _refuse_tied(base.root, names)
    for name in names:
        check_attachable(base.root, name)
    freeze_base(base, saved)  # from here on nothing is refused, and the model changes
    for name in names:
        module = base.root.get_submodule(name)
        layer = layer_for(module)
        assert layer is not None
        n_in, n_out = layer.sizes(module)
        a, b = torch.empty(r, n_in), torch.empty(n_out, r)
        layer.start(a, b, init_lora_weights)
        attach(base.root, name, layer, settings, {"lora_A": a, "lora_B": b})
    return [base.prefixed(name) for name in names]


def _checked(r: int, alpha: float, dropout: float, init_lora_weights: Init) -> LoRASettings:
    if not isinstance(r, int) or r < 1:
        raise ValueError(f"LoRA: r must be a whole number of at least 1, not {r!r}.")
    if not isinstance(alpha, (int, float)) or not alpha > 0:
        raise ValueError(f"LoRA: alpha must be a number above 0, not {alpha!r}.")
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(f"LoRA: dropout must be a number in [0, 1), not {dropout!r}.")
    if init_lora_weights not in get_args(Init):
        raise ValueError(
            f"LoRA: init_lora_weights must be one of {', '.join(get_args(Init))}, not {init_lora_weights!r}."
        )
    return LoRASettings(r, alpha, dropout)


def _refuse_tied(root: nn.Module, names: Sequence[str]) -> None:
    """A weight that two modules share would be adapted in one of them and, once merged, changed in both."""
    owners: dict[int, list[str]] = {}
    for name, module in root.named_modules():
        if isinstance(weight := getattr(module, "weight", None), nn.Parameter):
            owners.setdefault(id(weight), []).append(name)
    for sharing in owners.values():
        if len(sharing) > 1 and (target := next((name for name in sharing if name in names), None)) is not None:
            other = next(name for name in sharing if name != target)
            raise InjectionError(
                f"'{target}' shares its weight with '{other}': LoRA would adapt the one, and a merge change both."
                f" Leave '{target}' out of target_modules, or untie the two (tie_word_embeddings=False)."
            )


# -------------------------------------------------------------------------------------------- the callback


class LoRA(FineTuning):
    """Low-rank adaptation of any LightningModule (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    ``L.Trainer(callbacks=[LoRA(r=8)])``, or without a Trainer ``LoRA(r=8).inject(model)``.

    Args:
        r: rank of the update.
        alpha: the update is scaled by alpha / r.
        dropout: probability of dropping an element of the adapter's input, in training.
        target_modules: what to adapt: names or ends of names, a regular expression, ``"all-linear"``,
            ``"attention"``, or by default the query and value projections of the architecture
            (:func:`lightning_ft.injection.resolve_targets`).
        init_lora_weights: how A starts: ``"kaiming"`` (uniform, as PEFT does by default) or ``"gaussian"`` (std 1/r).
        modules_to_save, backbone: see :class:`~lightning_ft.callbacks.finetuning.FineTuning`.

    Raises:
        ValueError: for a rank below 1, or a dropout outside [0, 1).
        InjectionError: on injection, see :meth:`FineTuning.inject`.
    """

    peft_type: ClassVar[str] = "LORA"
    default_lr: ClassVar[float] = 1e-3
    layers: ClassVar[tuple[type[LoRALayer], ...]] = (LoRALinear, LoRAConv1D, LoRAEmbedding)

    def __init__(
        self,
        r: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        target_modules: str | Sequence[str] | None = None,
        init_lora_weights: Init = "kaiming",
        modules_to_save: Sequence[str] | None = None,
        backbone: str | None = None,
    ) -> None:
        super().__init__(modules_to_save, backbone)
        _checked(r, alpha, dropout, init_lora_weights)
        self.r, self.alpha, self.dropout = r, alpha, dropout
        self.target_modules = target_modules
        self.init_lora_weights: Init = init_lora_weights

    def inject(self, model: nn.Module) -> list[str]:
        """Freeze the base and put LoRA into it; see :meth:`FineTuning.inject`."""
        return inject_lora(
            model,
            self.r,
            self.alpha,
            self.dropout,
            self.target_modules,
            self.init_lora_weights,
            self.modules_to_save,
            self.backbone,
        )

    # ---------------------------------------------------------------------------------- in PEFT's files

    @staticmethod
    def to_peft(layers: Mapping[str, Injected]) -> dict[str, Any]:
        """The fields of PEFT's ``adapter_config.json`` for these layers, by path."""
        settings = {layer.lora for layer in layers.values() if isinstance(layer, LoRALayer)}
        (common,) = settings  # injection refuses a second one
        return {
            "r": common.r,
            "lora_alpha": common.alpha,
            "lora_dropout": common.dropout,
            "target_modules": list(layers),
            "fan_in_fan_out": any(isinstance(layer, LoRAConv1D) for layer in layers.values()),
            "bias": "none",
            "init_lora_weights": True,
        }

    @classmethod
    def from_peft(
        cls, config: Mapping[str, Any], targets: Sequence[str], modules_to_save: Sequence[str], backbone: str | None
    ) -> LoRA:
        """The method that PEFT's ``config`` describes, on the modules that its tensors belong to.

        Raises:
            ValueError: for variants of LoRA that change the equation and aren't known here.
        """
        variants = (
            "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "lora_bias", "use_qalora", "use_bdlora",
            "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "layer_replication",
            "target_parameters", "trainable_token_indices",
        )  # fmt: skip
        changes_base = ("pissa", "corda", "olora", "loftq", "lora_ga")
        unknown = {
            **dict.fromkeys(variants, bool),
            "bias": lambda value: value not in (None, "none"),
            "init_lora_weights": lambda value: str(value).startswith(changes_base),
        }
        found = [key for key, changes in unknown.items() if changes(config.get(key))]
        if found:
            raise ValueError(f"This LoRA adapter uses {', '.join(found)}, which this version can't load.")
        return cls(
            config.get("r", 8),  # PEFT's own default
            config.get("lora_alpha", 8),
            config.get("lora_dropout", 0.0),
            f"(?:{'|'.join(map(re.escape, targets))})",  # these paths, and none that ends like one of them
            modules_to_save=modules_to_save,
            backbone=backbone,
        )
