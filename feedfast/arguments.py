"""What a caller of `feedfast.cache`, `fit` and the others gives: a recipe with changes, and objects that stand in it.

    recipe (path | Recipe | mapping) + tables (data=, teachers=, …) + overrides ──► one Recipe + its live objects

Tables change the keys they name and leave the others, as overrides do, which come last. A network or a data set may
stand wherever a recipe has a name: as ``teachers.N.model``, ``student.model``, ``data.train`` and ``data.val``. The
recipe then holds a word for it that is no name anybody could import: "python" of images, "python/package.Class" of a
network, unless the recipe names the network itself. The objects go on as values of their own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

from feedfast.errors import RequestError
from feedfast.recipe import Recipe, parse_recipe, read_recipe
from feedfast.words import override, put, toml_value

__all__ = ["Asked", "Overrides", "RecipeLike", "asked", "override_texts"]

RecipeLike: TypeAlias = str | os.PathLike[str] | Recipe | Mapping[str, Any]
"""A TOML file, a `Recipe`, or its tables as nested mappings."""

Overrides: TypeAlias = Mapping[str, Any] | Sequence[str]
"""Dotted keys: ``{"cache.views": 2}``, or ``("cache.views=2",)`` as on the command line."""

PYTHON: Final = "python"
"""Of images that are a Python object, in the place of where they are."""

# What a table may be given as in short: the key that it then means.
_SHORT: Final = {
    "data": "train", "task": "name", "cache": "path", "student": "model", "method": "name", "train": "out",
    "chain": "generations",
}  # fmt: skip
_WHOLE: Final = ("seed", "overwrite")  # keys of their own


@dataclass(frozen=True)
class Asked:
    """A recipe, and the objects that stand for what it names.

    Attributes:
        recipe: validated.
        train: the training images, where ``data.train`` is "python"; else None.
        val: likewise.
        teachers: name → network, of those that were passed.
        student: the network that is to be trained, if one was passed.
    """

    recipe: Recipe
    train: Any = None
    val: Any = None
    teachers: Mapping[str, Any] = field(default_factory=dict)
    student: Any = None

    def refuse_objects(self, command: str) -> None:
        """Raise where a command can only be given names.

        Raises:
            RequestError: an object was passed.
        """
        given = {"data.train": self.train, "data.val": self.val, "teachers": self.teachers, "student": self.student}
        for key, value in given.items():
            if value is not None and value != {}:
                raise RequestError(f"{key}: {command} starts anew from names: expected those, found a Python object")


def asked(recipe: RecipeLike | None, overrides: Overrides = (), *, part: str | None = None, **tables: Any) -> Asked:
    """One recipe with its live objects.

    Args:
        recipe: the file, object or mapping that the others change; None = nothing but the tables.
        overrides: dotted keys, applied last.
        part: ``cache.part``, if it is given.
        tables: table → its keys as a mapping, or what `_SHORT` says: ``cache="runs/c.zarr"``, ``method="kd"``,
            ``student=network``; None = as the recipe has it. ``teachers`` is a list as in a recipe, or a mapping of
            name → network, name of a network, or table.

    Raises:
        RequestError: a key is unknown, ill-typed or missing, or an object stands where none can.
    """
    tree, where = _tree(recipe)
    unknown = sorted(tables.keys() - Recipe.model_fields.keys())
    if unknown:
        raise RequestError(f"{unknown[0]}: expected a table of the recipe, {', '.join(Recipe.model_fields)}")
    for table, given in tables.items():
        if given is not None:
            tree[table] = _teachers(tree, given) if table == "teachers" else _table(tree, table, given)
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            put(tree, key, value)
    else:
        for text in [overrides] if isinstance(overrides, str) else overrides:
            override(tree, text)
    if part:
        put(tree, "cache.part", part)
    images = {part: _taken_images(tree, part) for part in ("train", "val")}
    student = _taken_network(tree.get("student"))
    teachers: dict[str, Any] = {}
    for number, entry in enumerate(_listed(tree.get("teachers", []))):
        network = _taken_network(entry)
        if network is not None:
            if not isinstance(entry.get("name"), str):
                raise RequestError(f"{where}: teachers.{number}.name: required, found nothing")
            teachers[entry["name"]] = network
    return Asked(parse_recipe(tree, where=where), **images, teachers=teachers, student=student)


def override_texts(overrides: Mapping[str, Any] | Sequence[str], *, several: bool = False) -> list[str]:
    """Overrides as the command line takes them.

    Args:
        overrides: dotted key → value, or ``key=value`` already.
        several: of each key several values, as `feedfast sweep --set` takes them.
    """
    if isinstance(overrides, str):
        return [overrides]
    if not isinstance(overrides, Mapping):
        return list(overrides)
    return [
        f"{key}={','.join(map(toml_value, value)) if several else toml_value(value)}"
        for key, value in overrides.items()
    ]


@dataclass(frozen=True)
class _Named:
    """A network in the place of its name, where the recipe says a name, too."""

    name: str
    network: Any


def _tree(recipe: RecipeLike | None) -> tuple[dict[str, Any], str]:
    """The recipe's tables, one's own to change, and what it is called in messages."""
    if recipe is None:
        return {}, "recipe"
    if isinstance(recipe, Recipe):  # only what was said: a default is no word of anybody's
        return recipe.model_dump(mode="json", exclude_unset=True), "recipe"
    if isinstance(recipe, Mapping):
        return _copied(recipe), "recipe"
    if isinstance(recipe, str | os.PathLike):
        path = Path(recipe).expanduser()
        return read_recipe(path), str(path)
    raise RequestError(
        f"recipe: expected the path of a TOML file, a Recipe or its tables, found {type(recipe).__name__}"
    )


def _copied(value: Any) -> Any:
    """Mappings and lists anew, what they hold as it is."""
    if isinstance(value, Mapping):
        return {key: _copied(entry) for key, entry in value.items()}
    return [_copied(entry) for entry in value] if isinstance(value, list | tuple) else value


def _table(tree: Mapping[str, Any], name: str, given: Any) -> Any:
    """A table with what was given for it."""
    if name in _WHOLE or (name == "method" and isinstance(given, list | tuple)):
        return _copied(given)
    held = tree.get(name, {})
    if name == "method" and isinstance(held, list | tuple):  # [[method]]: only of a single one can a key be changed
        held = held[0] if len(held) == 1 else {}
    if not isinstance(held, Mapping):
        return given
    changes = _copied(given) if isinstance(given, Mapping) else {_SHORT[name]: given}
    if name == "method" and changes.get("name", held.get("name")) != held.get("name"):
        return changes  # another method: the options of this one are none of its own
    return _changed(held, changes)


def _teachers(tree: Mapping[str, Any], given: Any) -> Any:
    """The recipe's teachers with those that were given, by name; a list takes their place."""
    if not isinstance(given, Mapping):
        return _copied(given)
    entries = {entry.get("name"): entry for entry in _listed(tree.get("teachers", []))}
    for name, value in given.items():
        changes = _copied(value) if isinstance(value, Mapping) else {"model": value}
        entries[name] = {"name": name, **_changed(entries.get(name, {}), changes)}
    return list(entries.values())


def _changed(held: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A table with other values for some keys; of a network whose name is known already that stays its name."""
    found = {**held, **changes}
    known = held.get("model")
    if isinstance(known, str) and _is_network(changes.get("model")):
        found["model"] = _Named(known, changes["model"])
    return found


def _listed(entries: Any) -> list[dict[str, Any]]:
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list | tuple) else []


def _taken_images(tree: Mapping[str, Any], part: str) -> Any:
    """The object in ``data.train`` or ``data.val``, whose place the word "python" takes; None = a path."""
    data = tree.get("data")
    if not isinstance(data, dict):
        return None
    given = data.get(part)
    if given is None or isinstance(given, str | os.PathLike) or not hasattr(given, "__getitem__"):
        return None
    if isinstance(given, list | tuple) and all(isinstance(entry, str | os.PathLike) for entry in given):
        return None
    data[part] = PYTHON
    return given


def _taken_network(entry: Any) -> Any:
    """The network in a teacher's or the student's table, whose place a word for it takes; None = a name."""
    if not isinstance(entry, dict):
        return None
    given = entry.get("model")
    network = given.network if isinstance(given, _Named) else given
    if network is None or not _is_network(network):
        return None
    from feedfast.models.given import word_of  # torch is there, or there were no network

    entry["model"] = given.name if isinstance(given, _Named) else word_of(network)
    return network


def _is_network(value: Any) -> bool:
    torch = sys.modules.get("torch")  # without it nobody can have made one
    return torch is not None and isinstance(value, torch.nn.Module)
