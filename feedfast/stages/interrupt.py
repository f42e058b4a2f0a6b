"""Ending a job from outside: what is under way is finished first, if that takes moments.

Ctrl-C and a scheduler's signals arrive at any instruction, also between the update of one weight and the next. `Hold`
keeps the first back while a step lasts, so that there is always a sound state to save; a second is not kept back.
Handlers stay those of whoever installed them: the command line's (`interruptible`), torch's or a caller's.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

log = logging.getLogger(__name__)

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
"""What ends a job: Ctrl-C; schedulers, containers and `kill`; a closed terminal; a scheduler's early warning."""


class Ending:
    """Which signal ends this process, if one does; see `interruptible`."""

    def __init__(self) -> None:
        self.number: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        self.number = number
        raise KeyboardInterrupt(self.name)

    @property
    def name(self) -> str:
        """``SIGTERM``; of Ctrl-C, which needs no handler of ours, SIGINT."""
        return signal.Signals(self.number or signal.SIGINT).name

    @property
    def exit_code(self) -> int:
        """128 and the signal's number, as of a shell: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + int(self.number or signal.SIGINT)


@contextmanager
def interruptible() -> Iterator[Ending]:
    """Inside, those of `SIGNALS` that would kill the process raise a KeyboardInterrupt, as Ctrl-C does.

    Signals that are ignored (`nohup`) or have a handler are left alone.
    """
    ending = Ending()
    mine = [number for number in SIGNALS if _main_thread() and signal.getsignal(number) is signal.SIG_DFL]
    for number in mine:
        signal.signal(number, ending)
    try:
        yield ending
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)


class Hold:
    """A context manager; inside, the first of `SIGNALS` waits while `busy`.

    Attributes:
        busy: whether a signal must wait. Set and unset for every step, so it is no more than that.
        number: the signal that came, if one did.
    """

    def __init__(self) -> None:
        self.busy = False
        self.number: int | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        found = {number: signal.getsignal(number) for number in SIGNALS if _main_thread()}
        self._handlers = {number: handler for number, handler in found.items() if callable(handler)}
        for number in self._handlers:
            signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        waits = self.busy and self.number is None  # whoever sends a second one will not wait
        self.number = number
        if not waits:
            self._handlers[number](number, frame)

    def deliver(self) -> None:
        """Call the handler of a signal that waits; it raises, if it is Python's or the command line's."""
        if self.number is not None:
            self._handlers[self.number](self.number, None)


class HoldShards(Hold):
    """`Hold` for who fills shards row by row: a signal waits until those are full that were begun when it came.

    What is begun and not full is lost, so ending at once could undo the same hour again and again.
    """

    def __init__(self, filling: Callable[[], Set[Any]]) -> None:
        """``filling``: the shards that are begun and not full."""
        super().__init__()
        self.busy = True
        self._filling = filling
        self._due: Set[Any] | None = None

    def check(self) -> None:
        """A sound moment, after each batch: a signal that waits is delivered, if what it waits for is full."""
        if self.number is None:
            return
        if self._due is None:
            self._due = self._filling()
            if self._due:
                name = signal.Signals(self.number).name
                log.info("%s: ending when %d shards are full; once more ends at once", name, len(self._due))
        self._due = self._due & self._filling()
        if not self._due:
            self.deliver()


def _main_thread() -> bool:
    """Only there may handlers be set, and only there do they run."""
    return threading.current_thread() is threading.main_thread()
