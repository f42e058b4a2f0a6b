"""Every command as a function: the same words, the same document, as a frozen dataclass.

    import feedfast

    made = feedfast.cache("recipe.toml", {"cache.views": 2})
    trained = feedfast.fit("recipe.toml", student=network)

The command line calls these functions and prints what they return. A request that is wrong raises a `RequestError`, a
job that breaks off another `FeedfastError`; a check that is not passed, or a sweep with runs that failed, is no error
here: the document says it. Stages are imported inside the functions, as `import feedfast` must cost nothing.
"""

from __future__ import annotations

from typing import Any

from feedfast.arguments import Overrides, RecipeLike, asked
from feedfast.documents import CacheDocument, TrainDocument, document_of


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
) -> CacheDocument:
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
        >>> made = feedfast.cache("recipe.toml", {"cache.views": 2})
        >>> made.complete, made.teachers["a"].top1
    """
    given = asked(
        recipe,
        overrides,
        data=data,
        teachers=teachers,
        cache=cache,
        task=task,
        student=student,
        method=method,
        train=train,
        seed=seed,
    )
    from feedfast.stages.offline import run_cache

    found = run_cache(given.recipe, train=given.train, check=check)
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
) -> TrainDocument:
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
        >>> trained = feedfast.fit("recipe.toml", student=network, train={"epochs": 5, "out": "runs/mine"})
        >>> trained.val_accuracy, trained.out
    """
    given = asked(
        recipe,
        overrides,
        data=data,
        teachers=teachers,
        cache=cache,
        task=task,
        student=student,
        method=method,
        train=train,
        seed=seed,
    )
    from feedfast.stages.student import run_train

    return document_of(TrainDocument, run_train(given.recipe, train=given.train, val=given.val))


train = fit
