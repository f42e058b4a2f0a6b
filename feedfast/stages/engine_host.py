"""The process of an actor: it makes a member of a crew, calls it, and turns what it raises and logs into values.

Ray would wrap an exception in one of its own, with a traceback as its text, and print log lines in the order in which
they arrive from all nodes. An error of ours is one sentence for whoever asked, so it travels as what it is; any other
exception is a fault of the process, and stays Ray's.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from feedfast.errors import FeedfastError

Said = tuple[str, int, str]
"""A log record: logger, level, text."""


@dataclass(frozen=True)
class Answer:
    """What travels from an actor: a value or an error, and what was said since the last answer."""

    value: Any = None
    error: FeedfastError | None = None
    said: tuple[Said, ...] = ()


class Host:
    """An actor's class. `stop` may be called while another call runs; else there is one call at a time."""

    def __init__(self, make: Callable[[int, int], Any], slot: int, lives: int) -> None:
        """Make nothing yet: what fails here would be Ray's to tell."""
        self._make, self._slot, self._lives = make, slot, lives
        self._member: Any = None
        self._said = _Collected()
        logger = logging.getLogger("feedfast")
        logger.addHandler(self._said)
        logger.setLevel(logging.INFO)
        logger.propagate = False

    def begin(self) -> Answer:
        """Make the member; the value is the node and the process it is in."""

        def made() -> tuple[str, int]:
            import ray

            self._member = self._make(self._slot, self._lives)
            return str(ray.get_runtime_context().get_node_id()), os.getpid()

        return self._answered(made)

    def call(self, name: str, arguments: Sequence[Any]) -> Answer:
        """What a method of the member returns."""
        return self._answered(lambda: getattr(self._member, name)(*arguments))

    def work(self, items: Sequence[Any], again: bool) -> Iterator[Answer]:
        """The member's reports."""
        reports = iter(self._member.work(items, again))
        while True:
            try:
                report = next(reports, None)
            except FeedfastError as error:
                yield self._answer(error=error)
                return
            if report is None:
                return
            yield self._answer(report)

    def stop(self) -> None:
        """End `work` soon."""
        self._member.stop()

    def close(self) -> None:
        """The end."""
        self._member.close()

    def _answered(self, do: Callable[[], Any]) -> Answer:
        try:
            return self._answer(do())
        except FeedfastError as error:
            return self._answer(error=error)

    def _answer(self, value: Any = None, error: FeedfastError | None = None) -> Answer:
        return Answer(value, error, self._said.taken())


class _Collected(logging.Handler):
    """Log records as plain values, until they are taken."""

    def __init__(self) -> None:
        super().__init__()
        self._records: list[Said] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append((record.name, record.levelno, record.getMessage()))

    def taken(self) -> tuple[Said, ...]:
        self.acquire()
        try:
            found, self._records = self._records, []
        finally:
            self.release()
        return tuple(found)
