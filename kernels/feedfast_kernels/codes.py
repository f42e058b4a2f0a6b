"""Teacher maps as small integers: value = offset_C + step_C * code, per channel, channels-last.

Legend: B batch, C channel, H height, W width, N token. Logical shapes are NCHW ([B, C, N] for tokens, [B, C] for
vectors), as student maps are; stored bytes are [B, H, W, C], the order fast students run in and the cache keeps.

`u6`, `u5` and `u4` are packed along the channels, pixel by pixel (_packing.py has the layout, and why it is so).

`encode` runs with a teacher's forward pass and must be negligible next to it: on a CPU it works in cache-sized tiles;
on CUDA Triton kernels do both directions in one pass (gpu/codes.py), with the bits of the CPU. float64 stays with
PyTorch's operators. Neither direction has a gradient.

What it does not do: choose offset and step (see feedfast.storage.fit), or touch float maps, which need no code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal, TypeGuard

import torch
from torch import Tensor

from feedfast_kernels import _packing as packing
from feedfast_kernels._layout import along_row, as_BHWC, is_eager_cpu, scratch, tiles, work_dtype
from feedfast_kernels._ops import OPS, register, runs_triton

_ROUND: Final = float(1 << 23)  # fp32 numbers from here on are whole

CodecName = Literal["u8", "u6", "u5", "u4"]
StoredAs = Literal["u8", "u6", "u5", "u4", "float"]
"""What operators and kernels are told about a target: the codec of its codes, or that it is a float map."""


@dataclass(frozen=True, slots=True)
class Codec:
    """How one value of a map is stored.

    Attributes:
        name: as recipes and manifests write it.
        bits: per value.
        top_code: the largest code, None for floats. The pattern above it is a cache's fill value and never a code.
    """

    name: str
    bits: int
    top_code: int | None = None

    @property
    def quantized(self) -> bool:
        """Whether values are codes with an offset and a step per channel."""
        return self.top_code is not None

    @property
    def parts(self) -> tuple[int, ...]:
        """Widths in bits of the parts that a code is stored in, the lowest bits first; none of floats."""
        return packing.parts_of(self.bits) if self.quantized else ()


CODECS: Final = {
    codec.name: codec
    for codec in (
        Codec("f32", 32),
        Codec("f16", 16),
        *(Codec(f"u{bits}", bits, 2**bits - 2) for bits in (8, 6, 5, 4)),
    )
}


def is_quantized(codec: str) -> TypeGuard[CodecName]:
    """Whether it is the name of a codec whose values are codes."""
    return codec in CODECS and CODECS[codec].quantized


@dataclass(frozen=True, slots=True)
class Codes:
    """A batch of encoded maps or vectors.

    Attributes:
        data: uint8 [B, H, W, C], [B, N, C] or [B, C], any strides; packed: the last axis is `packed_channels`.
        offset: fp32 [C], the value of code 0.
        step: fp32 [C], difference of neighboring codes; 0 marks a constant channel.
        codec: ``"u8"``, ``"u6"``, ``"u5"`` or ``"u4"``.

    Raises:
        ValueError: if dtypes or shapes do not fit together.
    """

    data: Tensor
    offset: Tensor
    step: Tensor
    codec: CodecName

    def __post_init__(self) -> None:
        check_scale(self.offset, self.step, self.codec)
        expected = packed_channels(self.offset.shape[0], self.codec)
        if self.data.dtype != torch.uint8 or self.data.ndim not in (2, 3, 4) or self.data.shape[-1] != expected:
            raise ValueError(
                f"codes: data expected uint8 [B, H, W, {expected}], [B, N, {expected}] or [B, {expected}] for "
                f"{self.offset.shape[0]} channels of {self.codec}, got {self.data.dtype} {list(self.data.shape)}"
            )

    @property
    def shape(self) -> torch.Size:
        """Logical shape: (B, C, H, W) for maps, (B, C, N) for tokens, (B, C) for vectors."""
        batch, *spatial, _ = self.data.shape
        return torch.Size((batch, self.offset.shape[0], *spatial))

    @property
    def device(self) -> torch.device:
        """Device of the codes."""
        return self.data.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Codes:
        """The same codes on ``device``."""
        data, offset, step = (x.to(device, non_blocking=non_blocking) for x in (self.data, self.offset, self.step))
        return Codes(data, offset, step, self.codec)

    def pin_memory(self) -> Codes:
        """The same codes in page-locked host memory, from which ``to(..., non_blocking=True)`` does not wait.

        PyTorch's `DataLoader(pin_memory=True)` calls this as well.

        Raises:
            RuntimeError: as `Tensor.pin_memory`, where there is no accelerator.
        """
        return Codes(self.data.pin_memory(), self.offset.pin_memory(), self.step.pin_memory(), self.codec)


Target = Tensor | Codes
"""What a loss compares with: codes, or a float map in logical NCHW (channels-last is fastest), [B, C, N] or [B, C]."""


def encode(
    x_NCHW: Tensor,
    offset_C: Tensor,
    step_C: Tensor,
    *,
    codec: str,
    margin_C: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Encode float maps: code = clip(round((max(x, margin) - offset) / step), 0, top code), ties to even.

    Args:
        x_NCHW: float [B, C, H, W], [B, C, N] or [B, C], fp32 or 16-bit, any strides; channels-last is fastest.
            float64 is rounded to fp32.
        offset_C: fp32 [C].
        step_C: fp32 [C], >= 0; where it is 0 the code is 0.
        codec: ``"u8"``, ``"u6"``, ``"u5"`` or ``"u4"``; their top codes are 254, 62, 30 and 14.
        margin_C: fp32 [C], lower bound applied first (OFD's margin ReLU), or None.
        out: uint8 [B, H, W, C] (packed: `packed_channels` bytes) or its 3-D or 2-D form, to write into; any strides.

    Returns:
        The codes (``out`` where given, else a new contiguous tensor), and the number of values that the clip changed by
        at least one code, an int64 scalar on the device of ``x_NCHW``.

    Raises:
        ValueError: wrong shapes, dtypes or codec; on the CPU also NaN or infinite values. On a GPU reading values back
            would stall it, and in `torch.compile` break the graph, so there a non-finite value becomes an arbitrary
            code and counts as saturated (but minus infinity under a margin is the margin).
    """
    return _encode(x_NCHW, offset_C, step_C, codec, margin_C, out, triton=runs_triton(x_NCHW))


def encode_reference(
    x_NCHW: Tensor,
    offset_C: Tensor,
    step_C: Tensor,
    *,
    codec: str,
    margin_C: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`encode` in PyTorch operators on any device: what the kernel is compared with."""
    return _encode(x_NCHW, offset_C, step_C, codec, margin_C, out, triton=False)


def _encode(
    x_NCHW: Tensor,
    offset_C: Tensor,
    step_C: Tensor,
    codec: str,
    margin_C: Tensor | None,
    out: Tensor | None,
    *,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    if x_NCHW.ndim == 3:  # tokens are a map of one column
        column = None if out is None else out.unsqueeze(2)
        column, saturated = _encode(x_NCHW.unsqueeze(3), offset_C, step_C, codec, margin_C, column, triton=triton)
        return (column.squeeze(2) if out is None else out), saturated
    check_scale(offset_C, step_C, codec)
    channels = offset_C.shape[0]
    if x_NCHW.ndim not in (2, 4) or x_NCHW.shape[1] != channels or not x_NCHW.is_floating_point():
        raise ValueError(
            f"encode: expected a float map [B, {channels}, H, W] or vectors [B, {channels}], "
            f"got {x_NCHW.dtype} {list(x_NCHW.shape)}"
        )
    if margin_C is not None and margin_C.shape != offset_C.shape:
        raise ValueError(f"encode: margin expected [{channels}], got {list(margin_C.shape)}")
    x_BHWC = as_BHWC(x_NCHW)
    stored = (*x_BHWC.shape[:3], packed_channels(channels, codec))
    if x_NCHW.ndim == 2:
        stored = (stored[0], stored[3])
    if out is None:
        out = torch.empty(stored, dtype=torch.uint8, device=x_NCHW.device)
    elif out.dtype != torch.uint8 or tuple(out.shape) != stored:
        raise ValueError(f"encode: out expected uint8 {list(stored)}, got {out.dtype} {list(out.shape)}")
    if triton:
        into = out if out.is_contiguous() else torch.empty(stored, dtype=torch.uint8, device=x_NCHW.device)
        count: Tensor = OPS.encode(x_NCHW.detach(), offset_C, step_C, codec, margin_C, into)
        return (out if into is out else out.copy_(into)), count
    # packing and odd strides are cheap (one byte per element): quantize into a plain buffer first
    scale = (offset_C, torch.where(step_C == 0, torch.inf, step_C), margin_C, top_code(codec))
    if is_eager_cpu(x_NCHW):
        direct = codec == "u8" and out.is_contiguous()
        codes = out.view(x_BHWC.shape) if direct else torch.empty(x_BHWC.shape, dtype=torch.uint8)
        saturated = _quantize_tiled(x_NCHW.detach(), *scale, codes)
        if direct:
            return out, saturated
    else:
        codes, saturated = _quantize(x_BHWC.detach(), *scale)
    into = out if out.ndim == 4 else out[:, None, None, :]
    for tile in tiles(codes.shape) if is_eager_cpu(codes) else (slice(None),):
        pack(codes[tile], codec, into[tile])
    return out, saturated


def _quantize(
    x_BHWC: Tensor, offset_C: Tensor, divisor_C: Tensor, margin_C: Tensor | None, top: int
) -> tuple[Tensor, Tensor]:
    """Codes and saturation count of a whole map: the plain formula."""
    scaled = ((x_BHWC.float() - offset_C) / divisor_C).round()
    if margin_C is not None:
        scaled = torch.maximum(scaled, ((margin_C - offset_C) / divisor_C).round())
    clipped = scaled.clamp(0, top)
    return clipped.to(torch.uint8), (scaled != clipped).sum()


def _quantize_tiled(
    x_NCHW: Tensor, offset_C: Tensor, divisor_C: Tensor, margin_C: Tensor | None, top: int, codes_BHWC: Tensor
) -> Tensor:
    """Write the codes of ``x_NCHW`` into the contiguous ``codes_BHWC``; returns the saturation count."""
    # a contiguous NCHW map is quantized in its own order: transposing bytes is cheaper than transposing floats
    channels_first = x_NCHW.ndim == 4 and x_NCHW.is_contiguous()
    if channels_first:
        source, codes = x_NCHW, codes_BHWC.permute(0, 3, 1, 2)
    else:
        source, codes = as_BHWC(x_NCHW), codes_BHWC

    def along_tile(value_C: Tensor) -> Tensor:
        return value_C[:, None] if channels_first else along_row(value_C, source.shape[2])

    offset, divisor = along_tile(offset_C), along_tile(divisor_C)
    # the clip at the margin comes after the rounding, where it costs one operator on what is in the cache anyway:
    # rounding is monotone, so round(max(x, m)) == max(round(x), round(m)) to the bit
    lowest = None if margin_C is None else along_tile(((margin_C - offset_C) / divisor_C).round_())
    # OFD's margin is where a fitted range begins: then nothing is below code 0
    floors_at_zero = lowest is not None and not lowest.any()
    highest = -math.inf if lowest is None else lowest.max().item()
    saturated = 0
    for tile in tiles(source.shape):
        x = source[tile]
        shape = (x.shape[0], x.shape[1], x.shape[2] * x.shape[3])  # [b, h, W*C] or, channels first, [b, c, H*W]
        here = tile[1] if channels_first else slice(None)
        scaled, clipped = (scratch(slot, shape) for slot in (0, 1))
        if x.dtype == torch.float32 and x.is_contiguous():
            torch.sub(x.view(shape), offset[here], out=scaled)
        else:
            scaled.view(x.shape).copy_(x)
            scaled.sub_(offset[here])
        scaled.div_(divisor[here])
        least, most = scaled.amin().item(), scaled.amax().item()  # NaN if any is
        if not math.isfinite(least + most):
            _raise_if_not_finite(x)
        most = max(most, highest)
        if lowest is not None and not floors_at_zero:
            torch.maximum(scaled.round_(), lowest[here], out=scaled)
        if floors_at_zero or least >= -0.5:
            clipped = scaled  # no code below 0 is lost; ties go to the even 0
        else:
            torch.clamp(scaled.round_(), 0, top, out=clipped)
            # a dot product of {-1, 0, 1} is exact below 2^24 and 3x cheaper than a comparison and a count
            excess = scaled.sub_(clipped).clamp_(-1, 1).view(-1)
            saturated += int(torch.dot(excess, excess).item())
        # Adding 2^23 rounds as `round` does, ties to even, and leaves the code in the low byte: int32 -> uint8 is
        # vectorized, float -> uint8 is not. What the clip loses is the code above the largest, counted as bytes.
        integers = clipped.clamp_(0, top + 1).add_(_ROUND).view(torch.int32)
        stored = integers.to(torch.uint8) if channels_first or most > top + 0.5 else integers
        if most > top + 0.5:
            saturated += _above(stored, top)
            stored.clamp_max_(top)
        codes[tile].copy_(stored.view(x.shape))
    return torch.tensor(saturated)


def _above(codes: Tensor, top: int) -> int:
    """How many codes are above the largest, counted as bytes: by NumPy, ten times as fast, where torch has it."""
    try:
        import numpy as np
    except ImportError:
        return int(torch.count_nonzero(codes > top))
    return int(np.count_nonzero(codes.numpy() > top))


def _raise_if_not_finite(tile: Tensor) -> None:
    """Raise if a value of the tile is not finite; finite values whose sum overflows are fine."""
    bad = ~tile.isfinite()
    if bad.any():
        raise ValueError(
            f"encode: expected finite values, got {int(bad.sum())} NaN or infinite ones in the first part looked at"
        )


def decode(codes: Codes, dtype: torch.dtype = torch.float32) -> Tensor:
    """Float map of ``codes``: offset + step * code, computed in fp32 (float64 if asked for).

    Args:
        codes: the encoded batch.
        dtype: of the result.

    Returns:
        Logical [B, C, H, W] with channels-last strides, likewise [B, C, N], or [B, C].

    Example:
        >>> import torch
        >>> offset, step = torch.tensor([0.0]), torch.tensor([0.5])
        >>> stored, clipped = encode(torch.tensor([[0.0], [1.2], [500.0]]), offset, step, codec="u8")
        >>> stored.flatten().tolist(), clipped.item()
        ([0, 2, 254], 1)
        >>> decode(Codes(stored, offset, step, "u8")).flatten().tolist()
        [0.0, 1.0, 127.0]
    """
    if codes.data.ndim == 3:
        return decode(Codes(codes.data.unsqueeze(2), codes.offset, codes.step, codes.codec), dtype).squeeze(3)
    if dtype != torch.float64 and runs_triton(codes.data):
        stored: Tensor = OPS.decode(codes.data, codes.offset.detach(), codes.step.detach(), codes.codec, dtype)
        return stored.permute(0, 3, 1, 2) if stored.ndim == 4 else stored
    if dtype != torch.float64 and is_eager_cpu(codes.data):
        return _decode_tiled(codes, dtype)
    return decode_reference(codes, dtype)


def decode_reference(codes: Codes, dtype: torch.dtype = torch.float32) -> Tensor:
    """`decode` in PyTorch operators on any device: what the kernel is compared with."""
    work = torch.float64 if dtype == torch.float64 else torch.float32
    data = unpack(codes.data, codes.offset.shape[0], codes.codec)
    value = data.to(work).mul_(codes.step.to(work)).add_(codes.offset.to(work)).to(dtype)
    return value.movedim(-1, 1)


def _decode_tiled(codes: Codes, dtype: torch.dtype) -> Tensor:
    data = codes.data if codes.data.ndim == 4 else codes.data[:, None, None, :]
    shape = (*data.shape[:3], codes.offset.shape[0])
    out = torch.empty(shape, dtype=dtype, device=data.device)
    step, offset = (along_row(value_C.detach(), shape[2]) for value_C in (codes.step, codes.offset))
    for tile in tiles(shape):
        part = unpack(data[tile], shape[3], codes.codec)
        into = out[tile].view(-1, shape[2] * shape[3])
        rows = into if dtype == torch.float32 else scratch(0, into.shape)
        rows.view(part.shape).copy_(part)
        rows.mul_(step).add_(offset)
        if rows is not into:
            into.copy_(rows)
    return out.permute(0, 3, 1, 2) if codes.data.ndim == 4 else out.view(codes.shape)


register(
    "encode(Tensor x, Tensor offset, Tensor step, str codec, Tensor? margin, Tensor(a!) out) -> Tensor",
    "codes.encode",
    lambda x, *_: x.new_empty((), dtype=torch.int64),
)
register(
    "decode(Tensor data, Tensor offset, Tensor step, str codec, ScalarType dtype) -> Tensor",
    "codes.decode",
    lambda data, offset, _step, _codec, dtype: data.new_empty((*data.shape[:-1], offset.shape[0]), dtype=dtype),
)


def stored_parts(target: Target) -> tuple[Tensor, Tensor | None, Tensor | None, StoredAs]:
    """What operators take: data, offset, step and codec of codes; a float map, None, None and ``"float"``."""
    if isinstance(target, Codes):
        return target.data, target.offset, target.step, target.codec
    return target.detach(), None, None, "float"


def as_float(target: Target) -> Tensor:
    """The target as an fp32 map: decoded codes, or the float map itself (float64 stays)."""
    return decode(target) if isinstance(target, Codes) else target.to(work_dtype(target))


def unpack(data: Tensor, channels: int, codec: StoredAs) -> Tensor:
    """The codes [..., channels], one per byte, of stored bytes [..., `packed_channels`]; a float map as it is."""
    return data if codec == "float" else packing.unpack(data, channels, CODECS[codec].parts)


def pack(codes: Tensor, codec: str, out: Tensor | None = None) -> Tensor:
    """The stored bytes [..., `packed_channels`] of codes [..., channels], one per byte and none above the top code."""
    if out is None:
        out = codes.new_empty((*codes.shape[:-1], packed_channels(codes.shape[-1], codec)))
    packing.pack(codes, CODECS[codec].parts, out)
    return out


def packed_channels(channels: int, codec: str) -> int:
    """Length of a stored pixel's last axis: ``channels`` values, or the bytes that hold their codes.

    These are bits * channels / 8 for a multiple of 8 channels; of others each part of a code is filled up to a byte.
    """
    parts = CODECS[codec].parts if codec in CODECS else ()
    return sum(-(-channels * width // 8) for width in parts) if parts else channels


def top_code(codec: str) -> int:
    """The largest code of a quantized codec.

    Raises:
        ValueError: if there is no such codec, or its values are floats.
    """
    known = CODECS.get(codec)
    if known is None or known.top_code is None:
        quantized = sorted(name for name, entry in CODECS.items() if entry.quantized)
        raise ValueError(f"codec: expected one of {quantized}, got {codec!r}")
    return known.top_code


def check_scale(offset: Tensor, step: Tensor, codec: str) -> None:
    """Raise ValueError unless ``codec`` is known and offset and step are fp32 [C]."""
    top_code(codec)
    for name, value in (("offset", offset), ("step", step)):
        if value.dtype != torch.float32 or value.ndim != 1 or value.shape != offset.shape:
            channels = offset.shape[0] if offset.ndim else "C"
            raise ValueError(f"{name}: expected fp32 [{channels}], got {value.dtype} {list(value.shape)}")
