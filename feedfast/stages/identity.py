"""What a run and a cache must agree on before one feeds the other, and the sentences when they do not.

A cache is named by its manifest. This module writes the parts of a manifest that follow from a recipe and its data,
and compares a recipe with the manifest of an existing cache: same images, same view plan, and under each teacher's
name the same model with the same weights. The student stage can do that without a teacher in memory; weights are
compared by hash where their file is still there, and trusted to the manifest where it is not.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from feedfast import recipe as recipes
from feedfast.cache.reader import CacheReader
from feedfast.cache.schema import (
    DatasetInfo,
    DecoderInfo,
    Manifest,
    PlanInfo,
    TeacherInfo,
    describe_differences,
    differences,
)
from feedfast.data.dataset import Dataset
from feedfast.data.views import ViewPlan
from feedfast.errors import CacheMismatchError
from feedfast.models.build import build_model, weights_sha256
from feedfast.stages.data import PYTHON, Selection
from feedfast.stages.inputs import teacher_input

PACKAGES = (
    "feedfast",
    "torch",
    "torchvision",
    "nvidia-dali-cuda130",
    "nvidia-nvimgcodec-cu13",
    "zarr",
    "numcodecs",
    "numpy",
)


def library_versions() -> dict[str, str | int | float | bool | None]:
    """Versions of what decides numbers, for the manifest and for messages."""
    found: dict[str, str | int | float | bool | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def dataset_info(chosen: Selection, data: Dataset) -> DatasetInfo:
    """The data as a manifest names them; ``source`` keeps the selection: a cache can then be streamed by itself."""
    python = chosen.train == PYTHON
    paths = list(PYTHON) if python else [str(Path(path).resolve()) for path in chosen.train]
    source = {"train": paths, "limit": chosen.limit, "fraction": chosen.fraction}
    if chosen.arrays:
        source["arrays"] = list(chosen.arrays)
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

    Args:
        manifest: the cache's.
        decoder: what this job's loader says of itself.
    """
    there = {**manifest.versions, **manifest.decoder.versions}
    here = {**library_versions(), **decoder_info(decoder).versions}
    both = {key: (there.get(key), here.get(key)) for key in sorted(there.keys() | here.keys())}
    return {key: (old, new) for key, (old, new) in both.items() if old != new}


def refuse_other_recipe(
    reader: CacheReader, dataset: DatasetInfo, plan: ViewPlan, data: recipes.Data, specs: Sequence[recipes.Teacher]
) -> None:
    """Raise unless ``reader``'s cache was made from these images, this plan and these teachers.

    Args:
        reader: the cache.
        dataset: the images, as `dataset_info` describes them.
        plan: their views.
        data: normalization and size of teachers that have none of their own.
        specs: the recipe's teachers.

    Raises:
        CacheMismatchError: with the differing keys in two columns.
    """
    found = reader.manifest
    teachers: dict[str, TeacherInfo] = {}
    unknown = [spec.name for spec in specs if spec.name not in found.teachers]
    if unknown:
        raise CacheMismatchError(
            f"{reader.path}: expected teachers {unknown}, found {sorted(found.teachers)}; "
            "run `feedfast cache` with this recipe to add them"
        )
    for spec in specs:
        stored = found.teachers[spec.name]
        sha, network = stored.weights_sha256, None
        if spec.weights and Path(spec.weights).is_file():
            network = build_model(
                spec.model,
                num_classes=stored.num_classes,
                weights=spec.weights,
                key=spec.key,
                prefix=spec.prefix,
            )
            sha = weights_sha256(network)
        shown = teacher_input(spec, data, network)
        own_size = 0 if shown.size == data.size else shown.size
        # Without the network its own input may not be known: then the manifest's holds where the recipe has none.
        known = network is not None or not (spec.weights or ":" in spec.model)
        own = {
            "model": spec.model,
            "weights_sha256": sha,
            "bn": spec.bn,
            "precision": spec.precision,
            "mean": shown.mean if known or spec.mean else stored.mean,
            "std": shown.std if known or spec.std else stored.std,
            "size": own_size if network is not None or spec.size else stored.size,
        }
        teachers[spec.name] = stored.model_copy(update=own)
    asked = {
        "dataset": dataset,
        "plan": plan_info(plan),
        "num_rows": dataset.count,
        "teachers": teachers,
    }
    refuse_differences(reader.path, found.model_copy(update=asked), found)


def refuse_differences(path: Path | str, expected: Manifest, found: Manifest) -> None:
    """Raise a `CacheMismatchError` with a two-column table unless the manifests describe the same values."""
    rows = differences(expected, found)
    if rows:
        raise CacheMismatchError(
            f"{path} was made from something else; choose another cache.path, or mend the recipe:\n"
            f"{describe_differences(rows)}"
        )
