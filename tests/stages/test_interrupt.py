"""A job that is ended from outside, by Ctrl-C or a scheduler: sound, in one line, and the same command continues."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import Outcome, feedfast
from small import as_toml, digits_recipe

from feedfast.data.batch import Batch
from feedfast.stages.interrupt import SIGNALS, Hold, interruptible
from feedfast.stages.loop import Loop
from feedfast.stages.progress import Meter

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGUSR1: 138}

pytestmark = pytest.mark.usefixtures("heard")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of two teachers and a student trained from it, uninterrupted."""
    folder = tmp_path_factory.mktemp("interrupt")
    file = as_toml(digits_recipe(folder, ("cache.threads=1",), teachers=1), folder / "recipe.toml")
    for command in ("cache", "train"):
        assert feedfast(command, file).code == 0
    return file


def ended(outcome: Outcome, number: int, words: str) -> None:
    assert outcome.code == CODES[signal.Signals(number)], outcome.err
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    lines = [line for line in outcome.err.splitlines() if "interrupted" in line]
    assert lines == [f"interrupted by {signal.Signals(number).name}; the same command {words}"]
    assert outcome.err.splitlines()[-1] == lines[0], "nothing is said after it"


def signal_in_step(monkeypatch: pytest.MonkeyPatch, number: int, step: int) -> None:
    """The signal comes between the gradient and the update of a step."""
    update = torch.optim.SGD.step
    calls: list[int] = []

    def interrupted(self: torch.optim.SGD, closure: None = None) -> None:
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), number)
        update(self)

    monkeypatch.setattr(torch.optim.SGD, "step", interrupted)


def quick(value: object, *others: object) -> list[object]:
    """One of its kind in every run of the tests, the others in the long one."""
    return [value, *(pytest.param(other, marks=pytest.mark.slow) for other in others)]


@pytest.mark.parametrize("number", quick(signal.SIGTERM, *(set(SIGNALS) - {signal.SIGTERM})))
def test_a_step_is_finished_and_kept(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Resumed at the very step; the student is that of the run that nobody interrupted, bit for bit."""
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        signal_in_step(patched, number, 9)
        ended(feedfast("train", recipe, f"train.out={out}"), number, "continues")
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] == 9
    resumed = feedfast("train", recipe, f"train.out={out}")
    assert resumed.code == 0
    assert "resumed at step 9" in resumed.err
    found, expected = (torch.load(folder / "student.pt") for folder in (out, recipe.parent / "student"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_second_signal_does_not_wait(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a step: its networks are nobody's state, and nothing of it is kept."""
    out = tmp_path / "out"

    def twice(self: torch.optim.SGD, closure: None = None) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the second one was kept back")

    monkeypatch.setattr(torch.optim.SGD, "step", twice)
    ended(feedfast("train", recipe, f"train.out={out}"), signal.SIGTERM, "continues")
    assert not (out / "checkpoint.pt").exists()


def test_between_steps_nothing_waits(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While data are waited for a hang could last for ever; the steps taken are kept."""
    out, batches = tmp_path / "out", Loop.batches

    def end(self: Loop, step: int) -> Iterator[Batch]:
        yield from itertools.islice(batches(self, step), 3)
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("kept back")

    monkeypatch.setattr(Loop, "batches", end)
    ended(feedfast("train", recipe, f"train.out={out}"), signal.SIGTERM, "continues")
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] == 3


@pytest.mark.parametrize("command", ["cache", *quick("factors", "chain"), *quick("verify", "analyze")])
def test_every_long_command(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """SIGTERM in mid-work: exit code 143; what the same command does afterwards is what it would have done."""
    folder = recipe.parent
    copy = tmp_path / "copy.zarr"
    if command in ("factors", "verify"):
        shutil.copytree(folder / "digits.zarr", copy)
    chain = ["chain.generations=2", "method.name=sfeed", f"train.out={tmp_path / 'out'}"]
    line: list[object] = {
        "verify": ["verify", copy, "--teachers", "100", "--recipe", recipe],
        "analyze": ["analyze", "reconstruction", folder / "student", "--epochs", "3", "--out", tmp_path / "page"],
    }.get(command, [command, recipe, f"cache.path={copy}", *(chain if command == "chain" else [])])
    advance = Meter.advance
    calls: list[int] = []

    def end(self: Meter, count: int, remark: str = "") -> None:
        calls.append(count)
        if len(calls) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        advance(self, count, remark)

    with monkeypatch.context() as patched:
        patched.setattr(Meter, "advance", end)
        ended(feedfast(*line), signal.SIGTERM, "starts again" if command in ("verify", "analyze") else "continues")
    again = feedfast(*line)
    assert again.code == 0, again.err
    if command == "cache":
        assert again.document["digest"] == feedfast("inspect", folder / "digits.zarr").document["digest"]
        assert again.document["rows_resumed"] >= 200, "shards that were full when it ended were written"


def test_handlers_of_others_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a caller or `nohup` has set is not replaced, and everything is as it was afterwards."""
    heard: list[int] = []
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
        with interruptible() as ending:
            signal.raise_signal(signal.SIGHUP)
            with Hold() as hold:
                hold.busy = True
                signal.raise_signal(signal.SIGUSR1)
                assert heard == []
                hold.deliver()
                assert heard == [signal.SIGUSR1]
                hold.busy = False
                with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
                    signal.raise_signal(signal.SIGTERM)
        assert (ending.number, ending.exit_code) == (signal.SIGTERM, 143)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is before[signal.SIGTERM]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.slow
def test_ranks_end_at_one_step(recipe: Path, tmp_path: Path) -> None:
    """A launcher ends all its ranks: none waits for another's next step, one speaks, and the run continues."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "feedfast", "train", str(recipe), f"train.out={out}", "train.epochs=100000"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        metrics = out / "metrics.jsonl"
        while all(rank.poll() is None for rank in ranks) and not (metrics.exists() and metrics.stat().st_size > 2000):
            time.sleep(0.02)
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)
        said = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [143, 143], said
    assert ["interrupted by SIGTERM" in err for _, err in said] == [True, False]
    assert all("Traceback" not in err for _, err in said)
    step = torch.load(out / "checkpoint.pt", weights_only=True)["step"]
    rows = metrics.read_text().splitlines()
    assert f'"step": {step},' in rows[-1] or f'"step": {step - 1},' in rows[-1]
