"""What went wrong, in a sentence a user can act on."""

from __future__ import annotations

import difflib
import dis
from collections.abc import Iterator

from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)


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
    if isinstance(error, HydraException) and len(chain) > 1 and isinstance(chain[-1], (ValueError, OSError)):
        return str(chain[-1])  # Hydra's "error in call to target" adds nothing to it
    known = (HydraException, OmegaConfBaseException)
    if isinstance(error, known) or _is_ours(error):
        return str(error)
    return None


def _is_ours(error: BaseException) -> bool:
    """Raised by this package on purpose: an error whose message says what to do."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None or not isinstance(error, (ValueError, OSError, RuntimeError)):
        return False
    frame = traceback.tb_frame
    # Built-in functions have no frame of their own: what int() or torch raises seems to come from their caller.
    by_raise = frame.f_code.co_code[traceback.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return by_raise and frame.f_globals.get("__name__", "").startswith("lightning_ft.")


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
        hint += f" An argument that {parent['_target_']} takes beside these: +{error.full_key}=..."
    return f"there is no option '{error.full_key or key}'; {where} {', '.join(sorted(choices))}.{hint}"
