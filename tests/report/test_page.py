"""Pages: whatever people call things, the markup is ours; what is said is all there, and fits on a page."""

from __future__ import annotations

import json
import os
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from made_pages import made, make_compare, make_pages, plain

from feedfast.errors import printable
from feedfast.recipe import packaged_recipe, packaged_recipes, parse_recipe
from feedfast.report.compare import write_groups
from feedfast.report.page import Html, Section, escaped, page, table
from feedfast.report.run import write_report
from feedfast.report.style import SCRIPT
from feedfast.words import toml_text

HOSTILE = (
    "</title></style></script></pre><script>alert(1)</script>",
    '" onload="alert(1)" x="',
    "' style='x",
    "<!-- <b>&lt;&#60;",
    "\x00\x1b[31m\x7f\x85\r\t\n",
    "\u202eevil\u2066\u061c\ufeff\ud800",
    "javascript:alert(1)",
    "x" * 400,
    "a/" * 60,
)
VOID = {"meta", "br", "wbr", "img"}


class Skeleton(HTMLParser):
    """Tags and names of attributes as a browser would see them, what is said, and whether all is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.marks: list[tuple[str, tuple[str, ...]]] = []
        self.open: list[str] = []
        self.said: list[str] = []
        self.values: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.values += [value or "" for _, value in attrs]
        if tag != "wbr":  # where a long path may break
            # numbers stand right and long words wrap: a class of the cell that follows its text
            names = tuple(name for name, _ in attrs if not (tag in ("td", "th") and name == "class"))
            self.marks.append((tag, names))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.marks.append((tag, tuple(name for name, _ in attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    def handle_data(self, data: str) -> None:
        self.said.append(data)

    @property
    def text(self) -> str:
        return "".join([*self.said, "\n", *self.values])


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Skeleton]:
    pages = make_pages(tmp_path_factory.mktemp("ordinary"), rows=6, classes=3)
    return {kind: Skeleton(path.read_text()) for kind, path in pages.items()}


def check(evil: str, folder: Path, ordinary: dict[str, Skeleton]) -> None:
    """Every name has ``evil`` in it; the markup is what it is without."""
    for kind, path in make_pages(folder, lambda name: f"{name}{evil}", rows=6, classes=3).items():
        found = Skeleton(path.read_text())
        assert found.marks == ordinary[kind].marks, kind
        assert found.said.count(SCRIPT) == 1
        assert printable(evil).replace("\r", "\n") in found.text.replace("\r", "\n"), kind
        assert printable(found.text) == found.text, "nothing that a terminal or a browser would obey"


@pytest.mark.parametrize("evil", HOSTILE)
def test_names_are_never_markup(evil: str, tmp_path: Path, ordinary: dict[str, Skeleton]) -> None:
    check(evil, tmp_path, ordinary)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters() | st.sampled_from("<>&\"'`=/{};\u202e\x1b"), min_size=1, max_size=20))
@example("&amp;lt;")
def test_nor_are_any_others(tmp_path: Path, ordinary: dict[str, Skeleton], evil: str) -> None:
    check(evil, tmp_path, ordinary)


def test_text_is_escaped_unless_somebody_says_otherwise() -> None:
    assert escaped("<i>") == "&lt;i&gt;"
    assert escaped(Html("<i>")) == "<i>"
    shown = table([{"<k>": "<v>", "n": 1.23456, "none": None}], "<c>")
    for part in ("&lt;k&gt;", "&lt;v&gt;", "&lt;c&gt;", ">1.235<", ">–<"):
        assert part in shown
    assert table([], "none") == ""


def test_sections_without_a_body_are_left_out() -> None:
    said = page("k", "t", "", [Section("Empty one", Html("")), Section("Full one", Html("<p>x</p>"))])
    assert "Empty one" not in said
    assert said.count("Full one") == 2  # in the list of sections, and as its heading


@pytest.mark.parametrize("value", [10**400, 1e308, -1e308, float("inf"), float("nan")])
def test_numbers_no_figure_can_take_are_left_out(value: float, tmp_path: Path) -> None:
    """A metrics file is anybody's: its numbers may be larger than any axis, or none."""
    rows = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": value}, {"step": 3, "loss": 0.5, "val_accuracy": value}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = write_report(tmp_path, {"seconds": value}, "").read_text()
    assert (
        "1 points that are not finite are left out" in said or "NaN" in json.dumps(value) or "Inf" in json.dumps(value)
    )
    assert "nan" not in said[said.index("<svg") : said.index("</svg>")]


def test_a_page_of_many_runs_stays_small(tmp_path: Path) -> None:
    """50 runs of 300 rows each: under 2 MB, and every group in the table."""
    path = make_compare(tmp_path, plain, groups=25, rows=300)
    said = path.read_text()
    assert len(said.encode()) < 2_000_000
    assert all(f"group {number}, train.lr=0.1" in said for number in range(25))


@pytest.mark.parametrize("name", sorted(packaged_recipes()))
def test_recipes_are_written_as_toml(name: str) -> None:
    recipe = parse_recipe(tomllib.loads(packaged_recipe(name)))
    assert parse_recipe(tomllib.loads(toml_text(recipe.model_dump(mode="json")))) == recipe


def trees(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), values, max_size=4)


WORDS = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from('"\\\x7f\x00\n#'), max_size=8)
SCALARS = WORDS | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False)


@given(trees(st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | trees(inner), max_leaves=12)))
def test_any_values_are_written_as_toml(tree: dict[str, Any]) -> None:
    assert tomllib.loads(toml_text(tree)) == tree


def test_links_lead_to_the_reports_of_runs(tmp_path: Path) -> None:
    """Relative, whatever the folders are called: also names that are not UTF-8, and that a browser would cut."""
    folders = [
        tmp_path / "runs" / os.fsdecode(name) for name in (b"a b%20#x?y=1", b"\"><script>'&", b"javascript:1", b"\xff")
    ]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "report.html").touch()
    (tmp_path / "pages").mkdir()
    page_ = tmp_path / "pages" / "compare.html"
    process = made(plain)
    write_groups(page_, [{"run": "kd"}], {"kd": [*folders, tmp_path / "gone"]}, "val_accuracy", "ce", process)
    found = Skeleton(page_.read_text())
    links = [value for value in found.values if value.startswith("./")]
    assert [(page_.parent / os.fsdecode(unquote_to_bytes(link))).resolve() for link in links] == [
        folder / "report.html" for folder in folders
    ]
    assert "gone" in found.said, "named, and no link"
