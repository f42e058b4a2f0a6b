"""The rows of a run: metrics.jsonl, and the loggers that are told the same.

``metrics.jsonl`` is the source: one JSON object per row, always with ``step``. On resume, rows from after the
checkpoint are dropped, so the file reads like that of an uninterrupted run, and every logger is told all that is left:
each knows what it has already, so a run that was killed has no row twice, and a logger that is new gets the whole run.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from feedfast.files import open_in_place, wrap_write_errors, write_text
from feedfast.report.loggers import LOGGERS, About, Background
from feedfast.report.run import read_metrics


class EventLog:
    """Appends rows to metrics.jsonl and tells them to loggers. A context manager: leaving it ends them."""

    def __init__(self, about: About, loggers: Sequence[str] = ()) -> None:
        """``loggers``: names of `LOGGERS`.

        Raises:
            FeedfastError: metrics.jsonl cannot be written.
        """
        self.path = about.out / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] <= about.step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._rows = kept
        with wrap_write_errors(self.path):
            self._file = os.fdopen(open_in_place(self.path, os.O_WRONLY | os.O_APPEND), "w")
        self._result: Mapping[str, Any] | None = None
        self._loggers = [Background(name, LOGGERS[name], about) for name in loggers]
        for row in kept:
            self._tell(row)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One row.

        Raises:
            FeedfastError: the disk is full.
        """
        row = {"step": step, **values}
        self._rows.append(row)
        with wrap_write_errors(self.path):
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        self._tell(row)

    def _tell(self, row: Mapping[str, Any]) -> None:
        values = {name: value for name, value in row.items() if name != "step"}
        for logger in self._loggers:
            logger.log(row["step"], values)

    def last(self, name: str) -> float | None:
        """The newest value of ``name``."""
        return next((row[name] for row in reversed(self._rows) if name in row), None)

    def result(self, document: Mapping[str, Any]) -> None:
        """What the run has come to, for the loggers to keep when they end."""
        self._result = document

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # a full disk was reported by the row that failed: every row is flushed when it is written
        with contextlib.suppress(OSError):
            self._file.close()
        for logger in self._loggers:
            logger.ending(self._result, "finished" if kind is None else _ended_by(kind))
        for logger in self._loggers:
            logger.join()


def _ended_by(kind: type[BaseException]) -> str:
    return "failed" if issubclass(kind, Exception) else "interrupted"
