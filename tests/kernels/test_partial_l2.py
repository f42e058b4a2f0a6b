"""OFD's distance against its three-case definition in float64, its gradient, and the properties the paper implies."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from code_samples import STEP
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from feedfast_kernels import Codes, Target, _layout, as_float, decode, encode, partial_l2
from feedfast_kernels.codes import is_quantized

SHAPES = [(2, 3, 5, 7), (1, 1, 1, 1), (4, 32, 8, 8), (3, 17, 1, 31), (5, 10), (2, 129)]
KINDS = ["f32", "f16", *STEP]


def make(shape: tuple[int, ...], kind: str, seed: int = 0) -> tuple[Tensor, Target, Tensor]:
    """A student map, a target of the given codec, and a margin; about a third of the elements is silent."""
    generator = torch.Generator().manual_seed(seed)
    channels = shape[1]
    student = torch.randn(shape, generator=generator)
    teacher = torch.randn(shape, generator=generator)
    margin = -0.2 - torch.rand(channels, generator=generator)
    if is_quantized(kind):
        offset, step = -2 - torch.rand(channels, generator=generator), torch.full((channels,), STEP[kind])
        return student, Codes(encode(teacher, offset, step, codec=kind)[0], offset, step, kind), margin
    return student, teacher.half() if kind == "f16" else teacher, margin


def numpy_target(target: Target) -> np.ndarray:
    """Target values in float64, from the definition of each codec."""
    if isinstance(target, Tensor):
        return target.double().numpy()
    return decode(target, torch.float64).numpy()  # checked against its own formula in test_codes


def three_cases(student: np.ndarray, raw: np.ndarray, margin: np.ndarray | None) -> tuple[float, np.ndarray]:
    """Sum and gradient as the paper's cases read: raw <= m, m < raw <= 0, raw > 0."""
    m = np.full(raw.shape[1], -np.inf) if margin is None else margin
    m = np.broadcast_to(m.reshape(1, -1, *[1] * (raw.ndim - 2)), raw.shape)
    below, between = raw <= m, (raw > m) & (raw <= 0)
    residual = np.where(raw > 0, student - raw, 0.0)
    residual[between] = np.maximum(student - raw, 0)[between]
    residual[below] = np.maximum(student - m, 0)[below]
    return float((residual**2).sum()), 2 * residual


@pytest.mark.parametrize("with_margin", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradient_are_the_three_case_formula(shape: tuple[int, ...], kind: str, with_margin: bool) -> None:
    student, target, margin = make(shape, kind)
    total, gradient = three_cases(
        student.double().numpy(), numpy_target(target), margin.double().numpy() if with_margin else None
    )
    student.requires_grad_()
    loss = partial_l2(student, target, margin_C=margin if with_margin else None, weight=0.25, denominator=3)
    assert loss.dtype == torch.float32
    np.testing.assert_allclose(loss.item(), total * 0.25 / 3, rtol=2e-6, atol=1e-9)
    (-1.7 * loss).backward()
    assert student.grad is not None
    assert student.grad.stride() == student.stride()
    np.testing.assert_allclose(student.grad.numpy(), gradient * 0.25 / 3 * -1.7, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_16_bit_students_are_computed_in_fp32(dtype: torch.dtype, kind: str) -> None:
    student, target, margin = make((3, 8, 6, 6), kind)
    student = student.to(dtype).requires_grad_()
    total, gradient = three_cases(student.detach().double().numpy(), numpy_target(target), margin.double().numpy())
    loss = partial_l2(student, target, margin_C=margin)
    assert loss.dtype == torch.float32
    np.testing.assert_allclose(loss.item(), total / 3, rtol=2e-6)
    loss.backward()
    assert student.grad is not None
    assert student.grad.dtype == dtype
    np.testing.assert_allclose(student.grad.double().numpy(), gradient / 3, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("kind", ["f32", "u8", "u6", "u4"])
def test_gradcheck(kind: str) -> None:
    student, target, margin = make((2, 3, 4, 2), kind)
    wide = student.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: partial_l2(s, target, margin_C=margin, weight=0.3), (wide,))
    assert partial_l2(wide, target).dtype == torch.float64


def strided(x: Tensor) -> list[Tensor]:
    """The same values in other memory formats."""
    wider = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
    wider[..., ::2] = x
    return [
        x.contiguous(memory_format=torch.channels_last),
        wider[..., ::2],
        x.transpose(0, 1).contiguous().transpose(0, 1),
    ]


def value_and_gradient(student: Tensor, target: Target, margin: Tensor) -> tuple[Tensor, Tensor]:
    leaf = student.detach().requires_grad_()
    loss = partial_l2(leaf, target, margin_C=margin)
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def test_strides_and_codes_or_floats_give_the_same_bits() -> None:
    student, codes, margin = make((3, 5, 7, 9), "u8")
    assert isinstance(codes, Codes)
    expected = value_and_gradient(student, codes, margin)
    values = as_float(codes)
    views = torch.zeros(3, 7, 9, 10, dtype=torch.uint8)
    views[..., ::2] = codes.data
    targets: list[Target] = [values, *strided(values), Codes(views[..., ::2], codes.offset, codes.step, "u8")]
    for target in targets:
        for given_student in (student, *strided(student)):
            loss, gradient = value_and_gradient(given_student, target, margin)
            assert torch.equal(loss, expected[0])
            assert torch.equal(gradient, expected[1])


@pytest.mark.parametrize("elements", [1, 40, 100, 700])
def test_tiles_change_nothing_but_the_rounding_of_the_sum(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    student, codes, margin = make((5, 6, 9, 4), "u6")
    expected = value_and_gradient(student, codes, margin)
    monkeypatch.setattr(_layout, "TILE_ELEMENTS_PER_THREAD", elements)
    loss, gradient = value_and_gradient(student, codes, margin)
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=0)
    assert torch.equal(gradient, expected[1])


def test_scratch_memory_is_a_threads_own() -> None:
    """Tiles of several calls at once, of different sizes, give what each gives alone."""
    cases = [make((5, 6, height, 40), "u8", seed=height) for height in (9, 30, 3, 17)]
    alone = [value_and_gradient(*case) for case in cases]
    for _ in range(5):
        with ThreadPoolExecutor(len(cases)) as pool:
            together = list(pool.map(lambda case: value_and_gradient(*case), cases))
        for (loss, gradient), expected in zip(together, alone, strict=True):
            assert torch.equal(loss, expected[0])
            assert torch.equal(gradient, expected[1])


def test_inference_mode_and_another_default_device_leave_nothing_behind() -> None:
    """Memory kept from a call in either must serve the next one."""

    def fresh_thread() -> None:
        with torch.inference_mode(), torch.device("meta"):
            assert torch.equal(partial_l2(student, codes, margin_C=margin), expected[0])
        loss, gradient = value_and_gradient(student, codes, margin)
        assert torch.equal(loss, expected[0])
        assert torch.equal(gradient, expected[1])

    student, codes, margin = make((2, 3, 5, 7), "u8")
    expected = value_and_gradient(student, codes, margin)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(fresh_thread).result()


def test_tensors_that_only_stand_for_others_take_the_plain_formula() -> None:
    student, codes, margin = make((2, 3, 5, 7), "u8")
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(student)
        assert partial_l2(fake, torch.empty_like(fake)).shape == ()
    loss, _ = value_and_gradient(student, codes, margin)
    traced = make_fx(lambda s: partial_l2(s, codes, margin_C=margin))(student)
    torch.testing.assert_close(traced(student), loss)
    torch.testing.assert_close(traced(2 * student), partial_l2(2 * student, codes, margin_C=margin))


def test_zero_where_the_student_equals_the_clipped_teacher() -> None:
    _, teacher, margin = make((2, 4, 5, 5), "f32")
    assert isinstance(teacher, Tensor)
    clipped = torch.maximum(teacher, margin[:, None, None])
    loss, gradient = value_and_gradient(clipped, teacher, margin)
    assert loss == 0
    assert not gradient.any()
    # clipping a clipped target again changes nothing
    student, _, _ = make((2, 4, 5, 5), "f32", seed=1)
    assert torch.equal(partial_l2(student, teacher, margin_C=margin), partial_l2(student, clipped, margin_C=margin))


def test_no_gradient_where_both_are_silent_and_none_to_the_target() -> None:
    student = torch.tensor([[-2.0, -1.0, -0.5, 0.0, 0.5, -3.0]], requires_grad=True)
    target = torch.tensor([[-1.0, -1.0, -1.0, 0.0, 0.0, 2.0]], requires_grad=True)
    loss = partial_l2(student, target)
    loss.backward()
    assert student.grad is not None
    assert student.grad.tolist() == [[0.0, 0.0, 1.0, 0.0, 1.0, -10.0]]
    assert loss.item() == 0.25 + 0.25 + 25
    assert target.grad is None


def test_batch_weight_and_denominator() -> None:
    student, target, margin = make((3, 4, 5, 5), "f32")
    assert isinstance(target, Tensor)
    once = partial_l2(student, target, margin_C=margin)
    twice = partial_l2(student.repeat(2, 1, 1, 1), target.repeat(2, 1, 1, 1), margin_C=margin)
    torch.testing.assert_close(twice, once)
    torch.testing.assert_close(partial_l2(student, target, margin_C=margin, weight=4.0, denominator=6), 2 * once)


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_of_the_student_survives(kind: str) -> None:
    student, target, margin = make((2, 3, 4, 4), kind)
    quiet = as_float(target).double().argmin()  # where the teacher is most negative a mask could hide it
    student.view(-1)[quiet] = float("nan")
    loss, gradient = value_and_gradient(student, target, margin)
    assert loss.isnan()
    assert gradient.view(-1)[quiet].isnan()
    assert gradient.isnan().sum() == 1


def test_a_nan_of_the_target_survives() -> None:
    student, target, margin = make((2, 3, 4, 4), "f16")
    assert isinstance(target, Tensor)
    target[1, 2, 3, 0] = float("nan")
    assert partial_l2(student, target, margin_C=margin).isnan()
    assert partial_l2(student, target).isnan()


def test_empty_batch_is_zero_with_a_gradient() -> None:
    for shape in ((0, 3, 4, 4), (0, 3)):
        loss, gradient = value_and_gradient(torch.zeros(shape), torch.zeros(shape), -torch.ones(3))
        assert loss == 0
        assert gradient.shape == shape


def test_a_graph_may_be_walked_twice() -> None:
    student, target, margin = make((2, 3, 4, 4), "u8")
    for grad_output in (1.0, 0.3):
        leaf = student.detach().requires_grad_()
        loss = partial_l2(leaf, target, margin_C=margin)
        first, second = (torch.autograd.grad(loss * grad_output, leaf, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)
        first.mul_(2)  # what a caller does to its gradient stays with the caller
        assert torch.equal(torch.autograd.grad(loss * grad_output, leaf)[0], second)


def test_a_graph_may_be_walked_by_several_threads_at_once() -> None:
    student, target, margin = make((8, 16, 9, 9), "u8")
    for _ in range(20):
        leaf = student.detach().requires_grad_()
        loss = 0.3 * partial_l2(leaf, target, margin_C=margin)
        walk = partial(torch.autograd.grad, loss, leaf, retain_graph=True)
        with ThreadPoolExecutor(4) as pool:
            walks = [pool.submit(walk) for _ in range(4)]
        gradients = [each.result()[0] for each in walks]
        assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def test_small_fp16_gradients_survive_a_loss_scaler() -> None:
    student, target, margin = make((2, 3, 4, 4), "u8")
    half = student.half().requires_grad_()
    (partial_l2(half, target, margin_C=margin, weight=1e-9) * 2.0**16).backward()
    wide = student.half().float().requires_grad_()
    (partial_l2(wide, target, margin_C=margin, weight=1e-9) * 2.0**16).backward()
    assert half.grad is not None
    assert wide.grad is not None
    assert wide.grad.abs().max() > 1e-5
    torch.testing.assert_close(half.grad.float(), wide.grad, rtol=2e-3, atol=1e-7)


def test_second_derivatives_only_where_they_are_right() -> None:
    student, target, margin = make((2, 3, 4, 4), "u8")
    assert torch.autograd.gradgradcheck(
        lambda s: partial_l2(s, target, margin_C=margin), (student.double().requires_grad_(),)
    )
    student.requires_grad_()
    with pytest.raises(NotImplementedError, match=r"partial_l2.*float64"):
        torch.autograd.grad(partial_l2(student, target, margin_C=margin), student, create_graph=True)


def test_what_does_not_fit_is_refused() -> None:
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"\[2, 3, 4, 4\].*got \[2, 3, 4, 5\]"):
        partial_l2(x, torch.zeros(2, 3, 4, 5))
    with pytest.raises(ValueError, match=r"\[2, 3, 4, 4\].*got \[2, 4, 4, 4\]"):
        partial_l2(x, Codes(torch.zeros(2, 4, 4, 4, dtype=torch.uint8), torch.zeros(4), torch.ones(4), "u8"))
    with pytest.raises(ValueError, match=r"margin expected \[3\], got \[2\]"):
        partial_l2(x, x, margin_C=torch.zeros(2))
    with pytest.raises(ValueError, match="partial_l2"):
        partial_l2(x[0], x[0])


@pytest.mark.parametrize("kind", ["f32", "u8", "u6", "u4"])
def test_compiles_in_one_graph(kind: str) -> None:
    student, target, margin = make((2, 6, 4, 4), kind)
    expected = value_and_gradient(student, target, margin)
    compiled = torch.compile(partial_l2, fullgraph=True, backend="aot_eager")
    leaf = student.requires_grad_()
    loss = compiled(leaf, target, margin_C=margin)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected[0])
    torch.testing.assert_close(leaf.grad, expected[1])
