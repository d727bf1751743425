"""The arithmetic that must be fast: pure torch functions."""

from lightning_ft.ops.imagined import standing_for
from lightning_ft.ops.linear_cross_entropy import linear_cross_entropy
from lightning_ft.ops.lora_linear import Linear, lora_linear

__all__ = ["Linear", "linear_cross_entropy", "lora_linear", "standing_for"]
