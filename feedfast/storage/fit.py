"""The fit of a tap: offset and step per channel of least squared error on a pilot, and what storing the tap costs.

Codes are affine per channel: ``value = offset + step * code``, with codes 0..254 (u8), 0..62, 0..30 or 0..14 (u4). The
range is not the minimum and maximum: on real maps a few outliers would waste most levels. One uniform step is kept on
purpose: a table of levels would have to be gathered inside the fused losses. ``f16`` and ``f32`` store values as they
are, with offset 0 and step 1. Encoding and decoding are the kernels' own.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from feedfast.errors import FeedfastError
from feedfast.storage.schema import CodecName
from feedfast_kernels import Codes, decode, encode
from feedfast_kernels.codes import CODECS, is_quantized

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

F16_MAX: Final = 65504.0
PILOT_VALUES: Final = 1 << 16  # per channel; more change the range by less than it changes the error
_ATOM_SHARE: Final = 0.002  # of a channel's values at its minimum, from which on the minimum keeps code 0


def fit_affine(values: Floats, codec: CodecName) -> tuple[Floats, Floats]:
    """Offset and step per channel of least squared error on a pilot.

    Args:
        values: [n, C] pilot values, as they will be encoded (margin already applied).
        codec: ``u8``, ``u6``, ``u5`` or ``u4``; for ``f16`` and ``f32`` the identity is returned.

    Returns:
        offset [C], step [C], float32. A channel with one single value has step 0 and is exact.

    Raises:
        FeedfastError: the pilot is empty or not finite.
    """
    if values.ndim != 2 or values.shape[0] == 0:
        raise FeedfastError(f"pilot: expected values [n, channel] with n > 0, found shape {list(values.shape)}")
    channels = values.shape[1]
    offset, step = np.zeros(channels, np.float32), np.ones(channels, np.float32)
    top = CODECS[codec].top_code
    if top is None:
        return offset, step
    for channel in range(channels):
        column = np.sort(values[:, channel].astype(np.float32, copy=False))
        if not np.isfinite(column[[0, -1]]).all():
            wrong = int((~np.isfinite(column)).sum())
            raise FeedfastError(f"pilot: channel {channel} has {wrong} of {len(column)} values that are not finite")
        offset[channel], step[channel] = _fit_channel(column, top)
    return offset, step


def _fit_channel(ordered: Floats, top: int) -> tuple[float, float]:
    low, high = float(ordered[0]), float(ordered[-1])
    if (high - low) / top < np.finfo(np.float32).tiny:  # one value, or a step that arithmetic may flush to zero
        return low, 0.0
    if len(ordered) > PILOT_VALUES:
        # Evenly spaced order statistics, both ends included: a quantile-exact thinning of a sorted sample.
        ordered = ordered[np.linspace(0, len(ordered) - 1, PILOT_VALUES).round().astype(np.int64)]
    # With sorted values, sums of x and x² over any interval are two look-ups, so the exact error of a range costs as
    # many look-ups as there are codes, however long the pilot is. Ranges are searched coarse to fine, one end at a
    # time; the result is never worse on the pilot than the minimum and maximum.
    error = _RangeError(ordered, top)
    atoms = int(np.searchsorted(ordered, ordered[0], side="right"))
    # A value that occurs often at the lower end (a ReLU's zero, OFD's margin) keeps code 0 to itself, exactly.
    pinned = atoms >= max(2, _ATOM_SHARE * len(ordered))
    middle = low if pinned else float(ordered[len(ordered) // 2])
    down, up = middle - low, high - middle  # distances to both ends; the search shrinks them by factors
    best = (low, high)
    best_error = float(error.of(np.array([low]), np.array([high]))[0])
    for factors in _SEARCH:
        for end in (1,) if pinned else (1, 0):
            reach = abs(best[end] - middle) * factors
            moved = middle + np.minimum(reach, up) if end else middle - np.minimum(reach, down)
            kept = np.full_like(moved, best[1 - end])
            lows, highs = (kept, moved) if end else (moved, kept)
            # float32 is what will be stored: candidates are judged after rounding
            lows, highs = lows.astype(np.float32).astype(np.float64), highs.astype(np.float32).astype(np.float64)
            errors = np.where(highs > lows, error.of(lows, highs), np.inf)
            at = int(np.argmin(errors))
            if errors[at] < best_error:
                best, best_error = (float(lows[at]), float(highs[at])), float(errors[at])
    return best[0], (best[1] - best[0]) / top


_SEARCH: Final = (
    2.0 ** (-np.arange(49) / 4),  # down to 1/4096 of the range: a single outlier must not cost the rest
    2.0 ** (np.linspace(-1, 1, 17)),
    2.0 ** (np.linspace(-0.25, 0.25, 9)),
    2.0 ** (np.linspace(-0.06, 0.06, 9)),
    2.0 ** (np.linspace(-0.02, 0.02, 5)),
)


class _RangeError:
    """Exact squared error of clip-and-round to ``top + 1`` levels, for many ranges of one sorted channel at once."""

    def __init__(self, ordered: Floats, top: int) -> None:
        # Centered, so that the difference of large sums keeps its digits.
        self.center = float(ordered[len(ordered) // 2])
        self.values = ordered.astype(np.float64) - self.center
        self.sums = np.concatenate([[0.0], np.cumsum(self.values)])
        self.squares = np.concatenate([[0.0], np.cumsum(self.values**2)])
        self.levels = np.arange(top + 1)
        self.top = top

    def of(self, low: npt.NDArray[np.float64], high: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Sum of squared errors for ranges [k] given by their ends."""
        step = np.maximum(high - low, np.finfo(np.float64).tiny)[:, None] / self.top
        level = (low - self.center)[:, None] + step * self.levels
        inner = np.searchsorted(self.values, (level[:, :-1] + level[:, 1:]) / 2)
        edge = np.pad(inner, ((0, 0), (1, 1)), constant_values=((0, 0), (0, len(self.values))))
        count, total = np.diff(edge, axis=1), np.diff(self.sums[edge], axis=1)
        squared: npt.NDArray[np.float64] = self.squares[-1] + (level * (level * count - 2 * total)).sum(axis=1)
        return squared


def round_trip(values: Floats, offset: Floats, step: Floats, codec: CodecName, margin: Floats | None = None) -> Floats:
    """What a reader gets back of values [n, C], by the very operations that store and read them."""
    if is_quantized(codec):
        x, low, width = (torch.from_numpy(array) for array in (values, offset, step))
        floor = None if margin is None else torch.from_numpy(margin)
        codes, _ = encode(x, low, width, codec=codec, margin_C=floor)
        decoded: Floats = decode(Codes(codes, low, width, codec)).numpy()
        return decoded
    floored = values if margin is None else np.maximum(values, margin)
    stored = floored if codec == "f32" else np.clip(floored, -F16_MAX, F16_MAX).astype(np.float16)
    return stored.astype(np.float32)


def measure(
    values: Floats,
    offset: Floats,
    step: Floats,
    codec: CodecName,
    margin: Floats | None = None,
    *,
    pre_activation: bool = False,
) -> dict[str, float]:
    """What storing a tap costs in accuracy, measured on values [n, C] with float64 sums over all channels.

    The reference is the value the loss would see without a cache: ``max(value, margin)`` where a margin is given.

    Returns:
        ``relative_rms_error`` ‖decoded − t‖ / ‖t‖ (of zeros: 0 if exact, else 1), ``worst_channel_rms_error`` the
        largest of the channels' own (one that dwarfs the others hides them in the tap's), ``cosine`` between both,
        ``saturated_fraction`` of values beyond the outermost code by more than half a step, and, for maps before an
        activation, ``mask_flip_rate``: the fraction whose sign test ``t > 0`` changes, which is what OFD's partial L2
        branches on.
    """
    target = values if margin is None else np.maximum(values, margin)
    decoded = round_trip(values, offset, step, codec, margin)
    wanted, found = target.astype(np.float64), decoded.astype(np.float64)
    wrong_C, norm_C = ((found - wanted) ** 2).sum(axis=0), (wanted**2).sum(axis=0)
    wrong, norm = float(wrong_C.sum()), float(norm_C.sum())
    cosine = float((wanted * found).sum()) / max(np.sqrt(norm * float((found**2).sum())), np.finfo(np.float64).tiny)
    top = CODECS[codec].top_code
    if top is not None:
        outside = (target > offset + (top + 0.5) * step) | (target < offset - 0.5 * step)
    else:
        outside = np.abs(target) > (F16_MAX if codec == "f16" else np.inf)
    result = {
        "relative_rms_error": _relative_error(wrong, norm),
        "worst_channel_rms_error": max(map(_relative_error, wrong_C.tolist(), norm_C.tolist())),
        "cosine": 1.0 if wrong == 0 else cosine,
        "saturated_fraction": float(outside.mean()),
    }
    if pre_activation:
        result["mask_flip_rate"] = float(((target > 0) != (decoded > 0)).mean())
    return result


def _relative_error(squared_error: float, squared_norm: float) -> float:
    if squared_error == 0:
        return 0.0
    return float(np.sqrt(squared_error / squared_norm)) if squared_norm > 0 else 1.0
