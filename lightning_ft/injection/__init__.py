"""Where things go in: pure torch, no Lightning, no Hugging Face import."""

from lightning_ft.injection.layers import layer_depths
from lightning_ft.injection.surgery import (
    Injected,
    Layer,
    all_or_nothing,
    attach,
    detach,
    freeze_all_but,
    freeze_base,
    inject_layers,
    injected_modules,
    injected_names,
    refuse_injected,
    thaw,
    unfreeze,
)
from lightning_ft.injection.targets import (
    Base,
    InjectionError,
    exactly,
    find_base,
    is_conv1d,
    match_modules,
    match_names,
    resolve_targets,
)

__all__ = [
    "Base",
    "Injected",
    "InjectionError",
    "Layer",
    "all_or_nothing",
    "attach",
    "detach",
    "exactly",
    "find_base",
    "freeze_all_but",
    "freeze_base",
    "inject_layers",
    "injected_modules",
    "injected_names",
    "is_conv1d",
    "layer_depths",
    "match_modules",
    "match_names",
    "refuse_injected",
    "resolve_targets",
    "thaw",
    "unfreeze",
]
