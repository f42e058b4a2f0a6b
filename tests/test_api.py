"""Every command is a function with the same words, and prints the document that the function returns."""

from __future__ import annotations

import dataclasses
import doctest
import inspect
import json
import shutil
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import typer
from commands import feedfast
from small import as_toml, digits_recipe

import feedfast as package
from feedfast import api, cli, fit
from feedfast import cache as make_cache
from feedfast.documents import TrainDocument, document_of
from feedfast.models.build import build_model
from feedfast.stages import demo as stages_demo

# Commands whose function has another name: `feedfast.methods` is a package, and `train` is `fit`, too.
NAMES = {"methods": "list_methods", "recipes": "list_recipes", "analyze reconstruction": "analyze_reconstruction"}
# Parameters of the command line: what they are called in Python, None = lines for a shell, which no function prints.
WORDS = {"settings": "set", "no_check": "check", "launcher": None, "tasks": None, "script": None}


def commands() -> dict[str, Callable[..., Any]]:
    """Words of each command → the function that typer calls."""

    def named(app: typer.Typer, before: str = "") -> dict[str, Callable[..., Any]]:
        found = {before + (c.name or c.callback.__name__): c.callback for c in app.registered_commands if c.callback}
        for group in app.registered_groups:
            found |= named(group.typer_instance, f"{group.name} ")  # type: ignore[arg-type]
        return found

    return named(cli.app)


@dataclasses.dataclass(frozen=True)
class Made:
    """A recipe with its cache and two runs."""

    folder: Path
    recipe: Path

    def __truediv__(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("api")
    small = (
        *("data.limit=5", "cache.pilot=40", "cache.views=1", 'teachers.0.taps=["final"]'),
        *("train.max_steps=1", "train.eval_every=0"),
    )
    path = as_toml(digits_recipe(folder, small, teachers=1), folder / "recipe.toml")
    make_cache(path)
    (folder / "runs").mkdir()
    (folder / "runs" / "c100.zarr").symlink_to(folder / "digits.zarr")
    for name, method in (("plain", "none"), ("pfeed", "pfeed")):
        source = {"source": "none"} if method == "none" else {}
        fit(path, method={"name": method}, train={"out": str(folder / "runs" / name), **source})
    return Made(folder, path)


slow = pytest.mark.slow
CASES: dict[str, Callable[[Made], list[Any]]] = {
    "cache": lambda m: ["cache", m.recipe],
    "train": lambda m: ["train", m.recipe, f"train.out={m / 'runs/pfeed'}"],
    "factors": lambda m: ["factors", m.recipe, 'method={name="ft", paraphraser_epochs=1}'],
    "verify": lambda m: ["verify", m / "digits.zarr", "--full"],
    "inspect": lambda m: ["inspect", m / "digits.zarr"],
    "copy": lambda m: ["copy", m / "digits.zarr", m / "copied.zarr"],
    "compare": lambda m: ["compare", m / "runs/plain", m / "runs/pfeed"],
    "taps": lambda _: ["taps", "zoo/wrn-10-1"],
    "methods": lambda _: ["methods"],
    "methods NAME": lambda _: ["methods", "ofd"],
    "methods RECIPE": lambda m: ["methods", "--recipe", m.recipe],
    "methods NAME RECIPE": lambda m: ["methods", "ofd", "--recipe", m.recipe],
    "recipes": lambda _: ["recipes"],
    "recipes NAME": lambda _: ["recipes", "lp-cifar100"],
    "export": lambda m: ["export", m / "runs/pfeed", "--format", "state_dict"],
    "doctor": lambda _: ["doctor"],
    "plan": lambda m: ["plan", m.recipe],
    "sweep": lambda m: ["sweep", m.recipe, "--set", "train.lr=0.01,0.02", "--out", m / "sweep"],
    "chain": lambda m: ["chain", m.recipe, "method={name='ban'}", "chain.generations=2", f"train.out={m / 'chain'}"],
    "analyze reconstruction": lambda m: [
        *(
            "analyze",
            "reconstruction",
            m / "runs/plain",
            m / "runs/pfeed",
            "--epochs",
            1,
            "--limit",
            8,
            "--out",
            m / "analyzed",
        )
    ],
    "demo": lambda m: ["demo", "--out", m / "demo"],
}
SLOW = {"doctor", "plan", "sweep", "chain", "analyze reconstruction", "demo", "factors", "methods RECIPE"}


def test_every_command_is_a_function() -> None:
    known = commands()
    cases = {" ".join(word for word in case.split() if word.islower()) for case in CASES}
    assert known.keys() == cases
    for command, callback in known.items():
        function = getattr(api, NAMES.get(command, command))
        given = inspect.signature(function).parameters
        asked = {WORDS.get(name, name) for name in inspect.signature(callback).parameters} - {None}
        assert asked <= given.keys(), command
        assert "Example:" in (inspect.getdoc(function) or ""), command
    assert set(api.__all__) == {NAMES.get(command, command) for command in known} | {"fit"}


@pytest.mark.parametrize("case", [pytest.param(name, marks=slow if name in SLOW else ()) for name in CASES])
def test_what_a_command_prints_is_what_its_function_returns(
    case: str, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    returned: list[Any] = []

    class Watched:
        """The functions that `cli` finds, with what they return."""

        def __getattr__(self, name: str) -> Any:
            function = getattr(api, name)

            def call(*args: Any, **options: Any) -> Any:
                returned.append(function(*args, **options))
                return returned[-1]

            return call

    if case == "demo":  # of its nine trainings three, the first ones short
        for name, value in (("TEACHERS", ("a",)), ("METHODS", {"kd": {}}), ("LIVE_STEPS", 2)):
            monkeypatch.setattr(stages_demo, name, value)
        monkeypatch.setitem(stages_demo.TEACHER_TRAINING, "epochs", 1)
    monkeypatch.setattr(cli, "api", Watched())
    outcome = feedfast(*CASES[case](made))
    assert outcome.code == 0, outcome.err
    (document,) = returned
    assert json.loads(json.dumps(dataclasses.asdict(document))) == outcome.document
    assert document.to_json() == outcome.out.splitlines()[-1]
    refuse_other_type(document, type(document), case)


def refuse_other_type(value: Any, declared: Any, where: str) -> None:
    """Fail where a value is not of the type that its field declares."""
    origin, inner = get_origin(declared), get_args(declared)
    if declared is Any:
        return
    if origin in (Union, types.UnionType):
        if not (value is None and types.NoneType in inner):
            kinds = [kind for kind in inner if kind is not types.NoneType]
            if len(kinds) > 1:
                assert isinstance(value, tuple(kinds)), f"{where}: {value!r} is no {declared}"
            else:
                refuse_other_type(value, kinds[0], where)
    elif origin is Literal:
        assert value in inner, f"{where}: {value!r} is none of {inner}"
    elif origin is tuple:
        assert isinstance(value, tuple), f"{where}: {value!r} is no tuple"
        for number, entry in enumerate(value):
            refuse_other_type(entry, inner[0] if inner[-1] is Ellipsis else inner[number], f"{where}.{number}")
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        assert isinstance(value, Mapping), f"{where}: {value!r} is no mapping"
        for key, entry in value.items():
            refuse_other_type(key, inner[0], f"{where}.{key}")
            refuse_other_type(entry, inner[1], f"{where}.{key}")
    elif dataclasses.is_dataclass(declared):
        assert type(value) is declared, f"{where}: {value!r} is no {declared}"
        assert declared.__dataclass_params__.frozen, f"{where}: {declared} is not frozen"  # type: ignore[attr-defined]
        hints = get_type_hints(declared)
        for field in dataclasses.fields(declared):
            refuse_other_type(getattr(value, field.name), hints[field.name], f"{where}.{field.name}")
            assert f"{field.name}:" in (declared.__doc__ or ""), f"{declared}: {field.name} is not documented"
    else:
        wanted = (int, float) if declared is float else declared
        assert isinstance(value, wanted), f"{where}: {value!r} is no {declared}"
        assert not (isinstance(value, bool) and declared in (int, float)), f"{where}: {value!r} is a truth"


QUICK = {"cache", "fit", "verify", "inspect", "compare", "export", "copy", "taps", "list_methods", "list_recipes"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else slow) for name in api.__all__ if name != "train"]
)
def test_the_example_of_a_function(name: str, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """As written, on a small world; that of the demo takes a minute and is not run."""
    monkeypatch.chdir(made.folder)
    network, student = (build_model("zoo/wrn-10-1", num_classes=10, weights=w) for w in (made / "a.pt", None))
    names = {"feedfast": package, "network": network, "student": student}
    text = inspect.getdoc(getattr(api, name)) or ""
    test = doctest.DocTestParser().get_doctest(text, names, name, None, None)
    assert test.examples, name
    said: list[str] = []
    assert doctest.DocTestRunner(verbose=False).run(test, out=said.append).failed == 0, "".join(said)


def test_an_undeclared_key_is_refused() -> None:
    with pytest.raises(TypeError, match="TrainDocument: surprise: expected a declared key"):
        document_of(TrainDocument, {"surprise": 1})
    with pytest.raises(TypeError, match=r"missing .* 'final_loss'"):
        document_of(TrainDocument, {})


def test_a_recipe_is_a_file_an_object_or_tables(made: Made) -> None:
    """One request in four forms: nothing is left to write, and the digest is that of the command."""
    from feedfast.recipe import load_recipe

    held = load_recipe(made.recipe)
    tree = held.model_dump(mode="json", exclude_unset=True)
    forms: list[Any] = [made.recipe, str(made.recipe), held, tree]
    found = [make_cache(form) for form in forms]
    found.append(make_cache(data=tree["data"], teachers=tree["teachers"], cache=tree["cache"]))
    assert len({document.digest for document in found}) == 1
    assert [document.rows_written for document in found] == [0] * 5


def test_a_check_that_is_not_passed_is_no_error(made: Made, tmp_path: Path) -> None:
    copied = tmp_path / "c.zarr"
    shutil.copytree(made / "digits.zarr", copied)
    victim = next(path for path in copied.rglob("c/0/*") if path.is_file())
    victim.write_bytes(victim.read_bytes()[:-1])
    document = package.verify(copied, full=True)
    assert not document.ok
    assert {entry.kind for entry in document.problems} >= {"length"}
    failed = package.sweep(
        made.recipe, set={"train.batch": [32, 5000]}, out=tmp_path / "sweep", data={"val": []}, method="none"
    )
    assert failed.done == 1
    (why,) = failed.failed.values()
    assert why.startswith("train.batch: expected at most")
