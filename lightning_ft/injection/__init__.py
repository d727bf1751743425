"""Where things go in: pure torch, no Lightning, no Hugging Face import."""

from lightning_ft.injection.surgery import (
    Injected,
    attach,
    check_attachable,
    detach,
    freeze_base,
    injected_modules,
    injected_names,
    refuse_injected,
    thaw,
    unfreeze,
)
from lightning_ft.injection.targets import Base, InjectionError, find_base, is_conv1d, match_modules, resolve_targets

__all__ = [
    "Base",
    "Injected",
    "InjectionError",
    "attach",
    "check_attachable",
    "detach",
    "find_base",
    "freeze_base",
    "injected_modules",
    "injected_names",
    "is_conv1d",
    "match_modules",
    "refuse_injected",
    "resolve_targets",
    "thaw",
    "unfreeze",
]
