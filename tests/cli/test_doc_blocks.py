"""What the pages tell readers to type is understood, and what can run here does.

Every block of commands is parsed: the command, its options, and keys of recipes, as the command line would. Blocks that
need no cluster, no bucket and no hours are run: the quickstart (slow), README's loop (stages/test_stream.py), README's
test command (.ci/run), and the code of the walk-throughs below.
"""

from __future__ import annotations

import ast
import dataclasses
import doctest
import importlib
import inspect
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from commands import feedfast

import feedfast as feedfast_package
import feedfast_kernels
from feedfast import documents
from feedfast.cli import app
from feedfast.recipe import parse_recipe

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "kernels" / "README.md"],
    key=lambda page: page.relative_to(ROOT).as_posix(),
)
EXECUTED = {
    "docs/quickstart.md": "test_the_quickstart below; its first block installs, as README's",
    "README.md": ".ci/run runs the test command, stages/test_stream.py the loop; the rest needs CIFAR-100",
    "docs/add-method.md": "the class, below",
    "docs/add-network.md": "the class, below",
    "docs/add-data-source.md": "the function, below",
    "kernels/README.md": "the calls, below",
    "docs/python.md": "test_api.py and test_api_objects.py run such calls",
    "docs/loops.md": "lines of examples, which examples/test_examples.py compares and runs",
}
ONLY_PARSED = {
    "CONTRIBUTING.md": "installs",
    "docs/buckets.md": "needs a bucket; storage/ and stages/test_buckets.py run the same commands against a server",
    "docs/cluster.md": "needs a scheduler; stages/test_launch*.py run what it prints",
    "docs/commands.md": "examples of --help",
    "docs/install.md": "installs",
    "docs/data.md": "needs torchvision's CIFAR-10",
    "docs/dense.md": "hours",
    "docs/my-model.md": "downloads weights in part",
    "docs/pick-method.md": "hours",
    "docs/python.md": "needs a recipe; tests/test_api*.py make the same calls",
    "docs/ray.md": "stages/test_ray*.py run it",
    "docs/recipes.md": "paths in packaged recipes are placeholders",
    "docs/results.md": "hours",
    "docs/runs.md": "hours; stages/test_sweep.py runs a grid",
}
EXAMPLE = tomllib.loads((ROOT / "docs" / "recipe.md").read_text(encoding="utf-8").split("```toml\n")[1].split("```")[0])
OPERATORS = {"|", "||", "&", "&&", ";", ">", ">>", "<", "do", "done", "(", ")"}
COMMANDS = typer.main.get_command(app)


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(script: str) -> Iterator[list[str]]:
    """The arguments of every call of feedfast in a shell script, however it is started."""
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
        lexer.whitespace_split = True
        found: list[str] | None = None
        for word in [*lexer, ";"]:
            if word in OPERATORS:
                if found is not None:
                    yield found
                found = None
            elif found is not None:
                found.append(word)
            elif word == "feedfast":
                found = []


def parse(arguments: list[str]) -> dict[str, Any]:
    """The command line's own reading of them; it exits where it does not understand."""
    group, words = COMMANDS, [word for word in arguments if word not in ("-q", "-v")]
    while hasattr(group, "commands"):
        assert words, arguments
        assert words[0] in group.commands, f"feedfast {shlex.join(arguments)}: no such command"
        group = group.commands[words.pop(0)]
    with group.make_context("feedfast", words) as context:
        return dict(context.params)


def check_keys(params: dict[str, Any]) -> None:
    """key=value and --set name keys of recipes, with values that they take."""
    named = params.get("recipe")
    recipe = tomllib.loads((ROOT / named).read_text("utf-8")) if named and (ROOT / named).is_file() else EXAMPLE
    chosen = [setting.partition(",")[0] for setting in params.get("settings") or ()]
    chosen = [re.sub(r"=(\d+):\d+$", r"=\1", setting) for setting in chosen]
    for overrides in [params.get("overrides") or (), *([setting] for setting in chosen)]:
        parse_recipe(recipe, [word.replace("$s", "1").replace("$m", "kd") for word in overrides])


SCRIPTS = {page.relative_to(ROOT).as_posix(): blocks(page, "sh") for page in PAGES if blocks(page, "sh")}


@pytest.mark.parametrize("page", SCRIPTS)
def test_every_command_of_a_page_is_understood(page: str) -> None:
    for script in SCRIPTS[page]:
        for arguments in commands(script):
            if arguments:
                check_keys(parse(arguments))


def test_the_parser_of_blocks_finds_commands_and_their_mistakes() -> None:
    script = (
        "for s in 1; do feedfast -q cache a.toml \\\n  seed=$s; done | bash  # feedfast plan\nsrun -m feedfast train b"
    )
    assert [*commands(script)] == [["-q", "cache", "a.toml", "seed=$s"], ["train", "b"]]
    with pytest.raises(Exception, match=r"(?i)no such option"):
        parse(["cache", "a.toml", "--wrong"])
    with pytest.raises(AssertionError, match="no such command"):
        parse(["cachet", "a.toml"])
    with pytest.raises(Exception, match="epoch"):
        check_keys(parse(["train", "a.toml", "train.epoch=3"]))
    with pytest.raises(Exception, match="views"):
        check_keys(parse(["sweep", "a.toml", "--set", "cache.views=few,many"]))


def test_commands_and_options_in_running_text_exist() -> None:
    wrong = []
    for page in PAGES:
        if page.name in ("CHANGELOG.md", "log.md"):  # which tell of the past, too
            continue
        for code in re.findall(r"(?<!`)`(feedfast [^`\n]+)`(?!`)", page.read_text(encoding="utf-8")):
            words = [word.strip("[]|") for word in code.split()[1:]]
            words = [word for word in words if word not in ("-q", "-v")]
            if words[0] in ("--help", "COMMAND", "..."):
                continue
            command = COMMANDS.commands.get(words[0])
            if command is not None and hasattr(command, "commands") and len(words) > 1:
                command = command.commands.get(words[1])
            known = {} if command is None else {name for option in command.params for name in option.opts} | {"--help"}
            if command is None or any(word.startswith("--") and word not in known for word in words):
                wrong.append(f"{page.name}: {code}")
    assert wrong == []


def test_every_page_with_commands_says_whether_they_run() -> None:
    assert not EXECUTED.keys() & ONLY_PARSED.keys()
    with_blocks = {
        page.relative_to(ROOT).as_posix() for page in PAGES if blocks(page, "sh") or blocks(page, "python")
    } - {"CHANGELOG.md"}
    assert with_blocks <= EXECUTED.keys() | ONLY_PARSED.keys(), with_blocks - EXECUTED.keys() - ONLY_PARSED.keys()


@pytest.mark.parametrize("page", [page.relative_to(ROOT).as_posix() for page in PAGES if blocks(page, "python")])
def test_python_of_pages_compiles(page: str) -> None:
    """Or is a part of an example, which is run as a whole."""
    examples = [path.read_text(encoding="utf-8") for path in ROOT.glob("examples/*.py")]
    for code in blocks(ROOT / page, "python"):
        if not any(code in example for example in examples):
            compile(textwrap.dedent(code), page, "exec")


@pytest.mark.parametrize("page", [page.relative_to(ROOT).as_posix() for page in PAGES if blocks(page, "toml")])
def test_recipes_of_pages_are_recipes(page: str) -> None:
    for text in blocks(ROOT / page, "toml"):
        words = tomllib.loads(text)
        parse_recipe({**EXAMPLE, **words, "data": {"train": "x", **words.get("data", {})}})


def test_the_methods_example_learns() -> None:
    (code,) = blocks(ROOT / "docs" / "add-method.md", "python")
    space: dict[str, Any] = {"__name__": "hint"}
    sys.modules["hint"] = type(sys)("hint")
    sys.modules["hint"].__dict__.update(space)
    try:
        exec(code, sys.modules["hint"].__dict__)
        from feedfast.methods import StudentOutput, TapInfo

        hint = sys.modules["hint"].Hint
        teachers = {name: {"final": TapInfo((6, 4, 4))} for name in "ab"}
        torch.manual_seed(0)
        method = hint(hint.Options(), {"final": (3, 4, 4)}, teachers)
        taps = {"final": torch.randn(2, 3, 4, 4)}
        targets = {name: {"final": torch.randn(2, 6, 4, 4)} for name in "ab"}
        terms = method(StudentOutput(torch.zeros(2, 10), taps), targets, torch.zeros(2, dtype=torch.long))
        expected = 0.0
        for regressor, name in zip(method.regressors, "ab", strict=True):
            weight = regressor.weight.detach().double()[:, :, 0, 0]
            mapped = (
                torch.einsum("oc,bchw->bohw", weight, taps["final"].double()) + regressor.bias.double()[:, None, None]
            )
            expected += (mapped - targets[name]["final"].double()).square().mean().item()
        assert terms["hint"].item() == pytest.approx(expected, rel=1e-5)
        assert method.weights(0.5) == {"hint": 100.0}
    finally:
        del sys.modules["hint"]


def test_the_networks_example_has_the_published_size() -> None:
    (code,) = blocks(ROOT / "docs" / "add-network.md", "python")
    space = dict(vars(importlib.import_module("feedfast.models.zoo")))
    exec(code, space)
    network = space["PlainVGG"](100)
    assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e6, 2) == 3.96
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 100)


def test_the_data_sources_example_reads_and_refuses(tmp_path: Path) -> None:
    (code,) = blocks(ROOT / "docs" / "add-data-source.md", "python")
    space = dict(vars(importlib.import_module("feedfast.data.arrays")))
    exec(code, space)
    images = np.arange(3 * 4 * 5 * 3, dtype=np.uint8).reshape(3, 4, 5, 3)
    np.save(tmp_path / "a.npy", images)
    np.save(tmp_path / "a.labels.npy", np.array([0, 2, 1]))
    store, labels, classes = space["open_npy"](tmp_path / "a.npy")
    assert (labels.tolist(), len(classes)) == ([0, 2, 1], 3)
    assert np.array_equal(store.gather(np.array([2, 0])), images[[2, 0]])
    np.save(tmp_path / "a.labels.npy", np.array([0, -1, 1]))
    with pytest.raises(space["RequestError"], match="expected 3 labels >= 0"):
        space["open_npy"](tmp_path / "a.npy")


def test_the_calls_of_the_kernels_page() -> None:
    """As they are written there, on small maps; each is a finite scalar with a gradient for the student."""
    (code,) = blocks(ROOT / "kernels" / "README.md", "python")
    torch.manual_seed(0)
    batch = torch.nn.BatchNorm2d(4)
    step, offset = torch.full((4,), 0.02), torch.full((4,), -2.0)
    stored, _ = feedfast_kernels.encode(torch.randn(5, 4, 6, 6), offset, step, codec="u8")
    codes = feedfast_kernels.Codes(stored, offset, step, "u8")
    positions = torch.stack([torch.randperm(36)[:9] for _ in range(5)]).int()
    values = feedfast_kernels.gather_positions(feedfast_kernels.decode(codes), positions)
    logits, student = torch.randn(5, 10, requires_grad=True), torch.randn(5, 4, 6, 6, requires_grad=True)
    space = {
        "student_map": student, "conv_out": student, "x": student, "codes": codes, "codes_a": codes, "codes_b": codes,
        "bn": batch, "ntls": [torch.nn.Identity()] * 2, "some": feedfast_kernels.Sampled(values, positions, (6, 6)),
        "logits": logits, "teacher_a": torch.randn(5, 10), "teacher_b": torch.randn(5, 10),
        "labels": torch.arange(5), "margin": torch.zeros(4), "student_features": torch.randn(5, 7, requires_grad=True),
        "teacher_features": torch.randn(5, 9),
    }  # fmt: skip
    lines = code.splitlines()
    exec("\n".join(line for line in lines if line.startswith("from")), space)
    calls = [line for line in lines if line.startswith("loss = ")]
    assert len(calls) == 6
    for call in calls:
        exec(call.replace("k=5", "k=2"), space)
        space["loss"].backward()
        assert space["loss"].shape == (), call
        assert space["loss"].item() > 0, call
    assert all(space[name].grad.isfinite().all() for name in ("student_map", "logits", "student_features"))


SHOWN = ("feedfast.api.jobs", "feedfast.api.looks")  # tests/test_api.py runs them where they have a recipe


@pytest.mark.parametrize("module", SHOWN)
def test_examples_of_whole_jobs_fit_what_they_call(module: str) -> None:
    """Names, arguments, and what is asked of the document that comes back."""
    text = inspect.getsource(importlib.import_module(module))
    examples = re.findall(r"^ +>>> (.+)$", text, re.MULTILINE)
    assert len(examples) >= 5
    seen = 0
    for example in examples:
        for node in ast.walk(ast.parse(example)):
            call = node.value if isinstance(node, ast.Attribute) else node
            if not (isinstance(call, ast.Call) and ast.unparse(call.func).startswith("feedfast.")):
                continue
            function = getattr(feedfast_package, ast.unparse(call.func).removeprefix("feedfast."))
            inspect.signature(function).bind(*call.args, **{word.arg: None for word in call.keywords if word.arg})
            seen += 1
            if isinstance(node, ast.Attribute):
                returned = eval(function.__annotations__["return"], {"documents": documents})
                kinds = typing.get_args(returned) or (returned,)
                fields = {field.name for kind in kinds for field in dataclasses.fields(kind)}
                assert node.attr in fields, example
    assert seen >= len(examples) / 2


WITH_EXAMPLES = sorted(
    path.relative_to(root).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
    for root, package in ((ROOT, "feedfast"), (ROOT / "kernels", "feedfast_kernels"))
    for path in (root / package).rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("module", [module for module in WITH_EXAMPLES if module not in SHOWN])
def test_examples_in_docstrings_show_what_happens(module: str) -> None:
    importlib.import_module(module)
    results = doctest.testmod(sys.modules[module])  # a function of the package may hide the module of its name
    assert results.attempted > 0
    assert results.failed == 0


def calls(script: str) -> list[list[str]]:
    """What bash makes of a script: the arguments of every call of feedfast, loops and variables resolved."""
    told = subprocess.run(
        ["bash", "-euc", 'feedfast() { printf "%s\\x1f" "$@"; echo; }\n' + script],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return [line.removesuffix("\x1f").split("\x1f") for line in told.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(900)  # a dozen jobs; half a minute of processor time
def test_the_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From images to a comparison, word for word but for the number of images and epochs."""
    page = ROOT / "docs" / "quickstart.md"
    (code,), (recipe,) = blocks(page, "python"), blocks(page, "toml")
    _, *scripts = blocks(page, "sh")  # the first one installs
    for written, here in (("[:600]", "[:150]"), ("epochs = 12", "epochs = 1")):
        assert (code + recipe).count(written) == 1 + (written in code)
        code, recipe = code.replace(written, here), recipe.replace(written, here)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    Path("my.toml").write_text(recipe, encoding="utf-8")
    done = []
    for arguments in calls("\n".join(scripts)):
        outcome = feedfast(*arguments)
        assert outcome.code == 0, outcome.err
        done.append(arguments[0])
    assert done == ["train", "train", "plan", "cache", "sweep", "compare"]
    assert Path("runs/mine/compared/compare.html").is_file()
    assert len([*Path("runs/mine/sweep").glob("*/student.pt")]) == 4
    compared = outcome.document
    assert [group["seeds"] for group in compared["groups"]] == [[0, 1], [0, 1]]
    assert compared["groups"][1]["bytes_per_sample"] > 0
