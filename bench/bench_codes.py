"""How fast are `encode` and `decode`, between float maps and channels-last codes?

    python bench/bench_codes.py [--seconds 60] [--out bench/results.csv]
    python bench/bench_codes.py --tiny --device cpu

Shapes: the four taps of ResNet-152 and those of WRN-28-4, then packed codes, an NCHW and an fp32 map at one of them.
Encoding clips at a margin and counts what saturated; decoding gives the teacher's dtype. There is no gradient, so
there is no backward direction.

    feedfast            the public functions: on a GPU the Triton kernels, elsewhere PyTorch over tiles
    reference eager     the same in PyTorch operators
    composite eager     the formulas as one would write them
    compile ...         torch.compile of that, one graph for the shape
    copy                a device copy of as many bytes as the operation must move

How it is measured: measure.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache, partial

import torch
from bench_partial_l2 import RESNET, TINY, WRN, values
from inputs import DTYPES, random_codes, random_map
from measure import Call, Setting, Tolerance, Work, main
from torch import Tensor

from feedfast_kernels import Codes, decode, encode
from feedfast_kernels.codes import decode_reference, encode_reference, top_code

EVERYONE = ("feedfast", "copy", "compile default", "reference eager", "composite eager", "compile max-autotune")
EXACT = Tolerance(gradient=0.0)
# a compiler may divide by multiplying, and contract: codes half way between two integers go either way
HALVES = Tolerance(share=1e-4)


def settings(tiny: bool) -> list[Setting]:
    """Both operations at all shapes with u8, then other codes and memory orders at one of them."""

    def setting(
        operation: str, shape: tuple[int, ...], dtype: str, codec: str, layout: str, variants: tuple[str, ...]
    ) -> Setting:
        build = {"encode": build_encode, "decode": build_decode}[operation]
        make = partial(build, shape=shape, dtype=DTYPES[dtype], codec=codec, layout=layout)
        name = "x".join(map(str, shape))
        return Setting(operation, name, dtype, codec, layout, make, variants, directions=("forward",))

    shapes = TINY if tiny else RESNET + WRN
    found = [setting(name, shape, "bf16", "u8", "NHWC", EVERYONE) for name in ("encode", "decode") for shape in shapes]
    one, other = (TINY[0] if tiny else RESNET[1]), ("feedfast", "copy")
    for operation, dtype, codec, layout in (
        ("encode", "bf16", "u6", "NHWC"), ("decode", "bf16", "u6", "NHWC"),
        ("encode", "bf16", "u5", "NHWC"), ("decode", "bf16", "u5", "NHWC"),
        ("encode", "bf16", "u4", "NHWC"), ("decode", "bf16", "u4", "NHWC"), ("encode", "bf16", "u8", "NCHW"),
        ("encode", "fp32", "u8", "NHWC"), ("decode", "fp32", "u8", "NHWC"),
    ):  # fmt: skip
        found.append(setting(operation, one, dtype, codec, layout, other))
    return found


def moved(floats: Tensor, stored: Tensor) -> dict[str, int]:
    """Bytes: of an element 3 with bf16 and u8, in either direction."""
    # encode: read the map (bf16: 2), write the codes (u8: 1); the count is nothing
    # decode: read the codes (1), write the map (2)
    return {"forward": floats.numel() * floats.element_size() + stored.numel()}


def build_encode(device: torch.device, *, shape: Sequence[int], dtype: torch.dtype, codec: str, layout: str) -> Work:
    """A teacher's map of which a few values saturate, and everyone who encodes it."""
    x = random_map(shape, dtype, layout, device, seed=1)
    scale = random_codes(shape, codec, device, seed=2)  # for its offset and step, and for the size of its codes
    margin = random_map((shape[1],), torch.float32, "", device, seed=3).abs_().neg_()
    arguments = (x, scale.offset, scale.step)

    @cache
    def expected() -> list[Tensor]:
        return list(encode_reference(*arguments, codec=codec, margin_C=margin))

    plain = Call(quantized, (*arguments, margin, top_code(codec)), expected, HALVES)
    calls = {
        "feedfast": Call(lambda: encode(*arguments, codec=codec, margin_C=margin), (), expected),
        "reference eager": Call(lambda: encode_reference(*arguments, codec=codec, margin_C=margin), (), expected),
        "composite eager": plain,
        "compile default": plain,
        "compile max-autotune": plain,
    }
    return Work([], moved(x, scale.data), calls)


def quantized(x: Tensor, offset: Tensor, step: Tensor, margin: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The formula of `encode` for u8, written down."""
    rows = x.permute(0, 2, 3, 1).float()
    scaled = ((torch.maximum(rows, margin) - offset) / step).round()
    clipped = scaled.clamp(0, top)
    return clipped.to(torch.uint8).contiguous(), (scaled != clipped).sum()


def build_decode(device: torch.device, *, shape: Sequence[int], dtype: torch.dtype, codec: str, layout: str) -> Work:
    """Codes, and everyone who decodes them; the result is channels-last, whatever ``layout`` says."""
    codes = random_codes(shape, codec, device, seed=2)
    expected = cache(lambda: [decode_reference(codes, dtype)])
    plain = Call(decoded, (codes, dtype), expected)
    calls = {
        "feedfast": Call(lambda: decode(codes, dtype), (), expected, EXACT),
        "reference eager": Call(lambda: decode_reference(codes, dtype), (), expected, EXACT),
        "composite eager": plain,
        "compile default": plain,
        "compile max-autotune": plain,
    }
    return Work([], moved(torch.empty(tuple(shape), dtype=dtype, device="meta"), codes.data), calls)


def decoded(codes: Codes, dtype: torch.dtype) -> Tensor:
    """The formula of `decode`, written down."""
    return values(codes.data, codes.offset, codes.step, codes.codec).to(dtype)


if __name__ == "__main__":
    sys.exit(main(settings, __doc__))
