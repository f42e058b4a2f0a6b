"""A tap of a batch, timed: to codes, from codes to stored bytes and back, and what fitting its codec takes.

Real maps of the recipe's own teachers, through the functions that the caching pass and the reader call.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from feedfast.stages.ensemble import LOGITS, FrozenTeacher
from feedfast.stages.pilot import CHANNEL_VALUES, TAP_VALUES, tap_row_bytes
from feedfast.stages.plan_compression import TapCost
from feedfast.stages.plan_rates import decode_ms
from feedfast.stages.record import encode_rows
from feedfast.storage.blocks import AskedCompression, choose_compression, compress_block
from feedfast.storage.fit import fit_affine, measure
from feedfast.storage.layout import block_rows_for
from feedfast.storage.schema import CodecName, Compression
from feedfast_kernels import Codes, Target
from feedfast_kernels.codes import CODECS

FIT_ROWS: Final = (1 << 12, 1 << 15)  # values per channel of the two fits that are timed


@dataclass(frozen=True)
class MeasuredTap:
    """What a tap of a batch costs.

    Attributes:
        target: as a cache serves it.
        cost: of its codes, compressed and raw; None of logits, which are little.
        encode_ms: maps to codes.
        finish_ms: codes to checked, compressed and checksummed shards, one thread: raw, zstd.
        fit_seconds: of its codec on the pilot.
    """

    target: Target
    cost: TapCost | None = None
    encode_ms: float = 0.0
    finish_ms: tuple[float, float] = (0.0, 0.0)
    fit_seconds: float = 0.0

    def compression(self, kind: Compression) -> float:
        """Raw bytes per stored byte."""
        return self.cost.raw_bytes / self.cost.zstd_bytes if self.cost is not None and kind == "zstd" else 1.0


def measured_tap(
    teacher: FrozenTeacher,
    tap: str,
    values: Tensor,
    codec: CodecName,
    asked: AskedCompression,
    granule: int,
    pilot_rows: int,
) -> MeasuredTap:
    """Time a tap of a batch.

    Args:
        teacher: whose it is.
        tap: its name.
        values: the teacher's map, float [batch, channel, ...].
        codec: that it will have.
        asked: ``cache.compression``.
        granule: of the plan.
        pilot_rows: rows that the codec will be fitted on.
    """
    if tap == LOGITS:
        return MeasuredTap(values.float())
    transform = teacher.transform(tap)
    flat = transform.teacher(values.cpu()).movedim(1, -1).reshape(-1, values.shape[1])
    thin = flat[:: max(1, len(flat) // 4096)].contiguous().numpy()
    offset, step = (torch.from_numpy(row).to(values.device) for row in fit_affine(thin, codec))
    codes, _ = encode_rows(values, codec, offset, step, transform)
    encode_ms = _least_ms(lambda: encode_rows(values, codec, offset, step, transform))
    block = np.ascontiguousarray(codes[: block_rows_for(tap_row_bytes(teacher.stored(tap), codec), granule)])
    blocks = len(codes) / len(block)
    frame, plain = compress_block(block, "zstd"), compress_block(block, "none")
    data = torch.from_numpy(codes).to(values.device)
    target: Target = data.movedim(-1, 1) if data.dim() > 2 else data.float()
    if CODECS[codec].quantized:
        target = Codes(data=data, offset=offset, step=step, codec=codec)  # type: ignore[arg-type]
    positions = max(1, len(flat) // len(values))
    return MeasuredTap(
        target,
        TapCost(
            raw_bytes=block.nbytes * blocks,
            zstd_bytes=len(frame) * blocks,
            raw_ms=decode_ms(plain, "none", block.nbytes) * blocks,
            zstd_ms=decode_ms(frame, "zstd", block.nbytes) * blocks,
            fixed=choose_compression([block], asked),
        ),
        encode_ms,
        (_finish_ms(block, plain, "none") * blocks, _finish_ms(block, frame, "zstd") * blocks),
        _fit_seconds(flat, codec, pilot_rows * positions) if CODECS[codec].quantized else 0.0,
    )


def _finish_ms(block: np.ndarray, stored: bytes, kind: Compression) -> float:
    """One block, from codes to what is written: a shard's checksum is of all that is stored."""
    return _least_ms(lambda: (block.max(), compress_block(block, kind), hashlib.sha256(stored)))


def _fit_seconds(flat: Tensor, codec: CodecName, pilot_values: int) -> float:
    """What a pilot of that many values per channel takes to fit and, on a quarter as many, to measure.

    From two fits: each has a part that does not grow with its values.
    """
    rows = [np.ascontiguousarray(flat[: min(count, len(flat))].numpy()) for count in FIT_ROWS]
    times = []
    for few in rows:
        begin = time.perf_counter()
        offset, step = fit_affine(few, codec)
        measure(few[: max(1, len(few) // 4)], offset, step, codec, pre_activation=True)
        times.append(time.perf_counter() - begin)
    kept = min(pilot_values, CHANNEL_VALUES, TAP_VALUES // flat.shape[1])
    if len(rows[1]) <= len(rows[0]):
        return times[0] * max(1.0, kept / len(rows[0]))
    each = max(0.0, times[1] - times[0]) / (len(rows[1]) - len(rows[0]))
    return max(0.0, times[0] + each * (kept - len(rows[0])))


def _least_ms(work: Callable[[], object], times: int = 3) -> float:
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        work()
        found.append(time.perf_counter() - begin)
    return min(found) * 1e3
