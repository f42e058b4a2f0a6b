"""Differences between students of the same seeds, with their intervals.

Two students of one seed start from the same weights and see the same views of the same images in the same order, so
their difference says more than that of two means. Intervals are Student's t at 95 % over the seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

# two-sided 95 % quantiles of Student's t by degrees of freedom; beyond the table its last, which is on the safe side
T_95 = (
    math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip


def half_interval(differences: Sequence[float]) -> float:
    """Half of the 95 % interval of their mean; infinite of fewer than two."""
    if len(differences) < 2:
        return math.inf
    t = T_95[min(len(differences) - 1, len(T_95) - 1)]
    return t * statistics.stdev(differences) / math.sqrt(len(differences))
