"""Where methods and files meet: save, load and merge what a method put into a model."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import (  # type: ignore[attr-defined]
    rank_zero_info,
    rank_zero_only,
    rank_zero_warn,
)
from torch import Tensor, nn

from lightning_ft.callbacks.checkpoint_io import METADATA, complete_checkpoint
from lightning_ft.callbacks.finetuning import FineTuning
from lightning_ft.errors import UserError
from lightning_ft.files import peft
from lightning_ft.files.card import Facts, pools_prompt
from lightning_ft.files.state import StateError, frozen_keys, gathered, is_shared_out, trained_state, whole
from lightning_ft.injection import (
    Base,
    Injected,
    InjectionError,
    all_or_nothing,
    bring_back,
    detach,
    find_base,
    forget,
    freeze_base,
    frozen_parts,
    injected_modules,
    injected_names,
    is_quantized,
    plain,
    remembering,
    thaw,
    with_values,
)
from lightning_ft.methods.adalora import AdaLoRA
from lightning_ft.methods.adapter import Adapter
from lightning_ft.methods.bitfit import BitFit
from lightning_ft.methods.freezing import GradualUnfreezing, TopLayers
from lightning_ft.methods.full import FullFineTuning
from lightning_ft.methods.head import HeadOnly
from lightning_ft.methods.ia3 import IA3
from lightning_ft.methods.layernorm import LayerNormTuning
from lightning_ft.methods.lora import LoRA
from lightning_ft.methods.prefix import PrefixTuning
from lightning_ft.methods.prompt import PromptTuning, PTuning
from lightning_ft.quantization import dense_weight, repacked, set_weight

METHODS: tuple[type[FineTuning], ...] = (
    LoRA, AdaLoRA, Adapter, IA3, PromptTuning, PTuning, PrefixTuning, BitFit, LayerNormTuning, TopLayers,
    GradualUnfreezing, FullFineTuning, HeadOnly,
)  # fmt: skip
"""Every method. Those that add parameters have a room in the file format, found by ``peft_type``."""

_ROOMS: dict[str, type[FineTuning]] = {method.peft_type: method for method in METHODS if method.layers}

Module = TypeVar("Module", bound=LightningModule)


def save_adapter(
    model: nn.Module, directory: str | Path, backbone: str | None = None, card: Facts | None = None
) -> Path:
    """Write what was trained, with its head, in PEFT's format (:mod:`lightning_ft.files.peft`).

    Of several processes the first one writes; where they share parameters out (FSDP2, ZeRO-3), all must call it.

    Args:
        model: the LightningModule, or the Hugging Face model in it.
        directory: where; made if it doesn't exist.
        backbone: path of the base, where it was named for training too.
        card: what the model card (README.md) is to tell beyond the method, its base and the versions: any of the
            keys of :class:`lightning_ft.files.card.Facts`, such as ``{"data": "my reviews", "labels": [...]}``.

    Returns:
        The directory.

    Raises:
        InjectionError: if no parameter of it trains, or it carries what isn't known here.
        ValueError: if ``card`` has a key that there is no place for.
    """
    base = find_base(model, backbone)
    with gathered(model):
        config, tensors = _collected(model, base)
        first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
        return peft.write(directory, config, tensors, card) if first else Path(directory)


def adapter_contents(model: nn.Module, backbone: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What :func:`save_adapter` writes of a model: ``adapter_config.json``, and the tensors by their names there."""
    return _collected(model, find_base(model, backbone))


def _collected(model: nn.Module, base: Base) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of an adapter's files."""
    state = trained_state(model.state_dict(), frozen_keys(model, base) | _keys_of_others(model, base))
    trained = {key: whole(value) for key, value in state.items()}
    if not trained:
        raise InjectionError("There is nothing to save: no parameter of the model trains. Inject a method first.")
    fields, added = _method_fields(base), {plain(name) for name in injected_names(model)}
    rooms = _rooms(fields)
    inside = _inside(rooms)
    described = peft.describe_base(base.root, needs_task=inside != peft.INSIDE)
    config = _plain({**described, **fields, "modules_to_save": _trained_whole(base)})
    tensors = {_file_name(base, key, inside): value for key, value in trained.items() if key not in added}
    for room in rooms:
        for path, layer in _carrying(base, room.peft_type).items():
            for mixin in layer._mixins:
                if mixin.method == room.peft_type:
                    values = mixin.in_files(with_values(layer, whole)).items()
                    tensors |= {mixin.file_key(room.inside, plain(path), name): value for name, value in values}
    # Stock PEFT looks for each of modules_to_save under its own name; what only we read is written once.
    tensors = {key: value.clone() for key, value in tensors.items()} if rooms else _without_ties(tensors)
    return config, tensors


def load_adapter(model: nn.Module, directory: str | Path, backbone: str | None = None) -> None:
    """Put an adapter, ours or stock PEFT's, into a model that holds its base.

    The model can then be used, trained on with the same method's callback, or merged.

    Args:
        model: a LightningModule or Hugging Face model with the pretrained weights that it was trained over.
        directory: a folder that :func:`save_adapter` or PEFT wrote.
        backbone: path of the base, where it was named for training too.

    Raises:
        FileNotFoundError: if ``directory`` isn't an adapter's folder.
        StateError: if its tensors don't fit the model; the model is then left as it was.
        ValueError: if it holds a method that isn't known here.
    """
    with torch.no_grad():
        for file_name, place, tensor in inject_from_folder(model, directory, backbone):
            place.copy_(tensor)
            if isinstance(place, nn.Parameter) and not file_name.endswith(f"{peft.OF_BASE}weight"):
                place.requires_grad_(True)


def inject_from_folder(
    model: nn.Module, directory: str | Path, backbone: str | None = None
) -> list[tuple[str, Tensor, Tensor]]:
    """Inject what an adapter needs, as :func:`load_adapter`, which then fills in the values.

    Returns:
        Each of the adapter's tensors, its name in the file first, with the one of the model that takes its value.
    """
    config, tensors = peft.read(directory)
    base = find_base(model, backbone)
    modules = [f".{plain(name)}" for name, _ in base.root.named_modules()]  # PEFT names heads that a model may not have
    saved = [name for name in config.get("modules_to_save") or () if any(m.endswith(f".{name}") for m in modules)]
    with all_or_nothing(model):
        rooms = _rooms(config, f"'{directory}'")
        if rooms:
            _untie(model, {_own_name(base, name, _inside(rooms)): tensor for name, tensor in tensors.items()})
        methods = []
        for room, fields in zip(rooms, config.get("methods", [config]), strict=bool(rooms)):
            tensors = room.read_peft(fields, tensors)
            methods.append(room.from_peft(fields, _targets(room, tensors, base, directory), saved, backbone))
            methods[-1].inject(model)
        if not rooms:
            held = [name for name, _ in base.named_parameters() if f"{peft.INSIDE}{plain(name)}" in tensors]
            freeze_base(base, "PARTIAL", parameters=held)
        # A method may come back as another: P-tuning as the prompt that it computed.
        places = _places(model, base, tensors, [type(method) for method in methods], directory)
    _warn_of_new_heads(base, {id(place) for _, place, _ in places}, directory)
    if pools_prompt(config) and "revision" in config:  # which we don't write
        rank_zero_warn(
            f"'{directory}' is stock PEFT's: its classifier was trained to pool virtual tokens or padding, and here it"
            " pools the text, so that predictions differ. Train it on here."
        )
    return places


def merge(model: nn.Module, *, reversible: bool = False, dequantize: bool = False, max_drift: float = 0.5) -> list[str]:
    """Fold what methods added into the base's own weights, and restore the original module tree.

    Args:
        model: the model, or a part of it.
        reversible: keep what :func:`unmerge` needs: the adapted weights as they were (their memory once more) and what
            was added. A merge makes final what was kept of an earlier one.
        dequantize: make the adapted ones of quantized layers dense: each becomes an ``nn.Linear``, in the dtype that it
            was quantized from, and the merge is as exact as that dtype.
        max_drift: for quantized layers that stay so: how large the error of packing the sums again may be, relative to
            the change itself (‖packed - wanted‖ / ‖wanted - before‖, over all of them). At 1 nothing is left of it.

    Returns:
        Paths of the merged modules; none where nothing was added (head only, full fine-tuning).

    Raises:
        NotImplementedError: if a method in the model can't be merged, or not into a linear layer whose forward isn't
            ``W x + b``; the model is then left as it was.
        InjectionError: if the drift is above ``max_drift``, or the model is sharded; it is then left as it was.
    """
    layers = list(injected_modules(model))
    if is_shared_out(model):
        raise InjectionError(
            "A model that processes share out (FSDP2, ZeRO-3) can't be merged: save_adapter() what was trained, and"
            " merge after load_adapter() into a whole one."
        )
    for name, layer in layers:
        for mixin in layer._mixins:
            mixin.check_mergeable(name or type(model).__name__)
        _check_fold(name, layer)
    with torch.no_grad():
        packed, drift = _pack([] if dequantize else layers)
        _report_drift(drift, max_drift)
        if not reversible:
            forget(model)
        with remembering(model) if reversible else nullcontext():
            for name, layer in layers:  # one at a time: all of them would be the model once more
                module = cast(Any, layer)
                folded = packed.pop(name, None) or layer.folded(dense_weight(module))
                detach(model, name)
                for key, value in folded.items():
                    if key == "weight" and is_quantized(module):
                        set_weight(module, value)
                    else:
                        getattr(module, key).copy_(value)
            thaw(model)  # what is saved from here on is the whole model
    return [name for name, _ in layers]


def unmerge(model: nn.Module) -> list[str]:
    """Undo ``merge(model, reversible=True)``: weights, what was added, and what trains are as before, to the bit.

    Parameters are the same objects as before, so that an optimizer goes on with them. What has been trained since in
    the merged weights is lost.

    Returns:
        Paths of the modules that carry something again.

    Raises:
        InjectionError: if the model was merged for good, or never, or was injected again since.
    """
    return bring_back(model)


def load_from_checkpoint(
    module_class: type[Module],
    path: str | Path,
    method: FineTuning | Sequence[FineTuning] | None = None,
    **kwargs: Any,
) -> Module:
    """``module_class.load_from_checkpoint`` for a checkpoint of a module that a callback had changed.

    Lightning's own fails on it, or with ``strict=False`` restores nothing and says nothing.

    Args:
        module_class: the user's LightningModule class.
        path: the checkpoint.
        method: the callback, or callbacks, it was trained with; read from the checkpoint where they are ours.
        kwargs: as for ``load_from_checkpoint``: ``map_location``, ``strict``, the module's own arguments.

    Returns:
        The module, with the method injected and its values restored.

    Raises:
        StateError: if the checkpoint wasn't saved with a method's callback, or doesn't fit the module.
    """
    if method is None:
        callbacks = [_method_of(record) for record in _read_records(path, kwargs.get("weights_only"))]
    else:
        callbacks = [method] if isinstance(method, FineTuning) else list(method)

    # Lightning builds the module, calls configure_model and on_load_checkpoint, then loads strictly: a
    # subclass that lives only that long injects in between.
    class Injecting(module_class):  # type: ignore[misc, valid-type]
        def configure_model(self) -> None:
            problem = _set_up(self)
            super().configure_model()
            try:
                for callback in callbacks:
                    callback._inject(self)
            except InjectionError as error:
                raise error from problem

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            for callback in callbacks:
                base = find_base(self, callback.backbone)
                checkpoint.update(complete_checkpoint(checkpoint, self, base, callback.record(), path))
            super().on_load_checkpoint(checkpoint)

    Injecting.__name__, Injecting.__qualname__ = module_class.__name__, module_class.__qualname__
    module = Injecting.load_from_checkpoint(path, **kwargs)
    module.__class__ = module_class
    return cast(Module, module)


def _set_up(module: LightningModule) -> RuntimeError | None:
    """Call setup(), where a module may build itself, as the Trainer would have before configure_model().

    Returns:
        What it raised for want of a Trainer, which matters only if the model isn't there then.
    """
    try:
        module.setup("predict")
    except RuntimeError as error:
        if "not attached to a `Trainer`" not in str(error):
            raise
        return error
    return None


def _read_records(path: str | Path, weights_only: bool | None) -> list[dict[str, Any]]:
    checkpoint = torch.load(path, map_location="meta", weights_only=weights_only is not False, mmap=True)
    records: list[dict[str, Any]] = checkpoint.get(METADATA, [])
    if not records:
        raise StateError(
            f"The checkpoint '{path}' wasn't saved with a lightning_ft callback: load it with"
            " MyModule.load_from_checkpoint."
        )
    return records


def _method_of(record: Mapping[str, Any]) -> FineTuning:
    known = {method.__name__: method for method in METHODS}
    if record["method"] not in known:
        raise StateError(
            f"The checkpoint was saved with {record['method']}, which isn't one of {', '.join(known)}:"
            f" pass it, load_from_checkpoint(..., method={record['method']}(...))."
        )
    return known[record["method"]](**record["arguments"])


def _check_fold(name: str, layer: Any) -> None:
    """See, on a copy, that a linear layer with a forward of its own gives the same when it is merged.

    Raises:
        NotImplementedError: if it doesn't.
    """
    own_forward = layer._original.forward is not nn.Linear.forward
    if not (isinstance(layer, nn.Linear) and own_forward) or is_quantized(layer):
        return
    probe: Any = copy.deepcopy(layer).eval().float()
    x = torch.randn(4, layer.in_features, device=layer.weight.device)
    with torch.no_grad():
        before, folded = probe.forward(x), probe.folded(probe.weight)
        detach(probe, "")
        for key, value in folded.items():
            getattr(probe, key).copy_(value)
        if not torch.allclose(probe.forward(x), before, rtol=1e-3, atol=1e-4 * before.abs().max().item()):
            raise NotImplementedError(
                f"'{name}' can't be merged: {type(layer).__name__} has a forward of its own, which is not W x + b, so"
                " that its outputs would change. The model can be served as it is; save_adapter keeps what was trained."
            )


def _pack(
    layers: Iterable[tuple[str, Injected]],
) -> tuple[dict[str, dict[str, Any]], list[tuple[float, float]]]:
    """What is folded of the quantized ones among ``layers``, packed again; of each, how large error and change are."""
    folded: dict[str, dict[str, Any]] = {}
    rounding = []
    for name, layer in layers:
        module: Any = layer
        if is_quantized(module):
            folded[name] = layer.folded(dense_weight(module))
            folded[name]["weight"], error, change = repacked(module, folded[name]["weight"])
            rounding.append((error, change))
    return folded, rounding


def _report_drift(rounding: Sequence[tuple[float, float]], max_drift: float) -> None:
    """Say what packing the merged layers again costs, of each the norms of the error and of the change.

    Raises:
        InjectionError: if it's more than ``max_drift``.
    """
    change = math.hypot(*(change for _, change in rounding))
    if not change:
        return
    drift = math.hypot(*(error for error, _ in rounding)) / change
    found = f"the error of packing {len(rounding)} merged layers again is {drift:.2f} of the change itself"
    if drift > max_drift:
        raise InjectionError(
            f"Merged, the adapter would be lost: {found} (max_drift={max_drift:g}). merge(model, dequantize=True) makes"
            f" these layers dense; merge(model, max_drift={math.ceil(10 * drift) / 10:g}) takes the loss."
        )
    rank_zero_info(f"merge: {found}.")


# ------------------------------------------------------------------------------- names in a model and in files


def _file_name(base: Base, key: str, inside: str) -> str:
    prefix = f"{plain(base.root_name)}.".lstrip(".")
    if not key.startswith(prefix):
        return f"{peft.OUTSIDE}{key}"
    path, _, own = key.removeprefix(prefix).rpartition(".")
    # PEFT wraps the modules that it adapts, but not those that it puts something before.
    mixins = getattr(base.root.get_submodule(path), "_mixins", ())
    wrapped = any(mixin.acts_on != "inputs" for mixin in mixins)
    return f"{inside}{path}{peft.OF_BASE}{own}" if wrapped else f"{inside}{key.removeprefix(prefix)}"


def _plain(value: Any) -> Any:
    """A config's values with the names of modules as they'd be if none were compiled."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, Sequence) else value


def _keys_of_others(model: nn.Module, base: Base) -> set[str]:
    """The keys of other pretrained parts that were fine-tuned: each has a folder of its own."""
    own = {base.prefixed(part) for part in base.frozen}
    others = tuple(f"{part}." for part in frozen_parts(model) - own)
    inside = tuple(f"{part}." if part else "" for part in own)
    return {key for key in model.state_dict() if key.startswith(others) and not key.startswith(inside)}


def _own_name(base: Base, file_name: str, inside: str) -> str:
    if file_name.startswith(peft.OUTSIDE):
        return file_name.removeprefix(peft.OUTSIDE)
    return plain(base.prefixed(file_name.removeprefix(inside).replace(peft.OF_BASE, ".")))


def _carrying(base: Base, kind: str) -> dict[str, Any]:
    """The parts of the injected modules that are of this method, by path."""
    return {
        path: layer
        for path, layer in injected_modules(base.root)
        if any(mixin.method == kind for mixin in layer._mixins)
    }


def _method_fields(base: Base) -> dict[str, Any]:
    kinds = dict.fromkeys(mixin.method for _, layer in injected_modules(base.root) for mixin in layer._mixins)
    if unknown := [kind for kind in kinds if kind not in _ROOMS]:
        raise InjectionError(f"The model carries {unknown[0]}, which has no format in files: remove it first.")
    methods = [{"peft_type": kind, **_ROOMS[kind].to_peft(_carrying(base, kind), base)} for kind in kinds]
    if len(methods) == 1:
        return methods[0]
    return {"peft_type": "COMBINED", "methods": methods} if methods else {"peft_type": "PARTIAL"}


def _rooms(config: Mapping[str, Any], source: str = "it") -> list[type[FineTuning]]:
    """The methods that a folder's config names.

    Raises:
        ValueError: if one isn't known here.
    """
    kinds = [fields.get("peft_type") for fields in config.get("methods", [config])]
    unknown = [kind for kind in kinds if kind not in _ROOMS and kind != "PARTIAL"]
    if unknown:
        raise UserError(f"{source} holds a {unknown[0]} adapter; known here are {', '.join([*_ROOMS, 'PARTIAL'])}.")
    return [_ROOMS[kind] for kind in kinds if kind != "PARTIAL"]


def _inside(rooms: Sequence[type[FineTuning]]) -> str:
    return rooms[0].inside if len(rooms) == 1 else peft.INSIDE


def _trained_whole(base: Base) -> list[str] | None:
    """The outermost modules of the root whose own parameters all train: PEFT's ``modules_to_save``."""
    if base.is_trained_whole():
        return None
    found: list[str] = []
    for name, module in base.root.named_modules():
        parameters = list(module.parameters())
        inside = any(name.startswith(f"{outer}.") for outer in found)
        whole = parameters and all(p.requires_grad for p in parameters)
        if name and whole and not inside and not isinstance(module, Injected):
            found.append(name)
    return found or None


def _without_ties(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share their memory once: the files hold each value under one of its names."""
    seen: dict[tuple[int, int, torch.Size], str] = {}

    def place(tensor: Any) -> tuple[int, int, torch.Size]:  # data_ptr() isn't asked of tensors without values
        return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape

    return {key: tensor for key, tensor in tensors.items() if seen.setdefault(place(tensor), key) == key}


def _untie(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give modules that share a parameter parameters of their own, where an adapter has a value for some of them alone.

    PEFT's ``modules_to_save`` copies the modules that it names, tied or not: what they shared keeps the base's value.
    Our own folders name every module that shares a trained parameter.

    Args:
        model: the model.
        values: an adapter's tensors by their names in it.
    """
    sharing: dict[nn.Parameter, dict[tuple[nn.Module, str], Tensor | None]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners = sharing.setdefault(parameter, {})
                owners[module, key] = values.get(plain(f"{path}.{key}".lstrip(".")), owners.get((module, key)))
    for parameter, owners in sharing.items():
        given = [value for value in owners.values() if value is not None]
        if len(given) < len(owners) or any(not torch.equal(value, given[0]) for value in given):
            for (module, key), value in owners.items():
                if value is not None:
                    module._parameters[key] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)


def _warn_of_new_heads(base: Base, loaded: set[int], directory: str | Path) -> None:
    """A head that the folder doesn't hold is as random as it was made, and so are the predictions."""
    added = injected_names(base.root)
    of_base = {id(parameter) for part in base.parts() for parameter in part.parameters()}
    left = [
        name
        for name, parameter in base.root.named_parameters()
        if id(parameter) not in loaded | of_base and name not in added
    ]
    if left:
        rank_zero_warn(
            f"'{directory}' holds no values for the head ({', '.join(left[:3])}), which stays as the model was built."
            " Save an adapter with its head: PEFT's modules_to_save, or task_type."
        )


def _targets(room: type[FineTuning], tensors: Mapping[str, Tensor], base: Base, directory: str | Path) -> list[str]:
    """The modules that the tensors of an adapter belong to, as paths in the root."""
    paths = [name for name, _ in base.root.named_modules()]
    names = [(layer, name) for layer in room.layers for name in layer.adds.values()]
    found = [
        path
        for path in paths
        if any(layer.file_key(room.inside, plain(path), name) in tensors for layer, name in names)
    ]
    if not found:
        raise StateError(
            f"'{directory}' adapts no module of {type(base.root).__name__}: it was made for another model. It holds"
            f" {', '.join(list(tensors)[:3]) or 'no tensors'}."
        )
    return found


def _places(
    model: nn.Module,
    base: Base,
    tensors: Mapping[str, Tensor],
    rooms: Sequence[type[FineTuning]],
    directory: str | Path,
) -> list[tuple[str, Tensor, Tensor]]:
    """Each of an adapter's tensors, its name first, with the one of the model that takes its value."""
    inside = _inside(rooms)
    own_names = {
        mixin.file_key(room.inside, plain(path), file_name): base.prefixed(f"{path}.{key}".lstrip("."))
        for room in rooms
        for path, layer in _carrying(base, room.peft_type).items()
        for mixin in layer._mixins
        if mixin.method == room.peft_type
        for key, file_name in mixin.adds.items()
    }
    live = {**dict(model.named_buffers(remove_duplicate=False)), **dict(model.named_parameters(remove_duplicate=False))}
    names = {plain(key): key for key in live}
    missing = [file_name for file_name in own_names if file_name not in tensors]
    if missing:
        raise StateError(f"'{directory}' is incomplete: it holds no {', '.join(missing[:3])}.")
    places = []
    for file_name, tensor in tensors.items():
        own = _own_name(base, file_name, inside)
        key = own_names.get(file_name) or names.get(own, own)
        if key not in live:
            raise StateError(
                f"'{directory}' holds {file_name}, and {type(model).__name__} has no '{key}': it was made for"
                " another model or head."
            )
        if live[key].shape != tensor.shape:
            raise StateError(
                f"'{directory}': {file_name} has shape {tuple(tensor.shape)}, the model's {tuple(live[key].shape)}."
                " Build the model that it was trained with (its size, its number of labels)."
            )
        places.append((file_name, live[key], tensor))
    return places
