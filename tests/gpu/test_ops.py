"""The fast arithmetic on a GPU: ``python3 -m pytest tests/gpu -o filterwarnings=default`` in a bare checkout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ft.ops import Linear, linear_cross_entropy, lora_linear
from lightning_ft.ops.dropout import Kept, Seeded, keep

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

S = 0.7


def mask_of(kept: Kept, like: Tensor) -> Tensor:
    return kept.times(torch.ones_like(like), torch.eye(like.shape[1], dtype=like.dtype, device="cuda"))


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def test_a_seed_is_a_mask() -> None:
    x = torch.randn(3001, 512, device="cuda")
    kept = keep(x, 0.1)
    assert isinstance(kept, Seeded)
    mask = mask_of(kept, x)
    assert torch.equal(mask, mask_of(kept, x))
    assert not torch.equal(mask, mask_of(keep(x, 0.1), x))
    assert (1 - mask.mean()).item() == pytest.approx(0.1, abs=1e-3)
    assert ((1 - mask.mean(0)).var() / (0.09 / 3001)).item() == pytest.approx(1, abs=0.3)  # columns alike
    right, left = torch.randn(512, 8, device="cuda"), torch.randn(8, 3001, device="cuda")
    torch.testing.assert_close(kept.under(left, x, x.dtype), left @ (mask * x), rtol=1e-4, atol=1e-3)
    out, thin = torch.randn_like(x), torch.randn(3001, 8, device="cuda")
    wanted = out + mask * (0.5 * thin @ right.T)
    torch.testing.assert_close(kept.add_product_(out, thin, right.T.contiguous(), 0.5), wanted, rtol=1e-4, atol=1e-4)
    of_product = kept.of_product(thin, right.T.contiguous())
    torch.testing.assert_close(of_product, mask * (thin @ right.T), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_lora_linear_is_its_equation_in_fp64(dtype: torch.dtype, most: float, p: float) -> None:
    x = torch.randn(4, 200, 256, device="cuda", dtype=dtype).requires_grad_()
    linear = Linear(torch.randn(384, 256, device="cuda", dtype=dtype), torch.randn(384, device="cuda", dtype=dtype))
    a, b = torch.randn(8, 256, device="cuda").requires_grad_(), torch.randn(384, 8, device="cuda").requires_grad_()
    torch.manual_seed(1)
    mask = mask_of(keep(x.detach().view(-1, 256), p), x.detach().view(-1, 256)).view_as(x) / (1 - p)
    torch.manual_seed(1)
    ours = lora_linear(x, linear, a, b, S, p)
    exact = [t.detach().double().requires_grad_() for t in (x, a, b)]
    low_rank = F.linear(F.linear(exact[0] * mask.double(), exact[1]), exact[2])
    wanted = F.linear(exact[0], linear.weight.double(), None if linear.bias is None else linear.bias.double())
    wanted = wanted + S * low_rank
    assert relative(ours, wanted) < most
    out = torch.randn_like(wanted)
    found = torch.autograd.grad(ours, (x, a, b), out.to(dtype))
    for mine, other in zip(found, torch.autograd.grad(wanted, exact, out), strict=True):
        assert relative(mine, other) < most
    assert [grad.dtype for grad in found] == [dtype, torch.float32, torch.float32]


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_layers_of_one_input_are_their_equation_under_one_mask(dtype: torch.dtype, most: float) -> None:
    p, linears = 0.1, [Linear(torch.randn(384, 256, device="cuda", dtype=dtype)) for _ in range(3)]
    thin = [torch.randn(r, 256, device="cuda").requires_grad_() for r in (8, 4, 8)]
    wide = [torch.randn(384, len(a), device="cuda").requires_grad_() for a in thin]
    for _ in range(2):  # they're known from the second pass on
        x = torch.randn(4, 200, 256, device="cuda", dtype=dtype).requires_grad_()
        torch.manual_seed(1)
        ours = torch.stack([lora_linear(x, *layer, S, p) for layer in zip(linears, thin, wide, strict=True)])
    torch.manual_seed(1)
    mask = mask_of(keep(x.detach().view(-1, 256), p), x.detach().view(-1, 256)).view_as(x).double() / (1 - p)
    leaves = (x, *thin, *wide)
    x64, *rest = (leaf.detach().double().requires_grad_() for leaf in leaves)
    pairs = zip(linears, rest[:3], rest[3:], strict=True)
    wanted = torch.stack(
        [F.linear(x64, n.weight.double()) + S * F.linear(F.linear(x64 * mask, a), b) for n, a, b in pairs]
    )
    assert relative(ours, wanted) < most
    out = torch.randn_like(wanted)
    found = torch.autograd.grad(ours, leaves, out.to(dtype))
    for mine, other in zip(found, torch.autograd.grad(wanted, (x64, *rest), out), strict=True):
        assert relative(mine, other) < most


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("vocabulary", [257, 128_256])
def test_cross_entropy_in_pieces_is_that_of_whole_logits(dtype: torch.dtype, most: float, vocabulary: int) -> None:
    hidden = torch.randn(3000, 64, device="cuda", dtype=dtype).requires_grad_()
    weight = torch.randn(vocabulary, 64, device="cuda", dtype=dtype) / 8
    labels = torch.randint(0, vocabulary, (3000,), device="cuda")
    ours = linear_cross_entropy(hidden, weight, labels)  # of the larger vocabulary in three pieces
    exact = hidden.detach().double().requires_grad_()
    wanted = F.cross_entropy(exact @ weight.double().T, labels, reduction="sum")
    assert relative(ours, wanted) < most
    (mine,), (other,) = torch.autograd.grad(ours, hidden), torch.autograd.grad(wanted, exact)
    assert relative(mine, other) < most
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, labels), ours)
