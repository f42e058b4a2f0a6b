"""Scenes of squares and discs with masks and boxes, and small dense networks: worlds for segmentation and detection.

A scene is 40 to 72 pixels per side; its ground is class 0, squares are class 1, discs class 2, their rims are ignored.
As boxes squares are class 0 and discs class 1. The networks have ``layer1`` to ``layer3``, so taps are found as in any
ResNet.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from feedfast.recipe import Recipe, parse_recipe

CLASSES = ("ground", "square", "disc")


def write_scenes(folder: Path, *, train: int = 24, val: int = 8) -> None:
    """``folder``/train and /val with images/, masks/ and boxes.json."""
    rng = np.random.default_rng(7)
    for split, count in (("train", train), ("val", val)):
        for name in ("images", "masks"):
            (folder / split / name).mkdir(parents=True)
        (folder / split / "classes.txt").write_text("\n".join(CLASSES) + "\n")
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number in range(count):
            height, width = (int(side) for side in rng.integers(40, 73, size=2))
            pixels = rng.integers(90, 130, size=(height, width, 3)).astype(np.uint8)
            mask = np.zeros((height, width), np.uint8)
            for kind in (1, 2):
                side = int(rng.integers(14, 22))
                top, left = (int(rng.integers(0, extent - side)) for extent in (height, width))
                y, x = np.mgrid[:side, :side] - (side - 1) / 2
                shape = np.ones((side, side), bool) if kind == 1 else x**2 + y**2 <= (side / 2) ** 2
                window = np.s_[top : top + side, left : left + side]
                pixels[window][shape] = (220, 40, 40) if kind == 1 else (40, 200, 60)
                mask[window][shape] = kind
                rim = shape & ((abs(x) > side / 2 - 1) | (abs(y) > side / 2 - 1))
                mask[window][rim] = 255
                box = {"bbox": [left, top, side, side], "area": side * side, "iscrowd": 0}
                annotations.append({"id": len(annotations) + 1, "image_id": number, "category_id": kind, **box})
            name = f"{number:03d}.png"
            Image.fromarray(pixels).save(folder / split / "images" / name)
            Image.fromarray(mask).save(folder / split / "masks" / name)
            images.append({"id": number, "file_name": f"images/{name}", "width": width, "height": height})
        categories = [{"id": kind, "name": CLASSES[kind]} for kind in (1, 2)]
        document = {"images": images, "annotations": annotations, "categories": categories}
        (folder / split / "boxes.json").write_text(json.dumps(document))


def _layer(inputs: int, outputs: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class Trunk(nn.Module):
    """Three layers of stride 2 each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer1, self.layer2, self.layer3 = _layer(3, width), _layer(width, 2 * width), _layer(2 * width, 4 * width)

    def maps(self, images: Tensor) -> Tensor:
        """The last map, stride 8."""
        out: Tensor = self.layer3(self.layer2(self.layer1(images)))
        return out


class Segmenter(Trunk):
    """Logits [B, K, h, w] at stride 8."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__(width)
        self.head = nn.Conv2d(4 * width, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(self.maps(images))
        return out


class Detector(Trunk):
    """Two default boxes of 16 and 24 pixels at every place of stride 8."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__(width)
        self.outputs = num_classes + 1
        self.kinds = nn.Conv2d(4 * width, 2 * self.outputs, 3, padding=1)
        self.moves = nn.Conv2d(4 * width, 2 * 4, 3, padding=1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.maps(images)
        rows, columns = maps.shape[2:]
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        centers = (torch.stack([x, y], 2).reshape(-1, 1, 2) + 0.5) * 8
        half = torch.tensor([8.0, 12.0]).reshape(1, 2, 1).expand(rows * columns, 2, 2)
        anchors = torch.cat([centers - half, centers + half], 2).reshape(-1, 4).to(images.device)

        def flat(out: Tensor, count: int) -> Tensor:
            return out.permute(0, 2, 3, 1).reshape(len(images), -1, count)

        kinds, moves = flat(self.kinds(maps), self.outputs), flat(self.moves(maps), 4)
        return {"cls_logits": kinds, "bbox_regression": moves, "anchors": anchors}


def small_segmenter(num_classes: int = 3) -> Segmenter:
    return Segmenter(num_classes, 8)


def wide_segmenter(num_classes: int = 3) -> Segmenter:
    return Segmenter(num_classes, 12)


def small_detector(num_classes: int = 2) -> Detector:
    return Detector(num_classes, 8)


def wide_detector(num_classes: int = 2) -> Detector:
    return Detector(num_classes, 12)


DATA = {"segment": ("train", "val"), "detect": ("train/boxes.json", "val/boxes.json")}
AUGMENT = {"segment": "deeplab", "detect": "ssd"}


def dense_recipe(folder: Path, task: str, overrides: tuple[str, ...] = (), **sections: Any) -> Recipe:
    """A recipe on the scenes with one teacher; scenes and its weights are made in ``folder`` once."""
    if not (folder / "train").exists():
        write_scenes(folder)
    kind = "segmenter" if task == "segment" else "detector"
    weights = folder / f"{kind}.pt"
    if not weights.exists():
        torch.manual_seed(3)
        network = wide_segmenter() if task == "segment" else wide_detector()
        network.train()(torch.randn(8, 3, 48, 48))  # so that running statistics are somebody's
        torch.save(network.state_dict(), weights)
    train, val = (str(folder / name) for name in DATA[task])
    teacher = {"name": "wide", "model": f"scenes:wide_{kind}", "weights": str(weights), "taps": ["ofd+margin"]}
    tree: dict[str, Any] = {
        "data": {"train": train, "val": val, "size": 48, "augment": AUGMENT[task]},
        "task": {"name": task},
        "cache": {"path": str(folder / f"{task}.zarr"), "views": 2, "batch": 8, "pilot": 16, "shard_mb": 0.05},
        "teachers": [teacher],
        "student": {"model": f"scenes:small_{kind}"},
        "method": {"name": "ofd"},
        "train": {
            "epochs": 2, "batch": 8, "lr": 0.02, "device": "cpu", "out": str(folder / "student"), "log_every": 1,
        },
    }  # fmt: skip
    for name, section in sections.items():
        merged = isinstance(tree.get(name), dict) and isinstance(section, dict)
        tree[name] = {**tree[name], **section} if merged else section
    return parse_recipe(tree, overrides)
