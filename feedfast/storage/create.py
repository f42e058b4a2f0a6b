"""Making a cache, or extending one: the root group with its manifest, and every array's `zarr.json`.

All of it is metadata; no object is ever touched, so adding a second teacher, a tap or a view costs milliseconds and
cannot harm what is stored. The root group is written first: a cache whose making was interrupted is recognized, and
finished by the next call. Every call brings the files into line with the manifest and writes only what differs.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, Final

from feedfast.errors import CacheMismatchError, FeedfastError, RequestError
from feedfast.provenance import Provenance, began_with
from feedfast.storage.layout import array_specs, group_metadata
from feedfast.storage.manifest import ROOT, read_manifest
from feedfast.storage.places import open_store
from feedfast.storage.schema import MAX_PASSES, Manifest, describe_differences, differences, merge
from feedfast.storage.store import COMMITS, MADE, Place, Store

PLAN_PROBE: Final = ".feedfast-plan-"  # begins the name of the file on which `plan` measures a disk
_LOCK: Final = ".lock-manifest"
_LOCK_PATIENCE_S: Final = 60.0


def open_for_writing(place: Place | Store, manifest: Manifest) -> Manifest:
    """Create or extend a cache; returns the stored manifest.

    Measured fields, and the grouping of rows into blocks and shards, are those of an existing cache: use what is
    returned. Safe against other processes doing the same.

    Raises:
        CacheMismatchError: the existing cache was made from something else; the message is a two-column table.
        RequestError: ``place`` holds something that is not a cache.
        CacheDamageError: the existing manifest cannot be read.
        FeedfastError: the disk is full.
    """
    store = open_store(place)
    refuse_foreign(store)
    store.make()
    with manifest_lock(store):
        store.sweep(lambda owner: owner == "manifest")
        existing = read_manifest(store) if ROOT in store.names() else None
        if existing is not None:
            found = differences(manifest, existing)
            if found:
                table = describe_differences(found)
                raise CacheMismatchError(f"{store.where()}: this cache was made from something else\n{table}")
        merged = merge(existing, manifest) if existing else manifest
        merged = Manifest.model_validate(merged.model_dump())  # together they must be sound, too
        put_manifest(store, merged)
        put_array_metadata(store, merged)
    return merged


def put_array_metadata(store: Store, manifest: Manifest) -> None:
    """Put the `zarr.json` of every array, and of the groups they are in but the root; its own is `put_manifest`'s."""
    groups: set[str] = set()
    for name, spec in array_specs(manifest).items():
        parents = [str(parent) for parent in PurePosixPath(name).parents if parent.name]
        for parent in reversed(parents):
            if parent not in groups:
                _put_metadata(store, parent, group_metadata())
        groups.update(parents)
        _put_metadata(store, name, spec.zarr_metadata())


def put_manifest(store: Store, manifest: Manifest) -> None:
    """Put the root's `zarr.json`, which makes a cache of what lies there."""
    _put_metadata(store, "", group_metadata(manifest.to_attrs()))


def record_pass(place: Place | Store, job: Provenance) -> None:
    """Name a job among the manifest's passes; with the same start, command and machine it is the same job.

    Raises:
        As of `open_for_writing`.
    """
    store = open_store(place)
    with manifest_lock(store):
        held = read_manifest(store)
        passes = began_with(held.passes, job, MAX_PASSES)
        put_manifest(store, held.model_copy(update={"passes": passes}))


def refuse_foreign(place: Place | Store) -> None:
    """Raise unless ``place`` is a cache, an empty directory or nothing yet.

    Raises:
        RequestError: something else is there.
    """
    store = open_store(place)
    names = store.names()
    if ROOT not in names and not {_LOCK, MADE} & set(store.names(COMMITS)):
        found = [name for name in names if name != COMMITS and not name.startswith(PLAN_PROBE)]
        if found:
            raise RequestError(f"{store.where()}: expected a feedfast cache or an empty directory, found {found[:5]}")


@contextlib.contextmanager
def manifest_lock(store: Store) -> Iterator[None]:
    """Held while the manifest, array metadata or small arrays are changed: moments, so waiting for it is fine.

    Raises:
        FeedfastError: another process held it for a minute.
    """
    key = f"{COMMITS}/{_LOCK}"
    lock = store.lock(key, patience_s=_LOCK_PATIENCE_S)
    if lock is None:
        raise FeedfastError(
            f"{store.where(key)}: another process has been changing this cache for {_LOCK_PATIENCE_S:.0f} s"
        )
    with lock:
        yield


def _put_metadata(store: Store, group: str, content: dict[str, Any]) -> None:
    """Put a group's or array's `zarr.json` unless it already holds exactly this."""
    key = f"{group}/{ROOT}" if group else ROOT
    data = (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()
    with contextlib.suppress(OSError):
        if store.read(key) == data:
            return
    store.put(key, [data], "manifest")
