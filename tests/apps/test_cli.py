"""The command line: help at once, errors in a sentence, and what is typed is what the app gets."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from commands import call, choices, python, reviews, succeed, tiny_run, write_csv
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

import lightning_ft
from lightning_ft.apps import build, predict
from lightning_ft.apps.cli import APPS, _quote
from lightning_ft.apps.errors import RequestError, explain
from lightning_ft.data.sources import DataError
from lightning_ft.errors import UserError
from lightning_ft.files.state import StateError
from lightning_ft.injection import InjectionError
from lightning_ft.optim import RateError
from lightning_ft.tasks.pretrained import ModelNotFoundError

# ------------------------------------------------------------------------------------------------ help

HELP = """
import sys
from lightning_ft.apps.cli import main
try:
    status = main(sys.argv[1:])
except SystemExit as end:  # Hydra's, after help
    status = end.code
heavy = {"torch", "lightning", "transformers", "datasets", "wandb", "matplotlib"} & set(sys.modules)
sys.exit(f"imported {', '.join(sorted(heavy))}" if heavy else status)
"""


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in APPS)], ids=" ".join)
def test_help_answers_without_importing_anything_heavy(arguments: list[str]) -> None:
    answer = python("-c", HELP, *arguments)
    assert answer.returncode == 0, answer.stderr
    assert f"lightning-ft {arguments[0]}:" in answer.stdout or set(APPS) <= set(answer.stdout.split())


def test_the_programs_help_names_every_command_and_how_to_get_a_traceback() -> None:
    for arguments in ([], ["-h"], ["--help"], ["help"]):
        out = succeed(*arguments)
        assert all(f"  {name} " in out for name in APPS)
        assert "LIGHTNING_FT_DEBUG" in out


def test_the_help_of_train_lists_every_group_with_its_choices() -> None:
    out = succeed("train", "--help")
    for group in ("method", "model", "data", "task", "precision", "trainer", "optimizer", "scheduler", "logger"):
        assert f"{group}: {', '.join(choices(group))}\n" in out


def test_the_help_of_the_small_apps_is_of_their_own_options() -> None:
    for name in [name for name in APPS if name not in ("train", "check", "estimate", "compare")]:
        out = succeed(name, "--help")
        assert "run: ???" in out
        assert "method:" not in out


def test_version() -> None:
    assert succeed("--version") == f"lightning-ft {lightning_ft.__version__}\n"


@pytest.mark.parametrize(("typed", "hint"), [("tran", "Did you mean 'train'?"), ("xyz", "there are train, ")])
def test_an_unknown_command_is_answered_with_those_that_there_are(typed: str, hint: str) -> None:
    answer = call(typed)
    assert (answer.status, answer.out) == (2, "")
    assert f"no command '{typed}'" in answer.err
    assert hint in answer.err
    assert "Did you mean" in answer.err or typed == "xyz"


# --------------------------------------------------------------------------------------------- quoting

TYPED = [
    "plain",
    "good, but slow",
    "a=b, c==d = e",
    "it's",
    "'tis good",
    "'quoted'",
    '"Great," she said',
    '"quoted"',
    "(well) {braces} [in the middle] of it",
    "[sic] works",
    "ends with [this]",
    "[open",
    "很好，但是“屏幕”（有点）暗。",
    "\\",
    "C:\\new\\table\\",
    "\\'",
    "\\\\'",
    "\\\\\\' \\\" \\\\",
    "${oc.env:HOME} costs ${5}, \\${x} and $3",
    "${unfinished",
    " spaces around ",
    "two\nlines\tand a tab",
    "100%",
    "50",
    "1e-3",
    "true",
    "null and void",
    "~key +other @here #there",
    "choice(1,2)",
    "range(1,3)",
    "-m",
    "🙂",
]


class Heard(Exception):
    """Carries what reached the app."""


def reaching(argument: str) -> Any:
    """The value of ``key=value`` behind Hydra's grammar and OmegaConf's."""
    value: Any = OverridesParser.create().parse_override(_quote(argument)).value()
    return OmegaConf.create({"value": value}).value


def test_what_is_typed_as_a_text_is_taken_as_it_is() -> None:
    assert [reaching(f"text={typed}") for typed in TYPED] == TYPED


@pytest.mark.parametrize("key", ["text", "data.path"])
def test_random_texts_and_paths_come_through_hydras_grammar_unchanged(key: str) -> None:
    generator = random.Random(0)
    alphabet = "\\\\''\"\"[](){},,==: $a好#%?*~@\t\n" if key != "text" else "\\\\\\''\"[](){}$$${{,=: a好\n"
    for _ in range(300):
        typed = "".join(generator.choices(alphabet, k=generator.randint(1, 9)))
        if (typed[0], typed[-1]) == ("[", "]") or (key != "text" and "${" in typed):
            continue  # a list; an interpolation
        assert reaching(f"{key}={typed}") == typed


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The texts that reach ``predict``, which then stops."""
    texts: list[object] = []

    def hear(text: object, file: object) -> None:
        texts.append(text)
        raise InterruptedError

    monkeypatch.setattr(predict, "_texts", hear)
    return texts


def test_what_is_typed_as_a_text_is_what_the_app_gets(heard: list[object]) -> None:
    typed = '\'tis (a, b) [c] = {d}: "e", 很好，${5} \\'
    with pytest.raises(InterruptedError):
        call("predict", "run=x", f"text={typed}")
    assert heard == [typed]


def test_a_list_of_texts_is_a_list(heard: list[object]) -> None:
    with pytest.raises(InterruptedError):
        call("predict", "run=x", "text=[good, 'bad, awful']")
    assert heard == [["good", "bad, awful"]]


def test_lists_null_and_other_keys_are_hydras() -> None:
    for argument in ("text=[a,b]", "text=null", "text=", "seed=0,1", "method=lora", "--help", "+text=a,b"):
        assert _quote(argument) == argument
    for key in ("file", "run", "out", "data.path", "model.name"):
        assert reaching(f"{key}=it's (a, b)") == "it's (a, b)"


# ---------------------------------------------------------------------------------------------- errors


NOT_COMPOSED: dict[str, list[str]] = {
    "method=lroa": ["method/lroa", *choices("method")],
    "methd=lora": ["no option 'methd'", "method", "trainer", "Did you mean 'method'?"],
    "method.drop_out=0.1": ["no option 'method.drop_out'", "alpha", "r,", "Did you mean 'dropout'?"],
    "metod.r=4": ["no option 'metod'", "Did you mean 'method'?"],
    "trainer.max_time=1": ["no option 'trainer.max_time'", "lightning.Trainer", "+trainer.max_time=..."],
    "data=file": ["'data.path' has no value: give data.path=..."],
    "seed": ["'seed' can't be read"],
    "method.r=[1": ["'method.r=[1' can't be read"],
}
"""What can't be made a config of, and what the message says."""

NOT_RUN: dict[str, list[str]] = {
    "method.r=0": ["LoRA: r must be a whole number of at least 1, not 0"],
    "method.target_modules=nowhere": ["nowhere"],
    "+method.rank=4": ["LoRA", "rank"],
    "layer_decay=2": ["layer_decay must be above 0 and at most 1, not 2"],
    "scheduler.warmup=-1": ["warmup", "-1"],
    "task.class_weights=[1]": ["class_weights must be 3 numbers"],
    "trainer.precision=bf61": ["bf61"],
    "seed=-1": ["seed must be a whole number from 0", "not -1"],
    "seed=abc": ["seed must be a whole number from 0", "not abc"],
    "optimizer.lr=abc": ["the learning rate must be a number", "not abc"],
    "latency=1.5": ["latency must be a whole number of rounds", "not 1.5"],
    "data.batch_size=0": ["batch_size must be a whole number of at least 1, not 0"],
    "data.path=revews.csv": ["There is no file 'revews.csv'", "Did you mean reviews.csv?"],
    "data.path=bundled:nothing": ["'nothing'", "reviews_en", "reviews_zh"],
    "data.path=one_label.csv": ["only one label"],
    "data.text=body": ["no column 'body'", "text, label", "data.text=..."],
    "model.name=no/such-model": ["'no/such-model' can't be loaded", "isn't a local folder", "config.json"],
    "method=adalora method.tinit=90": ["tinit=90 and tfinal=", "Lower them, or train longer"],
}
"""What a run can't be made of, and what the message says."""


def test_what_cannot_be_composed_is_said_in_a_message() -> None:
    for argument in NOT_COMPOSED:
        message = call("train", argument).message
        assert all(part in message for part in NOT_COMPOSED[argument]), message


def test_what_cannot_be_run_is_said_in_a_message(tiny_bert_dir: str, tmp_path: Path) -> None:
    for i, argument in enumerate(NOT_RUN):
        data = write_csv(tmp_path / "reviews.csv", reviews(30, seed=0))
        write_csv(tmp_path / "one_label.csv", [("good", "good")] * 20)
        message = call(*tiny_run(tiny_bert_dir, data, f"hydra.run.dir={tmp_path / str(i)}", *argument.split())).message
        assert all(part in message for part in NOT_RUN[argument]), message
        assert len(message.splitlines()) <= 3


def test_a_run_that_is_missing_is_asked_for() -> None:
    assert call("predict").message.startswith("'run' has no value: give run=...")
    assert call("evaluate").message.startswith("'run' has no value: give run=...")


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: object) -> None:
        raise ValueError("a fault")

    monkeypatch.setattr(build, "datamodule", fail)
    with pytest.raises(ValueError, match="a fault"):
        call("train")


def test_asked_for_every_error_has_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_FT_DEBUG", "1")
    with pytest.raises(Exception, match="r must be a whole number"):
        call("train", "method.r=0")


def test_a_traceback_is_seen_by_who_runs_the_program() -> None:
    wrong = ["-m", "lightning_ft.apps.cli", "train", "metod=lora"]
    plain, debugging = python(*wrong), python(*wrong, LIGHTNING_FT_DEBUG="1")
    assert plain.returncode == debugging.returncode == 1
    assert "Traceback" not in plain.stderr
    assert "Traceback" in debugging.stderr


def test_an_interruption_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(config: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "datamodule", interrupt)
    answer = call("train")
    assert answer.status == 130
    assert "interrupted" in answer.err


def test_what_the_package_raises_on_purpose_is_a_message_and_anything_else_a_fault() -> None:
    for on_purpose in (RequestError, DataError, InjectionError, StateError, RateError, ModelNotFoundError):
        assert issubclass(on_purpose, UserError)
        assert explain(on_purpose("do this")) == "do this"
    for fault in (ValueError, RuntimeError, OSError, TypeError, KeyError):
        assert explain(fault("a fault")) is None
