"""The Triton kernels of `partial_l2` at some positions of a map, in Triton's interpreter and on a GPU."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import assert_rounded, captured, orders, run
from positions_samples import make
from torch import Tensor

from feedfast_kernels import Codes, partial_l2
from feedfast_kernels._ops import OPS
from feedfast_kernels.partial_l2 import reference

# B, C, H, W, P: odd sizes, one past a tile of rows, one position, all of them
SHAPES = [
    (2, 16, 5, 7, 9),
    (3, 17, 4, 4, 5),
    (2, 160, 3, 3, 4),
    (1, 257, 1, 9, 9),
    (1, 1, 1, 1, 1),
    (2, 16, 12, 12, 129),
]
CODECS = ["u8", "u6", "u5", "u4", "float"]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(kernel_device: torch.device, shape: tuple[int, ...], codec: str) -> None:
    student, target, positions, margin = make(shape, codec, kernel_device)
    for options in ({"margin_C": margin, "weight": 0.3, "denominator": 7.0}, {}):
        for grad_output in (1.0, -1.7):
            expected, (gradient,) = run(
                lambda s, o=options: reference(s, target, positions=positions, **o), [student], grad_output
            )
            for number, given in enumerate(orders(student).values()):
                places = positions.long() if number else positions
                stored = target
                if isinstance(target, Tensor) and number:  # in memory [B, P, C]
                    stored = target.mT.contiguous().mT
                loss, (actual,) = run(
                    lambda s, t=stored, p=places, o=options: partial_l2(s, t, positions=p, **o), [given], grad_output
                )
                torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)
                torch.testing.assert_close(actual, gradient, rtol=1e-6, atol=0)
                assert actual.stride() == torch.empty_like(given).stride()


def test_several_tiles_a_program(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feedfast_kernels.gpu.partial_l2.FEW_TILES", 2)
    student, target, positions, margin = make((2, 32, 24, 24, 256), "u8", kernel_device)
    expected, (gradient,) = run(lambda s: reference(s, target, margin_C=margin, positions=positions), [student])
    for given in orders(student).values():
        loss, (actual,) = run(lambda s: partial_l2(s, target, margin_C=margin, positions=positions), [given])
        torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)
        torch.testing.assert_close(actual, gradient, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("codec", CODECS)
def test_16_bit_students(kernel_device: torch.device, dtype: torch.dtype, codec: str) -> None:
    student, target, positions, margin = make((3, 16, 6, 6, 10), codec, kernel_device)
    student = student.to(dtype)
    target = target.to(dtype) if isinstance(target, Tensor) else target
    exact, (gradient,) = run(
        lambda s: reference(s, target, margin_C=margin, positions=positions), [student.double()], 3.0
    )
    for given in orders(student).values():
        loss, (actual,) = run(lambda s: partial_l2(s, target, margin_C=margin, positions=positions), [given], 3.0)
        assert (loss.dtype, actual.dtype) == (torch.float32, dtype)
        torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=0)
        assert_rounded(actual, gradient)


def test_a_nan_counts_where_it_is_looked_at_and_nowhere_else(kernel_device: torch.device) -> None:
    student, target, positions, margin = make((1, 16, 4, 4, 5), "u8", kernel_device)
    chosen = set(positions[0].tolist())
    for place in (min(chosen), min(set(range(16)) - chosen)):
        wrong = student.clone()
        wrong[0, 3].view(-1)[place] = float("nan")
        loss, (gradient,) = run(lambda s: partial_l2(s, target, margin_C=margin, positions=positions), [wrong])
        assert bool(loss.isnan()) == (place in chosen)
        assert int(gradient.isnan().sum()) == (place in chosen)


def test_two_runs_are_bit_equal(kernel_device: torch.device) -> None:
    student, target, positions, margin = make((9, 48, 7, 7, 20), "u8", kernel_device)
    call = lambda s: partial_l2(s, target, margin_C=margin, positions=positions)  # noqa: E731
    first, second = (run(call, [student], 0.3) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1][0], second[1][0])


@pytest.mark.parametrize("codec", CODECS)
def test_compiles_in_one_graph(kernel_device: torch.device, codec: str) -> None:
    student, target, positions, margin = make((2, 16, 4, 4, 5), codec, kernel_device)
    expected, (gradient,) = run(lambda s: partial_l2(s, target, margin_C=margin, positions=positions), [student], -2.0)
    compiled = torch.compile(partial_l2, fullgraph=True, backend="aot_eager")
    loss, (actual,) = run(lambda s: compiled(s, target, margin_C=margin, positions=positions), [student], -2.0)
    assert torch.equal(loss, expected)
    assert torch.equal(actual, gradient)


def test_operators_keep_their_schema(kernel_device: torch.device) -> None:
    student, target, positions, margin = make((2, 16, 3, 3, 4), "u8", kernel_device)
    assert isinstance(target, Codes)
    grad_output = torch.ones((), device=kernel_device)
    for given in orders(student).values():
        arguments = (given, target.data, target.offset, target.step, "u8", margin, 0.5, positions)
        torch.library.opcheck(OPS.partial_l2, arguments)
        torch.library.opcheck(OPS.partial_l2_backward, (grad_output, *arguments))


def test_an_empty_batch_is_zero_with_a_gradient(kernel_device: torch.device) -> None:
    student = torch.zeros(0, 3, 4, 4, device=kernel_device)
    target = torch.zeros(0, 3, 5, device=kernel_device)
    positions = torch.zeros(0, 5, dtype=torch.int32, device=kernel_device)
    loss, (gradient,) = run(lambda s: partial_l2(s, target, positions=positions), [student])
    assert loss == 0
    assert gradient.shape == student.shape


@pytest.mark.gpu
def test_capture_replays_to_the_same_bits() -> None:
    device = torch.device("cuda")
    student, target, positions, margin = make((32, 64, 16, 16, 64), "u8", device)
    student = student.bfloat16().contiguous(memory_format=torch.channels_last)
    expected, (gradient,) = run(lambda s: partial_l2(s, target, margin_C=margin, positions=positions), [student])
    leaf = student.detach().requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        loss = partial_l2(leaf, target, margin_C=margin, positions=positions)
        return loss.detach(), *torch.autograd.grad(loss, [leaf])

    graph, (loss, actual) = captured(step)
    graph.replay()
    assert torch.equal(loss, expected)
    assert torch.equal(actual, gradient)
