"""What a shell offers where a user presses the tab key: keys of the recipe with their values, and names.

Keys and their values are the recipe's own fields. Nothing here imports torch, so a shell answers at once; what only
modules with torch know (methods and their options) is repeated, and a test compares it.

bash breaks words at "=" and hands over what is behind it, so there values are offered without their key; other shells
see the whole word. Where nothing is offered, shells complete names of files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel

from feedfast.models.names import ZOO_NAMES
from feedfast.recipe import MethodEntry, Recipe, Teacher, packaged_recipes

_KD = ("alpha", "tau", "average", "direction", "standardize")
_FEED = ("beta", "reduction", "bn", "divide_by_n")
METHOD_OPTIONS: dict[str, tuple[str, ...]] = {
    "none": (), "kd": _KD, "ban": _KD, "dkd": ("alpha", "beta", "tau", "warmup", "standardize"),
    "dist": ("beta", "gamma", "tau", "standardize"), "camkd": ("alpha", "beta", "tau", "wait"),
    "fitnet": ("stages", "tap", "beta", "hint_share", "tau", "lambda_start", "lambda_end"), "at": ("beta", "p"),
    "ab": ("alpha", "margin", "first_share", "second", "tau"), "vid": ("beta", "variance"),
    "ofd": ("alpha", "taps", "tap_weights"), "reviewkd": ("beta", "warmup_share", "width"),
    "cwd": ("map", "beta", "tau"), "mgd": ("alpha", "masked", "over"),
    "ft": ("beta", "rate", "factors", "paraphraser_epochs", "paraphraser_lr", "reconstruction"),
    "pfeed": _FEED, "sfeed": _FEED, "ekd": ("label_weight", "kd_weight", "feature_weight", "tau", "pairing"),
    "locality": ("k", "sigma", "gamma", "features"), "rkd": ("beta_distance", "beta_angle"), "sp": ("beta",),
    "pkt": ("beta",), "crd": ("beta", "width", "negatives", "tau", "momentum"),
}  # fmt: skip
"""Method → its options (`feedfast.methods.METHODS`)."""

AUGMENTATIONS = (
    *("pad-crop-flip", "resized-crop-flip", "scale-crop-flip", "expand-crop-flip", "none"),
    *("cifar-standard", "imagenet-standard", "timm-ra", "deit", "lightly-distill", "ml-dr", "deeplab", "ssd"),
)
"""Values of ``data.augment``, with presets (`feedfast.data.augment.PRESETS`)."""

_MODELS = (*(f"zoo/{name}" for name in ZOO_NAMES), "torchvision/", "timm/")
_VALUES = {
    "method.name": tuple(METHOD_OPTIONS),
    "data.augment": AUGMENTATIONS,
    "student.model": _MODELS,
    "teachers.0.model": _MODELS,
    "train.device": ("auto", "cpu", "cuda"),
}


def overrides(ctx: typer.Context, incomplete: str) -> list[str]:
    """KEY=VALUE of the recipe; also of ``sweep --set``."""
    before = [word for name in ("overrides", "settings") for word in ctx.params.get(name) or ()]
    while before[-1:] == ["="]:  # bash: the words are KEY, "=" and VALUE; an "=" that ends them is already left out
        before.pop()
    if before and before[-1] in _keys(None):
        return _starting(values_of(before[-1]), incomplete)
    key, equals, value = incomplete.partition("=")
    if equals:
        return [f"{key}={found}" for found in _starting(values_of(key), value)]
    found = _starting([f"{name}=" for name in _keys(_method(before))], incomplete)
    if len(found) == 1:  # with two of them a shell completes what they share, and adds no space
        found += [f"{found[0]}{value}" for value in values_of(found[0][:-1])]
    return found


def _method(words: Sequence[str]) -> str | None:
    """The method that an earlier word names."""
    text = " ".join(words).replace(" = ", "=")
    return next((word[12:] for word in reversed(text.split()) if word.startswith("method.name=")), None)


def _keys(method: str | None) -> Iterator[str]:
    """All keys that a recipe may have; options of one method where it is known."""
    for name, field in Recipe.model_fields.items():
        section = field.annotation
        if name == "method":
            every = METHOD_OPTIONS.get(method or "") or dict.fromkeys(
                option for options in METHOD_OPTIONS.values() for option in options
            )
            yield from (f"method.{key}" for key in (*MethodEntry.model_fields, *every))
        elif name == "teachers":
            yield from (f"teachers.0.{key}" for key in Teacher.model_fields)
        elif isinstance(section, type) and issubclass(section, BaseModel):
            yield from (f"{name}.{key}" for key in section.model_fields)
        else:
            yield name


def values_of(key: str) -> list[str]:
    """Values of a key, as its type or its default says; empty for what nobody can guess."""
    if key in _VALUES:
        return list(_VALUES[key])
    section, _, name = key.rpartition(".")
    kinds: dict[str, Any] = {"": Recipe, "method": MethodEntry, "teachers.0": Teacher}
    if section not in kinds and section in Recipe.model_fields:
        kinds[section] = Recipe.model_fields[section].annotation
    kind = kinds.get(section)
    if not isinstance(kind, type) or not issubclass(kind, BaseModel) or name not in kind.model_fields:
        return []
    field = kind.model_fields[name]
    literals = list(_literals(field.annotation))
    if literals:
        return literals
    if field.annotation is bool:
        return ["true", "false"]
    default = field.default
    plain = isinstance(default, (int, float, str)) and default != ""
    return [default if isinstance(default, str) else json.dumps(default)] if plain else []


def _literals(kind: Any) -> Iterator[str]:
    if get_origin(kind) is Literal:
        yield from map(str, get_args(kind))
    else:
        for part in get_args(kind):
            yield from _literals(part)


def _starting(values: Sequence[str], text: str) -> list[str]:
    return [value for value in values if value.startswith(text)]


def models(incomplete: str) -> list[str]:
    """Networks, for `feedfast taps`."""
    return _starting(_MODELS, incomplete)


def methods(incomplete: str) -> list[str]:
    """Methods, for `feedfast methods`."""
    return _starting(list(METHOD_OPTIONS), incomplete)


def recipe_names(incomplete: str) -> list[str]:
    """Packaged recipes, for `feedfast recipes`."""
    return _starting(list(packaged_recipes()), incomplete)


def one_of(*values: str) -> Any:
    """A completion that offers these."""

    def offered(incomplete: str) -> list[str]:
        return _starting(values, incomplete)

    return offered
