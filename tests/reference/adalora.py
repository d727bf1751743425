"""AdaLoRA written as in the paper, a function an equation, one number at a time: what ours is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def adapted_linear(
    x: Tensor, w: Tensor, bias: Tensor | None, p: Tensor, lam: Tensor, q: Tensor, r: int, alpha: float
) -> Tensor:
    """Equation 3: h = W x + bias + alpha/r · P Λ Q x, for x (batch, in), P (out, k), λ (k,), Q (k, in)."""
    h = (w + alpha / r * p @ torch.diag(lam) @ q) @ x.T
    return (h if bias is None else h + bias[:, None]).T


def r_of(ps: Sequence[Tensor], qs: Sequence[Tensor]) -> Tensor:
    """Equation 4, R(P, Q), as PEFT changes it: the mean over all P and Q, of norms without square."""
    norms = [torch.norm(p.T @ p - torch.eye(p.shape[1], dtype=p.dtype)) for p in ps]
    norms += [torch.norm(q @ q.T - torch.eye(q.shape[0], dtype=q.dtype)) for q in qs]
    return sum(norms) / len(norms)


def t_of(lam: Sequence[float], s: Sequence[float], b: int) -> list[float]:
    """Equation 6: T(Λ, S), what of λ stays: where S is among the b largest."""
    best = sorted(range(len(s)), key=lambda i: s[i], reverse=True)[:b]
    return [value if i in best else 0.0 for i, value in enumerate(lam)]


def importance_of_triplet(s_lam: float, s_p: Sequence[float], s_q: Sequence[float]) -> float:
    """Equation 7: S_i, of λ_i, of P's column i (d1 numbers) and of Q's row i (d2 numbers)."""
    return s_lam + sum(s_p) / len(s_p) + sum(s_q) / len(s_q)


def i_of(w: float, gradient: float) -> float:
    """Equation 8: I(w) = |w ∂L/∂w|."""
    return abs(w * gradient)


def i_bar(before: float, i: float, beta1: float) -> float:
    """Equation 9: the moving average of I."""
    return beta1 * before + (1 - beta1) * i


def u_bar(before: float, i: float, i_bar: float, beta2: float) -> float:
    """Equation 10: the moving average of |I - Ī|."""
    return beta2 * before + (1 - beta2) * abs(i - i_bar)


def s_of(i_bar: float, u_bar: float) -> float:
    """Equation 11: s(w) = Ī Ū."""
    return i_bar * u_bar


def b_of(t: int, b_0: int, b_end: int, t_i: int, t_f: int, total: int) -> float:
    """Equation 12: b(t), the budget, where the fraction runs from 0 at t_i to 1 at total - t_f, as the text says."""
    if t <= t_i:
        return b_0
    if t >= total - t_f:
        return b_end
    return b_end + (b_0 - b_end) * (1 - (t - t_i) / (total - t_f - t_i)) ** 3
