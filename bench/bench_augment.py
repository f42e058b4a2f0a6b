"""What augmentations cost: DALI with every parameter passed in, next to torchvision v2 in worker processes.

The same presets and operations on the same images by both, alternating round by round in one run: images per second,
and per second of processor time (workers included), which a busy machine disturbs less. torchvision draws its own
parameters; only the distribution is the same. A round is a whole pass after the pipelines or workers have started;
starting them is timed apart. Bytes per row are what a cache stores to show a row again.

    python bench/bench_augment.py [--data ../shared/data] [--rounds 5] [--threads 2] [--images 2000] [--tiny]

The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from feedfast.data.annotations import Boxes, Masks
from feedfast.data.augment import plan_with
from feedfast.data.dataset import Dataset, open_dataset
from feedfast.data.loader import Loader
from feedfast.stages.plan import view_row_bytes

JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
MEAN = (124, 116, 104)


@dataclass(frozen=True)
class Case:
    """A preset, or the operations that follow a setting's crop and flip, and torchvision's of the same.

    Attributes:
        augment: a preset's name, or tables of operations.
        steps: makes the transforms that torchvision applies to each image after its crop and flip.
        mixing: makes torchvision's transforms of a whole batch, of which one is drawn.
    """

    augment: str | list[dict[str, Any]]
    steps: Callable[[], list[Any]] = list
    mixing: Callable[[], list[Any]] = list


def erased(*steps: Any) -> list[Any]:
    """The steps, and random erasing."""
    return [*steps, v2.RandomErasing(0.25)]


def mix_or_cut(alpha: float) -> Callable[[], list[Any]]:
    return lambda: [v2.MixUp(alpha=alpha, num_classes=1000), v2.CutMix(alpha=1.0, num_classes=1000)]


OPERATIONS = {
    "color jitter, grayscale": Case(
        [{"op": "color-jitter", **JITTER}, {"op": "grayscale", "p": 0.2}],
        lambda: [v2.ColorJitter(**JITTER), v2.RandomGrayscale(0.2)],
    ),
    "rand-augment, erasing": Case(
        [{"op": "rand-augment"}, {"op": "random-erasing", "p": 0.25}], lambda: erased(v2.RandAugment())
    ),
    "trivial-augment": Case([{"op": "trivial-augment"}], lambda: [v2.TrivialAugmentWide()]),
    "auto-augment": Case([{"op": "auto-augment"}], lambda: [v2.AutoAugment()]),
    "rand-augment, erasing, mixup": Case(
        [{"op": "rand-augment"}, {"op": "random-erasing", "p": 0.25}, {"op": "mixup", "alpha": 0.8}],
        lambda: erased(v2.RandAugment()),
        lambda: [v2.MixUp(alpha=0.8, num_classes=1000)],
    ),
}
# torchvision has no RandAugment of timm's operations: its own, as many and as strong
SMALL = {"cifar-standard": Case("cifar-standard"), **OPERATIONS}
PHOTOS = {
    "imagenet-standard": Case("imagenet-standard"),
    "timm-ra": Case("timm-ra", lambda: erased(v2.RandAugment(2, 9))),
    "deit": Case("deit", lambda: erased(v2.RandAugment(2, 9)), mix_or_cut(0.8)),
    "lightly-distill": Case(
        "lightly-distill",
        lambda: [v2.RandomApply([v2.ColorJitter(**JITTER)], 0.8), v2.RandomGrayscale(0.2)],
        lambda: [v2.MixUp(alpha=1.0, num_classes=1000)],
    ),
    "ml-dr": Case("ml-dr", lambda: erased(v2.RandAugment()), mix_or_cut(1.0)),
    **OPERATIONS,
}
MASKS = {"deeplab": Case("deeplab")}
BOXES = {"ssd": Case("ssd")}


def transform_of(case: Case, task: str, size: int) -> Any:
    """torchvision's of one image, to uint8 [3, size, size]."""
    if task == "segment":
        scale = v2.RandomShortestSize(range(size // 2, size * 2 + 1))
        window = v2.RandomCrop(size, pad_if_needed=True, fill={torch.Tensor: 0, tv_tensors.Mask: 255})
        blur = v2.RandomApply([v2.GaussianBlur(7, (0.001, 1.0))])
        return v2.Compose([v2.ToImage(), scale, window, v2.RandomHorizontalFlip(), blur])
    if task == "detect":
        distort, zoom = v2.RandomPhotometricDistort(), v2.RandomZoomOut({torch.Tensor: MEAN}, (1.0, 4.0))
        resize = [v2.RandomHorizontalFlip(), v2.SanitizeBoundingBoxes(), v2.Resize((size, size))]
        return v2.Compose([v2.ToImage(), distort, zoom, v2.RandomIoUCrop(), *resize])
    cut = v2.RandomCrop(32, 4) if size == 32 else v2.RandomResizedCrop(size, antialias=True)
    steps = case.steps()
    late = [step for step in steps if isinstance(step, v2.RandomErasing)]
    early = [step for step in steps if step not in late]
    return v2.Compose([cut, v2.RandomHorizontalFlip(), *early, v2.PILToTensor(), *late])


class Reference(TorchDataset[Any]):
    """The images through torchvision's transforms, as a training script has them."""

    def __init__(self, data: Dataset, transform: Any) -> None:
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, position: int) -> tuple[Any, Any]:
        if self.data.kind == "pixels":
            image = Image.fromarray(self.data.pixels([position])[0])
        else:
            image = Image.open(self.data.path(position)).convert("RGB")
        marks = self.data.annotations
        if isinstance(marks, Masks):
            return self.transform(image, tv_tensors.Mask(torch.from_numpy(marks.read(position))))
        if isinstance(marks, Boxes):
            own = slice(marks.starts[position], marks.starts[position + 1])
            shape = (image.height, image.width)
            boxes = tv_tensors.BoundingBoxes(torch.from_numpy(marks.xyxy[own]), format="XYXY", canvas_size=shape)
            shown, target = self.transform(image, {"boxes": boxes, "labels": torch.from_numpy(marks.labels[own])})
            return shown, len(target["labels"])
        return self.transform(image), int(self.data.labels[position])


def processor_seconds() -> float:
    """Of this process and of workers that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def one_pass(batches: Callable[[], Iterator[int]]) -> tuple[float, float, float]:
    """Seconds to the first batch, images per second after it, and per second of processor time over all."""
    cpu, begin = processor_seconds(), time.perf_counter()
    counts = batches()
    first = next(counts)
    started = time.perf_counter()
    rest = sum(counts)
    seconds = time.perf_counter() - started
    return started - begin, rest / seconds, (first + rest) / (processor_seconds() - cpu)


def bench(data: Dataset, size: int, batch: int, cases: dict[str, Case], args: argparse.Namespace) -> dict[str, Any]:
    crop = {"op": "pad-crop", "pad": 4} if size == 32 else {"op": "resized-crop"}
    rows = np.arange(min(args.images, len(data)))
    task = data.annotations.task
    found: dict[str, Any] = {}
    passes: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for number in range(args.rounds):
        for name, case in cases.items():
            augment = case.augment if isinstance(case.augment, str) else [crop, {"op": "flip"}, *case.augment]
            plan = plan_with(augment, seed=0, size=size, flip=0.5)

            def ours(plan: Any = plan, view: int = number) -> Iterator[int]:
                with Loader(data, plan, batch_size=batch, threads=args.threads) as loader:
                    yield from (len(made) for made in loader.stream(view, rows))

            transform, mixing = transform_of(case, task, size), case.mixing()
            mix = v2.RandomChoice(mixing) if mixing else None

            def theirs(transform: Any = transform, mix: Any = mix) -> Iterator[int]:
                subset = torch.utils.data.Subset(Reference(data, transform), rows.tolist())
                # drop_last: mixing pairs within the batch
                for images, labels in DataLoader(subset, batch, shuffle=True, num_workers=args.threads, drop_last=True):
                    shown = mix(images.float(), labels)[0] if mix is not None else images
                    yield len(shown)

            for side, batches in (("feedfast", ours), ("torchvision", theirs)):
                passes.setdefault((name, side), []).append(one_pass(batches))
            found.setdefault(name, {"bytes_per_row": view_row_bytes(plan)})
    for (name, side), measured in passes.items():
        start, wall, cpu = (statistics.median(values) for values in zip(*measured, strict=True))
        found[name][side] = {
            "first_batch_s": round(start, 2), "images_per_second": round(wall), "per_cpu_second": round(cpu),
        }  # fmt: skip
    for name, row in found.items():
        ratio = row["feedfast"]["per_cpu_second"] / row["torchvision"]["per_cpu_second"]
        row["times_torchvision"] = round(ratio, 2)
        print(f"{size:4d} px  {name:30s} {row}", file=sys.stderr)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("FEEDFAST_DATA", here)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--tiny", action="store_true", help="a few images, to see that it runs")
    args = parser.parse_args(argv)
    if args.tiny:
        args.rounds, args.images, args.threads = 1, 24, 1
    torch.set_num_threads(1)
    cifar = open_dataset(args.data / "cifar-100-binary" / "test.bin", limit=1 if args.tiny else 0)
    photos = open_dataset(args.data / "imagenette-small" / "train", limit=3 if args.tiny else 0)
    streets = open_dataset(args.data / "camvid" / "train", task="segment", limit=24 if args.tiny else 0)
    objects = open_dataset(args.data / "coco128" / "train.json", task="detect", limit=24 if args.tiny else 0)
    batch = 8 if args.tiny else 64
    document = {
        "bench": "augment",
        "threads": args.threads,
        "cifar_32": bench(cifar, 32, batch, SMALL, args),
        "jpeg_224": bench(photos, 224, batch, PHOTOS, args),
        "masks_320": bench(streets, 320, 8, MASKS, args),
        "boxes_300": bench(objects, 300, 8, BOXES, args),
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
