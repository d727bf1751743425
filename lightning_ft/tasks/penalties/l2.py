"""Small weights, and weights near the pretrained ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_ft.injection import refuse_unfoldable
from lightning_ft.tasks.penalties.penalty import Ground, Penalty, Step


class L2(Penalty):
    """``R = ½ ‖θ‖²`` over all that trains: pulls to zero, as weight decay does, but within the loss.

    Args:
        weight: λ.
    """

    name = "l2"

    def needs_base(self, model: nn.Module) -> bool:
        """Not with it."""
        return False

    def __call__(self, ground: Ground, step: Step) -> Tensor:
        """See the class."""
        return _half_squares(ground.trained)


class L2SP(Penalty):
    """``R = ½ ‖W - W₀‖² + β/2 ‖θ_head‖²``: to the pretrained weights W₀ as the starting point, with a head to zero.

    (Li et al. 2018, https://arxiv.org/abs/1802.01483, equation 2.) W is the base as it is with what a method added
    written into it: under LoRA the term is ``½ ‖s B A‖²``, whose gradient reaches A and B.

    Args:
        weight: λ, the paper's α.
        head: β/α: of what isn't in the base.
    """

    name = "l2_sp"
    compares_weights = True

    def __init__(self, weight: float, head: float = 0.0) -> None:
        super().__init__(weight)
        self.head = head

    def prepare(self, ground: Ground) -> None:
        """Refuse what changes no weights.

        Raises:
            InjectionError: if a method changes something else, or weights are packed.
        """
        refuse_unfoldable(ground.base, "L2SP")

    def __call__(self, ground: Ground, step: Step) -> Tensor:
        """See the class."""
        change = 0.5 * ground.origin.squared_change(ground.base)
        if not self.head:
            return change
        inside = {id(p) for _, p in ground.base.named_parameters()}
        return change + self.head * _half_squares([p for p in ground.trained if id(p) not in inside])


def _half_squares(parameters: list[nn.Parameter]) -> Tensor:
    squares = [parameter.square().sum() for parameter in parameters]
    return 0.5 * torch.stack(squares).sum() if squares else torch.zeros(())
