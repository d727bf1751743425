"""Liger's Triton kernels (https://arxiv.org/abs/2410.10989) in a Hugging Face model, for the time of a fit."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
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
        UserError: if Liger isn't installed; when ``fit`` starts, if it has no kernels for the model, or if the model
            isn't on a GPU.
        InjectionError: when ``fit`` starts, if there is no base to be found.
    """

    def __init__(self, backbone: str | None = None) -> None:
        if importlib.util.find_spec("liger_kernel") is None:
            raise UserError("LigerKernels needs Liger: pip install 'lightning-ft[liger]', or leave it out.")
        self.backbone = backbone
        self._changed: list[Change] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the kernels in."""
        root = find_base(pl_module, self.backbone).root
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
    """Liger's kernels into a Hugging Face model, and into the files of its classes, whose functions all models call.

    Raises:
        UserError: if it has none for it, or can't do that; then nothing is changed.
    """
    from transformers.integrations.liger import apply_liger_kernel

    modules = list(root.modules())
    injected = {id(vars(module)) for module in modules if isinstance(module, Injected)}
    classes = {c for module in modules for c in type(module).__mro__}
    files = {c.__module__ for c in classes if c.__module__.startswith("transformers.models.")}
    now = [vars(each) for each in (*modules, *(sys.modules[name] for name in files))]
    before = [dict(namespace) for namespace in now]
    wanted = {"cross_entropy": False, "fused_linear_cross_entropy": False, "swiglu": _is_gated_by_silu(root)}
    try:
        apply_liger_kernel(root, wanted)
    except Exception as error:
        undo(_changes(now, before))
        raise UserError(f"Liger fails at a {type(root).__name__} ({error}): leave LigerKernels out.") from error
    changed = _changes(now, before)
    if not changed:
        raise UserError(f"Liger has no kernels for a {type(root).__name__}: leave LigerKernels out.")
    # Else the forward pass that a method gave a module would be passed over.
    undo([change for change in changed if id(change.namespace) in injected])
    return [change for change in changed if id(change.namespace) not in injected]


def _is_gated_by_silu(root: Any) -> bool:
    """Liger doesn't look: its gated MLP has SiLU, whatever the model's has."""
    config = getattr(root, "config", None)
    return getattr(config and config.get_text_config(), "hidden_act", "silu") in ("silu", "swish")


def _changes(now: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]]) -> list[Change]:
    return [
        Change(space, key, was.get(key, _ABSENT))
        for space, was in zip(now, before, strict=True)
        for key, value in space.items()
        if was.get(key, _ABSENT) is not value
    ]


def undo(changed: Sequence[Change]) -> None:
    """Put back what was there, and take away what wasn't."""
    for namespace, key, before in changed:
        if before is _ABSENT:
            namespace.pop(key, None)
        else:
            namespace[key] = before
