"""LP's distance against a double loop in float64, and what must not change it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from feedfast_kernels import Codes, Target, _layout, as_float, encode, locality, locality_weights

# samples, width of the student's features, width of the teacher's, neighbors
SHAPES = [
    (7, (5,), (9,), 3),
    (2, (3,), (1,), 1),
    (13, (4, 3, 2), (6, 2, 5), 5),
    (6, (2, 4), (8,), 5),
    (33, (16,), (40,), 4),
]


def make(samples: int, student: tuple[int, ...], teacher: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, *student, generator=generator) + 3, 2 * torch.randn(
        samples, *teacher, generator=generator
    ) - 5


def formula(
    student: Tensor, teacher: Tensor, k: int, sigma_squared: float | None
) -> tuple[float, np.ndarray, np.ndarray]:
    """m * loss, alpha and the gradient of m * loss, pair by pair."""
    s, t = (x.detach().double().flatten(1).numpy() for x in (student, teacher))
    samples = len(s)
    distance = np.array([[((a - b) ** 2).sum() for b in t] for a in t])
    near = {
        i: sorted((j for j in range(samples) if j != i), key=lambda j: (distance[i, j], j))[:k] for i in range(samples)
    }
    if sigma_squared is None:
        sigma_squared = float(np.mean([distance[i, j] for i, js in near.items() for j in js]))
    alpha, gradient, total = np.zeros((samples, samples)), np.zeros_like(s), 0.0
    for i, js in near.items():
        for j in js:
            alpha[i, j] = np.exp(-distance[i, j] / sigma_squared)
            total += alpha[i, j] * ((s[i] - s[j]) ** 2).sum()
            gradient[i] += 2 * alpha[i, j] * (s[i] - s[j])
            gradient[j] -= 2 * alpha[i, j] * (s[i] - s[j])
    return total, alpha, gradient


@pytest.mark.parametrize("sigma_squared", [None, 30.0])
@pytest.mark.parametrize(("samples", "student_shape", "teacher_shape", "k"), SHAPES)
def test_value_weights_and_gradient_are_the_formula(
    samples: int, student_shape: tuple[int, ...], teacher_shape: tuple[int, ...], k: int, sigma_squared: float | None
) -> None:
    student, teacher = make(samples, student_shape, teacher_shape)
    total, alpha, gradient = formula(student, teacher, k, sigma_squared)
    options: dict[str, Any] = {"k": k, "sigma_squared": sigma_squared}
    np.testing.assert_allclose(locality_weights(teacher, **options).numpy(), alpha, rtol=1e-5, atol=1e-7)
    leaf = student.clone().requires_grad_()
    loss = locality(leaf, teacher, weight=0.5, **options)
    assert loss.dtype == torch.float32
    np.testing.assert_allclose(loss.item(), 0.5 * total / samples, rtol=1e-5)
    (-1.7 * loss).backward()
    assert leaf.grad is not None
    expected = (-1.7 * 0.5 / samples * gradient).reshape(student.shape)
    np.testing.assert_allclose(leaf.grad.numpy(), expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    np.testing.assert_allclose(locality(student, teacher, denominator=2.0, **options).item(), total / 2, rtol=1e-5)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 2)])
def test_gradcheck(shape: tuple[int, ...]) -> None:
    student, teacher = make(6, shape, (5,))
    leaf = student.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: locality(s, teacher, k=2, weight=0.7), (leaf,))


def test_rows_have_exactly_k_weights_and_none_on_the_diagonal() -> None:
    _, teacher = make(40, (1,), (300,))
    for k in (1, 5, 39):
        weights = locality_weights(1000 * teacher, k=k)  # the scale is found
        assert (weights > 0).sum(1).tolist() == [k] * 40
        assert weights.diagonal().tolist() == [0.0] * 40
        assert weights[weights > 0].mean() > 0.2
    assert not locality_weights(1000 * teacher, k=5, sigma_squared=2.0).any()  # why it is found


def test_ties_go_to_the_lower_index() -> None:
    corners = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    weights = locality_weights(corners, k=2, sigma_squared=1.0)
    assert [row.nonzero().flatten().tolist() for row in weights] == [[1, 4], [0, 3], [0, 3], [1, 2], [0, 1]]
    assert weights[0, 4] == 1
    assert locality_weights(torch.ones(4, 3), k=2).sum(1).tolist() == [2.0] * 4  # all alike: distance 0, alpha 1


def test_invariant_to_rotation_and_translation_of_either_space() -> None:
    student, teacher = make(20, (6,), (11,))
    plain = locality(student, teacher, k=4)
    turns = [torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(n)))[0] for n in (6, 11)]
    torch.testing.assert_close(locality(student @ turns[0] + 100, teacher, k=4), plain, rtol=1e-4, atol=0)
    torch.testing.assert_close(locality(student, teacher @ turns[1] - 100, k=4), plain, rtol=1e-4, atol=0)


def test_far_from_the_origin_distances_keep_their_digits() -> None:
    student, teacher = make(16, (8,), (8,))
    offset = 4096.0  # fp32 has 2^-11 there: exact differences of values on that grid
    student, teacher = ((x * 2048).round() / 2048 for x in (student, teacher))
    assert torch.equal(locality(student + offset, teacher + offset, k=3), locality(student, teacher, k=3))


def test_zero_for_a_constant_student_and_not_for_others() -> None:
    student, teacher = make(12, (7,), (5,))
    leaf = (student[:1].repeat(12, 1) * 1.1).requires_grad_()
    loss = locality(leaf, teacher, k=3)
    loss.backward()
    assert loss == 0
    assert leaf.grad is not None
    assert not leaf.grad.any()
    leaf = student.clone().requires_grad_()
    locality(leaf, teacher, k=3).backward()
    assert leaf.grad is not None
    assert leaf.grad.abs().sum(1).min() > 0


def test_codes_floats_and_strides_give_the_same_bits() -> None:
    student, teacher = make(9, (5, 4, 3), (6, 3, 3))
    offset, step = torch.full((6,), -12.0), torch.full((6,), 0.06)
    codes = Codes(encode(teacher, offset, step, codec="u8")[0], offset, step, "u8")
    values = as_float(codes)
    results = []
    for given in (student, student.contiguous(memory_format=torch.channels_last)):
        for target in (codes, values, values.contiguous()):
            leaf = given.clone().requires_grad_()
            loss = locality(leaf, target, k=3)
            loss.backward()
            assert leaf.grad is not None
            results.append((loss.detach(), leaf.grad))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])
    assert torch.equal(locality_weights(codes, k=3), locality_weights(values, k=3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_students(dtype: torch.dtype) -> None:
    student, teacher = make(10, (6,), (8,))
    student, teacher = student.to(dtype), teacher.to(dtype)
    total, _, gradient = formula(student, teacher, 3, None)
    leaf = student.clone().requires_grad_()
    loss = locality(leaf, teacher, k=3, denominator=1.0)
    loss.backward()
    assert leaf.grad is not None
    assert (loss.dtype, leaf.grad.dtype) == (torch.float32, dtype)
    np.testing.assert_allclose(loss.item(), total, rtol=1e-5)
    np.testing.assert_allclose(leaf.grad.double().numpy(), gradient, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_autocast_changes_nothing() -> None:
    student, teacher = make(10, (6,), (8,))
    leaves = [student.clone().requires_grad_() for _ in range(2)]
    expected, weights = locality(leaves[0], teacher, k=3), locality_weights(teacher, k=3)
    expected.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = locality(leaves[1], teacher, k=3)
        loss.backward()
        assert torch.equal(locality_weights(teacher, k=3), weights)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert leaves[0].grad is not None
    assert leaves[1].grad is not None
    assert torch.equal(leaves[1].grad, leaves[0].grad)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_nan_survives(side: str, k: int) -> None:
    for sigma_squared in (None, 4.0):
        student, teacher = make(5, (6,), (8,))
        (student if side == "student" else teacher)[3, 2] = float("nan")
        leaf = student.requires_grad_()
        loss = locality(leaf, teacher, k=k, sigma_squared=sigma_squared)
        loss.backward()
        assert loss.isnan()
        assert leaf.grad is not None
        assert leaf.grad.isnan().any()


def test_small_batches() -> None:
    student, teacher = make(4, (3,), (5,))
    assert torch.equal(locality(student, teacher, k=9), locality(student, teacher, k=3))  # all others
    for samples in (1, 0):
        leaf = student[:samples].clone().requires_grad_()
        loss = locality(leaf, teacher[:samples], k=2)
        loss.backward()
        assert loss == 0
        assert leaf.grad is not None
        assert not leaf.grad.any()


def test_what_does_not_fit_is_refused() -> None:
    student, teacher = make(4, (3,), (5,))
    with pytest.raises(ValueError, match=r"student \[4, 3\] and a teacher \[3, 5\]"):
        locality(student, teacher[:3], k=2)
    with pytest.raises(ValueError, match=r"\[m, \.\.\.\]"):
        locality_weights(teacher[0], k=2)
    with pytest.raises(ValueError, match="k expected >= 1, got 0"):
        locality(student, teacher, k=0)
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="sigma_squared expected > 0 or None"):
            locality(student, teacher, k=1, sigma_squared=wrong)


def test_no_tensor_is_larger_than_the_features_or_the_pairs() -> None:
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple) else (out,):
                if isinstance(x, Tensor):
                    self.elements = max(self.elements, x.numel())
            return out

    student, teacher = make(24, (50,), (70,))
    leaf = student.requires_grad_()
    with Largest() as largest:
        locality(leaf, teacher, k=5).backward()
    assert 24 * 24 <= largest.elements <= 24 * 70


def test_teacher_gets_no_gradient_and_arguments_stay() -> None:
    student, teacher = make(6, (3,), (5,))
    kept = student.clone(), teacher.clone()
    teacher.requires_grad_()
    leaf = student.requires_grad_()
    locality(leaf, teacher, k=2).backward()
    assert teacher.grad is None
    assert not locality_weights(teacher, k=2).requires_grad
    assert torch.equal(student, kept[0])
    assert torch.equal(teacher, kept[1])


@pytest.mark.parametrize("shape", [(6,), (3, 4, 2)])
def test_compiles_in_one_graph(shape: tuple[int, ...]) -> None:
    student, teacher = make(8, shape, (7,))
    compiled = torch.compile(locality, fullgraph=True, backend="aot_eager")
    for dtype in (torch.float32, torch.bfloat16):
        first, second = (student.to(dtype, copy=True).requires_grad_() for _ in range(2))
        expected, loss = locality(first, teacher, k=3), compiled(second, teacher, k=3)
        expected.backward()
        loss.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(first.grad, second.grad)


@pytest.mark.parametrize("kind", ["float", "u8", "u6"])
def test_pieces_change_nothing_but_the_rounding_of_the_sum(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    student, values = make(9, (3, 11, 5), (5, 7, 2))
    teacher: Target = values
    if kind != "float":
        offset, step = torch.full((5,), -12.0), torch.full((5,), 0.06 if kind == "u8" else 0.25)
        teacher = Codes(encode(values, offset, step, codec=kind)[0], offset, step, kind)  # type: ignore[arg-type]

    def value_and_gradient() -> tuple[Tensor, Tensor]:
        leaf = student.detach().requires_grad_()
        loss = locality(leaf, teacher, k=3)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    expected = value_and_gradient()
    for elements in (1, 9 * 3 * 5, 2 * 9 * 3 * 5, 10**6):  # one row, one, two and all of 11
        monkeypatch.setattr(_layout, "TILE_ELEMENTS_PER_THREAD", elements)
        actual = value_and_gradient()
        torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=0)
        torch.testing.assert_close(actual[1], expected[1], rtol=1e-5, atol=1e-6)


def test_second_derivatives_are_refused() -> None:
    student, teacher = make(7, (5,), (9,))
    student.requires_grad_()
    with pytest.raises(NotImplementedError, match="locality: expected a first derivative"):
        torch.autograd.grad(locality(student, teacher, k=3), student, create_graph=True)


@pytest.mark.gpu
def test_on_a_gpu_twice_the_same_and_as_on_the_cpu() -> None:
    student, teacher = make(64, (32, 4, 4), (48, 4, 4))
    results = []
    for device in ("cpu", "cuda", "cuda"):
        leaf = student.detach().to(device).requires_grad_()
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = locality(leaf, teacher.to(device), k=5)
        loss.backward()
        assert leaf.grad is not None
        results.append((loss.detach().cpu(), leaf.grad.cpu()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(results[1][0], results[2][0])
    assert torch.equal(results[1][1], results[2][1])
