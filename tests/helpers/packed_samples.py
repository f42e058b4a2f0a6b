"""Small images in a folder of class folders, and the same bytes as tar shards, an Arrow folder and Parquet files.

Shards are written by `tarfile` and by the webdataset package, tables by Hugging Face's datasets, none by feedfast.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = ("cat", "dog", "emu")
Members = Sequence[tuple[str, bytes]]


def image_bytes(seed: int, kind: str = "JPEG", size: tuple[int, int] = (20, 24)) -> bytes:
    """A smooth random picture, height x width."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(small).resize(size[::-1], Image.Resampling.BICUBIC).save(out, kind)
    return out.getvalue()


def write_folder(root: Path, per_class: int = 4) -> Path:
    """Class folders; one file in three is a PNG, and every size is another."""
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            seed = 100 * label + number
            kind, ending = ("PNG", "png") if number % 3 == 2 else ("JPEG", "jpg")
            (root / name / f"{number:04d}.{ending}").write_bytes(image_bytes(seed, kind, (18 + number, 20 + label)))
    return root


def samples_of(root: Path) -> list[tuple[str, str, bytes, int]]:
    """Key, ending, bytes and class number of each file of `write_folder`, in the order of feedfast's ids."""
    return [
        (f"{name}-{path.stem}", path.suffix[1:], path.read_bytes(), label)
        for label, name in enumerate(CLASSES)
        for path in sorted((root / name).iterdir())
    ]


def write_tar(path: Path, members: Members, form: int = tarfile.PAX_FORMAT) -> Path:
    """A tar of some members."""
    with tarfile.open(path, "w", format=form) as out:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))
    return path


def write_shards(folder: Path, root: Path, shards: int = 2) -> list[Path]:
    """The files of a folder as tar shards with ``.cls``, by the webdataset package's own writer."""
    import webdataset

    folder.mkdir(parents=True, exist_ok=True)
    found = samples_of(root)
    size = -(-len(found) // shards)
    paths = []
    for number in range(shards):
        paths.append(folder / f"train-{number:06d}.tar")
        with webdataset.TarWriter(str(paths[-1])) as out:
            for key, ending, content, label in found[number * size : (number + 1) * size]:
                out.write({"__key__": key, ending: content, "cls": str(label).encode()})
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    return paths


def hf_dataset(root: Path, **columns: str) -> Any:
    """The files of a folder as a dataset of Hugging Face's library; ``columns`` renames image and label."""
    import datasets

    found = samples_of(root)
    image, label = columns.get("image", "image"), columns.get("label", "label")
    features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=list(CLASSES))})
    rows: Mapping[str, list[Any]] = {
        image: [{"bytes": content, "path": f"{key}.{ending}"} for key, ending, content, _ in found],
        label: [label_number for *_, label_number in found],
    }
    return datasets.Dataset.from_dict(dict(rows), features=features)


def json_member(**values: Any) -> bytes:
    """The content of a ``.json`` member."""
    return json.dumps(values).encode()
