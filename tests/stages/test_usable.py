"""What a recipe's own method, student and teachers cannot use is said before the first row, by every command alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import feedfast
from small import as_toml, digits_recipe

from feedfast.methods import METHODS
from feedfast.models.build import build_model
from feedfast.stages.offline import run_cache
from feedfast.stages.usable import served


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("usable")
    torch.save(build_model("zoo/wrn-10-1", num_classes=20, seed=0).state_dict(), folder / "twenty.pt")
    as_toml(digits_recipe(folder, teachers=1), folder / "recipe.toml")
    return folder


UNUSABLE: dict[str, tuple[list[str], list[str]]] = {
    "classes": (
        ["method.name=kd", "teachers.0.weights={folder}/twenty.pt", "teachers.0.classes=20"],
        ["'kd'", "expected 10 in every teacher, found 20 in 'a'"],
    ),
    "taps": (["method.name=at"], ["'at'", "needs the 'stage*' taps of teacher 'a'", "'logits', 'ofd1'"]),
    "factors of no map": (
        ["method.name=ft", "method.factors=stored", 'teachers.0.taps=["ofd"]'],
        ["'ft'", "'factor' taps of teacher 'a'"],
    ),
    "grids": (["method.name=ofd", "student.model=zoo/resnet-20", 'teachers.0.taps=["ofd2=relu"]'], ["ofd"]),
    "student's maps": (["method.name=ofd", "student.model=torchvision/vit_b_16"], ["VisionTransformer"]),
    "no such student": (["student.model=zoo/wrm-10-1"], ["zoo/wrm-10-1"]),
    "student's weights": (["student.weights={folder}/nowhere.pt"], ["nowhere.pt"]),
    "branches": (["method.name=ekd"], ["student.branches"]),
    "option": (["method.betta=3"], ["method.betta", "did you mean 'beta'"]),
    "option among shapes": (["method.name=ofd", "method.tap_weights=[1, 2]"], ["method.tap_weights", "3 numbers"]),
    "method": (["method.name=magic"], ["method.name", "'magic'"]),
}


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) if "maps" in k else k for k in UNUSABLE])
def test_it_is_said_before_the_first_row(folder: Path, tmp_path: Path, kind: str) -> None:
    """By `plan` and `cache` in the words of `train`, which meets it before its first step."""
    overrides, words = UNUSABLE[kind]
    filled = [text.format(folder=folder) for text in overrides] + [f"cache.path={tmp_path / 'c.zarr'}"]
    for command in ("plan", "cache"):
        outcome = feedfast(command, folder / "recipe.toml", *filled)
        assert outcome.code == 2, outcome.err
        for word in words:
            assert word in outcome.error
        assert len(outcome.error.splitlines()) == 1
        assert not (tmp_path / "c.zarr").exists()
    live = feedfast("train", folder / "recipe.toml", *filled, "train.source=live", f"train.out={tmp_path / 'out'}")
    assert live.code == 2, "no stricter than training itself"


def test_a_chain_is_refused_before_its_first_generation(folder: Path, tmp_path: Path) -> None:
    """Whose student has no maps that it could teach the next one by."""
    chain = ("chain.generations=2", f"cache.path={tmp_path / 'c.zarr'}", f"train.out={tmp_path / 'out'}")
    outcome = feedfast("chain", folder / "recipe.toml", *chain, "method.name=ofd", "method.tap_weights=[1, 2]")
    assert outcome.code == 2
    assert "method.tap_weights: expected 3 numbers" in outcome.error
    assert list(tmp_path.iterdir()) == []


def test_it_goes_on_when_asked(folder: Path, tmp_path: Path) -> None:
    asked = ("cache.views=1", f"cache.path={tmp_path / 'c.zarr'}", "method.name=at")
    for command in ("plan", "cache"):
        outcome = feedfast(command, folder / "recipe.toml", *asked, "--no-check")
        assert outcome.code == 0, outcome.err
        assert "needs the 'stage*' taps of teacher 'a'" in outcome.err
        assert "going on as asked" in outcome.err
    assert outcome.document["rows_written"] == 200
    nobody = feedfast("plan", folder / "recipe.toml", *asked, "student.model=zoo/wrm-10-1", "--no-check")
    assert nobody.code == 0, nobody.err
    assert nobody.document["live_over_cached"] is None
    assert "stage*" in nobody.document["unusable"]


def test_what_the_cache_has_already_counts(folder: Path, tmp_path: Path) -> None:
    """A recipe that names one tap only, with a method that reads others: they are there."""
    path = tmp_path / "c.zarr"
    recipe = digits_recipe(folder, (f"cache.path={path}", "cache.views=1", "method.name=ofd"), teachers=1)
    run_cache(recipe)
    fewer = ('teachers.0.taps=["final"]', f"cache.path={path}", "cache.views=1", "method.name=ofd")
    assert feedfast("cache", folder / "recipe.toml", *fewer).document["rows_written"] == 0
    assert feedfast("cache", folder / "recipe.toml", *fewer, f"cache.path={tmp_path / 'new.zarr'}").code == 2


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("method.name=magic", "'magic'"),
        ("method.betta=3", "'beta'"),
        ("train.source=none", "train.source"),
        ("student.model=zoo/wrm-10-1", "zoo/wrm-10-1"),
    ],
)
def test_a_wrong_recipe_is_named_before_a_missing_cache(folder: Path, tmp_path: Path, override: str, word: str) -> None:
    missing = (f"cache.path={tmp_path / 'none.zarr'}", f"train.out={tmp_path / 'out'}")
    outcome = feedfast("train", folder / "recipe.toml", *missing, override)
    assert outcome.code == 2
    assert word in outcome.error
    assert "none.zarr" not in outcome.error


def test_methods_served(folder: Path) -> None:
    """Every method's declared needs against the taps of all teachers."""
    from feedfast.methods import TapInfo

    maps = {"final": TapInfo((64, 4, 4)), "ofd1": TapInfo((16, 16, 16)), "logits": TapInfo((10,))}
    found = served({"a": maps, "b": {**maps, "stage1": TapInfo((16, 16, 16))}}, 10)
    assert found.keys() == METHODS.keys()
    assert {name for name, reason in found.items() if not reason} == {
        name for name, kind in METHODS.items() if kind.needs and set(kind.needs) <= {"final", "ofd*", "logits"}
    }
    assert found["at"] == "needs the 'stage*' taps of teacher 'a', found ['final', 'logits', 'ofd1']"
    other = served({"a": maps, "b": {**maps, "logits": TapInfo((20,))}}, 10)
    assert other["kd"] == "compares classes, found 20 in 'b' and 10 in the images"
    assert other["pfeed"] == ""
