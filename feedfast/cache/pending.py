"""Which shards belong to which part of a job, and which of them it still has to write. Pure arithmetic, no files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from feedfast.cache.layout import ArraySpec, unit_rows


class Division:
    """The shards of a cache, divided among the parts of a job."""

    def __init__(self, specs: Mapping[str, ArraySpec], num_rows: int, part: tuple[int, int]) -> None:
        """Part i of n of a cache with ``num_rows`` rows per view."""
        # A unit is as many rows as the largest shard holds; since shard lengths divide each other, no shard of any
        # array crosses the edge of one. Units go to the parts in turn, counted through all views, so that the parts
        # are even also when a view has fewer units than there are parts. All arrays of a row are thus written by one
        # part: its image is decoded, and each teacher runs, once.
        self._unit = unit_rows(dict(specs))
        self._units = -(-num_rows // self._unit)
        self._part, self._num_rows = part, num_rows

    def rows(self, num_views: int) -> int:
        """Rows of all views that belong to this part."""
        index, parts = self._part
        mine = range(index, num_views * self._units, parts)
        # the last unit of a view may be short
        return sum(min(self._unit, self._num_rows - unit % self._units * self._unit) for unit in mine)

    def holds(self, spec: ArraySpec, view: int, shard: int) -> bool:
        """Whether a shard belongs to this part."""
        index, parts = self._part
        return (view * self._units + spec.shard_span(shard)[0] // self._unit) % parts == index


@dataclass(frozen=True)
class Pending:
    """What a job still had to write when it asked: per array, its missing shards.

    Attributes:
        specs: the arrays it was asked about.
        missing: per array, (view, shard).
        num_rows: rows per view.
        num_views: views of the cache.
    """

    specs: Mapping[str, ArraySpec]
    missing: Mapping[str, frozenset[tuple[int, int]]]
    num_rows: int
    num_views: int

    def batches(self, size: int) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        """Per view that lacks anything, the rows to run: all batches that touch a missing shard.

        Args:
            size: rows per batch; batches are cut at its multiples, wherever a job happens to resume.

        Yields:
            view and its rows, int64, ascending.
        """
        for view in range(self.num_views):
            needed = np.zeros(-(-self.num_rows // size), dtype=bool)
            for name, spec in self.specs.items():
                for owner, shard in self.missing[name]:
                    if owner == view:
                        start, stop = spec.shard_span(shard)
                        needed[start // size : -(-stop // size)] = True
            if needed.any():
                yield view, np.flatnonzero(np.repeat(needed, size)[: self.num_rows])

    def lacks(self, array: str, view: int, start: int, stop: int) -> bool:
        """Whether rows [start, stop) of a view touch a missing shard of ``array``."""
        shard_rows = self.specs[array].shard_rows
        return any((view, shard) in self.missing[array] for shard in range(start // shard_rows, -(-stop // shard_rows)))
