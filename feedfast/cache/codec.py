"""Maps ↔ codes, and codes ↔ bytes: the fit, its measurement, blocks and shards.

**Codes.** ``u8`` and ``u4`` are affine per channel: ``value = offset + step * code`` with codes 0..254 and 0..14
(0xFF is the fill value, so no stored byte may be 0xFF). ``u4`` packs two codes a byte, low nibble first, along the
channels; an odd last channel leaves the high nibble 0. ``f16`` and ``f32`` store values as they are, with offset 0
and step 1.

**The fit** is the range of least squared error on a pilot, not the minimum and maximum: on real maps a few outliers
make min/max waste most levels. Once the values of a channel are sorted, sums of x and x² over any interval are two
look-ups, so the exact error of a range costs as many look-ups as there are codes, however long the pilot is; ranges
are searched coarse to fine, one end at a time. A value that occurs often at the lower end (a ReLU's zero, OFD's
margin) keeps code 0 to itself, exactly. The result is never worse on the pilot than min/max. One uniform step is kept
on purpose: a table of levels would have to be gathered inside the fused losses.

**Bytes.** A block is one zstd frame (level 1, frame checksum on) or raw bytes followed by their crc32c; a shard is
its blocks and an index of (offset, length) per block with a crc32c, as Zarr's ``sharding_indexed`` lays them out with
the index at the end. Decoding trusts nothing: frame header, announced size, checksum flag, offsets and lengths are
checked before memory is touched.

NumPy reference implementations of encoding live here for measurement and inspection; the fast ones are in
``feedfast_kernels``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs import zstd

from feedfast.cache.layout import NO_CHUNK, ZSTD_LEVEL
from feedfast.cache.schema import CodecName, Compression
from feedfast.errors import CacheDamageError, FeedfastError

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Buffer = bytes | bytearray | memoryview | Array

TOP_CODE: Final = {"u8": 254, "u4": 14}
F16_MAX: Final = 65504.0
ZSTD_PAYS: Final = 1.15
PILOT_VALUES: Final = (
    1 << 16
)  # values a channel the fit looks at; more change the range by less than it changes the error
_ATOM_SHARE: Final = 0.002  # of a channel's values at its minimum, from which on the minimum keeps code 0
_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"


# ---- values ↔ codes


def fit_affine(values: Floats, codec: CodecName) -> tuple[Floats, Floats]:
    """Offset and step per channel of least squared error on a pilot.

    Args:
        values: [n, C] pilot values, as they will be encoded (margin already applied).
        codec: ``u8`` or ``u4``; for ``f16`` and ``f32`` the identity is returned.

    Returns:
        offset [C], step [C], float32. A channel with one single value has step 0 and is exact.

    Raises:
        FeedfastError: the pilot is empty or not finite.
    """
    if values.ndim != 2 or values.shape[0] == 0:
        raise FeedfastError(f"pilot: expected values [n, channel] with n > 0, found shape {list(values.shape)}")
    channels = values.shape[1]
    offset, step = np.zeros(channels, np.float32), np.ones(channels, np.float32)
    if codec not in TOP_CODE:
        return offset, step
    top = TOP_CODE[codec]
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
    error = _RangeError(ordered, top)
    atoms = int(np.searchsorted(ordered, ordered[0], side="right"))
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


def quantize(values: Array, offset: Floats, step: Floats, codec: CodecName, margin: Floats | None = None) -> Array:
    """Codes of values [..., C]: uint8, not packed, for ``u8`` and ``u4``, else the float type.

    ``margin`` [C] floors the values first.
    """
    if margin is not None:
        values = np.maximum(values, margin)
    if codec == "f32":
        return values.astype(np.float32)
    if codec == "f16":
        return np.clip(values, -F16_MAX, F16_MAX).astype(np.float16)
    scaled = np.divide(values - offset, step, out=np.zeros(values.shape, np.float32), where=step > 0)
    return np.clip(np.rint(scaled), 0, TOP_CODE[codec]).astype(np.uint8)


def dequantize(codes: Array, offset: Floats, step: Floats) -> Floats:
    """Values of codes [..., C] that are not packed."""
    decoded: Floats = codes.astype(np.float32) * step + offset
    return decoded


def pack_u4(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Codes 0..14 [..., C] as bytes [..., ceil(C / 2)], low nibble first; with odd C the last high nibble is 0."""
    packed = codes[..., ::2].copy()
    odd = codes[..., 1::2]
    packed[..., : odd.shape[-1]] |= odd << 4
    return packed


def unpack_u4(packed: npt.NDArray[np.uint8], channels: int) -> npt.NDArray[np.uint8]:
    """The inverse of `pack_u4` for ``channels`` channels."""
    codes = np.empty((*packed.shape[:-1], channels), np.uint8)
    codes[..., ::2] = packed & 0x0F
    codes[..., 1::2] = (packed >> 4)[..., : channels // 2]
    return codes


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
        ``relative_rms_error`` ‖decoded − t‖ / ‖t‖ (of zeros: 0 if exact, else 1), ``cosine`` between both,
        ``saturated_fraction`` of values beyond the outermost code by more than half a step, and, for maps before an
        activation, ``mask_flip_rate``: the fraction whose sign test ``t > 0`` changes, which is what OFD's partial L2
        branches on.
    """
    target = values if margin is None else np.maximum(values, margin)
    decoded = dequantize(quantize(values, offset, step, codec, margin), offset, step)
    wanted, found = target.astype(np.float64), decoded.astype(np.float64)
    wrong, norm = float(((found - wanted) ** 2).sum()), float((wanted**2).sum())
    cosine = float((wanted * found).sum()) / max(np.sqrt(norm * float((found**2).sum())), np.finfo(np.float64).tiny)
    if codec in TOP_CODE:
        outside = (target > offset + (TOP_CODE[codec] + 0.5) * step) | (target < offset - 0.5 * step)
    else:
        outside = np.abs(target) > (F16_MAX if codec == "f16" else np.inf)
    error = 0.0 if wrong == 0 else float(np.sqrt(wrong / norm)) if norm > 0 else 1.0
    result = {
        "relative_rms_error": error,
        "cosine": 1.0 if wrong == 0 else cosine,
        "saturated_fraction": float(outside.mean()),
    }
    if pre_activation:
        result["mask_flip_rate"] = float(((target > 0) != (decoded > 0)).mean())
    return result


# ---- blocks ↔ bytes


def crc32c(data: Buffer, start: int = 0) -> int:
    """CRC-32C of a buffer, continuing from ``start``."""
    return int(google_crc32c.extend(start, data if isinstance(data, bytes) else np.frombuffer(data, np.uint8)))


def row_sums(rows: Array) -> npt.NDArray[np.uint32]:
    """crc32c of each row of ``rows`` [n, ...], uint32 [n]; 0xFFFFFFFF, which would read as missing, is one less."""
    found = np.array([crc32c(np.ascontiguousarray(row)) for row in rows], np.uint32)
    return np.minimum(found, np.uint32(0xFFFFFFFE))


def crc_bytes(value: int) -> bytes:
    """A checksum as Zarr stores it: four bytes, little-endian."""
    return value.to_bytes(4, "little")


def compress_block(block: Buffer, compression: Compression) -> bytes:
    """One block as stored: a zstd frame with checksum, or the bytes and their crc32c."""
    if compression == "zstd":
        return bytes(zstd.compress(block, ZSTD_LEVEL, True))
    return b"".join((np.frombuffer(block, np.uint8).data, crc_bytes(crc32c(block))))


def decompress(stored: Buffer, compression: Compression, out: Array) -> None:
    """Decode a stored block into ``out``, whose byte size is the one expected, verifying its checksum.

    Raises:
        CacheDamageError: wrong size, checksum or frame; ``out`` then holds nothing of use.
    """
    target = out.reshape(-1).view(np.uint8)
    source = np.frombuffer(stored, np.uint8)
    if compression == "none":
        if source.size != target.size + 4:
            raise CacheDamageError(f"block: expected {target.size + 4} bytes, found {source.size}")
        if crc_bytes(crc32c(source[:-4])) != source[-4:].tobytes():
            raise CacheDamageError("block: crc32c differs")
        target[:] = source[:-4]
        return
    announced = zstd_content_size(source[:18].tobytes())
    if announced != target.size:
        raise CacheDamageError(f"block: expected a zstd frame of {target.size} bytes with checksum, found {announced}")
    try:
        zstd.decompress(source, target)
    except RuntimeError as error:
        raise CacheDamageError(f"block: {error}") from error


def zstd_content_size(header: bytes) -> int | None:
    """Decoded size a zstd frame announces (RFC 8878, 3.1.1); None for no frame, or one without size or checksum."""
    if len(header) < 6 or header[:4] != _ZSTD_MAGIC:
        return None
    descriptor = header[4]
    single_segment, checksum = bool(descriptor & 0x20), bool(descriptor & 0x04)
    width = (1 if single_segment else 0, 2, 4, 8)[descriptor >> 6]
    start = 5 + (0 if single_segment else 1) + (0, 1, 2, 4)[descriptor & 0x03]
    if not checksum or width == 0 or len(header) < start + width:
        return None
    size = int.from_bytes(header[start : start + width], "little")
    return size + 256 if width == 2 else size


def choose_compression(blocks: Iterable[Buffer]) -> Compression:
    """``zstd`` if it shrinks these pilot blocks of real codes by 1.15 or more, else ``none``."""
    raw = stored = 0
    for block in blocks:
        raw += np.frombuffer(block, np.uint8).size
        stored += len(compress_block(block, "zstd"))
    return "zstd" if stored and raw / stored >= ZSTD_PAYS else "none"


def index_bytes(lengths: Sequence[int | None]) -> bytes:
    """A shard's index for blocks of these stored lengths laid end to end from offset 0; None marks an absent block."""
    table = np.full((len(lengths), 2), NO_CHUNK, "<u8")
    offset = 0
    for number, length in enumerate(lengths):
        if length is not None:
            table[number] = offset, length
            offset += length
    data = table.tobytes()
    return data + crc_bytes(crc32c(data))


def index_length(num_blocks: int) -> int:
    """Bytes of a shard's index."""
    return 16 * num_blocks + 4


def parse_index(tail: Buffer, num_blocks: int, object_bytes: int) -> npt.NDArray[np.uint64]:
    """The (offset, length) table [num_blocks, 2] in the last `index_length` bytes of a shard.

    Absent blocks are (2^64-1, 2^64-1).

    Raises:
        CacheDamageError: too short, wrong checksum, or an entry outside the object's data.
    """
    size = index_length(num_blocks)
    data = np.frombuffer(tail, np.uint8)
    if data.size < size or object_bytes < size:
        raise CacheDamageError(f"index: expected {size} bytes, found {min(data.size, object_bytes)}")
    data = data[-size:]
    if crc_bytes(crc32c(data[:-4])) != data[-4:].tobytes():
        raise CacheDamageError("index: crc32c differs")
    table = data[:-4].view("<u8").reshape(num_blocks, 2)
    present = ~(table == NO_CHUNK).all(axis=1)
    room = np.uint64(object_bytes - size)
    offsets, lengths = table[present, 0], table[present, 1]
    if ((offsets > room) | (lengths > room - np.minimum(offsets, room))).any():
        raise CacheDamageError(f"index: a block lies outside the {object_bytes - size} bytes before it")
    return table.astype(np.uint64)
