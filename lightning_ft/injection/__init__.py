"""Where things go in: pure torch, no Lightning, no Hugging Face import."""

from lightning_ft.injection.surgery import (
    Injected,
    Layer,
    all_or_nothing,
    attach,
    detach,
    freeze_base,
    inject_layers,
    injected_modules,
    injected_names,
    refuse_injected,
    thaw,
    unfreeze,
)
from lightning_ft.injection.targets import Base, InjectionError, find_base, is_conv1d, match_modules, resolve_targets
from lightning_ft.injection.trunk import Trunk, find_trunk

__all__ = [
    "Base",
    "Injected",
    "InjectionError",
    "Layer",
    "Trunk",
    "all_or_nothing",
    "attach",
    "detach",
    "find_base",
    "find_trunk",
    "freeze_base",
    "inject_layers",
    "injected_modules",
    "injected_names",
    "is_conv1d",
    "match_modules",
    "refuse_injected",
    "resolve_targets",
    "thaw",
    "unfreeze",
]
