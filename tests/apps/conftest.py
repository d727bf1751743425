"""What the tests of the commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from commands import choices, reviews, succeed, tiny_run, write_csv


@pytest.fixture(scope="session")
def run_of(tiny_bert_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a finished run of a method, in which what it trained matters; each is made once."""
    home = tmp_path_factory.mktemp("home")
    data = write_csv(home / "reviews.csv", reviews(120, seed=0))

    def run(method: str) -> Path:
        folder = home / "runs" / method
        if not folder.exists():
            fast = [f"method={method}", "optimizer.lr=0.02", "trainer.max_epochs=3", "test_before=true"]
            succeed(*tiny_run(tiny_bert_dir, data, *fast, f"hydra.run.dir={folder}"), cwd=home)
        return folder

    return run


@pytest.fixture(params=choices("method"))
def each_run(request: pytest.FixtureRequest, run_of: Callable[[str], Path]) -> Path:
    """A finished run of each method."""
    return run_of(request.param)


@pytest.fixture
def lora_run(run_of: Callable[[str], Path]) -> Path:
    return run_of("lora")
