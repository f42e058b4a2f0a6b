"""A cache of real digits with its recipe, its images and one small teacher, made by the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands import feedfast
from small import as_toml, digits_recipe

from feedfast.recipe import Recipe


@dataclass(frozen=True)
class World:
    """A cache, its recipe and its images."""

    folder: Path

    def recipe(self, *overrides: str) -> Recipe:
        return digits_recipe(self.folder, overrides, teachers=1)

    def file(self) -> Path:
        return as_toml(self.recipe(), self.folder / "recipe.toml")

    @property
    def cache(self) -> Path:
        return self.folder / "digits.zarr"

    @property
    def student(self) -> Path:
        return self.folder / "student"

    def train(self, *arguments: str) -> Any:
        return feedfast("train", self.file(), "train.eval_every=0", *arguments)
