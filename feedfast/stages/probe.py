"""What a teacher computes, in two numbers per tap: kept with a cache or a run, and compared by whoever goes on with it.

Weights alone are no identity: other code over the same weights, or broken hardware, computes something else.
"""

from __future__ import annotations

from collections.abc import Mapping

from feedfast.errors import CacheMismatchError

Probe = Mapping[str, tuple[float, float]]
"""Tap → mean and root mean square over the probe's rows."""

PROBE_TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}  # of the root mean square; other kernels round differently


def refuse_other_probe(name: str, precision: str, stored: Probe, found: Probe) -> None:
    """Raise unless a teacher computes what it did: the same weights in other code, or on broken hardware, do not.

    Raises:
        CacheMismatchError: the mean or the root mean square of a tap has moved.
    """
    common = [tap for tap in stored if tap in found]
    if not common:
        raise CacheMismatchError(
            f"teachers[{name}]: expected a probe of what it computed when the cache was made, found none of "
            f"{sorted(found)} in the manifest; choose another cache.path"
        )
    for tap in common:
        if not same_outputs(precision, {tap: stored[tap]}, {tap: found[tap]}):
            raise CacheMismatchError(
                f"teachers[{name}], tap {tap!r}: with the same weights it computes something else than when the "
                f"cache was made: mean and root mean square expected {stored[tap][0]:.6g} and {stored[tap][1]:.6g}, "
                f"found {found[tap][0]:.6g} and {found[tap][1]:.6g}; is it the same code and input size?"
            )


def same_outputs(precision: str, one: Probe, two: Probe) -> bool:
    """Whether two probes have the same taps, and equal values up to what other kernels round."""
    tolerance = PROBE_TOLERANCE.get(precision, 0.0)
    return one.keys() == two.keys() and all(
        max(abs(two[tap][0] - mean), abs(two[tap][1] - rms)) <= tolerance * max(rms, 1e-12)
        for tap, (mean, rms) in one.items()
    )
