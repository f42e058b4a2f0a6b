"""Every example is run and prints what its docstring says.

Whole numbers (steps, rows, views, images) and words are the same everywhere and are compared exactly. Numbers with a
decimal point are losses and accuracies, which depend on the processor's roundings: accuracies may be off by 12 points,
losses by half.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NUMBER = re.compile(r"\d+\.\d+")
NEEDS = {
    "with_lightning": "lightning", "with_trainer": "transformers", "with_accelerate": "accelerate", "with_timm": "timm",
}  # fmt: skip


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
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    # the examples' own folder, where they are given none
    return [re.sub(r"'[^']*/digits.zarr'", "'runs/examples/digits.zarr'", line) for line in done.stdout.splitlines()]


def command_of(path: Path, folder: Path) -> list[str]:
    if path.stem == "with_ddp":
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        return [*launcher, f"examples/{path.name}", str(folder)]
    # traced and differentiated as by default, without a C++ compiler's minute
    backend = ["aot_eager"] if path.stem == "with_compile" else []
    return [sys.executable, f"examples/{path.name}", str(folder), *backend]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_examples_print_what_they_say(tmp_path: Path) -> None:
    """One after the other in one folder, as a reader does: the first one's teacher and cache serve the others."""
    assert EXAMPLES[0].stem == "plain_pytorch"
    wrong = []
    for path in EXAMPLES:
        if importlib.util.find_spec(NEEDS.get(path.stem, "torch")) is None:
            continue
        found = [line for line in launched(command_of(path, tmp_path)) if not line.startswith("{")]  # a Trainer's own
        _, expected = documented(path)
        if len(found) != len(expected) or not all(map(agree, found, expected)):
            wrong.append("\n".join([path.name, *found, "expected:", *expected]))
    assert not wrong, "\n\n".join(wrong)


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


def test_snippets_of_the_page_are_lines_of_examples() -> None:
    sources = [path.read_text() for path in EXAMPLES]
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "loops.md").read_text(), re.DOTALL)
    assert len(blocks) > 7
    assert [block for block in blocks if not any(block in source for source in sources)] == []


def test_the_comparison_can_fail() -> None:
    assert agree("60 steps, accuracy 85.8 % of 359 images", "60 steps, accuracy 80.0 % of 359 images")
    for other in ("61 steps, accuracy 85.8 % of 359 images", "60 steps, accuracy 65.0 % of 359 images", "60 steps"):
        assert not agree(other, "60 steps, accuracy 85.8 % of 359 images")
    assert not agree("loss 4.00", "loss 1.00")
