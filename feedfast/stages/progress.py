"""Progress of long jobs: rate, time left and, where something is written, bytes.

On a terminal one live line; in a notebook's cell one text that is replaced; elsewhere (pipes, log files, CI, dumb
terminals) log lines without control codes, every ten seconds at first and every minute of a long job. Of several ranks
the first one shows it. A line and a live line belong to the logger ``feedfast`` at level INFO: who imports feedfast and
configures no logging sees neither. A notebook shows its text unless that logger was set to say less.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from types import TracebackType
from typing import Any, Protocol, Self

log = logging.getLogger(__name__)

LINE_SECONDS = 10.0
BAR_SECONDS = 0.1
CELL_SECONDS = 0.5  # a front end draws each
_SLOWER_AFTER, _SLOWEST = 200.0, 6.0  # seconds until lines come less often, down to a sixth


class Display(Protocol):
    """Where a `Meter` is shown."""

    seconds: float
    """Between two looks, at least."""

    def show(self, meter: Meter, remark: str) -> None:
        """How far it is."""

    def close(self, meter: Meter) -> None:
        """It has ended, wherever it is."""


class Meter:
    """Use as a context manager; `advance` may be called thousands of times per second.

    Attributes:
        label: of the job.
        total: units of it.
        unit: what they are.
        done: so many of them.
        started: of `time.perf_counter`.
        last: when it was shown, likewise.
    """

    def __init__(self, label: str, total: int, unit: str = "images") -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = 0
        self.started = self.last = time.perf_counter()
        self._display: Display | None = None

    def __enter__(self) -> Self:
        self.started = self.last = time.perf_counter()
        self._display = _display(self)
        return self

    @property
    def rate(self) -> float:
        """Units per second since the start."""
        return self.done / max(time.perf_counter() - self.started, 1e-9)

    def advance(self, count: int, remark: str = "") -> None:
        """``count`` more units are done."""
        self.done += count
        if self._display is None:
            return
        now = time.perf_counter()
        if now - self.last < self._display.seconds:
            return
        self.last = now
        self._display.show(self, remark)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._display is not None:
            self._display.close(self)
            self._display = None


class Lines:
    """A log line now and then."""

    def __init__(self) -> None:
        self.seconds = LINE_SECONDS

    def show(self, meter: Meter, remark: str) -> None:
        """See `Display`."""
        log.info("%s", _sentence(meter, remark))
        self.seconds = LINE_SECONDS * min(max((meter.last - meter.started) / _SLOWER_AFTER, 1.0), _SLOWEST)

    def close(self, meter: Meter) -> None:
        """See `Display`."""


class LiveLine:
    """The last line of a terminal; what is logged meanwhile is written above it."""

    def __init__(self, meter: Meter) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.seconds = BAR_SECONDS
        console = Console(stderr=True, force_terminal=True)
        bar = min(max(console.width // 4, 4), 30)
        # what is left for the remark, which alone is cut: bar, count, time left, and a space between each two
        self._room = max(console.width - len(meter.label) - bar - 2 * len(str(meter.total)) - 1 - len("0:00:00") - 5, 0)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=bar),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[remark]}", markup=False),
            console=console,
        )
        self._bar.start()
        self._task = self._bar.add_task(meter.label, total=meter.total, remark="")

    def show(self, meter: Meter, remark: str) -> None:
        """See `Display`."""
        text = f"{meter.rate:,.0f} {meter.unit}/s {remark}".rstrip()
        text = text if len(text) <= self._room else text[: max(self._room - 1, 0)] + "…" * bool(self._room)
        self._bar.update(self._task, completed=meter.done, remark=text)

    def close(self, meter: Meter) -> None:
        """See `Display`."""
        self._bar.update(self._task, completed=meter.done)
        self._bar.stop()


class Cell:
    """One text below a notebook's cell, replaced as it goes on; it stays in the notebook as it was last."""

    def __init__(self, meter: Meter) -> None:
        from IPython.display import display

        show: Any = display  # IPython has no annotations

        self.seconds = CELL_SECONDS
        self._handle: Any = show(_plain(f"{meter.label}: 0/{meter.total:,} {meter.unit}"), raw=True, display_id=True)
        self._remark = ""

    def show(self, meter: Meter, remark: str) -> None:
        """See `Display`."""
        self._remark = remark
        self._handle.update(_plain(_sentence(meter, remark)), raw=True)

    def close(self, meter: Meter) -> None:
        """See `Display`."""
        took = _duration(time.perf_counter() - meter.started)
        text = f"{_done(meter)}, {meter.rate:,.0f}/s, took {took} {self._remark}".rstrip()
        self._handle.update(_plain(text), raw=True)


def first_rank() -> bool:
    """Whether this process speaks for its peers, before anything knows better."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    shell = sys.modules.get("IPython")
    return shell is not None and getattr(shell.get_ipython(), "kernel", None) is not None


def on_terminal() -> bool:
    """Whether stderr is a terminal on which a line can be drawn again."""
    return sys.stderr.isatty() and os.environ.get("TERM", "dumb").lower() not in ("dumb", "unknown", "")


def _display(meter: Meter) -> Display | None:
    if not first_rank():
        return None
    if in_notebook():
        return Cell(meter) if logging.getLogger("feedfast").level <= logging.INFO else None
    if not log.isEnabledFor(logging.INFO):
        return None
    return LiveLine(meter) if on_terminal() else Lines()


def _plain(text: str) -> dict[str, str]:
    return {"text/plain": text}


def _done(meter: Meter) -> str:
    return f"{meter.label}: {meter.done:,}/{meter.total:,} {meter.unit}"


def _sentence(meter: Meter, remark: str) -> str:
    left = (meter.total - meter.done) / max(meter.rate, 1e-9)
    return f"{_done(meter)}, {meter.rate:,.0f}/s, {_duration(left)} left {remark}"


def _duration(seconds: float) -> str:
    """Time as people read it: ``14 s``, ``35 min``, ``5.2 h``."""
    if seconds < 120:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def format_bytes(count: float) -> str:
    """Bytes as people read them: ``3.2 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"
