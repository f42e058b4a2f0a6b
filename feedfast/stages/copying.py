"""`feedfast copy`: a cache from a folder to a bucket, back, or from anywhere to anywhere else."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from feedfast.stages.progress import Meter, format_bytes
from feedfast.storage.copying import copy_cache
from feedfast.storage.places import open_store

log = logging.getLogger(__name__)

_MIB = 1 << 20


def run_copy(source: str, target: str) -> dict[str, Any]:
    """Copy a cache; the same call continues one that was interrupted.

    Args:
        source: a folder or the URL of a bucket with a prefix.
        target: likewise; empty, or an earlier copy of the same cache.

    Returns:
        The JSON of `feedfast copy`: ``source``, ``target``, ``objects``, ``bytes``, ``objects_copied``,
        ``bytes_copied``, ``seconds``, ``digest`` (of both).

    Raises:
        RequestError, CacheMismatchError, CacheDamageError, FeedfastError: see `feedfast.storage.copying.copy_cache`.
    """
    came, went = open_store(source), open_store(target)
    began, guard, shown = time.perf_counter(), threading.Lock(), 0
    meter: Meter | None = None

    def progress(done: int, total: int) -> None:
        nonlocal meter, shown
        with guard:
            if meter is None:
                meter = Meter("copy", -(-total // _MIB), "MiB").__enter__()
            meter.advance(done // _MIB - shown, f"{format_bytes(done)} of {format_bytes(total)}")
            shown = done // _MIB

    try:
        found = copy_cache(came, went, progress)
    finally:
        if meter is not None:
            meter.__exit__(None, None, None)
    log.info(
        "copy: %s of %s objects (%s) copied from %s to %s, the others were there",
        *(f"{found.copied:,}", f"{found.objects:,}", format_bytes(found.copied_bytes), came.where(), went.where()),
    )
    return {
        "source": came.where(),
        "target": went.where(),
        "objects": found.objects,
        "bytes": found.total_bytes,
        "objects_copied": found.copied,
        "bytes_copied": found.copied_bytes,
        "seconds": time.perf_counter() - began,
        "digest": found.digest,
    }
