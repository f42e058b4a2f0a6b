"""How a recipe, tables and overrides become one request: each rule on its own, without a stage."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from feedfast.arguments import asked, override_texts
from feedfast.errors import RequestError
from feedfast.recipe import Recipe, parse_recipe
from feedfast.words import override, toml_text

TREE: dict[str, Any] = {
    "data": {"train": "t.npz", "val": "v.npz", "size": 16},
    "teachers": [{"name": "a", "model": "zoo/wrn-10-1", "weights": "a.pt"}, {"name": "b", "model": "zoo/wrn-10-1"}],
    "cache": {"path": "c.zarr", "views": 3},
    "method": {"name": "kd", "tau": 2.0},
}


class Pairs:
    """A data set."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        raise IndexError(index)


NETWORK, PAIRS = nn.Linear(2, 2), Pairs()
WORD = "python/torch.nn.modules.linear.Linear"


def changed(**tables: Any) -> Recipe:
    return asked(TREE, **tables).recipe


def test_tables_change_the_keys_they_name() -> None:
    plain = parse_recipe(TREE)
    assert changed() == plain
    assert changed(cache={"views": 1}).cache == plain.cache.model_copy(update={"views": 1})
    assert changed(cache=Path("d.zarr")).cache == plain.cache.model_copy(update={"path": "d.zarr"})
    assert changed(data={"val": "w.npz"}).data == plain.data.model_copy(update={"val": ("w.npz",)})
    assert changed(student="zoo/wrn-16-2").student.model == "zoo/wrn-16-2"
    assert changed(task="segment").task.name == "segment"
    assert changed(train="runs/mine").train.out == "runs/mine"
    assert changed(seed=3).seed == 3
    assert changed(chain=4).chain.generations == 4


def test_another_method_brings_its_own_options() -> None:
    (same,) = changed(method={"tau": 5.0}).method
    assert (same.name, same.parameters) == ("kd", {"tau": 5.0})
    (other,) = changed(method="ofd").method
    assert (other.name, other.parameters) == ("ofd", {})
    several = [{"name": "kd"}, {"name": "ofd"}]
    assert [entry.name for entry in asked({**TREE, "method": several}, method="at").recipe.method] == ["at"]
    for one in (parse_recipe(TREE), {**TREE, "method": [TREE["method"]]}):
        (kept,) = asked(one, method={"weight": 3.0}).recipe.method
        assert (kept.name, kept.weight, kept.parameters) == ("kd", 3.0, {"tau": 2.0})
    assert [entry.name for entry in changed(method=[{"name": "kd"}, {"name": "ofd"}]).method] == ["kd", "ofd"]


def test_teachers_change_by_name_or_all_together() -> None:
    plain = parse_recipe(TREE).teachers
    a, b, c = changed(teachers={"c": "timm/resnet18", "b": {"weights": "b.pt"}}).teachers
    assert a == plain[0]
    assert (b.name, b.model, b.weights) == ("b", "zoo/wrn-10-1", "b.pt")
    assert (c.name, c.model) == ("c", "timm/resnet18")
    (only,) = changed(teachers=[{"name": "z", "model": "zoo/wrn-16-2"}]).teachers
    assert only.name == "z"


@pytest.mark.parametrize(
    "overrides", [{"cache.views": 7, "teachers.1.name": "x"}, ("cache.views=7", "teachers.1.name=x")]
)
def test_overrides_come_last(overrides: Any) -> None:
    found = asked(TREE, overrides, cache={"views": 5}, part="1/2").recipe
    assert (found.cache.views, found.teachers[1].name, found.cache.part) == (7, "x", "1/2")
    assert asked(TREE, "cache.views=7").recipe.cache.views == 7
    assert TREE["cache"]["views"] == 3  # the caller's own tables are left as they are


def test_networks_and_data_sets_stand_where_names_do() -> None:
    found = asked(TREE, data={"train": PAIRS, "val": PAIRS}, teachers={"a": NETWORK, "n": NETWORK}, student=NETWORK)
    assert (found.train, found.val, found.student) == (PAIRS, PAIRS, NETWORK)
    assert found.teachers == {"a": NETWORK, "n": NETWORK}
    # a name that the recipe has stays; without one the class is the word
    assert [teacher.model for teacher in found.recipe.teachers] == ["zoo/wrn-10-1", "zoo/wrn-10-1", WORD]
    assert (found.recipe.data.train, found.recipe.data.val) == (("python",), ("python",))
    assert found.recipe.student.model == WORD
    for given in ({"model": NETWORK}, NETWORK):
        kept = asked({**TREE, "student": {"model": "zoo/wrn-16-2"}}, student=given)
        assert (kept.recipe.student.model, kept.student) == ("zoo/wrn-16-2", NETWORK)
    inside = asked(
        {**TREE, "teachers": [{"name": "q", "model": nn.DataParallel(NETWORK)}], "student": {"model": NETWORK}}
    )
    assert inside.recipe.teachers[0].model == WORD
    assert inside.student is NETWORK
    assert asked(TREE, {"data.train": PAIRS}).train is PAIRS
    assert asked(TREE, data={"train": ["a.bin", "b.bin"]}).recipe.data.train == ("a.bin", "b.bin")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no table": ({"model": "zoo/wrn-16-2"}, "model: expected a table of the recipe, seed, overwrite, data"),
    "no key": ({"cache": {"view": 1}}, r"cache\.view: unknown key; did you mean 'views'"),
    "no name": ({"teachers": [{"model": NETWORK}]}, r"teachers\.0\.name: required"),
    "number": ({"student": 3}, r"student\.model: "),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(case: str) -> None:
    tables, said = BAD[case]
    with pytest.raises(RequestError, match=said):
        changed(**tables)


def test_what_is_no_recipe() -> None:
    with pytest.raises(
        RequestError, match=r"recipe: expected the path of a TOML file, a Recipe or its tables, found int"
    ):
        asked(3)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"recipe /nowhere\.toml: expected a TOML file, found nothing there"):
        asked("/nowhere.toml")
    with pytest.raises(RequestError, match=r"data\.train: each run starts anew from names"):
        asked(TREE, data=PAIRS).refuse_objects("each run")


VALUES: list[Any] = [
    *(
        0,
        -3,
        2.5,
        1e-3,
        True,
        "",
        "plain",
        "a b",
        'say "x"',
        "it's",
        "1",
        "true",
        "nan",
        "x,y",
        "\\",
        "ü€",
        "a=b",
        "{a}",
    ),
    *([], [1, 2], ["a", "b,c"], [{"op": "rand-augment", "n": 2}], "runs/my.zarr", "~/x", "zoo/wrn-16-2"),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_as_text_mean_what_they_are(value: Any) -> None:
    """Read back by the command line's own reader, alone, among several of a sweep, and as a file."""
    from feedfast.stages.sweep import _axis

    tree: dict[str, Any] = {}
    (text,) = override_texts({"a.b": value})
    override(tree, text)
    assert tree == {"a": {"b": value}}
    assert type(tree["a"]["b"]) is type(value)
    assert tomllib.loads(toml_text({"k": value, "n": {"in": value}})) == {"k": value, "n": {"in": value}}
    if value not in ("", []):
        key, values = _axis(override_texts({"a.b": [value, "other"]}, several=True)[0])
        again: dict[str, Any] = {}
        override(again, f"{key}={values[0]}")
        assert (len(values), again) == (2, {"a": {"b": value}})


def test_arguments_need_no_torch() -> None:
    code = (
        "import sys; from feedfast import api; from feedfast.arguments import asked\n"
        "asked({'data': {'train': 'x'}}, student={'model': 'zoo/wrn-16-1'})\n"
        "print([name for name in ('torch', 'zarr', 'nvidia.dali') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.strip() == "[]"
