"""Logit distillation against SciPy in float64, for both averages and both directions."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax
from torch import Tensor

from feedfast_kernels import ensemble_kl

Average = Literal["probabilities", "logits"]
Direction = Literal["forward", "reverse"]
AVERAGES: list[Average] = ["probabilities", "logits"]
DIRECTIONS: list[Direction] = ["forward", "reverse"]


def make(batch: int, classes: int, teachers: int) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(classes)
    return (
        3 * torch.randn(batch, classes, generator=generator),
        [3 * torch.randn(batch, classes, generator=generator) for _ in range(teachers)],
    )


def formula(student: Tensor, teachers: list[Tensor], tau: float, average: Average, direction: Direction) -> float:
    z = [t.double().numpy() / tau for t in teachers]
    p = np.mean([softmax(x, axis=1) for x in z], 0) if average == "probabilities" else softmax(np.mean(z, 0), axis=1)
    q = softmax(student.double().numpy() / tau, axis=1)
    pair = (p, q) if direction == "forward" else (q, p)
    return float(tau**2 * rel_entr(*pair).sum(1).mean())


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("batch", "classes", "teachers", "tau"), [(5, 7, 1, 1.0), (3, 101, 3, 4.0), (1, 1, 2, 2.0)])
def test_value_is_the_formula(
    batch: int, classes: int, teachers: int, tau: float, average: Average, direction: Direction
) -> None:
    student, many = make(batch, classes, teachers)
    expected = formula(student, many, tau, average, direction)
    loss = ensemble_kl(student, many, tau=tau, average=average, direction=direction, weight=0.5)
    assert loss.dtype == torch.float32
    np.testing.assert_allclose(loss.item(), 0.5 * expected, rtol=1e-5, atol=1e-6)
    halves = [t.half() for t in many]
    expected = formula(student.bfloat16(), halves, tau, average, direction)
    loss = ensemble_kl(student.bfloat16(), halves, tau=tau, average=average, direction=direction)
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradcheck(average: Average, direction: Direction) -> None:
    student, teachers = make(3, 5, 2)
    leaf = student.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: ensemble_kl(s, teachers, tau=3.0, average=average, direction=direction, weight=0.7), (leaf,)
    )


def test_gradient_is_the_closed_form_and_the_students_alone() -> None:
    student, teachers = make(4, 6, 3)
    student.requires_grad_()
    for teacher in teachers:
        teacher.requires_grad_()
    (2.5 * ensemble_kl(student, teachers, tau=4.0)).backward()
    p = np.mean([softmax(t.detach().double().numpy() / 4, axis=1) for t in teachers], 0)
    q = softmax(student.detach().double().numpy() / 4, axis=1)
    assert student.grad is not None
    np.testing.assert_allclose(student.grad.numpy(), 2.5 * 4 * (q - p) / 4, rtol=1e-4, atol=1e-6)  # tau (q - p) / B
    assert all(teacher.grad is None for teacher in teachers)


def test_averages_and_directions_differ_and_agree_where_they_must() -> None:
    student, teachers = make(4, 6, 2)
    values = {
        ensemble_kl(student, teachers, tau=2.0, average=a, direction=d).item() for a in AVERAGES for d in DIRECTIONS
    }
    assert len(values) == 4
    one = [ensemble_kl(student, teachers[:1], tau=2.0, average=a) for a in AVERAGES]
    torch.testing.assert_close(one[0], one[1])
    for average in AVERAGES:
        same = ensemble_kl(student, [student, student + 5], tau=2.0, average=average)  # logits are free to shift
        torch.testing.assert_close(same, torch.zeros(()), atol=1e-6, rtol=0)


def test_classes_that_are_ruled_out_stay_finite() -> None:
    student = torch.tensor([[200.0, -200.0, 0.0]], requires_grad=True)
    for direction in DIRECTIONS:
        loss = ensemble_kl(student, [-student.detach(), torch.zeros(1, 3)], tau=1.0, direction=direction)
        p = np.mean([softmax([[-200.0, 200.0, 0.0]], axis=1), np.full((1, 3), 1 / 3)], 0)
        q = log_softmax([[200.0, -200.0, 0.0]], axis=1)
        pair = (p * (np.log(p) - q)) if direction == "forward" else (np.exp(q) * (q - np.log(p)))
        np.testing.assert_allclose(loss.item(), pair.sum(), rtol=1e-5)
        loss.backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    # ruled out by every teacher: the probability itself is 0 in fp32, its logarithm is not
    loss = ensemble_kl(torch.zeros(1, 2), [torch.tensor([[0.0, -200.0]])] * 2, tau=1.0)
    np.testing.assert_allclose(loss.item(), np.log(2), rtol=1e-6)
    reverse = ensemble_kl(torch.zeros(1, 2), [torch.tensor([[0.0, -200.0]])] * 2, tau=1.0, direction="reverse")
    np.testing.assert_allclose(reverse.item(), 100 - np.log(2), rtol=1e-6)


def test_nan_empty_batch_and_strides() -> None:
    student, teachers = make(4, 6, 2)
    expected = ensemble_kl(student, teachers, tau=2.0)
    transposed = [t.t().contiguous().t() for t in teachers]
    assert torch.equal(ensemble_kl(student.t().contiguous().t(), transposed, tau=2.0), expected)
    for poisoned in (0, 1):
        both = [student.clone(), teachers[0].clone()]
        both[poisoned][2, 3] = float("nan")
        assert ensemble_kl(both[0], [both[1], teachers[1]], tau=2.0).isnan()
    empty = torch.zeros(0, 6, requires_grad=True)
    loss = ensemble_kl(empty, [torch.zeros(0, 6)], tau=2.0)
    loss.backward()
    assert loss == 0


def test_what_does_not_fit_is_refused() -> None:
    student, teachers = make(4, 6, 2)
    with pytest.raises(ValueError, match=r"teacher 1 .*\[4, 6\].*got \[4, 5\]"):
        ensemble_kl(student, [teachers[0], teachers[1][:, :5]], tau=1.0)
    with pytest.raises(ValueError, match="at least one teacher"):
        ensemble_kl(student, [], tau=1.0)
    with pytest.raises(ValueError, match="> 0, got 0"):
        ensemble_kl(student, teachers, tau=0.0)
    with pytest.raises(ValueError, match="'probabilities' or 'logits'"):
        ensemble_kl(student, teachers, tau=1.0, average="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'forward' or 'reverse'"):
        ensemble_kl(student, teachers, tau=1.0, direction="up")  # type: ignore[arg-type]


def test_compiles_in_one_graph() -> None:
    student, teachers = make(4, 6, 2)
    compiled = torch.compile(ensemble_kl, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(student, teachers, tau=4.0), ensemble_kl(student, teachers, tau=4.0))


# --- with labels


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_labels_add_the_cross_entropy_of_the_labeled_rows(direction: Direction) -> None:
    student, teachers = make(5, 7, 2)
    labels = torch.tensor([3, -1, 6, 0, -1])
    rows = log_softmax(student.double().numpy(), axis=1)
    entropy = -np.mean([rows[0, 3], rows[2, 6], rows[3, 0]])
    divergence = formula(student, teachers, 4.0, "probabilities", direction)
    loss, terms = ensemble_kl(
        student, teachers, tau=4.0, direction=direction, weight=0.9, labels=labels, label_weight=0.1, return_terms=True
    )
    assert (terms.dtype, terms.requires_grad) == (torch.float32, False)
    np.testing.assert_allclose(terms.numpy(), [entropy, divergence], rtol=1e-5)
    np.testing.assert_allclose(loss.item(), 0.1 * entropy + 0.9 * divergence, rtol=1e-5)
    alone = ensemble_kl(student, teachers, tau=4.0, direction=direction, weight=0.9, labels=labels, label_weight=0.1)
    assert torch.equal(alone, loss)
    leaf = student.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: ensemble_kl(s, teachers, tau=3.0, direction=direction, labels=labels, label_weight=0.3), (leaf,)
    )


def test_without_any_label_there_is_no_cross_entropy() -> None:
    student, teachers = make(3, 5, 1)
    expected = ensemble_kl(student, teachers, tau=2.0)
    for labels in (None, torch.full((3,), -1)):
        loss, terms = ensemble_kl(student, teachers, tau=2.0, labels=labels, return_terms=True)
        assert torch.equal(loss, expected)
        assert terms.tolist() == [0.0, expected.item()]
    empty, terms = ensemble_kl(
        student[:0], [teachers[0][:0]], tau=2.0, labels=torch.zeros(0, dtype=torch.int64), return_terms=True
    )
    assert empty == 0
    assert terms.tolist() == [0.0, 0.0]


def test_labels_that_do_not_fit_are_refused() -> None:
    student, teachers = make(4, 6, 1)
    with pytest.raises(ValueError, match=r"labels expected int64 \[4\], got torch.int32 \[4\]"):
        ensemble_kl(student, teachers, tau=1.0, labels=torch.zeros(4, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"got torch.int64 \[3\]"):
        ensemble_kl(student, teachers, tau=1.0, labels=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(IndexError):
        ensemble_kl(student, teachers, tau=1.0, labels=torch.tensor([0, 6, 1, 2]))


@pytest.mark.parametrize("average", AVERAGES)
def test_minus_infinity_rules_a_class_out(average: Average) -> None:
    student, teachers = make(3, 6, 2)
    for teacher in teachers:
        teacher[:, 2] = float("-inf")
    leaf = student.clone().requires_grad_()
    loss = ensemble_kl(leaf, teachers, tau=2.0, average=average)
    loss.backward()
    np.testing.assert_allclose(loss.item(), formula(student, teachers, 2.0, average, "forward"), rtol=1e-5)
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    assert ensemble_kl(student, teachers, tau=2.0, average=average, direction="reverse") == float("inf")
    student[:, 2] = float("-inf")  # ruled out by both: 0 log 0
    leaf = student.clone().requires_grad_()
    for direction in DIRECTIONS:
        loss = ensemble_kl(leaf, teachers, tau=2.0, average=average, direction=direction)
        np.testing.assert_allclose(
            loss.item(), formula(student, teachers, 2.0, average, direction), rtol=1e-5, atol=1e-7
        )
        (gradient,) = torch.autograd.grad(loss, [leaf])
        assert gradient.isfinite().all()
