"""Writing a cache: rows in, durable shards and commit lines out.

`open_for_writing` (`feedfast.cache.create`) makes a cache or extends the one that is there. `CacheWriter` then takes
rows in ascending order, gathers each shard in one buffer, and hands full ones to a few threads that check, compress,
checksum and publish them: object first, whole and fsynced, its commit line after that. Compression, hashing and writing
run without the GIL, beside the teachers.

Memory is flat: one gathering buffer for each array being written plus at most ``max_in_flight`` shards on their way;
`append` waits when the disk is slower than the teachers. Buffers are used again, since fresh pages cost as much as
the copy into them.

Killed at any moment, the same calls finish the rest: `missing` names the shards without a commit line, `append` drops
rows of shards that have one, and because a shard is a pure function of its rows the bytes come out the same. A
committed object that has since gone missing or short is listed in ``damaged`` and counts as missing.

Several writers may work at once, each on its own *part* with its own log; which shards belong to a part is the caller's
business. The same part twice, or parts of two divisions at once, are refused.

It does not encode maps into codes and does not know where rows come from.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from feedfast.cache.assemble import Shard, block_ends, block_sums, encode_shard, holds_fill
from feedfast.cache.codec import crc32c, crc_bytes
from feedfast.cache.create import open_for_writing
from feedfast.cache.layout import ArraySpec, array_specs
from feedfast.cache.log import (
    COMMITS,
    Commit,
    Problem,
    check_commit,
    log_name,
    object_path,
    parse_log,
    problem,
    read_log,
)
from feedfast.cache.schema import Manifest, describe_differences, differences
from feedfast.cache.store import (
    fsync_dir,
    lock_split,
    manifest_lock,
    publish,
    read_manifest,
    remove_stale,
    take_lock,
    write_all,
    write_error,
)
from feedfast.errors import CacheDamageError, CacheMismatchError, FeedfastError, RequestError

__all__ = ["CacheWriter", "open_for_writing"]

Array = npt.NDArray[Any]


class CacheWriter:
    """One writer of one part of a cache. A context manager; `close` waits for everything appended to be durable.

    Attributes:
        bytes_written: bytes of the objects this writer has published.
        shards_written: how many objects those are.
        damaged: committed objects found missing or of another length at opening; they are to be written again.
    """

    def __init__(
        self,
        path: str | Path,
        manifest: Manifest,
        *,
        part: tuple[int, int] = (0, 1),
        workers: int = 2,
        max_in_flight: int | None = None,
    ) -> None:
        """Lock the part, repair the end of its log, and learn what is committed.

        Args:
            path: the cache.
            manifest: what `open_for_writing` returned.
            part: (i, n), this is writer i of n.
            workers: threads that encode and publish.
            max_in_flight: full shards that may wait or be on their way; default ``workers + 1``.

        Raises:
            RequestError: the part is already being written, or writers of another division are at work.
            CacheMismatchError: the manifest on disk is another.
            CacheDamageError: a log is damaged other than by a torn last line, or disagrees with the manifest.
        """
        if not 0 <= part[0] < part[1]:
            raise RequestError(f"part: expected i/n with 0 <= i < n, found {part[0]}/{part[1]}")
        self.root, self.manifest, self.part = Path(path), manifest, part
        self.specs = array_specs(manifest)
        self.bytes_written = self.shards_written = 0
        self.damaged: list[Problem] = []
        self._digests = {name: manifest.digest_for(name) for name in self.specs}
        self._commits: dict[tuple[str, str], Commit] = {}
        self._done: dict[str, set[tuple[int, int]]] = {name: set() for name in self.specs}  # committed or on their way
        self._open: dict[tuple[str, int], Shard] = {}
        self._error: BaseException | None = None
        self._lock = threading.Lock()  # guards the log file, the counters and what is committed
        self._spare: dict[int, list[npt.NDArray[np.uint8]]] = {}  # buffers to use again, by size
        self._slots = threading.BoundedSemaphore(max_in_flight or workers + 1)
        stored = read_manifest(self.root)
        self._refuse_other(stored)
        with contextlib.ExitStack() as undo:
            self._split_fd = lock_split(self.root, part[1])
            undo.callback(os.close, self._split_fd)
            self._log_fd = self._lock_log()
            undo.callback(os.close, self._log_fd)
            remove_stale(self.root, part=part)
            self._learn(stored)
            undo.pop_all()
        self._closed = False
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="feedfast-write")

    # ---- opening

    def _refuse_other(self, stored: Manifest) -> None:
        found = differences(self.manifest, stored, missing=True)
        if not found:
            here = array_specs(stored)
            found = [
                (name, digest[:12], stored.digest_for(name)[:12] if name in here else None)
                for name, digest in self._digests.items()
                if name not in here or stored.digest_for(name) != digest
            ]
        if found:
            table = describe_differences(found)
            raise CacheMismatchError(f"{self.root}: expected the manifest that open_for_writing returned\n{table}")

    def _lock_log(self) -> int:
        file = self.root / COMMITS / log_name(self.part)
        new = not file.exists()
        fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, fd)
            if not take_lock(fd, fcntl.LOCK_EX):
                i, n = self.part
                raise RequestError(f"{self.root}: part {i}/{n} is already being written by another process")
            if new:
                os.fsync(fd)
                fsync_dir(file.parent)
            _, sound, problems = parse_log(file.read_bytes(), f"{COMMITS}/{file.name}")
            if any(entry["kind"] == "log-torn" for entry in problems):
                os.ftruncate(fd, sound)
                os.fsync(fd)
            undo.pop_all()
        return fd

    def _learn(self, stored: Manifest) -> None:
        log = read_log(self.root)
        problems = [entry for entry in log.problems if entry["kind"] != "log-torn"]
        specs = array_specs(stored)
        for commit in log.commits.values():
            wrong = check_commit(commit, specs)
            if wrong is None and commit.manifest != stored.digest_for(commit.array):
                wrong = problem(
                    commit.array, commit.shard, "manifest-digest", "written for another manifest than the one stored"
                )
            if wrong is not None:
                problems.append(wrong)
        if problems:
            first = problems[0]
            where = " ".join(word for word in (first["array"], first["shard"]) if word)
            raise CacheDamageError(
                f"{self.root}: commit log: {len(problems)} problem(s), {where}: {first['kind']}: {first['detail']}. "
                "A line that is removed from the log makes its shard be computed again",
                problems,
            )
        self._commits = log.commits
        for key, commit in log.commits.items():
            try:
                size = object_path(self.root, *key).stat().st_size
            except OSError:
                self.damaged.append(problem(*key, "missing", f"expected {commit.bytes} bytes, found no file"))
                continue
            if size != commit.bytes:
                self.damaged.append(problem(*key, "length", f"expected {commit.bytes} bytes, found {size}"))
            elif commit.array in self._done:
                self._done[commit.array].add(specs[commit.array].locate(commit.shard))

    # ---- what there is

    def missing(self, array: str) -> set[tuple[int, int]]:
        """(view, shard) of every object of an array neither committed nor on its way, whichever part it belongs to."""
        spec = self._spec(array)
        return {(v, s) for v in range(spec.num_views) for s in range(spec.num_shards)} - self._done[array]

    def stored(self, array: str) -> Array | None:
        """A committed small array (`put`), or None while any of its objects is missing.

        Raises:
            CacheDamageError: an object is not the one that was committed.
        """
        spec = self._small(array)
        if self.missing(array):
            return None
        chunks = [self._read_small(spec, view) for view in range(spec.num_views)]
        return np.stack(chunks).reshape(spec.shape) if spec.views else chunks[0]

    # ---- rows of sharded arrays

    def append(
        self,
        array: str,
        view: int,
        start_row: int,
        rows: Array,
        *,
        saturated: int = 0,
        pixel_crc32c: Sequence[str] | None = None,
    ) -> None:
        """Take rows [start_row, start_row + n) of a view; they are copied before this returns.

        Rows of one shard must come in order, from its first, and one shard of an array and view at a time. Rows of
        committed shards are dropped, so whole batches may be given again on resuming. Waits while ``max_in_flight``
        shards are on their way.

        Args:
            array: e.g. ``targets/a/final/codes``.
            view: number of the view.
            start_row: row of ``rows[0]``.
            rows: [n, ...] in the array's dtype and row shape, channels last.
            saturated: values the codec clipped in these rows; counted on the first shard they reach.
            pixel_crc32c: one checksum of the teachers' pixels for each block that *ends* within these rows (the last
                block ends with the view); for every block of a shard, or for none.

        Raises:
            FeedfastError: an earlier shard could not be written, rows do not follow, or they hold a fill value.
        """
        self._raise_pending()
        spec = self._spec(array)
        stop = start_row + len(rows)
        fits = spec.sharded and rows.dtype == spec.dtype and rows.shape[1:] == spec.row_shape
        if not fits or not 0 <= start_row <= stop <= spec.rows or not 0 <= view < spec.num_views:
            raise FeedfastError(
                f"{array}: expected rows {list(spec.row_shape)} {spec.dtype} within 0..{spec.rows} of views below "
                f"{spec.num_views}, found rows {list(rows.shape[1:])} {rows.dtype}, {start_row}..{stop} of view {view}"
            )
        if pixel_crc32c is not None and len(pixel_crc32c) != block_ends(spec, start_row, stop):
            expected = block_ends(spec, start_row, stop)
            raise FeedfastError(f"{array}: expected {expected} pixel checksums, found {len(pixel_crc32c)}")
        at = start_row
        while at < stop:
            shard = at // spec.shard_rows
            end = min(stop, spec.shard_span(shard)[1])
            if (view, shard) not in self._done[array]:
                gathering = self._gather(spec, view, shard, at)
                gathering.rows[gathering.filled : gathering.filled + end - at] = rows[at - start_row : end - start_row]
                gathering.filled += end - at
                gathering.saturated, saturated = gathering.saturated + saturated, 0
                if pixel_crc32c is not None:
                    first, last = block_ends(spec, start_row, at), block_ends(spec, start_row, end)
                    gathering.pixel_crc32c += pixel_crc32c[first:last]
                if end == spec.shard_span(shard)[1]:
                    del self._open[array, view]
                    self._submit(gathering)
            at = end

    def _gather(self, spec: ArraySpec, view: int, shard: int, row: int) -> Shard:
        first = spec.shard_span(shard)[0]
        current = self._open.get((spec.name, view))
        expected = first if current is None else spec.shard_span(current.shard)[0] + current.filled
        if row != expected or (current is not None and current.shard != shard):
            raise FeedfastError(f"{spec.name}: view {view}: rows must follow, expected row {expected}, found row {row}")
        if current is None:
            size = spec.shard_rows * spec.row_bytes
            with self._lock:
                spare = self._spare.get(size)
                memory = spare.pop() if spare else np.empty(size, np.uint8)
            rows = memory.view(spec.dtype).reshape(spec.shard_rows, *spec.row_shape)
            current = self._open[spec.name, view] = Shard(spec, view, shard, rows)
        return current

    def _submit(self, shard: Shard) -> None:
        self._slots.acquire()
        try:
            self._raise_pending()
            self._done[shard.spec.name].add((shard.view, shard.shard))
            self._pool.submit(self._finish, shard)
        except BaseException:
            self._slots.release()
            raise

    def _finish(self, shard: Shard) -> None:
        """In a worker: publish one shard. An error is kept for the caller and ends the work of all workers."""
        spec = shard.spec
        try:
            if self._error is None:
                expected, found = spec.real_blocks(shard.shard), len(shard.pixel_crc32c)
                if found not in (0, expected):
                    self._error = FeedfastError(f"{spec.name}: expected {expected} pixel checksums, found {found}")
                else:
                    self._commit(
                        spec, shard.view, shard.shard, encode_shard(shard), shard.saturated, shard.pixel_crc32c
                    )
        except BaseException as error:  # whatever it is, the caller's thread must hear of it
            self._error = self._error or error
        finally:
            with self._lock:
                self._spare.setdefault(shard.rows.nbytes, []).append(shard.rows.reshape(-1).view(np.uint8))
            self._slots.release()

    def _commit(
        self, spec: ArraySpec, view: int, shard: int, parts: list[Any], saturated: int = 0, pixels: Sequence[str] = ()
    ) -> None:
        """Publish an object, then its commit line."""
        key = spec.key(view, shard)
        crc, sha = 0, hashlib.sha256()
        for part in parts:
            crc = crc32c(part, crc)
            sha.update(part)
        target = object_path(self.root, spec.name, key)
        publish(
            self.root, target, [memoryview(part).cast("B") for part in parts], f"part-{self.part[0]}-of-{self.part[1]}"
        )
        earlier = self._commits.get((spec.name, key))
        commit = Commit(
            array=spec.name,
            shard=key,
            view=view,
            rows=spec.shard_span(shard),
            bytes=sum(memoryview(part).nbytes for part in parts),
            crc32c=f"{crc:08x}",
            sha256=sha.hexdigest(),
            manifest=self._digests[spec.name],
            saturated=saturated,
            pixel_crc32c=tuple(pixels),
            block_sums=block_sums(spec, parts),
            attempt=earlier.attempt + 1 if earlier else 0,
        )
        with self._lock:
            self._log(commit)
            self._commits[spec.name, key] = commit
            self.bytes_written += commit.bytes
            self.shards_written += 1

    def _log(self, commit: Commit) -> None:
        line = commit.to_line().encode()
        end = os.fstat(self._log_fd).st_size
        try:
            write_all(self._log_fd, [line])
            os.fsync(self._log_fd)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._log_fd, end)  # else the next writer cuts it
            raise write_error(error, self.root / COMMITS / log_name(self.part), len(line)) from error

    # ---- small arrays

    def put(self, array: str, values: Array, *, view: int | None = None) -> None:
        """Write a small array at once: ``views/…``, ``labels``, a tap's ``scale``. Durable on return.

        What is already there is compared and left alone, so the same call is right on resuming.

        Args:
            array: its name.
            values: the whole array, or with ``view`` that view's part of it.
            view: for arrays with a view axis.

        Raises:
            CacheMismatchError: other values are committed.
            FeedfastError: wrong shape or dtype, or a value that means "missing".
        """
        self._raise_pending()
        spec = self._small(array)
        expected = spec.shape if view is None else spec.shape[1:]
        if values.shape != expected or values.dtype != spec.dtype or (view is not None and not spec.views):
            raise FeedfastError(
                f"{array}: expected {list(expected)} {spec.dtype}, found {list(values.shape)} {values.dtype}"
                + ("" if view is None else f" for view {view}")
            )
        if holds_fill(spec, values):
            raise FeedfastError(f"{array}: holds {spec.fill}, which means a missing value")
        with manifest_lock(self.root):
            if self.missing(array):
                self._refresh(spec)
            numbers = [view] if view is not None else range(spec.num_views)
            chunks = [values] if view is not None or not spec.views else list(values)
            for number, chunk in zip(numbers, chunks, strict=True):
                if (number, 0) not in self._done[array]:
                    data = np.ascontiguousarray(chunk).tobytes()
                    content = [data, crc_bytes(crc32c(data))]
                    self._refuse_other_values(spec, number, content)
                    self._commit(spec, number, 0, content)
                    self._done[array].add((number, 0))
                elif self._read_small(spec, number).tobytes() != np.ascontiguousarray(chunk).tobytes():
                    raise CacheMismatchError(f"{self.root}: {array} of view {number}: other values are committed")

    def _refuse_other_values(self, spec: ArraySpec, number: int, content: list[bytes]) -> None:
        """A lost small array comes back as it was or not at all: codes mean nothing with another scale or order."""
        earlier = self._commits.get((spec.name, spec.key(number, 0)))
        if earlier is not None and hashlib.sha256(b"".join(content)).hexdigest() != earlier.sha256:
            raise CacheMismatchError(
                f"{self.root}: {spec.name} {spec.key(number, 0)} is lost, and its values cannot be made again: "
                "what this recipe gives differs from what was committed"
            )

    def _refresh(self, spec: ArraySpec) -> None:
        """Learn what other writers have committed of a small array since."""
        for commit in read_log(self.root).of(spec.name):
            place = spec.locate(commit.shard)
            if place not in self._done[spec.name] and (spec.name, commit.shard) not in self._commits:
                self._commits[spec.name, commit.shard] = commit
                self._done[spec.name].add(place)

    def _read_small(self, spec: ArraySpec, view: int) -> Array:
        key = spec.key(view, 0)
        commit = self._commits[spec.name, key]
        try:
            data = object_path(self.root, spec.name, key).read_bytes()
        except OSError as error:
            entry = problem(spec.name, key, "missing", str(error.strerror))
            raise CacheDamageError(f"{self.root}: {spec.name} {key}: {error.strerror}", [entry]) from error
        if len(data) != commit.bytes or hashlib.sha256(data).hexdigest() != commit.sha256:
            entry = problem(spec.name, key, "checksum", "not the object that was committed")
            raise CacheDamageError(
                f"{self.root}: {spec.name} {key}: not the object that was committed; "
                "delete the file to have it written again",
                [entry],
            )
        return np.frombuffer(data[:-4], spec.dtype).reshape(spec.chunk[1:] if spec.views else spec.chunk)

    def _spec(self, array: str) -> ArraySpec:
        if array not in self.specs:
            raise FeedfastError(f"{array}: the manifest has no such array")
        return self.specs[array]

    def _small(self, array: str) -> ArraySpec:
        spec = self._spec(array)
        if spec.sharded:
            raise FeedfastError(f"{array}: expected an array written at once, found one that is written by rows")
        return spec

    # ---- closing

    def _raise_pending(self) -> None:
        if self._error is not None:
            raise self._error
        if self._closed:
            raise FeedfastError(f"{self.root}: this writer is closed")

    def close(self) -> None:
        """Wait until everything appended is durable, and give the part back. Shards not full yet are not written.

        Raises:
            FeedfastError: a shard could not be written.
        """
        if self._closed:
            return
        self._pool.shutdown(wait=True)
        self._closed = True
        self._open.clear()
        self._spare.clear()
        os.close(self._log_fd)
        os.close(self._split_fd)
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        self._error = self._error or error  # what waits in the queue is dropped; it is computed again on resuming
        with contextlib.suppress(BaseException):
            self.close()
