"""An open cache: what is in it, small arrays whole, any rows of a view, and streams of batches.

Opening reads two things and trusts neither: the manifest (bounds checked before anything is allocated) and the commit
log, every line of which must name an object of this manifest and carry the digest of what that array depends on.
A manifest from another recipe or other weights under the same name therefore end here. Before anything is streamed, all
files it will need are looked up and their lengths compared with the log, so that a gap is known before the first step
and not hours into the run; checksums follow while reading (`feedfast.storage.shards`).

Arrays go by the names of the format, ``targets/TEACHER/TAP/codes``. Values are stored codes, channels last; `scale`
gives what turns them into values. This module never writes and knows neither models nor images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from feedfast.errors import CacheDamageError, RequestError
from feedfast.storage import names
from feedfast.storage.assemble import holds_fill
from feedfast.storage.index import BlockSums, ViewCommits
from feedfast.storage.layout import ArraySpec, array_specs
from feedfast.storage.log import MAX_PROBLEMS, Commit, Problem, check_length, check_log, digest_of, problem, read_log
from feedfast.storage.manifest import read_manifest
from feedfast.storage.places import open_store
from feedfast.storage.segments import Array, BufferPool, Segment, shaped
from feedfast.storage.shards import ArrayView, ShardFiles, read_small
from feedfast.storage.store import Place, Store
from feedfast.storage.stream import MAX_BUFFER_BYTES, Stream
from feedfast.storage.tier import Tier

_SHOWN: Final = 5  # problems spelled out in a message; all of them are in the error's list


class CacheReader:
    """Reads a cache. Safe to use from several threads; after `close` still usable, just without its open files."""

    def __init__(self, place: Place | Store, *, threads: int = 2, tier: Tier | None = None) -> None:
        """Open a cache.

        Args:
            place: the cache's folder, or a bucket with a prefix.
            threads: threads of each stream that read, check and decode; 2 saturate a step of most students. More are
                started where the consumer has to wait for a bucket.
            tier: where objects of a bucket are kept as they are read.

        Raises:
            RequestError: there is no cache at ``place``.
            CacheDamageError: the manifest or the commit log is damaged, or they do not belong together.
        """
        self._store, self._tier = open_store(place, tier), tier
        self.path: Place = self._store.place
        self.manifest = read_manifest(self._store)
        self.specs: dict[str, ArraySpec] = array_specs(self.manifest)
        self.log = read_log(self._store)
        self.threads = threads
        problems = [entry for entry in check_log(self.manifest, self.specs, self.log) if entry["kind"] != "log-torn"]
        if problems:
            raise _damage(self.path, problems)
        self._commits: dict[tuple[str, int], dict[int, Commit]] = {}
        for commit in self.log.commits.lines.values():
            view, shard = self.specs[commit.array].locate(commit.shard)
            self._commits.setdefault((commit.array, view), {})[shard] = commit
        self._files = ShardFiles()
        self._pool = BufferPool()

    def __reduce__(self) -> tuple[Any, tuple[str, int, Tier | None]]:
        return _reopened, (str(self.path), self.threads, self._tier)

    def __enter__(self) -> CacheReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the shard files that no stream is reading."""
        self._files.clear()

    @property
    def original(self) -> bool:
        """Whether it lies where it was made: not copied or downloaded since, and in no bucket, which proves nothing."""
        return bool(self.manifest.folder) and self.manifest.folder == self._store.number()

    def committed(self, array: str, view: int = 0) -> Mapping[int, Commit]:
        """Commit lines of one view of an array by shard number; saturation counts are in them.

        Raises:
            RequestError: no such array or view.
        """
        self._spec(array, view)
        lines = self._commits.get((array, view), {})
        indexed = self.log.commits.of_view(array, view)
        if indexed is None:
            return lines
        indexed.lines |= lines
        return indexed

    def digest(self, arrays: Iterable[str] | None = None, views: int | None = None) -> str:
        """Sha256 (hex) over the committed objects in canonical order: of some arrays, of the first views."""
        wanted = set(self.specs if arrays is None else arrays)
        return digest_of(
            commit
            for commit in self.log.commits.all()
            if commit.array in wanted and (views is None or not self.specs[commit.array].views or commit.view < views)
        )

    @property
    def complete(self) -> bool:
        """Whether every object of the manifest is committed."""
        return len(self.log.commits) == sum(spec.num_views * spec.num_shards for spec in self.specs.values())

    def missing(
        self, arrays: Iterable[str] | None = None, views: Iterable[int] | None = None
    ) -> list[tuple[str, int, int]]:
        """What is not committed, as (array, view, shard). None means all arrays, all views of the manifest.

        Raises:
            RequestError: no such array or view.
        """
        wanted = None if views is None else set(views)
        gaps = []
        for array in self.specs if arrays is None else arrays:
            spec = self._spec(array)
            for view in range(spec.num_views) if wanted is None or not spec.views else sorted(wanted):
                known = self.committed(array, view)
                gaps += [(array, view, shard) for shard in range(spec.num_shards) if shard not in known]
        return gaps

    def require(self, arrays: Iterable[str], views: Iterable[int], *, stop: int | None = None) -> None:
        """Make sure that these arrays are complete and every file is there with its committed length.

        Args:
            arrays: names of arrays.
            views: which views.
            stop: of sharded arrays only those shards count that hold rows before it.

        Raises:
            RequestError: no such array or view.
            CacheDamageError: kinds ``incomplete``, ``missing``, ``length`` and ``io``; ``problems`` holds a thousand.
        """
        views = list(views)
        problems: list[Problem] = []
        for array in arrays:
            spec = self._spec(array)
            look = self._store.sizes(array)
            for view in views if spec.views else [0]:
                shards = spec.num_shards if stop is None or not spec.sharded else -(-stop // spec.shard_rows)
                problems += self._absent(self._source(array, view), range(min(shards, spec.num_shards)), look)
                if len(problems) >= MAX_PROBLEMS:
                    raise _damage(self.path, problems)
        if problems:
            raise _damage(self.path, problems)

    def read_array(self, array: str, view: int = 0) -> Array:
        """A small array: one view's ``views/...`` [row, ...], ``labels`` [sample], or a tap's ``scale`` [2, channel].

        Raises:
            RequestError: no such array or view, or a sharded one (`read_rows` and `stream` read those).
            CacheDamageError: not committed, missing, of another length, or damaged.
        """
        spec = self._spec(array, view)
        if spec.sharded:
            raise RequestError(f"{array} is too large to be read whole; read_rows and stream give rows of it")
        source = self._source(array, view)
        data = read_small(source)
        if holds_fill(spec, data.view(spec.dtype)):
            raise source.damage("fill", 0, "a committed value is the fill value")
        return data.view(spec.dtype).reshape(spec.shape[1:] if spec.views else spec.shape)

    def scale(self, teacher: str, tap: str) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Offset and step per channel, float32 [C]: value = offset + step * code.

        Raises:
            RequestError: no such teacher or tap.
            CacheDamageError: as `read_array`.
        """
        offset, step = self.read_array(names.scale(teacher, tap))
        return offset, step

    def read_rows(self, array: str, view: int, rows: Sequence[int] | npt.NDArray[np.integer[Any]]) -> Array:
        """Rows of a view in any order, for looking around; streams are the fast way.

        Returns:
            [len(rows), *row_shape] in the stored dtype, a new array.

        Raises:
            RequestError: no such array, view or row.
            CacheDamageError: a shard or block of them is missing or damaged.
        """
        spec = self._spec(array, view)
        if not spec.sharded:
            return self.read_array(array, view)[_checked_rows(rows, spec)]
        source = self._source(array, view)
        segment = Segment(_checked_rows(rows, spec), 0, len(rows))
        out = np.empty(len(rows) * spec.row_bytes, np.uint8)
        for first, last in segment.jobs(spec, self._store.reach.job_bytes):
            segment.read(source, self._files, [(0, out)], first, last)
        return shaped(out, spec)

    def stream(
        self,
        arrays: Sequence[str],
        view: int,
        rows: Sequence[int] | npt.NDArray[np.integer[Any]] | None = None,
        batch_size: int = 128,
        *,
        start_batch: int = 0,
        drop_last: bool = False,
        prefetch: int = 3,
        max_buffer_bytes: int = MAX_BUFFER_BYTES,
    ) -> Stream:
        """Batches of rows, read ahead by threads.

        Args:
            arrays: names of sharded arrays.
            view: which view.
            rows: row numbers in the wanted order; None is the stored order, which is the view's own epoch.
            batch_size: rows per batch; batch k holds ``rows[k * batch_size : (k + 1) * batch_size]``.
            start_batch: first batch to hand out; nothing before it is read.
            drop_last: leave out a last batch with fewer rows.
            prefetch: batches made ready ahead of the consumer.
            max_buffer_bytes: what the stream may hold, see `Stream`.

        Returns:
            An iterator of dicts, array name to [b, *row_shape] in the stored dtype. See `Stream` for how long the
            arrays may be kept (as long as you like) and how the threads end (by themselves).

        Raises:
            RequestError: no such array, view or row, or a small array (`read_array` has those).
            CacheDamageError: shards of these rows are not committed, missing, or of another length: all of them, now.
                While iterating: a block is damaged; raised when its batch is reached.
        """
        if not arrays or len(set(arrays)) != len(arrays):
            raise RequestError(f"arrays: expected different names, at least one, found {list(arrays)}")
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("start_batch", start_batch, 0),
            ("prefetch", prefetch, 0),
        ):
            if value < least:
                raise RequestError(f"{name}: expected at least {least}, found {value}")
        sources = []
        for array in arrays:
            if not self._spec(array, view).sharded:
                raise RequestError(f"{array} is one small array; read_array gives it whole")
            sources.append(self._source(array, view))
        wanted = _checked_rows(np.arange(self.manifest.num_rows) if rows is None else rows, sources[0].spec)
        coming = wanted[start_batch * batch_size :]
        problems = []
        for source in sources:
            shards = np.unique(coming // source.spec.shard_rows).tolist()
            problems += self._absent(source, shards, self._store.sizes(source.spec.name))
        if problems:
            raise _damage(self.path, problems)
        return Stream(
            sources,
            wanted,
            batch_size,
            start_batch=start_batch,
            drop_last=drop_last,
            prefetch=prefetch,
            threads=self.threads,
            files=self._files,
            pool=self._pool,
            reach=self._store.reach,
            max_buffer_bytes=max_buffer_bytes,
        )

    def _spec(self, array: str, view: int = 0) -> ArraySpec:
        spec = self.specs.get(array)
        if spec is None:
            raise RequestError(f"{self.path}: no array {array!r}; it has {', '.join(self.specs)}")
        if not 0 <= view < spec.num_views:
            raise RequestError(f"{self.path}: {array} has views 0 to {spec.num_views - 1}, asked for {view}")
        return spec

    def _source(self, array: str, view: int) -> ArrayView:
        commits = self.committed(array, view)
        if isinstance(commits, ViewCommits):
            return ArrayView(self.specs[array], self._store, view, commits.sizes, BlockSums(commits))
        sizes = {shard: commit.bytes for shard, commit in commits.items()}
        sums = {shard: commit.block_sums for shard, commit in commits.items()}
        return ArrayView(self.specs[array], self._store, view, sizes, sums)

    def _absent(self, source: ArrayView, shards: Iterable[int], look: Callable[[str], int]) -> list[Problem]:
        problems: list[Problem] = []
        for shard in shards:
            if len(problems) >= MAX_PROBLEMS:
                break  # a manifest may promise more than any disk holds
            key, expected = source.spec.key(source.view, shard), source.sizes.get(shard)
            if expected is None:
                problems.append(problem(source.spec.name, key, "incomplete", "not committed"))
                continue
            wrong = check_length(expected, partial(look, source.object_key(shard)))
            if wrong is not None:
                problems.append(problem(source.spec.name, key, *wrong))
        return problems


def _checked_rows(rows: Sequence[int] | npt.NDArray[np.integer[Any]], spec: ArraySpec) -> npt.NDArray[np.int64]:
    found = np.asarray(rows)
    if found.size == 0:
        return np.empty(0, np.int64)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise RequestError(f"rows: expected a list of row numbers, found {found.dtype} of shape {list(found.shape)}")
    if int(found.min()) < 0 or int(found.max()) >= spec.rows:
        raise RequestError(f"rows: expected 0 to {spec.rows - 1}, found {found.min()} to {found.max()}")
    return found.astype(np.int64, copy=False)


def _reopened(place: str, threads: int, tier: Tier | None) -> CacheReader:
    """In another process."""
    return CacheReader(place, threads=threads, tier=tier)


def _damage(path: Place, problems: Sequence[Problem]) -> CacheDamageError:
    lines = [f"  {entry['array']} {entry['shard']}: {entry['kind']}: {entry['detail']}" for entry in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        lines.append(f"  … and {len(problems) - _SHOWN} more")
    count = f"{len(problems)} or more" if len(problems) >= MAX_PROBLEMS else str(len(problems))
    if all(entry["kind"] == "incomplete" for entry in problems):
        head = f"{path}: the cache is incomplete, {count} objects are not committed; run feedfast cache"
    else:
        head = f"{path}: {count} problems; feedfast verify lists them, feedfast cache computes lost shards again"
    return CacheDamageError("\n".join([head, *lines]), problems)
