"""Liger's Triton kernels (https://arxiv.org/abs/2410.10989) in a Hugging Face model, for the time of a fit."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_ft.errors import UserError
from lightning_ft.injection import Injected, find_base


class LigerKernels(Callback):
    """One kernel each for RMS and layer norms, rotary positions and gated MLPs, where Liger has them for the model.

    ``L.Trainer(callbacks=[LoRA(), LigerKernels()])``, on a GPU, with ``pip install 'lightning-ft[liger]'``. Losses stay
    the task's: ``CausalLM`` makes no logits either. A module to which a method gave a forward pass of its own keeps it.

    Args:
        backbone: path of the base, where it isn't the one Hugging Face model
            (:func:`lightning_ft.injection.find_base`).

    Raises:
        InjectionError: when ``fit`` starts, if there is no base to be found.
        UserError: likewise, if Liger isn't installed or has no kernels for the model, or if that's not on a GPU.
    """

    def __init__(self, backbone: str | None = None) -> None:
        self.backbone = backbone
        self._changed: list[Change] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the kernels in."""
        root = find_base(pl_module, self.backbone).root
        if importlib.util.find_spec("liger_kernel") is None:
            raise UserError("LigerKernels needs Liger: pip install 'lightning-ft[liger]', or leave it out.")
        device = trainer.strategy.root_device
        if device.type != "cuda":
            raise UserError(f"LigerKernels are for a GPU, and the model is on '{device}': leave them out.")
        self._changed = put_in(root)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the model as it was."""
        undo(self._changed)
        self._changed = []

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the model as it was."""
        self.teardown(trainer, pl_module, "")


class Change(NamedTuple):
    """An attribute that has another value now, or is there now."""

    namespace: dict[str, Any]
    key: str
    before: Any  # _ABSENT: it wasn't there


_ABSENT = object()


def put_in(root: Any) -> list[Change]:
    """Liger's kernels into a Hugging Face model, and into the file of its class, whose functions all models call.

    Raises:
        UserError: if it has none for it.
    """
    from transformers.integrations.liger import apply_liger_kernel

    of_modules = {module: vars(module) for module in root.modules()}
    files = {c.__module__ for c in type(root).__mro__ if c.__module__.startswith("transformers.models.")}
    namespaces = [*of_modules.values(), *(vars(sys.modules[name]) for name in files)]
    before = [dict(namespace) for namespace in namespaces]
    apply_liger_kernel(root, {"cross_entropy": False, "fused_linear_cross_entropy": False})
    changed = [
        Change(now, key, was.get(key, _ABSENT))
        for now, was in zip(namespaces, before, strict=True)
        for key, value in now.items()
        if was.get(key, _ABSENT) is not value
    ]
    if not changed:
        raise UserError(f"Liger has no kernels for a {type(root).__name__}: leave LigerKernels out.")
    injected = {id(of_modules[module]) for module in of_modules if isinstance(module, Injected)}
    undo(change for change in changed if id(change.namespace) in injected)  # their forward would be passed over
    return changed


def undo(changed: Iterable[Change]) -> None:
    """Put back what was there, and take away what wasn't."""
    for namespace, key, before in changed:
        if before is _ABSENT:
            namespace.pop(key, None)
        else:
            namespace[key] = before
