"""Targets at some positions: what is gathered, its gradient, and the partial distance there, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from positions_samples import gathered_numpy, make, three_cases
from torch import Tensor

from feedfast_kernels import Codes, Sampled, as_float, decode, gather_positions, partial_l2

SHAPES = [(2, 3, 5, 7, 9), (1, 1, 1, 1, 1), (4, 32, 8, 8, 16), (3, 17, 1, 31, 4), (2, 5, 3, 3, 9)]
FORMATS = [torch.channels_last, torch.contiguous_format]


def formats(x: Tensor) -> list[Tensor]:
    """The same map in three memory formats."""
    wide = torch.zeros(*x.shape[:3], 2 * x.shape[3], dtype=x.dtype)
    wide[..., ::2] = x
    return [*(x.contiguous(memory_format=form) for form in FORMATS), wide[..., ::2]]


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_gathered_and_where_its_gradient_goes(shape: tuple[int, ...], kind: torch.dtype) -> None:
    student, _, positions, _ = make(shape, "f32")
    batch, channels, height, width, count = shape
    sent = torch.randn(batch, channels, count)
    for given in formats(student):
        leaf = given.detach().requires_grad_()
        found = gather_positions(leaf, positions.to(kind))
        assert found.mT.is_contiguous()
        np.testing.assert_array_equal(found.detach().numpy(), gathered_numpy(student.numpy(), positions.numpy()))
        found.backward(sent)
        expected = np.zeros((batch, channels, height * width), np.float32)
        for b in range(batch):
            expected[b][:, positions[b].numpy()] = sent[b].numpy()
        assert leaf.grad is not None
        np.testing.assert_array_equal(leaf.grad.numpy().reshape(expected.shape), expected)


@pytest.mark.parametrize("form", FORMATS)
def test_gradcheck_of_the_gather(form: torch.memory_format) -> None:
    student, _, positions, _ = make((2, 3, 4, 5, 6), "f32")
    wide = student.double().contiguous(memory_format=form).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gather_positions(x, positions) ** 2, (wide,))
    assert torch.autograd.gradgradcheck(lambda x: gather_positions(x, positions) ** 2, (wide,))


@pytest.mark.parametrize("kind", ["f32", "f16", "u8", "u6", "u4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_distance_is_the_three_case_formula_at_the_positions(shape: tuple[int, ...], kind: str) -> None:
    student, target, positions, margin = make(shape, kind)
    raw = (decode(target, torch.float64) if isinstance(target, Codes) else target.double()).numpy()
    picked = gathered_numpy(student.double().numpy(), positions.numpy())
    total, at = three_cases(picked, raw, margin.double().numpy())
    expected = np.zeros(student.shape).reshape(*student.shape[:2], -1)
    for b in range(shape[0]):
        expected[b][:, positions[b].numpy()] = at[b]
    for given in formats(student):
        leaf = given.detach().requires_grad_()
        loss = partial_l2(leaf, target, margin_C=margin, weight=0.25, denominator=3, positions=positions)
        np.testing.assert_allclose(loss.item(), total * 0.25 / 3, rtol=2e-6, atol=1e-9)
        (-1.7 * loss).backward()
        assert leaf.grad is not None
        found = leaf.grad.numpy().reshape(expected.shape)
        np.testing.assert_allclose(found, expected * 0.25 / 3 * -1.7, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["f32", "u8", "u6", "u4"])
def test_gradcheck_of_the_distance(kind: str) -> None:
    student, target, positions, margin = make((2, 3, 4, 2, 5), kind)
    wide = student.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: partial_l2(s, target, margin_C=margin, weight=0.3, positions=positions), (wide,)
    )


def test_all_positions_are_the_whole_map() -> None:
    student, target, _, margin = make((3, 4, 5, 6, 30), "u8")
    assert isinstance(target, Codes)
    everywhere = torch.arange(30).expand(3, -1)
    whole = Codes(target.data.view(3, 5, 6, 4), target.offset, target.step, "u8")
    torch.testing.assert_close(
        partial_l2(student, target, margin_C=margin, positions=everywhere),
        partial_l2(student, whole, margin_C=margin),
        rtol=1e-6,
        atol=0,
    )


@pytest.mark.parametrize("kind", ["f32", "u8"])
def test_compiles_in_one_graph(kind: str) -> None:
    student, target, positions, margin = make((2, 6, 4, 4, 5), kind)
    compiled = torch.compile(partial_l2, fullgraph=True, backend="aot_eager")
    losses, gradients = [], []
    for call in (partial_l2, compiled):
        leaf = student.detach().requires_grad_()
        loss = call(leaf, target, margin_C=margin, positions=positions)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(leaf.grad)
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_sampled_targets_move_and_gather() -> None:
    student, target, positions, _ = make((2, 3, 4, 5, 6), "u8")
    sampled = Sampled(target, positions, (4, 5)).to("cpu")
    assert sampled.shape == (2, 3, 6)
    assert sampled.rescale == 20 / 6
    assert torch.equal(sampled.gather(student), gather_positions(student, positions))
    with pytest.raises(ValueError, match=r"map of \[4, 5\], got \[5, 4\]"):
        sampled.gather(torch.zeros(2, 3, 5, 4))
    with pytest.raises(ValueError, match=r"values \[B, C, P\]"):
        Sampled(target, positions[:, :5], (4, 5))
    with pytest.raises(ValueError, match="positions"):
        Sampled(as_float(target).flatten(1), positions, (4, 5))


def test_what_does_not_fit_is_refused() -> None:
    student, target, positions, _ = make((2, 3, 4, 5, 6), "u8")
    with pytest.raises(ValueError, match=r"target \[2, 3, 5\], got \[2, 3, 6\]"):
        partial_l2(student, target, positions=positions[:, :5])
    for wrong in (positions.float(), positions[:1], positions[0]):
        with pytest.raises(ValueError, match="int32 or int64 positions"):
            partial_l2(student, target, positions=wrong)
        with pytest.raises(ValueError, match="int32 or int64 positions"):
            gather_positions(student, wrong)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("wrong", [-1, 20, 39])
def test_a_position_outside_the_map_is_refused(wrong: int, form: torch.memory_format) -> None:
    """In memory the rows of all samples follow each other: it would be a pixel of another sample, quietly."""
    student, target, positions, _ = make((2, 3, 4, 5, 6), "u8")
    positions[1 if wrong < 0 else 0, 2] = wrong
    given = student.contiguous(memory_format=form)
    with pytest.raises(ValueError, match=r"gather_positions: expected positions 0 to 19 of a map of \[4, 5\], got"):
        gather_positions(given, positions)
    with pytest.raises(ValueError, match="partial_l2: expected positions 0 to 19"):
        partial_l2(given, target, positions=positions)


def test_an_empty_batch_is_zero() -> None:
    student = torch.zeros(0, 3, 4, 4, requires_grad=True)
    loss = partial_l2(student, torch.zeros(0, 3, 5), positions=torch.zeros(0, 5, dtype=torch.int32))
    loss.backward()
    assert loss == 0
    assert student.grad is not None
    assert student.grad.shape == student.shape
