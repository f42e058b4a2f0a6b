"""What a recipe's own student could learn from the targets its cache will hold; said before the first row is cached.

A caching pass lasts hours, and the recipe that asks for it names method and student too. All that needs no row is
tried at once: the method with its options, the taps it reads, the student with its taps, their classes and shapes, on
two gray images. A cache may well be meant for other recipes; that must be asked for (``--no-check``).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from feedfast.data.views import ViewPlan
from feedfast.errors import RequestError
from feedfast.methods import METHODS, TapInfo, refuse_dense, tasks_of
from feedfast.methods.base import LOGITS, Teachers, matching, tap_groups
from feedfast.methods.ft import FACTOR, FT, TAP, factor_channels
from feedfast.models.given import copied
from feedfast.models.normalize import Normalize
from feedfast.recipe import Recipe
from feedfast.stages.data import view_plan
from feedfast.stages.ensemble import FrozenTeacher, is_signed, tap_requests
from feedfast.stages.source import manifest_taps
from feedfast.stages.trainee import (
    Entry,
    build_methods,
    build_student,
    gray_images,
    method_entries,
    names_of,
    needs_of,
    student_needs_of,
    tap_student,
)
from feedfast.storage.schema import Manifest
from feedfast.tasks import task_named

log = logging.getLogger(__name__)


def trainable_entries(recipe: Recipe) -> tuple[Entry, ...]:
    """The recipe's methods, where the recipe alone does not say that they cannot be trained by.

    Raises:
        RequestError: an unknown method or option, a ``train.source`` that has not what it needs, or views that mix
            images for a method that needs one class of each.
    """
    entries = method_entries(recipe.method)
    needs, source = needs_of(entries), recipe.train.source
    if source == "none" and needs:
        raise RequestError(
            f"train.source: method {names_of(entries)!r} needs targets, expected cache, live or record, found 'none'"
        )
    if source in ("live", "record") and FACTOR in needs:
        raise RequestError(f"method.factors: 'stored' needs train.source='cache', found {source!r}; expected 'own'")
    if recipe.train.residency in ("ram", "gpu") and source != "cache":
        raise RequestError(
            f"train.residency: {recipe.train.residency!r} holds what a cache serves; expected 'auto' or 'disk' with "
            f"train.source={source!r}"
        )
    _refuse_mixed(recipe, entries)
    _refuse_task(recipe, entries)
    return entries


def _refuse_task(recipe: Recipe, entries: Sequence[Entry]) -> None:
    """Raise if a method cannot serve the task, or the student is of branches, which classify."""
    for entry in entries:
        refuse_dense(entry.kind, recipe.task.name, entry.options)
    if recipe.task.name != "classify" and recipe.student.branches > 1:
        raise RequestError(
            f"student.branches: expected 1 for task {recipe.task.name!r}, found {recipe.student.branches}"
        )


def _refuse_mixed(recipe: Recipe, entries: Sequence[Entry]) -> None:
    refuse_mixed(view_plan(recipe.data, recipe.seed), entries)


def refuse_mixed(plan: ViewPlan, entries: Sequence[Entry]) -> None:
    """Raise if a method needs one class per image and the views have two.

    Raises:
        RequestError: with the operations that mix.
    """
    mixing = [operation.op for operation in plan.mixing_operations]
    for entry in entries:
        if entry.kind.one_label and mixing:
            raise RequestError(
                f"method.name: {entry.kind.name!r} needs one class per image, data.augment mixes two "
                f"({', '.join(mixing)}); leave mixing out or choose another method"
            )


def coming_taps(
    teachers: Mapping[str, FrozenTeacher], held: Manifest | None, entries: Sequence[Entry]
) -> dict[str, dict[str, TapInfo]]:
    """Teacher → tap → shape and margin, of all that the cache of these teachers will hold.

    Args:
        teachers: the recipe's.
        held: what the cache holds already; it may have taps of theirs that this recipe does not name.
        entries: the recipe's methods; where one reads stored factors, `feedfast factors` will add them.
    """
    known = {} if held is None else manifest_taps(held)
    rate = (
        next((entry.options.rate for entry in entries if entry.kind is FT), None) if _reads_factors(entries) else None
    )
    found: dict[str, dict[str, TapInfo]] = {}
    for name, teacher in teachers.items():
        taps = dict(known.get(name, {}))
        for tap in teacher.shapes:
            info = teacher.tap_info(tap)
            if info.margin is None and tap != LOGITS and is_signed(teacher.requests[tap].tap):
                info = replace(info, margin=torch.zeros(info.shape[0]))  # the pilot measures it
            taps[tap] = info
        final = taps.get(TAP)
        if rate is not None and FACTOR not in taps and final is not None and len(final.shape) == 3:
            taps[FACTOR] = TapInfo((factor_channels(final.shape[0], rate), *final.shape[1:]))
        found[name] = taps
    return found


def _reads_factors(entries: Sequence[Entry]) -> bool:
    return FACTOR in needs_of(entries)


def refuse_unusable(
    recipe: Recipe,
    entries: Sequence[Entry],
    taps: Teachers,
    classes: int,
    *,
    check: bool,
    given: nn.Module | None = None,
) -> str:
    """Raise unless the recipe's student can learn by its methods from these targets; methods that need none can.

    Args:
        recipe: for its student, seed and size of images.
        entries: its methods.
        taps: teacher → tap → shape and margin, as `coming_taps` has them.
        classes: of the images; 0 = they have no labels.
        check: False = only say it.
        given: the student, if it is an object; it is copied.

    Returns:
        Why it cannot, "" if it can.

    Raises:
        RequestError: with the sentence that training would end with.
    """
    try:
        require_usable(recipe, entries, taps, classes, given)
    except RequestError as error:
        if check:
            raise RequestError(
                f"{error}; this recipe's student could not use the cache: --no-check (in Python check=False) goes on, "
                "for other recipes"
            ) from error
        log.warning("%s; going on as asked, for other recipes", error)
        return str(error)
    return ""


def refuse_unusable_generations(recipe: Recipe, classes: int) -> None:
    """Raise unless a student can learn by the recipe's methods from one of its own kind, as in a chain.

    Args:
        recipe: of any generation but the first.
        classes: of the images.

    Raises:
        RequestError: with the sentence that the second generation would end with, hours later.
    """
    entries = method_entries(recipe.method)
    name, (mean, std), size = recipe.teachers[0].name, recipe.data.normalization, recipe.data.size
    network = build_student(recipe.student.model_copy(update={"weights": None}), classes, recipe.train_seed)
    groups, where = tap_groups(needs_of(entries)), f"teachers[{name}]"
    teacher = FrozenTeacher(
        name,
        network,
        lambda example: tap_requests(network, groups, example, where),
        source=recipe.student.model,
        bn="eval",
        precision="fp32",
        mean=mean,
        std=std,
        size=size,
        device=torch.device("cpu"),
        logits=recipe.task.name == "classify" or LOGITS in needs_of(entries),
    )
    require_usable(recipe, entries, coming_taps({name: teacher}, None, entries), classes)


def require_usable(
    recipe: Recipe, entries: Sequence[Entry], taps: Teachers, classes: int, given: nn.Module | None = None
) -> None:
    """Raise unless the recipe's student can learn by its methods from these targets; arguments as `refuse_unusable`.

    Raises:
        RequestError: with the sentence that training would end with.
    """
    _refuse_mixed(recipe, entries)
    _refuse_task(recipe, entries)
    needs = needs_of(entries)
    if not needs:
        return
    lacking = lacks(needs, taps)
    if lacking:
        raise RequestError(f"method.name: {names_of(entries)!r} {lacking}")
    _refuse_sampled_factors(needs, taps)
    asked = recipe.student
    # a file must be there and fit; what would be fetched is left for training
    is_file = asked.weights and (Path(asked.weights).suffix or Path(asked.weights).exists())
    classes = classes or next((infos[LOGITS].shape[0] for infos in taps.values() if LOGITS in infos), 0)
    bare = asked.model_copy(update={"backbone": None} | ({} if is_file else {"weights": None}))
    student = build_student(bare, classes, recipe.train_seed, None if given is None else copied(given, "student"))
    example = gray_images(Normalize(*recipe.data.normalization), recipe.data.size, torch.device("cpu"))
    where = f"student {asked.model}"
    tapped = tap_student(student, student_needs_of(entries), example, task_named(recipe.task.name, classes), where)
    read = {name: {tap: infos[tap] for tap in matching(needs, infos)} for name, infos in taps.items()}
    build_methods(entries, tapped.shapes, read, tapped.outputs, recipe.train_seed)


def _refuse_sampled_factors(needs: Sequence[str], taps: Teachers) -> None:
    """Raise where `feedfast factors`, which comes after the caching pass, would find some positions of its maps."""
    for name, infos in taps.items() if FACTOR in needs else ():
        if TAP in infos and infos[TAP].positions is not None:
            raise RequestError(
                f"tap {TAP!r} of teacher {name!r}: method {FT.name!r} {FT.whole}; expected all positions, found "
                f"{infos[TAP].positions} of {math.prod(infos[TAP].shape[1:])} positions: store the tap without a share"
            )


def lacks(needs: Sequence[str], taps: Teachers) -> str:
    """The first selector that names nothing of some teacher, in words; "" if every one names something of all."""
    for name, infos in taps.items():
        for need in needs:
            if not matching((need,), infos):
                return f"needs the {need!r} taps of teacher {name!r}, found {sorted(infos)}"
    return ""


def served(taps: Teachers, classes: int, task: str = "classify") -> dict[str, str]:
    """Method → why a cache of these targets does not serve it, "" if it does; with its default options.

    Args:
        taps: teacher → tap → shape and margin.
        classes: of the images; 0 = unknown.
        task: of the recipe.
    """
    found = {}
    for name, kind in METHODS.items():
        needs = kind.needed(kind.Options())
        reason = lacks(needs, taps) if needs else "needs no cache"
        if task not in tasks_of(kind):
            reason = f"does not serve task {task!r}"
        sampled = any(infos[tap].positions is not None for infos in taps.values() for tap in matching(needs, infos))
        if not reason and sampled and not kind.samples:
            reason = f"{kind.whole}, found some of their positions"
        other = [t for t, infos in taps.items() if LOGITS in infos and infos[LOGITS].shape[0] != classes]
        if not reason and LOGITS in needs and classes and other:
            width = taps[other[0]][LOGITS].shape[0]
            reason = f"compares classes, found {width} in {other[0]!r} and {classes} in the images"
        found[name] = reason
    return found
