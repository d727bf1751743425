"""Parameter groups and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from lightning_ft.errors import UserError
from lightning_ft.injection import injected_modules, layer_depths


class RateError(UserError):
    """A setting of the learning rate that makes no sense for this model or this training."""


def parameter_groups(
    model: nn.Module, trunk: nn.Module, layer_decay: float = 1.0, head_lr_ratio: float = 1.0
) -> list[dict[str, Any]]:
    """What trains of ``model``, grouped by weight decay and by rate.

    Biases, norms and other vectors get no weight decay. With ``layer_decay`` d < 1, layer l of L has the
    rate lr · d^(L + 1 - l), where embeddings are layer 0 and the head L + 1 (discriminative fine-tuning,
    Howard & Ruder 2018, https://arxiv.org/abs/1801.06146, section 3.2; the exponent is BEiT's). With
    ``head_lr_ratio`` c, the head has the rate c · lr: it starts at random, where the base is pretrained.

    Args:
        model: the whole module; what of it lies outside ``trunk`` is head.
        trunk: the pretrained part, with its layers in an ``nn.ModuleList``.
        layer_decay: d, above 0 and at most 1.
        head_lr_ratio: c, above 0.

    Returns:
        Groups for an optimizer; ``lr_scale`` in each is for :func:`scale_rates`.

    Raises:
        RateError: for a value out of range, or a ``layer_decay`` below 1 where the trunk has no stack of layers.
    """
    if not head_lr_ratio > 0:
        raise RateError(f"head_lr_ratio must be above 0, not {head_lr_ratio}.")
    if not 0 < layer_decay <= 1:
        raise RateError(f"layer_decay must be above 0 and at most 1, not {layer_decay}.")
    by_name = layer_depths(trunk) if layer_decay < 1 else {}
    if layer_decay < 1 and not by_name:
        raise RateError(f"layer_decay needs a stack of layers (an nn.ModuleList), and {type(trunk).__name__} has none.")
    depths = {id(trunk.get_parameter(name)): depth for name, depth in by_name.items()}
    if head_lr_ratio != 1 and not depths:
        depths = {id(parameter): 0 for parameter in trunk.parameters()}
    head = max(depths.values(), default=0) + 1
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    # What methods add says so itself: LoRA's A and B stay matrices at rank 1, where IA3's (n, 1) is a vector.
    added = {
        id(parameter): key in mixin.as_vectors or parameter.ndim <= 1
        for _, layer in injected_modules(model)
        for mixin in layer._mixins
        for key in mixin.adds
        if (parameter := getattr(layer, key)) is not None
    }
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        vector = added.get(id(parameter), sum(size > 1 for size in parameter.shape) <= 1)
        depth, decays = depths.get(id(parameter), head), not vector
        if (depth, decays) not in groups:
            place = "all" if not depths else "head" if depth == head else f"layer_{depth}" if by_name else "base"
            name = place if decays else f"{place}_no_decay"
            scale = head_lr_ratio if depth == head else layer_decay ** (head - depth)
            groups[depth, decays] = {"params": [], "name": name, "lr_scale": scale}
            if not decays:
                groups[depth, decays]["weight_decay"] = 0.0
        groups[depth, decays]["params"].append(parameter)
    return list(groups.values())


def scale_rates(optimizer: Optimizer) -> Optimizer:
    """Multiply each group's rate by its ``lr_scale``; returns the optimizer."""
    for group in optimizer.param_groups:
        group["lr"] *= group.pop("lr_scale")
    return optimizer


def linear(optimizer: Optimizer, total_steps: int, warmup: float = 0.0) -> LambdaLR:
    """Rise to the rate over ``warmup``, then fall to 0 in a straight line. ``warmup``: see :func:`warmup_steps`."""
    warm = warmup_steps(warmup, total_steps)
    return _warmed(optimizer, warm, lambda step: 1 - _progress(step, total_steps - warm))


def cosine(optimizer: Optimizer, total_steps: int, warmup: float = 0.0) -> LambdaLR:
    """Rise to the rate over ``warmup``, then fall to 0 along half a cosine. ``warmup``: see :func:`warmup_steps`."""
    warm = warmup_steps(warmup, total_steps)
    return _warmed(optimizer, warm, lambda step: (1 + math.cos(math.pi * _progress(step, total_steps - warm))) / 2)


def constant(optimizer: Optimizer, total_steps: int, warmup: float = 0.0) -> LambdaLR:
    """Rise to the rate over ``warmup`` and stay. ``warmup``: see :func:`warmup_steps`."""
    return _warmed(optimizer, warmup_steps(warmup, total_steps), lambda _: 1.0)


def inverse_sqrt(optimizer: Optimizer, total_steps: int, warmup: float = 0.0, timescale: int | None = None) -> LambdaLR:
    """Rise to the rate over ``warmup``, then fall with the square root of the steps: slowly, and never to 0.

    At step t from warm-up's end w on, the rate is lr · √(T / (t - w + T)), so that at T = w it is lr · √(w / t)
    (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 5.3). It doesn't depend on where training ends.

    Args:
        optimizer: whose rates are scheduled.
        total_steps: of the training.
        warmup: see :func:`warmup_steps`.
        timescale: T in steps; by default w, without warm-up 10,000.
    """
    warm = warmup_steps(warmup, total_steps)
    scale = timescale or warm or 10_000
    return _warmed(optimizer, warm, lambda step: math.sqrt(scale / (step + scale)))


def one_cycle(
    optimizer: Optimizer,
    total_steps: int,
    warmup: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    cycle_momentum: bool = True,
) -> OneCycleLR:
    """One cycle (Smith & Topin 2017, https://arxiv.org/abs/1708.07120): up to the rate over ``warmup``, down to near 0.

    Both ways along half a cosine, each parameter group to its own rate; momentum (Adam's β₁) goes the other way,
    from 0.95 to 0.85 and back.

    Args:
        optimizer: whose rates are scheduled.
        total_steps: of the training; taking more is an error.
        warmup: see :func:`warmup_steps`; at least 2 steps are taken.
        div_factor: the first rate is the highest over this.
        final_div_factor: the last rate is the first over this.
        cycle_momentum: whether momentum is scheduled too.

    Raises:
        RateError: if nothing is left of the training after warm-up.
    """
    warm = max(warmup_steps(warmup, total_steps), 2)  # with one, it would have to rise in no time
    if warm >= total_steps:
        raise RateError(f"one_cycle rises over {warm} steps, and must fall after that: of {total_steps} none are left.")
    return OneCycleLR(
        optimizer,
        [group["lr"] for group in optimizer.param_groups],  # one number would give all groups the same rate
        total_steps,
        pct_start=warm / total_steps,
        div_factor=div_factor,
        final_div_factor=final_div_factor,
        cycle_momentum=cycle_momentum,
    )


def warmup_steps(warmup: float, total_steps: int) -> int:
    """``warmup`` below 1 is a share of all steps; a whole number of 1 or more is steps.

    Raises:
        RateError: if it is negative, a fraction above 1, or longer than the training.
    """
    if warmup < 0 or (warmup > 1 and warmup != int(warmup)):
        raise RateError(f"warmup must be a share below 1 or a whole number of steps, not {warmup}.")
    if warmup > total_steps:
        raise RateError(f"warmup={int(warmup)} steps is longer than the training of {total_steps} steps.")
    return round(warmup * total_steps) if warmup < 1 else int(warmup)


# Those of transformers are the same, but to import them is to import its Trainer, PEFT and bitsandbytes: seconds, and
# a line of advice about 4-bit kernels.
def _warmed(optimizer: Optimizer, warm: int, after: Callable[[int], float]) -> LambdaLR:
    """A straight rise to the rate over ``warm`` steps; from there on ``after`` of the steps since, times the rate."""
    return LambdaLR(optimizer, lambda step: step / warm if step < warm else after(step - warm))


def _progress(step: int, steps: int) -> float:
    return min(1.0, step / max(1, steps))
