"""Completion, asked as shells ask: by environment variables, of a process that imports nothing heavy."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from feedfast import completion
from feedfast.data.augment import PRESETS
from feedfast.methods import METHODS
from feedfast.models.build import build_model
from feedfast.recipe import Recipe, packaged_recipes, parse_recipe

ASK = """
import contextlib, io, json, os, sys
from feedfast.cli import main
sys.argv, said = ["feedfast"], []
for variables in json.load(sys.stdin):
    os.environ |= variables
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main()
    said.append(out.getvalue())
    for name in variables:
        del os.environ[name]
print(json.dumps([said, [name for name in ("torch", "numpy", "zarr") if name in sys.modules]]))
"""


def asked(*questions: dict[str, str]) -> list[str]:
    """What each question's variables are answered with; all in one process."""
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        input=json.dumps(questions),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    said, heavy = json.loads(done.stdout)
    assert heavy == [], "a key press waits for no torch"
    return list(said)


def test_bash() -> None:
    """It breaks words at "=", so there values come without their key; the last word is what is being typed."""
    methods = list(METHODS)
    expected: dict[str, list[str]] = {
        "feedfast tr": ["train"],
        "feedfast train r.toml method.na": ["method.name=", *(f"method.name={name}" for name in methods)],
        "feedfast train r.toml method.name =": methods,
        "feedfast train r.toml method.name = o": ["ofd"],
        "feedfast train r.toml method.name = cwd method.m": ["method.map="],
        "feedfast sweep r.toml --set train.opt": [f"train.optimizer{end}" for end in ("=", "=sgd", "=adamw")],
        "feedfast taps zoo/wrn-16": ["zoo/wrn-16-1", "zoo/wrn-16-2", "zoo/wrn-16-4"],
        "feedfast recipes ofd-a": ["ofd-a-cifar100"],
        "feedfast methods rk": ["rkd"],
        "feedfast export runs/x --format o": ["onnx"],
        "feedfast train ./": [],  # a recipe is a file: the shell completes names of files
    }
    questions = [
        {"_FEEDFAST_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        for words in expected
    ]
    assert dict(zip(expected, (said.split() for said in asked(*questions)), strict=True)) == expected


def test_zsh_and_fish_see_whole_words() -> None:
    words = "feedfast train r.toml train.source="
    expected = [f"train.source={value}" for value in ("cache", "live", "record", "none")]
    fish = {"_FEEDFAST_COMPLETE": "complete_fish", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    in_zsh, in_fish = asked(
        {"_FEEDFAST_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": words},
        {**fish, "_TYPER_COMPLETE_ARGS": words},
    )
    assert [part for part in in_zsh.replace('"', " ").split() if "=" in part] == expected
    assert in_fish.split() == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_a_script(shell: str) -> None:
    (script,) = asked({"_FEEDFAST_COMPLETE": f"source_{shell}"})
    assert f"_FEEDFAST_COMPLETE=complete_{shell}" in script


@pytest.fixture
def shell_env(tmp_path: Path) -> dict[str, str]:
    """A home of its own, and `feedfast` as a command of this interpreter."""
    command = tmp_path / "bin" / "feedfast"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m feedfast "$@"\n')
    command.chmod(0o755)
    return {**os.environ, "PATH": f"{command.parent}:{os.environ['PATH']}", "HOME": str(tmp_path), "TERM": "xterm"}


def test_the_script_works_in_bash(tmp_path: Path, shell_env: dict[str, str]) -> None:
    """bash itself calls it and fills COMPREPLY."""
    (tmp_path / "script").write_text(asked({"_FEEDFAST_COMPLETE": "source_bash"})[0])
    code = (
        f"source {tmp_path}/script; complete -p feedfast >&2; COMP_WORDS=(feedfast train r.toml train.lo)\n"
        'COMP_CWORD=3; _feedfast_completion feedfast; echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", code], env=shell_env, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["train.log_every=", "train.loggers="]
    assert "_feedfast_completion feedfast" in done.stderr


def run_in(shell: str, code: str, env: dict[str, str]) -> str:
    """What a shell says in which completion has been installed as README says."""
    install = [shell, "-c", "feedfast --install-completion; true"]  # a single command would take the shell's place
    for command in (install, [shell, "-c", code]):
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@pytest.mark.skipif(shutil.which("fish") is None, reason="there is no fish here")
def test_fish_completes(shell_env: dict[str, str]) -> None:
    code = "complete -C 'feedfast train r.toml train.lo'; complete -C 'feedfast methods rk'"
    env = {name: value for name, value in shell_env.items() if not name.startswith("XDG_")}
    assert run_in("fish", code, env).split() == ["train.loggers=", "train.log_every=", "rkd"]


ZSH = r"""
zmodload zsh/zpty
zpty shell zsh -i
zpty -w -n shell $'feedfast methods \t\C-aecho \n'  # the first press only loads Typer's script
zpty -w -n shell $'feedfast methods rk\t\C-aecho \n'
zpty -w -n shell $'feedfast train r.toml method.name=cw\t\C-aecho \nexit\n'
while zpty -r shell line; do print -r -- "$line"; done
"""


@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh here")
def test_zsh_completes(shell_env: dict[str, str]) -> None:
    """In a terminal in which the tab key is pressed; echo says what then stands in the line."""
    out = run_in("zsh", ZSH, shell_env)
    said = [line.split() for line in out.splitlines() if line.startswith("feedfast ")]
    assert [line for line in said if line[-1] in ("rkd", "method.name=cwd")] == [
        ["feedfast", "methods", "rkd"],
        ["feedfast", "train", "r.toml", "method.name=cwd"],
    ], out


def test_what_is_offered_is_what_there_is() -> None:
    assert {name: tuple(kind.Options.model_fields) for name, kind in METHODS.items()} == completion.METHOD_OPTIONS
    assert set(completion.AUGMENTATIONS) > set(PRESETS)
    assert completion.recipe_names("") == list(packaged_recipes())
    assert completion.models("zoo/")
    build_model(completion.models("zoo/")[0], seed=0)


def test_every_key_of_the_recipe_is_offered_and_every_value_is_one() -> None:
    keys = list(completion._keys(None))
    assert len(keys) == len(set(keys)) > 90
    sections = {key.partition(".")[0] for key in keys}
    assert sections == set(Recipe.model_fields)
    tree = {"data": {"train": "x"}, "teachers": [{"name": "a", "model": "zoo/wrn-16-1"}]}
    tried = 0
    for key in keys:
        for value in completion.values_of(key):
            if value not in ("torchvision/", "timm/"):
                parse_recipe(tree, [f"{key}={value}"])
                tried += 1
    assert tried > 120
