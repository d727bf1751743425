"""Which layer of a model's stack a parameter is in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import nn


def layer_depths(root: nn.Module, parts: Sequence[str] = ("",)) -> dict[str, int]:
    """The layer of each parameter, by name; nothing where there is no stack of layers (an ``nn.ModuleList``).

    The layers of the longest stack are 1 to L; 0 is what comes before a stack (embeddings), L what comes after
    it. The layers of a shorter stack beside it (a decoder's) are counted from the top too, so that theirs end at L.

    Args:
        root: a model; names are relative to it.
        parts: paths of the parts of it to look into.
    """
    inside = tuple(f"{part}." if part else "" for part in parts)
    stacks = {name: len(stack) for name, stack in _stacks(root) if name.startswith(inside)}
    top = max(stacks.values(), default=0)
    depths: dict[int, tuple[str, int]] = {}
    passed: set[str] = set()  # modules are listed in the order of their making: embeddings, layers, pooler
    for name, module in root.named_modules() if stacks else ():
        stack = next((s for s in stacks if name.startswith(f"{s}.")), None)
        if stack is not None:
            passed |= {"", stack.rpartition(".")[0]}
            depth = top - stacks[stack] + int(name[len(stack) + 1 :].split(".")[0]) + 1
        else:
            # after the layers of the encoder it's in (or the decoder), else of any
            around = next((o for s in stacks if (o := s.rpartition(".")[0]) and name.startswith(f"{o}.")), "")
            depth = top if around in passed and not isinstance(module, nn.Embedding) else 0
        for key, parameter in module.named_parameters(recurse=False):
            depths.setdefault(id(parameter), (f"{name}.{key}".lstrip("."), depth))
    return {name: depth for name, depth in depths.values() if name.startswith(inside)}


def layer_numbers(root: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """The number of the layer, from 1, that each module is in, counted in its own stack; those in none are left out.

    Args:
        root: a model.
        names: paths in it.
    """
    stacks = tuple(f"{stack}." for stack, _ in _stacks(root))
    inside = {name: stack for name in names for stack in stacks if name.startswith(stack)}
    return {name: int(name.removeprefix(stack).split(".")[0]) + 1 for name, stack in inside.items()}


def layer_stack(root: nn.Module) -> tuple[nn.Module, ...]:
    """The layers of the longest stack in ``root``, in order; none where there is no stack."""
    stacks = [tuple(stack) for _, stack in _stacks(root)]
    return max(stacks, key=len, default=())


def stacked_layers(root: nn.Module) -> list[nn.Module]:
    """The layers of all stacks of ``root``."""
    return [layer for _, stack in _stacks(root) for layer in stack]


def _stacks(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    """The outermost ModuleLists of at least two layers, with their names."""
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}".lstrip(".")
        if isinstance(child, nn.ModuleList) and len(child) > 1:
            yield path, child
        else:
            yield from _stacks(child, path)
