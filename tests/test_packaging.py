"""The wheel: what is in it, and that it works outside the checkout."""

from __future__ import annotations

import importlib.util
import json
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest
from commands import python, reviews, tiny_run, write_csv

import lightning_ft

CHECKOUT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow


def run(*arguments: object, cwd: Path, **environment: str) -> str:
    """Run Python; returns what it printed."""
    answer = python(*arguments, cwd=cwd, **environment)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


def files(folder: str) -> set[str]:
    """The files of a folder of the checkout, relative to it."""
    paths = (path for path in (CHECKOUT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(CHECKOUT / folder).as_posix() for path in paths}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make wheel` builds it, but elsewhere."""
    folder = tmp_path_factory.mktemp("dist")
    here = ["--no-isolation"] if importlib.util.find_spec("hatchling") else []  # else from the package index
    run("-m", "build", "--wheel", *here, "--outdir", folder, CHECKOUT, cwd=folder)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the wheel's contents, as pip puts them."""
    folder = tmp_path_factory.mktemp("site")
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder, wheel, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def test_the_wheel_holds_the_package_its_data_and_the_configuration(names: set[str]) -> None:
    expected = {f"lightning_ft/{file}" for file in files("lightning_ft")}
    expected |= {f"lightning_ft/conf/{file}" for file in files("conf")}
    expected |= {f"hydra_plugins/{file}" for file in files("hydra_plugins")}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert "lightning_ft/py.typed" in names
    assert "lightning_ft/data/bundled/reviews_en/train.jsonl" in names
    assert "hydra_plugins/__init__.py" not in names, "it would hide other projects' plugins"


def test_beside_them_it_holds_its_description_and_nothing_else(names: set[str]) -> None:
    info = f"lightning_ft-{lightning_ft.__version__}.dist-info/"
    described = {info + file for file in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")}
    assert {name for name in names if not name.startswith(("lightning_ft/", "hydra_plugins/"))} == described


def test_the_metadata_agrees_with_the_package(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        info = f"lightning_ft-{lightning_ft.__version__}.dist-info/"
        metadata = Parser().parsestr(archive.read(info + "METADATA").decode())
        points = archive.read(info + "entry_points.txt").decode()
    assert metadata["Version"] == lightning_ft.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_payload().strip() == (CHECKOUT / "README.md").read_text(encoding="utf-8").strip()
    assert "lightning-ft = lightning_ft.apps.cli:main" in points


def test_the_installed_command_runs_outside_the_checkout(installed: Path, tmp_path: Path, tiny_bert_dir: str) -> None:
    script = installed / "bin" / "lightning-ft"
    outside = {"PYTHONPATH": str(installed)}  # before the checkout, which an editable install puts on the path
    where = "import lightning_ft, lightning_ft.apps.paths as p; print(lightning_ft.__file__, p.conf_dir())"
    package = installed / "lightning_ft"
    assert run("-c", where, cwd=tmp_path, **outside).split() == [str(package / "__init__.py"), str(package / "conf")]
    assert run(script, "--version", cwd=tmp_path, **outside) == f"lightning-ft {lightning_ft.__version__}\n"

    data = write_csv(tmp_path / "reviews.csv", reviews(36, seed=0))
    arguments = tiny_run(tiny_bert_dir, data, "data.batch_size=64", "hydra.run.dir=run")
    out = run(script, *arguments, cwd=tmp_path, **outside)
    assert "lora on" in out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["method"] == "lora"
    assert 0 <= results["after"]["test/accuracy"] <= 1


def test_the_installed_groups_are_on_the_search_path_of_every_hydra_app(installed: Path, tmp_path: Path) -> None:
    find = (
        "from hydra.core.plugins import Plugins; from hydra.plugins.search_path_plugin import SearchPathPlugin;"
        "import inspect; print(*(inspect.getfile(p) for p in Plugins.instance().discover(SearchPathPlugin)))"
    )
    found = run("-c", find, cwd=tmp_path, PYTHONPATH=str(installed)).split()
    assert str(installed / "hydra_plugins" / "lightning_ft" / "search_path.py") in found
