"""torch.compile for a fit, in place, so that keys, types and what is injected stay what they are."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_ft.errors import UserError
from lightning_ft.injection import find_base


class Compile(Callback):
    """Compiles the base model of any LightningModule, with what a method put into it, for the training steps of a fit.

    ``L.Trainer(callbacks=[LoRA(), Compile()])``. The first steps take seconds to minutes, and so do the first of a new
    shape of batches. ``module.compile(...)``, not ``torch.compile(module)``, whose wrapper would put
    ``_orig_mod`` into every key. Validation runs as it is, for ``generate()`` would compile for length after length.

    Args:
        mode: ``"default"``, ``"reduce-overhead"``, ``"max-autotune"``, as for ``torch.compile``.
        dynamic: whether sizes may vary from the start; None: as soon as they do.
        fullgraph: whether what can't be in one graph is an error.
        backend: what compiles.
        backbone: path of the base, where it isn't the one Hugging Face model
            (:func:`lightning_ft.injection.find_base`).

    Raises:
        InjectionError: when ``fit`` starts, if there is no base to be found.
        UserError: after the first batch, if the module didn't call what was compiled, so that nothing was compiled.
    """

    def __init__(
        self,
        mode: str | None = None,
        dynamic: bool | None = None,
        fullgraph: bool = False,
        backend: str = "inductor",
        backbone: str | None = None,
    ) -> None:
        self.mode, self.dynamic, self.fullgraph, self.backend = mode, dynamic, fullgraph, backend
        self.backbone = backbone
        self._root: Any = None
        self._before: Any = None  # what the user's own compile() left there
        self._called = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compile, which takes its time at the first batch."""
        self._root, self._called = find_base(pl_module, self.backbone).root, False
        root = self._root
        self._before = root._compiled_call_impl
        root.compile(mode=self.mode, dynamic=self.dynamic, fullgraph=self.fullgraph, backend=self.backend)
        compiled = root._compiled_call_impl

        def in_training(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return root._call_impl(*args, **kwargs)
            self._called = True
            return compiled(*args, **kwargs)

        root._compiled_call_impl = in_training

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """See that it had an effect."""
        if not self._called:
            raise UserError(
                f"Compile: {type(pl_module).__name__} doesn't call its {type(self._root).__name__}, but parts of it, so"
                ' that nothing was compiled. Name what it calls: Compile(backbone="model.bert").'
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the model as it was."""
        if self._root is not None:
            self._root._compiled_call_impl, self._root = self._before, None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the model as it was."""
        self.teardown(trainer, pl_module, "")
