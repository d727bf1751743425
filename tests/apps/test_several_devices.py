"""A run on several devices, and sweeps by other launchers: one folder a run, written once."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
from commands import call, predicted, python, reviews, succeed, tiny_run, write_csv
from hydra import compose, initialize_config_dir

from lightning_ft.apps import build, ranks, train
from lightning_ft.apps.paths import conf_dir


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "re, 'views'.csv", reviews(60, seed=0))


@pytest.mark.slow
def test_two_processes_of_a_sweeps_job_make_one_run(tiny_bert_dir: str, data: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="the launchers extra isn't installed")
    command, *overrides = tiny_run(tiny_bert_dir, data, "trainer=ddp", "trainer.devices=2", "trainer.max_epochs=2")
    sweep = ["-m", "hydra/launcher=submitit_local", "hydra.sweep.dir=sweep", "method.r=2"]
    answer = python("-m", "lightning_ft.apps.cli", command, *sweep, *overrides, TQDM_DISABLE="1")
    said = "".join(path.read_text() for path in Path("sweep/.submitit").glob("*/*_log.*"))
    assert answer.returncode == 0, answer.stderr + said
    assert "Starting with 2 processes" in said
    assert said.count("The run lies in sweep/0") == said.count("parameters trained") == 1
    assert [path.parent for path in Path().rglob("config.yaml")] == [Path("sweep/0")]
    for message in ("rows; labels", "LoRA: 13 modules adapted"):
        assert Path("sweep/0/train.log").read_text().count(message) == 1, message
    results = json.loads(Path("sweep/0/results.json").read_text())
    assert results["steps"] == 2 * 2  # 42 rows, by 16 in each process
    assert results["after"]["test/accuracy"] >= 0
    assert predicted(Path("sweep/0")).isfinite().all()


def test_jobs_of_joblib_are_runs_that_know_nothing_of_each_others_processes(
    tiny_bert_dir: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="the launchers extra isn't installed")
    begin, told = train._begin, []

    def listen(*arguments: Any) -> None:
        told.append([os.environ.get(key) for key in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")])
        begin(*arguments)

    monkeypatch.setattr(train, "_begin", listen)
    one_process = ["trainer=ddp", "trainer.devices=1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=1"]
    command, *overrides = tiny_run(tiny_bert_dir, data, "seed=0,1", *one_process)
    succeed(command, "-m", *overrides, "hydra.sweep.dir=sweep")
    assert told == [[None, None, None]] * 2
    assert [json.loads(Path(f"sweep/{i}/results.json").read_text())["steps"] for i in (0, 1)] == [3, 3]


def test_processes_started_from_outside_need_a_folder_and_a_trainer_for_them(
    tiny_bert_dir: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "name one for all, hydra.run.dir=runs/NAME" in call(*tiny_run(tiny_bert_dir, data)).message
    asked = tiny_run(tiny_bert_dir, data, "hydra.run.dir=mine")
    assert "2 processes were started, and the Trainer is one for 1: give trainer=ddp" in call(*asked).message
    assert "find it with trainer.devices=1 first" in call(*asked, "optimizer.lr=auto").message
    assert not Path("mine/config.yaml").exists()


@pytest.mark.parametrize(
    ("said", "first"),
    [({}, True), ({"NODE_RANK": "0"}, True), ({"NODE_RANK": "1"}, False)],
    ids=str,
)
def test_one_process_of_all_machines_is_the_first(
    said: dict[str, str], first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in said.items():
        monkeypatch.setenv(key, value)
    assert ranks.is_first() == first


def test_without_deepspeed_it_is_said_how_to_get_it(tiny_bert_dir: str, data: Path) -> None:
    if importlib.util.find_spec("deepspeed"):
        pytest.skip("deepspeed is installed")
    for choice in ("deepspeed_zero2", "deepspeed_zero3"):
        message = call(*tiny_run(tiny_bert_dir, data, f"trainer={choice}", "hydra.run.dir=d")).message
        assert "pip install" in message
        assert "deepspeed" in message


@pytest.mark.parametrize(("devices", "machines", "processes"), [("2", "1", 2), ("4", "3", 12), ("[0,2]", "2", 4)])
def test_fsdp_shards_over_all_processes(devices: str, machines: str, processes: int) -> None:
    build.register_resolvers()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("train", ["trainer=fsdp", f"trainer.devices={devices}", f"trainer.num_nodes={machines}"])
    strategy = build.all_devices(config)["strategy"]
    assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == (processes, 1)
