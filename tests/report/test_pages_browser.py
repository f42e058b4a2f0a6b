"""Pages in a real browser: nothing is fetched, nothing overflows, the keyboard reaches everything, axe-core is content.

Chromium must be there where CI is set; elsewhere the tests are skipped without it. Screenshots are kept in
runs/screenshots/ under CI, and where FEEDFAST_SCREENSHOTS names a folder.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from made_pages import make_compare, make_pages, make_run, plain

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
KINDS = ("run", "compare", "demo", "inspect", "reconstruction", "many", "odd")
WIDTHS = (400, 1600)
SCHEMES = ("light", "dark")
JUDGED = ((400, "dark"), (1600, "light"))
RULES = ("wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice")
# what can be clicked or scrolled, is shown, and is not folded away; in the order it stands
REACHABLE = """() => [...document.querySelectorAll("a[href], button, summary, [tabindex='0']")]
    .filter(e => e.checkVisibility() && !e.parentElement.closest("details:not([open]) > :not(summary)"))"""


def odd(name: str) -> str:
    """Names as people give them at their worst: long without a space, and with what would be markup."""
    return f"{name}-<script>alert('1')</script>-\u202e{'long' * 40}"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Ordinary pages; one of 200 groups of runs and one of 100 classes; and one of odd names."""
    out = tmp_path_factory.mktemp("pages")
    found = make_pages(out, rows=60)
    found["many"] = make_compare(out / "many", plain, groups=200, rows=10)
    found["odd"] = make_run(out / "odd", odd, rows=10, classes=100)
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        message = f"no Chromium found ({', '.join(NAMES)}): apt-get install chromium"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    api = pytest.importorskip("playwright.sync_api")
    flags = ["--disable-gpu", "--disable-quic", *["--no-sandbox"] * (os.geteuid() == 0)]
    with api.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=path, args=flags)
        yield started
        started.close()


@pytest.fixture(scope="module")
def axe() -> str:
    package = pytest.importorskip("axe_playwright_python")
    return Path(package.__file__).with_name("axe.min.js").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def visit(browser: Any, pages: dict[str, Path]) -> Iterator[Callable[..., Any]]:
    """Kind of page → it, opened; what the browser complained of and asked for is in its ``said`` and ``asked``."""
    contexts: dict[tuple[int, str, bool], Any] = {}

    def opened(kind: str | Path, width: int = 1600, scheme: str = "light", script: bool = True) -> Any:
        key = (width, scheme, script)
        if key not in contexts:
            size = {"width": width, "height": 900}
            contexts[key] = browser.new_context(viewport=size, color_scheme=scheme, java_script_enabled=script)
        page = contexts[key].new_page()
        page.said, page.asked = [], []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto((pages[kind] if isinstance(kind, str) else kind).as_uri())
        return page

    yield opened
    for context in contexts.values():
        context.close()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_page_is_sound(
    visit: Callable[..., Any], axe: str, pages: dict[str, Path], kind: str, width: int, scheme: str
) -> None:
    page = visit(kind, width, scheme)
    keep_screenshot(page, f"{kind}-{width}-{scheme}")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "with all details open"
    if kind != "many" and (width, scheme) in JUDGED:  # of many runs it is the markup of a few, and takes a minute
        found = judged(page, axe)
        assert [(rule["id"], rule["nodes"][0]["html"][:200]) for rule in found["violations"]] == []
        # what axe cannot judge by itself: text in SVG and on pictures; contrasts are computed in test_style.py
        assert {rule["id"] for rule in found["incomplete"]} <= {"color-contrast"}
    assert page.said == []
    assert [url for url in page.asked if not url.startswith("data:")] == [pages[kind].as_uri()]
    page.close()


def test_the_checks_can_fail(visit: Callable[..., Any], axe: str, pages: dict[str, Path]) -> None:
    """A page with one fault of each kind: each is found."""
    bad = "<h5 style='color:#888;background:#999'>hard to read</h5><p style='width:900px'>wide</p>"
    bad += "<img src='data:,'><a href='#'></a><img src='https://example.invalid/x.png' alt='x'>"
    spoiled = pages["demo"].with_name("bad.html")
    spoiled.write_text(pages["demo"].read_text().replace("<h2 ", f"{bad}<h2 ", 1).replace(' lang="en"', ""))
    page = visit(spoiled, 400)
    found = {rule["id"] for rule in judged(page, axe)["violations"]}
    assert found >= {"color-contrast", "image-alt", "html-has-lang", "link-name", "heading-order"}
    assert page.evaluate("document.documentElement.scrollWidth") > 400
    assert any("example.invalid" in text for text in [*page.said, *page.asked])
    page.close()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["run", "compare"])
def test_everything_is_reached_by_keyboard_in_order(visit: Callable[..., Any], kind: str, width: int) -> None:
    page = visit(kind, width)
    page.evaluate(f"window.order = ({REACHABLE})()")
    count = page.evaluate("window.order.length")
    assert count > 10
    reached = []
    for _ in range(count):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("window.order.indexOf(document.activeElement)"))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid", "focus can be seen"
    assert reached == list(range(count))
    page.close()


def test_the_skip_link_leads_to_the_content(visit: Callable[..., Any]) -> None:
    page = visit("run", 400)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0, "it is seen when it has the focus"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.close()


def test_a_page_without_scripts_says_the_same(visit: Callable[..., Any]) -> None:
    with_, without = visit("compare"), visit("compare", script=False)
    assert without.locator("button").count() == 0
    assert with_.locator("th button").count() > 0
    words = [page.locator("main").inner_text().split() for page in (with_, without)]
    assert words[0] == words[1]
    with_.close()
    without.close()


def test_tables_are_sorted_by_number(visit: Callable[..., Any]) -> None:
    page = visit("many")
    column = page.locator("table").first.locator("tbody tr td:nth-child(3)")
    head = page.locator("table").first.locator("thead th:nth-child(3)")
    before = [float(text.split("%")[0]) for text in column.all_inner_texts()]
    for order, reverse in (("descending", True), ("ascending", False)):
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == order
        found = [float(text.split("%")[0]) for text in column.all_inner_texts()]
        assert found == sorted(before, reverse=reverse)
    page.close()


def test_colors_follow_the_scheme_and_paper_is_white(visit: Callable[..., Any]) -> None:
    read = (
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('.curve')).stroke]"
    )
    light, dark = (visit("run", 1600, scheme) for scheme in SCHEMES)
    seen = [page.evaluate(read) for page in (light, dark)]
    assert seen[0][0] != seen[1][0]
    assert seen[0][1] != seen[1][1], "curves, too"
    dark.emulate_media(media="print")
    assert dark.evaluate(read) == seen[0]
    assert dark.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    for page in (light, dark):
        page.close()


def test_a_script_that_got_into_a_page_would_not_run(visit: Callable[..., Any], pages: dict[str, Path]) -> None:
    """The second fence: were a name not escaped, the page's policy still lets only its own script run."""
    text = pages["demo"].read_text()
    evil = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"
    spoiled = pages["demo"].with_name("spoiled.html")
    spoiled.write_text(text.replace("<h1>", f"{evil}<h1>"))
    page = visit(spoiled)
    assert page.title() != "owned"
    assert len(page.said) >= 2
    assert page.locator("th button").count() > 0, "its own script did run"
    page.close()


def judged(page: Any, axe: str) -> Any:
    """What axe-core finds."""
    page.evaluate(axe)
    return page.evaluate(
        "rules => axe.run(document, {runOnly: rules, resultTypes: ['violations', 'incomplete']})", list(RULES)
    )


def keep_screenshot(page: Any, name: str) -> None:
    asked = os.environ.get("FEEDFAST_SCREENSHOTS")
    if not asked and not os.environ.get("CI"):
        return
    folder = Path(asked) if asked else ROOT / "runs" / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{name}.png", full_page=True)
