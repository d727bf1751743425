"""Replay: a share of general text in each step."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_ft.general import (
    GENERAL_EN,
    collate,
    embed,
    encode,
    hidden_states,
    is_causal_lm,
    read_texts,
    token_losses,
)
from lightning_ft.tasks.penalties.penalty import Ground, Penalty, Step


class Replay(Penalty):
    """General text in each step, learned again: rehearsal (Robins 1995, https://doi.org/10.1080/09540099550039318).

    A causal language model learns it as it learned to begin with: R is the mean of ``-log p`` of its tokens. Any other
    keeps the embeddings of the base: R is the mean of ``1 - cos(e_base, e_tuned)``, as of
    :class:`~lightning_ft.tasks.penalties.kl.KL`, on general text.

    Args:
        weight: λ.
        texts: general text: see :func:`lightning_ft.general.read_texts`.
        share: of the texts in a step that are general: with 0.2 there are 8 of them beside 32 of the task.
        max_length: longer texts are cut to this many tokens.
        tokenizer: by default the model's.
        seed: of which texts a step gets; that depends on it and on the number of the batch alone, so that a resumed
            run gets them too.

    Raises:
        ValueError: for a share that isn't between 0 and 1.
    """

    name = "replay"

    def __init__(
        self,
        weight: float = 1.0,
        texts: str | Path | Sequence[str] = GENERAL_EN,
        share: float = 0.2,
        max_length: int = 128,
        tokenizer: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(weight)
        if not 0 < share < 1:
            raise ValueError(f"Replay: share must be above 0 and below 1, not {share!r}.")
        self.texts, self.share, self.max_length, self.tokenizer, self.seed = texts, share, max_length, tokenizer, seed
        self._rows: list[dict[str, list[int]]] = []

    def needs_base(self, model: nn.Module) -> bool:
        """Unless the text itself says what is to be learned."""
        return not is_causal_lm(model)

    def prepare(self, ground: Ground) -> None:
        """Read the text.

        Raises:
            GeneralTextError: if the text or the tokenizer can't be read.
        """
        self._rows = encode(read_texts(self.texts), ground.model, self.tokenizer, self.max_length)

    def chosen(self, rows: int, index: int) -> list[int]:
        """Which general texts go beside ``rows`` of the task in the batch number ``index``."""
        count = min(max(1, round(rows * self.share / (1 - self.share))), len(self._rows))
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if distributed else 0  # each has other texts
        return random.Random(f"{self.seed} {index} {rank}").sample(range(len(self._rows)), count)

    def __call__(self, ground: Ground, step: Step) -> Tensor:
        """See the class."""
        inputs = step.inputs["input_ids"]
        batch = collate([self._rows[i] for i in self.chosen(len(inputs), step.index)], inputs.device)
        if ground.is_causal_lm:
            return token_losses(ground.model(**batch).logits, batch).mean()
        mask = batch.get("attention_mask")
        with torch.no_grad():
            e_base = embed(hidden_states(ground.bare, batch), mask)
        return 0.5 * (e_base - embed(hidden_states(ground.model, batch), mask)).square().sum(-1).mean()
