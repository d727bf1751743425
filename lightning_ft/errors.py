"""The error of ours that all others are."""

from __future__ import annotations


class UserError(ValueError):
    """Something can't be done as asked for, or with what was given; the message names cause and cure.

    The command line shows the message alone. Any other error is a fault of the program there, with its traceback.
    """
