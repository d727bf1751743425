"""AdaLoRA: a budget of ranks, given to the modules that need them (Zhang et al. 2023, https://arxiv.org/abs/2303.10512).

The update of each weight W (out, in) is trained in the form of a singular value decomposition (equation 3):

    h = W x + s · P Λ Q x      P (out, r), Λ = diag(λ), Q (r, in), s = alpha / r

with a penalty that keeps P's columns and Q's rows orthonormal. A triplet is one singular value with its two vectors.
Training starts with more triplets than are wanted, scores each by how much the loss depends on it, and sets the
λ of the least important ones to zero, fewer and fewer being left (equation 12). At the end they're taken out.
PEFT's names are kept in code and files: lora_A is Q, lora_B is P, lora_E is λ.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_ft.callbacks.finetuning import AdapterDtype, FineTuning, check_count, check_dropout, check_number
from lightning_ft.errors import UserError
from lightning_ft.injection import (
    Base,
    Injected,
    InjectionError,
    Layer,
    exactly,
    find_base,
    first_tensor,
    inject_layers,
    injected_modules,
    is_conv1d,
    plain,
    resolve_targets,
)
from lightning_ft.ops import lora_linear
from lightning_ft.quantization import frozen_linear
from lightning_ft.reporting import heat_map, log_figure, log_table

# ---------------------------------------------------------------------------------------------- the maths


def orthogonality(rows: Tensor) -> tuple[Tensor, Tensor]:
    """``‖M Mᵀ - I‖`` (Frobenius), which is 0 if M's rows are orthonormal, and its gradient.

    Equation 4 squares it, and sums it over all matrices. Here, as in PEFT, the penalty is the mean of the norms.

    Args:
        rows: M (r, n).

    Returns:
        The norm, a scalar, and the gradient (r, n), in fp32 or more; where the norm is 0 so is the gradient.
    """
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))  # in bf16 next to nothing is left of the difference
    difference = rows @ rows.T - torch.eye(len(rows), device=rows.device)
    norm = torch.linalg.vector_norm(difference)
    return norm, 2 * difference @ rows / norm.clamp_min(torch.finfo(norm.dtype).tiny)


@dataclass(frozen=True)
class Schedule:
    """How many triplets are left after each optimizer step, counted from 1 (equation 12).

    Attributes:
        tinit: steps before any is taken.
        tfinal: steps with the final budget.
        deltaT: steps between two allocations.
        total_step: all steps.
    """

    tinit: int
    tfinal: int
    deltaT: int
    total_step: int

    @property
    def end(self) -> int:
        """The step of the last allocation."""
        return self.total_step - self.tfinal

    def budget(self, step: int, first: int, last: int) -> int:
        """The number of triplets after ``step``: from ``first`` down to ``last``, fast and then ever more slowly."""
        if step <= self.tinit:
            return first
        if step >= self.end:
            return last
        left = 1 - (step - self.tinit) / (self.end - self.tinit)
        return int((first - last) * left**3 + last)

    def is_due(self, step: int) -> bool:
        """Whether triplets are chosen after ``step``."""
        return step == self.end or (self.tinit < step < self.end and step % self.deltaT == 0)


@dataclass
class RankAllocator:
    """Scores the triplets, and says which stay: all that resuming needs.

    Attributes:
        schedule: when and how many.
        step: optimizer steps so far.
        sensitivity: the moving average of ``|w ∂L/∂w|`` by the parameter's name, in its shape (equations 8 and 9).
        uncertainty: that of how far single values lie from it (equation 10).
        masks: by the module's path, which of its r triplets stay (r,); none before the first allocation.
        kept: how many that are.
    """

    schedule: Schedule
    step: int = 0
    sensitivity: dict[str, Tensor] = field(default_factory=dict)
    uncertainty: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    kept: int = 0

    def prepare(self, layers: Mapping[str, AdaLoRALayer]) -> None:
        """Have the averages, and have everything on the device of the layers."""
        parameters = _named(layers) if self.step < self.schedule.end else {}
        for averages in (self.sensitivity, self.uncertainty):
            started = {name: averages.get(name, torch.zeros_like(p)).to(p.device) for name, p in parameters.items()}
            averages.update(started)
        for path, mask in self.masks.items():
            self.masks[path] = mask.to(layers[path].lora_E.device)

    @torch.no_grad()
    def observe(self, parameters: Mapping[str, nn.Parameter], beta1: float, beta2: float) -> None:
        """Take the gradients of one optimizer step into the averages (equations 8 to 10)."""
        names = [name for name, parameter in parameters.items() if parameter.grad is not None]
        if not names:
            return
        sensitivity, uncertainty = ([a[name] for name in names] for a in (self.sensitivity, self.uncertainty))
        now = torch._foreach_mul([parameters[n] for n in names], [cast(Tensor, parameters[n].grad) for n in names])
        torch._foreach_abs_(now)
        torch._foreach_lerp_(sensitivity, now, 1 - beta1)
        torch._foreach_sub_(now, sensitivity)
        torch._foreach_abs_(now)
        torch._foreach_lerp_(uncertainty, now, 1 - beta2)

    def importance(self, path: str) -> Tensor:
        """The score of each triplet of a module (r,): its λ's, and the means over its two vectors (equation 7)."""
        a, b, e = (
            self.sensitivity[name] * self.uncertainty[name]  # equation 11
            for name in (f"{path}.{key}" for key in ("lora_A", "lora_B", "lora_E"))
        )
        return e[:, 0] + (a.mean(dim=1) + b.mean(dim=0))

    def allocate(self, layers: Mapping[str, AdaLoRALayer], budget: int) -> None:
        """Keep the ``budget`` most important triplets of all layers (equation 6); of equals, the first."""
        self.kept, scores = budget, [self.importance(path) for path in layers]
        best = torch.cat([score.to(scores[0].device) for score in scores]).argsort(descending=True, stable=True)
        kept = torch.zeros_like(best, dtype=torch.bool).index_fill_(0, best[:budget], True)
        for (path, layer), mask in zip(layers.items(), kept.split([len(score) for score in scores]), strict=True):
            self.masks[path] = mask.clone().to(layer.lora_E.device)

    @torch.no_grad()
    def mask(self, layers: Mapping[str, AdaLoRALayer]) -> None:
        """Set the λ of all others to zero."""
        for path, mask in self.masks.items():
            layers[path].lora_E.masked_fill_(~mask[:, None], 0)

    def advance(self, layers: Mapping[str, AdaLoRALayer], target_r: int) -> None:
        """After an optimizer step: choose where it's due, and mask."""
        due = self.schedule.is_due(self.step)
        if due:
            self.allocate(layers, self.budget(layers, target_r))
        if self.step >= self.schedule.end:
            self.sensitivity, self.uncertainty = {}, {}  # the choice is made
        if due or self.step > self.schedule.end:
            self.mask(layers)

    def budget(self, layers: Mapping[str, AdaLoRALayer], target_r: int) -> int:
        """The number of triplets that the schedule leaves by now."""
        first = sum(layer.adalora.init_r for layer in layers.values())
        return self.schedule.budget(self.step, first, target_r * len(layers))


# --------------------------------------------------------------------------------------------- the layers


@dataclass(frozen=True)
class AdaLoRASettings:
    """What a layer needs to know, by PEFT's names.

    Attributes:
        init_r, lora_alpha, lora_dropout: rank at first, alpha, dropout on its input.
        training: the settings of the training that it had, or has, for the files; layers that differ in them are alike.
    """

    init_r: int
    lora_alpha: float
    lora_dropout: float
    training: Mapping[str, Any] = field(compare=False)

    @property
    def scaling(self) -> float:
        """alpha / init_r, whatever the rank has become, so that pruning changes nothing; written as in PEFT."""
        return self.lora_alpha / (self.init_r + 1e-5)

    def __str__(self) -> str:
        return f"(init_r={self.init_r}, alpha={self.lora_alpha:g}, dropout={self.lora_dropout:g})"


class AdaLoRALayer(Injected):
    """``h = W x + s · P Λ Q dropout(x)``, beside whatever the module itself computes. The rank r may become 0."""

    method = "ADALORA"
    acts_on = "weights"
    slot = "adalora"
    adds: ClassVar[Mapping[str, str]] = {"lora_A": "lora_A", "lora_B": "lora_B", "lora_E": "lora_E"}
    as_vectors = ("lora_E",)

    adalora: AdaLoRASettings
    lora_A: nn.Parameter  # Q: (r, in)
    lora_B: nn.Parameter  # P: (out, r)
    lora_E: nn.Parameter  # λ: (r, 1)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The module's own output plus the low-rank one; shapes are the module's."""
        x, a = first_tensor(args, kwargs), self.lora_A * self.lora_E
        dropout = self.adalora.lora_dropout if self.in_training else 0.0
        linear = frozen_linear(self, x)
        if linear is not None:
            return lora_linear(x, linear, a, self.lora_B, self.adalora.scaling, dropout)
        out = super().forward(*args, **kwargs)  # type: ignore[misc]
        low_rank = F.linear(F.linear(F.dropout(x.to(a.dtype), dropout), a), self.lora_B)
        return out + (self.adalora.scaling * low_rank).to(out.dtype)

    def delta(self) -> Tensor:
        """``s · P Λ Q`` in the shape of the module's weight."""
        return self.adalora.scaling * self.lora_B @ (self.lora_A * self.lora_E)

    def folded(self, weight: Tensor) -> dict[str, Tensor]:
        """``W + s · P Λ Q``, summed in fp32 or more."""
        return {"weight": weight + self.delta()}

    @classmethod
    def start(cls, module: Any, r: int) -> dict[str, Tensor]:
        """Values for what is added to ``module``: P and Q small and random, λ zero."""
        n_out, n_in = cls.sizes(module)
        a, b = 0.02 * torch.randn(r, n_in), 0.02 * torch.randn(n_out, r)
        return {"lora_A": a, "lora_B": b, "lora_E": torch.zeros(r, 1)}

    @staticmethod
    def sizes(module: Any) -> tuple[int, int]:
        """The numbers of outputs and inputs."""
        return module.out_features, module.in_features

    @classmethod
    def in_files(cls, layer: Any) -> dict[str, Tensor]:
        """The triplets that contribute: those whose λ isn't zero."""
        kept = alive(layer)
        return {"lora_A": layer.lora_A[kept], "lora_B": layer.lora_B[:, kept], "lora_E": layer.lora_E[kept]}

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any) -> None:
        # A state has the rank of its time: full in training, pruned after it. The layer takes it.
        for key in self.adds:
            parameter = getattr(self, key)
            value = state_dict.get(f"{prefix}{key}", parameter)
            if value.shape != parameter.shape and _but_for_rank(key, value) == _but_for_rank(key, parameter):
                parameter.grad, parameter.data = None, parameter.data.new_empty(value.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]


class AdaLoRALinear(AdaLoRALayer):
    """AdaLoRA on ``nn.Linear``."""


class AdaLoRAConv1D(AdaLoRALayer):
    """AdaLoRA on Hugging Face's ``Conv1D``, whose weight is stored as (in, out)."""

    def delta(self) -> Tensor:
        """``s · (P Λ Q)ᵀ``."""
        return super().delta().T

    @staticmethod
    def sizes(module: Any) -> tuple[int, int]:
        """The numbers of outputs and inputs."""
        n_in, n_out = module.weight.shape
        return n_out, n_in


_TRAINING = ("target_r", "tinit", "tfinal", "deltaT", "total_step", "beta1", "beta2", "orth_reg_weight")
_RANK_AXIS = {"lora_A": 0, "lora_B": 1, "lora_E": 0}


def layer_for(module: nn.Module) -> type[AdaLoRALayer] | None:
    """The AdaLoRA layer for this kind of module, or None."""
    if isinstance(module, nn.Linear):
        return AdaLoRALinear
    return AdaLoRAConv1D if is_conv1d(module) else None


def alive(layer: Any) -> Tensor:
    """Which triplets of a layer contribute to its output: (r,) booleans."""
    return layer.lora_E.detach()[:, 0] != 0


@torch.no_grad()
def prune(layer: AdaLoRALayer, kept: Tensor, optimizers: Iterable[Optimizer] = ()) -> None:
    """Take all triplets but ``kept`` (r,) out of a layer, and out of what optimizers remember of it.

    In place: the parameters stay the objects that optimizers and the user hold. ``kept`` may lie on another device.
    """
    rows = kept.nonzero()[:, 0]

    def left(tensor: Tensor, axis: int) -> Tensor:
        return tensor.index_select(axis, rows.to(tensor.device))

    for key, axis in _RANK_AXIS.items():
        parameter, shape = getattr(layer, key), getattr(layer, key).shape
        parameter.grad = None
        parameter.data = left(parameter.data, axis)
        for state in (optimizer.state[parameter] for optimizer in optimizers if parameter in optimizer.state):
            tensors = {name: value for name, value in state.items() if isinstance(value, Tensor) and value.ndim}
            state.update({n: left(t, axis) for n, t in tensors.items() if t.shape == shape})
            if any(t.shape != shape for t in tensors.values()):  # of its own kind (Adafactor): it starts anew
                state.clear()


def _but_for_rank(key: str, tensor: Tensor) -> list[int]:
    return [size for axis, size in enumerate(tensor.shape) if axis != _RANK_AXIS[key]]


def _named(layers: Mapping[str, AdaLoRALayer]) -> dict[str, nn.Parameter]:
    return {f"{path}.{key}": getattr(layer, key) for path, layer in layers.items() for key in layer.adds}


# -------------------------------------------------------------------------------------------- the callback


class AdaLoRA(FineTuning):
    """LoRA whose ranks go where they matter (Zhang et al. 2023, https://arxiv.org/abs/2303.10512).

    ``L.Trainer(callbacks=[AdaLoRA(init_r=12, target_r=8)])``. The callback adds the penalty's gradient to that of
    whatever loss the module computes, once per optimizer step, and allocates after each, accumulation or not; there
    is nothing to call. Steps are counted as optimizer steps on what it trains, and the schedule resumes with the rest.

    Checkpoints keep all triplets, so that optimizers and weight averaging meet tensors of one size until ``fit``
    ends; then the masked ones are removed. The files of :func:`lightning_ft.save_adapter` never hold them. If
    training ends before the last allocation, that is made up for at its end, with a warning.

    Logged: ``adalora/budget`` (triplets), ``adalora/mean_rank``, ``adalora/orthogonality`` (the penalty, before its
    weight), and at the end ``adalora/ranks``, a table and a picture.

    Args:
        init_r: rank of each update at first.
        target_r: mean rank of the updates in the end; single ones have between 0 and ``init_r``.
        alpha: the update is scaled by alpha / init_r.
        dropout: probability of dropping an element of the adapter's input, in training.
        target_modules, exclude_modules, layers_to_transform, layers_pattern: as for
            :class:`~lightning_ft.methods.lora.LoRA`; linear layers.
        tinit: optimizer steps before ranks are taken; by default a tenth of all, in which importances settle.
        tfinal: steps at the final ranks; by default three tenths, for what is left to make up for what has gone.
        deltaT: steps between two allocations; by default such that there are about a hundred.
        beta1, beta2: how much of the old the averages of sensitivity and uncertainty keep at each step.
        orth_reg_weight: weight of the penalty.
        total_step: the number of optimizer steps; by default what the Trainer's own settings amount to. Give it where
            they don't tell: data of unknown length, manual optimization that doesn't step at each batch.
        modules_to_save, backbone, quantize, adapter_dtype: see :class:`~lightning_ft.callbacks.finetuning.FineTuning`.

    Raises:
        ValueError: for a value out of its range; in ``fit``, if the number of steps is unknown or the schedule
            leaves none to allocate in.
        InjectionError: on injection, see :meth:`FineTuning.inject`.
    """

    peft_type: ClassVar[str] = "ADALORA"
    plausible_lr: ClassVar[tuple[float, float]] = (2e-4, 5e-2)
    layers: ClassVar[tuple[type[Injected], ...]] = (AdaLoRALinear, AdaLoRAConv1D)

    def __init__(
        self,
        init_r: int = 12,
        target_r: int = 8,
        alpha: float = 32,
        dropout: float = 0.0,
        target_modules: str | Sequence[str] | None = None,
        *,
        exclude_modules: str | Sequence[str] | None = None,
        layers_to_transform: int | Sequence[int] | None = None,
        layers_pattern: str | Sequence[str] | None = None,
        tinit: int | None = None,
        tfinal: int | None = None,
        deltaT: int | None = None,
        beta1: float = 0.85,
        beta2: float = 0.85,
        orth_reg_weight: float = 0.5,
        total_step: int | None = None,
        modules_to_save: Sequence[str] | None = None,
        backbone: str | None = None,
        quantize: str | Mapping[str, Any] | None = None,
        adapter_dtype: AdapterDtype = "float32",
    ) -> None:
        super().__init__(modules_to_save, backbone, quantize, adapter_dtype=adapter_dtype)
        check_count("AdaLoRA: init_r", init_r)
        check_count("AdaLoRA: target_r", target_r)
        steps = {"tinit": (tinit, 0), "tfinal": (tfinal, 0), "deltaT": (deltaT, 1), "total_step": (total_step, 1)}
        for name, (count, least) in steps.items():
            if count is not None:
                check_count(f"AdaLoRA: {name}", count, least)
        if target_r > init_r:
            raise ValueError(f"AdaLoRA: target_r={target_r} is above init_r={init_r}: ranks are only taken away.")
        check_number("AdaLoRA: alpha", alpha, lambda x: x > 0, "above 0")
        check_dropout("AdaLoRA: dropout", dropout)
        for name, beta in {"beta1": beta1, "beta2": beta2}.items():
            check_number(f"AdaLoRA: {name}", beta, lambda x: 0 < x < 1, "in (0, 1)")
        check_number("AdaLoRA: orth_reg_weight", orth_reg_weight, lambda x: 0 <= x < math.inf, "of at least 0")
        self.init_r, self.target_r, self.alpha, self.dropout = init_r, target_r, alpha, dropout
        self.target_modules, self.exclude_modules = target_modules, exclude_modules
        self.layers_to_transform, self.layers_pattern = layers_to_transform, layers_pattern
        self.tinit, self.tfinal, self.deltaT, self.total_step = tinit, tfinal, deltaT, total_step
        self.beta1, self.beta2, self.orth_reg_weight = beta1, beta2, orth_reg_weight
        self._ranks: dict[str, int] = {}  # of modules that are loaded with fewer than init_r
        self._allocator: RankAllocator | None = None
        self._layers: dict[str, AdaLoRALayer] = {}  # of the training that runs
        self._hooks: list[RemovableHandle] = []
        self._penalty: Tensor | None = None
        self._penalised = False  # since the last step

    def inject(self, model: nn.Module) -> list[str]:
        """Freeze the base and put AdaLoRA into it; see :meth:`FineTuning.inject`."""
        base, saved = self.prepare(model)
        names = resolve_targets(
            base,
            self.target_modules,
            lambda module: layer_for(module) is not None,
            saved,
            self.exclude_modules,
            self.layers_to_transform,
            self.layers_pattern,
        )
        training = {key: getattr(self, key) for key in _TRAINING}
        settings = AdaLoRASettings(self.init_r, self.alpha, self.dropout, training)
        plan = {}
        for name in names:
            module = base.root.get_submodule(name)
            layer = layer_for(module)
            assert layer is not None
            plan[name] = Layer(layer, settings, partial(layer.start, module, self._ranks.get(name, self.init_r)))
        return inject_layers(base, plan, "AdaLoRA", saved, dtype=self.added_dtype)

    @property
    def settled(self) -> bool:
        """Whether the ranks are final."""
        return self._allocator is None or self._allocator.step >= self._allocator.schedule.end

    def finish(self, model: nn.Module) -> None:
        """Remove the triplets that contribute nothing, as a fit does at its end."""
        for _, layer in injected_modules(find_base(model, self.backbone).root):
            if isinstance(layer, AdaLoRALayer):
                prune(layer, alive(layer))

    # ---------------------------------------------------------------------------------- in PEFT's files

    @staticmethod
    def to_peft(layers: Mapping[str, Any], base: Base) -> dict[str, Any]:  # noqa: ARG004
        """The fields of PEFT's ``adapter_config.json`` for these layers, by path."""
        settings = asdict(next(iter(layers.values())).adalora)
        training = settings.pop("training")
        if None in training.values():  # before any training; PEFT takes no config without a schedule
            training |= {"tinit": 0, "tfinal": 0, "deltaT": 1, "total_step": 1}
        kept = {path: alive(layer).tolist() for path, layer in layers.items()}
        return {
            **settings,
            **training,
            "rank_pattern": {f"{path}.lora_E": k + [False] * (settings["init_r"] - len(k)) for path, k in kept.items()},
            "target_modules": list(layers),
            "fan_in_fan_out": any(isinstance(layer, AdaLoRAConv1D) for layer in layers.values()),
            "bias": "none",
            "init_lora_weights": True,
        }

    @classmethod
    def from_peft(
        cls, config: Mapping[str, Any], targets: Sequence[str], modules_to_save: Sequence[str], backbone: str | None
    ) -> AdaLoRA:
        """The method that PEFT's ``config`` describes, on the modules that its tensors belong to."""
        init_r = config.get("init_r", 12)  # PEFT's own defaults
        training = {key: config[key] for key in _TRAINING if config.get(key) is not None}
        method = cls(
            init_r,
            alpha=config.get("lora_alpha", 8),
            dropout=config.get("lora_dropout", 0.0),
            target_modules=exactly(targets),
            **{**training, "target_r": min(training.get("target_r", 8), init_r)},
            modules_to_save=modules_to_save,
            backbone=backbone,
        )
        patterns = config.get("rank_pattern") or {}
        kept = {path: patterns.get(f"{plain(path)}.lora_E") for path in targets}
        method._ranks = {path: sum(pattern) for path, pattern in kept.items() if pattern is not None}
        return method

    # ------------------------------------------------------------------ Lightning's hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See :class:`FineTuning`; a new fit begins a new schedule, unless a checkpoint brings its own.

        Raises:
            InjectionError: under a strategy that shards parameters.
        """
        if stage == "fit":
            self._allocator = None
            if trainer.strategy.restore_checkpoint_after_setup:  # which Lightning does where parameters are sharded
                raise InjectionError(
                    f"AdaLoRA compares whole singular vectors, and {type(trainer.strategy).__name__} shards them. Use"
                    " strategy='ddp', or LoRA."
                )
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the schedule, or go on with that of the checkpoint, and follow the optimizers' steps.

        Not before: tuning callbacks train and restore the module in on_fit_start.
        """
        super().on_train_start(trainer, pl_module)
        base = find_base(pl_module, self.backbone)
        self._layers = {
            plain(base.prefixed(path)): layer
            for path, layer in injected_modules(base.root)
            if isinstance(layer, AdaLoRALayer)
        }
        ranks = [len(layer.lora_E) for layer in self._layers.values()]
        if not any(ranks):
            raise InjectionError(
                "AdaLoRA: the adapter in the model has rank 0 everywhere, as one saved untrained: nothing of it can"
                " train. Merge it, which changes nothing, and start anew."
            )
        if any(r < layer.adalora.init_r for r, layer in zip(ranks, self._layers.values(), strict=True)):
            self._allocator = None
            rank_zero_info("AdaLoRA: the ranks were allocated in an earlier training, and stay.")
        else:
            self._allocator = self._allocator or RankAllocator(self._schedule(trainer))
            self._allocator.prepare(self._layers)
            training = {key: getattr(self, key) for key in _TRAINING} | asdict(self._allocator.schedule)
            for layer in self._layers.values():
                layer.adalora = replace(layer.adalora, training=training)
        for optimizer in trainer.optimizers:
            if self._own(optimizer):
                after = partial(self._after_step, first=not self._hooks)
                self._hooks.append(optimizer.register_step_pre_hook(self._before_step))
                self._hooks.append(optimizer.register_step_post_hook(after))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Add the penalty's gradient, behind AMP's unscaling and before clipping."""
        unscales = getattr(optimizer, "_step_supports_amp_scaling", False)  # a fused one, in its step
        scaler = getattr(trainer.precision_plugin, "scaler", None) if unscales else None
        self._penalise(optimizer, 1.0 if scaler is None else scaler.get_scale())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """See :class:`FineTuning`; log the budget, the mean rank and the penalty."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        allocator, count = self._allocator, len(self._layers)
        values: dict[str, Any] = {}
        if allocator is not None:
            values["adalora/budget"] = float(allocator.budget(self._layers, self.target_r))
            values["adalora/mean_rank"] = allocator.kept / count if allocator.masks else float(self.init_r)
        if self._penalty is not None:
            values["adalora/orthogonality"] = self._penalty
        pl_module.log_dict(values)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make up for an allocation that training didn't get to, and report the ranks."""
        allocator = self._allocator
        if allocator is None or allocator.step == 0:
            return
        if allocator.step < allocator.schedule.end:
            rank_zero_warn(
                f"AdaLoRA: training ended after {allocator.step} optimizer steps, and the ranks were to be final after"
                f" {allocator.schedule.end} of {allocator.schedule.total_step}. They're cut to a mean of"
                f" {self.target_r} now, with no step to adapt to it. If training is always this long, set total_step."
            )
            allocator.allocate(self._layers, self.target_r * len(self._layers))
            allocator.mask(self._layers)
        # A checkpoint of after the end has no masks; where none was to be taken out, it resumes with all ranks.
        full = {path: len(layer.lora_E) for path, layer in self._layers.items()}
        ranks = full | {path: int(mask.sum()) for path, mask in allocator.masks.items()}
        rank_zero_info(
            f"AdaLoRA: ranks of {min(ranks.values())} to {max(ranks.values())},"
            f" {sum(ranks.values()) / len(ranks):.1f} on average, of {self.init_r} at first"
        )
        if trainer.loggers and trainer.is_global_zero:
            log_table(trainer.loggers, "adalora/ranks", ["module", "rank"], list(ranks.items()))
            picture = heat_map(ranks, self.init_r, "rank")
            log_figure(trainer.loggers, "adalora/ranks", picture, trainer.global_step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the masked triplets.

        The last that happens in a fit: weight averaging copies into tensors of the old size in on_train_end. Lightning
        has moved the module and the optimizers' state off the GPU by then, and the masks are still there.
        """
        masks = self._allocator.masks if self._allocator is not None else {}
        for path, layer in self._layers.items():  # none where a resumed fit found that it had nothing left to do
            if path in masks:
                prune(layer, masks.pop(path), trainer.optimizers)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See :class:`FineTuning`."""
        super().teardown(trainer, pl_module, stage)
        self._layers = {}
        while self._hooks:
            self._hooks.pop().remove()

    # ------------------------------------------------------------------ for checkpoints

    @property
    def state_key(self) -> str:
        """Apart from another AdaLoRA's, on another backbone."""
        return self._generate_state_key(backbone=self.backbone)

    def state_dict(self) -> dict[str, Any]:
        """The schedule, how far it has come, and what the next allocation rests on: numbers and tensors."""
        if self._allocator is None:
            return {}
        return {**vars(self._allocator), "schedule": asdict(self._allocator.schedule)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._allocator = RankAllocator(**{**state_dict, "schedule": Schedule(**state_dict["schedule"])})

    # ------------------------------------------------------------------ the schedule

    def _schedule(self, trainer: Trainer) -> Schedule:
        total = self.total_step or trainer.estimated_stepping_batches
        if not 0 < total < math.inf:
            raise UserError(
                "AdaLoRA can't tell how many optimizer steps training takes, which its schedule rests on. Set the"
                " Trainer's max_steps, or max_epochs if the data has a length, or AdaLoRA(total_step=...)."
            )
        total = int(total)
        tinit = total // 10 if self.tinit is None else self.tinit
        tfinal = 3 * total // 10 if self.tfinal is None else self.tfinal
        span = total - tinit - tfinal
        if span < 1:
            raise UserError(
                f"AdaLoRA: tinit={tinit} and tfinal={tfinal} leave none of the {total} optimizer steps to allocate in."
                " Lower them, or train longer."
            )
        schedule = Schedule(tinit, tfinal, self.deltaT or max(1, span // 100), total)
        rank_zero_info(
            f"AdaLoRA: rank {self.init_r} for {tinit} optimizer steps, then an allocation every {schedule.deltaT} until"
            f" step {schedule.end} of {total}, where the mean rank is {self.target_r}"
        )
        return schedule

    # ------------------------------------------------------------------ around an optimizer's step

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Without a closure and without Lightning's hooks: by self.optimizers(use_pl_optimizer=False).
        if not self._penalised and not args[1:] and not kwargs.get("closure"):
            self._penalise(optimizer, 1.0)

    @torch.no_grad()
    def _penalise(self, optimizer: Optimizer, scale: float) -> None:
        held = {id(parameter) for parameter in self._own(optimizer).values()}
        if not held or self.orth_reg_weight == 0:
            return
        norms, weight = [], scale * self.orth_reg_weight / (2 * len(self._layers))
        for layer in self._layers.values():
            for matrix, rows in ((layer.lora_A, layer.lora_A), (layer.lora_B, layer.lora_B.T)):
                norm, gradient = orthogonality(rows)
                norms.append(norm)
                if id(matrix) in held and matrix.grad is not None:
                    matrix.grad.add_(gradient if rows is matrix else gradient.T, alpha=weight)
        self._penalty = torch.stack(norms).mean()
        self._penalised = True

    def _after_step(self, optimizer: Optimizer, *_: Any, first: bool) -> None:
        """Where our parameters have two optimizers, each tells of its own, and the first one counts."""
        self._penalised = False
        allocator = self._allocator
        if allocator is None or getattr(optimizer, "found_inf", None):  # a fused optimizer didn't step then
            return
        allocator.step += first
        if allocator.step < allocator.schedule.end or allocator.step == 1:
            allocator.observe(self._own(optimizer), self.beta1, self.beta2)
        if first:
            allocator.advance(self._layers, self.target_r)

    def _own(self, optimizer: Optimizer) -> dict[str, nn.Parameter]:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        return {name: parameter for name, parameter in _named(self._layers).items() if id(parameter) in held}
