"""LoRA: low-rank adaptation (Hu et al. 2021, https://arxiv.org/abs/2106.09685), and its family.

The pretrained weight W stays as it is; beside it a product of two thin matrices is trained (equation 3):

    h = W x + s · B A x        W (out, in), A (r, in), B (out, r), s = alpha / r

A starts random and B at zero, so that training starts from the pretrained model. After training the product
can be folded into W, and inference costs what it did. The family changes one thing each:

    rsLoRA         s = alpha / √r                                    https://arxiv.org/abs/2312.03732, equation 7
    DoRA           h = m ∘ (W + s B A) x / ‖W + s B A‖, m trained    https://arxiv.org/abs/2402.09353, equation 5
    PiSSA, OLoRA   h = (W - s B₀ A₀) x + s B A x, starting at A = A₀ and B = B₀, the principal part of W
                   (https://arxiv.org/abs/2404.02948) or of its QR decomposition (https://arxiv.org/abs/2406.01775)
    LoRA+          B learns at a higher rate than A                  https://arxiv.org/abs/2402.12354
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_ft.callbacks.finetuning import (
    AdapterDtype,
    FineTuning,
    check_choice,
    check_count,
    check_dropout,
    check_number,
)
from lightning_ft.injection import (
    Base,
    Injected,
    InjectionError,
    Layer,
    exactly,
    find_base,
    first_tensor,
    inject_layers,
    is_conv1d,
    plain,
    resolve_targets,
)
from lightning_ft.ops import lora_linear
from lightning_ft.quantization import dense_weight, frozen_linear

Init = Literal["kaiming", "gaussian", "pissa", "olora"]
Bias = Literal["none", "all", "lora_only"]

# ---------------------------------------------------------------------------------------------- the maths


@dataclass(frozen=True)
class LoRASettings:
    """What a LoRA layer needs to know: rank, alpha, the dropout on its input, and how alpha scales."""

    r: int
    alpha: float
    dropout: float = 0.0
    use_rslora: bool = False

    @property
    def scaling(self) -> float:
        """alpha / r, or alpha / √r."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def __str__(self) -> str:
        rslora = ", rslora" if self.use_rslora else ""
        return f"(r={self.r}, alpha={self.alpha:g}, dropout={self.dropout:g}{rslora})"


class LoRALayer(Injected):
    """``h = W x + s · B A dropout(x)``, beside whatever the module itself computes."""

    method = "LORA"
    acts_on = "weights"
    slot = "lora"
    adds: ClassVar[Mapping[str, str]] = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
    out_axis: ClassVar[int] = 0
    """The dimension of the module's weight that is its output's."""

    lora: LoRASettings
    lora_A: nn.Parameter  # (r, in)
    lora_B: nn.Parameter  # (out, r)
    weight: Tensor

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The module's own output plus the low-rank one; shapes are the module's."""
        out = super().forward(*args, **kwargs)  # type: ignore[misc]
        # The adapter computes in its own precision, fp32 unless autocast says otherwise.
        return out + (self.lora.scaling * self.low_rank(first_tensor(args, kwargs))).to(out.dtype)

    def low_rank(self, x: Tensor) -> Tensor:
        """``B A dropout(x)``: (..., in) to (..., out)."""
        x = F.dropout(x.to(self.lora_A.dtype), self.lora.dropout, self.in_training)
        return self.project(x, self.lora_A, self.lora_B)

    def project(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """``B A x``."""
        return F.linear(F.linear(x, a), b)

    def delta(self) -> Tensor:
        """``s · B A`` in the shape of the module's weight."""
        return self.lora.scaling * self.product(self.lora_A, self.lora_B)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """``B A`` in the shape of the module's weight."""
        return b @ a

    def folded(self, weight: Tensor) -> dict[str, Tensor]:
        """``W + s · B A``, summed in fp32 or more."""
        return {"weight": weight + self.delta()}  # torch adds in the wider of the two dtypes

    def squared_change(self, weight: Tensor) -> Tensor:
        """``‖s B A‖² = s² Σ (A Aᵀ) ∘ (Bᵀ B)``: products of r x r, and no weight is written out."""
        a, b = self.lora_A.flatten(1), self.lora_B.flatten(1)
        return self.lora.scaling**2 * ((a @ a.T) * (b.T @ b)).sum()

    @classmethod
    def start(cls, module: Any, settings: LoRASettings, init: Init) -> dict[str, Tensor]:
        """Values for what is added to ``module``: A random, B zero."""
        a_shape, b_shape = cls.shapes(module, settings.r)
        a = torch.empty(a_shape)
        if init == "gaussian":
            nn.init.normal_(a, std=1 / settings.r)
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        return {"lora_A": a, "lora_B": torch.zeros(b_shape)}

    @staticmethod
    def shapes(module: Any, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B for this module."""
        return (r, module.in_features), (module.out_features, r)

    def as_plain(self) -> LoRASettings:
        """The settings of the plain LoRA that :meth:`in_files` writes."""
        return self.lora


class LoRALinear(LoRALayer):
    """LoRA on ``nn.Linear``."""

    bias: Tensor | None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in) to (..., out): :func:`lightning_ft.ops.lora_linear`, where that is what the module computes."""
        x = first_tensor(args, kwargs)
        linear = frozen_linear(self, x)
        if linear is None:
            return super().forward(*args, **kwargs)
        dropout = self.lora.dropout if self.in_training else 0.0
        return lora_linear(x, linear, self.lora_A, self.lora_B, self.lora.scaling, dropout)

    @classmethod
    def for_rows(cls, layers: Sequence[Any], index: Tensor) -> Callable[..., Tensor] | None:
        """``h_i = W x_i + s_i · B_i A_i x_i`` for row i, the A and B of all rows gathered."""
        some = next(layer for layer in layers if layer is not None)
        nothing = some.lora_A[:0], some.lora_B[:, :0], 0.0
        factors = [nothing if layer is None else layer.factors() for layer in layers]
        r = max(len(a) for a, _, _ in factors)
        # Zeros fill smaller ranks up: they add nothing.
        a = torch.stack([a * s if len(a) == r else F.pad(a * s, (0, 0, 0, r - len(a))) for a, _, s in factors])
        b = torch.stack([b if b.shape[1] == r else F.pad(b, (0, r - b.shape[1])) for _, b, _ in factors])
        a, b = a.index_select(0, index), b.index_select(0, index)

        @cache
        def sides(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            return a.to(dtype), b.to(dtype)

        def forward(base: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
            out, x = base(*args, **kwargs).contiguous(), first_tensor(args, kwargs)
            a, b = sides(out.dtype)
            # (rows, r, tokens), of which few rows are quicker for a BLAS than few columns.
            h = torch.bmm(a, x.to(out.dtype).reshape(len(index), -1, x.shape[-1]).mT)
            # In place: another copy of it would cost more than the product. Autocast leaves that alone, and not h.
            out.view(len(index), -1, out.shape[-1]).baddbmm_(h.to(out.dtype).mT, b.mT)
            return out

        return forward

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """A (r, in), B (out, r) and s of the plain LoRA that it is."""
        tensors = self.in_files(self)
        return tensors[self.adds["lora_A"]], tensors[self.adds["lora_B"]], self.as_plain().scaling


class LoRAConv1D(LoRALinear):
    """LoRA on Hugging Face's ``Conv1D``, whose weight is stored as (in, out)."""

    out_axis = 1

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """``(B A)ᵀ``."""
        return (b @ a).T

    @staticmethod
    def shapes(module: Any, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B for this module."""
        n_in, n_out = module.weight.shape
        return (r, n_in), (n_out, r)


class LoRAEmbedding(LoRALayer):
    """LoRA on ``nn.Embedding``: a row of W plus ``s · B A[:, token]``; A (r, tokens), B (width, r)."""

    adds: ClassVar[Mapping[str, str]] = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}
    out_axis = 1
    padding_idx: int | None

    def low_rank(self, x: Tensor) -> Tensor:
        """(...) token ids to (..., width). There is no dropout, since ids have none."""
        return F.embedding(x, self.lora_A.T, self.padding_idx) @ self.lora_B.T

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """``(B A)ᵀ``. A padding row gets no gradient, so that its column of A stays zero."""
        return (b @ a).T

    @classmethod
    def start(cls, module: Any, settings: LoRASettings, init: Init) -> dict[str, Tensor]:  # noqa: ARG003
        """A zero, B random, as in the authors' own code: rows of A are met one at a time."""
        a_shape, b_shape = cls.shapes(module, settings.r)
        return {"lora_A": torch.zeros(a_shape), "lora_B": torch.randn(b_shape)}

    @staticmethod
    def shapes(module: Any, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B for this module."""
        return (r, module.num_embeddings), (module.embedding_dim, r)


class LoRAConv(LoRALayer):
    """LoRA on a convolution: A (r, in, *kernel) is one of the same kind to r channels, B (out, r, 1, …) a 1x1 one."""

    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def project(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """(N, in, *size) to (N, out, *size): the module's own stride, padding and dilation, in A."""
        pointwise = (F.conv1d, F.conv2d, F.conv3d)[b.ndim - 3]
        return pointwise(self._conv_forward(x, a, None), b)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """``B A`` as a kernel (out, in, *kernel)."""
        return (b.flatten(1) @ a.flatten(1)).view(b.shape[0], *a.shape[1:])

    @staticmethod
    def shapes(module: Any, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B for this module."""
        kernel = module.kernel_size
        return (r, module.in_channels, *kernel), (module.out_channels, r, *(1 for _ in kernel))


class DoRALayer(LoRALayer):
    """``h = W' x`` with ``W' = m ∘ (W + s B A) / ‖W + s B A‖``, the norm over each output's weights.

    The norm is a constant in the backward pass, as in section 4.3 of the paper. Dropout is on the low-rank part alone.
    """

    as_vectors = ("lora_magnitude_vector",)

    lora_magnitude_vector: nn.Parameter  # m: (out,), for convolutions (1, out, 1, …)
    bias: Tensor | None
    squared_change = Injected.squared_change

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """LoRA's output, without the bias times ``m / ‖W + s B A‖``."""
        out = super().forward(*args, **kwargs)
        bias = getattr(self, "bias", None)
        unbiased = out if bias is None else out - self.spread(bias, self.weight.ndim)
        # As a difference, so that outputs are the base's to the bit as long as the ratio is 1.
        return out + ((self.ratio(dense_weight(self)) - 1) * unbiased).to(out.dtype)

    @classmethod
    def for_rows(cls, layers: Sequence[Any], index: Tensor) -> Callable[..., Tensor] | None:
        """LoRA's, times each row's ratio without the bias."""
        lora = super().for_rows(layers, index)
        if lora is None:
            return None
        bias = next(layer.bias for layer in layers if layer is not None)
        some = next(layer.lora_magnitude_vector for layer in layers if layer is not None)
        ratios = [torch.ones_like(some) if layer is None else layer.ratio(dense_weight(layer)) for layer in layers]
        more = torch.stack(ratios)[index] - 1  # (rows, out)

        def forward(base: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
            out = lora(base, *args, **kwargs)
            unbiased = (out if bias is None else out - bias).view(len(index), -1, out.shape[-1])
            return out + (more[:, None] * unbiased).view(out.shape).to(out.dtype)

        return forward

    def ratio(self, weight: Tensor) -> Tensor:
        """``m / ‖W + s B A‖``, in the shape of m."""
        return self.lora_magnitude_vector / self.norms(weight + self.delta()).detach()

    @classmethod
    def norms(cls, weight: Tensor) -> Tensor:
        """The norm of each output's weights, in the shape of m."""
        inputs = [axis for axis in range(weight.ndim) if axis != cls.out_axis]
        return cls.spread(torch.linalg.vector_norm(weight, dim=inputs), weight.ndim)

    def folded(self, weight: Tensor) -> dict[str, Tensor]:
        """``m ∘ (W + s B A) / ‖W + s B A‖``."""
        by_output = [-1 if axis == self.out_axis else 1 for axis in range(weight.ndim)]
        return {"weight": (weight + self.delta()) * self.ratio(weight).view(by_output)}

    @classmethod
    def start(cls, module: Any, settings: LoRASettings, init: Init) -> dict[str, Tensor]:
        """A and B as in LoRA, m the norms of W, so that nothing changes at first."""
        tensors = super().start(module, settings, init)
        return {**tensors, "lora_magnitude_vector": cls.norms(dense_weight(module).float())}

    @staticmethod
    def spread(vector: Tensor, ndim: int) -> Tensor:  # noqa: ARG004
        """A value for each output, (out,), in a shape that goes with the outputs of a weight of ``ndim`` dimensions."""
        return vector


_MAGNITUDE = {"lora_magnitude_vector": "lora_magnitude_vector"}


class DoRALinear(DoRALayer, LoRALinear):
    """DoRA on ``nn.Linear``."""

    adds: ClassVar[Mapping[str, str]] = {**LoRALinear.adds, **_MAGNITUDE}


class DoRAConv1D(DoRALayer, LoRAConv1D):
    """DoRA on Hugging Face's ``Conv1D``."""

    adds: ClassVar[Mapping[str, str]] = {**LoRAConv1D.adds, **_MAGNITUDE}


class DoRAEmbedding(DoRALayer, LoRAEmbedding):
    """DoRA on ``nn.Embedding``; m has a value for each feature."""

    adds: ClassVar[Mapping[str, str]] = {**LoRAEmbedding.adds, **_MAGNITUDE}


class DoRAConv(DoRALayer, LoRAConv):
    """DoRA on a convolution; m has a value for each output channel."""

    adds: ClassVar[Mapping[str, str]] = {**LoRAConv.adds, **_MAGNITUDE}

    @staticmethod
    def spread(vector: Tensor, ndim: int) -> Tensor:
        """(out,) to (1, out, 1, …)."""
        return vector.view(1, -1, *(1 for _ in range(ndim - 2)))


class ResidualLayer(LoRALayer):
    """PiSSA and OLoRA: ``h = W x + s · (B A - B₀ A₀) x``, with W as it was.

    The papers take ``s B₀ A₀`` out of W. Kept beside it, the base stays the pretrained one: bare checkpoints load,
    and :meth:`in_files` can write a plain LoRA of twice the rank that needs nothing but the base.
    """

    keeps = ("lora_A0", "lora_B0")
    lora_A0: Tensor  # (r, in)
    lora_B0: Tensor  # (out, r)
    squared_change = Injected.squared_change  # a small difference of large products can't be told from their sizes

    def low_rank(self, x: Tensor) -> Tensor:
        """``B A dropout(x) - B₀ A₀ x``."""
        return super().low_rank(x) - self.project(x.to(self.lora_A0.dtype), self.lora_A0, self.lora_B0)

    def delta(self) -> Tensor:
        """``s · (B A - B₀ A₀)``."""
        return super().delta() - self.lora.scaling * self.product(self.lora_A0, self.lora_B0)

    @classmethod
    def start(cls, module: Any, settings: LoRASettings, init: Init) -> dict[str, Tensor]:
        """A = A₀ and B = B₀, such that ``s B₀ A₀`` is the best approximation of W of that rank, or its Q R.

        Raises:
            InjectionError: if W has fewer ranks than r.
        """
        weight = dense_weight(module).float()
        if settings.r > min(weight.shape):
            raise InjectionError(
                f"init_lora_weights='{init}' takes a weight of {' x '.join(map(str, weight.shape))} apart, which has no"
                f" {settings.r} ranks. Use r={min(weight.shape)} at most (rank_pattern, for such modules alone)."
            )
        a, b = _PRINCIPAL[init](weight.T if cls.out_axis else weight, settings.r)
        share = settings.scaling**-0.5  # of s in each
        a, b = (a * share, b * share) if init == "pissa" else (a, b)
        return {"lora_A": a, "lora_B": b, "lora_A0": a.clone(), "lora_B0": b.clone()}

    def as_plain(self) -> LoRASettings:
        """Twice the rank with the same scaling."""
        settings = self.lora
        more = math.sqrt(2) if settings.use_rslora else 2
        return LoRASettings(2 * settings.r, more * settings.alpha, settings.dropout, settings.use_rslora)

    @classmethod
    def in_files(cls, layer: Any) -> dict[str, Tensor]:
        """``[B, -B₀] [A; A₀]``, as PEFT converts them too."""
        a = torch.cat([layer.lora_A.detach(), layer.lora_A0])
        b = torch.cat([layer.lora_B.detach(), -layer.lora_B0], dim=1)
        return {cls.adds["lora_A"]: a, cls.adds["lora_B"]: b}


def principal_part(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """``A₀ = √S Vᵀ`` (r, in) and ``B₀ = U √S`` (out, r) of the r largest singular values (PiSSA, equations 2 and 3)."""
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    root = s[:r].sqrt()
    return root[:, None] * vt[:r], u[:, :r] * root


def qr_part(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """``A₀ = R`` (r, in) and ``B₀ = Q`` (out, r), the first r of the QR decomposition (OLoRA, equation 4)."""
    q, upper = torch.linalg.qr(weight)
    return upper[:r].contiguous(), q[:, :r].contiguous()


_PRINCIPAL = {"pissa": principal_part, "olora": qr_part}
_PLAIN_INITS = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")  # PEFT's that leave W as it is


class ResidualLinear(ResidualLayer, LoRALinear):
    """PiSSA or OLoRA on ``nn.Linear``."""

    forward = LoRALayer.forward  # which takes one product from the other first: they cancel, to the bit at the start


class ResidualConv1D(ResidualLayer, LoRAConv1D):
    """PiSSA or OLoRA on Hugging Face's ``Conv1D``."""

    forward = LoRALayer.forward


Variant = Literal["plain", "dora", "residual"]
_LINEAR: dict[Variant, type[LoRALayer]] = {"plain": LoRALinear, "dora": DoRALinear, "residual": ResidualLinear}
_CONV1D: dict[Variant, type[LoRALayer]] = {"plain": LoRAConv1D, "dora": DoRAConv1D, "residual": ResidualConv1D}
_EMBEDDING: dict[Variant, type[LoRALayer]] = {"plain": LoRAEmbedding, "dora": DoRAEmbedding}
_CONV: dict[Variant, type[LoRALayer]] = {"plain": LoRAConv, "dora": DoRAConv}


def layer_for(module: nn.Module, variant: Variant = "plain") -> type[LoRALayer] | None:
    """The LoRA layer for this kind of module, or None."""
    if isinstance(module, nn.Linear):
        return _LINEAR.get(variant)
    forward = getattr(module, "_original", type(module)).forward
    if isinstance(module, nn.Embedding):
        return _EMBEDDING.get(variant) if forward is nn.Embedding.forward else None  # not a scaled one
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        # Not one that pads in a forward of its own; and across groups there's no low rank to speak of.
        plain = forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward) and module.groups == 1
        return _CONV.get(variant) if plain else None
    return _CONV1D.get(variant) if is_conv1d(module) else None


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
            (:func:`lightning_ft.injection.resolve_targets`). Linear layers, embeddings and convolutions can be.
        exclude_modules, layers_to_transform, layers_pattern: what of them not, and in which layers.
        rank_pattern, alpha_pattern: other values of ``r`` and ``alpha`` for modules whose path, or the end of it,
            matches a regular expression: ``{"layer.0.*query": 16}``. The first that matches counts.
        init_lora_weights: how A starts: ``"kaiming"`` (uniform, as PEFT does by default) or ``"gaussian"`` (std 1/r),
            B at zero. Or both from W: ``"pissa"`` (its r largest singular values), ``"olora"`` (its QR decomposition);
            these two are saved as a plain LoRA of twice the rank: one that was loaded trains on with ``LoRA(r=2 * r)``.
        use_rslora: scale by alpha / √r, which keeps the update's size as r grows.
        use_dora: train the weights' norms apart from their directions; a step costs more, a merged model nothing.
        bias: biases of the base that train too: ``"none"``, those of the adapted modules (``"lora_only"``), ``"all"``.
        loraplus_lr_ratio: how many times the rate of A that of B is (LoRA+; its authors use 16 with a lower rate).
        modules_to_save, backbone, quantize, adapter_dtype: see :class:`~lightning_ft.callbacks.finetuning.FineTuning`.

    Raises:
        ValueError: for a value out of its range, or settings that don't go together.
        InjectionError: on injection, see :meth:`FineTuning.inject`.
    """

    peft_type: ClassVar[str] = "LORA"
    plausible_lr: ClassVar[tuple[float, float]] = (1e-4, 1e-2)
    layers: ClassVar[tuple[type[Injected], ...]] = tuple(
        layer for kind in (_LINEAR, _CONV1D, _EMBEDDING, _CONV) for layer in kind.values()
    )

    def __init__(
        self,
        r: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        target_modules: str | Sequence[str] | None = None,
        *,
        exclude_modules: str | Sequence[str] | None = None,
        layers_to_transform: int | Sequence[int] | None = None,
        layers_pattern: str | Sequence[str] | None = None,
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
        init_lora_weights: Init = "kaiming",
        use_rslora: bool = False,
        use_dora: bool = False,
        bias: Bias = "none",
        loraplus_lr_ratio: float = 1.0,
        modules_to_save: Sequence[str] | None = None,
        backbone: str | None = None,
        quantize: str | Mapping[str, Any] | None = None,
        adapter_dtype: AdapterDtype = "float32",
    ) -> None:
        super().__init__(modules_to_save, backbone, quantize, adapter_dtype=adapter_dtype)
        for rank in (r, *(rank_pattern or {}).values()):
            check_count("LoRA: r", rank)
        scales = [("alpha", a) for a in (alpha, *(alpha_pattern or {}).values())]
        for name, scale in (*scales, ("loraplus_lr_ratio", loraplus_lr_ratio)):
            check_number(f"LoRA: {name}", scale, lambda x: x > 0, "above 0")
        check_dropout("LoRA: dropout", dropout)
        check_choice("LoRA: init_lora_weights", init_lora_weights, get_args(Init))
        check_choice("LoRA: bias", bias, get_args(Bias))
        if use_dora and init_lora_weights in _PRINCIPAL:
            raise ValueError(f"LoRA: use_dora starts at the pretrained weight, and {init_lora_weights!r} splits it.")
        self.r, self.alpha, self.dropout = r, alpha, dropout
        self.target_modules, self.exclude_modules = target_modules, exclude_modules
        self.layers_to_transform, self.layers_pattern = layers_to_transform, layers_pattern
        self.rank_pattern, self.alpha_pattern = rank_pattern, alpha_pattern
        self.init_lora_weights: Init = init_lora_weights
        self.use_rslora, self.use_dora = use_rslora, use_dora
        self.bias: Bias = bias
        self.loraplus_lr_ratio = loraplus_lr_ratio
        self._hooks: list[RemovableHandle] = []

    def inject(self, model: nn.Module) -> list[str]:
        """Freeze the base and put LoRA into it; see :meth:`FineTuning.inject`."""
        base, saved = self.prepare(model)
        variant: Variant = "dora" if self.use_dora else "residual" if self.init_lora_weights in _PRINCIPAL else "plain"
        names = resolve_targets(
            base,
            self.target_modules,
            lambda module: layer_for(module, variant) is not None,
            saved,
            self.exclude_modules,
            self.layers_to_transform,
            self.layers_pattern,
        )
        ranks = by_pattern("rank_pattern", self.rank_pattern, names, self.r)
        alphas = by_pattern("alpha_pattern", self.alpha_pattern, names, self.alpha)
        plan = {}
        for name in names:
            module = base.root.get_submodule(name)
            layer = layer_for(module, variant)
            assert layer is not None
            settings = LoRASettings(ranks[name], alphas[name], self.dropout, self.use_rslora)
            plan[name] = Layer(layer, settings, partial(layer.start, module, settings, self.init_lora_weights))
        modules = {name: base.root.get_submodule(name) for name in names}
        new = not any(isinstance(module, LoRALayer) for module in modules.values())
        paths = inject_layers(base, plan, "LoRA", saved, _biases(base, names)[self.bias], dtype=self.added_dtype)
        layers = {name: module for name, module in modules.items() if isinstance(module, LoRALayer)}
        if new and (advice := rank_advice(layers)):
            rank_zero_info(advice)
        return paths

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See :class:`FineTuning`; with LoRA+, B takes longer steps from here on."""
        super().on_fit_start(trainer, pl_module)
        if self.loraplus_lr_ratio != 1:
            base = find_base(pl_module, self.backbone)  # another LoRA may be on another one
            own = [m.lora_B for _, m in base.named_modules() if isinstance(m, LoRALayer)]
            held = {id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
            if held.isdisjoint(map(id, own)):
                raise InjectionError(
                    f"LoRA+ lengthens an optimizer's steps on B, and {type(trainer.strategy).__name__} has it step on"
                    " other tensors in the place of B. Use strategy='ddp', or loraplus_lr_ratio=1."
                )
            for optimizer in trainer.optimizers:
                self._hooks += lengthen_steps(optimizer, own, self.loraplus_lr_ratio)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See :class:`FineTuning`."""
        super().teardown(trainer, pl_module, stage)
        while self._hooks:
            self._hooks.pop().remove()

    # ---------------------------------------------------------------------------------- in PEFT's files

    @staticmethod
    def to_peft(layers: Mapping[str, Injected], base: Base) -> dict[str, Any]:
        """The fields of PEFT's ``adapter_config.json`` for these layers, by path."""
        settings = {name: layer.as_plain() for name, layer in layers.items() if isinstance(layer, LoRALayer)}
        r = Counter(s.r for s in settings.values()).most_common(1)[0][0]
        alpha = Counter(s.alpha for s in settings.values()).most_common(1)[0][0]
        any_settings = next(iter(settings.values()))
        trains = {
            kind: bool(biases) and all(base.root.get_parameter(name).requires_grad for name in biases)
            for kind, biases in _biases(base, list(layers)).items()
        }
        return {
            "r": r,
            "lora_alpha": alpha,
            "lora_dropout": any_settings.dropout,
            "target_modules": list(layers),
            "rank_pattern": {f"^{re.escape(name)}": s.r for name, s in settings.items() if s.r != r},
            "alpha_pattern": {f"^{re.escape(name)}": s.alpha for name, s in settings.items() if s.alpha != alpha},
            "use_rslora": any_settings.use_rslora,
            "use_dora": any(isinstance(layer, DoRALayer) for layer in layers.values()),
            "fan_in_fan_out": any(isinstance(layer, LoRAConv1D) for layer in layers.values()),
            "bias": next((kind for kind in ("all", "lora_only") if trains[kind]), "none"),
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
        unknown = (
            "lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config",
            "monteclora_config", "layer_replication", "target_parameters", "trainable_token_indices",
        )  # fmt: skip
        found = [key for key in unknown if config.get(key)]
        init = str(config.get("init_lora_weights", True)).lower()  # as PEFT reads it
        if init not in (*_PLAIN_INITS, *_PRINCIPAL):  # corda, loftq and others change W, and not reproducibly
            found.append(f"init_lora_weights={init}")
        if found:
            raise ValueError(
                f"This LoRA adapter uses {', '.join(found)}, which this version can't load. One whose init changed the"
                " base can be made a plain LoRA when PEFT saves it (path_initial_model_for_weight_conversion)."
            )
        return cls(
            config.get("r", 8),  # PEFT's own defaults
            config.get("lora_alpha", 8),
            config.get("lora_dropout", 0.0),
            exactly(targets),
            rank_pattern=_that_match(config.get("rank_pattern"), targets),
            alpha_pattern=_that_match(config.get("alpha_pattern"), targets),
            init_lora_weights=init if init in _PRINCIPAL else "kaiming",  # type: ignore[arg-type]
            use_rslora=config.get("use_rslora", False),
            use_dora=config.get("use_dora", False),
            bias=config.get("bias", "none"),
            modules_to_save=modules_to_save,
            backbone=backbone,
        )


def by_pattern(argument: str, patterns: Mapping[str, Any] | None, names: Sequence[str], default: Any) -> dict[str, Any]:
    """A value for each name: that of the first pattern that its path, or the end of it, matches, as in PEFT.

    Raises:
        InjectionError: if a pattern matches none.
    """
    patterns = patterns or {}
    for pattern in patterns:
        if not any(_matches(pattern, name) for name in names):
            raise InjectionError(f"{argument}: '{pattern}' matches none of the targets: {', '.join(names[:5])}, ….")
    return {name: next((v for p, v in patterns.items() if _matches(p, name)), default) for name in names}


def _matches(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", plain(name)) is not None


def _that_match(patterns: Mapping[str, Any] | None, names: Sequence[str]) -> dict[str, Any] | None:
    kept = {p: value for p, value in (patterns or {}).items() if any(_matches(p, name) for name in names)}
    return kept or None


def _biases(base: Base, targets: Sequence[str]) -> dict[Bias, list[str]]:
    """The biases of the base that each choice of ``bias`` trains, by name: as in PEFT, what is called just ``bias``."""
    own = [name for name, module in base.named_modules() if isinstance(getattr(module, "bias", None), nn.Parameter)]
    return {
        "none": [],
        "lora_only": [f"{name}.bias" for name in targets if name in own],
        "all": [f"{name}.bias".lstrip(".") for name in own],
    }


def rank_advice(layers: Mapping[str, LoRALayer]) -> str | None:
    """What to say of ranks outside 1% to 10% of their module's smaller dimension, where there are such."""
    ranks = {name: layer.lora.r for name, layer in layers.items()}
    sizes = {name: min(layer.lora_A.shape[1], layer.lora_B.shape[0]) for name, layer in layers.items()}
    usual = {name: (math.ceil(size / 100), max(1, size // 10)) for name, size in sizes.items()}
    unusual = [name for name, r in ranks.items() if not usual[name][0] <= r <= usual[name][1]]
    if not unusual:
        return None
    name = unusual[0]
    low, high = usual[name]
    return (
        f"LoRA: r={ranks[name]} is {ranks[name] / sizes[name]:.1%} of the smaller dimension of '{name}' ({sizes[name]})"
        f"{f' and {len(unusual) - 1} others' if len(unusual) > 1 else ''}; usual is 1% to 10%, here {low} to {high}."
    )


def lengthen_steps(optimizer: Optimizer, parameters: Sequence[nn.Parameter], ratio: float) -> list[RemovableHandle]:
    """Make each step of ``optimizer`` on ``parameters`` ``ratio`` times as long, as a higher learning rate would.

    Every usual optimizer's step, weight decay included, is linear in the rate. Done behind the step, it needs no
    parameter group of its own, so that the user's groups and schedules stay as they are.

    Returns:
        Handles that undo it.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    own = [parameter for parameter in parameters if id(parameter) in held]
    before: list[Tensor] = []

    def remember(*_: Any) -> None:
        before[:] = [parameter.detach().clone() for parameter in own]

    @torch.no_grad()
    def lengthen(*_: Any) -> None:
        for parameter, old in zip(own, before, strict=True):
            parameter.copy_(old.lerp(parameter, ratio))

    return [optimizer.register_step_pre_hook(remember), optimizer.register_step_post_hook(lengthen)]
