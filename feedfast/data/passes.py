"""The order in which a stored view is read again, and the sizes with which every block is read just once.

A cache's rows lie in a view's order, a full shuffle. Reading them again in another full shuffle would read each block
as often as it has rows, so a later pass permutes granules of neighboring rows over the whole view and mixes the rows of
a window of granules: a reader that holds one window reads each block once. What the order is depends on (seed, view,
pass) alone. Units: rows of a view; sizes in decoded bytes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from feedfast.data.philox import Purpose, words

__all__ = ["GRANULES", "PASS_GRANULE", "PASS_WINDOW", "pass_order", "pass_sizes", "readable_sizes"]

PASS_GRANULE = 64
"""Rows per granule unless the plan says otherwise: when a view is read again, granules of rows are permuted."""

PASS_WINDOW = 16
"""Granules per window unless the plan says otherwise: the rows of a window are mixed with each other."""

GRANULES = (1, 2, 4, 8, 16, 32, 64)
"""What a granule may be: as the blocks of a cache, so that blocks never cross a granule's edge."""


def pass_order(
    n_rows: int, seed: int, view: int, pass_index: int, granule: int = PASS_GRANULE, window: int = PASS_WINDOW
) -> NDArray[np.int64]:
    """The order in which a pass over a stored view reads its rows.

    Pass 0 is the stored order, which is a full shuffle already. Later passes permute granules of ``granule``
    neighboring rows over the whole view and then mix the rows of every ``window`` consecutive granules. So a row moves
    anywhere, but it is mixed with ``granule * window`` rows only (1,024 by default): rows of one granule are at most
    that far apart in every pass, and with window 1 they stay next to each other. The smaller the granule, the closer
    to a full shuffle. No granule is cut by a window's edge, so a reader that holds one window reads each block once.

    Args:
        n_rows: rows in the view, >= 0.
        seed: the run's seed.
        view: which view.
        pass_index: 0 for the first pass over this view.
        granule: rows per granule, >= 1: a multiple of every block that is to be read once.
        window: granules per window, >= 1. `pass_sizes` derives both from bytes; a plan holds them.

    Returns:
        A permutation of ``range(n_rows)``, int64.
    """
    if n_rows < 0 or pass_index < 0:
        raise ValueError(f"expected n_rows >= 0 and pass_index >= 0, got {n_rows} and {pass_index}")
    if granule < 1 or window < 1:
        raise ValueError(f"expected granule >= 1 and window >= 1, got {granule} and {window}")
    rows = np.arange(n_rows, dtype=np.int64)
    if pass_index == 0:
        return rows
    granules = np.arange(-(-n_rows // granule), dtype=np.int64)
    permuted = granules[np.argsort(words(seed, view, Purpose.GRANULE, pass_index, granules, 1)[:, 0], kind="stable")]
    moved = (permuted[:, None] * granule + np.arange(granule)).reshape(-1)
    which = np.repeat(granules // window, granule)  # windows are counted in granules: the last one of the view may be
    real = moved < n_rows  # short, and wherever it went, the edges after it must not cut granules
    moved, which = moved[real], which[real]
    mixed: NDArray[np.int64] = moved[np.lexsort((words(seed, view, Purpose.MIX, pass_index, rows, 1)[:, 0], which))]
    return mixed


def pass_sizes(row_bytes: int, block_rows: int, bound_bytes: int) -> tuple[int, int]:
    """Granule and window with which later passes read each block once within a memory bound.

    A window must not exceed a quarter of the bound: a stream holds the window it hands out and the next one, and
    batches that lie in two of them (`feedfast.storage.stream.MAX_BUFFER_BYTES`). Where 16 granules of 64 rows fit,
    it is those. Otherwise the granule is the largest power of two of which 16 fit, because small granules mix better
    than large ones, but no smaller than a block; the window is then as many granules as fit. Where not even one
    block fits, the window is 1: blocks are still read once, and the stream exceeds its bound.

    All of it follows from bytes, so a live run and a cached run of one recipe derive the same.

    Args:
        row_bytes: decoded bytes per row, all arrays of a stream together, >= 1.
        block_rows: rows of the largest block there is, a power of two up to 64; 1 for a cache yet to be made, whose
            blocks then are chosen to have at most ``granule`` rows.
        bound_bytes: what a stream may hold.

    Returns:
        (granule, window).
    """
    if row_bytes < 1 or block_rows not in GRANULES:
        raise ValueError(f"expected row_bytes >= 1 and block_rows of {GRANULES}, got {row_bytes} and {block_rows}")
    fit = bound_bytes // (4 * row_bytes)
    granule = PASS_GRANULE
    while granule > block_rows and granule * PASS_WINDOW > fit:
        granule //= 2
    return granule, max(1, min(fit, PASS_GRANULE * PASS_WINDOW) // granule)


def readable_sizes(granule: int, window: int, row_bytes: int, block_rows: int, bound_bytes: int) -> tuple[int, int]:
    """Granule and window of a pass over rows that a cache was not planned for.

    A cache that was made for small rows keeps its granule and window when large maps are added to it, and their windows
    are more than a stream may hold: blocks would be read again and again. What is read decides: whoever reads the small
    rows alone mixes them as before.

    Args:
        granule: of the cache.
        window: of the cache.
        row_bytes: decoded bytes per row of the arrays that are read, >= 1.
        block_rows: rows of the largest block among them.
        bound_bytes: what a stream may hold.

    Returns:
        (granule, window): the cache's where they fit, else those of `pass_sizes`.
    """
    if granule * window <= max(bound_bytes // (4 * row_bytes), block_rows):
        return granule, window
    return pass_sizes(row_bytes, block_rows, bound_bytes)
