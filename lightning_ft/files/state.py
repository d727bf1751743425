"""Which part of a state dict training changes, and how the rest is left out and put back.

A state dict splits in two by the marker and ``requires_grad`` alone. *Frozen* are the keys of the pretrained
base that training can't change: whoever builds the model again has them again. Everything else is saved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ft.errors import UserError
from lightning_ft.injection import Base, injected_names, is_quantized, plain


class StateError(UserError, RuntimeError):
    """A checkpoint or an adapter doesn't fit the model; the message names the keys and the cure."""


def frozen_modules(base: Base) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the base, by their paths in its root, with nothing of their own that trains.

    Their buffers (a BatchNorm's running statistics) belong to the pretrained model and must stay put too.
    """
    if base.is_trained_whole():
        return
    for name, module in base.named_modules():
        own = {key for mixin in getattr(module, "_mixins", ()) for key in mixin.adds}
        if not any(p.requires_grad for key, p in module.named_parameters(recurse=False) if key not in own):
            yield name, module


def frozen_keys(model: nn.Module, base: Base) -> set[str]:
    """The keys of ``model.state_dict()`` that the pretrained base gives back and training can't change.

    What is in the base is so under whatever name: ``self.encoder = self.model.bert`` gives its tensors second ones.
    """
    keys = list(model.state_dict())  # first of all: FSDP2 then exchanges whole parameters for their parts
    added = injected_names(model)
    still = {module for _, module in frozen_modules(base)}
    parameters = {id(p) for _, p in base.named_parameters() if not p.requires_grad}
    modules = dict(model.named_modules(remove_duplicate=False))

    def is_frozen(key: str) -> bool:
        path, _, own = key.rpartition(".")
        if path not in modules:  # deeper than modules go: what a packed weight consists of
            return is_frozen(path)
        parameter = modules[path]._parameters.get(own)
        return modules[path] in still if parameter is None else id(parameter) in parameters

    return {key for key in keys if key not in added and is_frozen(key)}


def method_keys(model: nn.Module, base: Base) -> set[str]:
    """The keys of what a method trains in the pretrained model: what it added, what isn't frozen, the head."""
    trained = {id(p) for p in base.root.parameters() if p.requires_grad}
    whole = {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in trained}
    return whole | {base.prefixed(name) for name in injected_names(base.root)}


def whole(tensor: Tensor) -> Tensor:
    """The value of a tensor that several processes share out (DTensor), all of which must ask; others as they are."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def is_shared_out(model: nn.Module) -> bool:
    """Whether several processes share out the parameters of ``model``, by FSDP2 or DeepSpeed's ZeRO-3."""
    return any(hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id") for parameter in model.parameters())


def gathered(model: nn.Module) -> AbstractContextManager[Any]:
    """Within it, what trains is whole where DeepSpeed's ZeRO-3 shares parameters out; all processes must enter it."""
    shared = [p for p in model.parameters() if p.requires_grad and hasattr(p, "ds_id")]
    if not shared:
        return nullcontext()
    from deepspeed.zero import GatheredParameters

    return GatheredParameters(shared)


def trained_state(state: Mapping[str, Any], frozen: set[str]) -> dict[str, Any]:
    """``state`` without the frozen keys, and with the names that compiled modules had before (``_orig_mod``)."""
    return {plain(key): value for key, value in state.items() if key not in frozen}


def complete_state(
    state: Mapping[str, Any], model: nn.Module, frozen: set[str], ours: set[str], source: str
) -> dict[str, Any]:
    """``state`` with the frozen keys filled in from ``model``, so that strict loading means what it says.

    Raises:
        StateError: if one of the keys ``ours``, which a method trains, has no value in ``state``.
    """
    # Of a packed weight a state dict tells more than it loads.
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
    live = {key: value for key, value in model.state_dict().items() if key.rpartition(".")[0] in modules}
    names = {plain(key): key for key in live}  # whether modules were compiled then or are now
    state = {names.get(plain(key), key): value for key, value in state.items()}
    # The rest is for strict loading to tell, after the module's own on_load_checkpoint.
    missing = sorted(key for key in ours if key not in state)
    if missing:
        raise StateError(
            f"{source} has no value for {len(missing)} trained tensors, {', '.join(missing[:3])} among them."
            " It was saved from another model or without this method. To start from a bare model's checkpoint,"
            " load it into the module first (MyModule.load_from_checkpoint), then fit without ckpt_path."
        )
    return {**{key: live[key] for key in frozen if key not in state and key in live}, **state}


def fingerprint(base: Base, samples: int = 64) -> dict[str, str]:
    """A short hash of the pretrained weights, to tell whether an adapter meets the base it was trained on.

    Reads ``samples`` evenly spaced values of each frozen parameter, so that it costs the same for any size. Packed
    weights are left out: two devices round them differently.

    Returns:
        The hash, and the weights' dtypes; hashes of different dtypes can't be compared.
    """
    digest, dtypes = hashlib.sha256(), set()
    for name, parameter in _frozen_parameters(base):
        dtypes.add(str(parameter.dtype))
        path, _, own = name.rpartition(".")
        if own != "weight" or not is_quantized(base.root.get_submodule(path)):
            digest.update(plain(name).encode() + samples_of(parameter, samples).numpy().tobytes())
    return {"sha256": digest.hexdigest(), "dtypes": " ".join(sorted(dtypes))}


def sampled(base: Base, samples: int = 64) -> dict[str, Tensor]:
    """What :func:`fingerprint` reads, by the parameters' names in the root: (samples or fewer,) in fp32 on the CPU."""
    return {name: samples_of(parameter, samples) for name, parameter in _frozen_parameters(base)}


def _frozen_parameters(base: Base) -> Iterator[tuple[str, nn.Parameter]]:
    added = injected_names(base.root)
    for name, parameter in base.named_parameters():
        if not (parameter.requires_grad or name in added or parameter.is_meta):
            yield name, parameter


def samples_of(parameter: Tensor, samples: int = 64) -> Tensor:
    """Evenly spaced values of ``parameter``, so many or all: in fp32 on the CPU."""
    flat = whole(parameter.detach()).flatten()
    index = torch.linspace(0, flat.numel() - 1, min(samples, flat.numel()), dtype=torch.float64).long()
    return flat[index.to(flat.device)].float().cpu()


def check_fingerprint(saved: Mapping[str, str] | None, present: Mapping[str, str], source: str) -> None:
    """Raise StateError if ``saved`` and ``present`` are of different pretrained weights."""
    if saved and saved["dtypes"] == present["dtypes"] and saved["sha256"] != present["sha256"]:
        raise StateError(
            f"{source} was trained over other pretrained weights than this model holds, so that its outputs"
            " would be meaningless. Build the model from the same pretrained weights; if they're randomly"
            " initialised, seed them (lightning.seed_everything) before the model is built."
        )
