"""What went wrong, in a sentence a user can act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from hydra.errors import HydraException, InstantiationException, OverrideParseException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from lightning_ft.errors import UserError


class RequestError(UserError):
    """What a command was asked for can't be done; the message says what can."""


def explain(error: BaseException) -> str | None:
    """A message for an error in what the user asked for or gave; None for a fault of the program."""
    chain = list(_chain(error))
    for cause in chain:
        if isinstance(cause, MissingMandatoryValue):
            return f"'{cause.full_key}' has no value: give {cause.full_key}=..."
        if isinstance(cause, (ConfigAttributeError, ConfigKeyError)) and cause.parent_node is not None:
            return _unknown_key(cause)
    if isinstance(error, OverrideParseException):
        return f"'{error.override}' can't be read: {error}"
    if isinstance(error, (InstantiationException, InterpolationResolutionError)):
        # What a constructor or a resolver says is to the point; the words around it add nothing.
        return str(chain[-1] if isinstance(chain[-1], (ValueError, OSError)) else error)
    asked_for = isinstance(error, (HydraException, OmegaConfBaseException, UserError, FileNotFoundError))
    return str(error) if asked_for else None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _unknown_key(error: OmegaConfBaseException) -> str:
    parent, key = error.parent_node, str(error.key)
    choices = [str(choice) for choice in parent.keys()]  # noqa: SIM118
    near = difflib.get_close_matches(key, choices, n=1)
    place = error.full_key.rpartition(".")[0] if error.full_key else ""
    where = f"'{place}' has" if place else "the config has"
    hint = f" Did you mean '{near[0]}'?" if near else ""
    if "_target_" in choices:
        hint += f" If {parent['_target_']} takes it beside these: +{error.full_key}=..."
    return f"there is no option '{error.full_key or key}'; {where} {', '.join(sorted(choices))}.{hint}"
