"""The parts of a manifest that follow from a recipe and its data, and the table of what differs between two manifests.

A cache is named by its manifest. Whether a recipe agrees with one is asked in `feedfast.stages.agree`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from feedfast.data.dataset import Dataset
from feedfast.data.views import ViewPlan
from feedfast.errors import CacheMismatchError
from feedfast.provenance import library_versions
from feedfast.stages.data import PYTHON, Selection
from feedfast.storage.schema import (
    DatasetInfo,
    DecoderInfo,
    Manifest,
    PlanInfo,
    describe_differences,
    differences,
)

PACKAGES = (
    "feedfast",
    "torch",
    "torchvision",
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
    "nvidia-nvimgcodec-cu13",
    "nvidia-nvimgcodec-cu12",
    "numcodecs",
    "numpy",
)


def decisive_versions() -> dict[str, str | int | float | bool | None]:
    """Versions of what decides numbers, for the manifest and for messages."""
    return dict(library_versions(PACKAGES))


def dataset_info(chosen: Selection, data: Dataset) -> DatasetInfo:
    """The data as a manifest names them; ``source`` keeps the selection: a cache can then be streamed by itself."""
    python = chosen.train == PYTHON
    paths = list(PYTHON) if python else [str(Path(path).resolve()) for path in chosen.train]
    source = {"train": paths, "limit": chosen.limit, "fraction": chosen.fraction}
    if chosen.arrays:
        source["arrays"] = list(chosen.arrays)
    if chosen.task != "classify":
        source["task"] = chosen.task
    return DatasetInfo(
        kind=data.kind,
        count=len(data),
        fingerprint=data.fingerprint(),
        classes=data.classes,
        source=json.dumps(source),
        skipped=dict(data.skipped),
        id_space=int(data.ids[-1]) + 1,
    )


def plan_info(plan: ViewPlan) -> PlanInfo:
    """The plan as a manifest names it."""
    return PlanInfo(**plan.to_dict())


def decoder_info(description: Mapping[str, Any]) -> DecoderInfo:
    """The loader's description as a manifest names it."""
    versions = {key: description[key] for key in ("dali", "nvimgcodec")}
    return DecoderInfo(backend=description["backend"], flags=description["flags"], versions=versions)


def changed_versions(manifest: Manifest, decoder: Mapping[str, Any]) -> dict[str, tuple[object, object]]:
    """Library → its version when the cache was made and its version here, where they differ.

    Of what decides numbers today: caches of older versions also name libraries that decide none.

    Args:
        manifest: the cache's.
        decoder: what this job's loader says of itself.
    """
    there = {**manifest.versions, **manifest.decoder.versions}
    here = {**decisive_versions(), **decoder_info(decoder).versions}
    both = {key: (there.get(key), here.get(key)) for key in sorted(here)}
    return {key: (old, new) for key, (old, new) in both.items() if old != new}


def refuse_differences(path: Path | str, expected: Manifest, found: Manifest) -> None:
    """Raise a `CacheMismatchError` with a two-column table unless the manifests describe the same values."""
    rows = differences(expected, found)
    if rows:
        raise CacheMismatchError(
            f"{path} was made from something else; choose another cache.path, or mend the recipe:\n"
            f"{describe_differences(rows)}"
        )
