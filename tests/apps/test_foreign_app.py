"""A Hydra app that knows nothing of lightning_ft, but has it installed: our groups are on its search path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import python

APP = """
import json
import hydra
from hydra.utils import instantiate

@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def main(cfg):
    # as lightning-hydra-template makes its callbacks and its Trainer
    callbacks = [instantiate(callback) for callback in cfg.callbacks.values()]
    trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=False)
    ours = [c for c in trainer.callbacks if type(c).__module__.startswith("lightning_ft.")]
    assert ours == callbacks
    print(json.dumps([ours[0].record(), type(trainer).__name__]))

main()
"""

CONFIG = """
defaults:
  - _self_
  - method@callbacks.fine_tuning: lora

callbacks: {}

trainer:
  _target_: lightning.Trainer
  accelerator: cpu
  enable_progress_bar: false
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """The folder of the app, with its program and its config."""
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").write_text(CONFIG)
    (tmp_path / "train.py").write_text(APP)
    return tmp_path


def run(app: Path, *arguments: str) -> str:
    answer = python("train.py", *arguments, cwd=app)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def composed(app: Path, *arguments: str) -> dict[str, Any]:
    return yaml.safe_load(run(app, *arguments, "--cfg", "job"))


@pytest.mark.slow
def test_its_defaults_list_takes_a_method_of_ours(app: Path) -> None:
    record, trainer = json.loads(run(app, "callbacks.fine_tuning.r=3").splitlines()[-1])
    assert trainer == "Trainer"
    assert record["method"] == "LoRA"
    assert record["arguments"]["r"] == 3
    assert record["arguments"]["target_modules"] == "all-linear"


def test_its_command_line_takes_a_method_of_ours_and_nothing_else_gets_in(app: Path) -> None:
    (app / "conf" / "config.yaml").write_text(CONFIG.replace("  - method@callbacks.fine_tuning: lora\n", ""))
    config = composed(app, "+method@callbacks.fine_tuning=head")
    assert set(config) == {"callbacks", "trainer"}
    assert config["callbacks"]["fine_tuning"]["_target_"] == "lightning_ft.HeadOnly"


def test_its_own_group_comes_first(app: Path) -> None:
    (app / "conf" / "method").mkdir()
    (app / "conf" / "method" / "lora.yaml").write_text("_target_: own.Method\nrank: 1\n")
    config = composed(app)
    assert config["callbacks"]["fine_tuning"] == {"_target_": "own.Method", "rank": 1}
    other = composed(app, "method@callbacks.fine_tuning=head")
    assert other["callbacks"]["fine_tuning"]["_target_"] == "lightning_ft.HeadOnly", "the rest of ours is still there"


def test_our_primary_configs_are_behind_its_own(app: Path) -> None:
    (app / "conf" / "train.yaml").write_text("mine: true\n")
    assert composed(app, "--config-name=train") == {"mine": True}
