"""How fast is `normalized_l1`, the distance of FEED and factor transfer, with five teachers?

    python bench/bench_normalized_l1.py [--seconds 120] [--out bench/results.csv]
    python bench/bench_normalized_l1.py --tiny --device cpu

Shapes: five teachers (and five adapters of the student) on the last map of ResNet-50 at batch 256, where a sample does
not fit on a multiprocessor, and on ResNet-56 at batch 128, where it does; one teacher; then packed codes, floats,
an NCHW student and an fp32 student.

    feedfast            the public function: on a GPU one launch for all teachers, elsewhere PyTorch operators
    reference eager     the same in PyTorch operators; recomputes in the backward pass too
    composite eager     the loss as one would write it, gradients by autograd
    compile ...         torch.compile of that, one graph for the shape
    official eager      as factor transfer's authors compute it: two normalized rows and the mean of their absolute
                        difference, teacher after teacher, from decoded maps
    copy                a device copy of as many bytes as the operation must move

How it is measured: measure.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache, partial

import torch
from bench_partial_l2 import parts, values
from inputs import DTYPES, random_codes, random_map
from measure import Call, Setting, Tolerance, Work, exact, main
from torch import Tensor
from torch.nn import functional

from feedfast_kernels import Codes, Target, decode
from feedfast_kernels.normalized_l1 import normalized_l1, reference

RESNET_50, RESNET_56, WRN = (256, 2048, 7, 7), (128, 64, 8, 8), (128, 256, 8, 8)
TINY = (3, 16, 5, 5)
EPS = 1e-12
EVERYONE = (
    "feedfast", "copy", "compile default", "reference eager", "official eager", "composite eager",
    "compile max-autotune",
)  # fmt: skip
# where student and teacher are equal but for rounding, the sign of their difference is anyone's guess
SIGNS = Tolerance(share=1e-5)


def settings(tiny: bool) -> list[Setting]:
    """Five teachers on all shapes, one teacher, then the other code types and memory orders."""

    def setting(
        teachers: int, shape: tuple[int, ...], dtype: str, codec: str, layout: str, variants: tuple[str, ...]
    ) -> Setting:
        make = partial(build, teachers=teachers, shape=shape, dtype=DTYPES[dtype], codec=codec, layout=layout)
        name = f"{teachers} x {'x'.join(map(str, shape))}"
        return Setting("normalized_l1", name, dtype, codec, layout, make, variants)

    shapes = [TINY, (2, 17, 3, 3)] if tiny else [RESNET_50, RESNET_56, WRN]
    several = 2 if tiny else 5
    found = [setting(several, shape, "bf16", "u8", "NHWC", EVERYONE) for shape in shapes]
    other = ("feedfast", "copy", "compile default")
    found.append(setting(1, shapes[0], "bf16", "u8", "NHWC", other))
    for dtype, codec, layout in (
        ("bf16", "u6", "NHWC"), ("bf16", "u4", "NHWC"),
        ("bf16", "", "NHWC"), ("bf16", "u8", "NCHW"), ("fp32", "u8", "NHWC"),
    ):  # fmt: skip
        found.append(setting(several, shapes[0], dtype, codec, layout, other))
    return found


def moved(students: Sequence[Tensor], targets: Sequence[Target]) -> dict[str, int]:
    """Bytes: of an element with bf16 students and u8 codes 3 forward, 5 backward, over all teachers."""
    s = sum(x.numel() * x.element_size() for x in students)
    stored = [target.data if isinstance(target, Codes) else target for target in targets]
    t = sum(x.numel() * x.element_size() for x in stored)
    # forward:  read the student (bf16: 2), read the codes (u8: 1); lengths and distance in one sweep of a sample that
    #           stays on chip. What does not stay, and is read twice, is not counted twice.
    # backward: read both again, write the gradient (bf16: 2)
    return {"forward": s + t, "backward": s + t + s, "both": 2 * (s + t) + s}


def build(
    device: torch.device, *, teachers: int, shape: Sequence[int], dtype: torch.dtype, codec: str, layout: str
) -> Work:
    """A student's map and a teacher's codes for every teacher, and everyone who computes their distances."""
    students = [
        random_map(shape, dtype, layout, device, seed=2 * index + 1).requires_grad_() for index in range(teachers)
    ]
    codes = [random_codes(shape, codec or "u8", device, seed=2 * index + 2) for index in range(teachers)]
    decoded = [decode(target, dtype) for target in codes]
    if layout == "NCHW":
        decoded = [target.contiguous() for target in decoded]
    targets: list[Target] = [*codes] if codec else [*decoded]

    @cache
    def expected() -> list[Tensor]:
        return exact(lambda *s: reference(s, targets, reduction="mean"), students)

    @cache
    def expected_of_decoded() -> list[Tensor]:
        return exact(lambda *s: reference(s, decoded, reduction="mean"), students)

    plain = Call(composite, (students, [parts(target) for target in targets]), expected, SIGNS)
    calls = {
        "feedfast": Call(lambda: normalized_l1(students, targets, reduction="mean"), (), expected, SIGNS),
        "reference eager": Call(lambda: reference(students, targets, reduction="mean"), (), expected, SIGNS),
        "composite eager": plain,
        "compile default": plain,
        "compile max-autotune": plain,
        "official eager": Call(official, (students, decoded), expected_of_decoded, SIGNS, "reads decoded maps"),
    }
    return Work(students, moved(students, targets), calls)


def composite(
    students: Sequence[Tensor], targets: Sequence[tuple[Tensor, Tensor | None, Tensor | None, str]]
) -> Tensor:
    """The formula over channels-last rows, written down; autograd keeps what it needs."""
    total = torch.zeros((), device=students[0].device)
    for student, target in zip(students, targets, strict=True):
        rows = [x.permute(0, 2, 3, 1).reshape(x.shape[0], -1) for x in (student.float(), values(*target))]
        s, t = (x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp(min=EPS) for x in rows)
        total = total + (s - t).abs().mean()
    return total


def official(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """Factor transfer as published, summed over teachers; autocast computes lengths in fp32, so the rest is, too."""
    losses = []
    for student, teacher in zip(students, teachers, strict=True):
        s, t = (functional.normalize(x.flatten(1).float()) for x in (student, teacher))
        losses.append((s - t).abs().mean())
    return torch.stack(losses).sum()


if __name__ == "__main__":
    sys.exit(main(settings, __doc__))
