"""Data: sources and their checks, batching, and the DataModule."""
