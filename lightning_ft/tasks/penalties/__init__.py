"""Penalties: what is added to a task's loss to keep what the base could do, or to keep the weights small."""
