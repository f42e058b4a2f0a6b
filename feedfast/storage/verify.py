"""Is this cache whole? Everything that is wrong with it, as a list, without stopping at the first.

The quick check reads the manifest, every array's metadata and the commit log, and looks up every committed file: what
is not committed, not there or of another length. The full check reads every byte too: each object against the
crc32c and sha256 of its commit line, each index, each block's own checksum, and the fill value in committed rows. A
damaged object is reported by block where the damage can be placed, otherwise as a whole.

Kinds: ``manifest``, ``metadata``, ``log-torn``, ``log-damaged``, ``log-duplicate``, ``manifest-digest``,
``incomplete``, ``missing``, ``length``, ``io``, and with the full check ``index``, ``checksum`` and ``fill``. Of each
the first thousand are listed: a manifest may promise more than any disk holds.

It says whether the cache holds what was written, not whether that was right: recomputing pixels and teachers is
`feedfast.stages.proof`. It changes nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import PurePosixPath

import numpy as np

from feedfast.errors import CacheDamageError, FeedfastError, RequestError
from feedfast.files import parse_json
from feedfast.storage.assemble import holds_fill
from feedfast.storage.blocks import crc32c
from feedfast.storage.index import INDEX, Commits, read_index
from feedfast.storage.layout import ArraySpec, array_specs, group_metadata
from feedfast.storage.log import (
    MAX_PROBLEMS,
    Commit,
    Log,
    Problem,
    check_length,
    check_log,
    object_key,
    problem,
    read_log,
)
from feedfast.storage.manifest import ROOT, read_manifest
from feedfast.storage.places import open_store
from feedfast.storage.shards import ArrayView, CommittedObject, OpenShard, small_pieces, thread_buffer
from feedfast.storage.store import Place, Store

_PIECE_BYTES = 4 << 20  # 4 MiB: what is hashed at a time
_THREADS = 2
_WHOLE_BYTES = 256 << 20  # 256 MiB; a far object up to this size is asked for once, and checked in memory


def verify_cache(
    place: Place | Store, *, full: bool = False, progress: Callable[[int, int], None] | None = None
) -> list[Problem]:
    """All problems of a cache; an empty list means that it is complete and sound.

    Args:
        place: the cache's folder.
        full: read and check every byte, not just lengths.
        progress: called with (bytes checked, bytes in all) of the full check, from the calling thread.

    Returns:
        One dict per problem: ``array``, ``shard`` (the object's key, or the log's file name), ``kind``, ``detail``;
        ``path`` and ``block`` where known. Sorted as the arrays are written, then by shard.

    Raises:
        RequestError: there is no cache at ``place``.
    """
    store = open_store(place)
    try:
        manifest = read_manifest(store)
    except CacheDamageError as error:
        return error.problems
    specs = array_specs(manifest)
    log = read_log(store, indexed=False)
    listed = _Listed()
    listed.extend(check_log(manifest, specs, log))
    listed.extend(_check_index(store, log))
    listed.extend(_check_groups(store, specs))
    broken = {(entry["array"], entry["shard"]) for entry in listed.problems}
    tasks: list[tuple[ArrayView, int, Commit]] = []
    by_array: dict[str, list[Commit]] = {}
    for commit in log.commits.values():
        if (commit.array, commit.shard) not in broken:
            by_array.setdefault(commit.array, []).append(commit)
    for spec in specs.values():
        listed.extend(_check_metadata(store, spec))
        known: dict[int, dict[int, Commit]] = {}
        for commit in by_array.get(spec.name, ()):
            view, shard = spec.locate(commit.shard)
            known.setdefault(view, {})[shard] = commit
        for view, shards in sorted(known.items()):
            sizes = {shard: commit.bytes for shard, commit in shards.items()}
            sums = {shard: commit.block_sums for shard, commit in shards.items()}
            source = ArrayView(spec, store, view, sizes, sums)
            tasks += [(source, shard, commit) for shard, commit in sorted(shards.items())]
        _list_uncommitted(listed, spec, known, broken)
    # Lengths of files are looked up by opening them, which tells more; of far objects by listing, which asks less.
    quick = {source.spec.name for source, _, _ in tasks if not full}
    looks = {name: store.sizes(name) if store.reach.threads else None for name in quick}
    done, total = 0, sum(commit.bytes for _, _, commit in tasks)
    with ThreadPoolExecutor(max(_THREADS, store.reach.threads // 4)) as pool:
        checked = pool.map(lambda task: list(_check_object(*task, full=full, look=looks.get(task[0].spec.name))), tasks)
        for (_, _, commit), found in zip(tasks, checked, strict=True):
            listed.extend(found)
            done += commit.bytes
            if full and progress is not None:
                progress(done, total)
    return listed.all()


def _check_index(store: Store, log: Log) -> Iterator[Problem]:
    """Readers believe the index instead of the lines: it must say the same."""
    index = read_index(store)
    if index is None:
        return
    for commit in Commits(index.arrays).all():
        line = log.commits.get((commit.array, commit.shard))
        if line != commit and (line is None or line.attempt <= commit.attempt):
            detail = f"{INDEX} says something else than its line; remove {INDEX}, which is made of the lines"
            yield problem(commit.array, commit.shard, "log-damaged", detail)


class _Listed:
    """Problems, at most `MAX_PROBLEMS` of a kind; of the others how many there were."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self._counts: Counter[str] = Counter()

    def extend(self, problems: Iterable[Problem]) -> None:
        for entry in problems:
            if self.room(entry["kind"]):
                self.problems.append(entry)
            self._counts[entry["kind"]] += 1

    def room(self, kind: str) -> int:
        return max(0, MAX_PROBLEMS - self._counts[kind])

    def count(self, kind: str, number: int) -> None:
        self._counts[kind] += number

    def all(self) -> list[Problem]:
        more = {kind: number - MAX_PROBLEMS for kind, number in self._counts.items() if number > MAX_PROBLEMS}
        return self.problems + [problem("", "", kind, f"and {number} more of these") for kind, number in more.items()]


def _list_uncommitted(
    listed: _Listed, spec: ArraySpec, known: Mapping[int, Mapping[int, Commit]], broken: Container[tuple[str, str]]
) -> None:
    """Objects without a commit line; no step is taken for those that are only counted."""
    lacking = spec.num_views * spec.num_shards - sum(map(len, known.values()))
    for view in range(spec.num_views):
        for shard in range(spec.num_shards):
            if not lacking or not listed.room("incomplete"):
                listed.count("incomplete", lacking)
                return
            if shard in known.get(view, ()):
                continue
            lacking -= 1
            key = spec.key(view, shard)
            if (spec.name, key) not in broken:
                detail = "not committed; feedfast cache writes it"
                listed.extend([problem(spec.name, key, "incomplete", detail)])


def _check_groups(store: Store, specs: Mapping[str, ArraySpec]) -> Iterator[Problem]:
    """Another Zarr reader finds arrays through their groups; the root's is the manifest."""
    parents = [str(parent) for name in specs for parent in reversed(PurePosixPath(name).parents) if parent.name]
    for group in dict.fromkeys(parents):
        try:
            found = parse_json(store.read(object_key(group, ROOT)))
        except (OSError, ValueError) as error:
            yield problem(group, ROOT, "metadata", f"cannot be read: {error}")
            continue
        if found != group_metadata():
            yield problem(group, ROOT, "metadata", f"expected a plain group, found {json.dumps(found)[:200]}")


def _check_metadata(store: Store, spec: ArraySpec) -> Iterator[Problem]:
    """Another Zarr reader believes the array's own `zarr.json`: it must say what the manifest says."""
    try:
        found = parse_json(store.read(object_key(spec.name, ROOT)))
    except (OSError, ValueError) as error:
        yield problem(spec.name, ROOT, "metadata", f"cannot be read: {error}")
        return
    expected = spec.zarr_metadata()
    if not isinstance(found, dict):
        yield problem(spec.name, ROOT, "metadata", f"expected an object, found {type(found).__name__}")
        return
    for key in expected.keys() - {"attributes"}:
        if found.get(key) != expected[key]:
            detail = f"{key}: expected {json.dumps(expected[key])}, found {json.dumps(found.get(key))[:200]}"
            yield problem(spec.name, ROOT, "metadata", detail)


def _check_object(
    source: ArrayView, number: int, commit: Commit, *, full: bool, look: Callable[[str], int] | None
) -> Iterator[Problem]:
    """Problems of one object. ``look`` finds lengths where opening the object just for that would take too long."""
    try:
        if not full and look is not None:
            wrong = check_length(commit.bytes, partial(look, source.object_key(number)))
            if wrong is not None:
                yield from source.damage(wrong[0], number, wrong[1]).problems
            return
        file = CommittedObject(source, number, commit.bytes if full and commit.bytes <= _WHOLE_BYTES else 0)
        if not full:
            return
        found = list(_check_blocks(file))
        yield from found
        differing = _hash_differences(file, commit)
        if differing and not found and file.refetch():
            differing = _hash_differences(file, commit)
        if differing and not found:
            detail = f"the object differs from its commit line: {differing}"
            yield from source.damage("checksum", number, detail).problems
    except CacheDamageError as error:
        yield from error.problems
    except RequestError:
        raise
    except FeedfastError as error:  # not damage, but not known to be sound either
        yield problem(source.spec.name, source.spec.key(source.view, number), "io", str(error))


def _check_blocks(file: CommittedObject) -> Iterator[Problem]:
    source, number, spec = file.source, file.number, file.source.spec
    if not spec.sharded:
        filled = False
        for piece in small_pieces(file, _PIECE_BYTES):  # to the end: the checksum comes last
            filled |= holds_fill(spec, piece.view(spec.dtype))
        if filled:
            yield from source.damage("fill", number, "a committed value is the fill value").problems
        return
    shard = OpenShard(source, number, file)
    first = number * spec.blocks_per_shard
    buffer = thread_buffer("block", spec.block_bytes)
    for block in range(first, first + spec.real_blocks(number)):
        try:
            shard.read([block], [[buffer]])
        except CacheDamageError as error:
            yield from error.problems


def _hash_differences(file: CommittedObject, commit: Commit) -> str:
    piece = np.empty(min(_PIECE_BYTES, max(1, file.size)), np.uint8)
    crc, sha = 0, hashlib.sha256()
    for offset in range(0, file.size, len(piece)):
        part = piece[: min(len(piece), file.size - offset)]
        file.read([part], offset)
        crc = crc32c(part, crc)
        sha.update(part.data)
    found: Mapping[str, tuple[str, str]] = {
        "crc32c": (commit.crc32c, f"{crc:08x}"),
        "sha256": (commit.sha256, sha.hexdigest()),
    }
    return "; ".join(f"{name} expected {a}, found {b}" for name, (a, b) in found.items() if a != b)
