"""The notebook runs top to bottom, and what is committed is what it prints."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FILE = ROOT / "examples" / "walkthrough.ipynb"
NUMBER = re.compile(r"\d+(\.\d+)?")

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")


def printed(book: Any) -> list[list[str]]:
    """Per cell: the form of each line it prints, numbers aside, and the kinds of what it shows."""
    found = []
    for cell in book.cells:
        lines: list[str] = []
        for output in cell.get("outputs", ()):
            if output.output_type == "stream" and output.name == "stdout":
                lines += [NUMBER.sub("#", line).strip() for line in output.text.splitlines()]
            elif "image/png" in output.get("data", {}):
                lines.append("image/png")
            elif output.output_type == "error":
                lines.append(output.evalue)
        found.append(lines)
    return found


def accuracies(book: Any) -> list[float]:
    texts = [output.text for cell in book.cells for output in cell.get("outputs", ()) if output.output_type == "stream"]
    return [float(found) for text in texts for found in re.findall(r"(?:accuracy|plain|distilled) (\d+\.\d)%", text)]


def test_it_is_committed_as_it_ran() -> None:
    """From a fresh kernel, in order, without errors, small enough for a repository."""
    book = nbformat.read(FILE, 4)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(output.output_type != "error" for cell in code for output in cell.outputs)
    assert sum(lines.count("image/png") for lines in printed(book)) == 2
    assert FILE.stat().st_size < 120_000
    text = FILE.read_text()
    assert "\\u001b" not in text, "progress leaves no control codes in a notebook"
    assert not re.search(r"/(root|home|work|Users)/", text), "whose machine it ran on is nobody's business"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:jupyter_client.*")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:zmq.*")
def test_it_runs_top_to_bottom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "kernels")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    committed, book = nbformat.read(FILE, 4), nbformat.read(FILE, 4)
    client = nbclient.NotebookClient(
        book, timeout=600, startup_timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    )
    client.execute()
    assert printed(book) == printed(committed)
    ours, theirs = accuracies(book), accuracies(committed)
    assert len(ours) == len(theirs) == 5
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 15
