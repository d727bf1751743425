"""Adapters written as in the papers, and put into a model by hooks: what ours are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn


class Weights(NamedTuple):
    """D (k, width of x), b (k,), U (width of h, k), c (width of h,)."""

    d: Tensor
    b: Tensor
    u: Tensor
    c: Tensor


def adapter(h: Tensor, w: Weights, f: Callable[[Tensor], Tensor]) -> Tensor:
    """Houlsby et al., figure 2, and Pfeiffer et al.: h ← h + U f(D h + b) + c, for h (..., width)."""
    return h + f(h @ w.d.T + w.b) @ w.u.T + w.c


def parallel_adapter(h: Tensor, x: Tensor, w: Weights, s: float, f: Callable[[Tensor], Tensor]) -> Tensor:
    """He et al., section 3.3: h ← h + s · (U f(D x + b) + c), for the sub-layer's input x and output h."""
    return h + s * (f(x @ w.d.T + w.b) @ w.u.T + w.c)


def put_behind(module: nn.Module, w: Weights, f: Callable[[Tensor], Tensor]) -> None:
    """An adapter behind ``module``, on the first thing that it gives."""

    def change(_: nn.Module, __: Any, out: Any) -> Any:
        return (adapter(out[0], w, f), *out[1:]) if isinstance(out, tuple) else adapter(out, w, f)

    module.register_forward_hook(change)


def put_beside(first: nn.Module, last: nn.Module, w: Weights, s: float, f: Callable[[Tensor], Tensor]) -> None:
    """An adapter beside a sub-layer that begins with the module ``first`` and ends with ``last``."""
    seen: list[Tensor] = []

    def read(_: nn.Module, args: Any, kwargs: Any) -> None:
        seen[:] = [args[0] if args else kwargs["hidden_states"]]

    def change(_: nn.Module, __: Any, out: Any) -> Any:
        (x,) = seen
        h = out[0] if isinstance(out, tuple) else out
        h = parallel_adapter(h, x, w, s, f)
        return (h, *out[1:]) if isinstance(out, tuple) else h

    first.register_forward_pre_hook(read, with_kwargs=True)
    last.register_forward_hook(change)
