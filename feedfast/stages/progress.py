"""Progress of long jobs: rate, time left and, where something is written, bytes.

On a terminal a live bar; elsewhere one log line every ten seconds, so that a log file stays readable. Both belong to
the logger ``feedfast`` at level INFO: who imports feedfast and configures no logging sees neither.
"""

from __future__ import annotations

import logging
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)

LINE_SECONDS = 10.0
BAR_SECONDS = 0.1


class Meter:
    """Use as a context manager; `advance` may be called thousands of times per second."""

    def __init__(self, label: str, total: int, unit: str = "images") -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = 0
        self.started = self._last = time.perf_counter()
        self._shown = log.isEnabledFor(logging.INFO)
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        self.started = self._last = time.perf_counter()
        console = Console(stderr=True)
        if self._shown and console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[remark]}"),
            )
            self._bar = Progress(*columns, console=console)
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total, remark="")
        return self

    @property
    def rate(self) -> float:
        """Units per second since the start."""
        return self.done / max(time.perf_counter() - self.started, 1e-9)

    def advance(self, count: int, remark: str = "") -> None:
        """``count`` more units are done."""
        self.done += count
        if not self._shown:
            return
        now = time.perf_counter()
        if now - self._last < (LINE_SECONDS if self._bar is None else BAR_SECONDS):
            return
        self._last = now
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, remark=f"{self.rate:,.0f} {self.unit}/s {remark}")
            return
        left = (self.total - self.done) / max(self.rate, 1e-9)
        done = f"{self.done:,}/{self.total:,} {self.unit}"
        log.info("%s: %s, %s/s, %s s left %s", self.label, done, f"{self.rate:,.0f}", f"{left:,.0f}", remark)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)
            self._bar.stop()


def format_bytes(count: float) -> str:
    """Bytes as people read them: ``3.2 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"
