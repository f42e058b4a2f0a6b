"""One batch of maps for methods that compare stages, on all sorts of grids, and their formulas' parts in float64."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import rel_entr, softmax
from torch import Tensor, nn

from feedfast.methods import Method, StudentOutput, TapInfo
from feedfast.recipe import MethodEntry
from feedfast.stages.trainee import Entry, losses_of, method_entries
from feedfast.tasks import Classify
from feedfast_kernels import Target

Shape = tuple[int, int, int]
BATCH, CLASSES = 4, 10
STUDENT: dict[str, Shape] = {"final": (8, 2, 2)}
# grids: equal, twice and half as large, one place smaller and larger; channels: equal at the last stage of "a"
GRIDS: dict[str, tuple[Shape, Shape, Shape]] = {
    "a": ((5, 6, 6), (7, 4, 4), (8, 2, 2)),
    "b.2": ((3, 3, 3), (5, 8, 8), (6, 2, 2)),
    "c": ((4, 12, 12), (5, 2, 2), (8, 3, 3)),
    "d": ((4, 5, 6), (6, 3, 3), (7, 2, 2)),
    "e": ((4, 6, 5), (6, 5, 5), (7, 1, 1)),
}
for _number, _shape in enumerate(((4, 6, 6), (6, 4, 4), (8, 2, 2)), start=1):
    STUDENT[f"stage{_number}"] = STUDENT[f"ofd{_number}"] = _shape

Scene = tuple[StudentOutput, dict[str, dict[str, Tensor]], Tensor, dict[str, dict[str, TapInfo]]]


def scene(teachers: tuple[str, ...] = ("a", "b.2"), seed: int = 0) -> Scene:
    """One batch: student output with gradients, float targets of every teacher, labels, and the teachers' taps."""
    g = torch.Generator().manual_seed(seed)
    infos: dict[str, dict[str, TapInfo]] = {}
    targets: dict[str, dict[str, Tensor]] = {}
    for name in teachers:
        shapes: dict[str, tuple[int, ...]] = {"final": GRIDS[name][2], "logits": (CLASSES,)}
        for number, shape in enumerate(GRIDS[name], start=1):
            shapes[f"stage{number}"] = shapes[f"ofd{number}"] = shape
        infos[name] = {tap: TapInfo(shape) for tap, shape in shapes.items()}
        targets[name] = {tap: torch.randn(BATCH, *shape, generator=g) for tap, shape in shapes.items()}
    taps = {tap: torch.randn(BATCH, *shape, generator=g).requires_grad_() for tap, shape in STUDENT.items()}
    logits = torch.randn(BATCH, CLASSES, generator=g).requires_grad_()
    return StudentOutput(logits, taps), targets, torch.tensor([3, 0, 9, 3]), infos


def build(name: str, teachers: Mapping[str, Mapping[str, TapInfo]], **options: object) -> Method:
    """A method from a recipe's words, its adapters always the same."""
    (entry,) = method_entries([MethodEntry(name=name, **options)])  # type: ignore[arg-type]
    torch.manual_seed(0)
    return entry.kind(entry.options, STUDENT, teachers)


def terms_of(method: Method, student: StudentOutput, targets: Mapping[str, Mapping[str, Target]]) -> dict[str, float]:
    return {name: term.item() for name, term in method(student, targets, None).items()}


def losses(
    method: Method,
    student: StudentOutput,
    targets: Mapping[str, Mapping[str, Target]],
    labels: Tensor,
    progress: float,
) -> dict[str, Tensor]:
    """What a training step of this method alone computes."""
    entry = Entry(type(method), None, 1.0, method.name)
    return losses_of(Classify(), [entry], [method], student, targets, labels, progress)


# --- the formulas' parts in float64


def f64(x: Tensor | nn.Parameter | None) -> Tensor:
    assert x is not None
    return x.detach().double()


def array(x: Tensor) -> np.ndarray:
    return f64(x).numpy()


def pooled(x: np.ndarray, height: int, width: int) -> np.ndarray:
    """Averages over the cells of a grid: from the floor of a cell's start to the ceil of its end."""
    rows, columns = x.shape[2:]
    out = np.empty((*x.shape[:2], height, width))
    for i in range(height):
        for j in range(width):
            vertical = slice(i * rows // height, -(-(i + 1) * rows // height))
            horizontal = slice(j * columns // width, -(-(j + 1) * columns // width))
            out[:, :, i, j] = x[:, :, vertical, horizontal].mean((2, 3))
    return out


def smaller(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    grid = tuple(min(sizes) for sizes in zip(ours.shape[2:], theirs.shape[2:], strict=True))
    return pooled(ours, *grid), pooled(theirs, *grid)


def nearest(x: np.ndarray, height: int, width: int) -> np.ndarray:
    rows, columns = (np.arange(n) * m // n for n, m in zip((height, width), x.shape[2:], strict=True))
    return x[:, :, rows][:, :, :, columns]


def batch_norm(x: np.ndarray) -> np.ndarray:
    """As a batch norm starts: scale 1, shift 0."""
    return (x - x.mean((0, 2, 3), keepdims=True)) / np.sqrt(x.var((0, 2, 3), keepdims=True) + 1e-5)


def convolved(x: np.ndarray, layer: nn.Module, *, transposed: bool = False, **how: int) -> np.ndarray:
    weight, bias = layer.get_parameter("weight"), dict(layer.named_parameters()).get("bias")
    call = F.conv_transpose2d if transposed else F.conv2d
    return call(torch.from_numpy(x), f64(weight), None if bias is None else f64(bias), **how).numpy()


def numpy_kl(student: StudentOutput, targets: Mapping[str, Mapping[str, Tensor]], tau: float) -> float:
    p = np.mean([softmax(array(taps["logits"]) / tau, axis=1) for taps in targets.values()], 0)
    return float(rel_entr(p, softmax(array(student.output) / tau, axis=1)).sum(1).mean())
