"""Gradient checkpointing: less memory for activations, more time.

Chen et al. 2016, https://arxiv.org/abs/1604.06174: of each layer only the input is kept, and the backward pass runs the
layer's forward again. Gradients are the same, under dropout too, whose random numbers are drawn again alike.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lightning_ft.injection import InjectionError, pretrained_models

# The hook by which transformers has embeddings ask for gradients. The reentrant kind needs it; here it would cost the
# backward pass through all that's frozen below what trains.
_ASKING = "_require_grads_hook"


class GradientCheckpointing(Callback):
    """Has the Hugging Face models of any LightningModule checkpoint their layers while ``fit`` runs.

    ``L.Trainer(callbacks=[LoRA(), GradientCheckpointing()])``, with whatever method. Not the reentrant kind, which cuts
    what trains off from the loss where a layer's input needs no gradient, as over a frozen base. The models' cache of
    keys and values, which can't be kept then, is off for as long.

    Raises:
        InjectionError: when ``fit`` starts, if there is no Hugging Face model, or one that can't; at the first batch,
            if all that would be checkpointed is in eval mode, in which transformers doesn't.
    """

    def __init__(self) -> None:
        self._models: list[Any] = []
        self._before: list[tuple[Any, str, Any]] = []  # what was set: where, its name, its value before
        self._begun = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switch it on."""
        self._models = list(pretrained_models(pl_module))
        if not self._models:
            raise InjectionError(
                f"GradientCheckpointing: {type(pl_module).__name__} holds no Hugging Face model. In a model of your own"
                " call torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False) in its forward."
            )
        for model in self._models:
            _refuse_without(model)
        self._begun = False
        for model in self._models:
            self._before += checkpoint_layers(model)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """See, once, that it has an effect."""
        if self._begun:
            return
        self._begun = True
        if not any(layer.training for model in self._models for layer in _layers(model)):
            names = ", ".join(type(model).__name__ for model in self._models)
            raise InjectionError(
                f"GradientCheckpointing: {names} is in eval mode, as from_pretrained() gives it, in which transformers"
                " keeps all activations. Call model.train() where you build it."
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the models as they were."""
        while self._before:
            owner, name, value = self._before.pop()
            setattr(owner, name, value)
        self._models = []

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the models as they were."""
        self.teardown(trainer, pl_module, "")


def checkpoint_layers(model: Any, **keywords: Any) -> list[tuple[Any, str, Any]]:
    """Have a Hugging Face model checkpoint its layers in training.

    Args:
        model: the model.
        keywords: more of ``torch.utils.checkpoint.checkpoint``'s.

    Returns:
        What was set otherwise before: where, its name, its value.

    Raises:
        InjectionError: if the model can't.
    """
    _refuse_without(model)
    flags = [(layer, "gradient_checkpointing", layer.gradient_checkpointing) for layer in _layers(model)]
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    caches = [(c, "use_cache", c.use_cache) for c in configs.values() if getattr(c, "use_cache", None) is not None]
    asked_before = hasattr(model, _ASKING)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, **keywords})
    if hasattr(model, _ASKING) and not asked_before:
        model.disable_input_require_grads()
    for config, name, _ in caches:
        setattr(config, name, False)
    return [*flags, *caches]


def _refuse_without(model: Any) -> None:
    if not model.supports_gradient_checkpointing:
        raise InjectionError(f"{type(model).__name__} has no gradient checkpointing: leave it out.")


def _layers(model: nn.Module) -> list[Any]:
    """What transformers can checkpoint."""
    return [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
