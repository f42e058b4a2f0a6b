"""Every example is run and prints what its docstring says.

Whole numbers (steps, rows, views, images) and words are the same everywhere and are compared exactly. Numbers with a
decimal point are losses and accuracies, which depend on the processor's roundings: accuracies may be off by 12 points,
losses by half.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NUMBER = re.compile(r"\d+\.\d+")
NEEDS = {"with_lightning": "lightning", "with_trainer": "transformers", "with_accelerate": "accelerate"}


def documented(path: Path) -> tuple[str, list[str]]:
    """An example's docstring, and the lines that it says it prints: the last block that is set in."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    after = text[text.index("Expected output") :].split("\n\n", 2)[1]
    return text, [line.removeprefix("    ") for line in after.splitlines()]


def agree(found: str, expected: str) -> bool:
    if NUMBER.sub("#", found) != NUMBER.sub("#", expected):
        return False
    for ours, theirs in zip(NUMBER.findall(found), NUMBER.findall(expected), strict=True):
        room = 12.0 if f"{theirs} %" in expected else max(0.5 * float(theirs), 0.05)
        if abs(float(ours) - float(theirs)) > room:
            return False
    return True


def launched(command: list[str]) -> list[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first example leaves its teacher and cache, which the others begin with."""
    return tmp_path_factory.mktemp("examples")


@pytest.fixture(scope="session")
def first(folder: Path) -> list[str]:
    return launched([sys.executable, "examples/plain_pytorch.py", str(folder)])


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_prints_what_it_says(path: Path, folder: Path, first: list[str]) -> None:
    if path.stem in NEEDS:
        pytest.importorskip(NEEDS[path.stem])
    command = [sys.executable, f"examples/{path.name}", str(folder)]
    if path.stem == "with_ddp":
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command = [*launcher, *command[1:]]
    if path.stem == "with_compile":
        command.append("aot_eager")  # traced and differentiated as by default, without a C++ compiler's minute
    found = first if path.stem == "plain_pytorch" else launched(command)
    _, expected = documented(path)
    pages = "\n".join(found)
    lines = [line for line in found if not line.startswith("{")]  # a Trainer's own
    assert len(lines) == len(expected), pages
    for ours, theirs in zip(lines, expected, strict=True):
        assert agree(ours, theirs), f"{ours!r}, expected {theirs!r}; all of it:\n{pages}"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_can_be_copied_alone(path: Path) -> None:
    """Short, no neighbor imported, a docstring with the command, and nothing private."""
    text, expected = documented(path)
    source = path.read_text()
    assert 30 <= len(source.splitlines()) <= 100
    assert f"examples/{path.name}" in text
    assert expected
    assert not re.search(r"\.stages\.(?!demo)", source), "what examples need is public"
    neighbors = {other.stem for other in EXAMPLES}
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert not imported & neighbors
    assert not neighbors & set(sys.stdlib_module_names), "a file beside a script hides a module of its name"


def test_the_comparison_can_fail() -> None:
    assert agree("60 steps, accuracy 85.8 % of 359 images", "60 steps, accuracy 80.0 % of 359 images")
    for other in ("61 steps, accuracy 85.8 % of 359 images", "60 steps, accuracy 65.0 % of 359 images", "60 steps"):
        assert not agree(other, "60 steps, accuracy 85.8 % of 359 images")
    assert not agree("loss 4.00", "loss 1.00")
