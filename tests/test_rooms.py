"""A room imports only from rooms above it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from cli import ROOT

ROOMS = (
    *("memory", "errors", "locks"),
    *("tensors", "offload", "compiled", "decoder", "surgery", "taps", "record", "runs"),
    *("text", "models", "windows", "data"),
    *("pruning", "distillation", "evaluation", "report", "workflows", "cli"),
    "compare",  # a door: `python -m come_pl.compare`
)
PACKAGE = ROOT / "come_pl"


def room(module: str) -> str:
    return module.split(".")[1]


def imports(file: Path) -> set[str]:
    """Modules of this package that a file imports, also inside functions and for type checking."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("come_pl.")}


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_upwards(file: Path) -> None:
    if file == PACKAGE / "__init__.py" or file.name == "__main__.py":  # the house itself, and doors into it
        return
    own = file.relative_to(PACKAGE).with_suffix("").parts[0]
    for name in imports(file):
        assert ROOMS.index(room(name)) <= ROOMS.index(own), f"{own} imports {name}, which is below it"


def test_pruning_and_distillation_do_not_know_each_other() -> None:
    for own, other in (("pruning", "distillation"), ("distillation", "pruning")):
        for file in (PACKAGE / own).rglob("*.py"):
            assert not any(room(name) == other for name in imports(file)), file


def test_files_are_short() -> None:
    long = {f.name: n for f in PACKAGE.rglob("*.py") if (n := len(f.read_text(encoding="utf-8").splitlines())) > 420}
    assert not long
