"""Weights & Biases, offline and for real: what a run writes is read back from its file."""

from __future__ import annotations

import csv
import json
import logging
import struct
from pathlib import Path
from typing import Any

import pytest
from commands import Answer, call, reviews, tiny_run, write_csv

from lightning_ft.apps.loggers import _logged_in, wandb

PLACES = ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR")
DECISIONS = ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE")
EPOCHS, JOBS = 2, ("lora", "head")


def log_out(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """As on a machine where nobody has ever used W&B."""
    for name in DECISIONS:
        patch.delenv(name, raising=False)
    for name in PLACES:
        patch.setenv(name, str(folder))
    patch.setenv("NETRC", str(folder / "netrc"))
    patch.setenv("WANDB_SILENT", "true")
    patch.setenv("WANDB_CONSOLE", "off")


@pytest.fixture
def logged_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Returns the netrc file, which isn't there."""
    log_out(monkeypatch, tmp_path)
    return tmp_path / "netrc"


# ------------------------------------------------------------------------------------------ a real run


@pytest.fixture(scope="module")
def multirun(tiny_bert_dir: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Answer]:
    """The folder of two runs made by one command, and what that said."""
    import wandb as client

    home = tmp_path_factory.mktemp("wandb")
    data = write_csv(home / "reviews.csv", reviews(60, seed=0))
    more = [f"method={','.join(JOBS)}", "logger=wandb", f"trainer.max_epochs={EPOCHS}", "hydra.sweep.dir=runs"]
    train, *settings = tiny_run(tiny_bert_dir, data, *more)
    with pytest.MonkeyPatch.context() as patch:
        log_out(patch, home / "elsewhere")
        answer = call(train, "-m", *settings, cwd=home)
        client.finish()
        client.teardown()
    assert answer.status == 0, answer.err
    return home / "runs", answer


@pytest.fixture
def job(multirun: tuple[Path, Answer]) -> Path:
    """The folder of the last run, which could have gone on with what an earlier one left behind."""
    return multirun[0] / str(len(JOBS) - 1)


def records(folder: Path) -> list[Any]:
    """The records of the one run logged below ``folder``.

    They're protocol buffers in LevelDB's log format: blocks of 32 KiB, in each pieces of checksum, length and
    kind (whole, first, middle, last).
    """
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, block, header = file.read_bytes(), 32 * 1024, struct.Struct("<IHB")
    found, message, at = [], b"", 7  # an identification comes first
    while at + header.size <= len(data):
        if block - at % block < header.size:
            at += block - at % block
            continue
        _, length, kind = header.unpack_from(data, at)
        message += data[at + header.size : at + header.size + length]
        at += header.size + length
        if kind in (1, 4):
            found.append(Record.FromString(message))
            message = b""
    return found


def values(items: Any) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def history(folder: Path) -> list[dict[str, Any]]:
    """Each logged step: names with values; those of an image or a table are ``name/field``."""
    return [values(record.history.item) for record in records(folder) if record.HasField("history")]


def logged(folder: Path, name: str) -> list[Any]:
    return [row[name] for row in history(folder) if name in row]


def test_it_says_that_it_is_offline_and_how_to_change_that(multirun: tuple[Path, Answer]) -> None:
    said = multirun[1].err
    assert "not logged in, so this run is kept offline" in said
    assert "wandb login" in said
    assert "wandb sync" in said


def test_each_job_of_a_multirun_is_a_finished_run_of_its_own(multirun: tuple[Path, Answer]) -> None:
    starts = [[r.run for r in records(multirun[0] / str(i)) if r.HasField("run")] for i in range(len(JOBS))]
    assert len({run.run_id for (run,) in starts}) == len(JOBS)
    assert {run.project for (run,) in starts} == {"lightning_ft"}
    for i in range(len(JOBS)):
        assert [r.exit.exit_code for r in records(multirun[0] / str(i)) if r.HasField("exit")] == [0]


def test_the_metrics_are_those_of_the_csv_logger(job: Path) -> None:
    with (job / "metrics" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = set(rows[0]) - {"epoch", "step"}
    assert names >= {
        "train/loss", "val/loss", "val/accuracy", "val/f1", "test/accuracy", "test/f1", "lr-AdamW/all",
        "cost/trained_share", "cost/samples_per_second", "cost/peak_memory_mib",
    }  # fmt: skip
    for name in names:
        assert logged(job, name) == pytest.approx([float(row[name]) for row in rows if row[name]]), name
    assert len(logged(job, "val/f1")) == EPOCHS


def test_the_confusion_matrix_is_an_image(job: Path) -> None:
    assert logged(job, "test/confusion_matrix/_type") == ["images/separated"]
    ((name,),) = logged(job, "test/confusion_matrix/filenames")
    (image,) = job.glob(f"wandb/offline-run-*/files/{name}")
    assert image.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_scores_by_class_are_a_table(job: Path) -> None:
    assert logged(job, "test/per_class/_type") == ["table-file"]
    (path,) = logged(job, "test/per_class/path")
    (file,) = job.glob(f"wandb/offline-run-*/files/{path}")
    table = json.loads(file.read_text(encoding="utf-8"))
    with (job / "metrics" / "test_per_class.csv").open(newline="", encoding="utf-8") as same:
        header, *rows = csv.reader(same)
    assert table["columns"] == header
    assert [[str(value) for value in row] for row in table["data"]] == rows


def test_the_config_is_logged_by_its_keys(job: Path) -> None:
    config: dict[str, Any] = {}
    for record in records(job):
        if record.HasField("config"):
            config |= values(record.config.update)
    assert config["method"]["_target_"].startswith("lightning_ft.")
    assert config["seed"] == 0
    assert config["trainer"]["max_epochs"] == EPOCHS
    assert config["optimizer"]["lr"] == max(logged(job, "lr-AdamW/all"))
    assert config["task"]["labels"] == ["bad", "good", "mixed"]


def test_the_adapter_is_an_artifact(job: Path) -> None:
    artifacts = [record.artifact for record in records(job) if record.HasField("artifact")]
    (adapter,) = [artifact for artifact in artifacts if artifact.type == "adapter"]
    assert adapter.name == f"adapter-{job.name}"
    assert {file.path: file.size for file in adapter.manifest.contents} == {
        file.name: file.stat().st_size for file in (job / "adapter").iterdir()
    }


# ------------------------------------------------------------------------------- online or not


@pytest.mark.parametrize(
    ("host", "base_url"),
    [
        ("api.wandb.ai", None),
        ("wandb.example.org", "https://wandb.example.org"),
        ("localhost:8080", "http://localhost:8080"),
    ],
)
def test_logged_in_is_who_has_the_host_in_netrc(
    host: str, base_url: str | None, logged_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if base_url is not None:
        monkeypatch.setenv("WANDB_BASE_URL", base_url)
    assert not _logged_in()
    logged_out.write_text("machine elsewhere.org\n  login user\n  password 0123456789\n")
    assert not _logged_in()
    logged_out.write_text(f"machine {host}\n  login user\n  password {'0' * 40}\n")
    assert _logged_in()
    logged_out.write_text("this is no netrc")
    assert not _logged_in()


def test_logged_in_is_who_has_a_key(logged_out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert _logged_in()
    monkeypatch.setenv("WANDB_API_KEY", "")
    assert not _logged_in()


@pytest.mark.parametrize(
    ("environment", "offline"),
    [
        ({}, True),
        ({"WANDB_API_KEY": "0" * 40}, False),
        ({"WANDB_MODE": "online"}, False),
        ({"WANDB_MODE": "disabled"}, False),
        ({"WANDB_API_KEY": "0" * 40, "WANDB_MODE": "offline"}, False),
    ],
    ids=str,
)
def test_wandb_mode_decides_and_else_the_login(
    environment: dict[str, str],
    offline: bool,
    logged_out: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with caplog.at_level(logging.INFO):
        logger = wandb(save_dir=str(tmp_path), project="x")
    assert logger._offline is offline  # else the client asks WANDB_MODE itself
    assert ("kept offline" in caplog.text) is offline
    assert logger.name == "x"
    assert not (tmp_path / "wandb").exists(), "nothing is written before something is logged"
