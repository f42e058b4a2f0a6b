"""`feedfast verify`: is this cache whole, and does it still say what its teachers would say?

Log and lengths always; every byte, pixels and maps on request (`feedfast.storage.verify`, `feedfast.stages.proof`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from feedfast import recipe as recipes
from feedfast.data.dali import require_dali
from feedfast.data.dataset import ImageSource
from feedfast.errors import CacheDamageError, CacheMismatchError, RequestError
from feedfast.models.given import is_given
from feedfast.recipe import Recipe
from feedfast.stages.data import Selection
from feedfast.stages.ensemble import FrozenTeacher, Networks, teacher_from_manifest
from feedfast.stages.identity import dataset_info, refuse_differences
from feedfast.stages.proof import check_views, plan_of, recompute_teachers, replay_pixels, selection_of, source_of
from feedfast.storage import names
from feedfast.storage.log import Problem, problem
from feedfast.storage.places import place_of
from feedfast.storage.reader import CacheReader
from feedfast.storage.verify import verify_cache

log = logging.getLogger(__name__)


def run_verify(
    cache: str,
    *,
    full: bool = False,
    replay: int = 0,
    teachers_percent: float = 0.0,
    recipe: Recipe | None = None,
    train: ImageSource | None = None,
    networks: Networks | None = None,
) -> dict[str, Any]:
    """Check a cache.

    Args:
        cache: its folder, or the URL of a bucket with a prefix.
        full: read every byte and check every checksum.
        replay: blocks of pixels to decode again.
        teachers_percent: share of the rows whose maps are recomputed; needs ``recipe``, which knows the weights' files,
            unless the teachers are pretrained ones.
        recipe: where data and weights are; the manifest's own paths without it.
        train: the object that the images come from.
        networks: of teachers that need not be built.

    Returns:
        The JSON of `feedfast verify`: ``ok``, ``problems`` (array, shard, kind, detail), ``objects``, ``bytes``,
        ``replayed``, ``cosine`` (per array, smallest).
    """
    place = place_of(cache)
    if isinstance(place, Path) and not place.is_dir():
        found_there = "a file" if place.exists() else "nothing"
        raise RequestError(f"cache: expected a folder, found {found_there} at {cache}")
    if replay or teachers_percent:
        require_dali()
    problems: list[Problem] = []
    try:
        problems += verify_cache(cache, full=full)
        reader = CacheReader(cache)
    except CacheDamageError as error:
        known = problems + (error.problems or [problem("", "", "cache", str(error))])
        problems = [entry for number, entry in enumerate(known) if entry not in known[:number]]
        _tell(problems)
        return {"ok": False, "problems": problems, "objects": 0, "bytes": 0, "replayed": 0, "cosine": {}}
    replayed = 0
    cosine: dict[str, float] = {}
    if (replay or teachers_percent) and not problems:
        if recipe is not None:
            chosen = Selection.of(recipe)
        else:
            chosen = source_of(reader) if train is None else selection_of(reader)
        data = chosen.open(given=train)
        plan = plan_of(reader)
        expected = {"dataset": dataset_info(chosen, data), "num_rows": len(data)}
        try:
            refuse_differences(reader.path, reader.manifest.model_copy(update=expected), reader.manifest)
            check_views(reader, data, plan, reader.manifest.views)
            replayed = replay_pixels(reader, data, plan, blocks=replay, views=reader.manifest.views)
            if replay and not replayed:
                problems.append(problem(names.SUMS, "", "pixels", "--replay: there was nothing to compare with"))
        except CacheDamageError as error:
            problems += error.problems
        except CacheMismatchError as error:
            problems.append(problem("", "", "pixels", str(error)))
        if teachers_percent and not problems:
            loaded = _teachers(reader, () if recipe is None else recipe.teachers, networks or {})
            made = [
                f"{t.name}/{tap.name}"
                for t in reader.manifest.teachers.values()
                for tap in t.taps.values()
                if tap.factor
            ]
            if made:
                log.warning(
                    "verify: %s: not compared; factors are made from stored maps, not by teachers", ", ".join(made)
                )
            found, cosine = recompute_teachers(reader, data, plan, loaded, teachers_percent)
            problems += found
    commits = reader.log.commits
    _tell(problems)
    return {
        "ok": not problems,
        "problems": problems,
        "objects": len(commits),
        "bytes": commits.total_bytes,
        "replayed": replayed,
        "cosine": cosine,
    }


def _tell(problems: list[Problem]) -> None:
    for entry in problems:
        log.error("%s: %s %s: %s", entry["kind"], entry["array"], entry["shard"], entry["detail"])


def _teachers(reader: CacheReader, specs: Sequence[recipes.Teacher], networks: Networks) -> dict[str, FrozenTeacher]:
    """The cache's teachers; ``specs`` say where weights are, and whose code may be imported."""
    unknown = sorted(networks.keys() - reader.manifest.teachers.keys())
    if unknown:
        held = sorted(reader.manifest.teachers)
        raise RequestError(f"teachers: expected networks of {', '.join(held)}, found one of {unknown[0]!r}")
    given = {spec.name: spec for spec in specs}
    trusted = {spec.model for spec in specs}
    out = {}
    for name, info in reader.manifest.teachers.items():
        if ":" in info.model and info.model not in trusted and name not in networks:
            raise RequestError(
                f"teachers[{name}].model: {info.model!r} would import code that a cache names; "
                "give --recipe with this model in it"
            )
        try:
            out[name] = teacher_from_manifest(
                *(info, reader.manifest.plan.size, given.get(name), torch.device("cpu"), networks.get(name))
            )
        except CacheMismatchError:
            raise
        except RequestError as error:
            if name in given or is_given(info.model):
                raise
            raise RequestError(f"{error}; if its weights are in a file, give --recipe, which names it") from error
    return out
