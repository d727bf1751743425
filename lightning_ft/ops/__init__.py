"""The arithmetic that must be fast: pure torch functions."""

from lightning_ft.ops.imagined import standing_for
from lightning_ft.ops.linear_cross_entropy import linear_cross_entropy
from lightning_ft.ops.lora_linear import Linear, lora_linear
from lightning_ft.ops.packed import ask_to_pack, bytes_of_packed, forget_packed, packed_weight

__all__ = [
    "Linear",
    "ask_to_pack",
    "bytes_of_packed",
    "forget_packed",
    "linear_cross_entropy",
    "lora_linear",
    "packed_weight",
    "standing_for",
]
