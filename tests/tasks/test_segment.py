"""Segmentation: the loss against PIL's enlargement and a plain formula, the metric against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score
from torch import Tensor

from feedfast.data.annotations import IGNORE as DATA_IGNORE
from feedfast.data.annotations import move_mask
from feedfast.data.geometry import Geometry
from feedfast.tasks import Segment, pixel_loss, segment

CLASSES = 5
# Height and width of the images, and what the network was shown of each: the square, a square around, a part, a squash.
SHAPES = [
    ((30, 41), (0, 0, 41, 41)),
    ((37, 20), (-3, -10, 45, 45)),
    ((33, 33), (4, 6, 20, 25)),
    ((50, 9), (0, 0, 50, 9)),
]


def enlarged(logits: Tensor, height: int, width: int) -> NDArray[np.float32]:
    """[K, height, width] by PIL, whose bilinear filter does not shrink here and so averages two by two."""
    planes = [Image.fromarray(plane.float().numpy()) for plane in logits]
    return np.stack([np.asarray(plane.resize((width, height), Image.Resampling.BILINEAR)) for plane in planes])


def scene(seed: int = 0) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Coarse logits of four images, and their truth, which resembles them."""
    rng = np.random.default_rng(seed)
    output = torch.from_numpy(rng.standard_normal((len(SHAPES), CLASSES, 6, 7)).astype(np.float32))
    truth = []
    for (height, width), box in SHAPES:
        mask = rng.integers(0, CLASSES - 1, (height, width)).astype(np.uint8)  # the last class is never true
        mask[rng.random(mask.shape) < 0.2] = DATA_IGNORE
        truth.append({"mask": torch.from_numpy(mask), "box": torch.tensor(box)})
    return output, truth


def expected(logits: Tensor, own: dict[str, Tensor]) -> NDArray[np.int64]:
    top, left, height, width = own["box"].tolist()
    large = enlarged(logits, height, width).argmax(0)
    rows, columns = (np.arange(side) for side in own["mask"].shape)
    return large[np.ix_((rows - top).clip(0, height - 1), (columns - left).clip(0, width - 1))]


def together(output: Tensor, truth: list[dict[str, Tensor]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Class numbers of all valid pixels: the true ones, and the predicted."""
    pairs = [(own["mask"].numpy().ravel(), expected(x, own).ravel()) for x, own in zip(output, truth, strict=True)]
    true, said = (np.concatenate(side) for side in zip(*pairs, strict=True))
    return true[true != 255], said[true != 255]


def test_ignored_is_the_same_number_for_data_and_task() -> None:
    assert segment.IGNORE == DATA_IGNORE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_loss_is_the_mean_over_valid_pixels_of_enlarged_logits(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(1)
    logits = torch.from_numpy(rng.standard_normal((2, CLASSES, 5, 5)).astype(np.float32)).to(dtype)
    masks = rng.integers(0, CLASSES, (2, 16, 16))
    masks[rng.random(masks.shape) < 0.3] = 255
    large = np.stack([enlarged(x, 16, 16) for x in logits]).astype(np.float64)
    entropy = np.log(np.exp(large).sum(1)) - np.take_along_axis(large, np.minimum(masks, 4)[:, None], 1)[:, 0]
    found = Segment(CLASSES).loss(logits, torch.from_numpy(masks))
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.item() == pytest.approx(entropy[masks != 255].mean(), rel=1e-6)


def test_what_is_ignored_has_no_say_and_no_gradient() -> None:
    logits = torch.randn(1, CLASSES, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    masks = torch.randint(0, CLASSES, (1, 8, 8), generator=torch.Generator().manual_seed(1))
    masks[:, :4] = 255
    loss = pixel_loss(logits, masks)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert not gradient[:, :, :4].any()
    assert gradient[:, :, 4:].abs().min() > 0
    other = logits.detach().clone()
    other[:, :, :4] += 10
    assert pixel_loss(other, masks).item() == loss.item()


def test_no_valid_pixel_is_no_loss() -> None:
    logits = torch.randn(2, CLASSES, 4, 4).requires_grad_()
    loss = pixel_loss(logits, torch.full((2, 16, 16), 255))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize("strip", [1 << 22, 200])
def test_predictions_are_at_the_source_resolution(strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment, "_STRIP", strip)
    output, truth = scene()
    found = Segment(CLASSES).predictions(output, truth)
    for said, logits, own in zip(found, output, truth, strict=True):
        assert said.dtype == torch.uint8
        assert said.shape == own["mask"].shape
        assert np.array_equal(said.numpy(), expected(logits, own))


def test_confusion_and_means_are_scikit_learns() -> None:
    output, truth = scene()
    metric = Segment(CLASSES).metric()
    metric.update(output[:1], truth[:1])
    metric.update(output[1:], truth[1:])
    true, said = together(output, truth)
    assert set(said) == set(range(CLASSES))  # the last class is predicted and never true: it counts as 0
    assert np.array_equal(metric.state()["confusion"].numpy(), confusion_matrix(true, said, labels=range(CLASSES)))
    assert metric.compute() == {
        "miou": pytest.approx(jaccard_score(true, said, average="macro", zero_division=0)),
        "pixel_accuracy": pytest.approx(accuracy_score(true, said)),
    }
    assert metric.ious() == pytest.approx(jaccard_score(true, said, average=None, zero_division=0).tolist())


def test_a_class_that_occurs_nowhere_counts_nowhere() -> None:
    logits = torch.zeros(1, 4, 2, 2)
    logits[:, 1] = 1
    truth = [{"mask": torch.tensor([[1, 1], [2, 255]], dtype=torch.uint8), "box": torch.tensor([0, 0, 2, 2])}]
    metric = Segment(4).metric()
    metric.update(logits, truth)
    assert metric.ious() == [None, 2 / 3, 0.0, None]
    assert metric.compute() == {"miou": pytest.approx(1 / 3), "pixel_accuracy": pytest.approx(2 / 3)}


def test_the_resized_protocol_compares_masks_as_views_move_them() -> None:
    size = 19
    output, truth = scene(3)
    metric = Segment(CLASSES, size).metric()
    metric.update(output, truth)
    true, said = [], []
    for logits, own in zip(output, truth, strict=True):
        box = own["box"].numpy().astype(np.int32)[None]
        one = np.zeros((1, 2), np.int32)
        geometry = Geometry(np.array([own["mask"].shape], np.int32), box, one + size, one, one[:, 0])
        true.append(move_mask(own["mask"].numpy(), geometry, 0, size).ravel())
        said.append(enlarged(logits, size, size).argmax(0).ravel())
    masks, classes = np.concatenate(true), np.concatenate(said)
    valid = masks != 255
    want = jaccard_score(masks[valid], classes[valid], average="macro", zero_division=0)
    values = metric.compute()
    assert values["miou_resized"] == pytest.approx(want)
    assert values["miou"] != values["miou_resized"]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(0, 99))
def test_ranks_together_count_as_one_and_ignored_pixels_not_at_all(world: int, seed: int) -> None:
    output, truth = scene(seed)
    one, ranks = Segment(CLASSES, 11).metric(), [Segment(CLASSES, 11).metric() for _ in range(world)]
    one.update(output, truth)
    valid = sum(int((own["mask"] != 255).sum()) for own in truth)
    assert int(one.state()["confusion"].sum()) == valid
    for number, rank in enumerate(ranks):
        rank.update(output[number::world], truth[number::world])
    idle = Segment(CLASSES, 11).metric()  # a rank without images
    idle.merge([rank.state() for rank in [*ranks, Segment(CLASSES, 11).metric()]])
    assert idle.compute() == one.compute()


@pytest.mark.gpu
def test_output_on_a_gpu_and_truth_on_the_cpu() -> None:
    output, truth = scene()
    here, there = Segment(CLASSES, 11).metric(), Segment(CLASSES, 11).metric()
    here.update(output, truth)
    there.update(output.cuda(), truth)
    assert there.compute() == here.compute()
