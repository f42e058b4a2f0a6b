"""What a teacher computes, in two numbers per tap: found again wherever the same network runs on the same pixels."""

from __future__ import annotations

from collections.abc import Mapping

Probe = Mapping[str, tuple[float, float]]
"""Tap → mean and root mean square over the probe's rows."""

PROBE_TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}  # of the root mean square; other kernels round differently


def same_outputs(precision: str, one: Probe, two: Probe) -> bool:
    """Whether two probes have the same taps, and equal values up to what other kernels round."""
    tolerance = PROBE_TOLERANCE.get(precision, 0.0)
    return one.keys() == two.keys() and all(
        max(abs(two[tap][0] - mean), abs(two[tap][1] - rms)) <= tolerance * max(rms, 1e-12)
        for tap, (mean, rms) in one.items()
    )
