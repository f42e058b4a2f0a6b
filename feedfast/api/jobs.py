"""The commands that do something as functions: plan, cache, train, sweep, chain, factors, copy, demo.

Each returns the document of its command. Stages are imported inside the functions: importing this costs nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feedfast.api.paths import PathLike, path_of, place_text
from feedfast.arguments import Overrides, RecipeLike, asked, override_texts
from feedfast.errors import RequestError

if TYPE_CHECKING:
    from feedfast import documents


def cache(
    recipe: RecipeLike | None = None,
    overrides: Overrides = (),
    *,
    data: Any = None,
    teachers: Any = None,
    cache: Any = None,
    task: Any = None,
    student: Any = None,
    method: Any = None,
    train: Any = None,
    seed: int | None = None,
    check: bool = True,
    engine: str | None = None,
    workers: int | str | None = None,
    part: str | None = None,
) -> documents.CacheDocument:
    """Run the teachers once over every view and write the cache; resumes by itself.

    Args:
        recipe: a TOML file, a `Recipe`, or its tables as nested mappings; None = the tables below are all.
        overrides: dotted keys of the recipe, applied last: ``{"cache.views": 2}`` or ``("cache.views=2",)``.
        data: keys of [data]: a mapping, or ``data.train`` alone. ``train`` and ``val`` are paths, or torch Datasets
            of images (PIL images, uint8 arrays [H, W, 3] or uint8 tensors [3, H, W]) and class numbers.
        teachers: name → network, name of a network, or keys of its [[teachers]] table; or a list of whole tables. A
            network is an `nn.Module`; it is copied, and left as it is.
        cache: keys of [cache], or ``cache.path`` alone.
        task: keys of [task], or ``task.name`` alone.
        student: keys of [student], or ``student.model`` alone: the network that the cache must be usable for.
        method: keys of [method], or ``method.name`` alone, or a list of tables.
        train: keys of [train]: ``device``, ``threads``.
        seed: of the views.
        check: refuse before the first row what the recipe's own student could not use.
        engine: "ray" = actors of a Ray cluster; None = this process.
        workers: of the engine: how many actors, or "MIN-MAX".
        part: i/n, which part of the cache this job writes; None = as the recipe says.

    Raises:
        RequestError: the recipe cannot be run.
        CacheMismatchError: ``cache.path`` holds a cache of something else.
        FeedfastError: a teacher's map is not finite, or the disk is full.

    Example:
        >>> made = feedfast.cache("recipe.toml", {"cache.views": 1}, teachers={"a": network})
        >>> made.complete, list(made.teachers)
        (True, ['a'])
    """
    if engine not in (None, "ray"):
        raise RequestError(f'engine: expected "ray" or None, found {engine!r}')
    if engine is None and workers is not None:
        raise RequestError(f'workers: expected engine="ray", whose workers they are, found {workers!r} alone')
    given = asked(
        recipe, overrides, data=data, teachers=teachers, cache=cache, task=task, student=student, method=method,
        train=train, seed=seed, part=part,
    )  # fmt: skip
    from feedfast.documents import CacheDocument, document_of

    if engine == "ray":
        given.refuse_objects("an engine of several processes")
        from feedfast.stages.offline_ray import run_cache_ray

        found = run_cache_ray(given.recipe, workers=str(workers or ""), check=check)
    else:
        from feedfast.stages.offline import run_cache

        objects = {"train": given.train, "teachers": given.teachers, "student": given.student}
        found = run_cache(given.recipe, **objects, check=check)
    return document_of(CacheDocument, found)


def fit(
    recipe: RecipeLike | None = None,
    overrides: Overrides = (),
    *,
    data: Any = None,
    teachers: Any = None,
    student: Any = None,
    method: Any = None,
    cache: Any = None,
    task: Any = None,
    train: Any = None,
    seed: int | None = None,
) -> documents.TrainDocument:
    """Train a student from the cache, with live teachers, or plainly; resumes by itself. What `feedfast train` does.

    Args:
        recipe: a TOML file, a `Recipe`, or its tables as nested mappings; None = the tables below are all.
        overrides: dotted keys of the recipe, applied last: ``{"train.epochs": 5}`` or ``("train.epochs=5",)``.
        data: as of `cache`.
        teachers: as of `cache`.
        student: an `nn.Module`, which is trained where it is and saved as ``student.pt``; or the name of a network, or
            keys of [student].
        method: keys of [method], or ``method.name`` alone, or a list of tables.
        cache: keys of [cache], or ``cache.path`` alone.
        task: keys of [task], or ``task.name`` alone.
        train: keys of [train], or ``train.out`` alone, the folder of the run.
        seed: of the views.

    Raises:
        RequestError: the recipe cannot be run, or ``train.out`` holds another run.
        CacheMismatchError, CacheDamageError: the cache is not the recipe's, or is incomplete or damaged.
        FeedfastError: the loss is no longer finite.

    Example:
        >>> trained = feedfast.fit("recipe.toml", student=student, train={"max_steps": 2, "out": "runs/mine"})
        >>> trained.steps, trained.out
        (2, 'runs/mine')
    """
    given = asked(
        recipe, overrides, data=data, teachers=teachers, student=student, method=method, cache=cache, task=task,
        train=train, seed=seed,
    )  # fmt: skip
    from feedfast.documents import TrainDocument, document_of
    from feedfast.stages.student import run_train

    found = run_train(given.recipe, train=given.train, val=given.val, teachers=given.teachers, student=given.student)
    return document_of(TrainDocument, found)


train = fit


def plan(
    recipe: RecipeLike | None = None, overrides: Overrides = (), *, check: bool = True, **tables: Any
) -> documents.PlanDocument:
    """Bytes, time, free disk, break-even and use of a cache, before it is made.

    Args:
        recipe: as of `cache`.
        overrides: as of `cache`.
        check: refuse what the recipe's own student could not use.
        tables: as of `cache`: ``data``, ``teachers``, ``cache``, ``student``, ``method``, …

    Returns:
        The document; ``fits`` says whether there is room.

    Example:
        >>> feedfast.plan("recipe.toml", {"cache.views": 8}).fits
        True
    """
    given = asked(recipe, overrides, **tables)
    from feedfast.documents import PlanDocument, document_of
    from feedfast.stages.plan import run_plan

    objects = {"train": given.train, "teachers": given.teachers, "student": given.student}
    return document_of(PlanDocument, run_plan(given.recipe, **objects, check=check))


def sweep(
    recipe: RecipeLike | None = None,
    overrides: Overrides = (),
    *,
    set: Mapping[str, Iterable[Any]] | Sequence[str],
    jobs: int = 1,
    out: PathLike = "runs/sweep",
    baseline: str | None = None,
    **tables: Any,
) -> documents.SweepDocument:
    """Train every combination of ``set`` over one cache, then compare; resumes by itself.

    Args:
        recipe: as of `cache`; all it names must be names, not objects.
        overrides: as of `cache`; for all runs.
        set: dotted key → values; several make a grid. Or ``("method.name=kd,ofd", "seed=0:3")``.
        jobs: runs at a time; they share cores and GPUs.
        out: folder of the runs and of ``compare.html``.
        baseline: the row that the others are compared with; None = the plain student.
        tables: as of `cache`.

    Returns:
        The document; ``failed`` names the runs that did.

    Example:
        >>> swept = feedfast.sweep("recipe.toml", set={"method.name": ["none", "kd"], "seed": range(2)})
        >>> swept.done, [group.name for group in swept.compare.groups if group.baseline]
        (4, ['kd'])
    """
    from feedfast.documents import SweepDocument, document_of
    from feedfast.stages.sweep import recipe_file, run_sweep

    folder = path_of(out)
    if isinstance(recipe, str | os.PathLike) and not any(value is not None for value in tables.values()):
        file = Path(recipe)
    else:
        given = asked(recipe, **tables)
        given.refuse_objects("each run of a sweep")
        file = recipe_file(given.recipe, folder)
    axes = override_texts(set, several=True)
    found = run_sweep(file, axes, override_texts(overrides), out=folder, jobs=jobs, baseline=baseline)
    return document_of(SweepDocument, found)


def chain(recipe: RecipeLike | None = None, overrides: Overrides = (), **tables: Any) -> documents.ChainDocument:
    """Train generations of students, each taught by the one before, over one cache; resumes by itself.

    Args:
        recipe: as of `cache`; all it names must be names, not objects.
        overrides: as of `cache`.
        tables: as of `fit`; ``chain=3`` are three generations.

    Example:
        >>> trained = feedfast.chain("recipe.toml", chain=2, method="ban", train="runs/chain")
        >>> [generation.out for generation in trained.generations]
        ['runs/chain/generation-1', 'runs/chain/generation-2']
    """
    given = asked(recipe, overrides, **tables)
    given.refuse_objects("each generation of a chain")
    from feedfast.documents import ChainDocument, document_of
    from feedfast.stages.chain import run_chain

    return document_of(ChainDocument, run_chain(given.recipe))


def factors(recipe: RecipeLike | None = None, overrides: Overrides = (), **tables: Any) -> documents.FactorsDocument:
    """Train a paraphraser per teacher over the cache's final maps and add its factors as the tap ``factor``.

    Args:
        recipe: as of `cache`.
        overrides: as of `cache`.
        tables: as of `cache`.

    Example:
        >>> feedfast.factors("recipe.toml", method={"name": "ft", "paraphraser_epochs": 1}).taps["a/factor"].codec
        'u8'
    """
    given = asked(recipe, overrides, **tables)
    from feedfast.documents import FactorsDocument, document_of
    from feedfast.stages.factors import run_factors

    return document_of(FactorsDocument, run_factors(given.recipe))


def copy(source: PathLike, target: PathLike) -> documents.CopyDocument:
    """Copy a cache to or from a bucket, or between folders; verified on the way, continues by itself.

    Args:
        source: a folder, or s3://…, gs://… or az://….
        target: likewise; empty, or an earlier copy of the same cache.

    Example:
        >>> copied = feedfast.copy("runs/c100.zarr", "runs/copied.zarr")  # or to s3://bucket/c100.zarr
        >>> copied.digest == feedfast.inspect("runs/c100.zarr").digest
        True
    """
    from feedfast.documents import CopyDocument, document_of
    from feedfast.stages.copying import run_copy

    return document_of(CopyDocument, run_copy(place_text(source), place_text(target)))


def demo(out: PathLike = "runs/demo", *, overwrite: bool = False) -> documents.DemoDocument:
    """Run the whole pipeline on handwritten digits: teachers, cache, four students, a report. No download, no GPU.

    Args:
        out: folder for the cache, the runs and ``report.html``.
        overwrite: start afresh instead of resuming.

    Example:
        >>> feedfast.demo("runs/demo").report  # doctest: +SKIP
        'runs/demo/report.html'
    """
    from feedfast.documents import DemoDocument, document_of
    from feedfast.stages.demo import run_demo

    return document_of(DemoDocument, run_demo(path_of(out), overwrite=overwrite))
