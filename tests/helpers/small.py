"""Small, real worlds for the tests of whole stages: the demo's digits, and a network trained on them for a moment.

Everything here is seconds on one core; the stages themselves are the product's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from feedfast.models.build import build_model
from feedfast.recipe import Recipe, parse_recipe
from feedfast.stages.demo import load_digits, write_digits

KNOWN = ("data.mean=[0, 0, 0]", "data.std=[1, 1, 1]", "data.augment=none", "data.flip=0")
"""Overrides that show digits to a teacher of `write_teacher` as it has seen them."""


def write_teacher(
    path: Path, *, model: str = "zoo/wrn-10-1", seed: int = 0, classes: int = 10, epochs: int = 1
) -> Path:
    """Weights whose BatchNorms have seen real digits, so that maps, margins and logits are those of a live network.

    After one epoch it still guesses; with ``epochs`` around 20 it knows most digits, if they are shown as `KNOWN` says.
    """
    network = build_model(model, num_classes=classes, weights=None, seed=seed)
    scanned, answers = load_digits()
    digits = torch.tensor(scanned[:256] / 16, dtype=torch.float32)
    images = torch.nn.functional.interpolate(digits[:, None], size=16).expand(-1, 3, -1, -1)
    labels = torch.tensor(answers[:256], dtype=torch.int64)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for start in [*range(0, 256, 64)] * epochs:
        loss = torch.nn.functional.cross_entropy(network(images[start : start + 64]), labels[start : start + 64])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.save(network.state_dict(), path)
    return path


def digits_recipe(folder: Path, overrides: tuple[str, ...] = (), *, teachers: int = 2, **sections: Any) -> Recipe:
    """A recipe on 200 digits (20 a class) with ``teachers`` small teachers; files are made in ``folder`` once."""
    train, val = folder / "digits-train.npz", folder / "digits-val.npz"
    if not train.exists():
        write_digits(folder)
    names = [chr(ord("a") + number) for number in range(teachers)]
    for seed, name in enumerate(names):
        if not (folder / f"{name}.pt").exists():
            write_teacher(folder / f"{name}.pt", seed=seed)
    tree: dict[str, Any] = {
        "data": {"train": str(train), "val": str(val), "size": 16, "limit": 20, "flip": 0.5},
        "cache": {"path": str(folder / "digits.zarr"), "views": 2, "batch": 32, "pilot": 160, "shard_mb": 0.05},
        "teachers": [
            {
                "name": name,
                "model": "zoo/wrn-10-1",
                "weights": str(folder / f"{name}.pt"),
                "taps": ["final", "ofd+margin"],
            }
            for name in names
        ],
        "student": {"model": "zoo/wrn-10-1"},
        "method": {"name": "pfeed"},
        "train": {
            "epochs": 2,
            "batch": 32,
            "lr": 0.02,
            "device": "cpu",
            "out": str(folder / "student"),
            "log_every": 1,
        },
    }
    for name, section in sections.items():
        merged = isinstance(tree.get(name), dict) and isinstance(section, dict)
        tree[name] = {**tree[name], **section} if merged else section
    return parse_recipe(tree, overrides)


def as_toml(recipe: Recipe, path: Path) -> Path:
    """The recipe as a file, for a process of its own."""
    lines = [f"seed = {recipe.seed}"]
    tree = recipe.model_dump(mode="json", exclude_none=True)
    for section in ("data", "task", "cache", "student", "train", "chain"):
        lines += [f"[{section}]", *(f"{key} = {_toml(value)}" for key, value in tree[section].items())]
    for section in ("teachers", "method"):
        # one method as the table that most recipes have, so that method.name=... overrides it
        head = f"[{section}]" if section == "method" and len(tree[section]) == 1 else f"[[{section}]]"
        for entry in tree[section]:
            lines += [head, *(f"{key} = {_toml(value)}" for key, value in entry.items())]
    path.write_text("\n".join(lines))
    return path


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return repr(value) if not isinstance(value, str) else f'"{value}"'
