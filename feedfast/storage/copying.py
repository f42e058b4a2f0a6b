"""Copying a cache from one store to another, checked against its commit log on the way.

Each object is read whole, compared with its line, put, and logged in the target; array metadata and the manifest come
last, so that a half made copy is no cache yet. The same call finishes it: what the target's log names, and is there
with its length, is not copied again. Only what is committed is copied, and the digest stays what it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np

from feedfast.errors import CacheDamageError, CacheMismatchError, FeedfastError, PartTakenError, RequestError
from feedfast.storage.blocks import crc32c
from feedfast.storage.create import manifest_lock, put_array_metadata, put_manifest, refuse_foreign
from feedfast.storage.layout import ArraySpec, array_specs
from feedfast.storage.log import (
    Commit,
    Log,
    check_length,
    check_log,
    digest_of,
    keep_index,
    log_name,
    object_key,
    parse_log,
    read_log,
)
from feedfast.storage.manifest import held_manifest, read_manifest
from feedfast.storage.schema import Manifest, describe_differences, differences
from feedfast.storage.shards import ArrayView, CommittedObject, checked
from feedfast.storage.store import COMMITS, Store

_OWNER: Final = "copy"
_THREADS: Final = 8
_HELD_BYTES: Final = 1 << 30  # 1 GiB: what the objects in flight may take


@dataclass(frozen=True)
class Copied:
    """What a copy did: objects and bytes of the cache, how much of it was copied now, and its digest."""

    objects: int
    total_bytes: int
    copied: int
    copied_bytes: int
    digest: str


def copy_cache(source: Store, target: Store, progress: Callable[[int, int], None] | None = None) -> Copied:
    """Copy a cache; `Copied.digest` is that of both.

    Args:
        source: which holds it.
        target: empty, or a copy of it that is not finished, or of what it was before it was extended.
        progress: called with (bytes there, bytes in all), from any thread.

    Raises:
        RequestError: there is no cache at the source, or something else at the target.
        CacheMismatchError: another cache is at the target.
        PartTakenError: somebody writes to the target.
        CacheDamageError: an object or the log of the source is damaged; what is copied by then is sound.
        FeedfastError: the target cannot be written.
    """
    if source.where() == target.where():
        raise RequestError(f"copy: expected two places, found {source.where()} twice")
    manifest = read_manifest(source)
    specs = array_specs(manifest)
    log = _sound_log(source, manifest, specs)
    _refuse_other(target, manifest)
    target.make()
    with contextlib.ExitStack() as held:
        held.enter_context(manifest_lock(target))  # marks the place, too: what is unfinished is known as ours
        split = target.join(f"{COMMITS}/.lock-split", "1")
        key = f"{COMMITS}/{log_name((0, 1))}"
        lines = None
        if not isinstance(split, str):
            held.enter_context(split)
            lines = target.open_log(key, lambda found: parse_log(found, key)[1])
        if lines is None:
            raise PartTakenError(f"{target.where()}: expected nobody to write there, found another process at work")
        held.enter_context(lines)
        target.sweep(lambda owner: owner == _OWNER)
        there = _there(target, log)
        missing = [commit for commit in log.commits.all() if (commit.array, commit.shard) not in there]
        total = sum(commit.bytes for commit in log.commits.all())
        done, guard = total - sum(commit.bytes for commit in missing), threading.Lock()

        def copy_one(commit: Commit) -> None:
            nonlocal done
            data = _checked(source, specs[commit.array], commit)
            target.put(object_key(commit.array, commit.shard), [data], _OWNER)
            with guard:
                lines.append(commit.to_line().encode())
                done += commit.bytes
                if progress is not None:
                    progress(done, total)

        largest = max((commit.bytes for commit in missing), default=1)
        pool = ThreadPoolExecutor(max(1, min(_THREADS, _HELD_BYTES // max(largest, 1))))
        try:
            for _ in pool.map(copy_one, missing):
                pass
        finally:
            pool.shutdown(cancel_futures=True)
        put_array_metadata(target, manifest)
        put_manifest(target, manifest)
    with contextlib.suppress(FeedfastError):  # readers do without
        keep_index(target, specs)
    digest = digest_of(read_log(target).commits.all())
    if digest != digest_of(log.commits.all()):
        raise FeedfastError(f"{target.where()}: expected the digest of {source.where()} after copying, found another")
    return Copied(len(log.commits), total, len(missing), sum(commit.bytes for commit in missing), digest)


def _sound_log(source: Store, manifest: Manifest, specs: dict[str, ArraySpec]) -> Log:
    log = read_log(source)
    wrong = [entry for entry in check_log(manifest, specs, log) if entry["kind"] != "log-torn"]
    if wrong:
        first = wrong[0]
        raise CacheDamageError(
            f"{source.where()}: commit log: {first['array']} {first['shard']}: {first['kind']}: {first['detail']}",
            wrong,
        )
    return log


def _refuse_other(target: Store, manifest: Manifest) -> None:
    """Raise unless the target is free, or holds a copy of this cache, or of a part of it."""
    refuse_foreign(target)
    held = held_manifest(target)
    if held is None:
        return
    found = differences(held, manifest, missing=True)
    if not found:
        here = array_specs(manifest)
        found = [
            (name, held.digest_for(name)[:12], manifest.digest_for(name)[:12] if name in here else None)
            for name in array_specs(held)
            if name not in here or manifest.digest_for(name) != held.digest_for(name)
        ]
    if found:
        raise CacheMismatchError(
            f"{target.where()}: expected nothing or a copy of the same cache, found another (expected = there)\n"
            f"{describe_differences(found)}"
        )


def _there(target: Store, log: Log) -> set[tuple[str, str]]:
    """What need not be copied again: logged in the target as in the source, and there with its length."""
    known = read_log(target)
    for key, commit in known.commits.items():
        if log.commits.get(key) != commit:
            raise CacheMismatchError(
                f"{target.where()}: expected nothing or an unfinished copy of the same cache, found another line for "
                f"{commit.array} {commit.shard} in its log"
            )
    found: set[tuple[str, str]] = set()
    looks: dict[str, Callable[[str], int]] = {}
    for key, commit in known.commits.items():
        if commit.array not in looks:
            looks[commit.array] = target.sizes(commit.array)
        if check_length(commit.bytes, partial(looks[commit.array], object_key(*key))) is None:
            found.add(key)
    return found


def _checked(source: Store, spec: ArraySpec, commit: Commit) -> memoryview:
    """The bytes of an object, which are those of its line.

    Raises:
        CacheDamageError: they are not.
    """
    view, shard = spec.locate(commit.shard)
    where = ArrayView(spec, source, view, {shard: commit.bytes})
    file, data = CommittedObject(where, shard, commit.bytes), np.empty(commit.bytes, np.uint8)

    def read() -> memoryview:
        file.read([data], 0)
        if f"{crc32c(data):08x}" != commit.crc32c or hashlib.sha256(data.data).hexdigest() != commit.sha256:
            raise where.damage("checksum", shard, "the object differs from its commit line")
        return data.data

    return checked(file, read)
