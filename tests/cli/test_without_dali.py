"""DALI comes with an extra: what decodes images says so before it does anything, all other commands work without it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import feedfast
from small import as_toml, digits_recipe

import feedfast as package
from feedfast.cli import analyze, app
from feedfast.data import dali
from feedfast.errors import RequestError

# {recipe}, {cache}, {run}: of the fixture; {new}: a path that does not exist
DECODING = {
    "analyze reconstruction": "{run} --out {new}",
    "cache": "{recipe} cache.path={new}",
    "cache --print slurm": "{recipe} cache.path={new}",
    "chain": "{recipe} method.name=ban chain.generations=2 train.out={new} cache.path={new}.zarr",
    "demo": "--out {new}",
    "export": "{run} --format state_dict --out {new}",
    "plan": "{recipe} cache.path={new}",
    "sweep": "{recipe} --set seed=0,1 --out {new}",
    "train": "{recipe} train.out={new}",
    "verify": "{cache} --replay 1",
}
READING = {
    "compare": "{run} --out {new}",
    "copy": "{cache} {new}",
    "doctor": "",
    "factors": "{recipe} method.name=ft",
    "inspect": "{cache} --out {new}",
    "methods": "ft --recipe {recipe}",
    "recipes": "lp-mnist",
    "taps": "zoo/wrn-10-1 --size 16",
    "verify": "{cache} --full",
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe file with its cache made and its student trained, by a machine that has DALI."""
    folder = tmp_path_factory.mktemp("dali")
    settings = ("cache.views=1", "train.epochs=1", "data.limit=8", "cache.pilot=80", "cache.batch=40")
    file = as_toml(digits_recipe(folder, settings, teachers=1), folder / "recipe.toml")
    for command in ("cache", "train"):
        outcome = feedfast(command, file)
        assert outcome.code == 0, outcome.err
    return file


@pytest.fixture(autouse=True)
def without_dali(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This Python as it would be without the extra, once the cache has been made."""
    if "recipe" in request.fixturenames:
        request.getfixturevalue("recipe")
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)  # its import fails
    monkeypatch.setattr(dali, "dali_packages", dict)
    dali.load_dali.cache_clear()
    yield
    dali.load_dali.cache_clear()


def words(command: str, options: str, recipe: Path, new: Path) -> list[str]:
    places = {"recipe": recipe, "cache": recipe.parent / "digits.zarr", "run": recipe.parent / "student", "new": new}
    return [*command.split(), *options.format(**places).split()]


@pytest.mark.slow
@pytest.mark.parametrize("command", DECODING)
def test_what_decodes_says_so_before_it_does_anything(command: str, recipe: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    outcome = feedfast(*words(command, DECODING[command], recipe, new))
    assert outcome.code == 2, outcome.err
    assert len(outcome.error.splitlines()) == 1
    assert all(name in outcome.error for name in ("NVIDIA DALI", "feedfast[cuda13]", "feedfast[cuda12]"))
    assert f"torch.version.cuda, which is {torch.version.cuda}" in outcome.error
    assert list(tmp_path.iterdir()) == [], "nothing ran before it was said"


@pytest.mark.slow
@pytest.mark.parametrize("command", READING)
def test_what_reads_works(command: str, recipe: Path, tmp_path: Path) -> None:
    outcome = feedfast(*words(command, READING[command], recipe, tmp_path / "new"))
    assert outcome.code == (1 if command == "doctor" else 0), outcome.err  # whose answer is that DALI is missing
    assert outcome.document


@pytest.mark.slow
def test_lines_to_paste_are_printed(recipe: Path, tmp_path: Path) -> None:
    outcome = feedfast("sweep", recipe, "--set", "seed=0,1", "--print", "slurm", "--out", tmp_path / "new")
    assert outcome.code == 0, outcome.err
    assert "#SBATCH" in outcome.out


def test_every_command_is_here() -> None:
    names = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    names |= {f"analyze {command.callback.__name__}" for command in analyze.registered_commands if command.callback}
    assert names == {command.partition(" --")[0] for command in (*DECODING, *READING)}


@pytest.mark.slow
def test_python_hears_the_same(recipe: Path) -> None:
    with pytest.raises(RequestError, match=r"NVIDIA DALI.*feedfast\[cuda13\]"):
        package.open_cache(str(recipe.parent / "digits.zarr"))


@pytest.mark.parametrize(
    ("packages", "cuda", "said"),
    [
        ({"nvidia-dali-cuda130": "2.4.0"}, "13.0", []),
        ({"nvidia-dali-cuda120": "2.4.0"}, "12.8", []),
        ({"nvidia-dali-cuda120": "2.4.0"}, None, []),  # a torch without CUDA goes with either
        ({}, "12.8", ["not installed", "'feedfast[cuda12]'", "which is 12.8 here: cuda12"]),
        ({}, None, ["not installed", "either"]),
        ({"nvidia-dali-cuda120": "2.4.0"}, "13.0", ["nvidia-dali-cuda130", "found nvidia-dali-cuda120", "[cuda13]"]),
        (
            {"nvidia-dali-cuda120": "2.4.0", "nvidia-dali-cuda130": "2.4.0"},
            "13.0",
            ["expected one", "nvidia-dali-cuda120 and nvidia-dali-cuda130", "pip uninstall", "here: cuda13"],
        ),
    ],
)
def test_what_doctor_warns_of(packages: dict[str, str], cuda: str | None, said: list[str]) -> None:
    found: list[Any] = dali.dali_warnings(packages, cuda)
    assert len(found) == bool(said)
    assert all(word in found[0] for word in said)


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after `pip install --no-deps`; stages are imported in the commands, so the command line itself comes up."""
    monkeypatch.setitem(sys.modules, "feedfast.stages.doctor", None)
    with pytest.raises(ModuleNotFoundError, match="doctor"):  # a module of ours: a bug of ours
        feedfast("doctor")
    for name in ("doctor", "probes"):  # imported again, as by a process that begins
        monkeypatch.delitem(sys.modules, f"feedfast.stages.{name}")
    monkeypatch.setitem(sys.modules, "torch", None)
    outcome = feedfast("doctor")
    assert outcome.code == 2
    assert outcome.error.startswith(
        "package torch: expected to be installed, found none; pip install 'feedfast[cuda13]'"
    )
