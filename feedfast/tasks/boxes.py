"""Boxes and anchors: which anchor answers for which box, how far it has to move, and what it was moved to.

The rules are SSD's (Liu et al., ECCV 2016) as torchvision implements them in a module of its own that promises nothing
(`torchvision.models.detection._utils`), sample by sample, waiting for the GPU at each. These do a batch at once and
wait nowhere; the tests hold them against torchvision's, number by number.

Boxes and anchors are left, top, right, bottom in pixels of the network's square.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou  # type: ignore[import-untyped]

# What shifts of the center and logarithms of growth are multiplied with, so that both have about unit variance.
_SHIFT, _GROWTH = 10.0, 5.0
# No box grows beyond this (its logarithm) over its anchor: exp would overflow early in training.
_LARGEST = math.log(1000 / 16)


def padded(
    annotations: Sequence[Mapping[str, Tensor]], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """A batch's boxes as one tensor.

    Args:
        annotations: per sample ``boxes`` float [k, 4] and ``labels`` int64 [k].
        device: where they are wanted.
        dtype: of the boxes.

    Returns:
        boxes [B, m, 4], labels int64 [B, m] and, bool [B, m], which of them there are, m at least 1; a box without area
        is none.
    """
    most = max([1, *(len(own["labels"]) for own in annotations)])
    first = annotations[0]
    boxes = torch.zeros(len(annotations), most, 4, dtype=dtype, device=first["boxes"].device)
    labels = torch.zeros(len(annotations), most, dtype=torch.int64, device=first["labels"].device)
    for row, own in enumerate(annotations):
        boxes[row, : len(own["boxes"])] = own["boxes"]
        labels[row, : len(own["labels"])] = own["labels"]
    boxes, labels = boxes.to(device, non_blocking=True), labels.to(device, non_blocking=True)
    return boxes, labels, (boxes[..., 2:] > boxes[..., :2]).all(2)


def matched(boxes: Tensor, there: Tensor, anchors: Tensor, overlap: float) -> Tensor:
    """The box that each anchor answers for.

    An anchor takes the box it overlaps most, if by at least ``overlap``; and each box has its best anchor in any case.

    Args:
        boxes: [B, m, 4].
        there: bool [B, m], which of them there are.
        anchors: [A, 4].
        overlap: least intersection over union.

    Returns:
        int64 [B, A], number of the box, -1 for none.
    """
    count, most = there.shape
    ious = box_iou(boxes.flatten(0, 1), anchors).view(count, most, len(anchors))
    ious = ious.masked_fill(~there[..., None], -1)
    best, number = ious.max(1)
    number = number.masked_fill(best < overlap, -1)
    # where two boxes have the same best anchor the later one gets it, as in torchvision
    own = torch.arange(most, device=boxes.device).expand(count, most).masked_fill(~there, -1)
    forced = torch.full_like(number, -1).scatter_reduce(1, ious.argmax(2), own, "amax")
    return torch.where(forced >= 0, forced, number)


def encoded(boxes: Tensor, anchors: Tensor) -> Tensor:
    """How anchors have to move and grow to be boxes: what a network is trained to say.

    Args:
        boxes: [..., 4], with an area.
        anchors: [..., 4].

    Returns:
        [..., 4]: shift of the center per size of the anchor, logarithm of the growth, weighted; x before y.
    """
    size, wanted = anchors[..., 2:] - anchors[..., :2], boxes[..., 2:] - boxes[..., :2]
    shift = (boxes[..., :2] + 0.5 * wanted - anchors[..., :2] - 0.5 * size) / size
    return torch.cat((_SHIFT * shift, _GROWTH * (wanted / size).log()), -1)


def decoded(codes: Tensor, anchors: Tensor) -> Tensor:
    """The boxes [..., 4] that a network says, the inverse of `encoded`."""
    size = anchors[..., 2:] - anchors[..., :2]
    center = codes[..., :2] / _SHIFT * size + anchors[..., :2] + 0.5 * size
    half = 0.5 * (codes[..., 2:] / _GROWTH).clamp(max=_LARGEST).exp() * size
    return torch.cat((center - half, center + half), -1)
