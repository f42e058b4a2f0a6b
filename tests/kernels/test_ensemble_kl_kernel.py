"""The Triton kernel of `ensemble_kl` against PyTorch and float64, in the interpreter and on a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch
from kernel_checks import assert_rounded, captured, orders, run
from torch import Tensor

from feedfast_kernels import ensemble_kl
from feedfast_kernels._ops import OPS
from feedfast_kernels.ensemble_kl import reference

pytestmark = [
    # the interpreter computes with NumPy, which warns of -inf - (-inf) in lanes that the kernel then does not use
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]

Average = Literal["probabilities", "logits"]
Direction = Literal["forward", "reverse"]
AVERAGES: list[Average] = ["probabilities", "logits"]
DIRECTIONS: list[Direction] = ["forward", "reverse"]
# prime, few, one past a block, many, exactly a block, one class, several blocks, rows that are and are not made of
# 16-byte pieces; the first and the third are in the plain tier
SHAPES = [(3, 101, 3), (5, 10, 1), (2, 129, 2), (2, 1000, 6), (2, 128, 2), (2, 1, 2), (2, 4104, 2), (2, 4097, 3)]
# Every two values of different arguments meet: a shape has one of four settings and its opposite.
#   shape, average       the log-sum-exp over teachers in blocks, its last one not full, and where there is one teacher
#   shape, direction     the third sweep over a row, which only the reverse gradient takes
#   shape, labels        the second sum of the first sweep; the label's own logit in any block
#   average, direction   which logarithm is multiplied by which probability, for both kinds of log p
#   either, labels       what labels add to each form of the gradient
# The last shape meets all eight settings: several blocks, the last one not full, and three teachers take every branch.
SETTINGS = list(itertools.product(AVERAGES, DIRECTIONS, (True, False)))
CASES = [
    (*shape, *SETTINGS[at])
    for index, shape in enumerate(SHAPES)
    for at in (range(8) if shape == SHAPES[-1] else (index % 4, 7 - index % 4))
]


def make(
    batch: int, classes: int, teachers: int, device: torch.device, dtype: torch.dtype = torch.float16
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Student logits, teachers of ``dtype``, labels of which the first is missing."""
    generator = torch.Generator().manual_seed(classes)
    student = 3 * torch.randn(batch, classes, generator=generator)
    many = [(3 * torch.randn(batch, classes, generator=generator) + 5).to(device, dtype) for _ in range(teachers)]
    labels = torch.randint(0, classes, (batch,), generator=generator)
    labels[0] = -1
    return student.to(device), many, labels.to(device)


def exact(
    student: Tensor, teachers: Sequence[Tensor], grad_output: float = 1.0, **options: Any
) -> tuple[Tensor, Tensor]:
    """Loss and gradient in float64."""
    loss, (gradient,) = run(lambda s: reference(s, teachers, **options), [student.double()], grad_output)
    return loss, gradient


def close(actual: tuple[Tensor, Sequence[Tensor]], expected: tuple[Tensor, Tensor]) -> None:
    """Within fp32's rounding: of log p for the loss, of a logit over tau for the gradient's largest value."""
    torch.testing.assert_close(actual[0].double(), expected[0], rtol=3e-6, atol=3e-6)
    scale = expected[1].abs().max().item()
    torch.testing.assert_close(actual[1][0].double(), expected[1], rtol=3e-6, atol=2e-6 * scale)


def test_every_pair_of_arguments_meets() -> None:
    values = [set(SHAPES), set(AVERAGES), set(DIRECTIONS), {True, False}]
    rows = [(case[:3], *case[3:]) for case in CASES]
    for first, second in itertools.combinations(range(4), 2):
        assert {(row[first], row[second]) for row in rows} == set(itertools.product(values[first], values[second]))


@pytest.mark.parametrize(("batch", "classes", "count", "average", "direction", "labeled"), CASES)
def test_equals_float64(
    kernel_device: torch.device,
    batch: int,
    classes: int,
    count: int,
    average: Average,
    direction: Direction,
    labeled: bool,
) -> None:
    student, teachers, labels = make(batch, classes, count, kernel_device)
    options: dict[str, Any] = {"tau": 4.0, "average": average, "direction": direction, "weight": 0.7}
    if labeled:
        options |= {"labels": labels, "label_weight": 0.3}
    expected = exact(student, teachers, -1.7, **options)
    given = student if classes > 200 else orders(student)["sliced"]
    close(run(lambda s: ensemble_kl(s, teachers, **options), [given], -1.7), expected)


def test_terms_are_those_of_the_reference(kernel_device: torch.device) -> None:
    student, teachers, labels = make(6, 37, 3, kernel_device)
    for direction in DIRECTIONS:
        for given in (labels, torch.full_like(labels, -1), None):
            options: dict[str, Any] = {"tau": 2.0, "direction": direction, "labels": given, "return_terms": True}
            expected = reference(student, teachers, **options)
            leaf = student.clone().requires_grad_()
            loss, terms = ensemble_kl(leaf, teachers, **options)
            assert not terms.requires_grad
            torch.testing.assert_close(loss.detach(), expected[0], rtol=3e-6, atol=0)
            torch.testing.assert_close(terms, expected[1], rtol=3e-6, atol=0)
            alone = ensemble_kl(leaf, teachers, tau=2.0, direction=direction, labels=given)
            assert torch.equal(alone, loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_16_bit_students_and_teachers_of_several_dtypes(
    kernel_device: torch.device, dtype: torch.dtype, direction: Direction
) -> None:
    student, teachers, labels = make(4, 50, 3, kernel_device)
    teachers = [teachers[0], teachers[1].bfloat16(), teachers[2].float()]
    student = student.to(dtype)
    options: dict[str, Any] = {"tau": 4.0, "direction": direction, "labels": labels}
    loss, gradient = exact(student, teachers, 3.0, **options)
    actual, (rounded,) = run(lambda s: ensemble_kl(s, teachers, **options), [student], 3.0)
    assert (actual.dtype, rounded.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(actual.double(), loss, rtol=3e-6, atol=0)
    big = gradient.abs() > 1e-2 * gradient.abs().max()  # what is left of a cancellation has the error of its terms
    assert_rounded(rounded[big], gradient[big])


def test_a_loss_scalers_factor_reaches_the_gradient_before_it_is_rounded(kernel_device: torch.device) -> None:
    student, teachers, _ = make(2, 1000, 1, kernel_device)
    student, factor = (0.01 * student).half(), 65536.0
    _, gradient = exact(student, teachers, factor, tau=4.0, weight=1e-4)
    _, (rounded,) = run(lambda s: ensemble_kl(s, teachers, tau=4.0, weight=1e-4), [student], factor)
    assert (gradient / factor).abs().max() < torch.finfo(torch.float16).smallest_normal
    torch.testing.assert_close(rounded.double(), gradient, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_ruled_out_classes(kernel_device: torch.device, average: Average, direction: Direction) -> None:
    student, teachers, labels = make(4, 20, 3, kernel_device)
    teachers[0][0, 4] = float("-inf")  # by one of three: nothing, or everything where logits are averaged
    for teacher in teachers:
        teacher[1, 7] = float("-inf")  # by all, and by the student
        teacher[2, 3] = -200.0  # p is 0 in fp32, its logarithm is not
    student[1, 7] = float("-inf")
    labels[1] = 2
    if average == "logits":
        student[0, 4] = float("-inf")
    options: dict[str, Any] = {"tau": 1.0, "average": average, "direction": direction, "labels": labels}
    expected = exact(student, teachers, **options)
    assert expected[0].isfinite()
    close(run(lambda s: ensemble_kl(s, teachers, **options), [student]), expected)
    teachers[0][3, 5] = teachers[1][3, 5] = teachers[2][3, 5] = float("-inf")
    loss = ensemble_kl(student, teachers, tau=1.0, average=average, direction=direction)
    assert loss.isinf() if direction == "reverse" else loss.isfinite()


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_nan_survives_and_stays_in_its_row(
    kernel_device: torch.device, average: Average, direction: Direction
) -> None:
    for poisoned in range(3):
        student, teachers, labels = make(3, 12, 2, kernel_device)
        (student, *teachers)[poisoned][1, 5] = float("nan")
        for value in (labels, None):
            loss, (gradient,) = run(
                lambda s: ensemble_kl(s, teachers, tau=2.0, average=average, direction=direction, labels=value),
                [student],
            )
            assert loss.isnan()
            assert gradient[1].isnan().all()
            assert gradient[[0, 2]].isfinite().all()


def test_a_label_that_no_class_has_is_seen(kernel_device: torch.device) -> None:
    student, teachers, labels = make(4, 12, 1, kernel_device)
    for wrong in (12, -2, 1 << 40):
        labels[2] = wrong
        loss, (gradient,) = run(lambda s: ensemble_kl(s, teachers, tau=2.0, labels=labels), [student])
        assert loss.isnan()
        assert gradient[2].isnan().all()
        assert gradient[[0, 1, 3]].isfinite().all()


def test_empty_batch_is_zero_with_a_gradient(kernel_device: torch.device) -> None:
    student, teachers, labels = make(2, 6, 2, kernel_device)
    empty = [t[:0] for t in teachers]
    loss, (gradient,) = run(lambda s: ensemble_kl(s, empty, tau=2.0, labels=labels[:0]), [student[:0]])
    assert loss == 0
    assert gradient.shape == (0, 6)


def test_without_a_gradient_none_is_computed(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from feedfast_kernels.gpu import ensemble_kl as gpu

    student, teachers, labels = make(3, 40, 2, kernel_device)
    expected, _ = run(lambda s: ensemble_kl(s, teachers, tau=2.0, labels=labels), [student])
    asked: list[bool] = []
    plan = gpu.plan
    monkeypatch.setattr(gpu, "plan", lambda *arguments: (asked.append(arguments[9]), plan(*arguments))[1])
    leaf = student.clone().requires_grad_()
    with torch.no_grad():
        assert torch.equal(ensemble_kl(leaf, teachers, tau=2.0, labels=labels), expected)
    assert torch.equal(ensemble_kl(student, teachers, tau=2.0, labels=labels), expected)
    ensemble_kl(leaf, teachers, tau=2.0, labels=labels)
    assert asked == [False, False, True]


def test_second_derivatives_are_refused(kernel_device: torch.device) -> None:
    student, teachers, _ = make(3, 17, 2, kernel_device)
    student.requires_grad_()
    with pytest.raises(NotImplementedError, match=r"ensemble_kl.*float64"):
        torch.autograd.grad(ensemble_kl(student, teachers, tau=2.0), student, create_graph=True)


def test_two_runs_are_bit_equal(kernel_device: torch.device) -> None:
    student, teachers, labels = make(9, 300, 3, kernel_device)
    first, second = (run(lambda s: ensemble_kl(s, teachers, tau=4.0, labels=labels), [student], 0.3) for _ in "ab")
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1][0], second[1][0])


def test_teachers_get_no_gradient_and_arguments_stay(kernel_device: torch.device) -> None:
    student, teachers, labels = make(3, 8, 2, kernel_device)
    kept = [student.clone(), *(t.clone() for t in teachers), labels.clone()]
    for teacher in teachers:
        teacher.requires_grad_()
    run(lambda s: ensemble_kl(s, teachers, tau=2.0, labels=labels), [student])
    assert all(teacher.grad is None for teacher in teachers)
    for before, after in zip(kept, (student, *teachers, labels), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("terms", [True, False])
def test_compiles_in_one_graph(kernel_device: torch.device, terms: bool) -> None:
    student, teachers, labels = make(3, 12, 2, kernel_device)
    compiled = torch.compile(ensemble_kl, fullgraph=True, backend="aot_eager")

    def loss_of(function: Any, s: Tensor) -> Tensor:
        out = function(s, teachers, tau=4.0, labels=labels, return_terms=terms)
        return out[0] if terms else out

    for dtype in (torch.float32, torch.bfloat16):
        expected, (gradient,) = run(lambda s: loss_of(ensemble_kl, s), [student.to(dtype)], -2.0)
        loss, (actual,) = run(lambda s: loss_of(compiled, s), [student.to(dtype)], -2.0)
        assert torch.equal(loss, expected)
        assert torch.equal(actual, gradient)


def test_operator_keeps_its_schema(kernel_device: torch.device) -> None:
    student, teachers, labels = make(3, 12, 2, kernel_device)
    for given in (labels, None):
        for flag in (True, False):
            torch.library.opcheck(OPS.ensemble_kl, (student, teachers, given, 2.0, False, flag, 0.9, 0.1, flag, flag))


def test_under_autocast(kernel_device: torch.device) -> None:
    student, teachers, labels = make(3, 12, 2, kernel_device)
    expected, (gradient,) = run(lambda s: ensemble_kl(s, teachers, tau=2.0, labels=labels), [student])
    with torch.autocast(kernel_device.type, dtype=torch.bfloat16):
        loss, (actual,) = run(lambda s: ensemble_kl(s, teachers, tau=2.0, labels=labels), [student])
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert torch.equal(actual, gradient)


@pytest.mark.gpu
@pytest.mark.parametrize("classes", [1000, 21841])
def test_capture_replays_to_the_same_bits(classes: int) -> None:
    student, teachers, labels = make(64, classes, 3, torch.device("cuda"))
    student = student.bfloat16()
    expected, (gradient,) = run(lambda s: ensemble_kl(s, teachers, tau=4.0, labels=labels), [student])
    leaf = student.detach().requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        loss = ensemble_kl(leaf, teachers, tau=4.0, labels=labels)
        return loss.detach(), *torch.autograd.grad(loss, [leaf])

    graph, (loss, actual) = captured(step)
    graph.replay()
    assert torch.equal(loss, expected)
    assert torch.equal(actual, gradient)


@pytest.mark.gpu
@pytest.mark.parametrize("classes", [1000, 21841, 50257])
def test_wide_rows_on_a_gpu(classes: int) -> None:
    student, teachers, labels = make(16, classes, 3, torch.device("cuda"))
    options: dict[str, Any] = {"tau": 4.0, "labels": labels}
    close(run(lambda s: ensemble_kl(s, teachers, **options), [student]), exact(student, teachers, **options))


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements() -> None:
    device = torch.device("cuda")
    rows, classes = (1 << 21) + 3, 1032  # 2.2 G logits: 4.3 GB twice, and 8.7 GB of gradient
    student = torch.zeros(rows, classes, dtype=torch.bfloat16, device=device)
    teacher = torch.zeros(rows, classes, dtype=torch.float16, device=device)
    teacher[-1, 5] = 8.0
    loss, (gradient,) = run(lambda s: ensemble_kl(s, [teacher], tau=1.0, weight=float(rows)), [student])
    last = reference(student[-1:].float(), [teacher[-1:]], tau=1.0)
    torch.testing.assert_close(loss, last, rtol=1e-5, atol=1e-5)
    assert gradient[-1, 5] < -0.5
    assert gradient[-2].abs().max() < 1e-6
