"""From pixels and maps of a batch to durable rows: encode, check the pixels, append.

The caching pass gives every batch of a view; whoever trains with live teachers may give the same. Rows that are
committed already, or belong to another part of the job, are dropped by the writer.

A checksum of each row's pixels is stored with the first teacher that runs it. Whoever comes later, with another
teacher, tap or version of a decoder, is compared with it row by row: targets of one row are all of the same pixels.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from feedfast.errors import CacheMismatchError, FeedfastError
from feedfast.stages.identity import changed_versions
from feedfast.stages.sampling import sampling_of_manifest
from feedfast.stages.together import SharedWriter
from feedfast.storage import names
from feedfast.storage.blocks import row_sums
from feedfast.storage.pending import Pending
from feedfast.storage.reader import CacheReader
from feedfast.storage.transform import Transform, transform_of
from feedfast.storage.writer import CacheWriter
from feedfast_kernels import encode
from feedfast_kernels.codes import CODECS


class Recorder:
    """Rows of one job on their way into a cache.

    Attributes:
        arrays: what it records.
        pending: what of them is recorded: what the job still had to write when it began, or was handed since.
    """

    def __init__(
        self,
        writer: CacheWriter | SharedWriter,
        held: CacheReader,
        decoder: Mapping[str, Any],
        taps: Mapping[str, Iterable[str]],
        *,
        settle: bool = False,
    ) -> None:
        """Ask what is missing.

        Args:
            writer: of this job's part.
            held: the same cache, as it is before the job; its pixels are what this job's are compared with.
            decoder: what this job's loader says of itself, for messages.
            taps: teacher → the taps that this job records.
            settle: finish shards while the caller waits (`CacheWriter.settle`); `needs_every_core` says for whom.
        """
        self._settle = settle
        self.writer, self.manifest = writer, writer.manifest
        self._held, self._decoder = held, decoder
        self._sampling = sampling_of_manifest(self.manifest, held.path)
        self._arrays = {name: {tap: names.codes(name, tap) for tap in some} for name, some in taps.items()}
        targets = {array for arrays in self._arrays.values() for array in arrays.values()}
        self.arrays = {names.SUMS, *targets} | ({names.PIXELS} & writer.specs.keys())
        self.pending: Pending = writer.pending(self.arrays)
        self._lost = writer.missing(names.SUMS)
        self._scales: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
        self._sums: tuple[int, np.ndarray, np.ndarray] | None = None  # view, checksums, which of them are committed

    def wants(self, view: int, start: int, stop: int) -> set[str]:
        """Teachers that still lack any of the rows [start, stop)."""
        return {
            name
            for name, arrays in self._arrays.items()
            if any(self.pending.lacks(array, view, start, stop) for array in arrays.values())
        }

    def record(
        self,
        view: int,
        start: int,
        pixels: np.ndarray,
        ids: NDArray[np.integer],
        maps: Mapping[str, Mapping[str, Tensor]],
        *,
        keep: Collection[str] = (),
    ) -> dict[str, np.ndarray]:
        """Take a batch.

        Args:
            view: which view.
            start: row of the first sample; the others follow it.
            pixels: uint8 [B, H, W, 3], as the teachers saw them.
            ids: [B], which samples these are.
            maps: teacher → tap → float map [B, C, H, W], [B, C, N] or [B, C], for the teachers that `wants` named.
            keep: arrays of these maps whose codes are wanted, also where they are durable already.

        Returns:
            Array → codes [B, ...] as they are stored, channels last, of those in ``keep``.

        Raises:
            CacheMismatchError: the pixels are not those that earlier teachers saw.
            FeedfastError: a map is not finite, or the cache cannot be written.
        """
        sums = row_sums(pixels)
        self._refuse_other_pixels(view, start, sums)
        self.writer.append(names.SUMS, view, start, sums)
        if names.PIXELS in self.writer.specs:
            self.writer.append(names.PIXELS, view, start, pixels)
        kept = {}
        places = self._sampling.places(view, ids, torch.device("cpu"), maps)
        for name, taps in maps.items():
            for tap, array in self._arrays[name].items():
                lacks = self.pending.lacks(array, view, start, start + len(pixels))
                if lacks or array in keep:
                    values = self._sampling.gathered(name, tap, taps[tap], places)
                    # what is kept must outlive the shard, whose memory is used again
                    out = None if array in keep or not lacks else self.writer.place(array, view, start, len(pixels))
                    codes, saturated = self._encoded(name, tap, values, view, start, out)
                    if lacks:
                        self.writer.append(array, view, start, codes, saturated=saturated)
                    if array in keep:
                        kept[array] = codes
        if self._settle:
            self.writer.settle()
        return kept

    def _encoded(
        self, teacher: str, tap: str, values: Tensor, view: int, start: int, out: np.ndarray | None
    ) -> tuple[np.ndarray, int]:
        info = self.manifest.teachers[teacher].taps[tap]
        offset = step = torch.empty(0)
        if CODECS[info.codec].quantized:
            offset, step = self._scale(teacher, tap, values.device)
        try:
            codes, saturated = encode_rows(values, info.codec, offset, step, transform_of(info), out)
        except ValueError as error:
            raise FeedfastError(f"teacher {teacher!r}, tap {tap!r}, view {view}, rows from {start}: {error}") from error
        return codes, int(saturated)

    def _scale(self, teacher: str, tap: str, device: torch.device) -> tuple[Tensor, Tensor]:
        if (teacher, tap) not in self._scales:
            stored = self.writer.stored(names.scale(teacher, tap))
            assert stored is not None  # written before any row
            offset, step = torch.from_numpy(stored.copy()).to(device)
            self._scales[teacher, tap] = offset, step
        return self._scales[teacher, tap]

    def _refuse_other_pixels(self, view: int, start: int, sums: np.ndarray) -> None:
        if self._sums is None or self._sums[0] != view:
            self._sums = (view, *committed_sums(self._held, view, self._lost))
        _, stored, known = self._sums
        here = slice(start, start + len(sums))
        wrong = np.flatnonzero((stored[here] != sums) & known[here])
        if wrong.size:
            raise other_pixels(self._held, view, start + wrong, self._decoder)


def committed_sums(
    reader: CacheReader, view: int, lost: Collection[tuple[int, int]] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Checksums of a view's rows, uint32 [row], and which rows have one, bool [row].

    ``lost``: (view, shard) of those that are to be written, or written again: there is nothing to compare with.
    """
    spec = reader.specs[names.SUMS]
    sums, known = np.zeros(spec.rows, np.uint32), np.zeros(spec.rows, bool)
    for shard in reader.committed(names.SUMS, view):
        if (view, shard) in lost:
            continue
        rows = np.arange(*spec.shard_span(shard))
        sums[rows], known[rows] = reader.read_rows(names.SUMS, view, rows), True
    return sums, known


def other_pixels(reader: CacheReader, view: int, rows: np.ndarray, decoder: Mapping[str, Any]) -> CacheMismatchError:
    """The error for rows whose pixels differ from those the cache's teachers saw."""
    shown = ", ".join(map(str, rows[:5])) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")
    return CacheMismatchError(
        f"{reader.path}: view {view}, rows {shown}: the pixels are not those the teachers saw. "
        f"Versions that differ (there, here): {changed_versions(reader.manifest, decoder) or 'none'}"
    )


def encode_rows(
    values: Tensor,
    codec: str,
    offset: Tensor,
    step: Tensor,
    transform: Transform,
    out: np.ndarray | None = None,
) -> tuple[np.ndarray, Tensor]:
    """A float map [batch, channel, …] as stored rows, channels last, and how many values saturated.

    ``out``: contiguous memory of the rows, which is filled and returned; None = new memory.

    Raises:
        FeedfastError: a value is not finite, or too large for float16.
    """
    if CODECS[codec].quantized:
        if values.is_cuda:  # `encode` skips this check on CUDA to avoid a sync; `.cpu()` below syncs anyway
            _require_finite(values, values)
        margin = transform.floor(values.device)
        into = None if out is None or values.is_cuda else torch.from_numpy(out)
        codes, saturated = encode(values, offset, step, codec=codec, margin_C=margin, out=into)
        return _taken(codes, out), saturated
    values = transform.teacher(values)
    last = values.movedim(1, -1)
    stored = last.to(torch.float32 if codec == "f32" else torch.float16)
    _require_finite(stored, last)
    return _taken(stored, out), torch.zeros((), dtype=torch.int64)


def _taken(stored: Tensor, out: np.ndarray | None) -> np.ndarray:
    """Stored rows in ``out``, where given, else as they are; on the host."""
    if out is None:
        return stored.cpu().numpy()
    into = torch.from_numpy(out)
    if into.data_ptr() != stored.data_ptr():
        into.copy_(stored)
    return out


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def needs_every_core(device: torch.device, workers: int) -> bool:
    """Whether teachers on ``device`` lose more by sharing cores with ``workers`` writing threads than by waiting.

    On a CPU whose cores PyTorch takes all of: a thread that is late is waited for at the end of each operator. With
    many more cores than writers waiting would leave most of them idle.
    """
    return device.type == "cpu" and usable_cores() <= torch.get_num_threads() <= 2 * workers


def _require_finite(stored: Tensor, values: Tensor) -> None:
    if torch.isfinite(stored.float().sum()) or torch.isfinite(stored).all():
        return
    if torch.isfinite(values).all():
        raise FeedfastError(
            f"expected values within float16's 65504, found {float(values.abs().max()):.4g}; use codec f32"
        )
    raise FeedfastError("expected finite values, got NaN or infinity")
