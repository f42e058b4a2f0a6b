"""The rules of the house: imports run downward, files stay readable, importing is cheap, the public names are these."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import feedfast
import feedfast_kernels

ROOT = Path(__file__).parents[1]
ROOMS = ("data", "models", "storage", "tasks", "methods", "stages", "report")
# Who may import whom, besides a room's own modules and COMMON.
ALLOWED = {
    "data": set(),
    "models": set(),
    "storage": {"kernels"},
    "tasks": set(),
    "methods": {"kernels", "tasks"},
    "report": set(),
    "integrations": {"stages", "data", "models", "recipe"},
    "stages": {"data", "models", "storage", "tasks", "methods", "report", "kernels", "recipe", "tap_entry", "words"},
    "cli": {"stages", "recipe", "api", "documents", "completion"},
    "completion": {"recipe", "models"},
    "api": {"stages", "recipe", "arguments", "documents"},
    "arguments": {"recipe", "words", "models"},
    "documents": {"stages", "models"},
    "__main__": {"cli"},
    "recipe": {"words", "tap_entry"},
    "tap_entry": set(),
    "words": set(),
    "errors": set(),
    "files": set(),
    "provenance": set(),
    "sealed": set(),
    "kernels": set(),
}
# errors: one family for all rooms. files: every room that writes, writes whole files, and one writer does it durably.
# sealed: indexes of data and of caches are stored alike.
# provenance: caches, runs and pages say in the same words how they were made.
COMMON = {"errors", "files", "provenance", "sealed"}
SOURCES = sorted((ROOT / "feedfast").rglob("*.py")) + sorted((ROOT / "kernels").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def room_of(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] == "feedfast_kernels":
        return "kernels"
    if parts[0] != "feedfast" or len(parts) == 1:
        return None
    return parts[1]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


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


def test_imports_run_downward() -> None:
    offenders = []
    for path in SOURCES:
        relative = path.relative_to(ROOT).with_suffix("").parts
        here = "kernels" if relative[0] == "kernels" else relative[1]
        if here == "__init__":
            continue
        for module in sorted(imports(path)):
            room = room_of(module)
            if room is None or room in (here, *COMMON) or module.endswith("__version__"):
                continue
            if room not in ALLOWED[here]:
                offenders.append(f"{name(path)} imports {module}: {here} may only use {sorted(ALLOWED[here])}")
    assert offenders == []


def test_one_module_imports_dali() -> None:
    """And says what is wrong where it cannot: it is the one dependency that an installation may be without."""
    users = [
        name(path)
        for path in SOURCES
        if any(module.startswith("nvidia") for module in imports(path)) or '("nvidia.' in path.read_text()
    ]
    assert users == ["feedfast/data/dali.py"]


def test_no_file_is_over_500_lines() -> None:
    """The concern that was never split is split."""
    lengths = {name(path): len(path.read_text().splitlines()) for path in SOURCES + TESTS}
    assert {file: lines for file, lines in lengths.items() if lines > 500} == {}


def test_a_module_opens_by_saying_what_it_is_and_why() -> None:
    """Briefly: each further why stands at its line."""
    openings = {path: ast.get_docstring(ast.parse(path.read_text())) or "" for path in SOURCES}
    assert [name(path) for path, text in openings.items() if path.name != "__init__.py" and len(text) <= 80] == []
    lines = {name(path): len(text.splitlines()) for path, text in openings.items()}
    assert {file: count for file, count in lines.items() if count > 18} == {}


def test_public_names() -> None:
    assert sorted(feedfast.__all__) == [
        "CacheDamageError",
        "CacheMismatchError",
        "FeedfastError",
        "Recipe",
        "RequestError",
        "__version__",
        "analyze_reconstruction",
        "cache",
        "chain",
        "compare",
        "compare_runs",
        "copy",
        "demo",
        "distiller",
        "doctor",
        "export",
        "factors",
        "fit",
        "inspect",
        "list_methods",
        "list_recipes",
        "load_recipe",
        "open_cache",
        "plan",
        "run_cache",
        "run_train",
        "sweep",
        "taps",
        "train",
        "verify",
    ]
    assert all(hasattr(feedfast, name) for name in feedfast.__all__)
    assert sorted(feedfast_kernels.__all__) == [
        "Codes",
        "Sampled",
        "Target",
        "as_float",
        "connector_partial_l2",
        "decode",
        "encode",
        "ensemble_kl",
        "gather_positions",
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
