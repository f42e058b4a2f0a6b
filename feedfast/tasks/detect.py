"""Detection with anchors (SSD): multibox loss, detections after non-maximum suppression, average precision.

A network returns ``cls_logits`` [B, A, K + 1], ``bbox_regression`` [B, A, 4] and ``anchors`` [A, 4], the latter left,
top, right, bottom in pixels of its square; class 0 of the logits is background, class c of the data is c + 1. Boxes are
coded against the anchors as in `feedfast.tasks.boxes`. Loss and detections are torchvision's, number by number; where
theirs waits for the GPU once per image, the loss waits nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import batched_nms, clip_boxes_to_image  # type: ignore[import-untyped]

from feedfast.errors import RequestError
from feedfast.tasks.base import Outputs, described, wide
from feedfast.tasks.boxes import decoded, encoded, matched, padded
from feedfast.tasks.precision import Precision, require_pycocotools

_CANDIDATES = 400
"""So many boxes of a class enter suppression, the highest scores first."""

_NAMES = ("cls_logits", "bbox_regression", "anchors")


@dataclass(frozen=True)
class Detect:
    """Any number of boxes per image, each of one of ``classes`` classes.

    Attributes:
        classes: how many, without background; 0 = as many as the network has.
        size: side in pixels of the square that the network is shown, whose pixels its anchors count; of no use to the
            loss.
        negatives: background anchors per matched one that count in the loss, the worst ones.
        overlap: an anchor answers for a box that it overlaps by so much (intersection over union).
        least_score: detections need a higher probability.
        nms: of two detections of one class that overlap by more, the less probable is dropped.
        keep: so many detections per image at most.
    """

    classes: int = 0
    size: int = 0
    negatives: float = 3.0
    overlap: float = 0.5
    least_score: float = 0.01
    nms: float = 0.45
    keep: int = 200
    name: str = "detect"
    term: str = "multibox"
    score: str = "ap50"

    def check(self, outputs: Outputs, where: str) -> None:
        """Raise unless a network returns logits, box codes and anchors, of K = ``classes`` classes and background.

        Args:
            outputs: of one sample, as the network was seen to return them.
            where: begins the message.

        Raises:
            RequestError: it does not detect, or other classes, or pycocotools is not installed, without which a trained
                detector could not be judged.
        """
        shapes = outputs if isinstance(outputs, Mapping) else {}
        logits, codes, anchors = (shapes.get(name, ()) for name in _NAMES)
        if len(logits) != 2 or tuple(codes) != (logits[0], 4) or tuple(anchors) != (4,):
            raise RequestError(
                f"{where}: expected a detector that returns cls_logits [batch, anchor, class], bbox_regression "
                f"[batch, anchor, 4] and anchors [anchor, 4], found {described(outputs)}; zoo/ssd300-resnet18 is one"
            )
        if self.classes and logits[1] != self.classes + 1:
            raise RequestError(
                f"{where}: expected cls_logits of {self.classes + 1} classes, {self.classes} and background, "
                f"found {logits[1]}"
            )
        require_pycocotools(where)

    def loss(self, output: Mapping[str, Tensor], annotations: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """`multibox_loss`: the sum of its two parts."""
        boxes, classes = multibox_loss(output, annotations, overlap=self.overlap, negatives=self.negatives)
        return boxes + classes

    def metric(self) -> Precision:
        """``ap``, ``ap50`` and ``ap50_voc07``, see `feedfast.tasks.precision`."""
        return Precision(self)

    def detections(
        self, output: Mapping[str, Tensor], truth: Sequence[Mapping[str, Tensor]]
    ) -> list[dict[str, Tensor]]:
        """What the network sees in the source images.

        Args:
            output: of a batch, as the module says.
            truth: per sample ``size`` int64 [2], height and width of the image, and ``box`` int64 [4], top, left,
                height and width in source pixels of what the network was shown.

        Returns:
            Per sample, on the CPU, highest score first: ``boxes`` float [n, 4], left, top, right, bottom in pixels of
            the source; ``scores`` float [n], probabilities; ``labels`` int64 [n], class numbers of the data.

        Raises:
            ValueError: the task does not know ``size``.
        """
        if not self.size:
            raise ValueError("Detect.size: expected the side of the network's square in pixels, found 0")
        anchors = wide(output["anchors"])
        found = []
        for logits, codes, image in zip(output["cls_logits"], output["bbox_regression"], truth, strict=True):
            boxes = clip_boxes_to_image(decoded(wide(codes), anchors), (self.size, self.size))
            scores = wide(logits).softmax(1)[:, 1:].T
            best, at = scores.topk(min(_CANDIDATES, len(boxes)), dim=1)  # [class, candidate]
            label, rank = (best > self.least_score).nonzero(as_tuple=True)
            candidates, probability = boxes[at[label, rank]], best[label, rank]
            kept = batched_nms(candidates, probability, label, self.nms)[: self.keep]
            columns = (candidates[kept], probability[kept, None], label[kept, None].to(probability.dtype))
            rows = torch.cat(columns, 1).cpu()  # one copy: each waits for the GPU
            found.append(
                {"boxes": self._in_source(rows[:, :4], image), "scores": rows[:, 4], "labels": rows[:, 5].long()}
            )
        return found

    def _in_source(self, boxes: Tensor, image: Mapping[str, Tensor]) -> Tensor:
        top, left, height, width = image["box"].tolist()
        scale = boxes.new_tensor([width, height, width, height]) / self.size
        moved = boxes * scale + boxes.new_tensor([left, top, left, top])
        clipped: Tensor = clip_boxes_to_image(moved, tuple(image["size"].tolist()))
        return clipped


def multibox_loss(
    output: Mapping[str, Tensor],
    annotations: Sequence[Mapping[str, Tensor]],
    *,
    overlap: float = 0.5,
    negatives: float = 3.0,
) -> tuple[Tensor, Tensor]:
    """SSD's loss, as torchvision computes it.

    Args:
        output: ``cls_logits`` [B, A, K + 1], ``bbox_regression`` [B, A, 4] and ``anchors`` [A, 4], any float dtype;
            computed in fp32 (float64 stays).
        annotations: per sample ``boxes`` float [k, 4] in pixels of the network's square and ``labels`` int64 [k] in
            0..K - 1, on any device. A box without area counts as none.
        overlap: an anchor answers for a box that it overlaps by so much.
        negatives: background anchors per matched one of an image that count, those of the highest loss.

    Returns:
        Two scalars: smooth L1 distance of matched anchors' codes, and cross-entropy of matched and chosen background
        anchors; each a sum over the batch, divided by its number of matched anchors (at least 1). An image without
        boxes adds nothing: background is chosen in proportion to what was matched in the same image.
    """
    logits, codes, anchors = (wide(output[name]) for name in _NAMES)
    anchors = anchors.to(codes.dtype)
    boxes, labels, there = padded(annotations, codes.device, codes.dtype)
    number = matched(boxes, there, anchors, overlap)
    positive = number >= 0
    own = number.clamp(min=0)
    wanted = encoded(boxes.gather(1, own[..., None].expand(-1, -1, 4)), anchors)
    # unmatched anchors have codes of no box, infinite ones among them: they leave before anything is multiplied with 0
    wanted = torch.where(positive[..., None], wanted, codes.detach())
    distance = F.smooth_l1_loss(codes, wanted, reduction="sum")
    classes = torch.where(positive, labels.gather(1, own) + 1, 0)
    entropy = F.cross_entropy(logits.flatten(0, 1), classes.flatten(), reduction="none").view_as(classes)
    matches = positive.sum(1, keepdim=True)
    order = entropy.detach().masked_fill(positive, -torch.inf).argsort(1, descending=True)
    # as torchvision, without a look at what is left: where there are fewer background anchors than wanted, matched
    # ones, last in order, count once more
    chosen = order.argsort(1) < negatives * matches
    count = matches.sum().clamp(min=1)
    return distance / count, (entropy * positive + entropy * chosen).sum() / count
