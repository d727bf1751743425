"""Cross-entropy of rows of logits on a GPU, read twice and written over once by their gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _row(logits, labels, losses, width, stride, wants_gradient: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row)
    chosen = tl.load(logits + label).to(tl.float32)
    most, total = -float("inf"), 0.0
    for start in range(0, width, block):
        places = start + tl.arange(0, block)
        x = tl.load(logits + places, mask=places < width, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(most, tl.max(x, 0))
        total = total * tl.exp(most - higher) + tl.sum(tl.exp(x - higher), 0)
        most = higher
    likelihood = most + tl.log(total)
    tl.store(losses + row, likelihood - chosen)
    if wants_gradient:
        tl.debug_barrier()  # until all threads have read what is about to be written over
        for start in range(0, width, block):
            places = start + tl.arange(0, block)
            x = tl.load(logits + places, mask=places < width, other=-float("inf")).to(tl.float32)
            p = tl.exp(x - likelihood) - tl.where(places == label, 1.0, 0.0)
            tl.store(logits + places, p, mask=places < width)


def cross_entropy_(logits: Tensor, labels: Tensor, wants_gradient: bool) -> Tensor:
    """The cross-entropy of each row, (n,) in fp32; ``logits`` (n, V) become ``softmax - onehot``, if that is wanted."""
    losses = torch.empty(len(logits), device=logits.device)
    block = min(8192, triton.next_power_of_2(logits.shape[1]))
    _row[(len(logits),)](
        logits, labels, losses, logits.shape[1], logits.stride(0), wants_gradient, block=block, num_warps=8
    )
    return losses
