"""From a recipe to the source of its targets: opens the cache or loads the teachers, and refuses what does not fit.

Two steps, because source and method need each other: opening says what taps there are, a method is built for those
and says which it reads, and the source is then made of exactly these. No method is known here by its name.

A cache is checked against the recipe before anything trains: same data, same plan, same teachers with the same
weights, every needed shard present; the stored order and crops must be those of the plan; and a few blocks of
pixels are decoded again and compared with the checksums taken when the teachers saw them. Wrong numbers must not
reach a student.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from feedfast.cache.reader import CacheReader
from feedfast.data.dataset import Dataset
from feedfast.data.loader import Loader
from feedfast.data.views import ViewPlan
from feedfast.errors import CacheMismatchError, RequestError
from feedfast.methods import TapInfo, taps_needed
from feedfast.recipe import Recipe
from feedfast.stages.audit import check_views, replay_pixels
from feedfast.stages.ensemble import LOGITS, load_teachers, method_taps
from feedfast.stages.identity import refuse_other_recipe
from feedfast.stages.pilot import pilot_pixels
from feedfast.stages.targets import CachedTargets, LiveTargets, NoTargets, TargetSource, manifest_taps


@dataclass(frozen=True)
class OpenedSource:
    """What a method can be built for, before anything is read for it.

    Attributes:
        taps: teacher → tap → what a method needs to know of it; the recipe's teachers, in the recipe's order.
        views: how many views the epochs run through; 0 = a new one every epoch.
        num_classes: of the teachers' logits; 0 = unknown.
        select: makes the source of these taps of every teacher, ready to stream.
    """

    taps: Mapping[str, Mapping[str, TapInfo]]
    views: int
    num_classes: int
    select: Callable[[Sequence[str]], TargetSource]


def open_source(recipe: Recipe, data: Dataset, plan: ViewPlan, device: torch.device) -> OpenedSource:
    """The source that ``train.source`` names.

    Raises:
        RequestError, CacheMismatchError, CacheDamageError: see `run_train`. ``select`` raises them too.
    """
    kind = recipe.train.source
    if kind == "none":
        if recipe.method.name != "none":
            raise RequestError(
                f"train.source: method {recipe.method.name!r} needs targets, expected cache or live, found 'none'"
            )
        return OpenedSource({}, recipe.cache.views, 0, lambda taps: NoTargets())
    if kind == "live":
        teachers = load_teachers(recipe, len(data.classes), device)
        pilot: list[Tensor] = []
        if any(teacher.needs_pilot for teacher in teachers.values()):
            # Cut as the caching pass cuts them: both sources then have the same margins.
            batch, threads = recipe.cache.batch, recipe.data.threads or None
            with Loader(data, plan, batch_size=batch, device=str(device), threads=threads) as cutter:
                pilot, _ = pilot_pixels(cutter, recipe.cache.pilot)
        for teacher in teachers.values():
            teacher.fit_margins(pilot)
        classes = next((teacher.shapes[LOGITS][0] for teacher in teachers.values()), 0)
        return OpenedSource(method_taps(teachers), recipe.cache.views, classes, lambda taps: LiveTargets(teachers))
    return _open_cached(recipe, data, plan, device)


def _open_cached(recipe: Recipe, data: Dataset, plan: ViewPlan, device: torch.device) -> OpenedSource:
    if not recipe.cache.path:
        raise RequestError("cache.path: required with train.source='cache', found nothing")
    reader = CacheReader(recipe.cache.path, threads=recipe.cache.threads)
    refuse_other_recipe(reader, recipe, data, plan)
    views = recipe.cache.views or reader.manifest.views
    if views > reader.manifest.views:
        raise CacheMismatchError(
            f"cache.views: expected at most the {reader.manifest.views} views of {reader.path}, found {views}; "
            "run `feedfast cache` to add them"
        )
    names = [teacher.name for teacher in recipe.teachers] or list(reader.manifest.teachers)
    cached = manifest_taps(reader.manifest)
    have = {name: cached[name] for name in names}
    for name, infos in have.items():
        for group in taps_needed(recipe.method.name):
            if not any(tap == group or (group == "ofd" and tap.startswith("ofd")) for tap in infos):
                raise CacheMismatchError(
                    f"{reader.path}: method {recipe.method.name!r} needs the {group!r} taps of teacher {name!r}, "
                    f"found {sorted(infos)}; run `feedfast cache` with this recipe to add them"
                )

    def select(taps: Sequence[str]) -> TargetSource:
        source = CachedTargets(reader, dict.fromkeys(names, tuple(taps)), device) if taps else NoTargets()
        arrays = source.arrays if isinstance(source, CachedTargets) else []
        reader.require([*arrays, "views/order", "views/crop", "views/flip", "labels"], range(views))
        check_views(reader, data, plan, views)
        replay_pixels(reader, data, plan, blocks=recipe.train.replay, views=views, seed=recipe.seed)
        return source

    classes = next((reader.manifest.teachers[name].num_classes for name in names), 0)
    return OpenedSource(have, views, classes, select)
