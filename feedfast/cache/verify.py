"""Is this cache whole? Everything that is wrong with it, as a list, without stopping at the first.

The quick check reads the manifest, every array's metadata and the commit log, and looks up every committed file: what
is not committed, not there or of another length. The full check reads every byte too: each object against the
crc32c and sha256 of its commit line, each index, each block's own checksum, and the fill value in committed rows. A
damaged object is reported by block where the damage can be placed, otherwise as a whole.

Kinds: ``manifest``, ``metadata``, ``log-torn``, ``log-damaged``, ``log-duplicate``, ``manifest-digest``,
``incomplete``, ``missing``, ``length``, ``io``, and with the full check ``index``, ``checksum`` and ``fill``.

It says whether the cache holds what was written, not whether that was right: recomputing pixels and teachers is
`feedfast.stages.proof`. It changes nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from feedfast.cache.assemble import holds_fill
from feedfast.cache.blocks import crc32c
from feedfast.cache.layout import ArraySpec, array_specs
from feedfast.cache.log import Commit, Problem, check_log, object_key, problem, read_log
from feedfast.cache.manifest import ROOT, read_manifest
from feedfast.cache.shards import ArrayView, CommittedObject, OpenShard, read_small, thread_buffer
from feedfast.cache.store import Store, open_store
from feedfast.errors import CacheDamageError

_PIECE_BYTES = 4 << 20  # 4 MiB: what is hashed at a time
_THREADS = 2


def verify_cache(
    place: str | Path | Store, *, full: bool = False, progress: Callable[[int, int], None] | None = None
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
    log = read_log(store)
    problems = check_log(manifest, specs, log)
    broken = {(entry["array"], entry["shard"]) for entry in problems}
    tasks: list[tuple[ArrayView, int, Commit]] = []
    for spec in specs.values():
        problems += _check_metadata(store, spec)
        known = {}
        for commit in log.of(spec.name):
            if (commit.array, commit.shard) not in broken:
                known[spec.locate(commit.shard)] = commit
        for view in range(spec.num_views):
            sizes = {shard: known[view, shard].bytes for shard in range(spec.num_shards) if (view, shard) in known}
            sums = {shard: known[view, shard].block_sums for shard in sizes}
            source = ArrayView(spec, store, view, sizes, sums)
            for shard in range(spec.num_shards):
                commit_of = known.get((view, shard))
                key = spec.key(view, shard)
                if commit_of is not None:
                    tasks.append((source, shard, commit_of))
                elif (spec.name, key) not in broken:
                    problems.append(problem(spec.name, key, "incomplete", "not committed; feedfast cache writes it"))
    done, total = 0, sum(commit.bytes for _, _, commit in tasks)
    with ThreadPoolExecutor(_THREADS) as pool:
        checked = pool.map(lambda task: list(_check_object(*task, full=full)), tasks)
        for (_, _, commit), found in zip(tasks, checked, strict=True):
            problems += found
            done += commit.bytes
            if full and progress is not None:
                progress(done, total)
    return problems


def _check_metadata(store: Store, spec: ArraySpec) -> Iterator[Problem]:
    """Another Zarr reader believes the array's own `zarr.json`: it must say what the manifest says."""
    try:
        found = json.loads(store.read(object_key(spec.name, ROOT)))
    except (OSError, ValueError, RecursionError) as error:
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


def _check_object(source: ArrayView, number: int, commit: Commit, *, full: bool) -> Iterator[Problem]:
    try:
        file = CommittedObject(source, number)
        if not full:
            return
        found = list(_check_blocks(source, number))
        yield from found
        wrong = _hash_differences(file, commit)
        if wrong and not found:
            yield from source.damage("checksum", number, f"the object differs from its commit line: {wrong}").problems
    except CacheDamageError as error:
        yield from error.problems


def _check_blocks(source: ArrayView, number: int) -> Iterator[Problem]:
    spec = source.spec
    if not spec.sharded:
        data = read_small(source, number)
        if holds_fill(spec, data.view(spec.dtype)):
            yield from source.damage("fill", number, "a committed value is the fill value").problems
        return
    shard = OpenShard(source, number)
    first = number * spec.blocks_per_shard
    buffer = thread_buffer("block", spec.block_bytes)
    for block in range(first, first + spec.real_blocks(number)):
        try:
            shard.read([block], buffer)
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
