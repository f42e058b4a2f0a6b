"""Which operations DALI runs differently on a CPU and on a GPU, and by how much.

Every operation and preset on the same rows of the same plan, once per device; bytes of the two are compared: the share
that differ, their mean difference over all bytes, the largest, and the share that differ by more than two steps of 255,
which rounding does not explain. `decoded alone` is a crop without resizing, what the decoders alone differ by, and
images that are stored as pixels (CIFAR) have no decoder in it.

    python bench/bench_backends.py [--data ../shared/data] [--devices cpu cuda] [--images 256] [--tiny]

The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from feedfast.data.augment import PRESETS, plan_with
from feedfast.data.dataset import Dataset, open_dataset
from feedfast.data.loader import Loader

# drawn for every image, so that a difference is not watered down by images that an operation left alone
STEPS: dict[str, dict[str, Any]] = {
    "brightness": {"op": "color-jitter", "brightness": 0.4},
    "contrast": {"op": "color-jitter", "contrast": 0.4},
    "saturation": {"op": "color-jitter", "saturation": 0.4},
    "hue": {"op": "color-jitter", "hue": 0.1},
    "grayscale": {"op": "grayscale", "p": 1.0},
    "gaussian-blur": {"op": "gaussian-blur", "p": 1.0},
    "solarize": {"op": "solarize", "p": 1.0},
    "random-erasing": {"op": "random-erasing", "p": 1.0},
    "rotate": {"op": "rotate", "degrees": 30.0},
    "affine": {
        "op": "affine",
        "degrees": 15.0,
        "translate": [0.1, 0.1],
        "scale": [0.8, 1.2],
        "shear": 10.0,
    },
    "rand-augment": {"op": "rand-augment"},
    "trivial-augment": {"op": "trivial-augment"},
    "auto-augment": {"op": "auto-augment"},
    "mixup": {"op": "mixup", "p": 1.0},
    "cutmix": {"op": "cutmix", "p": 1.0},
}
WINDOWS = ("pad-crop", "resized-crop", "scale-jitter", "scale-crop", "multi-crop", "flip")
BOXES: dict[str, str | list[dict[str, Any]]] = {
    "expand-crop": [{"op": "expand-crop"}],
    "photometric-distort": [{"op": "photometric-distort"}],
    "ssd": "ssd",
}
IMAGES: dict[str, str | list[dict[str, Any]]] = {
    "decoded alone": "none",
    **{name: [{"op": name}] for name in WINDOWS},
    **{name: [table] for name, table in STEPS.items()},
    **{name: name for name in PRESETS if name not in BOXES},
}


def pixels(data: Dataset, plan: Any, rows: np.ndarray[Any, Any], device: str) -> torch.Tensor:
    """uint8 [rows, H, W, 3] of view 0."""
    with Loader(data, plan, batch_size=32, device=device) as loader:
        return torch.cat([batch.images.cpu() for batch in loader.stream(0, rows)])


def compared(one: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """Of two uint8 tensors of one shape: shares in percent, differences in steps of 255."""
    apart = (one.int() - other.int()).abs()
    return {
        "differ_percent": round(100 * (apart > 0).float().mean().item(), 3),
        "mean": round(apart.float().mean().item(), 4),
        "largest": int(apart.max()),
        "over_two_percent": round(100 * (apart > 2).float().mean().item(), 4),
    }


def bench(data: Dataset, size: int, args: argparse.Namespace) -> dict[str, Any]:
    rows = np.arange(min(args.images, len(data)))
    found = {}
    for name, augment in (BOXES if data.annotations.task == "detect" else IMAGES).items():
        plan = plan_with(augment, seed=0, size=size, flip=0.5)
        found[name] = compared(*(pixels(data, plan, rows, device) for device in args.devices))
        print(f"{size:4d} px  {name:20s} {found[name]}", file=sys.stderr)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("FEEDFAST_DATA", here)))
    parser.add_argument("--devices", nargs=2, default=("cpu", "cuda"), metavar=("ONE", "OTHER"))
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--tiny", action="store_true", help="a few images, to see that it runs")
    args = parser.parse_args(argv)
    if args.tiny:
        args.images = 8
    if "cuda" in args.devices and not torch.cuda.is_available():
        parser.error("--devices: cuda: expected a GPU, found none")
    cifar = open_dataset(args.data / "cifar-100-binary" / "test.bin", limit=1 if args.tiny else 3)
    photos = open_dataset(args.data / "imagenette-small" / "train", limit=2 if args.tiny else 26)
    objects = open_dataset(args.data / "coco128" / "train.json", task="detect")
    document = {
        "bench": "backends",
        "devices": list(args.devices),
        "gpu": torch.cuda.get_device_name() if "cuda" in args.devices else None,
        "cifar_32": bench(cifar, 32, args),
        "jpeg_224": bench(photos, 224, args),
        "boxes_300": bench(objects, 300, args),
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
