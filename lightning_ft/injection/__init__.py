"""Where things go in: pure torch, no Lightning, no Hugging Face import."""

from lightning_ft.injection.surgery import (
    Injected,
    attach,
    detach,
    freeze_base,
    injected_modules,
    injected_names,
    unfreeze,
)
from lightning_ft.injection.targets import Base, InjectionError, find_base, is_conv1d, resolve_targets

__all__ = [
    "Base",
    "Injected",
    "InjectionError",
    "attach",
    "detach",
    "find_base",
    "freeze_base",
    "injected_modules",
    "injected_names",
    "is_conv1d",
    "resolve_targets",
    "unfreeze",
]
