"""The processes of one run on several devices: all train, and the first one alone finds, tells and writes.

On one machine Lightning starts the others when the first one comes to a Trainer: they run ``train`` from its beginning,
with the arguments, the folder and the learning rate of the first. torchrun and srun start all of them at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only  # type: ignore[attr-defined]
from omegaconf import read_write

from lightning_ft.apps import process
from lightning_ft.apps.errors import RequestError

_SET_BY_LIGHTNING = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")


def is_first() -> bool:
    """Whether this is the run's first process, which also is the only one of a run on one device."""
    rank: int = rank_zero_only.rank  # type: ignore[attr-defined]
    return rank == 0 and os.environ.get("NODE_RANK", "0") == "0"


def started() -> int:
    """How many processes torchrun, srun or Lightning says that there are; 1 where nobody says it."""
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or 1)


def check_folder() -> None:
    """Raise RequestError if the processes of a run would have a folder each, after the time of their start."""
    hydra = HydraConfig.get()
    named = hydra.mode == RunMode.MULTIRUN or any("hydra.run.dir=" in given for given in hydra.overrides.hydra)
    if started() > 1 and not named:
        raise RequestError(
            f"{started()} processes of one run were started, each of which would name a folder of its own after the"
            " time: name one for all, hydra.run.dir=runs/NAME."
        )


def check_count(trainer: Trainer) -> None:
    """Raise RequestError if the Trainer works with fewer processes than were started: each would train by itself."""
    if started() != trainer.world_size and started() > 1:
        raise RequestError(
            f"{started()} processes were started, and the Trainer is one for {trainer.world_size}: give trainer=ddp"
            " (or another strategy) with trainer.devices=PROCESSES_A_MACHINE and trainer.num_nodes=MACHINES."
        )


@contextmanager
def together(folder: Path, decided: Sequence[str]) -> Iterator[None]:
    """Let Lightning start the other processes of a run within the block; after it this one is by itself again.

    Lightning starts what ``sys.argv`` says, unless ``__main__`` is a module, and names the folder that Hydra's config
    names.

    Args:
        folder: the run's.
        decided: overrides for what this process has found out.
    """
    main, hydra = sys.modules["__main__"], cast(Any, HydraConfig.instance().cfg)
    argv, spec = sys.argv, main.__spec__
    environment = {key: os.environ.get(key) for key in _SET_BY_LIGHTNING}
    sys.argv, main.__spec__ = [process.__file__, *_arguments(), *decided], None
    with read_write(hydra.hydra):
        hydra.hydra.run.dir = str(folder)  # of a job of a multirun too
    try:
        yield
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # else gloo's threads may abort a process that goes first
            torch.distributed.destroy_process_group()
    finally:
        sys.argv, main.__spec__ = argv, spec
        for key, value in environment.items():  # by which a next job would believe that it has been started already
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value


def _arguments() -> list[str]:
    """This job's own arguments, in Hydra's grammar."""
    hydra = HydraConfig.get()
    choices = [f"--config-dir={s.path}" for s in hydra.runtime.config_sources if s.provider == "command-line"]
    places = [given for given in hydra.overrides.hydra if given.startswith("hydra.searchpath")]
    return [f"--config-name={hydra.job.config_name}", *choices, *places, *hydra.overrides.task]
