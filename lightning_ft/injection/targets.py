"""Which modules a pattern names; which part of a module is base, which is head."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_ft.errors import UserError


class InjectionError(UserError):
    """A method can't go into this model as asked; the message names the cause and the cure."""


@dataclass(frozen=True)
class Base:
    """Where the pretrained part of a model is.

    Attributes:
        root: the pretrained model with its head (an HF ``PreTrainedModel``), or the module the user named;
            target patterns and PEFT's keys are relative to it.
        root_name: its path in the model that was searched (``""`` if it is that model).
        frozen: paths, relative to ``root``, of the parts that are pretrained: the trunk, and an output
            head that was pretrained with it (``lm_head``).
    """

    root: nn.Module
    root_name: str
    frozen: tuple[str, ...]

    def parts(self) -> Iterator[nn.Module]:
        """The pretrained modules themselves."""
        return (self.root.get_submodule(name) for name in self.frozen)

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Every module of the pretrained parts, named relative to :attr:`root`; not the wrappers of compiled ones."""
        for part in self.frozen:
            yield from _but_wrappers(self.root.get_submodule(part).named_modules(prefix=part))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter of the pretrained parts, named relative to :attr:`root`."""
        for part in self.frozen:
            yield from self.root.get_submodule(part).named_parameters(prefix=part)

    def is_trained_whole(self) -> bool:
        """Whether nothing pretrained is frozen (full fine-tuning)."""
        return all(p.requires_grad for part in self.parts() for p in part.parameters())

    def prefixed(self, name: str) -> str:
        """``name``, relative to :attr:`root`, as a path in the model that was searched."""
        return f"{self.root_name}.{name}".strip(".")


_COMPILED = "_orig_mod"  # where torch.compile(module) puts the module


def plain(name: str) -> str:
    """``name``, a path, a key, or a regular expression of one, as it would be if no module in it were compiled."""
    return re.sub(rf"(\\?\.)?\b{_COMPILED}\b", "", name).lstrip("\\.") if _COMPILED in name else name


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile runs in the place of ``module``'s own forward, or of that of what it wraps."""
    return module._compiled_call_impl is not None or _COMPILED in module._modules


def _but_wrappers(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in modules if _COMPILED not in module._modules)


def find_base(model: nn.Module, backbone: str | None = None) -> Base:
    """Tell the pretrained base of ``model`` from the head that is the user's own.

    If ``model`` is or holds exactly one Hugging Face ``PreTrainedModel``, under whatever names, its trunk
    (``.base_model``) and a pretrained output head are the base; a newly initialised head (``classifier``,
    ``score``, …) and everything outside are the user's. Otherwise ``backbone`` names it.

    Args:
        model: any module; typically a LightningModule.
        backbone: path of the base in ``model``; ``"."`` means all of it.

    Raises:
        InjectionError: if ``backbone`` names nothing, or is needed.
    """
    if backbone is not None:
        path = "" if backbone == "." else plain(backbone)
        named = {plain(name): name for name, _ in _but_wrappers(model.named_modules())}
        if path not in named:
            raise InjectionError(
                f"backbone='{backbone}' names no module of {type(model).__name__}."
                f" {_near(backbone, [name for name in named if name])}"
            )
        return _base_at(model, named[path])

    pretrained = pretrained_models(model)
    if len(pretrained) == 1:
        return _base_at(model, *pretrained.values())

    candidates = list(pretrained.values()) or [
        name for name, child in model.named_children() if any(True for _ in child.parameters())
    ]
    if not candidates:
        raise InjectionError(
            f"{type(model).__name__} holds no module with parameters: there is nothing to fine-tune. If it is"
            " built in a hook of its own, build it in __init__, setup() or configure_model()."
        )
    raise InjectionError(
        f"Which part of {type(model).__name__} is the pretrained base isn't clear; it could be"
        f' {", ".join(candidates)}. Name it: backbone="{candidates[0]}" (or backbone="." for all of it).'
    )


def pretrained_models(model: nn.Module) -> dict[nn.Module, str]:
    """The Hugging Face models in ``model`` that are in no other, each with its path."""
    found = list(_outermost(model, is_pretrained_model))
    inside = {part for _, whole in found for part in whole.modules() if part is not whole}
    paths: dict[nn.Module, str] = {}
    for name, module in found:
        if module not in inside:  # self.encoder = self.model.bert is but a second name
            paths.setdefault(module, name)
    return paths


def resolve_targets(
    base: Base,
    target_modules: str | Sequence[str] | None,
    supported: Callable[[nn.Module], bool],
    excluded: Iterable[str] = (),
    exclude_modules: str | Sequence[str] | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: str | Sequence[str] | None = None,
) -> list[str]:
    """The modules of ``base`` that ``target_modules`` names, as paths relative to ``base.root``.

    Args:
        base: where to look: its pretrained parts only, since heads are trained whole.
        target_modules: as in PEFT. A list: each entry a module's path or the end of it
            (``"query"``, ``"attention.output.dense"``). A string: ``"all-linear"`` (every linear layer
            but an output head and a pooler nobody reads), ``"attention"`` (the linear layers inside
            attention blocks), or a regular expression that the whole path must match. ``None``: the usual
            choice for the architecture, or ``"attention"``, or where there is none, ``"all-linear"``.
        supported: whether the method knows this kind of module.
        excluded: paths that are trained whole and so aren't targets.
        exclude_modules: what of the found is left out, written as ``target_modules`` is.
        layers_to_transform: indices of the layers to stay in, an empty list for all; not with a regular expression,
            which can say it.
        layers_pattern: name of the list of layers, where it isn't the first numbered one (``"layer"``, ``"h"``).

    Raises:
        InjectionError: if nothing matches, or what does isn't supported, or ``layers_pattern`` stands alone. A part of
            a list that matches nothing, beside others that do, is warned of.
    """
    if layers_pattern and layers_to_transform is None:
        raise InjectionError("layers_pattern names the list that layers_to_transform counts in: say which layers.")
    excluded = tuple(f"{path}." for path in excluded)
    names = {n: module for n, module in base.named_modules() if n and not f"{n}.".startswith(excluded)}
    if target_modules is None:
        target_modules = _default_targets(base, names, supported)
    if layers_to_transform is not None and isinstance(target_modules, str) and target_modules not in _SETS:
        raise InjectionError("layers_to_transform doesn't go with a regular expression: write the layers in it.")

    found = _named(target_modules, base, names, supported)
    found = _left_in(found, names, exclude_modules)
    found = _in_layers(found, layers_to_transform, layers_pattern)
    if not found:
        raise InjectionError(
            f"target_modules={target_modules!r} matches no module of {type(base.root).__name__}."
            f" {_near(str(target_modules), names)}"
        )
    wrong = [name for name in found if not supported(names[name])]
    if wrong:
        kinds = sorted({type(names[name]).__name__ for name in wrong})
        raise InjectionError(
            f"target_modules={target_modules!r} names modules that this method can't adapt"
            f" ({', '.join(kinds)}): {', '.join(wrong[:5])}. Name the layers inside them."
        )
    return found


_SETS = ("all-linear", "attention")


def _named(
    target_modules: str | Sequence[str],
    base: Base,
    names: dict[str, nn.Module],
    supported: Callable[[nn.Module], bool],
) -> list[str]:
    if target_modules not in _SETS:
        return match_names(target_modules, names)
    linear = _all_linear(base, names, supported)
    return linear if target_modules == "all-linear" else [n for n in linear if _inside_attention(base.root, n)]


def _left_in(found: list[str], names: dict[str, nn.Module], exclude_modules: str | Sequence[str] | None) -> list[str]:
    if not exclude_modules:
        return found
    out = set(match_names(exclude_modules, names, "exclude_modules"))
    left = [name for name in found if name not in out]
    if found and not left:
        raise InjectionError(f"exclude_modules={exclude_modules!r} leaves out all that target_modules names.")
    return left


def _in_layers(
    found: list[str], layers_to_transform: int | Sequence[int] | None, layers_pattern: str | Sequence[str] | None
) -> list[str]:
    wanted = [layers_to_transform] if isinstance(layers_to_transform, int) else list(layers_to_transform or ())
    if not wanted:
        return found
    lists = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern or [r"[^.]*"]
    layer_of = {name: int(match[1]) for name in found if (match := _layer_index(name, lists)) is not None}
    there = sorted(set(layer_of.values()))
    missing = [layer for layer in wanted if layer not in there]
    if missing:
        _refuse_or_warn(
            len(missing) == len(wanted),
            f"layers_to_transform: there is no layer {', '.join(map(str, missing))} among the targets; they lie in"
            f" {', '.join(map(str, there)) or 'no numbered layers'}. layers_pattern names the list of layers.",
        )
    return [name for name in found if layer_of.get(name) in wanted]


def _layer_index(name: str, lists: Sequence[str]) -> re.Match[str] | None:
    # Lazy: the first numbered segment is the layer, a later one an expert in it.
    matches = (re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name) for pattern in lists)
    return next((match for match in matches if match is not None), None)


def match_modules(base: Base, modules_to_save: Sequence[str] | None) -> list[str]:
    """The modules of the root that ``modules_to_save``, a name or several, names by path or end of a path.

    Ends are whole parts of a path, as of targets: ``"norm"`` is Llama's last norm alone. PEFT goes by letters here, and
    trains every ``input_layernorm`` with it.

    Raises:
        InjectionError: if nothing is named. An entry that names nothing, beside others that do, is warned of.
    """
    names = [name for name, _ in _but_wrappers(base.root.named_modules()) if name]
    wanted = [modules_to_save] if isinstance(modules_to_save, str) else modules_to_save or ()
    return _match_suffixes(wanted, names, "modules_to_save")


def match_names(patterns: str | Sequence[str], names: Iterable[str], argument: str = "target_modules") -> list[str]:
    """Those of ``names`` that ``patterns``, the value of ``argument``, names.

    Args:
        patterns: a regular expression for the whole name, or a list of names and ends of names.
        names: paths of modules.
        argument: for messages.

    Raises:
        InjectionError: if no entry of a list names anything, or the expression isn't valid. An entry that names
            nothing, beside others that do, is warned of.
    """
    match = _match_regex if isinstance(patterns, str) else _match_suffixes
    return match(patterns, list(names), argument)  # type: ignore[arg-type]


def exactly(names: Iterable[str]) -> str:
    """The ``target_modules`` that names these paths, and none that ends like one of them."""
    return f"(?:{'|'.join(re.escape(plain(name)) for name in names)})"


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is Hugging Face's ``Conv1D`` (GPT-2's linear layer, its weight stored as (in, out))."""
    return any(c.__qualname__ == "Conv1D" and c.__module__.startswith("transformers.") for c in type(module).__mro__)


def is_quantized(module: nn.Module) -> bool:
    """Whether its weight is packed into 4 or 8 bits (a layer of bitsandbytes, once it's on its device)."""
    weight = getattr(module, "weight", None)
    packed = getattr(weight, "quant_state", None) is not None
    return packed or (isinstance(weight, nn.Parameter) and not weight.is_floating_point())


def is_whole(weight: Tensor) -> bool:
    """Whether it's a plain parameter, all of it here and not packed; FakeTensors, without values, stand for such."""
    return type(weight) is nn.Parameter or type(weight).__name__ == "FakeTensor"


def parent_of(model: nn.Module, name: str) -> nn.Module:
    """The module that holds the one at ``name``."""
    return model.get_submodule(name.rpartition(".")[0])


# What the LoRA paper (arXiv:2106.09685, section 4.2) adapts, in each architecture's own names: the query and
# value projections, or the fused projection where there is one.
_QUERY_VALUE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        "bert roberta xlm-roberta electra camembert layoutlm data2vec-text vit deit beit".split(),
        ("query", "value", "q_proj", "v_proj"),
    ),
    **dict.fromkeys("deberta deberta-v2".split(), ("query_proj", "value_proj")),
    **dict.fromkeys("t5 mt5 umt5".split(), ("q", "v")),
    **dict.fromkeys(
        "llama mistral mixtral qwen2 qwen3 gemma gemma2 gemma3_text phi opt bart mbart whisper wav2vec2 clip smollm3"
        " olmo olmo2 granite cohere".split(),
        ("q_proj", "v_proj"),
    ),
    **dict.fromkeys("gpt_neox bloom falcon".split(), ("query_key_value",)),
    "distilbert": ("q_lin", "v_lin"),
    "gpt2": ("c_attn",),
    "phi3": ("qkv_proj",),
    "modernbert": ("Wqkv",),
}


def _default_targets(
    base: Base, names: dict[str, nn.Module], supported: Callable[[nn.Module], bool]
) -> str | list[str]:
    model_type: Any = getattr(getattr(base.root, "config", None), "model_type", None)
    usual = [s for s in _QUERY_VALUE.get(model_type, ()) if any(ends_with(name, s) for name in names)]
    if usual:
        return usual
    linear = _all_linear(base, names, supported)
    return "attention" if any(_inside_attention(base.root, name) for name in linear) else "all-linear"


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _all_linear(base: Base, names: dict[str, nn.Module], supported: Callable[[nn.Module], bool]) -> list[str]:
    output = output_embeddings(base.root)
    # A bare trunk computes its pooler, but whether the user's head reads it can't be seen from here, and a
    # parameter without a gradient fails under DDP. Name it ("pooler.dense") where it is read.
    unread = "pooler" if "" in base.frozen else None
    return [
        name
        for name, module in names.items()
        if _is_linear(module)
        and supported(module)
        and module is not output
        and not isinstance(parent_of(base.root, name), nn.MultiheadAttention)
        and (unread is None or name.split(".")[0] != unread)
    ]


def _inside_attention(root: nn.Module, name: str) -> bool:
    parts = name.split(".")
    ancestors = (root.get_submodule(".".join(parts[:depth])) for depth in range(1, len(parts)))
    return any("attention" in type(ancestor).__name__.lower() for ancestor in ancestors)


def _match_regex(pattern: str, names: Sequence[str], argument: str) -> list[str]:
    try:
        return [name for name in names if re.fullmatch(pattern, plain(name))]
    except re.error as error:
        raise InjectionError(f"{argument}={pattern!r} isn't a valid regular expression: {error}.") from error


def _match_suffixes(patterns: Sequence[str], names: Sequence[str], argument: str) -> list[str]:
    found = [name for name in names if any(ends_with(name, pattern) for pattern in patterns)]
    for pattern in patterns:
        if not any(ends_with(name, pattern) for name in found):
            _refuse_or_warn(not found, f"{argument}: '{pattern}' matches no module. {_near(pattern, names)}")
    return found


def _refuse_or_warn(refuse: bool, message: str) -> None:
    """A list that is written for many architectures names much that one of them hasn't; PEFT says nothing then."""
    if refuse:
        raise InjectionError(message)
    warnings.warn(message, stacklevel=2)


def ends_with(name: str, suffix: str) -> bool:
    """Whether the path ``name`` is ``suffix``, or ends with it after a dot."""
    return f".{plain(name)}".endswith(f".{plain(suffix)}")


def _near(wanted: str, names: Iterable[str]) -> str:
    """A hint: the module names (their last parts, and the full paths) that are most like ``wanted``."""
    ends = list(dict.fromkeys(end for name in names if not (end := name.rpartition(".")[2]).isdigit()))
    wanted_end = re.split(r"[^\w]+", wanted.strip("[]'\"()$*."))[-1]
    if not ends:
        return "There are no modules in it."
    near = difflib.get_close_matches(wanted_end, ends, n=5, cutoff=0.5)
    if near:
        return f"Near names: {', '.join(near)}."
    return f"Its modules are named: {', '.join(ends[:30])}{', …' if len(ends) > 30 else ''}."


def _outermost(
    model: nn.Module, accept: Callable[[nn.Module], bool], name: str = ""
) -> Iterator[tuple[str, nn.Module]]:
    if accept(model):
        yield name, model
        return
    for child_name, child in model.named_children():
        yield from _outermost(child, accept, f"{name}.{child_name}".strip("."))


def is_pretrained_model(module: nn.Module) -> bool:
    """Whether it is Hugging Face's ``PreTrainedModel``."""
    # By name, so that torch alone is imported: whoever holds such a model has imported transformers.
    return any(
        c.__name__ == "PreTrainedModel" and c.__module__.startswith("transformers.") for c in type(module).__mro__
    )


def output_embeddings(root: nn.Module) -> nn.Module | None:
    """The head of a Hugging Face language model, which was pretrained with it."""
    return root.get_output_embeddings() if is_pretrained_model(root) else None  # type: ignore[operator]


def _base_at(model: nn.Module, name: str) -> Base:
    """The base that the module at ``name`` is, or that the Hugging Face model there has."""
    root = model.get_submodule(name)
    if name and not any(True for _ in root.children()):  # a single layer: named from the module that holds it
        outer, _, own = name.rpartition(".")
        return Base(model.get_submodule(outer), outer, (own,))
    heads = _new_heads(root) if is_pretrained_model(root) else set()
    if not heads:
        return Base(root, name, ("",))
    return Base(root, name, tuple(child for child, _ in root.named_children() if child not in heads))


# What Hugging Face calls heads where they stand beside the parts of the trunk, not around it.
_HEAD_NAMES = {"classifier", "classification_head", "qa_outputs", "score", "head"}


def _new_heads(root: nn.Module) -> set[str]:
    """The children of a Hugging Face model that a task adds, and that no pretraining knows."""
    if output_embeddings(root) is not None:  # a language model, pretrained with its head
        return set()
    trunk = getattr(root, "base_model", root)
    if trunk is not root:
        return {name for name, child in root.named_children() if child is not trunk}
    return {name for name, _ in root.named_children() if "For" in type(root).__name__ and name in _HEAD_NAMES}
