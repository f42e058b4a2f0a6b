"""A small cache and a run in its middle, for tests that spoil files as strangers would."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

from commands import Outcome, feedfast
from small import as_toml, digits_recipe

CACHE, LOG = "digits.zarr", "digits.zarr/commits/part-0-of-1.jsonl"
KEYS = ("cache.pilot=32", "cache.batch=16", "train.batch=16", "method.name=kd")
COMMANDS: dict[str, tuple[str, ...]] = {
    "verify": ("verify", CACHE, "--full"),
    "cache": ("cache", "recipe.toml", *KEYS),
    "train": ("train", "recipe.toml", *KEYS, "overwrite=true"),
    "resume": ("train", "recipe.toml", *KEYS),
    "plain": ("train", "recipe.toml", *KEYS, "train.source=none", "method.name=none", "overwrite=true", "data.val=[]"),
    "images": ("train", "recipe.toml", "data.train=images", "data.val=[]", "data.limit=0", "train.batch=1",
               "train.source=none", "method.name=none", "overwrite=true"),
}  # fmt: skip


def make_whole(folder: Path) -> Path:
    """A cache of 60 digits, and the folder of a run that stands at its second step."""
    recipe = digits_recipe(folder, (), teachers=1, data={"limit": 6}, train={"epochs": 1})
    as_toml(recipe, folder / "recipe.toml")
    text = (folder / "recipe.toml").read_text()
    (folder / "recipe.toml").write_text(text.replace(f"{folder}/", ""))  # what is below is copied, and resumed there
    with contextlib.chdir(folder):
        assert feedfast("cache", "recipe.toml", *KEYS).code == 0
        assert feedfast("train", "recipe.toml", *KEYS, "train.max_steps=2").code == 0
    return folder


def copy_world(whole: Path, folder: Path) -> Path:
    """A copy to be spoiled, as a stranger's archive would be."""
    shutil.copytree(whole, folder)
    return folder


def run(command: str, *arguments: str) -> Outcome:
    outcome = feedfast(*COMMANDS[command], *arguments)
    assert "Traceback" not in outcome.err
    assert not [char for char in outcome.err if ord(char) < 32 and char != "\n"]
    return outcome


def manifest(**changes: Any) -> None:
    tree = json.loads(Path(CACHE, "zarr.json").read_text())
    tree["attributes"]["feedfast"].update(changes)
    Path(CACHE, "zarr.json").write_text(json.dumps(tree))
