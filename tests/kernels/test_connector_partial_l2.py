"""Batch norm and partial L2 in one loss: the tiled form against PyTorch's batch norm, and both against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from code_samples import STEP
from connector_samples import make
from kernel_checks import orders, run
from torch import Tensor, nn

from feedfast_kernels import Target, as_float, connector_partial_l2, partial_l2
from feedfast_kernels.connector_partial_l2 import reference

SHAPES = [(2, 3, 5, 7), (4, 32, 8, 8), (3, 17, 1, 31), (2, 1, 1, 1), (50, 10), (2, 129)]
KINDS = ["f32", *STEP]


def in_float64(
    y: Tensor, target: Target, gamma: Tensor, beta: Tensor, margin: Tensor | None, eps: float
) -> tuple[float, list[np.ndarray]]:
    """Loss and the gradients of y, gamma and beta, from the formulas in NumPy."""
    axes = (0, *range(2, y.ndim))
    shape = (1, -1, *[1] * (y.ndim - 2))
    x, t = y.double().numpy(), as_float(target).double().numpy()
    g, b = gamma.double().numpy().reshape(shape), beta.double().numpy().reshape(shape)
    if margin is not None:
        t = np.maximum(t, margin.double().numpy().reshape(shape))
    deviation = np.sqrt(x.var(axes, keepdims=True) + eps)
    normal = (x - x.mean(axes, keepdims=True)) / deviation
    s = g * normal + b
    d = np.where((s <= t) & (t <= 0), 0, s - t)
    ds = 2 * d
    dy = g / deviation * (ds - ds.mean(axes, keepdims=True) - normal * (ds * normal).mean(axes, keepdims=True))
    return float((d**2).sum()), [dy, (ds * normal).sum(axes), ds.sum(axes)]


@pytest.mark.parametrize("with_margin", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients_are_the_formulas(shape: tuple[int, ...], kind: str, with_margin: bool) -> None:
    y, target, gamma, beta, margin = make(shape, kind)
    options = {"margin_C": margin if with_margin else None, "weight": 0.5, "denominator": 3.0}
    total, expected = in_float64(y, target, gamma, beta, options["margin_C"], 1e-5)  # type: ignore[arg-type]
    for loss_of in (connector_partial_l2, reference):
        loss, gradients = run(
            lambda *leaves: loss_of(leaves[0], target, *leaves[1:], **options), [y, gamma, beta], -1.5
        )
        np.testing.assert_allclose(loss.item(), total * 0.5 / 3, rtol=1e-5)
        for actual, exact in zip(gradients, expected, strict=True):
            scale = max(np.abs(exact).max(), 1.0)
            np.testing.assert_allclose(actual.numpy(), exact * 0.5 / 3 * -1.5, rtol=1e-3, atol=1e-5 * scale)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    y, target, gamma, beta, margin = make((3, 2, 4, 2), kind)
    leaves = [x.double().requires_grad_() for x in (y, gamma, beta)]
    assert torch.autograd.gradcheck(
        lambda y, g, b: connector_partial_l2(y, target, g, b, margin_C=margin, weight=0.3), leaves
    )


def test_running_statistics_move_as_batch_norms_do() -> None:
    y, target, gamma, beta, _ = make((5, 6, 3, 3), "u8")
    batch_norm = nn.BatchNorm2d(6, momentum=0.3, eps=1e-3)
    mean, variance = torch.zeros(6), torch.ones(6)
    for step in range(3):
        x = y * (step + 1)
        expected = partial_l2(batch_norm(x), target)
        actual = connector_partial_l2(x, target, torch.ones(6), torch.zeros(6), mean, variance, momentum=0.3, eps=1e-3)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(mean, batch_norm.running_mean)
    torch.testing.assert_close(variance, batch_norm.running_var)
    with_none = connector_partial_l2(y, target, gamma, beta)
    torch.testing.assert_close(with_none, connector_partial_l2(y, target, gamma, beta, mean.clone(), variance.clone()))


def test_variance_survives_a_mean_far_away() -> None:
    y, target, gamma, beta, _ = make((8, 4, 16, 16), "u8")
    far = (y.double() + 3000).float()  # sums of squares in fp32 would leave no digit of a variance near 1
    total, _ = in_float64(far, target, gamma, beta, None, 1e-5)
    assert connector_partial_l2(far, target, gamma, beta).item() == pytest.approx(total / 8, rel=1e-3)


def test_strides_do_not_matter() -> None:
    y, target, gamma, beta, margin = make((3, 6, 5, 4), "u8")
    expected, gradients = run(lambda *p: connector_partial_l2(p[0], target, *p[1:], margin_C=margin), [y, gamma, beta])
    for given in orders(y).values():
        loss, actual = run(lambda *p: connector_partial_l2(p[0], target, *p[1:], margin_C=margin), [given, gamma, beta])
        assert torch.equal(loss, expected)
        assert all(torch.equal(a, b) for a, b in zip(actual, gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_maps_are_computed_in_fp32(dtype: torch.dtype) -> None:
    y, target, gamma, beta, margin = make((4, 8, 6, 6), "u8")
    small = y.to(dtype)
    total, expected = in_float64(small.float(), target, gamma, beta, margin, 1e-5)
    loss, gradients = run(lambda *p: connector_partial_l2(p[0], target, *p[1:], margin_C=margin), [small, gamma, beta])
    assert [loss.dtype, *(g.dtype for g in gradients)] == [torch.float32, dtype, torch.float32, torch.float32]
    assert loss.item() == pytest.approx(total / 4, rel=1e-5)
    largest = np.abs(expected[0]).max() / 4
    np.testing.assert_allclose(
        gradients[0].double().numpy(), expected[0] / 4, rtol=torch.finfo(dtype).eps, atol=1e-5 * largest
    )


def test_nan_survives_and_stays_in_its_channel() -> None:
    y, target, gamma, beta, margin = make((2, 4, 3, 3), "u8")
    y[1, 2, 0, 0] = float("nan")
    mean, variance = torch.zeros(4), torch.ones(4)
    loss, (gradient, *_) = run(
        lambda *p: connector_partial_l2(p[0], target, *p[1:], mean, variance, margin_C=margin), [y, gamma, beta]
    )
    assert loss.isnan()
    assert gradient[:, 2].isnan().all()
    assert mean.isnan().tolist() == variance.isnan().tolist() == [False, False, True, False]


def test_empty_batch_is_zero_and_leaves_the_statistics_alone() -> None:
    for shape in ((0, 3, 4, 4), (0, 3)):
        mean, variance = torch.full((3,), 0.25), torch.full((3,), 2.0)
        loss, gradients = run(
            lambda *p: connector_partial_l2(p[0], torch.zeros(shape), *p[1:], mean, variance),
            [torch.zeros(shape), torch.ones(3), torch.zeros(3)],
        )
        assert loss == 0
        assert [list(g.shape) for g in gradients] == [list(shape), [3], [3]]
        assert mean.tolist() == [0.25] * 3
        assert variance.tolist() == [2.0] * 3


def test_what_does_not_fit_is_refused() -> None:
    y, one = torch.zeros(2, 3, 4, 4), torch.ones(3)
    with pytest.raises(ValueError, match=r"\[2, 3, 4, 4\].*got \[2, 3, 4, 5\]"):
        connector_partial_l2(y, torch.zeros(2, 3, 4, 5), one, one)
    with pytest.raises(ValueError, match=r"gamma expected \[3\], got \[2\]"):
        connector_partial_l2(y, y, torch.ones(2), one)
    with pytest.raises(ValueError, match=r"margin expected \[3\], got \[2\]"):
        connector_partial_l2(y, y, one, one, margin_C=torch.ones(2))
    with pytest.raises(ValueError, match=r"more than one value per channel.*\[1, 3, 1, 1\]"):
        connector_partial_l2(y[:1, :, :1, :1], y[:1, :, :1, :1], one, one)


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_in_one_graph(kind: str) -> None:
    y, target, gamma, beta, margin = make((3, 6, 4, 4), kind)
    mean, variance = torch.zeros(6), torch.ones(6)
    compiled = torch.compile(connector_partial_l2, fullgraph=True, backend="aot_eager")
    results = []
    for loss_of in (connector_partial_l2, compiled):
        running = [mean.clone(), variance.clone()]
        results.append(
            (*run(lambda *p: loss_of(p[0], target, *p[1:], *running, margin_C=margin), [y, gamma, beta]), running)
        )
    (loss, gradients, running), (again, same, also) = results
    torch.testing.assert_close(again, loss)
    for actual, expected in zip([*same, *also], [*gradients, *running], strict=True):
        torch.testing.assert_close(actual, expected)
