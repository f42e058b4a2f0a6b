"""Random words that belong to (seed, view, purpose, sample): Philox4x64-10, a counter-based generator.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. A counter has no state, so any sample's words can
be had without those of others, in any order and on any machine; everything random about a view is mapped from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["RUN_SAMPLES", "Purpose", "as_ids", "many_words", "words"]


class Purpose(IntEnum):
    """What words are drawn for: the counter's third word. Never renumber one; add new ones at the end."""

    ORDER = 0
    CROP = 1
    FLIP = 2
    GRANULE = 3
    MIX = 4
    PARTNER = 5
    MIXING = 6
    OPERATION = 7
    KIND = 8
    POSITION = 9


_BLOCK_SAMPLES = 256  # drawn together; any multiple of 4 works, and changing it changes no value
RUN_SAMPLES = 1 << 16  # the most samples drawn in one go: bounds memory to about 12 MB of words


def as_ids(ids: ArrayLike) -> NDArray[np.int64]:
    """Sample ids, [n] int64.

    Raises:
        ValueError: no 1-D array of non-negative integers.
    """
    ids_n = np.asarray(ids)
    if ids_n.ndim != 1 or (ids_n.size and (ids_n.dtype.kind not in "iu" or ids_n.min() < 0)):
        raise ValueError(f"ids: expected a 1-D array of non-negative integers, got {ids_n.dtype} {ids_n.shape}")
    return ids_n.astype(np.int64)


def words(
    seed: int, view: int, purpose: int, pass_index: int, ids: NDArray[np.int64], count: int
) -> NDArray[np.uint64]:
    """The ``count`` 64-bit words that belong to each sample, [n, count]: stream positions id*count onwards.

    Philox's key is (seed, view); its counter's third word names the purpose (order, crop, flip, ...), the fourth the
    pass, and the first runs with the sample id: any range of samples can be drawn without the ones before it. Only raw
    words, a stream that NumPy guarantees, are taken and mapped to parameters by our own code: no NumPy release can move
    a crop by a pixel.
    """
    out = np.empty((len(ids), count), dtype=np.uint64)
    for where, first, samples in _runs(ids):
        philox = np.random.Philox(
            counter=np.array([first * count // 4, 0, purpose, pass_index], dtype=np.uint64),
            key=np.array([seed, view], dtype=np.uint64),
        )
        stream = np.asarray(philox.random_raw(samples * count), dtype=np.uint64).reshape(samples, count)
        out[where] = stream[ids[where] - first]
    return out


def many_words(seed: int, view: int, purpose: int, name: int, ids: NDArray[np.int64], count: int) -> NDArray[np.uint64]:
    """As `words`, [n, count], for samples that have many: only theirs are drawn, at some microseconds per sample.

    A sample has whole blocks of four words of the stream; ``name`` is the counter's fourth word.
    """
    unique, where = np.unique(ids, return_inverse=True)
    blocks = -(-count // 4)
    # A new generator per sample would take longer than its words.
    philox = np.random.Philox(
        counter=np.array([0, 0, purpose, name], dtype=np.uint64), key=np.array([seed, view], dtype=np.uint64)
    )
    out = np.empty((len(unique), 4 * blocks), np.uint64)
    at = 0
    for row, sample in enumerate(unique.tolist()):
        philox.advance((sample - at) * blocks)
        out[row] = philox.random_raw(4 * blocks)
        at = sample + 1
    return out[where][:, :count]


def _runs(ids: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], int, int]]:
    """Which ids to draw together: (their indices, first sample drawn, samples drawn), whole blocks each."""
    if ids.size == 0:
        return
    by_id = np.argsort(ids, kind="stable")
    block = ids[by_id] // _BLOCK_SAMPLES
    per_run = RUN_SAMPLES // _BLOCK_SAMPLES
    gap = np.flatnonzero(np.diff(block) > 1) + 1  # blocks nobody asked for are not drawn
    for piece in np.split(np.arange(len(ids)), gap):
        first_block = int(block[piece[0]])
        long = np.flatnonzero(np.diff((block[piece] - first_block) // per_run)) + 1
        for part in np.split(piece, long):
            first, last = int(block[part[0]]), int(block[part[-1]])
            yield by_id[part], first * _BLOCK_SAMPLES, (last - first + 1) * _BLOCK_SAMPLES
