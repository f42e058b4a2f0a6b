"""The unharmed world that is mutated: data of several kinds, a teacher, a cache, a run that stands in its middle.

Its commands are run on it first: they must end well, and their numbers are what mutated worlds are held to.
"""

from __future__ import annotations

import gzip
import pickle
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

from small import as_toml, digits_recipe

CACHE = ("cache.pilot=32", "cache.batch=16", "cache.shard_mb=0.01")
SHORT = ("train.batch=16", "train.device=cpu", "data.threads=1", "data.size=16", "student.model=zoo/wrn-10-1")
PLAIN = ("train.source=none", "method.name=none", "train.max_steps=1", "overwrite=true", "data.val=[]", *SHORT)
# Of a mutated recipe: what a person may ask for, and wait for, is not what is tested.
CHEAP = (*SHORT, *CACHE, "train.max_steps=1", "train.epochs=1", "train.steps=0", "train.threads=1", "cache.threads=2",
         "student.branches=1", "train.compile=false", "train.replay=1", "teachers.0.model=zoo/wrn-10-1",
         "train.checkpoint_minutes=10", "overwrite=true")  # fmt: skip
TRAIN = ("train", "recipe.toml", "method.name=ofd", "train.log_every=1", *SHORT, *CACHE)
VERIFY = ("verify", "digits.zarr", "--full", "--replay", "1", "--recipe", "recipe.toml")


@dataclass(frozen=True)
class Target:
    """A kind of file: which ones (patterns below the world), what they hold, what is run, whose numbers must stay."""

    files: tuple[str, ...]
    content: str  # bytes, json, lines, toml, torch
    commands: tuple[tuple[str, ...], ...]
    same: tuple[bool, ...]


TARGETS = {
    "recipe": Target(("recipe.toml",), "toml", (("train", "recipe.toml", *CHEAP),), (False,)),
    "manifest": Target(
        ("digits.zarr/zarr.json",), "json", (VERIFY, ("inspect", "digits.zarr"), (*TRAIN, "overwrite=true")),
        (False, False, True),
    ),
    "log": Target(
        ("digits.zarr/commits/*.jsonl",), "lines",
        (VERIFY, ("inspect", "digits.zarr"), (*TRAIN, "overwrite=true"), ("cache", "recipe.toml", *CACHE)),
        (False, False, True, True),
    ),
    "object": Target(
        ("digits.zarr/*/*/c/*", "digits.zarr/*/*/*/c/**/*"), "bytes", (VERIFY, (*TRAIN, "overwrite=true")),
        (False, True),
    ),
    "metadata": Target(
        ("digits.zarr/*/zarr.json", "digits.zarr/**/zarr.json"), "json", (VERIFY, (*TRAIN, "overwrite=true")),
        (False, True),
    ),
    "checkpoint": Target(("student/checkpoint.pt",), "torch", (TRAIN,), (True,)),
    "run": Target(
        ("student/recipe.json", "student/result.json", "student/metrics.jsonl"), "json", (TRAIN,), (True,)
    ),
    "weights": Target(("a.pt",), "torch", (("cache", "recipe.toml", *CACHE, "cache.path=new.zarr", "cache.views=1"),),
                      (True,)),
    "npz": Target(("digits-train.npz",), "npz", ((*TRAIN, "overwrite=true"), ("train", "recipe.toml", *PLAIN)),
                  (True, False)),
    "images": Target(("images/*/*",), "bytes", (("train", "recipe.toml", "data.train=images", "data.limit=0", *PLAIN),
                                                ("train", "recipe.toml", "data.train=images", "data.limit=0",
                                                 "data.check=full", *PLAIN)), (False, False)),
    "idx": Target(("mnist/*",), "bytes", (("train", "recipe.toml", "data.train=mnist/train-images-idx3-ubyte.gz",
                                           *PLAIN),), (False,)),
    "pickles": Target(("cifar-10-batches-py/*",), "bytes",
                      (("train", "recipe.toml", "data.train=cifar-10-batches-py", *PLAIN),), (False,)),
    "cifar": Target(("cifar/*",), "bytes", (("train", "recipe.toml", "data.train=cifar/data_batch_1.bin", *PLAIN),),
                    (False,)),
}  # fmt: skip


def make_world(folder: Path) -> None:
    """Everything but what the commands themselves make."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    recipe = digits_recipe(
        folder, (), teachers=1, data={"limit": 6}, train={"epochs": 1, "replay": 1}, cache={"shard_mb": 0.01}
    )
    as_toml(recipe, folder / "recipe.toml")
    # relative paths: the world is copied from place to place
    text = (folder / "recipe.toml").read_text().replace(f"{folder}/", "")
    (folder / "recipe.toml").write_text(text)
    rng = np.random.default_rng(0)
    for label in range(2):
        place = folder / "images" / f"class{label}"
        place.mkdir(parents=True)
        for number, (name, mode) in enumerate((("a.png", "RGB"), ("b.jpg", "RGB"), ("c.png", "L"), ("d.jpeg", "L"),
                                               ("e.png", "P"), ("h.webp", "RGB"), ("g.jpg", "RGB"), ("i.bmp", "RGB"),
                                               ("j.tif", "RGB"), ("k.jp2", "RGB"), ("l.ppm", "RGB"))):  # fmt: skip
            pixels = rng.integers(0, 256, (20 + number, 24, 3), dtype=np.uint8)
            options = {"progressive": True} if name == "g.jpg" else {}
            Image.fromarray(pixels).convert(mode).save(place / name, **options)
        for number in range(2):
            shutil.copy(place / "a.png", place / f"z{number}.png")
    mnist = folder / "mnist"
    mnist.mkdir()
    images, labels = rng.integers(0, 256, (40, 16, 16), dtype=np.uint8), rng.integers(0, 10, 40).astype(np.uint8)
    head = np.array([0x803, 40, 16, 16], ">u4").tobytes()
    (mnist / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + images.tobytes(), mtime=0))
    (mnist / "train-labels-idx1-ubyte").write_bytes(np.array([0x801, 40], ">u4").tobytes() + labels.tobytes())
    cifar = folder / "cifar"
    cifar.mkdir()
    python = folder / "cifar-10-batches-py"
    python.mkdir()
    for number in range(1, 6):
        batch = {b"data": rng.integers(0, 256, (8, 3072), dtype=np.uint8), b"labels": list(range(8))}
        (python / f"data_batch_{number}").write_bytes(pickle.dumps(batch, protocol=2))
    (python / "batches.meta").write_bytes(
        pickle.dumps({b"label_names": [b"kind%d" % n for n in range(10)]}, protocol=2)
    )
    records = rng.integers(0, 256, (20, 3073), dtype=np.uint8)
    records[:, 0] = np.arange(20) % 10
    (cifar / "data_batch_1.bin").write_bytes(records.tobytes())
    (cifar / "batches.meta.txt").write_text("".join(f"kind{n}\n" for n in range(10)))


SETUP = (("cache", "recipe.toml", *CACHE), (*TRAIN, "train.max_steps=2"))
