"""Detection: loss and detections against torchvision's SSD on the same tensors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder, SSDMatcher
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_iou

from feedfast.tasks import Detect
from feedfast.tasks.boxes import decoded, encoded, matched, padded
from feedfast.tasks.detect import multibox_loss

SIZE, CLASSES = 64, 3
CODER = BoxCoder((10.0, 10.0, 5.0, 5.0))


def boxes_of(count: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    corners = torch.rand(count, 2, generator=generator, dtype=dtype) * 40
    return torch.cat((corners, corners + 4 + 20 * torch.rand(count, 2, generator=generator, dtype=dtype)), 1)


def scene(
    counts: tuple[int, ...], seed: int, anchors: int = 120, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """A network's output, and boxes to learn, ``counts`` per image."""
    generator = torch.Generator().manual_seed(seed)
    output = {
        "cls_logits": torch.randn(len(counts), anchors, CLASSES + 1, generator=generator, dtype=dtype),
        "bbox_regression": torch.randn(len(counts), anchors, 4, generator=generator, dtype=dtype),
        "anchors": boxes_of(anchors, generator, dtype),
    }
    truth = [
        {
            "boxes": boxes_of(count, generator, dtype),
            "labels": torch.randint(0, CLASSES, (count,), generator=generator),
        }
        for count in counts
    ]
    return output, truth


def torchvisions(
    output: dict[str, Tensor], truth: list[dict[str, Tensor]], overlap: float = 0.5, negatives: float = 3.0
) -> dict[str, Tensor]:
    """The loss as ``SSD.forward`` makes it, of a network that is only its output; labels count from 1 there."""
    targets = [{"boxes": own["boxes"], "labels": own["labels"] + 1} for own in truth]
    anchors, numbers = output["anchors"], []
    for own in targets:
        if own["boxes"].numel() == 0:
            numbers.append(torch.full((len(anchors),), -1))
        else:
            numbers.append(SSDMatcher(overlap)(box_iou(own["boxes"], anchors)))
    ssd: Any = SimpleNamespace(box_coder=CODER, neg_to_pos_ratio=negatives)
    losses: dict[str, Tensor] = SSD.compute_loss(ssd, targets, output, [anchors] * len(targets), numbers)
    return losses


@pytest.mark.parametrize(
    ("counts", "anchors", "overlap", "negatives"),
    [
        ((3, 1, 5), 120, 0.5, 3.0),
        ((4, 0, 2), 120, 0.5, 3.0),  # an image without boxes
        ((0, 0), 120, 0.5, 3.0),
        ((7,), 12, 0.3, 3.0),  # fewer background anchors than wanted
        ((40,), 30, 0.5, 3.0),  # more boxes than anchors: several want the same one
        ((3, 2), 120, 0.35, 1.5),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_and_its_gradients_are_torchvisions(
    counts: tuple[int, ...], anchors: int, overlap: float, negatives: float, dtype: torch.dtype
) -> None:
    for seed in range(4):
        output, truth = scene(counts, seed, anchors, dtype)
        leaves = [output[name].requires_grad_() for name in ("bbox_regression", "cls_logits")]
        want = torchvisions(output, truth, overlap, negatives)
        found = multibox_loss(output, truth, overlap=overlap, negatives=negatives)
        tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-6, "atol": 1e-6}
        for mine, theirs in zip(found, (want["bbox_regression"], want["classification"]), strict=True):
            torch.testing.assert_close(mine, theirs, **tolerance)
        total = Detect(CLASSES, overlap=overlap, negatives=negatives).loss(output, truth)
        for mine, theirs in zip(
            torch.autograd.grad(total, leaves), torch.autograd.grad(sum(want.values()), leaves), strict=True
        ):
            torch.testing.assert_close(mine, theirs, **tolerance)


def test_boxes_without_boxes_cost_nothing_and_leave_finite_gradients() -> None:
    output, truth = scene((0, 0), 0)
    leaves = [output[name].requires_grad_() for name in ("bbox_regression", "cls_logits")]
    loss = Detect(CLASSES).loss(output, truth)
    assert loss.item() == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, leaves))


def test_half_precision_is_computed_in_fp32() -> None:
    output, truth = scene((3, 2), 0)
    half = {name: value.bfloat16() for name, value in output.items() if name != "anchors"}
    rounded = {name: value.float() for name, value in half.items()}
    found = Detect(CLASSES).loss({**half, "anchors": output["anchors"]}, truth)
    assert found.dtype == torch.float32
    assert found.item() == Detect(CLASSES).loss({**rounded, "anchors": output["anchors"]}, truth).item()


@pytest.mark.parametrize("seed", range(6))
def test_the_order_of_boxes_does_not_matter(seed: int) -> None:
    output, (own,) = scene((5,), seed, dtype=torch.float64)
    best = box_iou(own["boxes"], output["anchors"]).argmax(1)
    first = [best.tolist().index(anchor) for anchor in dict.fromkeys(best.tolist())]  # no two want the same anchor
    own = {name: value[first] for name, value in own.items()}
    order = torch.randperm(len(first), generator=torch.Generator().manual_seed(seed))
    shuffled = {name: value[order] for name, value in own.items()}
    task = Detect(CLASSES)
    assert task.loss(output, [shuffled]).item() == pytest.approx(task.loss(output, [own]).item(), rel=1e-12)


def test_a_box_without_area_is_none() -> None:
    output, truth = scene((3, 2), 0)
    flat = {"boxes": torch.tensor([[8.0, 8.0, 8.0, 20.0]]), "labels": torch.tensor([1])}
    more = [{name: torch.cat((flat[name], own[name])) for name in flat} for own in truth]
    task = Detect(CLASSES)
    assert task.loss(output, more).item() == pytest.approx(task.loss(output, truth).item(), rel=1e-6)
    assert task.loss(output, [flat, flat]).item() == 0


def test_matching_is_torchvisions() -> None:
    for seed in range(10):
        output, truth = scene((6, 2, 0), seed)
        boxes, _, there = padded(truth, torch.device("cpu"), torch.float32)
        found = matched(boxes, there, output["anchors"], 0.5)
        for number, own in zip(found[:2], truth[:2], strict=True):
            assert torch.equal(number, SSDMatcher(0.5)(box_iou(own["boxes"], output["anchors"])))
        assert (found[2] == -1).all()


def test_codes_are_torchvisions_and_decode_to_the_boxes() -> None:
    generator = torch.Generator().manual_seed(0)
    boxes, anchors = boxes_of(50, generator, torch.float64), boxes_of(50, generator, torch.float64)
    codes = encoded(boxes, anchors)
    torch.testing.assert_close(codes, CODER.encode_single(boxes, anchors), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(decoded(codes, anchors), boxes, rtol=1e-12, atol=1e-12)
    large = 40 * torch.randn(50, 4, generator=generator, dtype=torch.float64)  # beyond what a box may grow
    torch.testing.assert_close(decoded(large, anchors), CODER.decode_single(large, anchors), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("least", "nms", "keep", "anchors"), [(0.01, 0.45, 200, 90), (0.3, 0.6, 7, 500)])
def test_detections_are_torchvisions_in_the_pixels_of_the_source(
    least: float, nms: float, keep: int, anchors: int
) -> None:
    output, _ = scene((0, 0, 0), 5, anchors)
    output["cls_logits"] *= 2
    ssd: Any = SimpleNamespace(
        box_coder=CODER, score_thresh=least, topk_candidates=400, nms_thresh=nms, detections_per_img=keep
    )
    want = SSD.postprocess_detections(ssd, output, [output["anchors"]] * 3, [(SIZE, SIZE)] * 3)
    sizes = [(SIZE, SIZE), (128, 32), (50, 50)]
    shown = [(0, 0, SIZE, SIZE), (0, 0, 128, 32), (-7, -7, 64, 64)]  # as it is, squashed, with a margin that is cut off
    truth = [{"size": torch.tensor(size), "box": torch.tensor(box)} for size, box in zip(sizes, shown, strict=True)]
    task = Detect(CLASSES, SIZE, least_score=least, nms=nms, keep=keep)
    for mine, theirs, size, box in zip(task.detections(output, truth), want, sizes, shown, strict=True):
        assert 0 < len(mine["scores"]) <= keep
        assert torch.equal(mine["labels"], theirs["labels"] - 1)
        torch.testing.assert_close(mine["scores"], theirs["scores"])
        scale = torch.tensor([box[3], box[2], box[3], box[2]]) / SIZE
        moved = theirs["boxes"] * scale + torch.tensor([box[1], box[0], box[1], box[0]])
        moved = moved.clamp(min=0).minimum(torch.tensor([size[1], size[0], size[1], size[0]]))
        torch.testing.assert_close(mine["boxes"], moved)


def test_detections_need_the_size_of_the_square() -> None:
    output, _ = scene((0,), 0)
    with pytest.raises(ValueError, match=r"Detect\.size: expected"):
        Detect(CLASSES).detections(output, [{"size": torch.tensor([9, 9]), "box": torch.tensor([0, 0, 9, 9])}])


def seen(dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """A network that says exactly what is in two images, of which it was shown the whole, squashed."""
    output, wanted = scene((3, 2), 1, 200, dtype)
    anchors, truth = output["anchors"], []
    output["cls_logits"] = torch.tensor([9.0, 0, 0, 0]).to(dtype).expand(2, 200, -1).clone()
    for row, (own, (height, width)) in enumerate(zip(wanted, [(48, 100), (128, 64)], strict=True)):
        best = box_iou(own["boxes"], anchors).argmax(1)
        output["bbox_regression"][row, best] = encoded(own["boxes"], anchors[best])
        output["cls_logits"][row, best, own["labels"] + 1] = 20
        truth.append(
            {
                "boxes": own["boxes"] * torch.tensor([width, height, width, height]) / SIZE,
                "labels": own["labels"],
                "difficult": torch.zeros(len(own["labels"]), dtype=torch.bool),
                "size": torch.tensor([height, width]),
                "box": torch.tensor([0, 0, height, width]),
            }
        )
    return output, truth


def test_from_output_to_precision() -> None:
    output, truth = seen()
    metric = Detect(CLASSES, SIZE).metric()
    metric.update(output, truth)
    assert metric.compute() == {name: pytest.approx(1) for name in ("ap", "ap50", "ap50_voc07")}
    half = Detect(CLASSES, 2 * SIZE).metric()  # as if the anchors were those of a square of twice the size
    half.update(output, truth)
    assert half.compute()["ap50"] == 0


@pytest.mark.gpu
def test_output_on_a_gpu_and_annotations_on_the_cpu() -> None:
    output, truth = scene((3, 0, 5), 0)
    there = {name: value.cuda() for name, value in output.items()}
    found = Detect(CLASSES).loss(there, truth)
    torch.testing.assert_close(found.cpu(), Detect(CLASSES).loss(output, truth), rtol=1e-5, atol=1e-6)
    pytest.importorskip("pycocotools")  # GPU machines may lack it; the loss above needs none
    output, truth = seen()
    metric = Detect(CLASSES, SIZE).metric()
    metric.update({name: value.cuda() for name, value in output.items()}, truth)
    assert metric.compute()["ap"] == pytest.approx(1)
