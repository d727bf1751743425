"""Parameter groups and learning-rate schedules."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_ft.errors import UserError
from lightning_ft.injection import injected_modules, layer_depths


class RateError(UserError):
    """A setting of the learning rate that makes no sense for this model or this training."""


def parameter_groups(model: nn.Module, trunk: nn.Module, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """What trains of ``model``, grouped by weight decay and depth.

    Biases, norms and other vectors get no weight decay. With ``layer_decay`` d < 1, layer l of L has the
    rate lr · d^(L + 1 - l), where embeddings are layer 0 and the head L + 1 (discriminative fine-tuning,
    Howard & Ruder 2018, https://arxiv.org/abs/1801.06146, section 3.2; the exponent is BEiT's).

    Args:
        model: the whole module; what of it lies outside ``trunk`` is head.
        trunk: the pretrained part, with its layers in an ``nn.ModuleList``.
        layer_decay: d, above 0 and at most 1.

    Returns:
        Groups for an optimizer; ``lr_scale`` in each is for :func:`scale_rates`.

    Raises:
        RateError: for a ``layer_decay`` out of range, or below 1 where the trunk has no stack of layers.
    """
    if not 0 < layer_decay <= 1:
        raise RateError(f"layer_decay must be above 0 and at most 1, not {layer_decay}.")
    by_name = layer_depths(trunk) if layer_decay < 1 else {}
    if layer_decay < 1 and not by_name:
        raise RateError(f"layer_decay needs a stack of layers (an nn.ModuleList), and {type(trunk).__name__} has none.")
    depths = {id(trunk.get_parameter(name)): depth for name, depth in by_name.items()}
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
            place = "all" if not depths else "head" if depth == head else f"layer_{depth}"
            name = place if decays else f"{place}_no_decay"
            groups[depth, decays] = {"params": [], "name": name, "lr_scale": layer_decay ** (head - depth)}
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
    from transformers import get_linear_schedule_with_warmup

    return get_linear_schedule_with_warmup(optimizer, warmup_steps(warmup, total_steps), total_steps)


def cosine(optimizer: Optimizer, total_steps: int, warmup: float = 0.0) -> LambdaLR:
    """Rise to the rate over ``warmup``, then fall to 0 along half a cosine. ``warmup``: see :func:`warmup_steps`."""
    from transformers import get_cosine_schedule_with_warmup

    return get_cosine_schedule_with_warmup(optimizer, warmup_steps(warmup, total_steps), total_steps)


def constant(optimizer: Optimizer, total_steps: int, warmup: float = 0.0) -> LambdaLR:
    """Rise to the rate over ``warmup`` and stay. ``warmup``: see :func:`warmup_steps`."""
    from transformers import get_constant_schedule_with_warmup

    return get_constant_schedule_with_warmup(optimizer, warmup_steps(warmup, total_steps))


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
