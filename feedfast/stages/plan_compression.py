"""Which taps' codes are worth compressing here: the decoder's rate against the disk's and the student's step.

zstd saves bytes and costs a core's time per batch, once when it is written and again whenever it is read. Where the
student computes on the same cores, that time comes on top of its step. A tap that zstd shrinks enough
(`choose_compression`) stays compressed as long as steps from the cache take at most 1.03 of what they take with raw
codes; of the others those that save most time per further byte become raw first, and only what the disk has room for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from feedfast.storage.schema import Compression

STEP_RATIO: Final = 1.03


@dataclass(frozen=True)
class TapCost:
    """A tap's codes of one batch.

    Attributes:
        raw_bytes: as codes.
        zstd_bytes: compressed.
        raw_ms: one thread reads and checks the codes.
        zstd_ms: one thread decodes them.
        fixed: what it is without a measurement, by its ratio alone.
    """

    raw_bytes: float
    zstd_bytes: float
    raw_ms: float
    zstd_ms: float
    fixed: Compression

    def stored_bytes(self, kind: Compression) -> float:
        """Bytes of a batch in a cache."""
        return self.zstd_bytes if kind == "zstd" else self.raw_bytes

    def decode_ms(self, kind: Compression) -> float:
        """Milliseconds of one thread per batch."""
        return self.zstd_ms if kind == "zstd" else self.raw_ms


@dataclass(frozen=True)
class Reading:
    """Where batches are read while a student trains.

    Attributes:
        step_ms: of the student, with targets at hand.
        threads: that read.
        cores: of this machine that the process may use.
        shared: whether the student computes on these cores, all of them.
        bytes_per_second: of the disk; None = unknown, no limit.
    """

    step_ms: float
    threads: int
    cores: int
    shared: bool
    bytes_per_second: float | None

    def decoding_ms(self, decode_ms: float) -> float:
        """How long a batch is decoded, of ``decode_ms`` of one thread."""
        return decode_ms / max(1, min(self.threads, self.cores))

    def cached_ms(self, stored_bytes: float, decode_ms: float) -> float:
        """A step from the cache: what is read is read ahead, so the slower of the two is waited for."""
        disk = stored_bytes / self.bytes_per_second * 1e3 if self.bytes_per_second else 0.0
        if self.shared:
            return max(self.step_ms + decode_ms / self.cores, disk)
        return max(self.step_ms, self.decoding_ms(decode_ms) + disk)


def cached_ms(taps: Mapping[str, TapCost], kinds: Mapping[str, Compression], reading: Reading) -> float:
    """Milliseconds of a step whose targets are stored as ``kinds`` says."""
    stored = sum(tap.stored_bytes(kinds[name]) for name, tap in taps.items())
    return reading.cached_ms(stored, sum(tap.decode_ms(kinds[name]) for name, tap in taps.items()))


def cheapest_kinds(
    taps: Mapping[str, TapCost], reading: Reading, batches: float, room_bytes: float
) -> dict[str, Compression]:
    """Tap → how its codes are best stored.

    Args:
        taps: what each costs.
        reading: where they are read.
        batches: that the cache will hold.
        room_bytes: how many bytes more than with the ``fixed`` kinds there is room for.
    """
    kinds: dict[str, Compression] = {name: tap.fixed for name, tap in taps.items()}
    raw: dict[str, Compression] = dict.fromkeys(taps, "none")
    goal = STEP_RATIO * cached_ms(taps, raw, reading)

    def saved_per_byte(name: str) -> float:
        tap = taps[name]
        return (tap.zstd_ms - tap.raw_ms) / max(tap.raw_bytes - tap.zstd_bytes, 1.0)

    for name in sorted((name for name in taps if kinds[name] == "zstd"), key=saved_per_byte, reverse=True):
        if cached_ms(taps, kinds, reading) <= goal:
            break
        more = (taps[name].raw_bytes - taps[name].zstd_bytes) * batches
        if more <= room_bytes:
            kinds[name], room_bytes = "none", room_bytes - more
    return kinds
