"""From where a user says a cache is to the store that holds it: a folder, or a bucket's URL with a prefix.

The only place that knows both kinds; everybody else has a `feedfast.storage.store.Store` and asks no further.
"""

from __future__ import annotations

from pathlib import Path

from feedfast.storage.bucket import Bucket
from feedfast.storage.disk import Disk
from feedfast.storage.store import Place, Store
from feedfast.storage.tier import Tier


def place_of(text: Place) -> Place:
    """A bucket's URL as it is, anything else as the path of a folder."""
    return text if isinstance(text, str) and "://" in text else Path(text)


def open_store(place: Place | Store, tier: Tier | None = None) -> Store:
    """The store at a place; a store is returned as it is.

    Args:
        place: a folder, or ``s3://``, ``gs://`` or ``az://``, bucket and prefix.
        tier: where objects of a bucket are kept as they are read; a folder is near enough.

    Raises:
        RequestError: no such kind of place, or the package for buckets is missing.
    """
    if not isinstance(place, str | Path):
        return place
    place = place_of(place)
    return Disk(place) if isinstance(place, Path) else Bucket(place, tier=tier)
