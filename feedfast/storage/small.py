"""Small arrays, written whole: one object per array, or per view of it, with a crc32c at its end.

View parameters, labels and scales are what every row's meaning hangs on. So they are durable before rows follow, are
compared with what is committed instead of written again, and when lost must be restored byte-identical.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from feedfast.errors import CacheDamageError, CacheMismatchError, FeedfastError
from feedfast.storage import names
from feedfast.storage.assemble import holds_fill
from feedfast.storage.blocks import crc32c, crc_bytes
from feedfast.storage.create import manifest_lock
from feedfast.storage.layout import ArraySpec
from feedfast.storage.ledger import Ledger
from feedfast.storage.log import object_key, problem

Array = npt.NDArray[Any]


def put_small(ledger: Ledger, array: str, values: Array, view: int | None = None) -> None:
    """Write a small array at once; see `feedfast.storage.writer.CacheWriter.put`."""
    spec = _small_spec(ledger, array)
    expected = spec.shape if view is None else spec.shape[1:]
    if values.shape != expected or values.dtype != spec.dtype or (view is not None and not spec.views):
        raise FeedfastError(
            f"{array}: expected {list(expected)} {spec.dtype}, found {list(values.shape)} {values.dtype}"
            + ("" if view is None else f" for view {view}")
        )
    if holds_fill(spec, values):
        raise FeedfastError(f"{array}: holds {spec.fill}, which means a missing value")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise FeedfastError(f"{array}: expected finite values, found {int((~np.isfinite(values)).sum())} that are not")
    with manifest_lock(ledger.store):
        if ledger.missing(array):
            ledger.refresh(array)
        numbers = [view] if view is not None else range(spec.num_views)
        chunks = [values] if view is not None or not spec.views else list(values)
        for number, chunk in zip(numbers, chunks, strict=True):
            data = np.ascontiguousarray(chunk).tobytes()
            if (number, 0) not in ledger.done[array]:
                content = [data, crc_bytes(crc32c(data))]
                _refuse_other_values(ledger, spec, number, content)
                ledger.commit(spec, number, 0, content)
                ledger.done[array].add((number, 0))
            elif _read(ledger, spec, number).tobytes() != data:
                raise CacheMismatchError(
                    f"{ledger.store.where()}: {array} of view {number}: other values are committed"
                )


def read_stored(ledger: Ledger, array: str) -> Array | None:
    """A committed small array, or None while any of its objects is missing.

    Raises:
        CacheDamageError: an object is not the one that was committed.
    """
    spec = _small_spec(ledger, array)
    if ledger.missing(array):
        return None
    chunks = [_read(ledger, spec, view) for view in range(spec.num_views)]
    return np.stack(chunks).reshape(spec.shape) if spec.views else chunks[0]


def _small_spec(ledger: Ledger, array: str) -> ArraySpec:
    spec = ledger.spec(array)
    if spec.sharded:
        raise FeedfastError(f"{array}: expected an array written at once, found one that is written by rows")
    return spec


def _refuse_other_values(ledger: Ledger, spec: ArraySpec, number: int, content: list[bytes]) -> None:
    # What was lost must be restored byte-identical: rows mean nothing in another order. A scale may change: codes name
    # the one they were made with, and with another one they are absent.
    target = names.parse(spec.name)
    if target is not None and target.part == "scale":
        return
    earlier = ledger.commits.get((spec.name, spec.key(number, 0)))
    if earlier is not None and hashlib.sha256(b"".join(content)).hexdigest() != earlier.sha256:
        raise CacheMismatchError(
            f"{ledger.store.where()}: {spec.name} {spec.key(number, 0)} is lost, and its values cannot be made again: "
            "what this recipe gives differs from what was committed"
        )


def _read(ledger: Ledger, spec: ArraySpec, view: int) -> Array:
    key = spec.key(view, 0)
    commit = ledger.commits[spec.name, key]
    where = f"{ledger.store.where()}: {spec.name} {key}"
    try:
        data = ledger.store.read(object_key(spec.name, key), spec.block_bytes + 4)
    except OSError as error:
        entry = problem(spec.name, key, "missing", str(error.strerror))
        raise CacheDamageError(f"{where}: {error.strerror}", [entry]) from error
    if len(data) != commit.bytes or hashlib.sha256(data).hexdigest() != commit.sha256:
        entry = problem(spec.name, key, "checksum", "not the object that was committed")
        raise CacheDamageError(
            f"{where}: not the object that was committed; delete the file to have it written again", [entry]
        )
    return np.frombuffer(data[:-4], spec.dtype).reshape(spec.chunk[1:] if spec.views else spec.chunk)
