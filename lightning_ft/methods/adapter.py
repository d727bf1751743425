"""Bottleneck adapters: small networks beside the frozen layers of a Transformer.

An adapter narrows what it reads to k features, bends them and widens them again, and adds the result:

    h ← h + s · (U f(D x + b) + c)        D (k, width of x), U (width of h, k)

    Houlsby    one behind attention's output projection and one behind the feed-forward's, before each residual is
               added; x = h, s = 1                            Houlsby et al. 2019, https://arxiv.org/abs/1902.00751
    Pfeiffer   behind the feed-forward's only                 Pfeiffer et al. 2021, https://arxiv.org/abs/2005.00247
    parallel   beside the feed-forward, h its output and x its input (after the norm, where one stands before it)
                                                    He et al. 2022, https://arxiv.org/abs/2110.04366, section 3.3
    AdapterDrop    the adapters of the lowest layers are left out, in training at random
                                                    Rücklé et al. 2021, https://arxiv.org/abs/2010.11918

U and c start at zero, so that training starts from the pretrained model. f isn't linear: an adapter can't be folded
into the weights, and can stand beside a method that changes those (LoRA). Houlsby's and Pfeiffer's stand right behind
the linear layer that ends the sub-layer, for every architecture alike: the base's own dropout, where it has one there,
comes after them (in Houlsby's code before), and Pfeiffer's reads the sub-layer's output, not that of the norm after it
(as the authors' code does).

In files, ``peft_type`` is ``BOTTLENECK``, our own: PEFT has no such adapters. ``adapter_config.json`` has the fields
``placement``, ``bottleneck`` or ``reduction_factor``, ``non_linearity``, ``scaling``, ``dropout`` (the arguments of
:class:`Adapter`) and ``target_modules`` (the adapted modules' paths); a module's tensors are ``adapter_down.weight``
(k, width of x), ``adapter_down.bias`` (k), ``adapter_up.weight`` (width of h, k) and ``adapter_up.bias`` (width of h).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

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
    detach,
    ends_with,
    exactly,
    find_base,
    first_tensor,
    inject_layers,
    injected_modules,
    is_conv1d,
    layer_numbers,
    resolve_targets,
)

Placement = Literal["pfeiffer", "houlsby", "parallel"]
NonLinearity = Literal["relu", "gelu", "swish", "tanh"]

# ---------------------------------------------------------------------------------------------- the maths

_NON_LINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True)
class AdapterSettings:
    """What an adapter needs to know; its width is either ``bottleneck`` or what it reads / ``reduction_factor``."""

    placement: Placement
    bottleneck: int | None
    reduction_factor: float | None
    non_linearity: NonLinearity
    scaling: float
    dropout: float

    def __str__(self) -> str:
        return f"({', '.join(f'{name}={value}' for name, value in asdict(self).items() if value is not None)})"


class AdapterLayer(Injected):
    """``h + s · (U f(D x + b) + c)`` for a module's output h; the subclasses say what x is."""

    method = "BOTTLENECK"
    acts_on = "outputs"
    slot = "adapter"
    adds: ClassVar[Mapping[str, str]] = {
        "adapter_down": "adapter_down.weight",
        "adapter_down_bias": "adapter_down.bias",
        "adapter_up": "adapter_up.weight",
        "adapter_up_bias": "adapter_up.bias",
    }

    adapter: AdapterSettings
    adapter_down: nn.Parameter  # D: (k, width of x)
    adapter_down_bias: nn.Parameter  # b: (k,)
    adapter_up: nn.Parameter  # U: (width of h, k)
    adapter_up_bias: nn.Parameter  # c: (width of h,)
    adapter_left_out: bool = False
    """Whether AdapterDrop leaves it out of this training batch."""

    def with_adapter(self, h: Tensor, x: Tensor) -> Tensor:
        """``h + s · (U f(D x + b) + c)``, with dropout on what f gives."""
        if self.adapter_left_out and self.in_training:
            return h
        # The adapter computes in its own precision, fp32 unless autocast says otherwise.
        narrow = F.linear(x.to(self.adapter_down.dtype), self.adapter_down, self.adapter_down_bias)
        bent = F.dropout(_NON_LINEARITIES[self.adapter.non_linearity](narrow), self.adapter.dropout, self.in_training)
        return h + (self.adapter.scaling * F.linear(bent, self.adapter_up, self.adapter_up_bias)).to(h.dtype)


class SequentialAdapter(AdapterLayer):
    """Behind a module: x = h."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own output, or the first of them, through the adapter."""
        return _change_first(super().forward(*args, **kwargs), lambda h: self.with_adapter(h, h))  # type: ignore[misc]


class ParallelAdapter(AdapterLayer):
    """Beside a module: x is its first input."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own output, or the first of them, plus the adapter's."""
        x = first_tensor(args, kwargs)
        return _change_first(super().forward(*args, **kwargs), lambda h: self.with_adapter(h, x))  # type: ignore[misc]


class ResidualAdapter(AdapterLayer):
    """Beside the feed-forward where a module ends it and adds its input too, before a norm: x is that input (BERT's).

    ``Norm(W a + x)`` becomes ``Norm(W a + x + s · (U f(D x + b) + c))``.
    """

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """The module's own output, with the adapter's in the sum."""
        return super().forward(hidden_states, self.with_adapter(input_tensor, input_tensor))  # type: ignore[misc]


def _change_first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Attention gives its weights, or more, beside its output."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


def layer_for(module: nn.Module, placement: Placement) -> type[AdapterLayer]:
    """The adapter for this kind of module."""
    if placement != "parallel":
        return SequentialAdapter
    return ResidualAdapter if _adds_its_input(module) else ParallelAdapter


def widths(module: Any) -> tuple[int, int] | None:
    """The numbers of features that a module reads and gives; None if they can't be told."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if is_conv1d(module):
        return tuple(module.weight.shape)
    if isinstance(module, nn.MultiheadAttention):
        return module.embed_dim, module.embed_dim
    inner = [widths(child) for child in module.modules() if isinstance(child, nn.Linear) or is_conv1d(child)]
    if not inner or type(module).forward is nn.Module.forward:
        return None
    (reads, _), (_, gives) = inner[0], inner[-1]  # type: ignore[misc]
    # A block of several layers must end as wide as it begins: else the order of its layers isn't that of their use.
    return (gives, gives) if reads == gives or _adds_its_input(module) else None


def _adds_its_input(module: nn.Module) -> bool:
    forward = getattr(module, "_original", type(module)).forward  # the module's own, where it's injected already
    return list(inspect.signature(forward).parameters)[1:] == ["hidden_states", "input_tensor"]


def start(name: str, module: nn.Module, settings: AdapterSettings) -> dict[str, Tensor]:
    """Values for what is added to ``module``: D random as in the papers, the rest zero.

    Raises:
        InjectionError: if ``reduction_factor`` leaves no width.
    """
    reads, gives = widths(module) or (0, 0)
    if settings.placement != "parallel":
        reads = gives
    k = settings.bottleneck or int(reads / (settings.reduction_factor or 1))
    if k < 1:
        raise InjectionError(
            f"reduction_factor={settings.reduction_factor:g} leaves nothing of the {reads} features of '{name}'."
            f" Use {reads} at most, or say the width: bottleneck=8."
        )
    down = torch.empty(k, reads)
    if settings.placement == "parallel":
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))  # as the authors' code
    else:
        nn.init.trunc_normal_(down, std=1e-2, a=-2e-2, b=2e-2)  # Houlsby et al., section 3.6
    return {
        "adapter_down": down,
        "adapter_down_bias": torch.zeros(k),
        "adapter_up": torch.zeros(gives, k),
        "adapter_up_bias": torch.zeros(gives),
    }


# ------------------------------------------------------------------------------------------------ the places

# The linear layers that attention and feed-forward end with, in the architectures' own names. A row counts where
# both are found; whatever else is named so ends the same things.
_ENDS = (
    ("attention.output.dense crossattention.output.dense", "output.dense"),  # BERT, RoBERTa, ELECTRA, DeBERTa
    ("attention.out_lin", "ffn.lin2"),  # DistilBERT
    ("attn.c_proj crossattention.c_proj", "mlp.c_proj"),  # GPT-2
    ("self_attn.o_proj", "mlp.down_proj"),  # Llama, Mistral, Qwen, Gemma, Phi-3
    ("SelfAttention.o EncDecAttention.o", "DenseReluDense.wo"),  # T5
    ("self_attn.out_proj encoder_attn.out_proj", "fc2"),  # BART, OPT, Whisper, CLIP
    ("attention.dense", "mlp.dense_4h_to_h"),  # GPT-NeoX
    ("self_attention.dense", "mlp.dense_4h_to_h"),  # BLOOM, Falcon
    ("self_attn.dense", "mlp.fc2"),  # Phi
    ("attention.o_proj", "mlp.fc2"),  # ViT
    ("attn.Wo", "mlp.Wo"),  # ModernBERT
    ("attention.attn.o", "output.dense"),  # MPNet
    ("attention.dense", "ffn_output"),  # ALBERT
)


def usual_targets(base: Base, placement: Placement) -> list[str]:
    """The modules of ``base`` that the paper's adapters stand behind or beside, as paths relative to its root.

    Raises:
        InjectionError: if the architecture isn't known.
    """
    names = [name for name, _ in base.named_modules()]

    def ending(ends: str) -> set[str]:
        return {name for name in names if any(ends_with(name, end) for end in ends.split())}

    attention, feed_forward = set[str](), set[str]()
    for of_attention, of_feed_forward in _ENDS:
        first, second = ending(of_attention), ending(of_feed_forward) - ending(of_attention)
        if first and second:
            attention |= first
            feed_forward |= second
    blocks = {name.rpartition(".")[0] for name in feed_forward}
    split = any(name.startswith(f"{block}.") for name in attention for block in blocks)
    if not feed_forward or (split and placement == "parallel"):
        kind = type(base.root).__name__
        raise InjectionError(
            f"Adapter: {kind} has no feed-forward module, only layers of one, so that placement='parallel' has nothing"
            " to stand beside. Use another placement, or name modules: target_modules=[...]."
            if feed_forward
            else f"Adapter: where attention and feed-forward end in {kind} isn't known. Name the modules to adapt the"
            ' outputs of, their last linear layers: target_modules=["linear2"].'
        )
    wanted = {"pfeiffer": feed_forward, "houlsby": attention | feed_forward, "parallel": blocks}[placement]
    return [name for name in names if name in wanted]


# -------------------------------------------------------------------------------------------- the callback

# About 3% of BERT-base and 2% of MiniLM train; s as the papers have it.
_USUAL: dict[Placement, dict[str, float]] = {
    "pfeiffer": {"reduction_factor": 4, "scaling": 1.0},
    "houlsby": {"reduction_factor": 8, "scaling": 1.0},
    "parallel": {"reduction_factor": 4, "scaling": 4.0},
}


class Adapter(FineTuning):
    """Bottleneck adapters in any LightningModule (Houlsby et al. 2019, https://arxiv.org/abs/1902.00751).

    ``L.Trainer(callbacks=[Adapter()])``, or without a Trainer ``Adapter().inject(model)``. They stay in the model: it
    can't be merged, and inference costs some 2% more.

    Args:
        placement: ``"pfeiffer"`` (behind each feed-forward), ``"houlsby"`` (behind each attention too), or
            ``"parallel"`` (beside each feed-forward).
        bottleneck: the adapters' width.
        reduction_factor: or how many times narrower they are than what they read; by default 4, and 8 for the twice
            as many of Houlsby: some 3% of BERT-base's parameters.
        non_linearity: ``"relu"``, ``"gelu"``, ``"swish"`` or ``"tanh"``.
        scaling: s, of what is added; by default 1, and 4 where parallel.
        dropout: probability of dropping an element of the bottleneck, in training.
        target_modules: what to adapt the outputs of, written as for :func:`lightning_ft.injection.resolve_targets`:
            linear layers, ``nn.MultiheadAttention``, or blocks that end as wide as they begin; where parallel, the
            adapter reads the first input of each. By default what the placement says, of the architectures known here.
        exclude_modules, layers_to_transform, layers_pattern: what of them not, and in which layers.
        adapter_drop: robust AdapterDrop: in each training batch of the Trainer the adapters of the first k layers (of
            an encoder-decoder: of each stack) are left out, k drawn anew from 0 to this. So trained, a model does
            without them (:func:`drop_adapters`). A batch then leaves parameters without a gradient: under DDP use
            ``strategy="ddp_find_unused_parameters_true"``.
        modules_to_save, backbone, quantize, adapter_dtype: see :class:`~lightning_ft.callbacks.finetuning.FineTuning`.

    Raises:
        ValueError: for a value out of its range, or both ``bottleneck`` and ``reduction_factor``.
        InjectionError: on injection, see :meth:`FineTuning.inject`.
    """

    peft_type: ClassVar[str] = "BOTTLENECK"
    plausible_lr: ClassVar[tuple[float, float]] = (1e-4, 3e-2)
    layers: ClassVar[tuple[type[Injected], ...]] = (SequentialAdapter, ParallelAdapter, ResidualAdapter)

    def __init__(
        self,
        placement: Placement = "pfeiffer",
        bottleneck: int | None = None,
        reduction_factor: float | None = None,
        non_linearity: NonLinearity = "relu",
        scaling: float | None = None,
        dropout: float = 0.0,
        target_modules: str | Sequence[str] | None = None,
        *,
        exclude_modules: str | Sequence[str] | None = None,
        layers_to_transform: int | Sequence[int] | None = None,
        layers_pattern: str | Sequence[str] | None = None,
        adapter_drop: int = 0,
        modules_to_save: Sequence[str] | None = None,
        backbone: str | None = None,
        quantize: str | Mapping[str, Any] | None = None,
        adapter_dtype: AdapterDtype = "float32",
    ) -> None:
        super().__init__(modules_to_save, backbone, quantize, adapter_dtype=adapter_dtype)
        check_choice("Adapter: placement", placement, get_args(Placement))
        check_choice("Adapter: non_linearity", non_linearity, _NON_LINEARITIES)
        if bottleneck is not None and reduction_factor is not None:
            raise ValueError("Adapter: bottleneck and reduction_factor both say the width; leave one out.")
        if bottleneck is not None:
            check_count("Adapter: bottleneck", bottleneck)
        for name, number in (("reduction_factor", reduction_factor), ("scaling", scaling)):
            if number is not None:
                check_number(f"Adapter: {name}", number, lambda x: 0 < x < math.inf, "above 0")
        check_dropout("Adapter: dropout", dropout)
        check_count("Adapter: adapter_drop", adapter_drop, least=0)
        self.placement: Placement = placement
        self.bottleneck, self.reduction_factor = bottleneck, reduction_factor
        self.non_linearity: NonLinearity = non_linearity
        self.scaling, self.dropout = scaling, dropout
        self.target_modules, self.exclude_modules = target_modules, exclude_modules
        self.layers_to_transform, self.layers_pattern = layers_to_transform, layers_pattern
        self.adapter_drop = adapter_drop
        self._droppable: list[tuple[int, Any]] = []  # modules with an adapter, behind their layers' numbers

    def inject(self, model: nn.Module) -> list[str]:
        """Freeze the base and put adapters into it; see :meth:`FineTuning.inject`."""
        base, saved = self.prepare(model)
        targets = self.target_modules
        if targets is None:
            inside_saved = tuple(f"{name}." for name in saved)
            usual = usual_targets(base, self.placement)
            targets = [name for name in usual if not f"{name}.".startswith(inside_saved)]
        names = resolve_targets(
            base,
            targets,
            lambda module: widths(module) is not None,
            saved,
            self.exclude_modules,
            self.layers_to_transform,
            self.layers_pattern,
        )
        highest = max(layer_numbers(base.root, names).values(), default=0)
        if self.adapter_drop and self.adapter_drop >= highest:
            raise InjectionError(
                f"adapter_drop={self.adapter_drop} would leave out all adapters: the last of them is in layer {highest}"
                f" of the stack (0: there is none), so that it can be {max(highest - 1, 0)} at most."
            )
        settings = self._settings()
        plan = {}
        for name in names:
            module = base.root.get_submodule(name)
            plan[name] = Layer(layer_for(module, self.placement), settings, partial(start, name, module, settings))
        return inject_layers(base, plan, "Adapter", saved, dtype=self.added_dtype)

    def _settings(self) -> AdapterSettings:
        usual = _USUAL[self.placement]
        by_default = usual["reduction_factor"] if self.bottleneck is None else None
        return AdapterSettings(
            self.placement,
            self.bottleneck,
            by_default if self.reduction_factor is None else self.reduction_factor,
            self.non_linearity,
            usual["scaling"] if self.scaling is None else self.scaling,
            self.dropout,
        )

    def without_gradient(self, model: nn.Module) -> list[nn.Parameter]:
        """What AdapterDrop left out."""
        out = [module for _, module in self._droppable if module.adapter_left_out]
        return [getattr(module, key) for module in out for mixin in module._mixins for key in mixin.adds]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See :class:`FineTuning`; find what AdapterDrop may leave out."""
        super().on_train_epoch_start(trainer, pl_module)
        base = find_base(pl_module, self.backbone)
        layers = layer_numbers(base.root, _adapted(base)) if self.adapter_drop else {}
        self._droppable = [(layer, base.root.get_submodule(name)) for name, layer in layers.items()]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """See :class:`FineTuning`; with AdapterDrop, draw how many layers go without their adapters."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.adapter_drop:
            k = int(torch.randint(self.adapter_drop + 1, ()))
            for layer, module in self._droppable:
                module.adapter_left_out = layer <= k

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See :class:`FineTuning`; every adapter is in again."""
        super().teardown(trainer, pl_module, stage)
        while self._droppable:
            _, module = self._droppable.pop()
            vars(module).pop("adapter_left_out", None)

    # --------------------------------------------------------------------------------------- in the files

    @staticmethod
    def to_peft(layers: Mapping[str, Injected], base: Base) -> dict[str, Any]:  # noqa: ARG004
        """The fields of ``adapter_config.json`` for these layers, by path."""
        settings = next(layer.adapter for layer in layers.values() if isinstance(layer, AdapterLayer))
        return {**asdict(settings), "target_modules": list(layers)}

    @classmethod
    def from_peft(
        cls, config: Mapping[str, Any], targets: Sequence[str], modules_to_save: Sequence[str], backbone: str | None
    ) -> Adapter:
        """The method that ``config`` describes, on the modules that its tensors belong to.

        Raises:
            ValueError: for a value that isn't known here.
        """
        fields = ("placement", "bottleneck", "reduction_factor", "non_linearity", "scaling", "dropout")
        return cls(
            **{name: config.get(name) for name in fields},  # type: ignore[arg-type]
            target_modules=exactly(targets),
            modules_to_save=modules_to_save,
            backbone=backbone,
        )


def drop_adapters(model: nn.Module, n: int, backbone: str | None = None) -> list[str]:
    """Take the adapters of the first ``n`` layers off, for good: inference costs less, and a saved adapter is smaller.

    AdapterDrop (Rücklé et al. 2021, https://arxiv.org/abs/2010.11918). It costs least quality in a model that was
    trained with ``Adapter(adapter_drop=n)``.

    Args:
        model: a model with adapters in it.
        n: how many layers, from the input; of an encoder-decoder, of each stack.
        backbone: path of the base, where it was named for training too.

    Returns:
        Paths, in the model that was searched, of the modules that had them.

    Raises:
        InjectionError: if there are no adapters in those layers.
    """
    base = find_base(model, backbone)
    names = [name for name, layer in layer_numbers(base.root, _adapted(base)).items() if layer <= n]
    if not names:
        raise InjectionError(f"{type(model).__name__} has no adapters in its first {n} layers. Inject or load some.")
    for name in names:
        detach(base.root, name, AdapterLayer)
    return [base.prefixed(name) for name in names]


def _adapted(base: Base) -> list[str]:
    return [name for name, layer in injected_modules(base.root) if isinstance(layer, AdapterLayer)]
