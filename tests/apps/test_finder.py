"""optimizer.lr=auto: a search that works with any method, and of which the run shows no trace."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import yaml
from commands import call, reviews, succeed, tiny_run, write_csv
from hydra import compose, initialize_config_dir
from lightning.pytorch.tuner.lr_finder import _LRCallback
from omegaconf import DictConfig
from safetensors.torch import load_file

from lightning_ft.apps import build, finder
from lightning_ft.apps.paths import conf_dir
from lightning_ft.optim import RateError


@pytest.fixture
def some_csv(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "reviews.csv", reviews(90, seed=5))


def composed(model: str, data: Path, *overrides: str) -> DictConfig:
    given = [*tiny_run(model, data)[1:], "optimizer.lr=auto", "lr_finder.steps=30", *overrides]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("train", given)


def search(config: DictConfig) -> float:
    return finder.find_rate(config, build.datamodule(config))[0]


# ---------------------------------------------------------------------- the run


def test_the_run_is_bitwise_the_one_that_is_given_the_rate(tmp_path: Path, tiny_bert_dir: str, some_csv: Path) -> None:
    arguments = tiny_run(tiny_bert_dir, some_csv, "head_lr_ratio=3", "scheduler=one_cycle")
    succeed(*arguments, "optimizer.lr=auto", "hydra.run.dir=runs/found")
    found = json.loads(Path("runs/found/results.json").read_text())
    lr = found["lr"]
    assert 1e-6 < lr < 1
    assert yaml.safe_load(Path("runs/found/config.yaml").read_text())["optimizer"]["lr"] == lr
    assert f"Learning rate: {lr:.2e}" in Path("runs/found/train.log").read_text()
    assert Path("runs/found/lr_finder.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    succeed(*arguments, f"optimizer.lr={lr!r}", "hydra.run.dir=runs/given")
    given = json.loads(Path("runs/given/results.json").read_text())
    assert (found["lr_found"], given["lr_found"]) == (True, False)
    for key in ("after", "validation", "steps"):
        assert found[key] == given[key], key
    ours, theirs = (load_file(f"runs/{name}/adapter/adapter_model.safetensors") for name in ("found", "given"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert {path.name for path in Path("runs/found").iterdir()} - {
        path.name for path in Path("runs/given").iterdir()
    } == {"lr_finder.png"}


@pytest.mark.parametrize("method", ["loraplus", "adalora", "gradual_unfreezing", "prompt"])
def test_any_method_can_be_searched_for(tiny_bert_dir: str, some_csv: Path, method: str) -> None:
    assert 1e-6 < search(composed(tiny_bert_dir, some_csv, f"method={method}")) < 1


def test_the_method_trains_in_the_search_as_in_a_run(
    monkeypatch: pytest.MonkeyPatch, tiny_bert_dir: str, some_csv: Path
) -> None:
    seen: list[str] = []
    kind = type(build.method(composed(tiny_bert_dir, some_csv)))
    for hook in ("on_fit_start", "on_train_batch_start"):
        original = getattr(kind, hook)

        def recorded(self: Any, *arguments: Any, hook: str = hook, original: Any = original) -> None:
            seen.append(hook)
            original(self, *arguments)

        monkeypatch.setattr(kind, hook, recorded)
    search(composed(tiny_bert_dir, some_csv, "lr_finder.max_lr=1e-2"))
    assert seen == ["on_fit_start", *["on_train_batch_start"] * 30]


def test_rates_keep_their_ratios_in_the_search(
    monkeypatch: pytest.MonkeyPatch, tiny_bert_dir: str, some_csv: Path
) -> None:
    rates: list[dict[str, float]] = []
    keep = finder._Ratios.on_before_optimizer_step

    def recorded(self: Any, *arguments: Any) -> None:
        keep(self, *arguments)
        rates.append({group["name"]: group["lr"] for group in arguments[-1].param_groups})

    monkeypatch.setattr(finder._Ratios, "on_before_optimizer_step", recorded)
    search(composed(tiny_bert_dir, some_csv, "head_lr_ratio=5", "lr_finder.max_lr=1e-2"))
    assert len(rates) == 30
    bases = [groups["base"] for groups in rates]
    assert bases == sorted(set(bases))
    assert bases[0] == pytest.approx(1e-6)
    for groups in rates:
        assert [groups["head"], groups["head_no_decay"]] == pytest.approx([5 * groups["base"]] * 2)


def test_a_loss_that_stays_is_a_level_curve() -> None:
    """Also says when Lightning's own means are right, and ours are corrected in vain."""
    callback, losses = _LRCallback(60), [2.0] * 60
    for step, loss in enumerate(losses, 1):
        run = SimpleNamespace(
            global_step=step, fit_loop=SimpleNamespace(batch_idx=step), accumulate_grad_batches=1, should_stop=False,
            strategy=SimpleNamespace(broadcast=bool),
        )  # fmt: skip
        callback.on_train_batch_end(cast(Any, run), cast(Any, None), torch.tensor(loss), None, step)
    assert callback.losses[0] == pytest.approx(1.0, abs=0.02)
    assert finder.unbiased(callback.losses) == pytest.approx(losses)


def results(losses: list[float]) -> dict[str, list[float]]:
    return {"lr": [10 ** (i / 10 - 6) for i in range(len(losses))], "loss": losses}


def test_a_ripple_at_small_rates_is_not_taken_for_the_fall() -> None:
    """The loss halves around 1e-3; the curve trembles by 0.4% before that."""
    fall = [5 - 2.5 / (1 + math.exp(-4 * (i / 10 - 3))) for i in range(60)]
    rippled = [loss + 0.02 * (-1) ** i * (i < 20) for i, loss in enumerate(fall)]
    assert finder._where_it_falls(results(rippled)) == pytest.approx(1e-3)
    diverging = [*rippled[:50], *[math.nan] * 10]
    assert finder._where_it_falls(results(diverging)) == pytest.approx(1e-3)


# ---------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    "losses",
    [[1.0 + i for i in range(30)], [math.nan] * 20, [1.0] * 5, []],
    ids=["rises", "no numbers", "too short", "empty"],
)
def test_where_the_loss_falls_nowhere_the_cure_is_said(losses: list[float]) -> None:
    with pytest.raises(RateError, match=r"No learning rate was found.*optimizer\.lr=.*lr_finder\.min_lr"):
        finder._where_it_falls(results(losses))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["lr_finder.min_lr=50", "lr_finder.max_lr=1000"], "No learning rate was found"),
        (["lr_finder.min_lr=1"], "lr_finder.min_lr=1 must be"),
        (["lr_finder.steps=5"], "lr_finder.steps=5 is too few"),
        (["optimizer.lr=fast"], "or auto, not fast"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(
    tiny_bert_dir: str, some_csv: Path, options: list[str], says: str
) -> None:
    assert says in call(*tiny_run(tiny_bert_dir, some_csv, "optimizer.lr=auto", *options)).message


def test_auto_is_a_rate_to_a_comparison_too(tiny_bert_dir: str, some_csv: Path) -> None:
    assert build.rate(composed(tiny_bert_dir, some_csv), "lora") == build.AUTO
