"""`feedfast methods` and `recipes`: what a student can learn by, and the papers' settings as recipes.

Both print a table for people on stderr and return the same facts as JSON. With a recipe, `methods` also says what each
method would have a cache store of the recipe's teachers. Only shapes count for that, so the networks are built with
random weights and see two black images: no weights file is opened, and nothing is trained or stored.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from feedfast import recipe as recipes
from feedfast.data.positions import positions_per_map
from feedfast.errors import RequestError
from feedfast.files import write_text
from feedfast.methods import METHODS, Method, method_named, tasks_of
from feedfast.methods.base import LOGITS, expected_words, matching, tap_groups
from feedfast.models.build import build_model
from feedfast.models.given import copied
from feedfast.models.taps import Tap, Tapped
from feedfast.recipe import Recipe, packaged_recipe, packaged_recipes
from feedfast.report.compare import print_table
from feedfast.stages.codecs import codecs_of
from feedfast.stages.data import open_train
from feedfast.stages.ensemble import Networks, outputs_of, tap_requests
from feedfast.stages.folder import ensure_dir
from feedfast.stages.inputs import teacher_input
from feedfast.stages.pilot import tap_row_bytes
from feedfast.stages.progress import format_bytes

log = logging.getLogger(__name__)

Shapes = dict[str, tuple[int, ...]]
"""Tap → shape of one sample."""


def run_methods(
    name: str | None = None, recipe: Recipe | None = None, *, networks: Networks | None = None
) -> dict[str, Any]:
    """Describe the methods, or one of them, from their classes.

    Args:
        name: one method; None = all.
        recipe: also say what they would have a cache of its teachers store, before compression.
        networks: of teachers that need not be built.

    Returns:
        The JSON of `feedfast methods`: ``methods`` (name → paper, needs, tasks, options' names); of one: ``name``,
        ``paper``, ``needs``, ``tasks`` (the values of ``task.name`` that it serves), ``options`` (each with name,
        expected, default and meaning). With a recipe also ``bytes_per_sample`` of one view (None where a teacher has
        no such maps, with the reason in ``refused``), and of one method ``targets`` (teacher/tap → shape, codec, bytes
        per sample).

    Raises:
        RequestError: there is no such method, or the recipe's teachers cannot be built.
    """
    if recipe is not None and not recipe.teachers:
        raise RequestError("--recipe: expected a recipe with [[teachers]], found none")
    kinds = METHODS if name is None else {name: method_named(name)}
    costs = {} if recipe is None else _costs(recipe, list(kinds.values()), networks or {})
    if name is None:
        document: dict[str, Any] = {
            key: {
                "paper": kind.paper,
                "needs": list(kind.needs),
                "tasks": list(tasks_of(kind)),
                "options": list(kind.Options.model_fields),
                **{word: value for word, value in costs.get(key, {}).items() if word != "targets"},
            }
            for key, kind in kinds.items()
        }
        shown = [
            {
                "method": key,
                "needs": " ".join(row["needs"]),
                **({"per sample": _shown_bytes(row["bytes_per_sample"])} if recipe else {}),
                "options": " ".join(row["options"]),
                "paper": row["paper"],
            }
            for key, row in document.items()
        ]
        print_table("methods", shown)
        return {"methods": document}
    kind = kinds[name]
    options = [
        {
            "name": key,
            "expected": expected_words(field),
            "default": field.default,
            "meaning": field.description,
        }
        for key, field in kind.Options.model_fields.items()
    ]
    log.info("%s: %s; needs %s", name, kind.paper, ", ".join(kind.needs) or "no teacher")
    print_table(f"options of {name}", options)
    found: dict[str, Any] = {
        "name": name,
        "paper": kind.paper,
        "needs": list(kind.needs),
        "tasks": list(tasks_of(kind)),
        "options": options,
    }
    if recipe is not None:
        found |= costs[name]
        rows = [
            {
                "target": target,
                "shape": "x".join(map(str, entry["shape"])),
                "codec": entry["codec"],
                "per sample": format_bytes(entry["bytes_per_sample"]),
            }
            for target, entry in found["targets"].items()
        ]
        print_table(f"stored for {name}: {_shown_bytes(found['bytes_per_sample'])} per sample and view", rows)
        if "refused" in found:
            log.warning("%s: %s", name, found["refused"])
    return found


def _shown_bytes(count: int | None) -> str:
    return "-" if count is None else format_bytes(count)


def _costs(recipe: Recipe, kinds: Sequence[type[Method]], networks: Networks) -> dict[str, dict[str, Any]]:
    """Method → ``bytes_per_sample``, ``targets``, and ``refused`` where a teacher has no such maps."""
    classes, codecs = _classes(recipe), codecs_of(recipe.teachers, recipe.cache.codec)
    groups = tuple(dict.fromkeys(group for kind in kinds for group in tap_groups(kind.needs)))
    shapes: dict[str, Shapes] = {}
    missing: dict[str, dict[str, str]] = {}
    for spec in recipe.teachers:
        shapes[spec.name], missing[spec.name] = _teacher_shapes(
            spec, recipe.data, classes, groups, networks.get(spec.name)
        )
    costs: dict[str, dict[str, Any]] = {}
    for kind in kinds:
        refused = [
            missing[spec.name][group]
            for spec in recipe.teachers
            for group in tap_groups(kind.needs)
            if group in missing[spec.name]
        ]
        targets: dict[str, dict[str, Any]] = {}
        # the cache keeps every classifier's logits, whether this method reads them or not
        kept = (LOGITS,) if recipe.task.name == "classify" else ()
        needs = (*kind.needs, *kept) if kind.needs and not refused else ()
        for teacher, taps in shapes.items():
            for tap in matching(needs, taps):
                targets[f"{teacher}/{tap}"] = {
                    "shape": list(taps[tap]),
                    "codec": (codec := codecs.of(teacher, tap)),
                    "bytes_per_sample": tap_row_bytes(_stored(taps[tap], codecs.share(teacher, tap)), codec),
                }
        total = None if refused else sum(entry["bytes_per_sample"] for entry in targets.values())
        costs[kind.name] = {"bytes_per_sample": total, "targets": targets}
        if refused:
            costs[kind.name]["refused"] = refused[0]
    return costs


def _stored(shape: tuple[int, ...], share: float | None) -> tuple[int, ...]:
    """Shape of what is stored of a tap."""
    if share is None or len(shape) != 3:
        return shape
    return shape[0], positions_per_map(share, *shape[1:])


def _classes(recipe: Recipe) -> int:
    """Classes of the images, 0 where there are none; asked for only where a teacher's outputs depend on them."""
    if all(spec.classes or not spec.weights for spec in recipe.teachers):
        return 0
    try:
        return len(open_train(recipe).classes)
    except RequestError as error:
        log.warning("methods: %s; logits are counted with each network's own number of classes", error)
        return 0


def _teacher_shapes(
    spec: recipes.Teacher, data: recipes.Data, classes: int, groups: Sequence[str], network: nn.Module | None
) -> tuple[Shapes, dict[str, str]]:
    """Shapes of a teacher's taps and logits, and by group why it has none of it.

    A group's taps are those the recipe names by hand, if there are any of such names.
    """
    where = f"teachers[{spec.name}]"
    if network is not None:
        model = copied(network, where).eval()
    else:
        try:
            model = build_model(spec.model, num_classes=outputs_of(spec, classes), weights=None, seed=0).eval()
        except RequestError as error:
            raise RequestError(f"{where}: {error}") from error
    size = teacher_input(spec, data, model, given=network is not None).size
    example = torch.zeros(2, 3, size, size)
    by_hand = tap_requests(model, [entry for entry in spec.taps if entry.by_hand], example, where)
    taps: dict[str, Tap] = {request.tap.name: request.tap for request in by_hand}
    missing: dict[str, str] = {}
    for group in groups:
        if matching((group, f"{group}*"), taps):
            continue
        try:
            taps |= {request.tap.name: request.tap for request in tap_requests(model, (group,), example, where)}
        except RequestError as error:
            missing[group] = f"{where}: {error}"
    tapped = Tapped(model, tuple(taps.values()), example)
    outputs = tapped.outputs
    return {**tapped.shapes, **({LOGITS: outputs} if isinstance(outputs, tuple) else {})}, missing


def run_recipes(name: str | None = None, out: Path | None = None) -> dict[str, Any]:
    """List the packaged recipes, or show or copy one.

    Args:
        name: one recipe; None = all.
        out: a file to copy it to, which must not be there yet.

    Returns:
        The JSON of `feedfast recipes`: ``recipes`` (name → what it is, in a line); of one: ``name``, ``title``,
        ``toml`` (its text) and ``out`` (None if it was not copied).

    Raises:
        RequestError: there is no such recipe, or ``out`` is there already or cannot be written.
    """
    if name is None:
        if out is not None:
            raise RequestError("--out: expected the NAME of the recipe that is copied there, found none")
        titles = packaged_recipes()
        print_table("recipes", [{"recipe": key, "what it is": title} for key, title in titles.items()])
        return {"recipes": titles}
    text = packaged_recipe(name)
    if out is None:
        log.info("%s", text.rstrip("\n"))
    else:
        if out.exists() or out.is_symlink():
            found = "a folder" if out.is_dir() else "one there"
            raise RequestError(f"--out {out}: expected the name of a new file, found {found}")
        ensure_dir(out.parent, "--out")
        write_text(out, text)
        log.info("recipe %s: copied to %s; data paths in it are placeholders", name, out)
    return {"name": name, "title": packaged_recipes()[name], "toml": text, "out": None if out is None else str(out)}
