"""Rows between two sizes of batches: cuts as teachers see them go in, a student's batches come out, in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feedfast.data.batch import Batch


@dataclass(frozen=True)
class Part:
    """Rows [start, stop) of a cut, and their codes."""

    batch: Batch
    start: int
    stop: int
    codes: Mapping[str, NDArray[Any]]


class Held:
    """Cuts that the student has not had yet: a queue of rows between two sizes of batches.

    Attributes:
        count: rows held.
    """

    def __init__(self) -> None:
        self.count = 0
        self._parts: list[Part] = []

    def add(self, batch: Batch, codes: Mapping[str, NDArray[Any]], *, first: int) -> None:
        """Hold the rows of a cut that are not before row ``first``."""
        start = min(max(first - int(batch.rows[0]), 0), len(batch))
        if start < len(batch):
            self._parts.append(Part(batch, start, len(batch), {name: rows[start:] for name, rows in codes.items()}))
            self.count += len(batch) - start

    def take(self, rows: int) -> list[Part]:
        """The first ``rows`` rows; they are held no longer."""
        taken: list[Part] = []
        self.count -= rows
        while rows:
            part = self._parts.pop(0)
            size = min(rows, part.stop - part.start)
            taken.append(
                replace(part, stop=part.start + size, codes={name: codes[:size] for name, codes in part.codes.items()})
            )
            rows -= size
            if size < part.stop - part.start:
                rest = {name: codes[size:] for name, codes in part.codes.items()}
                self._parts.insert(0, replace(part, start=part.start + size, codes=rest))
        return taken


def joined(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """One array; a single one as it is."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
