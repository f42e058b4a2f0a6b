"""The help of every command ends with an example that is one: it parses, and what it names exists."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from commands import feedfast

from feedfast.cli import _speaking_first, app
from feedfast.methods import METHODS
from feedfast.recipe import packaged_recipe, packaged_recipes, parse_recipe
from feedfast.words import read_toml

GROUP: Any = typer.main.get_command(app)
CHEAP = ("methods", "recipes", "taps")  # and run here; doctor has a test of its own


def commands(group: Any = GROUP, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name)


PATHS = list(commands())


def examples(path: tuple[str, ...]) -> list[str]:
    """The last lines of a command's help."""
    outcome = feedfast(*path, "--help")
    assert outcome.code == 0, outcome.err
    head, found, lines = outcome.out.rpartition("Example")
    assert found, f"{path}: {head}"
    return [line.strip() for line in lines.strip().splitlines()[1:]]


def parsed(words: list[str]) -> tuple[str, dict[str, Any]]:
    """Name and parameters of a command line, which is not run."""
    context = GROUP.make_context("feedfast", _speaking_first(words))
    command, rest = GROUP, [*context._protected_args, *context.args]
    while hasattr(command, "commands"):
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
        rest = [*getattr(context, "_protected_args", []), *context.args]
    return context.command_path.removeprefix("feedfast "), context.params


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_it_ends_with_examples_that_parse(path: tuple[str, ...]) -> None:
    found = examples(path)
    assert found
    tree = read_toml(packaged_recipe("ofd-c-cifar100"))
    for line in found:
        program, *words = shlex.split(line)
        assert program == "feedfast"
        name, parameters = parsed(words)
        assert tuple(name.split())[: len(path)] == path
        parse_recipe(tree, parameters.get("overrides") or ())
        for setting in parameters.get("settings") or ():
            key, _, values = setting.partition("=")
            parse_recipe(tree, [f"{key}={values.split(',')[0].split(':')[0]}"])
        for word in words:  # files of a reader's own, obviously
            if "/" in word and not word.startswith(("torchvision/", "s3://bucket/")) and "=" not in word:
                assert word.startswith("runs/")
            assert not word.endswith(".toml") or word == "recipe.toml"
        if name == "recipes":
            assert parameters["name"] in packaged_recipes()
        if name == "methods":
            assert parameters["name"] in METHODS


@pytest.mark.parametrize("name", CHEAP)
def test_the_cheap_ones_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for line in examples((name,)):
        outcome = feedfast(*shlex.split(line)[1:])
        assert outcome.code == 0, outcome.err
        assert outcome.document


def test_every_command_is_found() -> None:
    assert {("train",), ("sweep",), ("doctor",), ("analyze", "reconstruction"), ()} <= set(PATHS)
    assert len(PATHS) >= 19


def test_help_is_instant() -> None:
    """Nothing heavy is imported for it, nor for a command that is misspelled."""
    code = (
        "import sys, json\n"
        "from feedfast.cli import main\n"
        "for words in (['--help'], ['train', '--help'], ['trian']):\n"
        "    sys.argv = ['feedfast', *words]\n"
        "    try:\n        main()\n    except SystemExit:\n        pass\n"
        "heavy = ('torch', 'numpy', 'nvidia.dali', 'zarr', 'rich', 'matplotlib', 'wandb', 'mlflow')\n"
        "print(json.dumps([name for name in heavy if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(done.stdout.splitlines()[-1]) == []
    assert len(re.findall("Usage: feedfast", done.stdout + done.stderr)) == 3
