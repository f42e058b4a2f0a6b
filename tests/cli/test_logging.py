"""What the logger ``feedfast`` says, to whom: the command line's -v and -q, and Python's users."""

from __future__ import annotations

import ast
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import feedfast
from small import KNOWN, as_toml, digits_recipe, write_teacher

from feedfast import cli
from feedfast.cli import configure_logging
from feedfast.stages.progress import Meter


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("logging")
    for seed, name in enumerate("ab"):  # that know digits: of teachers that guess there is a warning
        write_teacher(folder / f"{name}.pt", seed=seed, epochs=20)
    return as_toml(digits_recipe(folder, KNOWN), folder / "r.toml")


def test_lines_carry_date_and_time_off_a_terminal(recipe: Path) -> None:
    said = feedfast("plan", recipe).err
    for line in ("data: 200 images", "plan: 200 images"):
        assert re.search(rf"^\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d,\d{{3}} +{line}", said, re.MULTILINE), said


def test_quiet_and_verbose(recipe: Path) -> None:
    assert feedfast("-q", "plan", recipe).err == ""
    assert feedfast("-q", "plan", recipe).document["fits"] is True, "the document is no message"
    levels = {arguments: _level(*arguments) for arguments in [(), ("-v",), ("-q",), ("-qq",), ("-qqq",), ("-v", "-q")]}
    assert levels == {
        (): logging.INFO,
        ("-v",): logging.DEBUG,
        ("-q",): logging.WARNING,
        ("-qq",): logging.ERROR,
        ("-qqq",): logging.ERROR,
        ("-v", "-q"): logging.INFO,
    }


def test_people_write_it_behind_the_command_too() -> None:
    for words, level in {("-v",): logging.DEBUG, ("--quiet",): logging.WARNING, ("-qq",): logging.ERROR}.items():
        outcome = feedfast("taps", *words[:1], "zoo/wrn-10-1", "--size", "16", *words[1:])
        assert outcome.code == 0, outcome.err
        assert logging.getLogger("feedfast").level == level
        assert feedfast("taps", "zoo/wrn-10-1", "--size", "16", *words).code == 0
        assert logging.getLogger("feedfast").level == level
    assert "No such option" in feedfast("taps", "zoo/wrn-10-1", "-x").err
    assert "-v" in feedfast("taps", "--", "-v").error, "behind -- it is a name"


def _level(*arguments: str) -> int:
    assert feedfast(*arguments, "taps", "zoo/wrn-10-1", "--size", "16").code == 0
    return logging.getLogger("feedfast").level


def test_an_error_is_said_whatever_the_level(tmp_path: Path) -> None:
    assert "expected a TOML file" in feedfast("-qq", "plan", tmp_path / "none.toml").error


def test_of_several_ranks_the_first_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, level in (("0", logging.INFO), ("1", logging.WARNING)):
        monkeypatch.setenv("RANK", rank)
        configure_logging()
        assert logging.getLogger("feedfast").level == level


def test_commands_do_not_pile_up_handlers(recipe: Path) -> None:
    feedfast("plan", recipe)
    assert len(feedfast("plan", recipe).err.split("plan: 200 images")) == 2


@pytest.mark.slow
def test_python_users_hear_nothing_unless_they_ask(recipe: Path) -> None:
    """As of any library: `logging` decides. A script without it prints no progress; with it, on its own handler."""
    script = (
        "import sys, feedfast\n"
        "{}\n"
        "feedfast.run_cache(feedfast.load_recipe(sys.argv[1], ['cache.path=' + sys.argv[2]]))\n"
    )
    asked = "import logging; logging.basicConfig(level=logging.INFO, format='%(name)s %(message)s')"
    for number, (extra, expected) in enumerate((("", ""), (asked, "feedfast.stages.offline cache: 2 teachers"))):
        path = recipe.parent / f"{number}.zarr"
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script.format(extra), recipe, path],
            capture_output=True, text=True, timeout=240, check=True,
        )  # fmt: skip
        assert done.stdout == ""
        assert expected in done.stderr
        assert bool(done.stderr) == bool(expected)


def test_everything_is_said_by_our_loggers() -> None:
    """A module's own, below ``feedfast``; only the command line prints, its document and its error."""
    wrong = []
    for path in sorted(Path(cli.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            prints = called in ("print", "pprint", "sys.stdout.write", "sys.stderr.write", "warnings.warn")
            if (prints or (called.startswith("logging.") and called[8:] in LEVELS)) and path.name != "cli.py":
                wrong.append(f"{path}:{node.lineno}: {called}")
    assert wrong == []


LEVELS = ("debug", "info", "warning", "error", "exception", "critical")  # of the root logger


class Kept(logging.Handler):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def test_a_long_job_says_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 4.0, 10.0, 10.0, 10.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    logger, kept = logging.getLogger("feedfast.stages.progress"), Kept()
    logger.addHandler(kept)
    monkeypatch.setattr(logger, "level", logging.INFO)
    logger.manager._clear_cache()  # type: ignore[attr-defined] # what isEnabledFor remembers
    try:
        with Meter("cache", 1000) as meter:
            meter.advance(100)
            assert kept.said == [], "a line every ten seconds, not every batch"
            meter.advance(320, "1.0 MiB written")
    finally:
        logger.removeHandler(kept)
    assert kept.said == ["cache: 420/1,000 images, 42/s, 14 s left 1.0 MiB written"]
