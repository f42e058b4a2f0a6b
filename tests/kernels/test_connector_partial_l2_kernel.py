"""The Triton kernels of `connector_partial_l2` against PyTorch's batch norm, in Triton's interpreter and on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from code_samples import STEP
from connector_samples import make
from kernel_checks import assert_rounded, captured, orders, run
from torch import Tensor

from feedfast_kernels import Codes, Target, connector_partial_l2
from feedfast_kernels._ops import OPS
from feedfast_kernels.connector_partial_l2 import reference

SHAPES = [
    (2, 16, 5, 7),
    (3, 17, 4, 4),
    (2, 160, 3, 3),
    (1, 129, 1, 9),
    (2, 1, 1, 2),
    (2, 24, 7, 7),
    (50, 10),
    (33, 64),
]
KINDS = [*STEP, "f32"]


def everything(
    loss_of: Callable[..., Tensor],
    y: Tensor,
    target: Target,
    gamma: Tensor,
    beta: Tensor,
    grad_output: float = 1.0,
    **options: object,
) -> list[Tensor]:
    """Loss, gradients of y, gamma and beta, running mean and variance."""
    running = [torch.zeros_like(gamma), torch.ones_like(gamma)]
    loss, gradients = run(lambda *p: loss_of(p[0], target, *p[1:], *running, **options), [y, gamma, beta], grad_output)
    return [loss, *gradients, *running]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        # a batch norm's gradient is a difference of larger numbers: errors are of the size of the largest
        rtol, atol = (1e-5, 0.0) if index == 0 else (1e-4, 3e-5 * float(e.double().abs().max()))
        torch.testing.assert_close(a.double(), e.double(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_batch_norm_and_reference(kernel_device: torch.device, shape: tuple[int, ...], kind: str) -> None:
    y, target, gamma, beta, margin = make(shape, kind, device=kernel_device)
    with_margin = shape[0] != 3
    options = {"margin_C": margin if with_margin else None, "weight": 0.3, "denominator": 7.0, "momentum": 0.2}
    expected = everything(reference, y.double(), target, gamma.double(), beta.double(), -1.7, **options)
    stored = list(orders(target).values()) if isinstance(target, Tensor) else [target]
    for index, given in enumerate(orders(y).values()):
        # every order of the map meets another order of the target
        actual = everything(
            connector_partial_l2, given, stored[(index + 1) % len(stored)], gamma, beta, -1.7, **options
        )
        assert_same(actual, expected)
        assert actual[1].stride() == torch.empty_like(given).stride()


@pytest.mark.parametrize("programs", [1, 3, 12])
def test_any_split_over_programs(kernel_device: torch.device, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feedfast_kernels.gpu.connector_partial_l2.PROGRAMS", programs)
    monkeypatch.setattr("feedfast_kernels.gpu.connector_partial_l2.MERGE_ROWS", 4)
    for shape in ((11, 16, 7, 7), (3, 32, 9, 9)):  # tiles that do not fill the last program
        y, target, gamma, beta, margin = make(shape, "u8", device=kernel_device)
        expected = everything(reference, y.double(), target, gamma.double(), beta.double(), margin_C=margin)
        for given in orders(y).values():
            assert_same(everything(connector_partial_l2, given, target, gamma, beta, margin_C=margin), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_16_bit_maps(kernel_device: torch.device, dtype: torch.dtype, kind: str) -> None:
    y, target, gamma, beta, margin = make((3, 16, 6, 6), kind, device=kernel_device)
    small = y.to(dtype)
    exact = everything(reference, small.double(), target, gamma.double(), beta.double(), margin_C=margin)
    for given in orders(small).values():
        actual = everything(connector_partial_l2, given, target, gamma, beta, margin_C=margin)
        assert [x.dtype for x in actual] == [torch.float32, dtype, *[torch.float32] * 4]
        assert_same([actual[0], *actual[2:]], [exact[0], *exact[2:]])
        large = exact[1].abs() > exact[1].abs().max() / 100  # where fp32 has digits left after the differences
        assert_rounded(actual[1][large], exact[1][large])


def test_variance_survives_a_mean_far_away(kernel_device: torch.device) -> None:
    y, target, gamma, beta, _ = make((8, 16, 8, 8), "u8", device=kernel_device)
    far = y + 3000
    expected = everything(reference, far.double(), target, gamma.double(), beta.double())
    actual = everything(connector_partial_l2, far.contiguous(memory_format=torch.channels_last), target, gamma, beta)
    torch.testing.assert_close(actual[0].double(), expected[0].double(), rtol=1e-3, atol=0)
    torch.testing.assert_close(actual[5].double(), expected[5].double(), rtol=1e-4, atol=0)


def test_a_constant_channel_has_no_variance(kernel_device: torch.device) -> None:
    y, target, gamma, beta, _ = make((4, 16, 4, 4), "u8", device=kernel_device)
    y[:, 3] = 1.1
    assert_same(
        everything(connector_partial_l2, y, target, gamma, beta),
        everything(reference, y.double(), target, gamma.double(), beta.double()),
    )


def test_nan_survives_and_stays_in_its_channel(kernel_device: torch.device) -> None:
    y, target, gamma, beta, margin = make((2, 16, 3, 3), "u8", device=kernel_device)
    y[1, 2, 0, 0] = float("nan")
    loss, gradient, _, _, mean, variance = everything(connector_partial_l2, y, target, gamma, beta, margin_C=margin)
    assert loss.isnan()
    assert gradient[:, 2].isnan().all()
    assert not gradient[:, 3:].isnan().any()
    assert mean.isnan().nonzero().flatten().tolist() == variance.isnan().nonzero().flatten().tolist() == [2]


def test_second_derivatives_are_refused(kernel_device: torch.device) -> None:
    y, target, gamma, beta, _ = make((2, 16, 3, 3), "u8", device=kernel_device)
    y.requires_grad_()
    with pytest.raises(NotImplementedError, match=r"connector_partial_l2.*float64"):
        torch.autograd.grad(connector_partial_l2(y, target, gamma, beta), y, create_graph=True)


def test_strided_vectors(kernel_device: torch.device) -> None:
    y, target, gamma, beta, margin = make((2, 16, 3, 3), "u8", device=kernel_device)
    strided = [torch.stack([x, x + 1], -1).flatten()[::2] for x in (gamma, beta, margin)]
    assert torch.equal(
        connector_partial_l2(y, target, *strided[:2], margin_C=strided[2]),
        connector_partial_l2(y, target, gamma, beta, margin_C=margin),
    )


def test_empty_batch(kernel_device: torch.device) -> None:
    y, target, gamma, beta, _ = make((0, 16, 3, 3), "f32", device=kernel_device)
    loss, gradient, d_gamma, d_beta, mean, variance = everything(connector_partial_l2, y, target, gamma, beta)
    assert loss == 0
    assert gradient.shape == y.shape
    assert not d_gamma.any()
    assert not d_beta.any()
    assert not mean.any()
    assert variance.eq(1).all()


def test_two_runs_are_bit_equal(kernel_device: torch.device) -> None:
    y, target, gamma, beta, margin = make((9, 48, 7, 7), "u8", device=kernel_device)
    first, second = (everything(connector_partial_l2, y, target, gamma, beta, margin_C=margin) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_in_one_graph(kernel_device: torch.device, kind: str) -> None:
    y, target, gamma, beta, margin = make((2, 16, 4, 4), kind, device=kernel_device)
    expected = everything(connector_partial_l2, y, target, gamma, beta, -2.0, margin_C=margin)
    compiled = torch.compile(connector_partial_l2, fullgraph=True, backend="aot_eager")
    actual = everything(compiled, y, target, gamma, beta, -2.0, margin_C=margin)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_operators_keep_their_schema(kernel_device: torch.device) -> None:
    y, target, gamma, beta, margin = make((2, 16, 3, 3), "u8", device=kernel_device)
    assert isinstance(target, Codes)
    grad_output = torch.ones((), device=kernel_device)
    for given in orders(y).values():
        inputs = (given, target.data, target.offset, target.step, "u8", margin, gamma, beta)
        _, statistics, sums = OPS.connector_partial_l2(*inputs, 1e-5, 0.5)
        torch.library.opcheck(OPS.connector_partial_l2, (*inputs, 1e-5, 0.5))
        torch.library.opcheck(OPS.connector_partial_l2_backward, (grad_output, *inputs, 0.5, statistics, sums))


@pytest.mark.gpu
def test_an_ofd_loss_of_four_taps_is_captured_in_one_graph() -> None:
    device = torch.device("cuda")
    taps = [make((8, channels, side, side), "u8", device=device) for channels, side in ((64, 28), (128, 14), (256, 7))]
    leaves = [
        [x.detach().requires_grad_() for x in (y.bfloat16().contiguous(memory_format=torch.channels_last), gamma, beta)]
        for y, _, gamma, beta, _ in taps
    ]

    def step() -> tuple[Tensor, ...]:
        losses = [
            connector_partial_l2(*parameters[:1], tap[1], *parameters[1:], margin_C=tap[4], weight=0.5**index)
            for index, (tap, parameters) in enumerate(zip(taps, leaves, strict=True))
        ]
        total = torch.stack(losses).sum()
        return total.detach(), *torch.autograd.grad(total, [x for parameters in leaves for x in parameters])

    expected = [x.clone() for x in step()]
    graph, results = captured(step)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
