"""The offline stage on a Ray cluster: the protocol of `feedfast.stages.offline`, with units handed out by a driver.

A member of the crew (`feedfast.stages.engine_ray`) is one process with the teachers, the loader of pixels and a log of
its own; what it is handed are units, rows that hold whole shards of every array. It writes as every writer does, the
object first and then its line, so who wrote a shard shows nowhere but in the name of the log, and the digest is that of
one plain run. The driver needs neither data, nor weights, nor the cache: all of that is opened in the actors, on the
devices that do the work, and what comes back of a unit is how many rows, bytes and objects it took.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from feedfast import __version__
from feedfast.errors import FeedfastError, PartTakenError, RequestError
from feedfast.provenance import Provenance
from feedfast.recipe import Recipe
from feedfast.stages.accuracy import Counts
from feedfast.stages.data import PYTHON
from feedfast.stages.engine_ray import DEATHS, Crew, Needs, Size, session
from feedfast.stages.interrupt import Hold
from feedfast.stages.offline import OfflineRun, refuse_incomplete
from feedfast.stages.progress import Meter, format_bytes
from feedfast.stages.worker import Worker
from feedfast.storage.create import record_pass, refuse_foreign
from feedfast.storage.layout import unit_rows
from feedfast.storage.pending import Unit
from feedfast.storage.writer import CacheWriter

log = logging.getLogger(__name__)

# A writer that has been killed gives its log back at once, one that lost its node when the file system notices. The
# first of a slot waits for the actors of a killed driver only: another job at work is to be named soon.
FIRST_PATIENCE_S, LATER_PATIENCE_S = 20.0, 180.0
Found = TypeVar("Found")


@dataclass(frozen=True)
class Job:
    """What every member is told.

    Attributes:
        recipe: as of the driver.
        check: as of `run_cache`.
        most: members there may be: as many logs.
        threads: cores of each.
        folder: the driver's; paths of the recipe are relative to it.
        version: of the driver's feedfast.
    """

    recipe: Recipe
    check: bool
    most: int
    threads: int
    folder: str
    version: str


@dataclass(frozen=True)
class Work:
    """What there is to do.

    Attributes:
        units: those that lack anything → rows to run.
        rows: of the whole cache, all views.
        images: rows of one view.
        views: of the cache.
        path: of the cache, as it is called.
    """

    units: dict[Unit, int]
    rows: int
    images: int
    views: int
    path: str


@dataclass(frozen=True)
class Written:
    """A unit that is durable.

    Attributes:
        unit: which.
        writer: the slot of the member and how many had it before.
        bytes_written: by this member so far.
        counts: what its teachers got right so far, see `Accuracies.counts`.
    """

    unit: Unit
    writer: tuple[int, int]
    bytes_written: int
    counts: Counts


class CachingMember:
    """One writer, in the process of an actor."""

    def __init__(self, job: Job, slot: int, lives: int) -> None:
        """Open data, teachers and the cache; the first of all members makes the cache, as of parts that start together.

        Raises:
            RequestError, CacheMismatchError: as of `run_cache`; another version of feedfast, or no such folder here.
        """
        here = os.uname().nodename
        if __version__ != job.version:
            raise RequestError(f"Ray: expected feedfast {job.version} on every node, found {__version__} on {here}")
        try:
            os.chdir(job.folder)
        except OSError:
            raise RequestError(
                f"Ray: expected the folder {job.folder}, in which the command runs, on every node, found none on {here}"
            ) from None
        sys.path.insert(0, "")  # package.module:factory, as of the command line
        torch.set_num_threads(job.threads)  # Ray tells OpenMP 1 where nothing is asked for
        self._me, self._stop = (slot, lives), threading.Event()
        self._due: frozenset[tuple[str, int, int]] | None = None  # shards that are waited for before the end
        part = (slot, job.most)
        run = self._run = OfflineRun(job.recipe, Worker(), check=job.check, part=part)
        if not job.recipe.data.threads:
            run.loader.threads = min(16, job.threads)
        refuse_foreign(run.path)
        self._writer: CacheWriter | None = None
        done = run.nothing_to_do()
        if done is not None:
            log.info("cache: %s cannot be written to, and holds all that the recipe asks for", run.path)
            self._manifest = done
            return
        patience_s = LATER_PATIENCE_S if lives else FIRST_PATIENCE_S
        self._manifest = _patiently(run.prepare, patience_s)
        threads = job.recipe.cache.threads
        self._writer = _patiently(
            partial(CacheWriter, run.path, self._manifest, part=part, divided=False, workers=threads), patience_s
        )
        self._recorder = run.recorder(self._writer)

    def find(self) -> Work:
        """What there is to do, as of the opening of this member."""
        rows = self._manifest.num_rows
        units: dict[Unit, int] = {}
        if self._writer is not None:
            units = self._recorder.pending.units(unit_rows(self._writer.specs), self._run.recipe.cache.batch)
        return Work(units, rows * self._manifest.views, rows, self._manifest.views, str(self._run.path))

    def note(self, job: Provenance) -> None:
        """Name the driver's process among the cache's passes."""
        record_pass(self._run.path, job)

    def work(self, items: Sequence[Unit], again: bool) -> Iterator[Written]:
        """Write units of one view, and report each when it is durable."""
        writer = self._writer
        assert writer is not None
        if again:
            writer.refresh()  # what a dead member committed is not computed again
        writer.hand(items)
        pending = self._recorder.pending = writer.pending(self._recorder.arrays)
        waiting, reached = deque(items), 0
        for view, rows in pending.batches(self._run.recipe.cache.batch):
            for done in self._run.record(self._recorder, view, rows):
                reached = int(done[-1]) + 1
                # what the disk still has of a unit is not waited for: the next one's rows are computed meanwhile
                while waiting and waiting[0].stop <= reached and writer.holds(waiting[0]):
                    yield self._written(waiting.popleft())
                if self._ends(writer):
                    break
        writer.flush()
        while waiting and (waiting[0].stop <= reached or not self._stop.is_set()):
            yield self._written(waiting.popleft())

    def _written(self, unit: Unit) -> Written:
        assert self._writer is not None
        return Written(unit, self._me, self._writer.bytes_written, self._run.accuracy.counts())

    def _ends(self, writer: CacheWriter) -> bool:
        """Once told to stop: when the shards are full that were begun then, as a plain job does."""
        if not self._stop.is_set():
            return False
        self._due = writer.filling() if self._due is None else self._due & writer.filling()
        return not self._due

    def stop(self) -> None:
        """End soon, see `_ends`."""
        self._stop.set()

    def summary(
        self, rows: int, resumed: int, written: int, counts: Sequence[Counts], computing: float, seconds: float
    ) -> dict[str, Any]:
        """The document of the whole job, see `run_cache`; what this member does not know is given."""
        self._run.resumed = resumed
        if counts:
            self._run.accuracy.merge(counts)
        return self._run.summary(self._manifest, rows, written, computing, seconds) | {"part": "0/1"}

    def close(self) -> None:
        """Give the log back."""
        self._run.loader.close()
        if self._writer is not None:
            self._writer.close()


def run_cache_ray(recipe: Recipe, *, workers: str = "", check: bool = True) -> dict[str, Any]:
    """Write (or finish, or extend) the recipe's cache with one Ray actor per GPU, or per share of the CPUs.

    Args:
        recipe: what to do; its paths mean the same on every node.
        workers: ``N`` or ``MIN-MAX`` (`feedfast.stages.engine_ray.Size`); "" = every GPU of the cluster, without one
            every node.
        check: as of `run_cache`.

    Returns:
        As `run_cache`.

    Raises:
        As `run_cache`, and:
        RequestError: there is no package ray, or no cluster answers.
        FeedfastError: workers died as they started, or of some rows, which are named; all others are written.
    """
    _refuse_own_parts(recipe)
    refuse_incomplete(recipe)
    size = Size.of(workers) if workers else None
    started = time.perf_counter()
    provenance = Provenance.begin(recipe.model_dump(mode="json"))
    with session() as ray, Hold() as hold:
        size, needs, threads = _placed(ray.nodes(), recipe.train.device, size)
        job = Job(recipe, check, size.most, threads, os.getcwd(), __version__)
        make = partial(CachingMember, job)
        crew: Crew[Unit, Written] = Crew(
            ray, make, size, needs, together=_of_one_view, ended=lambda: hold.number is not None
        )
        with crew:
            work: Work = crew.ask("find")
            rows = sum(work.units.values())
            resumed = max(0, work.rows - rows)
            there = f", {resumed:,} rows already there" if resumed else ""
            log.info(
                "cache: up to %s, %d views of %s images → %s%s",
                *(_counted(size.most), work.views, f"{work.images:,}", work.path, there),
            )
            if rows:
                crew.ask("note", provenance)
            computing = time.perf_counter()
            latest: dict[tuple[int, int], Written] = {}
            written = 0
            hold.busy = True
            with Meter("cache", rows) as meter:
                for report in crew.run(work.units):
                    before = latest.get(report.writer)
                    written += report.bytes_written - (0 if before is None else before.bytes_written)
                    latest[report.writer] = report
                    meter.advance(work.units[report.unit], f"{format_bytes(written)} written, {_counted(crew.alive)}")
            hold.busy = False
            hold.deliver()
            if crew.lost:
                raise _lost(work, crew.lost)
            if rows:
                crew.ask("note", provenance.finished())
            now = time.perf_counter()
            counts = [report.counts for report in latest.values()]
            document: dict[str, Any] = crew.ask(
                "summary", rows, resumed, written, counts, now - computing, now - started
            )
    return document


def _refuse_own_parts(recipe: Recipe) -> None:
    share = Worker.from_env().share(recipe.cache.part)
    if share.part != (0, 1):
        raise RequestError(
            f"--engine ray: expected one command for the whole cache, found part {share.index}/{share.parts} of it, "
            f"by {share.said}"
        )
    if recipe.data.train == PYTHON:
        raise RequestError(
            '--engine ray: expected data.train to name files, which every node reads, found "python", an object'
        )


def _placed(nodes: Sequence[dict[str, Any]], device: str, size: Size | None) -> tuple[Size, Needs, int]:
    """How many members on these nodes, what each asks for, and the cores it uses.

    Raises:
        RequestError: a GPU is asked for where there is none, and nothing says how many to wait for.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    cpus, gpus = ([int(node.get(name, 0)) for node in alive] for name in ("CPU", "GPU"))
    if device.startswith("cuda") or (device == "auto" and any(gpus)):
        if size is None:
            if not any(gpus):
                raise RequestError(f"train.device: expected GPUs in the Ray cluster for {device!r}, found none")
            size = Size(sum(gpus), sum(gpus))
        # One with many GPUs per core may have less than a core for each: such cores are not asked for.
        share = min((cpu // gpu for cpu, gpu in zip(cpus, gpus, strict=True) if gpu), default=1)
        return size, Needs(share, 1), max(1, share)
    if size is None:
        count = max(1, sum(cpu > 0 for cpu in cpus))
        size = Size(count, count)
    # the share of each where all are there, but no more than one node has
    share = max(1, min(sum(cpus) // size.most, max(cpus, default=1)))
    return size, Needs(share, 0), share


def _counted(count: int) -> str:
    return f"{count} worker{'' if count == 1 else 's'}"


def _of_one_view(before: Unit, after: Unit) -> bool:
    """A loader streams one view at a time."""
    return before.view == after.view


def _lost(work: Work, lost: dict[Unit, str]) -> FeedfastError:
    named = "; ".join(f"{unit}: {why}" for unit, why in list(lost.items())[:5])
    more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
    return FeedfastError(
        f"{work.path}: {DEATHS} workers died of each of these, given up; all else is written, and the same command "
        f"tries them again: {named}{more}"
    )


def _patiently(do: Callable[[], Found], patience_s: float) -> Found:
    """What ``do`` returns, tried until nobody else has this part, or for so long."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return do()
        except PartTakenError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
