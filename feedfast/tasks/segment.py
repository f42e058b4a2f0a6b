"""Segmentation: logits [B, K, h, w] at the network's stride, cross-entropy per pixel, mean intersection over union.

Networks hand out their logits as small as they compute them; loss and metric enlarge them bilinearly, corners not
aligned. The metric compares at the original resolution of each image, whatever square the network was shown.

A pixel of class 255 (`IGNORE`) counts in no loss and no metric. Positions and sizes are in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from feedfast.errors import RequestError
from feedfast.tasks.base import Outputs, described, wide

IGNORE = 255
"""The class number of mask pixels that count nowhere."""

# A strip of enlarged logits holds about this many values: 16 MiB in fp32, whatever the image's size and classes.
_STRIP = 1 << 22


@dataclass(frozen=True)
class Segment:
    """One of ``classes`` classes per pixel.

    Attributes:
        classes: how many; 0 = as many as the network has.
        size: side in pixels of the square that the network is shown; 0 leaves ``miou_resized`` out of the metric.
    """

    classes: int = 0
    size: int = 0
    name: str = "segment"
    term: str = "ce"
    score: str = "miou"

    def check(self, outputs: Outputs, where: str) -> None:
        """Raise unless a network returns one tensor of logits [B, K, h, w] with K = ``classes``.

        Args:
            outputs: of one sample, as the network was seen to return them.
            where: begins the message.

        Raises:
            RequestError: it does not segment, or into other classes.
        """
        if not isinstance(outputs, tuple) or len(outputs) != 3:
            raise RequestError(
                f"{where}: expected a network that returns logits [batch, class, height, width], "
                f"found {described(outputs)}; zoo/deeplabv3plus-resnet18 is one"
            )
        if self.classes and outputs[0] != self.classes:
            raise RequestError(f"{where}: expected logits of {self.classes} classes, found {outputs[0]}")
        if outputs[0] > IGNORE:
            raise RequestError(
                f"{where}: expected at most {IGNORE} classes, found {outputs[0]}; masks hold one byte per pixel, "
                f"and {IGNORE} is no class"
            )

    def loss(self, output: Tensor, annotations: Tensor) -> Tensor:
        """`pixel_loss`."""
        return pixel_loss(output, annotations)

    def metric(self) -> Confusion:
        """``miou``, ``pixel_accuracy`` and, with a ``size``, ``miou_resized``."""
        return Confusion(self)

    def predictions(self, output: Tensor, truth: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        """What the network says of each pixel of the source images.

        Args:
            output: logits [B, K, h, w].
            truth: per sample ``mask`` uint8 [H, W], of which only the size is read, and ``box`` int64 [4]: top, left,
                height and width in source pixels of what the network was shown.

        Returns:
            Class numbers uint8 [H, W] per sample, on the logits' device. Pixels outside the box are given the class of
            the nearest one inside.
        """
        found = []
        for logits, own in zip(output, truth, strict=True):
            height, width = own["mask"].shape
            top, left, box_height, box_width = own["box"].tolist()
            inside = torch.arange(height, device=logits.device) - top
            said = _classes_at(logits, inside, box_height, box_width)
            columns = torch.arange(width, device=logits.device) - left
            found.append(said[:, columns.clamp(0, box_width - 1)])
        return found


def pixel_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Cross-entropy per pixel, averaged over the batch's valid pixels.

    Args:
        logits: [B, K, h, w], any float dtype; enlarged and compared in fp32 (float64 stays).
        masks: class numbers int64 [B, S, S], 255 where there is none.

    Returns:
        Scalar; 0 (with a zero gradient) if no pixel is valid.
    """
    large = F.interpolate(wide(logits), size=masks.shape[-2:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(large, masks, ignore_index=IGNORE, reduction="sum")
    return total / (masks != IGNORE).sum().clamp(min=1)


class Confusion:
    """How often which class is taken for which, over valid pixels, and what follows from it.

    ``miou`` is the mean over the classes that occur in truth or prediction, as the Pascal VOC devkit counts: a class
    that is predicted and never true counts as 0, one that is neither is left out.
    """

    def __init__(self, task: Segment) -> None:
        self._task = task
        self._counts: dict[str, Tensor] = {}

    def update(self, output: Tensor, annotations: Sequence[Mapping[str, Tensor]]) -> None:
        """Count a batch, sample by sample; nothing waits for a GPU here.

        Args:
            output: logits [B, K, h, w].
            annotations: per sample ``mask`` uint8 [H, W] at the source's resolution and ``box`` int64 [4]: top, left,
                height and width in source pixels of what the network was shown. It may leave the image.
        """
        for logits, own in zip(output, annotations, strict=True):
            mask = own["mask"].to(logits.device, non_blocking=True)
            (said,) = self._task.predictions(logits[None], [own])
            self._count("confusion", said, mask, len(logits))
            size = self._task.size
            if size:
                top, left, height, width = own["box"].tolist()
                rows, columns = (_nearest(side, size, mask.device) for side in (height, width))
                said = _classes_at(logits, torch.arange(size, device=logits.device), size, size)
                self._count("resized", said, _taken(mask, rows + top, columns + left), len(logits))

    def state(self) -> dict[str, Tensor]:
        """``confusion`` and, with a size, ``resized``: pixels, int64 [K, K], rows are the truth."""
        return {name: counts.cpu() for name, counts in self._counts.items()}

    def merge(self, states: Sequence[dict[str, Tensor]]) -> None:
        """Add all ranks' counts."""
        names = dict.fromkeys(name for state in states for name in state)
        self._counts = {name: torch.stack([s[name] for s in states if name in s]).sum(0) for name in names}

    def ious(self, name: str = "confusion") -> list[float | None]:
        """Intersection over union per class, None for one that occurs in neither truth nor prediction."""
        if name not in self._counts:
            return []
        counts = self._counts[name].cpu()
        both = counts.diagonal()
        either = counts.sum(0) + counts.sum(1) - both
        return [own / whole if whole else None for own, whole in zip(both.tolist(), either.tolist(), strict=True)]

    def compute(self) -> dict[str, float | None]:
        """All in 0..1.

        Returns:
            ``miou`` at the images' own resolution; ``pixel_accuracy``, the share of right pixels; with a size,
            ``miou_resized``, on labels resized (nearest neighbor) to the network's square, as overhaul distillation's
            authors validate: no figure to set against one at full resolution. Theirs scales the shorter side to the
            network's size and lets the longer one leave the square, ours is the evaluation's own square.
        """
        values: dict[str, float | None] = {"miou": _mean(self.ious()), "pixel_accuracy": None}
        if "confusion" in self._counts:
            counts = self._counts["confusion"].cpu()
            whole = int(counts.sum())
            values["pixel_accuracy"] = int(counts.diagonal().sum()) / whole if whole else None
        if self._task.size:
            values["miou_resized"] = _mean(self.ious("resized"))
        return values

    def _count(self, name: str, said: Tensor, mask: Tensor, classes: int) -> None:
        places = classes * classes
        # one place more for pixels that do not count; bincount would ask the GPU for its largest value first
        at = torch.where(mask == IGNORE, places, mask.long() * classes + said)
        found = torch.zeros(places + 1, dtype=torch.int64, device=at.device)
        found.index_add_(0, at.flatten(), torch.ones((), dtype=torch.int64, device=at.device).expand(at.numel()))
        counts = found[:places].view(classes, classes)
        self._counts[name] = self._counts[name] + counts if name in self._counts else counts


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _classes_at(logits: Tensor, rows: Tensor, height: int, width: int) -> Tensor:
    """The largest class of some rows of logits enlarged to ``height`` x ``width``.

    The enlarged logits themselves, which of a photograph in 150 classes are gigabytes, exist a strip at a time.

    Args:
        logits: [K, h, w].
        rows: int64 [R] in 0..height - 1; what lies outside is moved to the nearest.
        height, width: of the whole in pixels.

    Returns:
        uint8 [R, width].
    """
    # channels last in torch's sense, the batch's axis too: what is compared lies together, which is 4 times as fast
    last = wide(logits).permute(1, 2, 0)[None].contiguous()
    extent = last.shape[1]
    at = ((rows.double() + 0.5) * (extent / height) - 0.5).clamp(0, extent - 1)
    upper = at.long()
    lower = (upper + 1).clamp(max=extent - 1)
    share = (at - upper).to(last.dtype)[:, None, None]
    step = max(1, _STRIP // (width * len(logits)))
    found = []
    for start in range(0, len(rows), step):
        strip = slice(start, start + step)
        lines = torch.lerp(last[:, upper[strip]], last[:, lower[strip]], share[strip]).permute(0, 3, 1, 2)
        enlarged = F.interpolate(lines, size=(lines.shape[2], width), mode="bilinear", align_corners=False)
        found.append(enlarged[0].argmax(0).to(torch.uint8))
    return torch.cat(found)


def _nearest(extent: int, size: int, device: torch.device) -> Tensor:
    """int64 [size]: of each pixel of an axis resized to ``size`` the one of ``extent`` that its center lies in."""
    return (2 * torch.arange(size, device=device) + 1) * extent // (2 * size)


def _taken(mask: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pixels of a mask by row and column, `IGNORE` outside it."""
    height, width = mask.shape
    out = mask[rows.clamp(0, height - 1)][:, columns.clamp(0, width - 1)]
    inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))
    return torch.where(inside, out, IGNORE)
