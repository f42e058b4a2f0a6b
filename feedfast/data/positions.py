"""Which positions of a map are stored where a tap is sampled: a pure function of seed, view, sample, tap and share.

    Hilbert curve through the map, cut into P runs of cells ──► one cell of every run, drawn by Philox

Runs of a curve that stays close to itself are small patches, so every part of the map has its share: the variance of a
sum over the map is that within patches. All positions have the same expected share, exactly P / (H * W) (but for 2^-32
of it), so a mean over the chosen ones is unbiased without weights. Where P does not divide H * W the runs differ by one
cell; then the cuts are moved along the closed curve by a drawn number of cells, which makes all shares equal again.
The positions of a sample are distinct. Teachers of one grid and share have them in common: the student's map is
gathered once per tap.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from feedfast.data.views import POSITION

ALGORITHM: Final = "hilbert-philox4x64-10/1"
"""Curve, generator and mapping; any change that moves a position raises the number."""


def positions_per_map(share: float, height: int, width: int) -> int:
    """P, how many of a map's positions are stored: ``share`` of them, rounded half to even, at least 1."""
    return max(1, round(share * height * width))


def sample_positions(
    seed: int, view: int, ids: NDArray[np.integer], tap: str, height: int, width: int, count: int
) -> NDArray[np.int32]:
    """The stored positions of some samples' maps.

    Args:
        seed: of the view plan.
        view: which view.
        ids: [n], the samples, in any order and any batch: each has its own.
        tap: its name.
        height: of the map.
        width: of the map.
        count: P, 1 to height * width.

    Returns:
        int32 [n, P], y * width + x, distinct per row, along the curve.
    """
    cells = height * width
    starts = np.arange(count + 1) * cells // count
    words = _words(seed, view, ids, tap, 1 + -(-count // 2))
    # two 32-bit numbers per word; high and low by arithmetic, so that the order of bytes does not count
    halves = np.stack([words[:, 1:] >> np.uint64(32), words[:, 1:] & np.uint64(0xFFFFFFFF)], axis=-1)
    drawn = halves.reshape(len(words), 2 * (words.shape[1] - 1))[:, :count]
    index = starts[:-1] + (drawn * np.diff(starts).astype(np.uint64) >> np.uint64(32)).astype(np.int64)
    if cells % count:
        turned = (words[:, :1] >> np.uint64(32)) * np.uint64(cells) >> np.uint64(32)
        index = (index + turned.astype(np.int64)) % cells
    return _curve(height, width)[index]


def _words(seed: int, view: int, ids: NDArray[np.integer], tap: str, words: int) -> NDArray[np.uint64]:
    """At least ``words`` 64-bit words of each sample, [n, words]: stream positions of its id onwards, as in views."""
    unique, where = np.unique(np.asarray(ids, np.int64), return_inverse=True)
    blocks = -(-words // 4)  # of the generator
    name = int.from_bytes(hashlib.sha256(tap.encode()).digest()[:8], "little")
    # A new generator per sample would take longer than its words.
    philox = np.random.Philox(
        counter=np.array([0, 0, POSITION, name], np.uint64), key=np.array([seed, view], np.uint64)
    )
    out = np.empty((len(unique), 4 * blocks), np.uint64)
    at = 0
    for row, sample in enumerate(unique.tolist()):
        philox.advance((sample - at) * blocks)
        out[row] = philox.random_raw(4 * blocks)
        at = sample + 1
    return out[where][:, :words]


@lru_cache(maxsize=64)
def _curve(height: int, width: int) -> NDArray[np.int32]:
    """The cells y * width + x of a map along the Hilbert curve of the smallest square of side 2^k around it."""
    y, x = (axis.ravel() for axis in np.indices((height, width)))
    side = 1 << (max(height, width) - 1).bit_length()
    along = np.zeros(height * width, np.int64)
    half = side // 2
    while half:
        right, low = (x & half) > 0, (y & half) > 0
        along += half * half * ((3 * right) ^ low)
        turned = right & ~low
        x, y = np.where(turned, side - 1 - x, x), np.where(turned, side - 1 - y, y)
        x, y = np.where(low, x, y), np.where(low, y, x)
        half //= 2
    order = np.argsort(along).astype(np.int32)
    order.setflags(write=False)
    return order
