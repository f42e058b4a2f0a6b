"""Progress where people look: a terminal, a pipe, a dumb terminal, a notebook; of several ranks the first shows it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import pytest

JOB = """
import logging, sys, time
from feedfast.cli import configure_logging
from feedfast.stages import progress
configure_logging()
progress.LINE_SECONDS = 0.1
with progress.Meter("train", 1000) as meter:
    for number in range(50):
        meter.advance(20, "loss 0.123, 1.5 MiB written " * 4)
        time.sleep(0.02)
        if number == 25:
            logging.getLogger("feedfast.x").info("a line between")
"""


def on_terminal(**variables: str) -> str:
    """What a terminal of 24 x 80 gets."""
    controller, terminal = os.openpty()
    env = {**os.environ, "TERM": "xterm-256color", **variables}
    with subprocess.Popen([sys.executable, "-c", JOB], stdout=terminal, stderr=terminal, env=env) as job:
        os.close(terminal)
        said = b""
        while True:
            try:
                part = os.read(controller, 1 << 16)
            except OSError:  # how Linux says that nobody writes any more
                break
            if not part:
                break
            said += part
    os.close(controller)
    assert job.returncode == 0, said
    return said.decode()


def drawn(said: str, width: int) -> list[str]:
    """The lines that stay on a terminal: of what is written over, the last; no other motion may be asked for."""
    text = re.sub(r"\x1b\[[0-9;]*m|\x1b\[\?25[lh]", "", said)
    lines = []
    for line in text.split("\r\n"):
        *over, last = line.split("\r\x1b[2K")
        assert all(len(shown) <= width for shown in (*over, last)), "it would wrap, and leave a line behind"
        lines.append(last.rstrip())
    assert "\x1b" not in "".join(lines)
    return [line for line in lines if line]


@pytest.mark.parametrize("width", [40, 100])
def test_a_terminal_has_one_live_line(width: int) -> None:
    said = on_terminal(COLUMNS=str(width))
    assert said.count("\x1b[2K") > 5, "it is drawn again and again"
    above, line = drawn(said, width)
    assert above == "a line between"
    assert re.match(r"train .* 1000/1000 0:00:00", line)
    assert re.search(r"/s loss 0\.123" if width == 100 else "…", line)


def test_no_color() -> None:
    """No colors; drawing again is no color."""
    plain = on_terminal(NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*m", plain.replace("\x1b[0m", ""))
    assert re.search(r"\x1b\[[0-9;]+m", on_terminal())


def in_pipe(**variables: str) -> str:
    env = {**os.environ, **variables}
    return subprocess.run([sys.executable, "-c", JOB], capture_output=True, text=True, env=env, check=True).stderr


@pytest.mark.parametrize(
    "variables", [{}, {"FORCE_COLOR": "1", "TERM": "xterm"}], ids=["pipe", "pipe that wants color"]
)
def test_a_pipe_gets_lines(variables: dict[str, str]) -> None:
    """Without control codes, whatever a CI sets."""
    said = in_pipe(**variables)
    assert "\x1b" not in said
    assert "\r" not in said
    lines = [line for line in said.splitlines() if "train: " in line]
    assert 2 <= len(lines) <= 20
    assert all(re.search(r"train: [\d,]+/1,000 images, [\d,]+/s, \d+ s left loss", line) for line in lines)
    assert said.count("a line between") == 1


def test_a_dumb_terminal_is_no_terminal() -> None:
    said = on_terminal(TERM="dumb")
    assert "\x1b" not in said
    assert len(re.findall("train: ", said)) > 1


def test_of_several_ranks_the_first_shows_it() -> None:
    """Also where a script has configured logging by itself."""
    script = JOB.replace("configure_logging()\n", "logging.basicConfig(level=logging.INFO)\n")
    said = {}
    for rank in "01":
        env = {**os.environ, "RANK": rank, "WORLD_SIZE": "2"}
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, check=True)
        said[rank] = done.stderr
    assert "train: " in said["0"]
    assert "train: " not in said["1"]
    assert "a line between" in said["1"]


def test_lines_of_a_long_job_come_less_often(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from feedfast.stages.progress import Meter

    caplog.set_level("INFO", logger="feedfast")
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    at = []
    with Meter("cache", 10 * 3600) as meter:
        for second in range(1, 4 * 3600):
            now[0] = float(second)
            seen = len(caplog.records)
            meter.advance(1)
            at += [second] if len(caplog.records) > seen else []
    assert at[:3] == [10, 20, 30]
    assert at[-1] - at[-2] == 60
    assert len(at) < 300
    assert caplog.records[-1].getMessage().startswith("cache: 14,3")
    assert "6.0 h left" in caplog.records[-1].getMessage()


KERNEL = """
import logging, time
{}
from feedfast.stages.progress import Meter
with Meter("train", 1000) as meter:
    for _ in range(50):
        meter.advance(20, "loss 0.123")
        time.sleep(0.03)
logging.getLogger("feedfast.x").info("said")
"""


@pytest.mark.slow
def test_a_notebook_has_one_text_that_is_replaced() -> None:
    """Nothing else in the cell, with logging or without; nothing at all where the logger is told to say less."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    settings = {
        "": "",
        "logs": "logging.basicConfig(level=logging.INFO, format='%(message)s')",
        "quiet": "logging.getLogger('feedfast').setLevel(logging.WARNING)",
    }
    cells = [nbformat.v4.new_code_cell(KERNEL.format(line)) for line in settings.values()]
    updates: list[Any] = []

    class Client(nbclient.NotebookClient):  # type: ignore[misc,name-defined]
        def process_message(self, msg: Any, cell: Any, cell_index: int) -> Any:
            updates.append(msg["msg_type"])
            return super().process_message(msg, cell, cell_index)

    notebook = nbformat.v4.new_notebook(cells=cells)
    Client(notebook, timeout=120, kernel_name="python3").execute()
    assert updates.count("update_display_data") in range(4, 16), "twice a second"
    for name, cell in zip(settings, notebook.cells, strict=True):
        shown = [output for output in cell.outputs if output.output_type == "display_data"]
        texts = [output.data["text/plain"] for output in shown]
        said = "".join(output.text for output in cell.outputs if output.output_type == "stream")
        assert said == ("said\n" if name == "logs" else ""), name
        if name == "quiet":
            assert texts == []
        else:
            (text,) = texts
            assert re.fullmatch(r"train: 1,000/1,000 images, [\d,]+/s, took \d s loss 0\.123", text)
