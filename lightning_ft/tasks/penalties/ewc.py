"""Elastic weight consolidation (Kirkpatrick et al. 2017, https://arxiv.org/abs/1612.00796)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_ft.general import GENERAL_EN, collate, embed, encode, hidden_states, read_texts
from lightning_ft.injection import refuse_unfoldable
from lightning_ft.tasks.penalties.penalty import Ground, Penalty, Step


def fisher(
    model: Any, names: Iterable[str], rows: Sequence[dict[str, list[int]]], causal: bool, seed: int = 0
) -> dict[str, Tensor]:
    """The diagonal of the Fisher information of a model's parameters, from a sample of text.

        F_i = 1/N Σ_n (∂/∂θ_i log p(y_n | x_n, θ))²,    y_n ~ p(· | x_n, θ)

    The y are drawn from the model's own distribution: with the data's it would be the empirical Fisher, which says
    little of the curvature (Kunstner et al. 2019, https://arxiv.org/abs/1905.12558). Of a causal language model p is
    over the next token, and F is that of one token: a text's divided by its length. Of any other model p is a Gaussian
    of unit variance around a text's embedding. Each text takes a pass forwards and backwards of its own.

    Args:
        model: a Hugging Face model, evaluating.
        names: of its parameters.
        rows: the model's inputs for each text.
        causal: whether it is a causal language model.
        seed: of the draws.

    Returns:
        For each name a tensor of the parameter's shape.
    """
    generator = torch.Generator().manual_seed(seed)
    score = _TokenScore(model) if causal else _EmbeddingScore(model)
    # Views that take gradients of their own: the parameters, which the tuned model may share, are left alone.
    values = {f"model.{name}": model.get_parameter(name).detach().requires_grad_() for name in names}
    total = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in values.items()}
    for row in rows:
        batch = collate([row], model.device)
        log_p, count = functional_call(score, values, (batch, generator))
        found = torch.autograd.grad(log_p, list(values.values()), allow_unused=True)
        for name, gradient in zip(values, found, strict=True):
            if gradient is not None:  # a pooler that no embedding needs
                total[name] += gradient.float().square() / (count * len(rows))
    return {name.removeprefix("model."): value for name, value in total.items()}


class _TokenScore(nn.Module):
    """``Σ_t log p(y_t | x_≤t)`` of drawn tokens of one text, and how many they are."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, int]:
        log_p = self.model(**batch).logits[0].float().log_softmax(dim=-1)
        drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(log_p.device)
        return log_p.gather(1, drawn).sum(), len(log_p)


class _EmbeddingScore(_TokenScore):
    """``log p(e + v) = -½ ‖e + v - e(θ)‖²`` of a drawn v, by what has its gradient: ``v · e(θ)``."""

    def forward(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, int]:
        e = embed(hidden_states(self.model, batch), batch.get("attention_mask"))[0]
        return torch.randn(len(e), generator=generator).to(e) @ e, 1


class EWC(Penalty):
    """``R = ½ Σ_i F_i (θ_i - θ⁰_i)²``: pulls each weight to its pretrained value, as strongly as the base needs it.

    (Equation 3 of the paper.) F is the base's :func:`fisher` on general text, which stands for what it could do; under
    an adapter θ is the weights as they are with it written into them. F costs the memory of the weights that change,
    once more, and a pass over the sample at the start of a fit, resumed or not: no checkpoint holds it, since the same
    base and the same sample give it again. Each step costs the memory of the change, under an adapter too.

    Args:
        weight: λ.
        texts: general text: see :func:`lightning_ft.general.read_texts`.
        samples: how many of them F is from; spread evenly over the file.
        max_length: longer texts are cut to this many tokens.
        tokenizer: by default the model's.
        seed: of the draws.
    """

    name = "ewc"
    compares_weights = True

    def __init__(
        self,
        weight: float,
        texts: str | Path | Sequence[str] = GENERAL_EN,
        samples: int = 200,
        max_length: int = 128,
        tokenizer: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(weight)
        if not isinstance(samples, int) or samples < 1:
            raise ValueError(f"EWC: samples must be a whole number of at least 1, not {samples!r}.")
        self.texts, self.samples, self.max_length = texts, samples, max_length
        self.tokenizer, self.seed = tokenizer, seed
        self._fisher: dict[str, Tensor] = {}

    def prepare(self, ground: Ground) -> None:
        """Measure F.

        Raises:
            InjectionError: if a method changes something else than weights, or weights are packed.
            GeneralTextError: if the text or the tokenizer can't be read.
        """
        refuse_unfoldable(ground.base, "EWC")
        texts = read_texts(self.texts)
        step = max(len(texts) / self.samples, 1.0)
        texts = [texts[int(i * step)] for i in range(min(self.samples, len(texts)))]
        rows = encode(texts, ground.model, self.tokenizer, self.max_length)
        with torch.no_grad():
            names = [name for name, _, _ in ground.origin.changes(ground.base)]
        rows = rows if names else []  # the head alone trains
        self._fisher = fisher(ground.bare, names, rows, ground.is_causal_lm, self.seed)

    def __call__(self, ground: Ground, step: Step) -> Tensor:
        """See the class."""
        changes = ground.origin.changes(ground.base)
        parts = [(self._fisher[name] * (now - before).square()).sum() for name, now, before in changes]
        return 0.5 * torch.stack(parts).sum() if parts else torch.zeros((), device=ground.model.device)
