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

from feedfast.data.philox import Purpose, as_ids, many_words

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
    name = int.from_bytes(hashlib.sha256(tap.encode()).digest()[:8], "little")
    words = many_words(seed, view, Purpose.POSITION, name, as_ids(ids), 1 + -(-count // 2))
    # two 32-bit numbers per word; high and low by arithmetic, so that the order of bytes does not count
    halves = np.stack([words[:, 1:] >> np.uint64(32), words[:, 1:] & np.uint64(0xFFFFFFFF)], axis=-1)
    drawn = halves.reshape(len(words), 2 * (words.shape[1] - 1))[:, :count]
    index = starts[:-1] + (drawn * np.diff(starts).astype(np.uint64) >> np.uint64(32)).astype(np.int64)
    if cells % count:
        turned = (words[:, :1] >> np.uint64(32)) * np.uint64(cells) >> np.uint64(32)
        index = (index + turned.astype(np.int64)) % cells
    return _curve(height, width)[index]


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
