"""OFD's margins against statistics: the truncated normal in closed form, and running means over batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import truncnorm

from feedfast.errors import RequestError
from feedfast.methods import RunningMargin, margin_from_bn


@pytest.mark.parametrize(("gamma", "beta"), [(1.0, 0.0), (0.5, 0.3), (2.0, -1.0), (0.3, 0.6), (-0.7, 0.2), (1.0, 3.0)])
def test_margin_is_the_mean_of_the_truncated_normal(gamma: float, beta: float) -> None:
    expected = truncnorm.mean(-np.inf, -beta / abs(gamma), loc=beta, scale=abs(gamma))
    margin = margin_from_bn(torch.tensor([gamma]), torch.tensor([beta]))
    assert margin.dtype == torch.float32
    np.testing.assert_allclose(margin.item(), expected, rtol=1e-5)


def test_margin_agrees_with_samples() -> None:
    gamma, beta = torch.tensor([1.0, 0.5, 2.0, 0.3]), torch.tensor([0.0, 0.3, -1.0, 0.6])
    x = torch.randn(100_000, 4, generator=torch.Generator().manual_seed(0)) * gamma + beta
    running = RunningMargin(4)
    running.update(x)
    torch.testing.assert_close(margin_from_bn(gamma, beta), running.value(), atol=0.015, rtol=0)


def test_margin_of_degenerate_channels() -> None:
    # beta / |gamma| = 4 is negative once in 30,000; gamma = 0 is a constant channel
    gamma = torch.tensor([0.5, -0.5, 0.0, 0.0, 0.0, 1e-30])
    beta = torch.tensor([2.0, 2.0, -1.5, 0.0, 1.0, -1e-3])
    margin = margin_from_bn(gamma, beta)
    torch.testing.assert_close(margin[:2], torch.tensor([-1.5, -1.5]))
    torch.testing.assert_close(margin[2:], torch.tensor([-1.5, 0.0, 0.0, -1e-3]), atol=1e-11, rtol=1e-6)
    assert (margin < 0).all()
    grid = torch.linspace(-6, 6, 241)
    assert (margin_from_bn(torch.ones(241), grid) < 0).all()


def test_running_margin_averages_batches() -> None:
    g = torch.Generator().manual_seed(0)
    batches = [
        torch.randn(3, 4, 5, 5, generator=g),
        torch.randn(2, 4, 5, 5, generator=g),
        torch.randn(2, 4, 5, 5, generator=g),
    ]
    batches[1][:, 2] = 1.0  # never negative in this batch
    running = RunningMargin(4)
    with pytest.raises(RequestError, match="at least one batch"):
        running.value()
    expected = np.zeros(4)
    for batch in batches:
        running.update(batch.contiguous(memory_format=torch.channels_last))
        for channel in range(4):
            values = batch[:, channel].double().numpy()
            expected[channel] += values[values < 0].sum() / ((values < 0).sum() + 1e-10) / 3
    np.testing.assert_allclose(running.value().numpy(), expected, rtol=1e-6)
