"""Which shards belong to which part of a job, and which of them it still has to write. Pure arithmetic, no files.

Rows are divided in *units* of as many rows as the largest shard holds; since shard lengths divide each other, no shard
of any array crosses the edge of one. All arrays of a row are thus written by one writer: its image is decoded, and each
teacher runs, once. Parts of a job have their units from its beginning (`Division`); whoever works for an engine is
handed some at a time (`Handed`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from feedfast.storage.layout import ArraySpec, unit_rows


@dataclass(frozen=True, order=True)
class Unit:
    """Rows [start, stop) of a view that hold whole shards of every array."""

    view: int
    start: int
    stop: int

    def __str__(self) -> str:
        return f"view {self.view}, rows {self.start}..{self.stop}"


class Division:
    """The shards of a cache, divided among the parts of a job."""

    def __init__(self, specs: Mapping[str, ArraySpec], num_rows: int, part: tuple[int, int]) -> None:
        """Part i of n of a cache with ``num_rows`` rows per view."""
        # Units go to the parts in turn, counted through all views, so that the parts are even also when a view has
        # fewer units than there are parts.
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

    def shards(self, spec: ArraySpec) -> Iterator[tuple[int, int]]:
        """(view, shard) of all shards of an array that belong to this part."""
        places = ((view, shard) for view in range(spec.num_views) for shard in range(spec.num_shards))
        return (place for place in places if self.holds(spec, *place))


class Handed:
    """The shards of the units that a writer has been handed."""

    def __init__(self, units: Collection[Unit]) -> None:
        self._units = units

    def holds(self, spec: ArraySpec, view: int, shard: int) -> bool:
        """Whether a shard is among them."""
        start = spec.shard_span(shard)[0]
        return any(unit.view == view and unit.start <= start < unit.stop for unit in self._units)

    def shards(self, spec: ArraySpec) -> Iterator[tuple[int, int]]:
        """(view, shard) of all shards of an array that are among them: no more steps, however large the cache."""
        for unit in self._units:
            for shard in range(unit.start // spec.shard_rows, -(-unit.stop // spec.shard_rows)):
                yield unit.view, shard


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
        needed: dict[int, npt.NDArray[np.bool_]] = {}
        for name, spec in self.specs.items():
            for view, shard in self.missing[name]:
                if view not in needed:
                    needed[view] = np.zeros(-(-self.num_rows // size), dtype=bool)
                start, stop = spec.shard_span(shard)
                needed[view][start // size : -(-stop // size)] = True
        for view in sorted(needed):
            yield view, np.flatnonzero(np.repeat(needed[view], size)[: self.num_rows])

    def lacks(self, array: str, view: int, start: int, stop: int) -> bool:
        """Whether rows [start, stop) of a view touch a missing shard of ``array``."""
        shard_rows = self.specs[array].shard_rows
        return any((view, shard) in self.missing[array] for shard in range(start // shard_rows, -(-stop // shard_rows)))

    def units(self, unit: int, size: int) -> dict[Unit, int]:
        """The units that hold a missing shard, in the order of their rows, and how many rows each takes to run.

        Args:
            unit: rows per unit (`unit_rows`).
            size: rows per batch, as of `batches`; of a batch that reaches into another unit each counts its own rows.
        """
        places = {
            (view, self.specs[name].shard_span(shard)[0] // unit)
            for name, missing in self.missing.items()
            for view, shard in missing
        }
        counts = {view: np.bincount(rows // unit) for view, rows in self.batches(size)}
        return {
            Unit(view, number * unit, min((number + 1) * unit, self.num_rows)): int(counts[view][number])
            for view, number in sorted(places)
        }
