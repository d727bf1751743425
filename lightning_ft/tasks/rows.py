"""Rows: what was said of each row, for scores that are no means over batches, as rank correlations aren't."""

from __future__ import annotations

from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class Rows(Metric):
    """Outputs and labels of all rows since the last reset, of all processes."""

    full_state_update = False
    outputs: list[Tensor]
    labels: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("outputs", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")
        self.shapes: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        """Keep a batch, (batch, ...) each."""
        self.outputs.append(outputs.detach().float())
        self.labels.append(labels)
        self.shapes = tuple(outputs.shape[1:]), tuple(labels.shape[1:])

    def compute(self) -> tuple[Tensor, Tensor]:
        """Outputs and labels, (rows, ...) each."""
        return dim_zero_cat(self.outputs), dim_zero_cat(self.labels)

    def all(self) -> tuple[Tensor, Tensor]:
        """What :meth:`compute` says, which leaves out the dimensions of a single number."""
        outputs, labels = self.compute()
        return outputs.reshape(-1, *self.shapes[0]), labels.reshape(-1, *self.shapes[1])


class StageRows(nn.ModuleDict):
    """The Rows of ``"val"`` and of ``"test"``, counted apart."""

    def __init__(self) -> None:
        super().__init__({stage: Rows() for stage in ("val", "test")})

    def __getitem__(self, stage: str) -> Rows:
        rows = super().__getitem__(stage)
        assert isinstance(rows, Rows)
        return rows
