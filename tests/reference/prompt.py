"""Soft prompts written as in the papers, one text at a time: what ours are compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def prompted(encode: Callable[[Tensor], Tensor], p: Tensor, x: Tensor) -> Tensor:
    """What the model makes of X in [P; X], for P (n, d) and the embedded text X (T, d): (T, width)."""
    return encode(torch.cat([p, x])[None])[0, len(p) :]


def mlp(e: Tensor, w: Mapping[str, Tensor]) -> Tensor:
    """P-tuning's MLP of three layers, for the inputs E (n, d)."""
    h = torch.clamp(e @ w["0.weight"].T + w["0.bias"], min=0)
    h = torch.clamp(h @ w["2.weight"].T + w["2.bias"], min=0)
    return h @ w["4.weight"].T + w["4.bias"]


def lstm(e: Tensor, w: Mapping[str, Tensor]) -> Tensor:
    """P-tuning's bidirectional LSTM of two layers and MLP of two (arXiv:2103.10385, equation 4), for E (n, d)."""
    for layer in (0, 1):
        forth = _direction(list(e), w, f"l{layer}")
        back = _direction(list(e.flip(0)), w, f"l{layer}_reverse")[::-1]
        e = torch.stack([torch.cat(pair) for pair in zip(forth, back, strict=True)])
    h = torch.clamp(e @ w["0.weight"].T + w["0.bias"], min=0)
    return h @ w["2.weight"].T + w["2.bias"]


def _direction(xs: list[Tensor], w: Mapping[str, Tensor], name: str) -> list[Tensor]:
    w_x, w_h, b_x, b_h = (w[f"{kind}_{name}"] for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    h = c = torch.zeros(w_h.shape[1])
    states = []
    for x in xs:
        i, f, g, o = (w_x @ x + b_x + w_h @ h + b_h).chunk(4)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        states.append(h)
    return states
