"""The Triton kernels of `normalized_l1` against the PyTorch reference, in Triton's interpreter and on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from code_samples import STEP
from kernel_checks import assert_rounded, captured, orders, run
from torch import Tensor

from feedfast_kernels import Codes, Target, as_float, decode, encode, normalized_l1
from feedfast_kernels._ops import OPS
from feedfast_kernels.codes import is_quantized
from feedfast_kernels.gpu import normalized_l1 as kernels
from feedfast_kernels.normalized_l1 import reference

# odd and prime sizes, one past a block of channels and of rows, one element, vectors, widths that are no power of two
SHAPES = [(2, 16, 5, 7), (3, 17, 4, 4), (2, 160, 3, 3), (1, 257, 1, 9), (1, 1, 1, 1), (2, 24, 7, 7), (5, 10), (3, 130)]
CODECS = [*STEP, "float"]
SUM = partial(normalized_l1, reduction="sum")


def make(shape: tuple[int, ...], codec: str, device: torch.device, seed: int = 0) -> tuple[Tensor, Target]:
    """A student map and a target of the codec; like maps after a ReLU, half of it is zero."""
    generator = torch.Generator().manual_seed(seed)
    channels = shape[1]
    student, teacher = (torch.randn(shape, generator=generator) for _ in range(2))
    teacher = teacher.clamp(min=0)
    target: Target = teacher.to(device)
    if is_quantized(codec):
        offset = -0.1 * torch.rand(channels, generator=generator)
        step = (0.5 + torch.rand(channels, generator=generator)) * STEP[codec]
        target = Codes(encode(teacher, offset, step, codec=codec)[0], offset, step, codec).to(device)
    return student.to(device), target


def without_ties(student: Tensor, target: Target) -> Tensor:
    """Samples [B] in which no two elements are so close that fp32 may give their difference another sign.

    One sign that turns moves <n, q>, and with it the gradient of its whole sample.
    """
    values = decode(target, torch.float64) if isinstance(target, Codes) else target.double()
    s, t = (x.double().flatten(1) for x in (student, values))
    s, t = s / s.norm(dim=1, keepdim=True), t / t.norm(dim=1, keepdim=True)
    return ((s - t).abs() > 1e-6 * s.abs()).all(1)


def check(
    students: Sequence[Tensor],
    targets: Sequence[Target],
    grad_output: float = 1.0,
    scale: float = 0.0,
    many: bool = False,
    **options: Any,
) -> None:
    """Loss and gradients are those of the reference in float64.

    In q - n * <n, q> terms cancel, so the error is compared with the largest element, or ``scale`` where all are tiny.
    Among ``many`` elements some are ties but for rounding; gradients of their samples are not compared.
    """
    options = {"reduction": "sum", **options}
    wide = [x.double() for x in targets] if all(isinstance(x, Tensor) for x in targets) else targets
    exact, wanted = run(lambda *s: reference(s, wide, **options), [s.double() for s in students], grad_output)
    loss, gradients = run(lambda *s: normalized_l1(s, targets, **options), students, grad_output)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-6)
    for student, target, actual, expected in zip(students, targets, gradients, wanted, strict=True):
        assert actual.stride() == torch.empty_like(student).stride()
        if many:
            clear = without_ties(student, target)
            assert clear.float().mean() > 0.8
            actual, expected = actual[clear], expected[clear]
        largest = max(expected.abs().max().item() if expected.numel() else 0.0, scale)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6 * largest)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(kernel_device: torch.device, shape: tuple[int, ...], codec: str) -> None:
    student, target = make(shape, codec, kernel_device)
    stored = list(orders(target).values()) if isinstance(target, Tensor) else [target]
    for i, given in enumerate(orders(student).values()):  # a float target in another order than the student
        check([given], [stored[(i + 1) % len(stored)]], 1.0 - i, weight=0.3, denominator=7.0)
    if isinstance(target, Tensor):
        check([student.contiguous()], [target.contiguous()], -1.7, reduction="mean")


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", [(1, 64, 5, 5), (1, 16, 9, 9), (2, 37, 4, 2), (2, 6, 3, 3), (2, 100)], ids=str)
def test_two_sweeps_equal_the_reference(
    kernel_device: torch.device, shape: tuple[int, ...], codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles in the loop, tiles after it, a last tile that is not full, several blocks of channels."""
    for name, value in (("ON_CHIP", 0), ("SWEPT_ELEMENTS", (64, 128)), ("MOST_CHANNELS", 32), ("LARGE", 200)):
        monkeypatch.setattr(kernels, name, value)
    student, target = make(shape, codec, kernel_device)
    for given in orders(student).values():
        check([given], [target], 0.7, reduction="mean")


def test_last_map_of_a_resnet_50(kernel_device: torch.device) -> None:
    student, target = make((1, 2048, 7, 7), "u8", kernel_device)
    check([student.contiguous(memory_format=torch.channels_last)], [target])


@pytest.mark.parametrize("values", [kernels.ON_CHIP - 1, kernels.ON_CHIP, kernels.ON_CHIP + 1])
def test_samples_about_as_large_as_fits(kernel_device: torch.device, values: int) -> None:
    """Sums of 16384 squares, and one sample that is one value too large for a single pass."""
    generator = torch.Generator().manual_seed(0)
    student, target = (torch.rand((1, 1, 1, values), generator=generator).to(kernel_device) for _ in range(2))
    check([student], [target])


@pytest.mark.parametrize("codec", CODECS)
def test_several_teachers_share_a_launch(
    kernel_device: torch.device, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [make((2, 16, 4, 4), codec, kernel_device, seed) for seed in range(3)]
    launches = []
    plan = kernels.plan
    monkeypatch.setattr(kernels, "plan", lambda *x, **y: launches.append(plan(*x, **y)) or launches[-1])
    check([s for s, _ in pairs], [t for _, t in pairs])
    assert [launch.grid for launch in launches] == [(6,), (6, 1)]


def test_teachers_that_differ_and_more_than_fit_a_launch(kernel_device: torch.device) -> None:
    kinds = [
        ((2, 16, 4, 4), "u8"),
        ((2, 16, 4, 4), "u4"),
        ((3, 8, 2, 2), "u8"),
        ((2, 10), "float"),
        ((2, 16, 4, 4), "u8"),
    ]
    kinds += [((2, 6), "u8")] * (kernels.MOST_TEACHERS + 1)
    pairs = [make(*kind, kernel_device, seed) for seed, kind in enumerate(kinds)]
    check([s for s, _ in pairs], [t for _, t in pairs], weight=2.0)
    targets = [t for _, t in pairs]
    alike = kernels.groups([s for s, _ in pairs], [t.data for t in targets], [k[1] for k in kinds], [1.0] * len(kinds))
    assert [len(some) for some in alike] == [2, 1, 1, 1, kernels.MOST_TEACHERS, 1]
    # one teacher's gradient does not depend on its company
    _, together = run(lambda *s: SUM(s, targets), [s for s, _ in pairs])
    for (student, target), gradient in zip(pairs, together, strict=True):
        assert torch.equal(run(lambda s: SUM([s], [target]), [student])[1][0], gradient)


def test_students_in_different_orders(kernel_device: torch.device) -> None:
    pairs = [make((2, 16, 4, 4), "u8", kernel_device, seed) for seed in range(3)]
    students = [given for (s, _), given in zip(pairs, orders(pairs[0][0]).values(), strict=True)]
    check(students, [t for _, t in pairs])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("codec", CODECS)
def test_16_bit_students(kernel_device: torch.device, dtype: torch.dtype, codec: str) -> None:
    student, target = make((3, 16, 6, 6), codec, kernel_device)
    student = student.to(dtype)
    target = target.to(dtype) if isinstance(target, Tensor) else target
    wide = target.double() if isinstance(target, Tensor) else target
    exact, (gradient,) = run(lambda s: reference([s], [wide], reduction="sum"), [student.double()], 3.0)
    for given in orders(student).values():
        loss, (actual,) = run(lambda s: SUM([s], [target]), [given], 3.0)
        assert (loss.dtype, actual.dtype) == (torch.float32, dtype)
        torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=0)
        assert_rounded(actual, gradient)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # NumPy, in the interpreter
@pytest.mark.parametrize("sweeps", [1, 2])
@pytest.mark.parametrize("side", ["student", "target"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e25])
def test_what_is_not_finite_or_overflows_survives(
    kernel_device: torch.device, side: str, value: float, sweeps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sweeps == 2:
        monkeypatch.setattr(kernels, "ON_CHIP", 0)
    student, target = make((2, 16, 4, 4), "float", kernel_device)
    assert isinstance(target, Tensor)
    (student if side == "student" else target)[0, 3, 2, 1] = value
    for function in (normalized_l1, reference):
        loss, (gradient,) = run(lambda s: function([s], [target], reduction="mean"), [student])
        assert loss.isnan()
        assert gradient[0].isnan().all()
        assert gradient[1].isfinite().all()


def test_equal_maps_give_exactly_zero(kernel_device: torch.device) -> None:
    _, codes = make((2, 16, 5, 5), "u8", kernel_device)
    for target in (codes, as_float(codes)):
        student = as_float(codes).clone()
        for given in orders(student).values():
            loss, (gradient,) = run(lambda s: SUM([s], [target]), [given])
            assert loss == 0
            assert gradient.count_nonzero() == 0


def test_ties_have_no_sign(kernel_device: torch.device) -> None:
    student = torch.tensor([[3.0, 4.0, 0.0, 0.0]], device=kernel_device)
    target = torch.tensor([[6.0, 0.0, 8.0, 0.0]], device=kernel_device)  # [0.6, 0, 0.8, 0] against [0.6, 0.8, 0, 0]
    check([student], [target])
    _, (gradient,) = run(lambda s: SUM([s], [target]), [student])
    # q = [0, 1, -1, 0], <n, q> = 0.8
    torch.testing.assert_close(gradient.cpu(), torch.tensor([[-0.48, 0.36, -1.0, 0.0]]) / 5)


def test_dead_maps_are_bounded_by_eps(kernel_device: torch.device) -> None:
    ones = torch.ones(1, 2, 2, 2, device=kernel_device)
    faint = 1e-5 * torch.randn(1, 2, 2, 2, generator=torch.Generator().manual_seed(0)).to(kernel_device)
    for student in (torch.zeros_like(ones), faint):
        check([student], [ones], eps=1e-3)
        check([ones], [student], eps=1e-3, scale=0.1)
    assert SUM([torch.zeros_like(ones)], [torch.zeros_like(ones)]) == 0


def test_empty_batch_is_zero_with_a_gradient(kernel_device: torch.device) -> None:
    for shape in ((0, 16, 4, 4), (0, 3), (2, 4, 0, 3)):
        student, target = make(shape, "float", kernel_device)
        other, codes = make((2, 6), "u8", kernel_device)
        loss, (gradient,) = run(lambda s: SUM([s], [target]), [student])
        assert loss == 0
        assert gradient.shape == shape
        check([student, other], [target, codes])


def test_float64_and_mixed_students_take_the_reference(kernel_device: torch.device) -> None:
    (first, target), (second, other) = (make((2, 6), "u8", kernel_device, seed) for seed in (0, 1))
    loss, gradients = run(lambda *s: SUM(s, [target, other]), [first.double(), second])
    exact, wanted = run(lambda *s: reference(s, [target, other], reduction="sum"), [first.double(), second])
    assert torch.equal(loss, exact)
    assert all(torch.equal(a, b) for a, b in zip(gradients, wanted, strict=True))


def test_only_some_students_want_a_gradient(kernel_device: torch.device) -> None:
    (first, target), (second, other) = (make((2, 6), "u8", kernel_device, seed) for seed in (0, 1))
    leaf = second.clone().requires_grad_()
    SUM([first, leaf], [target, other]).backward()
    assert torch.equal(leaf.grad, run(lambda s: SUM([s], [other]), [second])[1][0])  # type: ignore[arg-type]


def test_two_runs_are_bit_equal(kernel_device: torch.device) -> None:
    pairs = [make((2, 48, 7, 7), "u8", kernel_device, seed) for seed in (0, 1)]
    first, second = (run(lambda *s: SUM(s, [t for _, t in pairs]), [s for s, _ in pairs], 0.3) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@pytest.mark.parametrize("codec", ["u8", "float"])
def test_compiles_in_one_graph(kernel_device: torch.device, codec: str) -> None:
    pairs = [make((2, 16, 4, 4), codec, kernel_device, seed) for seed in (0, 1)]
    students, targets = [s for s, _ in pairs], [t for _, t in pairs]
    expected, gradients = run(lambda *s: SUM(s, targets), students, -2.0)
    compiled = torch.compile(normalized_l1, fullgraph=True, backend="aot_eager")
    loss, actual = run(lambda *s: compiled(s, targets, reduction="sum"), students, -2.0)
    assert torch.equal(loss, expected)
    assert all(torch.equal(a, b) for a, b in zip(actual, gradients, strict=True))


def test_operators_keep_their_schema(kernel_device: torch.device) -> None:
    (student, target), (vectors, values) = (
        make(s, c, kernel_device) for s, c in (((2, 16, 3, 3), "u8"), ((3, 5), "float"))
    )
    assert isinstance(target, Codes)
    for given in (student, orders(student)["sliced"]):
        lists = ([given, vectors], [target.data, values], [target.offset, None], [target.step, None])
        arguments = (*lists, ["u8", "float"], [0.5, 0.25])
        torch.library.opcheck(OPS.normalized_l1, (*arguments, 1e-12))
        _, statistics = OPS.normalized_l1(*arguments, 1e-12)
        assert statistics.shape == (5, kernels.STATISTICS)
        grad_output = torch.ones((), device=kernel_device)
        torch.library.opcheck(OPS.normalized_l1_backward, (grad_output, statistics, *arguments))


def test_under_autocast(kernel_device: torch.device) -> None:
    student, target = make((2, 16, 4, 4), "u8", kernel_device)
    expected, (gradient,) = run(lambda s: SUM([s], [target]), [student])
    with torch.autocast(kernel_device.type, dtype=torch.bfloat16):
        loss, (actual,) = run(lambda s: SUM([s], [target]), [student])
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert torch.equal(actual, gradient)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(128, 64, 8, 8), (64, 2048, 7, 7), (64, 512, 7, 7)], ids=str)
@pytest.mark.parametrize("codec", CODECS)
def test_real_shapes_on_a_gpu(shape: tuple[int, ...], codec: str) -> None:
    device = torch.device("cuda")
    pairs = [make(shape, codec, device, seed) for seed in range(2)]
    for order in ("channels_last", "contiguous"):
        check([orders(s)[order] for s, _ in pairs], [t for _, t in pairs], many=True)


@pytest.mark.gpu
def test_capture_replays_to_the_same_bits() -> None:
    device = torch.device("cuda")
    pairs = [make((32, 64, 8, 8), "u8", device, seed) for seed in range(5)]
    students = [s.bfloat16().contiguous(memory_format=torch.channels_last) for s, _ in pairs]
    targets = [t for _, t in pairs]
    expected, gradients = run(lambda *s: SUM(s, targets), students)
    leaves = [s.detach().requires_grad_() for s in students]

    def step() -> tuple[Tensor, ...]:
        loss = SUM(leaves, targets)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    graph, (loss, *actual) = captured(step)
    graph.replay()
    assert torch.equal(loss, expected)
    assert all(torch.equal(a, b) for a, b in zip(actual, gradients, strict=True))


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements() -> None:
    device = torch.device("cuda")
    batch, channels = (1 << 19) + 3, 4096  # 2.1 G elements: 4.3 GB of bf16, twice with the gradient
    student = torch.zeros(batch, channels, dtype=torch.bfloat16, device=device)
    codes = torch.zeros(batch, channels, dtype=torch.uint8, device=device)
    student[-1, 0], codes[-1, 1] = 2.0, 1
    target = Codes(codes, torch.zeros(channels, device=device), torch.ones(channels, device=device), "u8")
    loss, (gradient,) = run(lambda s: normalized_l1([s], [target], reduction="sum", denominator=1.0), [student])
    assert loss.item() == 2  # |[1, 0] - [0, 1]|, and nothing of the dead rows
    assert gradient[-1, :3].tolist() == [0.0, -0.5, 0.0]
    assert gradient[:-1].count_nonzero() == 0


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
def test_runs_on_the_tensors_device() -> None:
    with torch.cuda.device(0):
        student, target = make((2, 16, 4, 4), "u8", torch.device("cuda:1"))
        check([student], [target])


def test_strided_scales_and_second_derivatives(kernel_device: torch.device) -> None:
    student, target = make((2, 16, 3, 3), "u8", kernel_device)
    assert isinstance(target, Codes)
    offset, step = (torch.stack([x, x + 1], -1).flatten()[::2] for x in (target.offset, target.step))
    strided = Codes(target.data, offset, step, "u8")
    assert torch.equal(SUM([student], [strided]), SUM([student], [target]))
    student.requires_grad_()
    with pytest.raises(NotImplementedError, match=r"normalized_l1.*float64"):
        torch.autograd.grad(SUM([student], [target]), student, create_graph=True)
