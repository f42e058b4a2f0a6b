"""The pilot: a few batches of real maps on which a tap's codec is fitted, measured and given its compression.

The first ``cache.pilot`` rows of view 0 fit the range; the next quarter as many, which the fit has not seen,
measure what it costs: relative RMS error, cosine, saturation, and for pre-activation maps how often the sign flips.
A data set smaller than that goes on in its next views, three at most: with 61 photographs, fitted and measured on
view 0 alone, an error of 0.6 % was claimed where 4.6 % was true of view 1, whose crops left the fitted range.
Batches are cut exactly as the caching pass will cut them, so a teacher on batch statistics shows the values it will
have.

Spatial positions are thinned evenly (a map of 56x56 has far more positions than a range needs): at most 2^18 values
per channel and 2^25 per tap are kept, so memory does not grow with the map. These limits and the default of 2,048
samples are set by rows that the fit has not seen: their extremes lie beyond those of a small pilot (512 samples of a
WRN-16-2 cost 14 to 27 % more error than 2,048).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from feedfast.data.batch import moved
from feedfast.data.loader import Loader
from feedfast.data.passes import pass_sizes, readable_sizes
from feedfast.data.views import ViewPlan
from feedfast.errors import FeedfastError
from feedfast.stages.codecs import Codecs
from feedfast.stages.ensemble import LOGITS, FrozenTeacher, is_signed
from feedfast.stages.record import encode_rows
from feedfast.storage.blocks import AskedCompression, choose_compression
from feedfast.storage.fit import fit_affine, measure
from feedfast.storage.layout import ArraySpec, block_rows_for
from feedfast.storage.schema import CodecName, Compression, TapInfo
from feedfast.storage.stream import MAX_BUFFER_BYTES
from feedfast.storage.transform import Transform
from feedfast_kernels.codes import CODECS

PILOT_VIEWS = 3
CHANNEL_VALUES = 1 << 18
TAP_VALUES = 1 << 25


@dataclass
class Fitted:
    """A tap ready to be stored: its manifest entry, and offset and step [2, channel] (None for float codecs)."""

    info: TapInfo
    scale: np.ndarray | None


@dataclass
class _Sample:
    fit: list[np.ndarray] = field(default_factory=list)
    held_out: list[np.ndarray] = field(default_factory=list)
    first: Tensor | None = None


def run_pilot(
    teacher: FrozenTeacher,
    codecs: Mapping[str, CodecName],
    batches: list[Tensor],
    held_out: list[Tensor],
    granule: int,
    compression: Mapping[str, AskedCompression],
    seen: Callable[[int, Tensor | None], None] | None = None,
) -> dict[str, Fitted]:
    """Fit and measure taps of one teacher on pilot pixels (uint8 [batch, height, width, 3]).

    Args:
        teacher: the network.
        codecs: its taps to fit, each with its codec; may be empty where only ``seen`` is wanted.
        batches: pixels the codec is fitted on.
        held_out: pixels it is measured on.
        granule: of the plan.
        compression: of each tap, or "auto".
        seen: is told the number of each batch, held-out ones after the others, and its logits if they are served.

    Raises:
        FeedfastError: a map of the pilot is not finite.
    """
    samples: dict[str, _Sample] = {name: _Sample() for name in codecs}
    if not samples and seen is None:
        return {}
    number = 0
    teacher.fit_margins(batches)
    for kind, group in (("fit", batches), ("held_out", held_out)):
        for images in group:
            maps = teacher(images)
            if seen is not None:
                seen(number, maps.get(LOGITS))
            number += 1
            for name, sample in samples.items():
                values = maps[name].cpu()
                if not torch.isfinite(values).all():
                    raise FeedfastError(
                        f"teacher {teacher.name!r}, tap {name!r}: expected finite maps, found NaN or infinity; "
                        "are the weights and the normalization right?"
                    )
                getattr(sample, kind).append(thin(values, len(group)))
                if sample.first is None:
                    block = block_rows_for(tap_row_bytes(teacher.stored(name), codecs[name]), granule)
                    sample.first = _as_stored(values[:block], teacher.positions.get(name))
    return {name: _fit(teacher, name, sample, codecs[name], compression[name]) for name, sample in samples.items()}


def _as_stored(values: Tensor, positions: int | None) -> Tensor:
    """Maps with as many positions as are stored, evenly spaced: what compression makes of them is hardly moved."""
    if positions is None:
        return values
    flat = values.flatten(2)
    return flat[:, :, torch.from_numpy(np.linspace(0, flat.shape[2] - 1, positions).astype(np.int64))]


def thin(values: Tensor, batches: int) -> np.ndarray:
    """[batch, channel, ...] → [n, channel], evenly thinned to this batch's share of the limits."""
    flat = values.movedim(1, -1).reshape(-1, values.shape[1])
    share = max(1, min(CHANNEL_VALUES, TAP_VALUES // values.shape[1]) // batches)
    keep = np.linspace(0, len(flat) - 1, min(share, len(flat))).astype(np.int64)
    return np.ascontiguousarray(flat[torch.from_numpy(keep)].numpy())


def fit_values(
    fit: np.ndarray,
    unseen: np.ndarray,
    first: Tensor,
    codec: CodecName,
    transform: Transform,
    compression: AskedCompression,
    *,
    signed: bool = False,
) -> tuple[np.ndarray, Compression, dict[str, float]]:
    """What a tap's manifest entry says of its codec, from a sample of its values.

    Args:
        fit: [n, channel], as they will be encoded; the range is fitted on them.
        unseen: [m, channel], likewise; what the codec loses is measured on them.
        first: a block of maps before ``transform``, which is compressed on trial.
        codec: of the tap.
        transform: of the tap.
        compression: of the tap; "auto" = what that trial says.
        signed: whether signs count, as of a pre-activation map.

    Returns:
        Offset and step [2, channel], the compression, and the measured errors.
    """
    offset, step = fit_affine(fit, codec)
    block, _ = encode_rows(first, codec, torch.from_numpy(offset), torch.from_numpy(step), transform)
    chosen = choose_compression([np.ascontiguousarray(block)], compression)
    return np.stack([offset, step]), chosen, measure(unseen, offset, step, codec, pre_activation=signed)


def _fit(teacher: FrozenTeacher, name: str, sample: _Sample, codec: CodecName, asked: AskedCompression) -> Fitted:
    request = teacher.requests[name]
    margin, transform = teacher.margins.get(name), teacher.transform(name)
    fit, unseen = (
        transform.teacher(torch.from_numpy(np.concatenate(part))).numpy()
        for part in (sample.fit, sample.held_out or sample.fit)
    )
    assert sample.first is not None
    try:
        scale, compression, error = fit_values(
            fit, unseen, sample.first, codec, transform, asked, signed=is_signed(request.tap)
        )
    except FeedfastError as why:  # beyond float16
        raise FeedfastError(f"teacher {teacher.name!r}, tap {name!r}: {why}") from why
    info = TapInfo(
        name=name,
        path=request.tap.path,
        position=request.tap.position,
        shape=teacher.shapes[name],
        transform=transform.kind,
        sample=teacher.sample_info(name),
        margin=None if margin is None else tuple(margin.tolist()),
        codec=codec,
        compression=compression,
        fit={"values_per_channel": len(fit), "pilot": "first rows of view 0, then of the next views"},
        error=error,
    )
    return Fitted(info, scale if CODECS[codec].quantized else None)


def row_bytes(teachers: Iterable[FrozenTeacher], codecs: Codecs, images: str, size: int) -> int:
    """Decoded bytes per row of all that a recipe stores: maps, logits, and pixels where ``images`` is "stored"."""
    total = size * size * 3 if images == "stored" else 0
    for teacher in teachers:
        for tap in teacher.shapes:
            total += tap_row_bytes(teacher.stored(tap), codecs.of(teacher.name, tap))
    return total


def tap_row_bytes(shape: tuple[int, ...], codec: CodecName) -> int:
    """Bytes per stored row of a tap; ``shape`` is that of the stored values."""
    return TapInfo(name="tap", path="", position="post", shape=shape, codec=codec).row_bytes


def mixing_plan(plan: ViewPlan, row_bytes: int) -> ViewPlan:
    """The plan with the granule and window that rows of this size get in a new cache, and so in a live run."""
    granule, window = pass_sizes(row_bytes, 1, MAX_BUFFER_BYTES)
    return replace(plan, granule=granule, window=window)


def readable_plan(plan: ViewPlan, arrays: Sequence[ArraySpec]) -> ViewPlan:
    """A cache's plan with the granule and window in which a pass over these arrays reads no block twice."""
    if not arrays:
        return plan
    row_bytes, block_rows = sum(spec.row_bytes for spec in arrays), max(spec.block_rows for spec in arrays)
    granule, window = readable_sizes(plan.granule, plan.window, row_bytes, block_rows, MAX_BUFFER_BYTES)
    return replace(plan, granule=granule, window=window)


def pilot_batches(
    count: int, pilot: int, batch: int, *, augmented: bool
) -> tuple[list[tuple[int, range]], list[tuple[int, range]]]:
    """Which batches fit the codec and which measure it, as (view, batch numbers); disjoint if that can be helped.

    Args:
        count: images in the data set.
        pilot: images asked for.
        batch: rows of a batch, cut from row 0 of a view.
        augmented: whether a further view shows other pixels.
    """
    total = -(-count // batch)
    views = PILOT_VIEWS if augmented else 1
    fit = min(max(1, -(-pilot // batch)), views * total)
    end = min(fit + -(-fit // 4), (views + augmented) * total)
    return _by_view(0, fit, total), _by_view(min(fit, end - 1), end, total)


def _by_view(start: int, stop: int, total: int) -> list[tuple[int, range]]:
    """Batches ``start`` to ``stop`` of all views in a row, ``total`` a view."""
    views = range(start // total, -(-stop // total))
    return [(view, range(max(start - view * total, 0), min(stop - view * total, total))) for view in views]


def pilot_pixels(loader: Loader, pilot: int) -> tuple[list[Tensor], list[Tensor], list[Any]]:
    """uint8 pixels [batch, height, width, 3] of the fitting and of the measuring batches, and all their annotations.

    ``loader`` must cut batches as the caching pass does.
    """
    size, count = loader.batch_size, len(loader.dataset)
    augmented = loader.plan.augment != "none" or bool(loader.plan.operations)
    groups: list[list[Tensor]] = []
    annotations: list[Any] = []
    for parts in pilot_batches(count, pilot, size, augmented=augmented):
        rows = [(view, np.arange(part.start * size, min(part.stop * size, count))) for view, part in parts]
        groups.append([])
        for item in (item for view, numbers in rows for item in loader.stream(view, numbers)):
            groups[-1].append(item.images.cpu().clone())
            annotations.append(moved(item.annotations, "cpu"))
    return groups[0], groups[1], annotations
