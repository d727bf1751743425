"""The command ``lightning-ft``: finds the app, and turns errors into messages.

Imports nothing heavy, so that help answers at once.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
from collections.abc import Sequence

APPS = {
    "train": "fine-tune a model; writes a run folder",
    "evaluate": "score a run's adapter on a test split",
    "predict": "classify or complete texts with a run's adapter",
    "check": "look for faults in data, and write a cleaned copy",
    "estimate": "tell what a training would take: memory, time, parameters",
    "compare": "fine-tune by several methods, and compare them",
    "merge": "write a run as a plain Hugging Face model",
    "export": "write a run's adapter as a PEFT folder, to share or upload",
}

_QUOTED = (
    "text",
    "file",
    "run",
    "out",
    "data.path",
    "model.name",
    "check.fix",
    "data.target.separator",
    "data.target.template",
)  # values that may hold what Hydra's grammar uses


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``lightning-ft APP OVERRIDES...``.

    Returns:
        The exit status: 0, 1 for an error in what was asked, 2 for an unknown app.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if arguments[0] in ("-V", "--version"):
        from lightning_ft import __version__

        print(f"lightning-ft {__version__}")
        return 0
    app, overrides = arguments[0], [_quote(argument) for argument in arguments[1:]]
    if app not in APPS:
        near = difflib.get_close_matches(app, APPS, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        print(f"lightning-ft: there is no command '{app}'; there are {', '.join(APPS)}.{hint}", file=sys.stderr)
        return 2
    return run(app, overrides)


def _usage() -> str:
    apps = "\n".join(f"  {name:<10} {what}" for name, what in APPS.items())
    return (
        "lightning-ft: fine-tuning for PyTorch Lightning\n\n"
        "Usage: lightning-ft COMMAND [GROUP=CHOICE ...] [key.subkey=value ...]\n\n"
        f"Commands:\n{apps}\n\n"
        "lightning-ft COMMAND --help shows a command's groups, choices and values.\n"
        "A full traceback of any error: LIGHTNING_FT_DEBUG=1."
    )


def _quote(argument: str) -> str:
    """Quote a text or a path for Hydra, in whose grammar commas, brackets and quotes mean something.

    What is typed is what the app gets; but ``[a,b]`` is a list, and ``null`` nothing.
    """
    key, equals, value = argument.partition("=")
    if key == "check.fail_on" and "," in value and value[0] != "[":  # to Hydra's grammar that would be a sweep
        return f"{key}=[{value}]"
    if not equals or key not in _QUOTED or value in ("", "null") or (value[0] == "[" and value[-1] == "]"):
        return argument
    if key == "text":  # backslashes mean something before an interpolation too
        value = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return f"{key}={quoted(value)}"


def quoted(value: str) -> str:
    """``value`` as a string of Hydra's grammar."""
    # Backslashes mean something only before a quote, the closing one too.
    value = re.sub(r"(\\*)'", r"\1\1\\'", value)
    value = re.sub(r"(\\+)\Z", r"\1\1", value)
    return f"'{value}'"


def run(app: str, overrides: Sequence[str]) -> int:
    """Run an app with overrides that are in Hydra's grammar; the exit status is that of :func:`main`."""
    # Hydra then raises its errors instead of printing them, and the message below can be a good one.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    program, sys.argv = sys.argv, [f"lightning-ft {app}", *overrides]
    try:
        importlib.import_module(f"lightning_ft.apps.{app}").main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        from lightning_ft.apps.errors import explain

        message = None if os.environ.get("LIGHTNING_FT_DEBUG") else explain(error)
        if message is None:
            raise
        print(f"lightning-ft {app}: {message}", file=sys.stderr)
        return 1
    finally:
        sys.argv = program
    return 0


if __name__ == "__main__":
    sys.exit(main())
