"""Generated pages are those of today's classes, and they are complete."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import typer

import feedfast
import feedfast_kernels
from feedfast.cli import app
from feedfast.methods import METHODS
from feedfast.recipe import Recipe, packaged_recipes, parse_recipe

ROOT = Path(__file__).parents[2]
SIGNPOSTS = [
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md") if page.name != "log.md"),
]
WRITTEN_BY_READERS = {"feedfast/methods/hint.py"}  # the example of docs/add-method.md


def make_docs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "tools" / "make_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATED = ["recipe.md", "methods.md", "recipes.md", "augmentations.md", "commands.md", "reference.md"]


@pytest.mark.parametrize("name", GENERATED)
def test_generated_pages_are_those_of_today(name: str) -> None:
    tool = make_docs()
    assert [*tool.pages()] == GENERATED
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == tool.pages()[name], (
        f"docs/{name} differs from the classes it is made from; run: {tool.COMMAND}"
    )


def test_every_key_and_option_says_what_it_means() -> None:
    tool = make_docs()
    shown = {title.strip("[]").partition("]")[0] for title in tool.SECTIONS}
    plain = {key for key, field in Recipe.model_fields.items() if field.annotation in (int, bool)}
    assert shown - {"Top level", "An entry of teachers.N.taps"} == Recipe.model_fields.keys() - plain
    silent = [
        f"{title} {key}"
        for title, section in tool.SECTIONS.items()
        for key, field in section.model_fields.items()
        if not field.description
    ]
    silent += [
        f"{name} {key}"
        for name, method in METHODS.items()
        for key, field in method.Options.model_fields.items()
        if not field.description
    ]
    assert silent == []


def test_the_example_is_a_recipe() -> None:
    recipe = parse_recipe(tomllib.loads(make_docs().EXAMPLE))
    assert [teacher.name for teacher in recipe.teachers] == ["a"]
    assert recipe.method[0].name in METHODS


def test_what_is_new_for_dense_tasks_is_a_recipe() -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "dense.md").read_text(encoding="utf-8"), re.DOTALL)
    words = tomllib.loads(block)
    recipe = parse_recipe({**words, "data": {"train": "x", **words["data"]}})
    assert recipe.task.name == "segment"
    assert recipe.student.backbone == "resnet18.pth"


def test_tables_hold_type_range_and_default() -> None:
    """A few rows, written by hand, as a reader would want them."""
    data = make_docs().recipe_page().split("## ")[2]
    rows = {match[1]: match[0] for match in re.finditer(r"^\| `(\w+)` .*$", data, re.MULTILINE)}
    assert "| whole number | ≥ 4, ≤ 2048 | `32` |" in rows["size"]
    assert '| one of | `"fast"`, `"full"` | `"fast"` |' in rows["check"]
    assert "| list of: text |  | required |" in rows["train"]
    assert "| number | ≥ 0, ≤ 1 | `0.5` |" in rows["flip"]
    assert "| 3 of: number | > 0 | none |" in rows["std"]


def test_every_packaged_recipe_is_listed_once() -> None:
    page = make_docs().recipes_page()
    assert {name: page.count(f"| `{name}` |") for name in packaged_recipes()} == dict.fromkeys(packaged_recipes(), 1)


DOCUMENTS = [
    path for folder in (".", "docs", "docs/project", "kernels", "examples") for path in (ROOT / folder).glob("*.md")
]


def anchors(page: Path) -> set[str]:
    """What GitHub and the site call the headings of a page: small letters, spaces as hyphens, no punctuation."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#{1,6} (.+)$", text, re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
        name = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        names.add(f"{name}-{found[name]}" if name in found else name)
        found[name] = found.get(name, 0) + 1
    return names


def test_links_between_documents_lead_somewhere() -> None:
    dead = []
    for page in DOCUMENTS:
        text = page.read_text(encoding="utf-8")
        links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"<img src=\"([^\"]+)\"", text)
        for link in links:
            target, _, anchor = link.partition("#")
            if "://" in link:
                continue
            path = page.parent / target if target else page
            if not path.exists() or (anchor and anchor not in anchors(path)):
                dead.append(f"{page.relative_to(ROOT)} -> {link}")
    assert len(DOCUMENTS) >= 20
    assert dead == []


def test_every_page_is_in_a_table_of_contents_of_the_site() -> None:
    listed = {
        line.strip()
        for page in (ROOT / "docs").glob("*.md")
        for block in re.findall(r"^```{toctree}\n(.*?)^```$", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
        for line in block.splitlines()
        if line.strip() and not line.startswith(":")
    }
    docs = ROOT / "docs"
    pages = {path.relative_to(docs).with_suffix("").as_posix() for path in docs.glob("**/*.md")}
    assert pages - listed == {"index"}, "add the page to a toctree in docs/index.md"
    assert listed <= pages


def test_every_public_name_is_in_the_python_reference() -> None:
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^\.\. auto\w+:: ([\w.]+)", text, re.MULTILINE))
    wanted = {f"feedfast.{name}" for name in feedfast.__all__ if not name.startswith("_")}
    wanted |= {f"feedfast_kernels.{name}" for name in feedfast_kernels.__all__}
    assert wanted <= shown


def test_every_command_is_in_the_reference_of_commands() -> None:
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    group = typer.main.get_command(app)
    for name, command in group.commands.items():
        for full, inner in {f"{name} {sub}": one for sub, one in getattr(command, "commands", {}).items()}.items() or [
            (name, command)
        ]:
            section = text.split(f"\n## feedfast {full}\n")[1].split("\n## ")[0]
            options = {word for option in inner.params for word in option.opts if word.startswith("--")} - {"--help"}
            assert {word for word in options if f"`{word}`" not in section} == set(), full


def test_paths_in_documents_exist() -> None:
    """Signposts name files; one that has moved is a wrong signpost."""
    gone = []
    for page in SIGNPOSTS:
        text = (ROOT / page).read_text(encoding="utf-8")
        paths = re.findall(
            r"(?<![\w./-])(?:feedfast|kernels|tests|tools|bench|docs)/[\w./-]+\.(?:py|sh|md|toml|csv)\b", text
        )
        gone += [f"{page}: {path}" for path in paths if path not in WRITTEN_BY_READERS and not (ROOT / path).exists()]
        bare = re.findall(r"`([a-z_]+/[\w/]+\.py)`", text)  # within the package
        gone += [
            f"{page}: {path}"
            for path in bare
            if path not in WRITTEN_BY_READERS and not any((root / path).exists() for root in (ROOT, ROOT / "feedfast"))
        ]
    assert gone == []


def test_every_fault_is_pinned_by_a_test_that_exists() -> None:
    lines = [
        line for line in (ROOT / "docs" / "faults.md").read_text(encoding="utf-8").splitlines() if line[:2] == "| "
    ]
    pinned = [
        re.search(r"`([a-z]\w*/test_\w+\.py)::(test_\w+)` \|$", line) for line in lines if "pinned by" not in line
    ]
    assert len(pinned) == 18 + 22 + 12
    for found in pinned:
        assert found is not None
        text = (ROOT / "tests" / found[1]).read_text(encoding="utf-8")
        assert re.search(rf"^def {found[2]}\(", text, re.MULTILINE), found[0]
