"""Adapters on disk: what of a state dict is ours, and PEFT's file format. Knows no method."""
