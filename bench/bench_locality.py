"""How fast is `locality`, LP's distance between samples that are neighbours for the teacher?

    python bench/bench_locality.py [--seconds 60] [--out bench/results.csv]
    python bench/bench_locality.py --tiny --device cpu

Shapes: ResNet-50's last map and its pooled vector (teacher: 2,048 values) at batch 256, ResNet-56's last map at batch
128; five neighbours. There is no kernel of our own here: these rows say how near matrix products come to the floor.

    feedfast            the public function: one product with a Laplacian gives loss and gradient
    composite eager     squared student distances from products, weighted and summed, gradients by autograd
    gathered eager      each sample minus its k neighbours, [m, k, d], gradients by autograd
    compile ...         torch.compile of the composite, one graph for the shape
    compile gathered    torch.compile of the gathered form
    copy                a device copy of as many bytes as the operation must move

GB/s tell little here: 2 m operations a value are as long as the bytes. How it is measured: measure.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache, partial

import torch
from bench_partial_l2 import parts, values
from inputs import DTYPES, random_map
from measure import Call, Setting, Tolerance, Work, exact, main
from torch import Tensor

from feedfast_kernels import Codes, Target, encode
from feedfast_kernels.locality import locality

NEIGHBOURS = 5
FACTORS = 8  # a teacher's features vary along so many directions, so that neighbours differ by more than rounding
EVERYONE = (
    "feedfast", "copy", "compile default", "compile gathered", "composite eager", "gathered eager",
    "compile max-autotune",
)  # fmt: skip


def settings(tiny: bool) -> list[Setting]:
    """Maps with u8 codes, vectors with float teachers, an fp32 student."""

    def setting(shape: tuple[int, ...], width: int, dtype: str, codec: str, variants: tuple[str, ...]) -> Setting:
        layout = "NHWC" if len(shape) == 4 else ""
        make = partial(build, shape=shape, width=width, dtype=DTYPES[dtype], codec=codec)
        name = "x".join(map(str, shape)) + ("" if width == shape[1] else f", teacher {width}")
        return Setting("locality", name, dtype, codec, layout, make, variants)

    if tiny:
        shapes = [((12, 8, 3, 3), 8), ((11, 7), 19)]
    else:
        shapes = [((256, 2048, 7, 7), 2048), ((256, 512), 2048), ((128, 64, 8, 8), 64)]
    found = [setting(*each, "bf16", "u8" if len(each[0]) == 4 else "", EVERYONE) for each in shapes]
    return [*found, setting(*shapes[0], "fp32", "u8", ("feedfast", "copy", "compile default"))]


def moved(student: Tensor, target: Target) -> dict[str, int]:
    """Bytes: of an element of a bf16 student and u8 codes 3 forward, 4 backward; [m, m] matrices are left out."""
    s = student.numel() * student.element_size()
    stored = target.data if isinstance(target, Codes) else target
    t = stored.numel() * stored.element_size()
    # forward:  read the teacher (u8: 1; 16 bits: 2) for the neighbours, read the student (bf16: 2)
    # backward: read the student (2), write the gradient (2); feedfast keeps the gradient in fp32 instead: 4, then 4 + 2
    return {"forward": s + t, "backward": s + s, "both": s + t + s + s}


def build(device: torch.device, *, shape: Sequence[int], width: int, dtype: torch.dtype, codec: str) -> Work:
    """A student, a teacher with neighbourhoods, and everyone who compares them."""
    batch, _, *space = shape
    student = random_map(shape, dtype, "NHWC", device, seed=1).requires_grad_()
    factors = random_map((batch, FACTORS), torch.float32, "", device, seed=2)
    basis = random_map((FACTORS, width, *space), torch.float32, "", device, seed=3)
    features = (factors @ basis.flatten(1)).view(batch, width, *space)
    target: Target = features.to(torch.float16)
    if codec == "u8":
        offset, step = (torch.full((width,), value, device=device) for value in (-10.0, 20 / 254))
        target = Codes(encode(features, offset, step, codec=codec)[0], offset, step, codec)

    @cache
    def expected() -> list[Tensor]:
        return exact(lambda s: locality(s, target, k=NEIGHBOURS), [student])

    # two neighbours as far as each other but for rounding may change places; the rows of three samples follow
    close = Tolerance(value=1e-4, gradient=1e-4 if dtype == torch.float32 else None, share=min(4 / batch, 0.05))
    plain = Call(composite, (student, *parts(target)), expected, close)
    gathered = Call(by_gathering, (student, *parts(target)), expected, close)
    calls = {
        "feedfast": Call(lambda: locality(student, target, k=NEIGHBOURS), (), expected, close),
        "composite eager": plain,
        "compile default": plain,
        "compile max-autotune": plain,
        "gathered eager": gathered,
        "compile gathered": gathered,
    }
    return Work([student], moved(student, target), calls)


def squared_distances(rows: Tensor) -> Tensor:
    """[m, m] from [m, d], relative to the mean, from products."""
    rows = rows - rows.mean(0)
    product = rows @ rows.T
    square = product.diagonal()
    return (square[:, None] + square[None, :] - 2 * product).clamp(min=0)


def neighbours(stored: Tensor, offset: Tensor | None, step: Tensor | None, codec: str) -> tuple[Tensor, Tensor]:
    """The k nearest of every sample in the teacher's space, and their weights."""
    if codec:
        stored = values(stored, offset, step, codec)
    distance = squared_distances(stored.float().flatten(1))
    own = torch.eye(distance.shape[0], dtype=torch.bool, device=distance.device)
    near, index = distance.masked_fill(own, torch.inf).topk(NEIGHBOURS, dim=1, largest=False)
    return index, torch.exp(-near / near.mean())


def composite(student: Tensor, stored: Tensor, offset: Tensor | None, step: Tensor | None, codec: str) -> Tensor:
    """Weights times squared distances of all pairs, written down; autograd keeps what it needs."""
    with torch.no_grad():
        index, alpha = neighbours(stored, offset, step, codec)
        weights = torch.zeros(student.shape[0], student.shape[0], device=student.device).scatter(1, index, alpha)
    return (weights * squared_distances(student.float().flatten(1))).sum() / student.shape[0]


def by_gathering(student: Tensor, stored: Tensor, offset: Tensor | None, step: Tensor | None, codec: str) -> Tensor:
    """Weights times squared differences to k neighbours: no product of student features, k times the memory."""
    with torch.no_grad():
        index, alpha = neighbours(stored, offset, step, codec)
    rows = student.float().flatten(1)
    square = (rows[:, None, :] - rows[index]).square().sum(2)
    return (alpha * square).sum() / student.shape[0]


if __name__ == "__main__":
    sys.exit(main(settings, __doc__))
