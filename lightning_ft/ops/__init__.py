"""The arithmetic that must be fast: pure torch functions."""

from lightning_ft.ops.lora_linear import Linear, lora_linear

__all__ = ["Linear", "lora_linear"]
