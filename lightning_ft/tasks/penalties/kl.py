"""The divergence from the base on the task's own texts (learning without forgetting)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ft.general import embed, hidden_states
from lightning_ft.tasks.penalties.penalty import Ground, Penalty, Step


def token_kl(base: Tensor, tuned: Tensor) -> Tensor:
    """``KL(p_base ‖ p_tuned)`` of each token, from logits (tokens, vocabulary) to (tokens,), in fp32 or more."""
    wide = torch.promote_types(base.dtype, torch.float32)
    log_base, log_tuned = base.to(wide).log_softmax(-1), tuned.to(wide).log_softmax(-1)
    return (log_base.exp() * (log_base - log_tuned)).sum(-1)


class KL(Penalty):
    """``R = KL(p_base ‖ p_tuned)``, the mean over a batch of the task: what the base said of a text stays said.

    (Li & Hoiem 2017, https://arxiv.org/abs/1606.09282, who keep the old task's outputs on the new task's inputs.) Of a
    causal language model, whose head base and tuned model share, p is over the next token, and the mean is over tokens.
    Of any other, whose head is new, p is a Gaussian of unit variance around a text's embedding (mean over tokens, unit
    length), and the divergence ``½ ‖e_base - e_tuned‖² = 1 - cos(e_base, e_tuned)``.

    The base is the model without what was added: under an adapter it costs a forward pass and no memory, in full
    fine-tuning the weights once more. It evaluates, and the tuned model has its dropout: R isn't quite 0 at the start.

    Args:
        weight: λ.
    """

    name = "kl"

    def __call__(self, ground: Ground, step: Step) -> Tensor:
        """See the class."""
        inputs, mask = dict(step.inputs), step.inputs.get("attention_mask")
        if mask is None and "position_ids" in inputs:  # packed rows, which a model with a cache would not tell apart
            inputs["use_cache"] = False
            mask = inputs["position_ids"] > 0  # without what fills rows up, and examples' first tokens
        if ground.is_causal_lm:
            assert step.logits is not None, "the model's forward gave no logits"
            with torch.no_grad():
                base = ground.bare(**inputs).logits
            every = token_kl(base, step.logits)
            return every.mean() if mask is None else every[mask.bool()].mean()
        assert step.hidden is not None, "the trunk's forward gave no hidden states"
        with torch.no_grad():
            e_base = embed(hidden_states(ground.bare, step.inputs), mask)
        return 0.5 * (e_base - embed(step.hidden, mask)).square().sum(-1).mean()
