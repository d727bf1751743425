"""Packed weights: the products of the weight, and never those of one that it isn't any more."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from foreign import BertInInit, make, trainer
from torch import Tensor, nn

from lightning_ft import LoRA, PackedWeights, merge
from lightning_ft.ops import Linear, ask_to_pack, bytes_of_packed, forget_packed, lora_linear, packed_weight
from lightning_ft.ops import packed as room

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN: nothing is packed"
)


def layer(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(2)
    return nn.Linear(24, 16, dtype=dtype).requires_grad_(False)


def packed(module: nn.Linear) -> Any:
    ask_to_pack([module])
    return packed_weight(module, module.weight)


BF16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(
        not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bf16 on this CPU: nothing is packed"
    ),
)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("rows", [(5,), (40, 50), (0,)])
def test_values_and_gradients_are_those_without(rows: tuple[int, ...], p: float, dtype: torch.dtype) -> None:
    module = layer(dtype)
    x, a, b = torch.randn(*rows, 24, dtype=dtype), torch.randn(4, 24), torch.randn(16, 4)
    results = []
    for found in (None, packed(module)):
        ours = mine, mine_a, mine_b = tuple(tensor.clone().requires_grad_() for tensor in (x, a, b))
        torch.manual_seed(5)
        out = lora_linear(mine, Linear(module.weight, module.bias, packed=found), mine_a, mine_b, 0.5, p)
        out.float().square().sum().backward()
        results.append([out, *(tensor.grad for tensor in ours)])
    assert found is not None
    for plain, other in zip(*results, strict=True):
        assert plain is not None
        assert other is not None
        close = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(
            other, plain, rtol=close, atol=close * max(plain.abs().amax().item() if plain.numel() else 0, 1)
        )


def changed_in_place(module: nn.Linear) -> None:
    module.weight.mul_(2)


def loaded(module: nn.Linear) -> None:
    module.load_state_dict({key: value + 1 for key, value in module.state_dict().items()})


def moved(module: nn.Linear) -> None:
    module.to(torch.bfloat16)


def replaced(module: nn.Linear) -> None:
    module.weight.data = module.weight.data + 1


@pytest.mark.parametrize("change", [changed_in_place, loaded, moved, replaced])
def test_a_weight_that_changes_is_computed_with_as_it_is(change: Any) -> None:
    module = layer()
    assert packed(module) is not None
    change(module)
    assert packed_weight(module, module.weight) is None
    assert bytes_of_packed([module]) == []


def test_it_is_no_part_of_the_module() -> None:
    module = layer()
    assert packed(module) is packed_weight(module, module.weight) is not None
    assert bytes_of_packed([module]) == [2 * module.weight.nbytes]
    assert set(module.state_dict()) == {"weight", "bias"}
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert packed_weight(other, other.weight) is None
    forget_packed([module])
    assert packed_weight(module, module.weight) is None


def test_what_cannot_be_packed_or_is_wrong_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert packed(layer(torch.float64)) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert packed(layer()) is None
    monkeypatch.setattr(room.PackedWeight, "back", lambda self, grad: grad @ self._weight + 1)
    assert packed(layer()) is None
    monkeypatch.setattr(room.PackedWeight, "__init__", lambda self, weight: torch.ops.mkldnn.no_such_operator(weight))
    assert packed(layer()) is None


# ------------------------------------------------------------------------------------------------- the callback


def fit(*callbacks: Any, **lora: Any) -> Any:
    module = make(BertInInit)
    trainer(LoRA(r=2, target_modules="all-linear", **lora), *callbacks, max_epochs=1).fit(module)
    return module


def test_a_fit_ends_where_it_does_without_and_merges(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        plain, ours = fit(dropout=0.1), fit(PackedWeights(), dropout=0.1)
    assert "PackedWeights: 13 frozen weights are held packed too" in caplog.text
    assert not room._packed
    assert not room._asked
    tokens = ours.example()
    ours.eval()
    before: Tensor = ours.outputs(tokens)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-3, atol=1e-4, msg=key)
    merge(ours)
    torch.testing.assert_close(ours.outputs(tokens), before)


def test_where_nothing_is_packed_that_is_said() -> None:
    with pytest.warns(UserWarning, match="PackedWeights: no weight could be packed"):
        fit(PackedWeights(), init_lora_weights="pissa")
