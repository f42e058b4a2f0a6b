"""How fast is `partial_l2`, OFD's distance against codes, next to a copy and to what PyTorch makes of it?

    python bench/bench_partial_l2.py [--seconds 120] [--out bench/results.csv]
    python bench/bench_partial_l2.py --tiny --device cpu

Shapes: the four taps of ResNet-152 -> ResNet-50 at batch 256, and those of WRN-28-4 -> WRN-16-2 at batch 128. Then one
tap again with u6 and u4 codes, a float teacher, an NCHW student and an fp32 student.

    feedfast            the public function: on a GPU the Triton kernels, elsewhere PyTorch over tiles
    reference eager     the same in PyTorch operators over whole maps; recomputes in the backward pass too
    composite eager     the loss as one would write it, gradients by autograd
    compile ...         torch.compile of that, one graph for the shape
    official eager      as OFD's authors compute it: a mask of floats times the squared difference, from a decoded map
    copy                a device copy of as many bytes as the operation must move

How it is measured: measure.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache, partial

import torch
from inputs import DTYPES, random_codes, random_map
from measure import Call, Setting, Work, exact, main
from torch import Tensor

from feedfast_kernels import Codes, Target, decode, partial_l2
from feedfast_kernels.codes import unpack
from feedfast_kernels.partial_l2 import reference

RESNET = [(256, 256, 56, 56), (256, 512, 28, 28), (256, 1024, 14, 14), (256, 2048, 7, 7)]
WRN = [(128, 64, 32, 32), (128, 128, 16, 16), (128, 256, 8, 8)]
TINY = [(3, 16, 5, 5), (2, 17, 3, 3)]
EVERYONE = (
    "feedfast", "copy", "compile default", "reference eager", "official eager", "composite eager",
    "compile max-autotune",
)  # fmt: skip


def settings(tiny: bool) -> list[Setting]:
    """All shapes with u8 codes, then the other code types and memory orders at one of them."""

    def setting(shape: tuple[int, ...], dtype: str, codec: str, layout: str, variants: tuple[str, ...]) -> Setting:
        make = partial(build, shape=shape, dtype=DTYPES[dtype], codec=codec, layout=layout)
        return Setting("partial_l2", "x".join(map(str, shape)), dtype, codec, layout, make, variants)

    found = [setting(shape, "bf16", "u8", "NHWC", EVERYONE) for shape in (TINY if tiny else RESNET + WRN)]
    other = ("feedfast", "copy", "compile default")
    one = TINY[0] if tiny else RESNET[1]
    for dtype, codec, layout in (
        ("bf16", "u6", "NHWC"), ("bf16", "u4", "NHWC"),
        ("bf16", "", "NHWC"), ("bf16", "u8", "NCHW"), ("fp32", "u8", "NHWC"),
    ):  # fmt: skip
        found.append(setting(one, dtype, codec, layout, other))
    return found


def moved(student: Tensor, target: Target) -> dict[str, int]:
    """Bytes: of an element with a bf16 student and u8 codes 3 forward, 5 backward."""
    s = student.numel() * student.element_size()
    stored = target.data if isinstance(target, Codes) else target
    t = stored.numel() * stored.element_size()
    # forward:  read the student (bf16: 2), read the codes (u8: 1; u4: 1/2; bf16 map: 2); the scalar is nothing
    # backward: read both again, write the gradient (bf16: 2)
    return {"forward": s + t, "backward": s + t + s, "both": 2 * (s + t) + s}


def build(device: torch.device, *, shape: Sequence[int], dtype: torch.dtype, codec: str, layout: str) -> Work:
    """A student, a teacher of which a third is dead, and everyone who computes their distance."""
    student = random_map(shape, dtype, layout, device, seed=1).requires_grad_()
    target: Target = random_codes(shape, codec or "u8", device, seed=2)
    assert isinstance(target, Codes)
    decoded = decode(target, dtype)
    decoded = decoded.contiguous() if layout == "NCHW" else decoded.contiguous(memory_format=torch.channels_last)
    target = target if codec else decoded
    margin = random_map((shape[1],), torch.float32, "", device, seed=3).abs_().neg_()
    scale = 1.0 / shape[0]
    clipped = torch.maximum(decoded, margin.to(dtype)[:, None, None])  # the live path clips beforehand

    @cache
    def expected() -> list[Tensor]:
        return exact(lambda s: reference(s, target, margin_C=margin), [student])

    @cache
    def expected_of_clipped() -> list[Tensor]:
        return exact(lambda s: reference(s, clipped), [student])

    plain = Call(composite, (student, *parts(target), margin, scale), expected)
    note = "reads a decoded map, clipped beforehand"
    calls = {
        "feedfast": Call(lambda: partial_l2(student, target, margin_C=margin), (), expected),
        "reference eager": Call(lambda: reference(student, target, margin_C=margin), (), expected),
        "composite eager": plain,
        "compile default": plain,
        "compile max-autotune": plain,
        "official eager": Call(official, (student, clipped, scale), expected_of_clipped, note=note),
    }
    return Work([student], moved(student, target), calls)


def parts(target: Target) -> tuple[Tensor, Tensor | None, Tensor | None, str]:
    """Stored values, offset, step, codec."""
    if isinstance(target, Codes):
        return target.data, target.offset, target.step, target.codec
    return target, None, None, ""


def values(stored: Tensor, offset: Tensor | None, step: Tensor | None, codec: str) -> Tensor:
    """The fp32 map [B, C, H, W] of what `parts` gave, in plain operators."""
    if offset is None or step is None:
        return stored.float()
    codes = unpack(stored, offset.shape[0], codec)  # type: ignore[arg-type]
    return (codes.float() * step + offset).permute(0, 3, 1, 2)


def composite(
    student: Tensor, stored: Tensor, offset: Tensor | None, step: Tensor | None, codec: str, margin: Tensor,
    scale: float,
) -> Tensor:  # fmt: skip
    """The formula, written down; autograd keeps what it needs."""
    t = torch.maximum(values(stored, offset, step, codec), margin[:, None, None])
    s = student.float()
    residual = torch.where((s <= t) & (t <= 0), 0.0, s - t)
    return residual.square().sum() * scale


def official(student: Tensor, teacher: Tensor, scale: float) -> Tensor:
    """OFD as published: squared difference times a mask of "student above teacher, or teacher above zero"."""
    distance = torch.nn.functional.mse_loss(student.float(), teacher.float(), reduction="none")
    mask = (student > teacher) | (teacher > 0)
    return (distance * mask.float()).sum() * scale


if __name__ == "__main__":
    sys.exit(main(settings, __doc__))
