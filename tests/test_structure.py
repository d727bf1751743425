"""Who may import whom, and the public face."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from commands import python

import lightning_ft
from lightning_ft.apps.paths import conf_dir

PACKAGE = Path(lightning_ft.__file__).parent
CHECKOUT = PACKAGE.parent

ROOMS: dict[str, set[str] | None] = {
    "errors": set(),
    "ops": set(),
    "injection": set(),
    "reporting": set(),
    "quantization": {"injection", "ops"},
    "files": {"injection"},
    "general": set(),
    "callbacks": {"injection", "ops", "files", "quantization", "reporting", "general"},
    "methods": {"injection", "ops", "quantization", "callbacks.finetuning", "reporting"},
    "tasks": {"ops", "reporting", "optim", "injection", "quantization", "general"},
    "optim": {"injection", "reporting", "tasks.pretrained"},
    "data": {"reporting", "optim", "tasks.pretrained"},
    "adapters": {"methods", "files", "injection", "callbacks", "quantization"},
    "bank": {"adapters", "injection"},
    "estimate": {"injection", "ops"},
    "apps": None,
}
"""What of ours a room may import beside itself, everything below a name included; None: all. A method is a room."""

TORCH_ONLY = ("errors", "ops", "injection")
ONLY_IN = {"hydra": ("apps",), "omegaconf": ("apps",), "wandb": ("apps.loggers",)}
"""Modules that only these rooms import."""

NEVER_IN = {
    "files": ("lightning", "pytorch_lightning", "transformers", "datasets"),
    "quantization": ("lightning", "pytorch_lightning", "datasets"),
    "general": ("lightning", "pytorch_lightning", "datasets"),
    "methods": ("datasets", "torchmetrics", "rich", "matplotlib"),
    "callbacks": ("datasets", "torchmetrics", "rich"),
}
"""Modules that these rooms never import."""


def imports(source: str, package: str) -> Iterator[tuple[str, bool]]:
    """The absolute names that a module of ``package`` imports, and whether for type checkers alone."""

    def visit(node: ast.AST, typing: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, typing) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = f"{above}.{node.module or ''}".strip(".")
            yield from ((f"{module}.{alias.name}", typing) for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.body:
                yield from visit(child, True)
            for child in node.orelse:
                yield from visit(child, typing)
        else:
            for child in ast.iter_child_nodes(node):
                yield from visit(child, typing)

    yield from visit(ast.parse(source), False)


def imports_of(file: Path) -> list[tuple[str, bool]]:
    return list(imports(file.read_text(encoding="utf-8"), ".".join(file.parent.relative_to(CHECKOUT).parts)))


def room_of(name: str) -> str:
    """The module's name behind the package's: ``lightning_ft/files/peft.py`` is in ``files.peft``."""
    return name.removeprefix("lightning_ft").removeprefix(".")


def inside(name: str, rooms: Iterable[str]) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}


def test_the_readme_has_the_same_table() -> None:
    table = (CHECKOUT / "README.md").read_text(encoding="utf-8").partition("| room | may import")[2].split("\n\n")[0]
    rows = [[cell.strip() for cell in row.split("|")[1:3]] for row in table.splitlines()[2:]]
    told = {"–": set(), "all": None}
    assert {room: told.get(may, {*may.split(", ")}) for room, may in rows} == ROOMS


def test_every_module_is_in_a_room_of_the_table() -> None:
    assert {module.split(".")[0] for module in MODULES} <= set(ROOMS)


def test_a_room_imports_only_what_the_table_allows_it() -> None:
    for module, file in MODULES.items():
        room = module.split(".")[0]
        own, allowed = module if room == "methods" else room, ROOMS[room]  # a method doesn't know another
        ours = [name for name, _ in imports_of(file) if name.split(".")[0] == "lightning_ft"]
        for name in ours if allowed is not None else ():
            assert inside(room_of(name), {own, *allowed, "errors", "__version__"}), f"{module} imports {name}"


def test_a_library_is_known_only_where_it_belongs() -> None:
    for module, (name, typing) in ((m, found) for m, file in MODULES.items() for found in imports_of(file)):
        room, library = module.split(".")[0], name.split(".")[0]
        if typing or library == "lightning_ft":
            continue
        assert inside(module, ONLY_IN.get(library, [module])), f"{module} imports {name}"
        assert library not in NEVER_IN.get(room, ()), f"{module} imports {name}"
        if room in TORCH_ONLY:
            comes_with_torch = {"triton"} if room == "ops" else set()
            assert library in {"torch", *comes_with_torch, *sys.stdlib_module_names}, f"{module} imports {name}"


def test_the_plugin_knows_hydra_and_where_the_configuration_is() -> None:
    for file in (CHECKOUT / "hydra_plugins").rglob("*.py"):
        for name, _ in imports_of(file):
            assert inside(name, ("hydra", "lightning_ft.apps.paths")), f"{file.name} imports {name}"


def test_every_way_of_importing_is_seen() -> None:
    source = (
        "import a.b, c as d\nfrom e import f as g, h\nfrom . import i\nfrom ..j import k\n"
        "if TYPE_CHECKING:\n    import l\nelse:\n    import m\n"
        "def f():\n    try:\n        from n import o\n    except ImportError:\n        import p\n"
    )
    assert list(imports(source, "ours.methods")) == [
        ("a.b", False), ("c", False), ("e.f", False), ("e.h", False), ("ours.methods.i", False),
        ("ours.j.k", False), ("l", True), ("m", False), ("n.o", False), ("p", False),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------- the configuration


def test_each_group_names_its_room_and_only_logger_names_wandb() -> None:
    rooms = {"method": "lightning_ft.", "task": "lightning_ft.", "data": "lightning_ft.", "scheduler": "lightning_ft."}
    for file in conf_dir().rglob("*.yaml"):
        group = file.parent.name
        text = file.read_text(encoding="utf-8")
        assert group == "logger" or "lightning_ft.apps.loggers" not in text, file
        for target in re.findall(r"_target_: (\S+)", text):
            assert target.startswith(rooms.get(group, "")), file


# -------------------------------------------------------------------------------------- the public face


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = ("torch", "lightning", "transformers", "datasets", "hydra", "wandb", "matplotlib", "bitsandbytes")
    code = f"import sys, lightning_ft; dir(lightning_ft); print(*set(sys.modules) & set({heavy}))"
    answer = python("-c", code)
    assert (answer.returncode, answer.stdout.split()) == (0, []), answer.stderr


def test_every_public_name_resolves_and_is_documented() -> None:
    assert set(lightning_ft.__all__) <= set(dir(lightning_ft))
    for name in lightning_ft.__all__:
        value = getattr(lightning_ft, name)
        assert (value.__doc__ or "").strip(), name
        inherited = {base.__doc__ for base in getattr(value, "__mro__", ())[1:]}
        assert value.__doc__ not in inherited, f"{name} has an inherited docstring"


def test_the_public_names_are_told_to_type_checkers_too() -> None:
    told = {name.split(".")[-1]: name for name, typing in imports_of(PACKAGE / "__init__.py") if typing and "." in name}
    told = {name: path for name, path in told.items() if path.startswith("lightning_ft.")}
    assert set(told) == set(lightning_ft.__all__) == set(lightning_ft._HOMES)
    assert {name: path.rpartition(".")[0] for name, path in told.items()} == lightning_ft._HOMES


def test_an_unknown_name_is_answered_with_those_that_there_are() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Lora'") as error:
        lightning_ft.Lora  # noqa: B018
    assert all(name in str(error.value) for name in lightning_ft.__all__)
