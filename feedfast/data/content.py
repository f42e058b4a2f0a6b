"""The bytes of a sample as a cache knows them: one 64-bit number per sample, compared each time the sample is read.

A fingerprint looks at 256 samples; an image that is replaced elsewhere would be trained on under the maps of another.
The number is a crc32c and a length, not a cryptographic hash: it is to find accidents, at 20 GB/s, in every epoch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from feedfast.errors import CacheMismatchError

__all__ = ["content_hash", "refuse_changed"]

_SHOWN = 5


def content_hash(samples: Iterable[NDArray[np.uint8]]) -> NDArray[np.uint64]:
    """crc32c in the lower 32 bits, the number of bytes in the upper ones; 2^64 - 1, which means missing, is one less.

    Args:
        samples: the bytes of each, C-contiguous of any shape.

    Returns:
        uint64 [n].
    """
    found = [(len(flat) & 0xFFFFFFFF) << 32 | google_crc32c.extend(0, flat) for flat in map(np.ravel, samples)]
    return np.minimum(np.array(found, dtype=np.uint64), np.uint64(2**64 - 2))


def refuse_changed(
    source: str, names: Sequence[str], ids: NDArray[Any], found: NDArray[np.uint64], expected: NDArray[np.uint64]
) -> None:
    """Raise unless some samples, whose names and ids are for the message, still have the bytes they had.

    Raises:
        CacheMismatchError: the changed ones are named.
    """
    wrong = np.flatnonzero(found != expected)
    if wrong.size:
        shown = ", ".join(f"{names[at]} (sample {ids[at]})" for at in wrong[:_SHOWN].tolist())
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise CacheMismatchError(
            f"{source}: {shown}{more}: the image has changed since the cache was made; put the old one back, "
            "or cache again"
        )
