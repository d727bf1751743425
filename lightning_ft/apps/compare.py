"""``lightning-ft compare``: several methods on the same data, and what each costs and gives.

Each is trained by ``lightning-ft train`` in a process of its own, one after another, so that its time and its peak
memory are its own. What comes of them are records, one a run (:mod:`lightning_ft.apps.records`). In the folder:

compare.csv, compare.json   the records; in the latter also versions, hardware and what was asked for
compare.png                 the picture
NAME/ or NAME_seedN/        the run of a method as `train` leaves it, and console.log: all that its process said
"""

from __future__ import annotations

import difflib
import io
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import hydra
from omegaconf import DictConfig, ListConfig, OmegaConf

from lightning_ft.apps import process
from lightning_ft.apps.paths import conf_dir

CONSOLE = "console.log"

_TRAIN = process.__file__
_BAR = "+callbacks.progress._target_=lightning.pytorch.callbacks.TQDMProgressBar"  # Rich's says nothing to a pipe


class Run(NamedTuple):
    """A run to be made.

    Attributes:
        method: a choice of the group ``method``.
        seed: of the run.
        folder: where it goes.
        arguments: those of ``train``, in Hydra's grammar.
    """

    method: str
    seed: int
    folder: Path
    arguments: list[str]


def main() -> None:
    """Train by each method; print the comparison and write its files.

    Raises:
        RequestError: also for an option of a single method, of which Hydra would only say that it isn't there.
    """
    from lightning_ft.apps.errors import RequestError

    if any(re.match(r"[+~]*method\b", argument) for argument in sys.argv[1:]):
        raise RequestError(
            "compare takes several methods, methods=[lora,head], each as its YAML has it. For other options make a YAML"
            " of your own, FOLDER/method/mine.yaml: methods=[lora,mine] +rates.mine=1e-3 --config-dir=FOLDER."
        )
    _main()


@hydra.main(config_path=str(conf_dir()), config_name="compare", version_base="1.3")
def _main(config: DictConfig) -> None:
    from lightning_ft.apps import build

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the run which is on ends too
    build.register_resolvers()
    build.tidy_messages(logging.WARNING)
    compare(config)


def compare(config: DictConfig) -> None:
    """One comparison, into Hydra's output directory.

    Raises:
        RequestError: before any run, if one can't be made as asked for; after all of them, if one has failed.
    """
    from hydra.core.hydra_config import HydraConfig

    from lightning_ft.apps import build, records, report
    from lightning_ft.apps.errors import RequestError

    folder = Path(HydraConfig.get().runtime.output_dir)
    planned = plan(config, folder)
    build.datamodule(config).setup("fit")  # what is wrong with the data is said once, and now

    about = records.about(config, list(HydraConfig.get().overrides.task))
    found: list[dict[str, Any]] = []
    with report.Watch(len(planned)) as watch:
        for run in planned:
            watch.begin(run.folder.name)
            found.append({"method": run.method, "seed": run.seed, "folder": run.folder.name, **_train(run, watch.say)})
            records.write(folder, found, about)  # each time: an interruption loses nothing
            watch.end(records.describe(found[-1]))
    _show(config, folder, found, about)

    failed = [record for record in found if record["status"] == "failed"]
    if failed:
        logs = ", ".join(os.path.relpath(folder / record["folder"] / CONSOLE) for record in failed)
        raise RequestError(f"{len(failed)} of {len(found)} runs failed; what they said: {logs}")


def plan(config: DictConfig, folder: Path) -> list[Run]:
    """The runs in their order. Each is composed, and what it's made of is made, so that what is wrong is said now.

    Raises:
        RequestError: for a method that there isn't, or that doesn't go with the other overrides.
    """
    from hydra import compose
    from hydra.core.hydra_config import HydraConfig
    from hydra.utils import instantiate

    from lightning_ft.apps import build, records
    from lightning_ft.apps.cli import quoted
    from lightning_ft.apps.errors import RequestError

    methods, seeds = _methods(config), _several(config, "seeds")
    if (folder / records.COMPARISON).exists():
        raise RequestError(f"'{os.path.relpath(folder)}' holds a comparison already: name another hydra.run.dir.")
    shared = _shared(config, seeds[0])
    sources = HydraConfig.get().runtime.config_sources
    own_choices = [f"--config-dir={source.path}" for source in sources if source.provider == "command-line"]
    runs = []
    for seed in seeds:
        for method in methods:
            place = folder / (method if len(seeds) == 1 else f"{method}_seed{seed}")
            if place.exists():
                raise RequestError(f"'{os.path.relpath(place)}' is there already: name another hydra.run.dir.")
            differing = [f"method={method}", f"seed={seed}"]
            composed = compose("train", [*shared, *differing])
            build.check(composed)
            build.rate(composed, method)
            build.method(composed)
            own = [*differing, f"hydra.run.dir={quoted(str(place))}"]
            runs.append(Run(method, seed, place, [*own_choices, *shared, *own]))
    for part in ("optimizer", "scheduler", "callbacks"):  # which all runs have alike
        instantiate(composed[part], _convert_="all")
    instantiate(composed.trainer, logger=False, _convert_="all")
    return runs


def _methods(config: DictConfig) -> list[str]:
    """The methods to compare, all of which there are."""
    from hydra.core.global_hydra import GlobalHydra

    from lightning_ft.apps.errors import RequestError

    methods, choices = _several(config, "methods"), GlobalHydra.instance().config_loader().get_group_options("method")
    for method in methods:
        if method not in choices:
            near = difflib.get_close_matches(str(method), choices, n=3)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise RequestError(f"there is no method '{method}'; there are {', '.join(choices)}.{hint}")
    return methods


def _shared(config: DictConfig, seed: object) -> list[str]:
    """The arguments of ``train`` that all runs have in common; ``seed`` is the first run's."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.override_parser.overrides_parser import OverridesParser

    given = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    shared = [str(o.input_line) for o in given if o.key_or_group not in ("methods", "seeds")]
    shared += [f"{key}={config[key]}" for key in ("test_before", "latency")]  # whose defaults are others than train's
    if config.trainer.get("enable_progress_bar", True):
        shared.append(_BAR)
    if OmegaConf.is_interpolation(config.data, "seed"):
        shared.append(f"data.seed={seed}")  # one split for all: the scores are of the same rows
    return shared


def _several(config: DictConfig, key: str) -> list[Any]:
    """The different values of a list; one that isn't in a list will do."""
    from lightning_ft.apps.errors import RequestError

    values = list(config[key]) if isinstance(config[key], ListConfig) else [config[key]]
    if not values or len(set(values)) < len(values):
        raise RequestError(f"{key} must be a list of different values, not [{', '.join(map(str, values))}].")
    return values


def _train(run: Run, say: Callable[[str], None]) -> dict[str, Any]:
    """Make the run; returns what a record says of its result. ``say`` hears each line, a progress bar's too."""
    from lightning_ft.apps import records, report

    run.folder.mkdir(parents=True)
    log = run.folder / CONSOLE
    process = subprocess.Popen(
        [sys.executable, _TRAIN, *run.arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
    )
    assert process.stdout is not None
    with (
        process,
        io.TextIOWrapper(process.stdout, encoding="utf-8", errors="replace", newline="") as lines,
        log.open("w", encoding="utf-8") as file,
    ):
        try:
            for line in lines:
                if not line.endswith(("\r", "\x1b[A\n")):  # of a progress bar the last state is kept
                    file.write(report.plain(line))
                say(line)
        except BaseException:
            process.terminate()
            raise
    if process.returncode == 0:
        return records.finished(run.folder)
    return {"status": "failed", "reason": _reason(process.returncode, log.read_text(encoding="utf-8"))}


def _reason(status: int, said: str) -> str:
    """Why a process ended with this status: the signal, or the message that it ended with."""
    if status < 0:
        return f"ended by {signal.Signals(-status).name}" + (" (out of memory?)" if status == -signal.SIGKILL else "")
    lines = [line for line in said.splitlines() if line.strip()]
    message = lines[-1] if lines else f"exit status {status}"
    return message.removeprefix("lightning-ft train: ")


def _show(config: DictConfig, folder: Path, found: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """The table; and where a run came to its end, the picture, and what loggers get."""
    from hydra.utils import instantiate
    from lightning.pytorch.loggers import CSVLogger

    from lightning_ft.apps import records, report, runs
    from lightning_ft.apps.picture import picture
    from lightning_ft.reporting import log_figure, log_table

    report.console.print(records.table(found, about["data"]))
    report.console.print(f"The comparison lies in {os.path.relpath(folder)}", markup=False, soft_wrap=True)
    best = records.best(found)
    if best is None:
        return
    place = folder / best["folder"]
    said = f"The best on the validation rows is {best['folder']}: run={os.path.relpath(place)}"
    if runs.ROOT.resolve() in place.resolve().parents:
        os.utime(place / runs.RESULTS)  # the newest one
        said += ", or run=last"
    report.console.print(said, markup=False, soft_wrap=True)
    figure = picture(found, about["data"])
    figure.savefig(folder / "compare.png", dpi=150)
    loggers = list(instantiate(config.logger, _convert_="all").values())
    loggers = [logger for logger in loggers if not isinstance(logger, CSVLogger)]  # the files are here already
    for logger in loggers:
        logger.log_hyperparams(about)
    log_table(loggers, "compare/table", *records.columns_and_rows(found))
    log_figure(loggers, "compare/picture", figure, 0)
    for logger in loggers:
        logger.finalize("success")
