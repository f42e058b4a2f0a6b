"""How far pixels decoded on the GPU are from those decoded on the CPU, on real photographs; one JSON document.

    python tools/compare_decode.py ../shared/data

Each case is a folder under a view plan or under evaluation. Both loaders are given the same plan, so every difference
is one of decoding and resampling. Differences are in steps of 255, over all samples and channels: the largest, the
mean, the share of values that differ by more than one, and the image that is off most. Exit code 2 where there is no
GPU: nothing is measured then, and nothing is claimed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from feedfast.data.dataset import open_dataset
from feedfast.data.loader import Loader
from feedfast.data.views import ViewPlan

CASES: tuple[tuple[str, str, int, str], ...] = (
    ("photos, training crops", "photos-varied", 0, "resized-crop-flip"),
    ("photos, evaluation", "photos-varied", 0, "none"),
    ("imagenette, training crops", "imagenette-small/train", 16, "resized-crop-flip"),
    ("imagenette, evaluation (no resize)", "imagenette-small/val", 16, "none"),
)


def compare(one: Loader, two: Loader) -> dict[str, Any]:
    """Pixels of view 0 of the same images from both loaders, sample by sample."""
    data = one.dataset
    rows = np.arange(len(data))
    largest, total, beyond, values = 0, 0.0, 0, 0
    worst = (-1.0, "")
    for ours, theirs in zip(one.stream(0, rows), two.stream(0, rows), strict=True):
        off = (ours.images.cpu().int() - theirs.images.cpu().int()).abs()
        largest, total = max(largest, int(off.max())), total + float(off.double().sum())
        beyond, values = beyond + int((off > 1).sum()), values + off.numel()
        mean_N = off.double().mean((1, 2, 3))
        at = int(mean_N.argmax())
        position = int(np.searchsorted(data.ids, ours.ids[at]))
        worst = max(worst, (float(mean_N[at]), data.name(position)))
    return {
        "images": len(data),
        "max": largest,
        "mean": total / values,
        "share_beyond_1": beyond / values,
        "worst_image": worst[1],
        "worst_image_mean": worst[0],
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the real images (photos-varied, imagenette-small)")
    parser.add_argument("--devices", nargs=2, default=("cpu", "cuda"), help="the two loaders to compare")
    parser.add_argument("--size", type=int, default=224)
    args = parser.parse_args(argv)
    if "cuda" in "".join(args.devices) and not torch.cuda.is_available():
        print("error: torch sees no CUDA GPU here; nothing was compared", file=sys.stderr)
        return 2
    missing = sorted({folder for _, folder, _, _ in CASES if not (args.data / folder).is_dir()})
    if missing:
        print(f"error: expected {', '.join(missing)} in {args.data}, found nothing there", file=sys.stderr)
        return 2
    cases, loaders = {}, []
    for name, folder, limit, augment in CASES:
        plan = ViewPlan(0, args.size, augment)  # type: ignore[arg-type]
        data = open_dataset(str(args.data / folder), limit=limit)
        loaders = [Loader(data, plan, batch_size=16, device=device) for device in args.devices]
        cases[name] = compare(*loaders)
        print(f"{name}: max {cases[name]['max']}, mean {cases[name]['mean']:.3f}", file=sys.stderr, flush=True)
    document = {
        "size": args.size,
        "devices": list(args.devices),
        "loaders": [loader.describe() for loader in loaders],
        "cases": cases,
    }
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
