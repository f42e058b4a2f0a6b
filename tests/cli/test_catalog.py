"""`feedfast recipes` and `feedfast methods`: what they list and copy, and bytes that agree with `feedfast plan`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import feedfast, in_a_process
from small import as_toml, digits_recipe

from feedfast.methods import METHODS
from feedfast.recipe import packaged_recipe, packaged_recipes

FILES = Path(__file__).parents[2] / "feedfast" / "recipes"

# ---- recipes


def test_the_list_is_the_folder() -> None:
    outcome = feedfast("recipes")
    assert outcome.code == 0
    listed = outcome.document["recipes"]
    assert listed == {file.stem: file.read_text().split("\n")[0][2:] for file in sorted(FILES.glob("*.toml"))}
    for name in listed:
        assert name in outcome.err


def test_one_is_shown_on_stderr_and_given_as_json() -> None:
    outcome = feedfast("recipes", "ofd-c-cifar100")
    text = (FILES / "ofd-c-cifar100.toml").read_text()
    assert outcome.document["toml"] == text
    assert outcome.document["out"] is None
    assert outcome.document["title"] in text.splitlines()[0]
    assert text.rstrip("\n") in outcome.err
    assert len(outcome.out.splitlines()) == 1


def test_one_is_copied_and_never_over_a_file(tmp_path: Path) -> None:
    target = tmp_path / "new" / "mine.toml"
    outcome = feedfast("recipes", "kd-resnet-50-p37.5-imagenet", "--out", target)
    assert outcome.code == 0
    assert outcome.document["out"] == str(target)
    assert target.read_bytes() == (FILES / "kd-resnet-50-p37.5-imagenet.toml").read_bytes()
    target.write_text("mine")
    for there, words in ((target, "mine.toml"), (tmp_path, "a folder")):
        again = feedfast("recipes", "ofd-c-cifar100", "--out", there)
        assert again.code == 2
        assert words in again.error
        assert len(again.error.splitlines()) == 1
    assert target.read_text() == "mine"


def test_a_tilde_that_the_shell_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--out=~/x`: a shell expands ~ only where a word begins."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert feedfast("recipes", "lp-mnist", "--out=~/copied.toml").code == 0
    assert (tmp_path / "copied.toml").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ofd-c-cifar10"], ["'ofd-c-cifar10'", "did you mean", "ofd-c-cifar100"]),
        (["qqqq"], ["'qqqq'", "feedfast recipes"]),
        (["../recipe"], ["'../recipe'"]),
        (["--out", "x.toml"], ["--out", "NAME"]),
    ],
)
def test_mistakes(arguments: list[str], words: list[str]) -> None:
    outcome = feedfast("recipes", *arguments)
    assert outcome.code == 2
    assert all(word in outcome.error for word in words), outcome.error
    assert len(outcome.error.splitlines()) == 1


@pytest.mark.parametrize("written", ["ofd-c-cifar100", "ofd-c-cifar100.toml", "kd-resnet-50-p37.5-imagenet"])
def test_a_packaged_name_is_not_taken_for_a_file(written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = feedfast("plan", written)
    assert outcome.code == 2
    name = written.removesuffix(".toml")
    assert f"feedfast recipes {name} --out {name}.toml" in outcome.error
    other = feedfast("plan", "nothing-of-ours.toml")
    assert "feedfast recipes" not in other.error


def test_they_are_part_of_the_package(tmp_path: Path) -> None:
    """Read wherever the command is run; that wheels hold them: test_packaging.py."""
    outcome = in_a_process("recipes", "lp-mnist", "--out", "copied.toml", cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "copied.toml").read_text() == packaged_recipe("lp-mnist")
    assert "lp-mnist" in packaged_recipes()


# ---- methods


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("catalog")


def recipe_file(folder: Path, codec: str = "u8", taps: str = "[]") -> Path:
    overrides = (f"cache.codec={codec}", f"teachers.0.taps={taps}", f"teachers.1.taps={taps}")
    return as_toml(digits_recipe(folder, overrides), folder / f"{codec}.toml")


def test_bytes_by_hand(folder: Path) -> None:
    """WRN-10-1 at 16 pixels: maps of 16x16x16, 32x8x8 and 64x4x4 values and ten float16 logits, of two teachers."""
    file = recipe_file(folder)
    assert feedfast("methods", "kd", "--recipe", file).document["bytes_per_sample"] == 2 * 10 * 2
    ofd = feedfast("methods", "ofd", "--recipe", file)
    assert ofd.document["bytes_per_sample"] == 2 * (16 * 256 + 32 * 64 + 64 * 16 + 10 * 2)
    assert ofd.document["targets"]["b/ofd2"] == {"shape": [32, 8, 8], "codec": "u8", "bytes_per_sample": 32 * 64}
    assert ofd.document["targets"]["a/logits"] == {"shape": [10], "codec": "f16", "bytes_per_sample": 20}
    assert "b/ofd2" in ofd.err
    u4 = feedfast("methods", "pfeed", "--recipe", recipe_file(folder, "u4")).document
    assert u4["bytes_per_sample"] == 2 * (64 * 16 // 2 + 20)
    assert feedfast("methods", "none", "--recipe", file).document["bytes_per_sample"] == 0


@pytest.mark.parametrize("codec", ["f32", "u8"])
@pytest.mark.parametrize("method", ["kd", "ofd", "fitnet"])
def test_bytes_are_those_of_plan(folder: Path, method: str, codec: str) -> None:
    file = recipe_file(folder, codec)
    planned = feedfast("plan", file, f"method.name={method}", "cache.views=1").document["targets"]
    found = feedfast("methods", method, "--recipe", file).document["targets"]
    assert {name: entry["bytes_per_sample"] * 200 for name, entry in found.items()} == {
        name: entry["raw_bytes"] for name, entry in planned.items()
    }


def test_the_list_with_a_recipe(folder: Path) -> None:
    plain = feedfast("methods").document["methods"]
    priced = feedfast("methods", "--recipe", recipe_file(folder)).document["methods"]
    assert plain.keys() == priced.keys() == METHODS.keys()
    for name, entry in priced.items():
        one = feedfast("methods", name, "--recipe", recipe_file(folder)).document
        assert entry["bytes_per_sample"] == one["bytes_per_sample"]
        assert {**entry, "bytes_per_sample": None} == plain[name]


def test_hand_named_taps_are_counted(folder: Path) -> None:
    """A last map named by hand is the one a method of ``final`` would read."""
    file = recipe_file(folder, taps='["final=block2"]')
    targets = feedfast("methods", "pfeed", "--recipe", file).document["targets"]
    assert targets["a/final"]["shape"] == [32, 8, 8]


def test_neither_weights_nor_images_are_needed(tmp_path: Path) -> None:
    """A copied recipe can be asked before anything of it is there; its network's own 100 classes are counted."""
    file = tmp_path / "r.toml"
    file.write_text(packaged_recipe("repdistiller-wrn-16-2-cifar100"))
    outcome = feedfast("methods", "kd", "--recipe", file)
    assert outcome.code == 0, outcome.err
    assert outcome.document["bytes_per_sample"] == 100 * 2
    assert "own number of classes" in outcome.err


def test_a_network_without_such_maps(folder: Path, tmp_path: Path) -> None:
    """A linear classifier has no maps: methods of logits have a price, others a reason."""
    flat = ("teachers.0.model=networks:flat", "teachers.0.classes=10", "teachers.0.taps=[]")
    file = as_toml(digits_recipe(folder, flat, teachers=1), tmp_path / "flat.toml")
    outcome = feedfast("methods", "--recipe", file)
    assert outcome.code == 0, outcome.err
    found = outcome.document["methods"]
    assert found["kd"]["bytes_per_sample"] == 20
    assert found["pfeed"]["bytes_per_sample"] is None
    assert "teachers[a]" in found["pfeed"]["refused"]
    json.dumps(found)


def test_mistakes_of_methods(folder: Path, tmp_path: Path) -> None:
    unknown = feedfast("methods", "offd", "--recipe", recipe_file(folder))
    assert unknown.code == 2
    assert "did you mean 'ofd'" in unknown.error
    file = tmp_path / "none.toml"
    file.write_text(packaged_recipe("teacher-wrn-16-2-mnist"))
    alone = feedfast("methods", "--recipe", file)
    assert alone.code == 2
    assert "[[teachers]]" in alone.error
