"""FEED's distance against NumPy in float64, its gradient, and scale invariance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pytest
import torch
from code_samples import STEP
from torch import Tensor

from feedfast_kernels import Codes, Target, _layout, as_float, decode, encode, normalized_l1
from feedfast_kernels.codes import is_quantized
from feedfast_kernels.normalized_l1 import reference

SHAPES = [(2, 3, 5, 7), (1, 1, 1, 1), (4, 16, 8, 8), (3, 17, 1, 31), (5, 10)]
KINDS = ["f32", "f16", *STEP]
REDUCTIONS: list[Literal["sum", "mean"]] = ["sum", "mean"]


def make(shape: tuple[int, ...], kind: str, seed: int = 0) -> tuple[Tensor, Target]:
    """A student map and a non-negative target of the given codec."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(shape, generator=generator)
    teacher = torch.randn(shape, generator=generator).clamp(min=0) + 0.01
    if is_quantized(kind):
        offset, step = torch.zeros(shape[1]), torch.full((shape[1],), 0.8 * STEP[kind])
        return student, Codes(encode(teacher + 0.2, offset, step, codec=kind)[0], offset, step, kind)
    return student, teacher.half() if kind == "f16" else teacher


def formula(students: Sequence[np.ndarray], targets: Sequence[np.ndarray], mean: bool) -> float:
    """Sample by sample, in float64."""
    total = 0.0
    for student, target in zip(students, targets, strict=True):
        for s, t in zip(student, target, strict=True):
            distance = np.abs(s / np.sqrt((s**2).sum()) - t / np.sqrt((t**2).sum())).sum()
            total += distance / s.size if mean else distance
    return total / len(students[0])


def as_numpy(target: Target) -> np.ndarray:
    if isinstance(target, Tensor):
        return target.double().numpy()
    return decode(target, torch.float64).numpy()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_value_is_the_formula(shape: tuple[int, ...], kind: str, reduction: Literal["sum", "mean"]) -> None:
    pairs = [make(shape, kind, seed) for seed in (0, 1)]
    expected = formula([s.double().numpy() for s, _ in pairs], [as_numpy(t) for _, t in pairs], reduction == "mean")
    loss = normalized_l1([s for s, _ in pairs], [t for _, t in pairs], reduction=reduction, weight=0.5)
    assert loss.dtype == torch.float32
    np.testing.assert_allclose(loss.item(), 0.5 * expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["f32", "u8", "u6", "u4"])
def test_gradcheck(kind: str, reduction: Literal["sum", "mean"]) -> None:
    first, target = make((2, 3, 4, 2), kind)
    second, other = make((2, 5), kind, seed=1)
    leaves = (first.double().requires_grad_(), second.double().requires_grad_())
    assert torch.autograd.gradcheck(
        lambda a, b: normalized_l1([a, b], [target, other], reduction=reduction, weight=0.3, denominator=7), leaves
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_autograd_of_the_plain_expression(kind: str, dtype: torch.dtype) -> None:
    student, target = make((3, 4, 5, 6), kind)
    student = student.to(dtype)
    reference = student.double().requires_grad_()
    unit, other = (torch.nn.functional.normalize(x.flatten(1)) for x in (reference, torch.from_numpy(as_numpy(target))))
    (-2.5 * (unit - other).abs().sum() / 3).backward()
    leaf = student.clone().requires_grad_()
    (-2.5 * normalized_l1([leaf], [target], reduction="sum")).backward()
    assert leaf.grad is not None
    assert reference.grad is not None
    assert leaf.grad.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(leaf.grad.double(), reference.grad, rtol=tolerance, atol=1e-7)


def test_zero_for_any_positive_multiple_and_invariant_to_scale() -> None:
    student, target = make((3, 4, 5, 5), "f32")
    assert isinstance(target, Tensor)
    scale = torch.tensor([0.25, 3.0, 1024.0])[:, None, None, None]
    assert normalized_l1([target * scale], [target], reduction="sum").item() < 1e-5
    plain = normalized_l1([student], [target], reduction="sum")
    torch.testing.assert_close(normalized_l1([student * scale], [target], reduction="sum"), plain)
    torch.testing.assert_close(normalized_l1([student], [target * scale], reduction="sum"), plain)


def test_mean_is_sum_over_values_and_equal_teachers_add_up() -> None:
    student, target = make((3, 4, 5, 6), "u8")
    total = normalized_l1([student], [target], reduction="sum")
    torch.testing.assert_close(normalized_l1([student], [target], reduction="mean"), total / 120)
    torch.testing.assert_close(normalized_l1([student] * 3, [target] * 3, reduction="sum"), 3 * total)


def test_strides_and_codes_or_floats_give_the_same_bits() -> None:
    student, codes = make((3, 5, 7, 9), "u8")
    values = as_float(codes)
    wider = torch.zeros(3, 5, 7, 18)
    wider[..., ::2] = values
    results = []
    for given_student in (student, student.contiguous(memory_format=torch.channels_last)):
        for target in (codes, values, values.contiguous(), wider[..., ::2]):
            leaf = given_student.detach().requires_grad_()
            loss = normalized_l1([leaf], [target], reduction="mean")
            loss.backward()
            assert leaf.grad is not None
            results.append((loss.detach(), leaf.grad))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("elements", [1, 100, 431, 10**6])  # a sample has 216: less, and no whole number of them
def test_tiles_change_nothing_but_the_rounding_of_the_sum(
    elements: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, codes = make((5, 6, 9, 4), "u6")

    def value_and_gradient() -> tuple[Tensor, Tensor]:
        leaf = student.to(dtype).requires_grad_()
        loss = normalized_l1([leaf], [codes], reduction="mean")
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    expected = value_and_gradient()
    monkeypatch.setattr(_layout, "TILE_ELEMENTS_PER_THREAD", elements)
    loss, gradient = value_and_gradient()
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=0)
    assert torch.equal(gradient, expected[1])


def test_a_graph_may_be_walked_twice() -> None:
    student, target = make((2, 3, 4, 4), "u8")
    for grad_output in (1.0, 0.3):
        leaf = student.detach().requires_grad_()
        loss = normalized_l1([leaf, leaf], [target, target], reduction="sum")
        first, second = (torch.autograd.grad(loss * grad_output, leaf, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)
        first.mul_(2)  # what a caller does to its gradient stays with the caller
        assert torch.equal(torch.autograd.grad(loss * grad_output, leaf)[0], second)


def test_second_derivatives_only_where_they_are_right() -> None:
    student, target = make((2, 3, 2, 2), "u8")
    assert torch.autograd.gradgradcheck(
        lambda s: normalized_l1([s], [target], reduction="sum"), (student.double().requires_grad_(),)
    )
    student.requires_grad_()
    with pytest.raises(NotImplementedError, match=r"normalized_l1.*float64"):
        torch.autograd.grad(normalized_l1([student], [target], reduction="sum"), student, create_graph=True)
    assert torch.autograd.grad(reference([student], [target], reduction="sum"), student, create_graph=True)


def test_long_sums_keep_their_digits() -> None:
    student, target = make((2, 64, 64, 63), "f16")  # 258,048 values per sample
    expected = formula([student.double().numpy()], [as_numpy(target)], mean=False)
    np.testing.assert_allclose(normalized_l1([student], [target], reduction="sum").item(), expected, rtol=1e-6)


def test_dead_maps_are_bounded_by_eps() -> None:
    zero = torch.zeros(1, 2, 2, 2, requires_grad=True)
    target = torch.ones(1, 2, 2, 2)
    loss = normalized_l1([zero], [target], reduction="sum", eps=1e-3)
    np.testing.assert_allclose(loss.item(), 8 / np.sqrt(8), rtol=1e-6)
    loss.backward()
    assert zero.grad is not None
    # what F.normalize does too: below eps the divisor is a constant
    torch.testing.assert_close(zero.grad, torch.full((1, 2, 2, 2), -1000.0))
    assert normalized_l1([target], [torch.zeros(1, 2, 2, 2)], reduction="sum").isfinite()
    faint = (1e-5 * torch.randn(1, 2, 2, 2, generator=torch.Generator().manual_seed(0))).requires_grad_()
    (gradient,) = torch.autograd.grad(normalized_l1([faint], [target], reduction="sum", eps=1e-3), faint)
    plain = torch.nn.functional.normalize(faint.flatten(1), eps=1e-3)
    unit = torch.nn.functional.normalize(target.flatten(1))
    (expected,) = torch.autograd.grad((plain - unit).abs().sum(), faint)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("side", ["student", "target"])
def test_a_nan_survives(side: str) -> None:
    student, target = make((2, 3, 4, 4), "f32")
    assert isinstance(target, Tensor)
    (student if side == "student" else target)[0, 0, 0, 0] = float("nan")
    student.requires_grad_()
    loss = normalized_l1([student], [target], reduction="mean")
    loss.backward()
    assert loss.isnan()
    assert student.grad is not None
    assert student.grad[0].isnan().any()
    assert student.grad[1].isfinite().all()


def test_empty_batch_is_zero() -> None:
    student = torch.zeros(0, 3, 4, 4, requires_grad=True)
    loss = normalized_l1([student], [torch.zeros(0, 3, 4, 4)], reduction="mean")
    loss.backward()
    assert loss == 0
    assert student.grad is not None


def test_what_does_not_fit_is_refused() -> None:
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"target 1 .*\[2, 3, 4, 4\].*got \[2, 3, 4, 5\]"):
        normalized_l1([x, x], [x, torch.zeros(2, 3, 4, 5)], reduction="sum")
    with pytest.raises(ValueError, match="got 2 maps and 1 targets"):
        normalized_l1([x, x], [x], reduction="sum")
    with pytest.raises(ValueError, match="at least one"):
        normalized_l1([], [], reduction="sum")
    with pytest.raises(ValueError, match="'sum' or 'mean', got 'max'"):
        normalized_l1([x], [x], reduction="max")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["f32", "u8", "u6", "u4"])
def test_compiles_in_one_graph(kind: str) -> None:
    student, target = make((2, 6, 4, 4), kind)
    student.requires_grad_()
    expected = normalized_l1([student], [target], reduction="mean")
    (expected_gradient,) = torch.autograd.grad(expected, student)
    loss = torch.compile(normalized_l1, fullgraph=True, backend="aot_eager")([student], [target], reduction="mean")
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(student.grad, expected_gradient)
