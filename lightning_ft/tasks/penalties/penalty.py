"""Penalty: a term ``λ · R`` beside a task's loss, ``L = L_task + Σ λ_i R_i``. One room a penalty.

Three of them are one idea, seen from further and further away. A base is a distribution: a causal language model's over
the next token; any other's, since its head is new, over embeddings: a Gaussian of unit variance around the embedding
that it gives a text (:mod:`lightning_ft.general`). KL is the divergence of the tuned model's distribution from the
base's; EWC is that divergence's second-order approximation around the base's weights; L2SP is EWC with each weight as
important as the next.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_ft.general import is_causal_lm
from lightning_ft.injection import Base, Origin, find_base


class Ground:
    """What penalties stand on in a fit: the model in training, and the base that it was.

    Args:
        model: a Hugging Face model, injected where it is going to be, on the device where it trains.
        origin: what was kept of the base before training; by default the model now is the base.
        heads: what trains outside the model and belongs to it.
    """

    def __init__(self, model: Any, origin: Origin | None = None, heads: Sequence[nn.Module] = ()) -> None:
        self.model, self.heads = model, heads
        self.base: Base = find_base(model)
        if origin is None:
            origin = Origin()
            origin.remember(self.base)
        self.origin = origin

    @property
    def trained(self) -> list[nn.Parameter]:
        """What trains."""
        return [p for module in (self.model, *self.heads) for p in module.parameters() if p.requires_grad]

    @cached_property
    def bare(self) -> Any:
        """The base as it was: frozen, evaluating, over the same tensors where they're frozen. Made once."""
        return self.origin.bare(self.base)

    @cached_property
    def is_causal_lm(self) -> bool:
        """Whether base and tuned model share a distribution over the next token."""
        return is_causal_lm(self.model)


@dataclass(frozen=True)
class Step:
    """A batch in training.

    Attributes:
        inputs: the model's.
        index: the number of the batch in the whole training, from 0.
        hidden: the trunk's last hidden states, (rows, tokens, width).
        logits: the model's.
    """

    inputs: Mapping[str, Any]
    index: int
    hidden: Tensor | None
    logits: Tensor | None


class Penalty(ABC):
    """A term of the loss.

    Args:
        weight: λ. At 0 it isn't computed at all, so that nothing differs.

    Raises:
        ValueError: for a weight below 0.
    """

    name: ClassVar[str]
    """Under which it is logged: ``train/penalty/NAME``."""

    compares_weights: ClassVar[bool] = False
    """Whether it looks at the base's weights themselves, which must be dense for that."""

    def __init__(self, weight: float) -> None:
        if not isinstance(weight, (int, float)) or not weight >= 0:
            raise ValueError(f"{type(self).__name__}: weight must be a number of at least 0, not {weight!r}.")
        self.weight = weight

    def needs_base(self, model: nn.Module) -> bool:
        """Whether it compares ``model`` with the base as it was."""
        return True

    def prepare(self, ground: Ground) -> None:  # noqa: B027
        """Before training, or before it goes on."""

    @abstractmethod
    def __call__(self, ground: Ground, step: Step) -> Tensor:
        """R of a batch, a scalar with gradients."""
