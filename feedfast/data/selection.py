"""Which samples ``limit`` and ``fraction`` leave of a complete listing: by class, ids staying what they are.

Both are functions of the labels alone: two recipes that take the same fraction share its samples, and a smaller one
takes some of those of a larger one. Data with boxes or masks go in as one class.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from feedfast.errors import RequestError

__all__ = ["chosen"]

_FRACTION_SEED = 0  # not the recipe's: two recipes' students must be able to share the samples of a fraction


def chosen(source: str, labels: NDArray[np.int32], limit: int, fraction: float) -> NDArray[np.uint32]:
    """Ids of the samples that limit and fraction leave, ascending."""
    ids = _limited(labels, limit)
    if fraction == 1:
        return ids
    unlabeled = int((labels[ids] < 0).sum())
    if unlabeled:
        raise RequestError(
            f"fraction: expected labeled samples, as it takes the same share of every class; "
            f"found {unlabeled} of {len(ids)} without a label in {source}"
        )
    return np.sort(
        np.concatenate(
            [_thinned(ids[labels[ids] == label], label, fraction) for label in np.unique(labels[ids]).tolist()]
        )
    )


def _thinned(ids: NDArray[np.uint32], label: int, fraction: float) -> NDArray[np.uint32]:
    """The first round(fraction n), at least one, of a class's n ids in an order drawn for (label, n).

    One order for all fractions makes smaller ones subsets. Raw words, because NumPy guarantees Philox's stream and not
    what `Generator.permutation` makes of it.
    """
    words = np.random.Philox(key=np.array([_FRACTION_SEED, label], dtype=np.uint64)).random_raw(len(ids))
    return ids[np.argsort(words, kind="stable")[: max(1, round(fraction * len(ids)))]]


def _limited(labels: NDArray[np.int32], limit: int) -> NDArray[np.uint32]:
    if limit == 0:
        return np.arange(len(labels), dtype=np.uint32)
    by_label = np.argsort(labels, kind="stable")
    first = np.searchsorted(labels[by_label], labels[by_label], side="left")
    rank = np.arange(len(labels)) - first  # how many of the same class come before it
    return np.sort(by_label[rank < limit]).astype(np.uint32)
