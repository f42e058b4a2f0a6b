"""Making a cache, or extending one: the root group with its manifest, and every array's `zarr.json`.

All of it is metadata; no object is ever touched, so adding a second teacher, a tap or a view costs milliseconds and
cannot harm what is stored. The root group is written first: a cache whose making was interrupted is recognized, and
finished by the next call. Every call brings the files into line with the manifest and writes only what differs.
"""

from __future__ import annotations

from pathlib import Path

from feedfast.cache.layout import array_specs, group_metadata
from feedfast.cache.log import COMMITS
from feedfast.cache.schema import Manifest, describe_differences, differences, merge
from feedfast.cache.store import ROOT, make_dirs, manifest_lock, publish_json, read_manifest, remove_stale
from feedfast.errors import CacheMismatchError, RequestError


def open_for_writing(path: str | Path, manifest: Manifest) -> Manifest:
    """Make a cache for ``manifest``, or extend the one that is there; the manifest the cache then has.

    Found-out fields and the grouping of rows into blocks and shards of an existing cache are kept, so use what is
    returned. Safe against other processes doing the same. No object is touched.

    Raises:
        CacheMismatchError: the existing cache was made from something else; the message is a two-column table.
        RequestError: ``path`` holds something that is not a cache.
        CacheDamageError: the existing manifest cannot be read.
        FeedfastError: the disk is full.
    """
    root = Path(path)
    refuse_foreign(root)
    try:
        make_dirs(root.absolute() / COMMITS)
    except OSError as error:
        raise RequestError(f"{root}: cannot be made: {error.strerror}") from error
    with manifest_lock(root):
        remove_stale(root, part=None)
        existing = read_manifest(root) if (root / ROOT).exists() else None
        if existing is not None:
            found = differences(manifest, existing)
            if found:
                table = describe_differences(found)
                raise CacheMismatchError(f"{root}: this cache was made from something else\n{table}")
        merged = merge(existing, manifest) if existing else manifest
        merged = Manifest.model_validate(merged.model_dump())  # together they must be sound, too
        publish_json(root, root / ROOT, group_metadata(merged.to_attrs()), "manifest")
        groups: set[str] = set()
        for name, spec in array_specs(merged).items():
            parents = [parent for parent in map(str, Path(name).parents) if parent != "." and parent not in groups]
            for parent in reversed(parents):
                publish_json(root, root / parent / ROOT, group_metadata(), "manifest")
            groups.update(parents)
            publish_json(root, root / name / ROOT, spec.zarr_metadata(), "manifest")
    return merged


def refuse_foreign(root: Path) -> None:
    """Raise unless ``root`` is a cache, an empty directory or nothing yet.

    Raises:
        RequestError: something else is there.
    """
    place = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.exists())
    if not place.is_dir():
        raise RequestError(f"{root}: expected a directory or nothing, found a file at {place}")
    if root.is_dir() and not (root / ROOT).exists() and not (root / COMMITS / ".lock-manifest").exists():
        found = sorted(entry.name for entry in root.iterdir() if entry.name != COMMITS)
        if found:
            raise RequestError(f"{root}: expected a feedfast cache or an empty directory, found {found[:5]}")
