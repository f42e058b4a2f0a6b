"""The Triton kernels of `partial_l2` against the PyTorch reference, in Triton's interpreter and on a GPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from code_samples import STEP
from kernel_checks import assert_rounded, captured, orders, run
from torch import Tensor

from feedfast_kernels import Codes, Target, as_float, encode, partial_l2
from feedfast_kernels._ops import OPS
from feedfast_kernels.codes import is_quantized
from feedfast_kernels.partial_l2 import reference

# odd and prime sizes, one past a block of channels and of rows, one element, vectors, widths that are no power of two
SHAPES = [(2, 16, 5, 7), (3, 17, 4, 4), (2, 160, 3, 3), (1, 257, 1, 9), (1, 1, 1, 1), (2, 24, 7, 7), (5, 10), (129, 16)]
CODECS = [*STEP, "float"]


def make(shape: tuple[int, ...], codec: str, device: torch.device, seed: int = 0) -> tuple[Tensor, Target, Tensor]:
    """A student map, a target of the codec, a margin; about a third of the elements is silent."""
    generator = torch.Generator().manual_seed(seed)
    channels = shape[1]
    student, teacher = (torch.randn(shape, generator=generator) for _ in range(2))
    margin = -0.2 - torch.rand(channels, generator=generator)
    target: Target = teacher.to(device)
    if is_quantized(codec):
        offset = -2 - torch.rand(channels, generator=generator)
        step = torch.full((channels,), STEP[codec])
        target = Codes(encode(teacher, offset, step, codec=codec)[0], offset, step, codec).to(device)
    return student.to(device), target, margin.to(device)


@pytest.mark.parametrize("with_margin", [True, False])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(
    kernel_device: torch.device, shape: tuple[int, ...], codec: str, with_margin: bool
) -> None:
    student, target, margin = make(shape, codec, kernel_device)
    options = {"margin_C": margin if with_margin else None, "weight": 0.3, "denominator": 7.0}
    for grad_output in (1.0, -1.7):
        expected, (gradient,) = run(lambda s: reference(s, target, **options), [student], grad_output)
        for given in orders(student).values():
            for stored in orders(target).values() if isinstance(target, Tensor) else (target,):
                loss, (actual,) = run(partial(partial_l2, target=stored, **options), [given], grad_output)
                torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)
                torch.testing.assert_close(actual, gradient, rtol=1e-6, atol=0)
                assert actual.stride() == torch.empty_like(given).stride()


@pytest.mark.parametrize("codec", ["u8", "float"])
def test_rows_one_past_what_a_program_takes(kernel_device: torch.device, codec: str) -> None:
    for batch in (127, 128, 129):  # a tile of 16 channels is 128 rows
        student, target, margin = make((batch, 16), codec, kernel_device)
        expected, (gradient,) = run(lambda s: reference(s, target, margin_C=margin), [student])
        loss, (actual,) = run(lambda s: partial_l2(s, target, margin_C=margin), [student])
        torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)
        torch.testing.assert_close(actual, gradient, rtol=1e-6, atol=0)


def test_several_tiles_a_program(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feedfast_kernels.gpu.partial_l2.FEW_TILES", 2)
    for shape in ((5, 32, 9, 9), (2, 8, 16, 16)):
        student, target, margin = make(shape, "u8", kernel_device)
        expected, (gradient,) = run(lambda s: reference(s, target, margin_C=margin), [student])
        for given in orders(student).values():
            loss, (actual,) = run(lambda s: partial_l2(s, target, margin_C=margin), [given])
            torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)
            torch.testing.assert_close(actual, gradient, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("codec", CODECS)
def test_16_bit_students(kernel_device: torch.device, dtype: torch.dtype, codec: str) -> None:
    student, target, margin = make((3, 16, 6, 6), codec, kernel_device)
    student = student.to(dtype)
    target = target.to(dtype) if isinstance(target, Tensor) else target
    exact, (gradient,) = run(lambda s: reference(s, target, margin_C=margin), [student.double()], 3.0)
    for given in orders(student).values():
        loss, (actual,) = run(lambda s: partial_l2(s, target, margin_C=margin), [given], 3.0)
        assert (loss.dtype, actual.dtype) == (torch.float32, dtype)
        torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=0)
        assert_rounded(actual, gradient)


@pytest.mark.parametrize("codec", CODECS)
def test_a_nan_of_the_student_survives_where_the_teacher_is_silent(kernel_device: torch.device, codec: str) -> None:
    student, target, margin = make((2, 16, 4, 4), codec, kernel_device)
    quiet = as_float(target).contiguous().view(-1).argmin()
    student.view(-1)[quiet] = float("nan")
    loss, (gradient,) = run(lambda s: partial_l2(s, target, margin_C=margin), [student])
    assert loss.isnan()
    assert gradient.isnan().nonzero().shape[0] == 1
    assert gradient.view(-1)[quiet].isnan()


@pytest.mark.parametrize("with_margin", [True, False])
def test_a_nan_of_the_target_survives(kernel_device: torch.device, with_margin: bool) -> None:
    student, target, margin = make((2, 16, 4, 4), "float", kernel_device)
    assert isinstance(target, Tensor)
    target[1, 3, 2, 0] = float("nan")
    loss, (gradient,) = run(lambda s: partial_l2(s, target, margin_C=margin if with_margin else None), [student])
    assert loss.isnan()
    assert gradient[1, 3, 2, 0].isnan()


def test_ties_and_silence_give_exactly_zero(kernel_device: torch.device) -> None:
    student = torch.tensor([[-2.0, -1.0, -0.5, 0.0, 0.5, -3.0]], device=kernel_device)
    target = torch.tensor([[-1.0, -1.0, -1.0, 0.0, 0.0, 2.0]], device=kernel_device)
    loss, (gradient,) = run(lambda s: partial_l2(s, target), [student])
    assert gradient.tolist() == [[0.0, 0.0, 1.0, 0.0, 1.0, -10.0]]
    assert loss.item() == 0.25 + 0.25 + 25


def test_empty_batch_is_zero_with_a_gradient(kernel_device: torch.device) -> None:
    for shape in ((0, 16, 4, 4), (0, 3)):
        student, target, margin = make(shape, "float", kernel_device)
        loss, (gradient,) = run(lambda s: partial_l2(s, target, margin_C=margin), [student])
        assert loss == 0
        assert gradient.shape == shape


def test_two_runs_are_bit_equal(kernel_device: torch.device) -> None:
    student, target, margin = make((9, 48, 7, 7), "u8", kernel_device)
    first, second = (run(lambda s: partial_l2(s, target, margin_C=margin), [student], 0.3) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1][0], second[1][0])


@pytest.mark.parametrize("codec", CODECS)
def test_compiles_in_one_graph(kernel_device: torch.device, codec: str) -> None:
    student, target, margin = make((2, 16, 4, 4), codec, kernel_device)
    expected, (gradient,) = run(lambda s: partial_l2(s, target, margin_C=margin), [student], -2.0)
    compiled = torch.compile(partial_l2, fullgraph=True, backend="aot_eager")
    loss, (actual,) = run(lambda s: compiled(s, target, margin_C=margin), [student], -2.0)
    assert torch.equal(loss, expected)
    assert torch.equal(actual, gradient)


def test_operators_keep_their_schema(kernel_device: torch.device) -> None:
    student, target, margin = make((2, 16, 3, 3), "u8", kernel_device)
    assert isinstance(target, Codes)
    grad_output = torch.ones((), device=kernel_device)
    for given in orders(student).values():
        arguments = (given, target.data, target.offset, target.step, "u8", margin, 0.5)
        torch.library.opcheck(OPS.partial_l2, arguments)
        torch.library.opcheck(OPS.partial_l2_backward, (grad_output, *arguments))


def test_under_autocast(kernel_device: torch.device) -> None:
    student, target, margin = make((2, 16, 4, 4), "u8", kernel_device)
    expected, (gradient,) = run(lambda s: partial_l2(s, target, margin_C=margin), [student])
    with torch.autocast(kernel_device.type, dtype=torch.bfloat16):
        loss, (actual,) = run(lambda s: partial_l2(s, target, margin_C=margin), [student])
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert torch.equal(actual, gradient)


def test_second_derivatives_are_refused(kernel_device: torch.device) -> None:
    student, target, margin = make((2, 16, 3, 3), "u8", kernel_device)
    student.requires_grad_()
    with pytest.raises(NotImplementedError, match=r"partial_l2.*float64"):
        torch.autograd.grad(partial_l2(student, target, margin_C=margin), student, create_graph=True)


def test_strided_vectors_and_codes(kernel_device: torch.device) -> None:
    student, target, margin = make((2, 16, 3, 3), "u8", kernel_device)
    assert isinstance(target, Codes)
    every_other = [torch.stack([x, x + 1], -1).flatten()[::2] for x in (target.offset, target.step, margin)]
    codes = torch.zeros(2, 3, 3, 32, dtype=torch.uint8, device=kernel_device)
    codes[..., ::2] = target.data
    strided = Codes(codes[..., ::2], *every_other[:2], "u8")
    assert not any(x.is_contiguous() for x in (strided.data, strided.offset, every_other[2]))
    expected, (gradient,) = run(lambda s: partial_l2(s, target, margin_C=margin), [student])
    loss, (actual,) = run(lambda s: partial_l2(s, strided, margin_C=every_other[2]), [student])
    assert torch.equal(loss, expected)
    assert torch.equal(actual, gradient)


@pytest.mark.gpu
def test_capture_replays_to_the_same_bits() -> None:
    device = torch.device("cuda")
    student, target, margin = make((32, 64, 16, 16), "u8", device)
    student = student.bfloat16().contiguous(memory_format=torch.channels_last)
    expected, (gradient,) = run(lambda s: partial_l2(s, target, margin_C=margin), [student])
    leaf = student.detach().requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        loss = partial_l2(leaf, target, margin_C=margin)
        return loss.detach(), *torch.autograd.grad(loss, [leaf])

    graph, (loss, actual) = captured(step)
    graph.replay()
    assert torch.equal(loss, expected)
    assert torch.equal(actual, gradient)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements() -> None:
    device = torch.device("cuda")
    rows, channels = (1 << 24) + 3, 144  # 2.4 G elements: 4.8 GB of bf16, twice with the gradient
    student = torch.zeros(rows, channels, dtype=torch.bfloat16, device=device)
    codes = torch.zeros(rows, channels, dtype=torch.uint8, device=device)
    student[-1], codes[-1] = 2.0, 1
    target = Codes(codes, torch.zeros(channels, device=device), torch.ones(channels, device=device), "u8")
    loss, (gradient,) = run(lambda s: partial_l2(s, target, denominator=1.0), [student])
    assert loss.item() == channels
    assert gradient[-1].tolist() == [2.0] * channels
    assert gradient[:-1].count_nonzero() == 0


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
def test_runs_on_the_tensors_device() -> None:
    with torch.cuda.device(0):
        student, target, margin = make((2, 16, 4, 4), "u8", torch.device("cuda:1"))
        expected, _ = run(lambda s: reference(s, target, margin_C=margin), [student])
        loss, _ = run(lambda s: partial_l2(s, target, margin_C=margin), [student])
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)
