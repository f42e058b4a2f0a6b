"""What augmentations cost: DALI with every parameter passed in, next to torchvision v2 in worker processes.

The same lists of operations on the same images by both, alternating round by round in one run: images per second, and
per second of processor time (workers included), which a busy machine disturbs less. torchvision draws its own
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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms import v2

from feedfast.data.augment import plan_with
from feedfast.data.dataset import Dataset, open_dataset
from feedfast.data.loader import Loader
from feedfast.stages.plan import view_row_bytes

Table = dict[str, Any]
JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
# name → the list without its crop, and torchvision's of the same
LISTS: dict[str, tuple[list[Table], list[Callable[[], Any]]]] = {
    "crop and flip": ([], []),
    "color jitter": (
        [{"op": "color-jitter", **JITTER}, {"op": "grayscale", "p": 0.2}],
        [lambda: v2.ColorJitter(**JITTER), lambda: v2.RandomGrayscale(0.2)],
    ),
    "rand-augment, erasing": (
        [{"op": "rand-augment"}, {"op": "random-erasing", "p": 0.25}],
        [lambda: v2.RandAugment(), lambda: v2.RandomErasing(0.25)],
    ),
    "trivial-augment": ([{"op": "trivial-augment"}], [lambda: v2.TrivialAugmentWide()]),
    "auto-augment": ([{"op": "auto-augment"}], [lambda: v2.AutoAugment()]),
    "rand-augment, erasing, mixup": (
        [{"op": "rand-augment"}, {"op": "random-erasing", "p": 0.25}, {"op": "mixup", "alpha": 0.8}],
        [lambda: v2.RandAugment(), lambda: v2.RandomErasing(0.25)],
    ),
}


class Reference(TorchDataset[Any]):
    """The images through torchvision's transforms, as a training script has them."""

    def __init__(self, data: Dataset, transform: Any) -> None:
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int]:
        if self.data.kind == "pixels":
            image = Image.fromarray(self.data.pixels([position])[0])
        else:
            image = Image.open(self.data.path(position)).convert("RGB")
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


def bench(data: Dataset, size: int, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    crop: Table = {"op": "pad-crop", "pad": 4} if size == 32 else {"op": "resized-crop"}
    rows = np.arange(min(args.images, len(data)))
    found: dict[str, Any] = {}
    passes: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for number in range(args.rounds):
        for name, (tables, transforms) in LISTS.items():
            plan = plan_with([crop, {"op": "flip"}, *tables], seed=0, size=size, flip=0.5)

            def ours(plan: Any = plan, view: int = number) -> Iterator[int]:
                with Loader(data, plan, batch_size=batch, threads=args.threads) as loader:
                    yield from (len(made) for made in loader.stream(view, rows))

            cut = v2.RandomCrop(32, 4) if size == 32 else v2.RandomResizedCrop(size, antialias=True)
            made = [transform() for transform in transforms]
            erase = [step for step in made if isinstance(step, v2.RandomErasing)]
            early = [step for step in made if step not in erase]
            transform = v2.Compose([cut, v2.RandomHorizontalFlip(), *early, v2.PILToTensor(), *erase])
            mix = v2.MixUp(alpha=0.8, num_classes=1000) if "mixup" in name else None

            def theirs(transform: Any = transform, mix: Any = mix) -> Iterator[int]:
                subset = torch.utils.data.Subset(Reference(data, transform), rows.tolist())
                # drop_last: MixUp pairs within the batch
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
    batch = 8 if args.tiny else 64
    document = {
        "bench": "augment",
        "threads": args.threads,
        "cifar_32": bench(cifar, 32, batch, args),
        "jpeg_224": bench(photos, 224, batch, args),
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
