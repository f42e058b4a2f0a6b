"""The launches that compile_report.py compiles: every kernel at the shapes real networks have, from meta tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from feedfast_kernels.gpu import partial_l2
from feedfast_kernels.gpu.launch import Launch

# (batch, channels, side of the map)
RESNET_50 = [(256, 256, 56), (256, 512, 28), (256, 1024, 14), (256, 2048, 7)]
CIFAR = [(128, 16, 32), (128, 64, 32), (128, 128, 16), (128, 256, 8), (128, 64, 8)]
UNEVEN = [(256, 160, 8), (256, 24, 56), (7, 17, 5)]  # a wide ResNet, a MobileNet, and a shape nothing divides
QUICK = [(256, 256, 56), (256, 1024, 14), (256, 2048, 7), (128, 64, 8), (128, 16, 32), (256, 24, 56)]


@dataclass(frozen=True, slots=True)
class Case:
    """One launch under a name that says what it is.

    Attributes:
        operation: the file it comes from.
        name: operation, direction, shape, dtypes, layout.
        launch: from meta tensors.
        elements: of the student's maps, over all teachers.
        aligned: whether rows of the maps are made of whole 16-byte pieces, so that no access may be narrow.
    """

    operation: str
    name: str
    launch: Launch
    elements: int
    aligned: bool


def cases(quick: bool = False) -> Iterator[Case]:
    """Every launch to compile; ``quick`` keeps the shapes that compile differently."""
    yield from partial_l2_cases(quick)


def meta(*shape: int, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    """A tensor without memory."""
    x = torch.empty(shape, dtype=dtype, device="meta")
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def partial_l2_cases(quick: bool) -> Iterator[Case]:
    """Both directions; u8, u4 and float targets; both memory orders of the student."""
    for batch, channels, side in QUICK if quick else RESNET_50 + CIFAR + UNEVEN:
        vector, upstream = meta(channels), meta()
        for codec in ("u8",) if quick and channels != 256 else ("u8", "u4", ""):
            if codec:
                stored = (channels + 1) // 2 if codec == "u4" else channels
                target = meta(batch, side, side, stored, dtype=torch.uint8)
            else:
                target = meta(batch, channels, side, side, dtype=torch.bfloat16, channels_last=True)
            scale = (vector, vector) if codec else (None, None)
            for order in ("NHWC", "NCHW"):
                nhwc = order == "NHWC"
                student = meta(batch, channels, side, side, dtype=torch.bfloat16, channels_last=nhwc)
                aligned = channels % 8 == 0 if nhwc else side * side % 4 == 0
                arguments = (student, target, *scale, codec, vector, 0.5)
                launches = {
                    "forward": partial_l2.plan(*arguments)[0],
                    "backward": partial_l2.plan(*arguments, upstream, torch.empty_like(student))[0],
                }
                for direction, launch in launches.items():
                    name = f"partial_l2 {direction} {channels}x{side}x{side} bf16/{codec or 'bf16'} {order}"
                    yield Case("partial_l2", name, launch, student.numel(), aligned)
