"""The manifest as it lies in a cache: in the attributes of the root group's `zarr.json`, read with suspicion.

Its size is checked before it is read, and everything in it by `feedfast.storage.schema`.
`feedfast.storage.create` writes it.
"""

from __future__ import annotations

from typing import Final

from feedfast.errors import CacheDamageError, CacheMismatchError, RequestError
from feedfast.files import MAX_JSON_BYTES, parse_json
from feedfast.storage.log import problem
from feedfast.storage.places import open_store
from feedfast.storage.schema import Manifest
from feedfast.storage.store import Place, Store, refuse_not_damage

ROOT: Final = "zarr.json"
MAX_MANIFEST_BYTES: Final = MAX_JSON_BYTES


def read_manifest(place: Place | Store) -> Manifest:
    """The manifest of a cache.

    Raises:
        RequestError: there is no cache at ``place``.
        CacheMismatchError: it is of another format.
        CacheDamageError: what is there is no sound manifest, or an implausibly large one (kind ``manifest``).
        FeedfastError: it may not be read, or not now.
    """
    store = open_store(place)
    file = store.where(ROOT)
    try:
        data = store.read(ROOT, MAX_MANIFEST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise RequestError(f"{store.where()}: expected a feedfast cache, found no {ROOT} in it") from None
    except OSError as error:
        refuse_not_damage(error, file)
        raise _damage(f"{file}: cannot be read: {error.strerror}") from error
    try:
        content = parse_json(data)
    except ValueError as error:
        raise _damage(f"{file}: not readable as JSON: {error}") from error
    attributes = content.get("attributes") if isinstance(content, dict) else None
    try:
        return Manifest.from_attrs(attributes if isinstance(attributes, dict) else {})
    except CacheMismatchError as error:
        raise CacheMismatchError(f"{file}: {error}") from error
    except CacheDamageError as error:
        raise _damage(f"{file}: {error}") from error


def held_manifest(place: Place | Store) -> Manifest | None:
    """The manifest of a cache, None where there is no cache yet; errors as of `read_manifest`."""
    store = open_store(place)
    return read_manifest(store) if ROOT in store.names() else None


def _damage(message: str) -> CacheDamageError:
    return CacheDamageError(message, [problem("", ROOT, "manifest", message)])
