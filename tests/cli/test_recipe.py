"""Recipes: what is read, what is overridden, and that every mistake is one sentence naming the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter, ValidationError

from feedfast.errors import RequestError
from feedfast.methods import METHODS
from feedfast.models.taps import parse_tap
from feedfast.recipe import Recipe, load_recipe, parse_recipe
from feedfast.stages.folder import comparable, differences
from feedfast.tap_entry import CodecName, TapEntry

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
    two: dict[str, Any] = {
        **MINIMAL,
        **teachers,
        "method": [{"name": "kd", "tau": 2.0}, {"name": "ofd", "weight": 0.5}],
    }
    assert [entry.name for entry in parse_recipe(two, ["method.0.tau=3.0"]).method] == ["kd", "ofd"]
    assert parse_recipe(two, ["method.0.tau=3.0"]).method[0].parameters == {"tau": 3.0}
    only = {**two, "method": two["method"][:1]}
    changed = parse_recipe(only, ["train.epochs=2", "method.tau=3.0", "method.0.alpha=0.5", "method.weight=2.0"])
    assert [(entry.name, entry.weight) for entry in changed.method] == [("kd", 2.0)]
    assert changed.method[0].parameters == {"tau": 3.0, "alpha": 0.5}
    with pytest.raises(RequestError, match=r"override 'method.tau'.*below 2"):
        parse_recipe(two, ["method.tau=3.0"])
    with pytest.raises(RequestError, match=r"method\.1\.weight: .*greater than or equal to 0"):
        parse_recipe(two, ["method.1.weight=-1.0"])
    with pytest.raises(RequestError, match="method: "):
        parse_recipe({**MINIMAL, "method": []})
    assert differences(comparable(parse_recipe(two)), comparable(parse_recipe(two, ["method.0.tau=3.0"]))) == [
        ("method.0.tau", 2.0, 3.0)
    ]


CODEC_NAMES = get_args(CodecName)
FORMS = ("", ":pre", ":post", ":end", ":map", ":tokens", ":pre:map", ":tokens:end")
NAMES = st.text("abcxyz019_-", min_size=1, max_size=6)
PLACES = st.sampled_from(["final", "ofd", "ofd2", "stage", "stage11"]) | st.builds(
    lambda name, path, form: f"{name}={'.'.join(path)}{form}",
    *(NAMES, st.lists(NAMES | st.sampled_from(CODEC_NAMES), min_size=1, max_size=3), st.sampled_from(FORMS)),
)


def taps_of(*entries: Any) -> tuple[TapEntry, ...]:
    return parse_recipe({**MINIMAL, "teachers": [{"name": "a", "model": "m", "taps": list(entries)}]}).teachers[0].taps


SHARES = st.none() | st.sampled_from([0.5, 0.25, 1e-05]) | st.floats(0, 1, exclude_min=True, exclude_max=True)


@given(place=PLACES, margin=st.booleans(), share=SHARES, codec=st.sampled_from([None, *CODEC_NAMES]))
def test_a_tap_as_text_and_as_a_table(place: str, margin: bool, share: float | None, codec: str | None) -> None:
    """The same entry, and the same text in a run's recipe.json; what belongs to the place stays with it."""
    text = place + ("+margin" if margin else "") + (f"@{share!r}" if share else "") + (f":{codec}" if codec else "")
    table = {"tap": place, "margin": margin, "sample": share, "codec": codec}
    said = {key: value for key, value in table.items() if value}
    assert len({*taps_of(text, table, said)}) == 1
    entry = taps_of(text)[0]
    assert (entry.tap, entry.margin, entry.sample, entry.codec) == (place, margin, share, codec)
    assert json.loads(entry.model_dump_json()) == text


@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_no_codec_is_a_word_of_a_place(codec: str) -> None:
    with pytest.raises(RequestError, match="expected :pre, :post or :end"):
        parse_tap(f"x=layer1:{codec}")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("ofd:u7", ["taps.0: expected a group", "+margin", "u4", "found 'ofd:u7'"]),
        ("ofd:u4+margin", ["taps.0: expected a group", "found 'ofd:u4+margin'"]),
        ("ofd+margin+margin", ["found 'ofd+margin+margin'"]),
        (":u4", ["taps.0: expected a group", "found ':u4'"]),
        ("", ["taps.0: expected a group", "found ''"]),
        (5, ["taps.0: expected text or a table", "found 5"]),
        ({"margin": True}, ["taps.0.tap: required"]),
        ({"tap": "ofd", "margn": True}, ["taps.0.margn: unknown key", "did you mean 'margin'"]),
        ({"tap": "ofd", "width": 1}, ["taps.0.width: unknown key", "known keys: codec, margin, sample, tap"]),
        ({"tap": "ofd", "codec": "u7"}, ["taps.0.codec", "'u8'", "found 'u7'"]),
        ({"tap": "ofd+margin"}, ["taps.0.tap: expected the place alone", "found 'ofd+margin'"]),
        ({"tap": "x=layer1:pre:u4"}, ["taps.0.tap: expected the place alone", "found 'x=layer1:pre:u4'"]),
        ("logits:f16", ["taps.0: expected neither margin nor codec with logits"]),
        ({"tap": "logits", "margin": True}, ["taps.0: expected neither margin nor codec with logits"]),
        ("logits@0.5", ["taps.0: expected no sample with logits"]),
        ("ofd@", ["taps.0: expected a share above 0 and below 1 after @", "found 'ofd@'"]),
        ("ofd@a", ["taps.0: expected a share above 0 and below 1 after @", "found 'ofd@a'"]),
        ("ofd@0.5+margin", ["taps.0: expected a share above 0 and below 1 after @", "found 'ofd@0.5+margin'"]),
        ("ofd@0.5@0.5", ["taps.0: expected a share above 0 and below 1 after @"]),
        ("ofd:u8@0.5", ["taps.0: expected a group", "then @ and a share", "found 'ofd:u8@0.5'"]),
        ("@0.5", ["taps.0: expected a group", "found '@0.5'"]),
        ("ofd@0", ["taps.0.sample", "greater than 0", "0.0"]),
        ("ofd@1", ["taps.0.sample", "less than 1", "1.0"]),
        ("ofd@-0.5", ["taps.0.sample", "greater than 0", "-0.5"]),
        ("ofd@nan", ["taps.0.sample", "nan"]),
        ({"tap": "ofd", "sample": 1.5}, ["taps.0.sample", "less than 1", "1.5"]),
        ({"tap": "ofd", "sample": "many"}, ["taps.0.sample", "number", "'many'"]),
        ({"tap": "ofd@0.5"}, ["taps.0.tap: expected the place alone", "found 'ofd@0.5'"]),
    ],
)
def test_mistakes_in_a_tap(entry: Any, words: list[str]) -> None:
    with pytest.raises(RequestError) as caught:
        taps_of(entry)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


TEXTS = {
    "Teacher.name", "Teacher.model", "Teacher.taps", "Student.model", "MethodEntry.name", "Cache.part", "Train.device",
    "Data.arrays", "Data.val_arrays", "Data.augment", "Teacher.key", "Teacher.prefix", "Student.key", "Student.prefix",
    "TapEntry.tap", "Train.tags",
}  # fmt: skip
PATHS = {
    "Data.train", "Data.val", "Cache.path", "Cache.local", "Teacher.weights", "Student.weights", "Student.backbone",
    "Train.out",
}  # fmt: skip


def sections(model: type[BaseModel]) -> set[type[BaseModel]]:
    """A model and those of its fields, however they are nested."""
    found = {model}
    for field in model.model_fields.values():
        parts = [field.annotation]
        while parts:
            part = parts.pop()
            parts += get_args(part)
            if isinstance(part, type) and issubclass(part, BaseModel):
                found |= sections(part)
    return found


def test_a_tilde_is_expanded_in_every_path_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every key that takes text is a path or is known not to be one: a new path key cannot be forgotten."""
    monkeypatch.setenv("HOME", "/home/somebody")
    expanded, kept = set(), set()
    options = {method.Options for method in METHODS.values()}
    for model in sorted(sections(Recipe) | options, key=lambda model: model.__qualname__):
        for key, field in model.model_fields.items():
            taken = TypeAdapter(Annotated[field.annotation, key, *field.metadata])
            for value in ("~/x", ["~/x"]):
                try:
                    found = taken.validate_python(value)
                except ValidationError:
                    continue
                where = expanded if found in ("/home/somebody/x", ("/home/somebody/x",)) else kept
                where.add(f"{model.__qualname__}.{key}")
    assert expanded == PATHS
    assert {key for key in kept if not key.endswith("Options.tap")} <= TEXTS
    recipe = parse_recipe(MINIMAL, ["train.out=~/x", "cache.path=~"])
    assert (recipe.train.out, recipe.cache.path) == ("/home/somebody/x", "/home/somebody")
    with pytest.raises(RequestError, match=r"train.out: expected a path, '~nobody-at-all' is nobody's home"):
        parse_recipe(MINIMAL, ["train.out=~nobody-at-all/x"])


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
