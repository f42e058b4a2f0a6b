"""The rules of the house: imports run downward, files stay readable, importing is cheap, the public names are these."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import feedfast
import feedfast_kernels

ROOT = Path(__file__).parents[1]
ROOMS = ("data", "models", "cache", "tasks", "methods", "stages", "report")
# Who may import whom, besides a room's own modules and COMMON.
ALLOWED = {
    "data": set(),
    "models": set(),
    "cache": {"kernels"},
    "tasks": set(),
    "methods": {"kernels", "tasks"},
    "report": set(),
    "stages": {"data", "models", "cache", "tasks", "methods", "report", "kernels", "recipe"},
    "cli": {"stages", "recipe"},
    "__main__": {"cli"},
    "recipe": set(),
    "errors": set(),
    "files": set(),
    "kernels": set(),
}
# errors: one family for all rooms. files: every room that writes, writes whole files, and one writer does it durably.
COMMON = {"errors", "files"}
SOURCES = sorted((ROOT / "feedfast").rglob("*.py")) + sorted((ROOT / "kernels").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def room_of(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] == "feedfast_kernels":
        return "kernels"
    if parts[0] != "feedfast" or len(parts) == 1:
        return None
    return parts[1]


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if node.module == "feedfast" else {node.module or ""}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downward(path: Path) -> None:
    relative = path.relative_to(ROOT).with_suffix("").parts
    here = "kernels" if relative[0] == "kernels" else (relative[1] if len(relative) > 1 else "")
    if here in ("__init__", ""):
        return
    for module in imports(path):
        room = room_of(module)
        if room is None or room in (here, *COMMON) or module.endswith("__version__"):
            continue
        assert room in ALLOWED[here], (
            f"{path.relative_to(ROOT)} imports {module}: {here} may only use {sorted(ALLOWED[here])}"
        )


def test_only_the_loader_imports_dali() -> None:
    users = [
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        if any(name.startswith("nvidia") for name in imports(path))
    ]
    assert users == ["feedfast/data/loader.py"]


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_readable(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= 500, f"expected at most 500 lines, found {lines}: split the concern that was never split"
    if path in SOURCES and path.name != "__init__.py":
        assert len(ast.get_docstring(ast.parse(path.read_text())) or "") > 80, (
            "a module opens by saying what it is and why"
        )


def test_public_names() -> None:
    assert sorted(feedfast.__all__) == [
        "CacheDamageError",
        "CacheMismatchError",
        "FeedfastError",
        "Recipe",
        "RequestError",
        "__version__",
        "load_recipe",
        "open_cache",
        "run_cache",
        "run_train",
    ]
    assert all(hasattr(feedfast, name) for name in feedfast.__all__)
    assert sorted(feedfast_kernels.__all__) == [
        "Codes",
        "Target",
        "as_float",
        "connector_partial_l2",
        "decode",
        "encode",
        "ensemble_kl",
        "locality",
        "locality_weights",
        "normalized_l1",
        "partial_l2",
    ]


def test_import_is_cheap() -> None:
    code = (
        "import sys, json, feedfast\n"
        "heavy = ('torch', 'nvidia.dali', 'triton', 'zarr', 'matplotlib', 'sklearn')\n"
        "print(json.dumps([name for name in heavy if name in sys.modules]))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(out.stdout) == []
