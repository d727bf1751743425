"""Loggers that need a decision when they're made. The only code that knows Weights & Biases by name."""

from __future__ import annotations

import logging
import netrc
import os
from typing import Any
from urllib.parse import urlparse

from lightning.pytorch.loggers import WandbLogger

log = logging.getLogger(__name__)


def wandb(**arguments: Any) -> WandbLogger:
    """A WandbLogger: online where the user is logged in, else offline, saying so. ``WANDB_MODE`` decides if set.

    Args:
        arguments: those of WandbLogger.
    """
    import wandb as client

    if client.run is not None:  # an earlier job's of a multirun, which WandbLogger would go on writing to
        client.finish()
    if "WANDB_MODE" not in os.environ and not _logged_in():
        log.info(
            "Weights & Biases: not logged in, so this run is kept offline in %s/wandb."
            " `wandb login` puts the next one online, `wandb sync` of that folder this one.",
            arguments.get("save_dir", "."),
        )
        return WandbLogger(offline=True, **arguments)
    return WandbLogger(**arguments)


def _logged_in() -> bool:
    """As ``wandb login`` leaves it: a key in the environment, or the host in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
