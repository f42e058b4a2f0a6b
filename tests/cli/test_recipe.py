"""Recipes: what is read, what is overridden, and that every mistake is one sentence naming the key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feedfast.errors import RequestError
from feedfast.recipe import load_recipe, parse_recipe
from feedfast.stages.folder import comparable, differences

MINIMAL = {"data": {"train": "images"}}
EXAMPLE = """
seed = 3
[data]
train = ["a.bin", "b.bin"]
val = "c.bin"
[cache]
path = "runs/c.zarr"
views = 2
[[teachers]]
name = "a"
model = "zoo/wrn-16-2"
weights = "a.pt"
[[teachers]]
name = "b"
model = "zoo/wrn-16-2"
[method]
name = "pfeed"
beta = 100.0
[train]
source = "live"
"""


def test_reads_the_documented_keys(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(EXAMPLE)
    recipe = load_recipe(path, ["teachers.1.weights=b.pt", "train.epochs=7", "data.val=d.bin", "train.compile=true"])
    assert recipe.data.train == ("a.bin", "b.bin")
    assert recipe.data.val == ("d.bin",)
    assert [teacher.weights for teacher in recipe.teachers] == ["a.pt", "b.pt"]
    assert [entry.parameters for entry in recipe.method] == [{"beta": 100.0}]
    assert (recipe.seed, recipe.train.epochs, recipe.train.compile) == (3, 7, True)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.epoch=3"], ["train.epoch", "did you mean 'epochs'"]),
        (["train.epochs=many"], ["train.epochs", "integer", "'many'"]),
        (["train.epochs=0"], ["train.epochs", "greater than or equal to 1", "0"]),
        (["seed"], ["'seed'", "key=value"]),
        (["seed.deep=1", "seed.deeper=2"], ["seed"]),
        (["cache.part=3/2"], ["cache.part", "3/2"]),
        (["cache.codec=u7"], ["cache.codec", "u8", "'u7'"]),
        (["method.name=kd"], ["teachers", "'kd'"]),
        (["data.train=[]"], ["data.train"]),
        (["train.device=tpu"], ["train.device", "'tpu'"]),
    ],
)
def test_mistakes_name_the_key_and_the_value(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(RequestError) as caught:
        parse_recipe(MINIMAL, overrides)
    for word in words:
        assert word in str(caught.value)
    assert caught.value.exit_code == 2


def test_lists_are_addressed_by_number() -> None:
    tree = {**MINIMAL, "teachers": [{"name": "a", "model": "m"}]}
    with pytest.raises(RequestError, match="below 1"):
        parse_recipe(tree, ["teachers.1.name=b"])
    with pytest.raises(RequestError, match="more than once"):
        parse_recipe({**MINIMAL, "teachers": [{"name": "a", "model": "m"}] * 2})


def test_one_method_or_several() -> None:
    teachers = {"teachers": [{"name": "a", "model": "m"}]}
    one = parse_recipe({**MINIMAL, **teachers, "method": {"name": "kd"}}, ["method.alpha=0.5", "method.name=ofd"])
    assert [(entry.name, entry.weight, entry.parameters) for entry in one.method] == [("ofd", 1.0, {"alpha": 0.5})]
    two = {**MINIMAL, **teachers, "method": [{"name": "kd", "tau": 2.0}, {"name": "ofd", "weight": 0.5}]}
    assert [entry.name for entry in parse_recipe(two, ["method.0.tau=3.0"]).method] == ["kd", "ofd"]
    assert parse_recipe(two, ["method.0.tau=3.0"]).method[0].parameters == {"tau": 3.0}
    with pytest.raises(RequestError, match=r"override 'method.tau'.*below 2"):
        parse_recipe(two, ["method.tau=3.0"])
    with pytest.raises(RequestError, match=r"method\.1\.weight: .*greater than or equal to 0"):
        parse_recipe(two, ["method.1.weight=-1.0"])
    with pytest.raises(RequestError, match="method: "):
        parse_recipe({**MINIMAL, "method": []})
    assert differences(comparable(parse_recipe(two)), comparable(parse_recipe(two, ["method.0.tau=3.0"]))) == [
        ("method.0.tau", 2.0, 3.0)
    ]


@pytest.mark.parametrize("text", [None, "= 3", "seed = 'x'"])
def test_bad_files(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "r.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RequestError, match=str(path)):
        load_recipe(path)


@given(seed=st.integers(0, 2**63 - 1), epochs=st.integers(1, 10**6))
def test_recipes_are_compared_by_their_values_not_by_their_order(seed: int, epochs: int) -> None:
    """As a folder of a run compares its recipe.json with the recipe it is given."""
    one = parse_recipe(MINIMAL, [f"seed={seed}", f"train.epochs={epochs}"])
    two = parse_recipe({"train": {"epochs": epochs}, "seed": seed, **MINIMAL})
    stored = json.loads(json.dumps(comparable(one)))
    assert one == two
    assert differences(stored, comparable(two)) == []
    more = parse_recipe(MINIMAL, [f"seed={seed}", f"train.epochs={epochs + 1}"])
    assert differences(stored, comparable(more)) == [("train.epochs", epochs, epochs + 1)]
    shorter = parse_recipe(MINIMAL, [f"seed={seed}", f"train.epochs={epochs}", "train.max_steps=3"])
    assert differences(stored, comparable(shorter)) == [], "where a run stops for now does not change what it is"
