"""The launches that compile_report.py compiles: every kernel at the shapes real networks have, from meta tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from feedfast_kernels.codes import packed_channels
from feedfast_kernels.gpu import codes, connector_partial_l2, ensemble_kl, normalized_l1, partial_l2
from feedfast_kernels.gpu.launch import Launch

# (batch, channels, side of the map)
RESNET_50 = [(256, 256, 56), (256, 512, 28), (256, 1024, 14), (256, 2048, 7)]
CIFAR = [(128, 16, 32), (128, 64, 32), (128, 128, 16), (128, 256, 8), (128, 64, 8)]
UNEVEN = [(256, 160, 8), (256, 24, 56), (7, 17, 5)]  # a wide ResNet, a MobileNet, and a shape nothing divides
STORED = {"u8": "u8", "u6": "u6", "u5": "u5", "u4": "u4", "float": "bf16"}  # how names of launches call a target
TARGET_BYTES = {"u8": 1.0, "u6": 0.75, "u5": 0.625, "u4": 0.5, "float": 2.0}  # per element
QUICK = [(256, 256, 56), (256, 1024, 14), (256, 2048, 7), (128, 64, 8), (128, 16, 32), (256, 24, 56)]
# (batch, channels, side, teachers): FEED on ResNet-56, the last maps of ResNet-50 and -18, a wide ResNet
FEED = [(128, 64, 8, 5), (256, 2048, 7, 1), (256, 2048, 7, 5), (256, 512, 7, 1), (128, 128, 8, 5)]


@dataclass(frozen=True, slots=True)
class Case:
    """One launch under a name that says what it is.

    Attributes:
        operation: the file it comes from.
        name: operation, direction, shape, dtypes, layout.
        launch: from meta tensors.
        elements: of the student's maps, over all teachers.
        aligned: whether rows of the maps are made of whole 16-byte pieces, so that no access may be narrow.
        read_bytes: per element, where the kernel loops over its maps.
    """

    operation: str
    name: str
    launch: Launch
    elements: int
    aligned: bool
    read_bytes: float = 0.0


def cases(quick: bool = False) -> Iterator[Case]:
    """Every launch to compile; ``quick`` keeps the shapes that compile differently."""
    yield from partial_l2_cases(quick)
    yield from sampled_partial_l2_cases(quick)
    yield from connector_partial_l2_cases(quick)
    yield from codes_cases(quick)
    yield from ensemble_kl_cases(quick)
    yield from normalized_l1_cases(quick)


def meta(*shape: int, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    """A tensor without memory."""
    x = torch.empty(shape, dtype=dtype, device="meta")
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def meta_target(batch: int, channels: int, side: int, codec: str) -> Tensor:
    """Stored codes, or a channels-last bf16 map where ``codec`` is ``"float"``."""
    if codec == "float":
        return meta(batch, channels, side, side, dtype=torch.bfloat16, channels_last=True)
    return meta(batch, side, side, packed_channels(channels, codec), dtype=torch.uint8)


def partial_l2_cases(quick: bool) -> Iterator[Case]:
    """Both directions; all codes and float targets; both memory formats of the student."""
    for batch, channels, side in QUICK if quick else RESNET_50 + CIFAR + UNEVEN:
        vector, grad_output = meta(channels), meta()
        for codec in ("u8",) if quick and channels != 256 else tuple(STORED):
            target = meta_target(batch, channels, side, codec)
            scale = (None, None) if codec == "float" else (vector, vector)
            for order in ("NHWC", "NCHW"):
                nhwc = order == "NHWC"
                student = meta(batch, channels, side, side, dtype=torch.bfloat16, channels_last=nhwc)
                aligned = channels % 8 == 0 if nhwc else side * side % 4 == 0
                arguments = (student, target, *scale, codec, vector, 0.5)
                launches = {
                    "forward": partial_l2.plan(*arguments)[0],
                    "backward": partial_l2.plan(*arguments, None, grad_output, torch.empty_like(student))[0],
                }
                for direction, launch in launches.items():
                    name = f"partial_l2 {direction} {channels}x{side}x{side} bf16/{STORED[codec]} {order}"
                    yield Case("partial_l2", name, launch, student.numel(), aligned)


def sampled_partial_l2_cases(quick: bool) -> Iterator[Case]:
    """Both directions at a quarter of the positions; both memory formats of the student."""
    for batch, channels, side in (QUICK[0], QUICK[2]) if quick else RESNET_50 + CIFAR + UNEVEN:
        vector, grad_output, count = meta(channels), meta(), max(1, side * side // 4)
        positions = meta(batch, count, dtype=torch.int32)
        for codec in ("u8", "u4") if quick and channels == 256 else ("u8",) if quick else ("u8", "u4", "float"):
            target = meta(batch, 1, count, packed_channels(channels, codec), dtype=torch.uint8)
            if codec == "float":
                target = meta(batch, channels, 1, count, dtype=torch.bfloat16, channels_last=True)
            scale = (None, None) if codec == "float" else (vector, vector)
            for order in ("NHWC",) if quick and (channels, codec) != (256, "u8") else ("NHWC", "NCHW"):
                nhwc = order == "NHWC"
                student = meta(batch, channels, side, side, dtype=torch.bfloat16, channels_last=nhwc)
                arguments = (student, target, *scale, codec, vector, 0.5, positions)
                launches = {
                    "forward": partial_l2.plan(*arguments)[0],
                    "backward": partial_l2.plan(*arguments, grad_output, torch.empty_like(student))[0],
                }
                # of an NCHW student single values are gathered: narrow by nature
                for direction, launch in launches.items():
                    name = f"partial_l2 {direction} {count} of {channels}x{side}x{side} bf16/{STORED[codec]} {order}"
                    yield Case("partial_l2", name, launch, batch * channels * count, nhwc and channels % 8 == 0)


def connector_partial_l2_cases(quick: bool) -> Iterator[Case]:
    """All four launches of a call."""
    for batch, channels, side in QUICK if quick else RESNET_50 + CIFAR + UNEVEN:
        vector, statistics, sums, grad_output = meta(channels), meta(3, channels), meta(2, channels), meta()
        for codec in ("u8",) if quick and channels != 256 else tuple(STORED):
            target = meta_target(batch, channels, side, codec)
            scale = (None, None) if codec == "float" else (vector, vector)
            for order in ("NHWC", "NCHW"):
                nhwc = order == "NHWC"
                y = meta(batch, channels, side, side, dtype=torch.bfloat16, channels_last=nhwc)
                plan = connector_partial_l2.Plan(y, target, *scale, codec, vector, vector, vector)
                launches = {
                    "statistics": plan.statistics(1e-5)[0][0],
                    "merge": plan.statistics(1e-5)[0][1],
                    "forward": plan.loss(statistics)[0],
                    "backward": plan.gradient(statistics, sums, grad_output, 0.5, torch.empty_like(y)),
                }
                aligned = channels % 8 == 0 if nhwc else side * side % 4 == 0
                for part, launch in launches.items():
                    if codec != "u8" and part in ("statistics", "merge"):
                        continue  # they do not read the target
                    name = f"connector_partial_l2 {part} {channels}x{side}x{side} bf16/{STORED[codec]} {order}"
                    read_bytes = {"merge": 0.0, "statistics": 2.0}.get(part, 2 + TARGET_BYTES[codec])
                    yield Case("connector_partial_l2", name, launch, y.numel(), aligned, read_bytes)


def codes_cases(quick: bool) -> Iterator[Case]:
    """Encoding from bf16 and fp32 in both memory formats, with and without a margin; decoding to both."""
    for batch, channels, side in QUICK if quick else RESNET_50 + CIFAR + UNEVEN:
        vector = meta(channels)
        kinds = (
            ("u8", torch.bfloat16),
            ("u8", torch.float32),
            *((name, torch.bfloat16) for name in ("u6", "u5", "u4")),
        )
        for codec, dtype in kinds:
            every = channels == 256 and side == 56
            if not every and (quick or dtype == torch.float32) and (codec, dtype) != ("u8", torch.bfloat16):
                continue
            kind = f"{channels}x{side}x{side} {'bf16' if dtype == torch.bfloat16 else 'fp32'}/{codec}"
            data = meta_target(batch, channels, side, codec)
            values = meta(batch, side, side, channels, dtype=dtype)
            for order in ("NHWC", "NCHW"):
                nhwc = order == "NHWC"
                x = meta(batch, channels, side, side, dtype=dtype, channels_last=nhwc)
                aligned = channels % 8 == 0 if nhwc else side * side % 4 == 0 and channels % 8 == 0
                for margin in (None, vector) if every else (vector,):
                    launch, _ = codes.plan_encode(x, vector, vector, codec, margin, data)
                    name = f"encode {'plain ' if margin is None else 'margin'} {kind} {order}"
                    yield Case("codes", name, launch, x.numel(), aligned)
            launch = codes.plan_decode(data, vector, vector, codec, values)
            yield Case("codes", f"decode {kind} NHWC", launch, values.numel(), channels % 8 == 0)


def ensemble_kl_cases(quick: bool) -> Iterator[Case]:
    """CIFAR, ImageNet-1k and ImageNet-22k; one to five teachers; with labels, and the divergence alone."""
    shapes = [(256, 1000, 3), (256, 21841, 3)]
    for batch, classes, count in shapes if quick else [(128, 10, 1), (128, 100, 5), (256, 1000, 1), *shapes]:
        student = meta(batch, classes, dtype=torch.bfloat16)
        teachers = [meta(batch, classes, dtype=torch.float16)] * count
        for average in ("probabilities", "logits")[: 1 if count == 1 else 2]:
            for direction in ("forward", "reverse"):
                for labels in (meta(batch, dtype=torch.int64), None):
                    launch = ensemble_kl.plan(
                        student,
                        teachers,
                        labels,
                        4.0,
                        average == "logits",
                        direction == "reverse",
                        0.9,
                        0.1,
                        labels is not None,
                        True,
                        None if labels is None else meta(dtype=torch.int64),
                    )[0]
                    what = f"{classes} x {count} {average} {direction} bf16/f16"
                    what += " labels" if labels is not None else ""
                    # the label's own logit is one narrow load
                    aligned = classes % 8 == 0 and labels is None
                    yield Case("ensemble_kl", f"ensemble_kl {what}", launch, student.numel(), aligned)


def normalized_l1_cases(quick: bool) -> Iterator[Case]:
    """Both directions; all codes and float targets; both memory formats of the student; one teacher and several."""
    for batch, channels, side, teachers in FEED:
        if quick and (channels, teachers) in ((128, 5), (2048, 5)):
            continue
        for codec in ("u8",) if quick and channels != 64 else tuple(STORED):
            target = meta_target(batch, channels, side, codec)
            vectors = [None if codec == "float" else meta(channels)] * teachers
            statistics = meta(teachers * batch, normalized_l1.STATISTICS)
            for order in ("NHWC", "NCHW"):
                nhwc = order == "NHWC"
                student = meta(batch, channels, side, side, dtype=torch.bfloat16, channels_last=nhwc)
                aligned = channels % 8 == 0 if nhwc else side * side % 4 == 0
                students = [student] * teachers
                arguments = (students, [target] * teachers, vectors, vectors, codec, 0.5, statistics)
                launches = {
                    "forward": normalized_l1.plan(*arguments, eps=1e-12),
                    "backward": normalized_l1.plan(*arguments, grad_output=meta(), gradients=students),
                }
                for direction, launch in launches.items():
                    shape = f"{teachers}x{channels}x{side}x{side}"
                    name = f"normalized_l1 {direction} {shape} bf16/{STORED[codec]} {order}"
                    # a forward that loops has two sweeps, counted as if both were the longer one
                    read_bytes = 2 * (2 + TARGET_BYTES[codec])
                    yield Case("normalized_l1", name, launch, teachers * student.numel(), aligned, read_bytes)
