"""A chain of students: each is trained, added to the cache as a teacher, and teaches the next (`sfeed`, `ban`).

    generation 1: plain, or from the recipe's one teacher
    generation k: its only teacher is generation k - 1, whose targets are added to the recipe's cache

Every link is a stage of its own that resumes by itself, so a chain needs no state: the same command walks it again,
finds what is done, and goes on. All generations stay in the cache and in folders of their own.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from feedfast.data.dali import require_dali
from feedfast.errors import RequestError
from feedfast.recipe import Recipe, parse_recipe
from feedfast.report.loggers import pick_loggers
from feedfast.stages.data import Selection
from feedfast.stages.folder import ensure_dir
from feedfast.stages.offline import run_cache
from feedfast.stages.student import run_train
from feedfast.stages.trainee import method_entries, names_of, needs_of
from feedfast.stages.usable import refuse_unusable_generations
from feedfast.stages.worker import Worker

log = logging.getLogger(__name__)


def run_chain(recipe: Recipe) -> dict[str, Any]:
    """Train the recipe's ``chain.generations`` students, one after the other.

    Returns:
        The JSON of `feedfast chain`: ``generations`` (the JSON of `feedfast train` of each), ``val_accuracy`` and
        ``final_loss`` of the last, ``method``, ``cache`` and ``out``.

    Raises:
        RequestError: the recipe is no chain. Otherwise as `run_cache` and `run_train`.
    """
    links = chain_recipes(recipe)
    require_dali()
    pick_loggers(recipe.train.loggers)  # refused before the first generation, not by it
    world = Worker.from_env().world
    if world > 1:
        raise RequestError(f"chain: expected one process, found {world} ranks; run its stages with torchrun one by one")
    classes = len(Selection.of(recipe).open(recipe.data.check).classes)
    if classes:  # without labels the first generation ends at once, and says so
        refuse_unusable_generations(links[1], classes)
    ensure_dir(Path(recipe.train.out), "train.out")
    results: list[dict[str, Any]] = []
    for number, link in enumerate(links, start=1):
        taught = link.teachers[0].name if link.teachers else "nobody"
        log.info("chain: generation %d of %d, taught by %s", number, len(links), taught)
        if link.train.source == "cache" and link.teachers:
            run_cache(link, whole=True)  # of an array of chains each is its own
        results.append(run_train(link))
    return {
        "generations": results,
        "val_accuracy": results[-1].get("val_accuracy"),
        "final_loss": results[-1]["final_loss"],
        "method": names_of(method_entries(recipe.method)),
        "cache": recipe.cache.path,
        "out": recipe.train.out,
    }


def chain_recipes(recipe: Recipe) -> list[Recipe]:
    """The recipe of every generation.

    Each starts from a seed of its own (``train.seed`` + k - 1), because a student that starts where its teacher did
    is no new generation. Names and folders are ``generation-1`` and so on.

    Raises:
        RequestError: fewer than two generations, more than one teacher, a student of branches, or a method that learns
            from nobody.
    """
    count = recipe.chain.generations
    if count < 2:
        raise RequestError(f"chain.generations: expected 2 or more, found {count}")
    if len(recipe.teachers) > 1:
        raise RequestError(
            f"teachers: a chain begins with at most one [[teachers]], the first generation's, "
            f"found {len(recipe.teachers)}"
        )
    if recipe.student.branches > 1:
        raise RequestError(f"student.branches: expected 1 in a chain, found {recipe.student.branches}")
    if not needs_of(method_entries(recipe.method)):
        raise RequestError("method.name: a chain needs a method that learns from a teacher, such as sfeed or ban")
    if recipe.train.source == "none":
        raise RequestError("train.source: expected cache, live or record in a chain, found 'none'")
    links: list[Recipe] = []
    for number in range(1, count + 1):
        tree = recipe.model_dump(mode="json", exclude_none=True)
        tree.pop("chain")
        out = Path(recipe.train.out)
        tree["train"] |= {"out": str(out / f"generation-{number}"), "seed": recipe.train_seed + number - 1}
        if number > 1:
            before = {"model": recipe.student.model, "weights": str(out / f"generation-{number - 1}" / "student.pt")}
            tree["teachers"] = [{"name": f"generation-{number - 1}", **before}]
        elif not recipe.teachers:
            tree["method"] = [{"name": "none"}]
            tree["train"]["source"] = "none"
        links.append(parse_recipe(tree, where="chain"))
    return links
