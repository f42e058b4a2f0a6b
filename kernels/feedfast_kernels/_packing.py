"""Codes of fewer than 8 bits in bytes: every binary digit of the number of bits is a part of its own.

A pixel's bytes are its parts one after the other: of 6-bit codes the lower four bits of all channels, two channels per
byte, then the upper two, four per byte; of 5-bit codes the upper one, eight per byte; of 4-bit codes the first part
alone. Within a byte the lower channel has the lower bits, and what is left of a part's last byte is 0.

So no code lies across two bytes; the bits of channel c begin at bit (c * width) of a part, whatever the channel; and a
part of 16 channels is 8, 4 or 2 bytes, which one load brings in, where a stream of 6-bit codes has to be taken apart
byte by byte. Parts are of a pixel, not of a row, so that any pixel is read by itself.

Legend: C channels, P bytes of a pixel, n bytes of a part. `parts` are the widths in bits, the lowest bits first.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import Final

import torch
from torch import Tensor

from feedfast_kernels._layout import is_eager_cpu

WHOLE_BYTES: Final = ((), (8,))  # floats, and codes that need no packing


def parts_of(bits: int) -> tuple[int, ...]:
    """Widths of the parts of a code: 8; 4 and 2; 4 and 1; 4."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def places(channels: int, parts: tuple[int, ...]) -> Iterator[tuple[int, int, slice]]:
    """Of each part: its width, the lowest of its bits in a code, and its bytes among those of a pixel."""
    low = start = 0
    for width in parts:
        stop = start - (-channels * width // 8)
        yield width, low, slice(start, stop)
        low, start = low + width, stop


def unpack(data: Tensor, channels: int, parts: tuple[int, ...]) -> Tensor:
    """The codes uint8 [..., C] of stored bytes [..., P]; floats and whole bytes as they are."""
    if parts in WHOLE_BYTES:
        return data
    spread = _spread if is_eager_cpu(data) else _spread_plainly
    codes: Tensor | None = None
    for width, low, here in places(channels, parts):
        digits = spread(data[..., here], width)[..., :channels]
        codes = digits if codes is None else torch.add(codes, digits, alpha=1 << low)
    assert codes is not None
    return codes


def pack(codes: Tensor, parts: tuple[int, ...], out: Tensor) -> None:
    """Write codes uint8 [..., C], each of which fits in the parts, into stored bytes [..., P]."""
    if parts in WHOLE_BYTES:
        out.copy_(codes)
        return
    channels = codes.shape[-1]
    gather = _gather if is_eager_cpu(codes) else _gather_plainly
    if channels % 8:
        codes = torch.nn.functional.pad(codes, (0, -channels % 8))
    for width, low, here in places(channels, parts):
        out[..., here].copy_(gather(codes, width, low)[..., : here.stop - here.start])


def _spread_plainly(part: Tensor, width: int) -> Tensor:
    """The numbers of ``width`` bits in bytes [..., n], the lowest bits first: [..., n * 8 / width]."""
    every = [(part >> low) & ((1 << width) - 1) for low in range(0, 8, width)]
    return torch.stack(every, dim=-1).flatten(-2)


def _gather_plainly(codes: Tensor, width: int, low: int) -> Tensor:
    """The inverse of `_spread_plainly`, for the numbers that are the bits from ``low`` on of codes."""
    digits = (codes >> low) & ((1 << width) - 1)
    return reduce(torch.bitwise_or, [digits[..., i :: 8 // width] << (width * i) for i in range(8 // width)])


# The same in eager operators that are vectorized on a CPU, on whole words: as many bytes as a byte holds numbers. To
# spread, a byte is widened to a word, its upper half of numbers moved up, then the upper half of each half, until each
# has a byte of its own: 0.13 ns per code for nibbles, where a stack of shifted bytes takes 0.6. To gather, a product
# with a sum of powers of two moves every number of a word into its highest byte at once; no two of the terms overlap
# there or below, so nothing is carried. A word's first byte is its lowest, as on every machine that PyTorch is built
# for.
_WORDS: Final = {4: torch.int16, 2: torch.int32, 1: torch.int64}


def _moves(width: int) -> list[tuple[int, int]]:
    """How far numbers are moved, step by step, and the mask of where they are afterwards."""
    found, numbers = [], 8 // width
    half = numbers // 2
    while half:
        group = (1 << half * width) - 1
        found.append(((8 - width) * half, sum(group << 8 * half * i for i in range(numbers // half))))
        half //= 2
    return found


_MOVES: Final = {width: _moves(width) for width in _WORDS}


def _spread(part: Tensor, width: int) -> Tensor:
    words = part.to(_WORDS[width], memory_format=torch.contiguous_format)
    for shift, mask in _MOVES[width]:
        words.bitwise_or_(words << shift).bitwise_and_(mask)
    return words.view(torch.uint8)


def _gather(codes: Tensor, width: int, low: int) -> Tensor:
    codes = codes.contiguous()
    if codes.storage_offset() % (8 // width):  # a view in words begins at one
        codes = codes.clone()
    words = codes.view(_WORDS[width])
    highest = 64 // width - 8  # first bit of a word's highest byte
    words = (words >> low if low else words) & _MOVES[width][-1][1]
    words *= sum(1 << highest - (8 - width) * i for i in range(8 // width))
    return (words >> highest).to(torch.uint8)
