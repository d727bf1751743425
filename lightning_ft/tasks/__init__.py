"""FineTuner, the LightningModule of ours, and the tasks it hosts: heads, losses, metrics."""
