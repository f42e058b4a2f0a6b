"""Figures: points are drawn where they belong, nothing is lost by thinning, and the numbers are there to read."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from feedfast.report.chart import Chart, Series, Span, chart, keys, spans, thinned, ticks


def parsed(text: str) -> ET.Element:
    """The figure as XML: a page is HTML, what is drawn is well-formed all the same."""
    return ET.fromstring(f"<x>{text}</x>".replace("<br>", "<br/>").replace("<wbr>", "<wbr/>"))


def curve(figure: ET.Element, number: int = 0) -> np.ndarray:
    """Places of a curve's points on the drawing."""
    paths = [path for path in figure.iter("path") if path.get("class") == "curve"]
    return np.array([[float(word) for word in place.split()] for place in paths[number].get("d", "")[1:].split("L")])


def axis(figure: ET.Element, vertical: bool) -> tuple[np.ndarray, np.ndarray]:
    """Numbers along an axis, and where they stand."""
    texts = [t for t in figure.iter("text") if (t.get("text-anchor") == "end") == vertical]
    pairs = []
    for text in texts:
        number = (text.text or "").replace(",", "")
        if re.fullmatch(r"[-+]?[\d.]+(e-?\d+)?", number):
            # the text's base line stands 4 below the middle of its digits
            pairs.append((float(number), float(text.get("y", "0")) - 4 if vertical else float(text.get("x", "0"))))
    values, places = zip(*pairs, strict=True)
    return np.array(values), np.array(places)


@pytest.mark.parametrize("log", [False, True])
def test_points_are_where_the_axes_say(log: bool) -> None:
    points = [(20.0, 2000.0), (40.0, 3.0), (60.0, 150.0), (100.0, 0.7)]
    figure = parsed(chart(Chart("Loss", [Series("a", points)], log=log)))
    assert ("logarithmic" in "".join(figure.itertext())) is log
    for column, vertical in enumerate((False, True)):
        values, places = axis(figure, vertical)
        assert len(values) >= 3
        scale = np.log(values) if log and vertical else values
        slope, offset = np.polyfit(scale, places, 1)
        wanted = np.array([point[column] for point in points])
        wanted = np.log(wanted) if log and vertical else wanted
        np.testing.assert_allclose(curve(figure)[:, column], slope * wanted + offset, atol=0.3)
    places = curve(figure)
    assert (places >= 0).all()
    assert (places <= [400, 230]).all()


@given(st.lists(st.floats(-1e290, 1e290), min_size=1, max_size=30), st.booleans())
def test_any_numbers_are_drawn_within_the_figure(values: list[float], log: bool) -> None:
    figure = parsed(chart(Chart("x", [Series("a", list(enumerate(map(float, values))))], log=log)))
    places = curve(figure)
    assert len(places) == len(values)
    assert np.isfinite(places).all()
    assert (places[:, 0] >= 0).all()
    assert (places[:, 0] <= 400).all()
    assert (places[:, 1] >= 0).all()
    assert (places[:, 1] <= 230).all()


def test_the_numbers_behind_a_figure_are_on_the_page() -> None:
    points = [(20.0, 0.123456), (40.0, 0.5), (60.0, 0.25)]
    figure = parsed(chart(Chart("Score", [Series("a <b>", points), Series("b", points[:1], style=1)])))
    listing = next(figure.iter("pre")).text or ""
    assert listing.splitlines() == ["a <b>: 20,0.12346 40,0.5 60,0.25", "b: 20,0.12346"]
    row = [cell.text for cell in list(figure.iter("tr"))[1]]
    assert row == ["a <b>", "3", "20", "0.1235", "0.1235", "0.5", "0.25"]
    svg = next(svg for svg in figure.iter("svg") if svg.get("role") == "img")
    assert (svg[0].tag, svg[0].text) == ("title", "Score")
    assert svg[1].tag == "desc"
    assert "a <b>: from 0.1235 at 20 to 0.25 at 60, lowest 0.1235, highest 0.5." in (svg[1].text or "")


def test_thinning_keeps_every_spike() -> None:
    rng = np.random.default_rng(0)
    points = [(float(x), float(y)) for x, y in enumerate(rng.normal(size=10_000))]
    points[4321] = (4321.0, 99.0)
    points[8765] = (8765.0, -99.0)
    kept = thinned(points, 200)
    assert len(kept) <= 200
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert {points[4321], points[8765]} <= set(kept)
    assert kept == sorted(set(kept) & set(points))
    assert thinned(points[:200], 200) == points[:200]


def test_long_curves_say_that_they_are_thinned() -> None:
    points = [(float(x), 1.0 + x % 7) for x in range(20_000)]
    said = chart(Chart("Loss", [Series("a", points)]))
    assert "points drawn, of more" in said
    assert len(said) < 200_000


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 8))
@example(879609.9999999999, 1e-6, 5)
def test_ticks_are_round_numbers_within(low: float, width: float, about: int) -> None:
    found = ticks(low, low + width, about)
    assert len(found) <= 2 * about + 2
    assert all(low - width * 1e-6 <= mark <= low + width * (1 + 1e-6) for mark in found)
    if len(found) > 1:
        step = found[1] - found[0]
        rounding = 10 * float(np.spacing(max(map(abs, found)))) / step
        assert np.allclose(np.diff(found), step, rtol=1e-6 + rounding, atol=0)
        digits = step / 10 ** math.floor(math.log10(step) + 1e-9)
        assert min(abs(digits - round_) for round_ in (1, 2, 5, 10)) < 1e-3 + 10 * rounding


def test_series_differ_in_more_than_color() -> None:
    """32 of them: no two have the same color, dash and marker."""
    entries = re.findall(r"<li>.*?</li>", keys([("x", number) for number in range(32)]))
    looks = [re.sub(r"<span>.*", "", entry) for entry in entries]
    assert len(set(looks)) == 32
    without_color = [re.sub(r"var\(--c\d\)", "", look) for look in looks[:8]]
    assert len(set(without_color)) == 8


def test_spans_lie_on_one_scale_with_zero() -> None:
    rows = [Span("a", 1.0, 0.5, "+1 ± 0.5"), Span("b <i>", -1.0, None, "-1")]
    figure = parsed(spans("Difference", rows, "points"))
    zero = {float(line.get("x1", "")[:-1]) for line in figure.iter("line") if line.get("class") == "axis"}
    dots = [float(dot.get("cx", "")[:-1]) for dot in figure.iter("circle")]
    bars = [line for line in figure.iter("line") if line.get("class") == "key"]
    (at,) = zero
    assert dots[0] - at == pytest.approx(at - dots[1], abs=0.02), "one above zero, one as far below"
    ends = [float(bars[0].get(end, "")[:-1]) for end in ("x1", "x2")]
    assert ends[1] - ends[0] == pytest.approx(dots[0] - at, abs=0.03), "twice a half"
    assert len(bars) == 3, "b has no interval"
    assert "b <i>" in [name.text for name in figure.iter("span")]
    assert spans("none", [], "points") == ""
    many = spans("many", [Span(f"row {number}", 1.0, 0.1, "x") for number in range(100)], "points")
    assert many.count("<circle") == 100
    assert "60 more, on the same scale" in many


def test_nothing_to_draw_is_no_figure() -> None:
    assert chart(Chart("x", [Series("a", [])])) == ""
    assert chart(Chart("x", [Series("a", [(1.0, math.nan), (math.inf, 1.0)])])) == ""
    assert "1 points that are not finite" in chart(Chart("x", [Series("a", [(1.0, math.nan), (2.0, 1.0)])]))


def test_there_is_no_epoch_and_a_half() -> None:
    figure = parsed(chart(Chart("L1", [Series("a", [(1, 0.5), (2, 0.4), (3, 0.3)])], x="epoch")))
    assert axis(figure, vertical=False)[0].tolist() == [1, 2, 3]
