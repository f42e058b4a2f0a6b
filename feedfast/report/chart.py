"""Figures as inline SVG: curves, and dots with their intervals, each with the numbers behind it.

Drawn here and not by a plotting library: the text stays text, the colors are the page's (dark or light), and a series
is told by color, dash and marker at once. Curves are drawn on 400 by 230 units, about the pixels of a telephone, and
grow to 1.4 times that. Dots and intervals are placed in percent and their names are HTML, which wraps; so they have no
width of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from feedfast.report.page import Html, details, escaped, joined, listing, table
from feedfast.report.style import COLORS

__all__ = ["Chart", "Series", "Span", "as_number", "chart", "charts", "keys", "spans", "thinned", "ticks"]

WIDTH, HEIGHT = 400, 230
MOST_POINTS = 4000
"""Of all series of a chart together; of longer ones the lowest and highest of each stretch are drawn."""
SPANS = 40
"""Dots with intervals that are shown at once; further ones are folded."""
_LEAST_POINTS = 24  # of a series
_MARKED = 8  # markers along a curve of more points than can each have one
_DASHES = ("", "7 3", "2 3", "8 3 2 3")
# Drawn from a point on: a stroke of no length with round or square ends is a dot or a square.
_MARKERS = ("h0", "h0", "m0-4.5l4.5 8h-9z", "m0-5l4.5 5-4.5 5-4.5-5z", "m-4-4l8 8m0-8l-8 8")
_CAPS = ("round", "square")
_HUGE = 1e300
_LOG_FROM = 50.0  # times the lowest value: from there a linear axis would show the lower terms as zero


@dataclass(frozen=True)
class Series:
    """A curve.

    Attributes:
        name: in the key.
        points: x and y, by x. What is not finite is left out.
        band: x, low and high, drawn behind it.
        style: which color, dash and marker; None = a thin gray line, for those that are many.
    """

    name: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float, float]] = ()
    style: int | None = 0


@dataclass(frozen=True)
class Chart:
    """Curves on common axes.

    Attributes:
        title: what is shown, with its unit.
        series: the curves.
        x: name of the horizontal axis.
        log: whether the vertical axis may be logarithmic: it is where positive values span a factor of 50.
    """

    title: str
    series: Sequence[Series]
    x: str = "step"
    log: bool = False


@dataclass(frozen=True)
class Span:
    """A dot with its interval; a dot alone without ``half``.

    Attributes:
        name: what it is of.
        middle: the value.
        half: half of the interval's width, or None.
        said: the same in words.
    """

    name: str
    middle: float
    half: float | None
    said: str = field(default="")


def charts(shown: Sequence[Chart], key: bool = True) -> Html:
    """Figures next to each other, or below each other on narrow screens; those without points are left out."""
    drawn = joined(chart(one, key) for one in shown)
    return Html(f'<div class="charts">{drawn}</div>') if drawn else drawn


def chart(shown: Chart, key: bool = True) -> Html:
    """A figure of curves with key and data; empty without points.

    Args:
        shown: what.
        key: whether it has a key of its own; a single curve never has one.
    """
    whole = [_finite(series) for series in shown.series]
    missing = sum(len(a.points) - len(b.points) for a, b in zip(shown.series, whole, strict=True))
    curves = [series for series in whole if series.points]
    if not curves:
        return Html("")
    most = max(_LEAST_POINTS, MOST_POINTS // len(curves))
    drawn = [
        Series(s.name, thinned(s.points, most), s.band[:: max(-(-len(s.band) // most), 1)], s.style) for s in curves
    ]
    values = [y for s in curves for _, y in s.points] + [
        v for s in drawn for _, low, high in s.band for v in (low, high)
    ]
    log = shown.log and min(values) > 0 and max(values) / min(values) >= _LOG_FROM
    title = shown.title + (" (logarithmic axis)" if log else "")
    said = f"{title} by {shown.x}. " + " ".join(_in_words(series) for series in curves[:12])
    if len(curves) > 12:
        said += f" And {len(curves) - 12} more; all are in the data below."
    svg = _svg(drawn, values, shown.x, log, f"<title>{escaped(title)}</title><desc>{escaped(said)}</desc>")
    left_out = f"{missing:,} points that are not finite are left out." if missing else ""
    return Html(
        f'<figure class="chart"><figcaption><strong>{escaped(title)}</strong> {escaped(left_out)}</figcaption>{svg}'
        f"{keys([(s.name, s.style) for s in curves]) if key and len(curves) > 1 else ''}{_data(shown, curves, drawn)}"
        "</figure>"
    )


def keys(entries: Sequence[tuple[str, int | None]]) -> Html:
    """Names with the color, dash and marker of their series."""
    items = []
    for name, style in entries:
        line = f'<path class="{"faint" if style is None else "key"}"{_dashed(style)} d="M1 6H33"/>'
        items.append(
            f'<li><svg viewBox="0 0 34 12" aria-hidden="true">{line}{_marker(style, [(17, 6)])}</svg>'
            f"<span>{escaped(name)}</span></li>"
        )
    return Html(f'<ul class="keys">{"".join(items)}</ul>')


def spans(title: str, rows: Sequence[Span], unit: str) -> Html:
    """Dots with their intervals, one below the other, on a common scale with zero marked; empty without rows.

    Args:
        title: what they are.
        rows: the dots; those behind the first `SPANS` are folded.
        unit: of the values.
    """
    rows = [row for row in rows if _drawable(row.middle, row.half or 0.0)]
    if not rows:
        return Html("")
    ends = [row.middle + sign * (row.half or 0.0) for row in rows for sign in (-1, 1)]
    low, high = min(0.0, *ends), max(0.0, *ends)
    margin = (high - low) * 0.03 or 1.0
    low, high = low - margin, high + margin

    def place(value: float) -> str:
        return f"{100 * (value - low) / (high - low):.2f}%"

    zero = f'<line class="axis" x1="{place(0)}" x2="{place(0)}" y1="0" y2="22" stroke-dasharray="2 2"/>'
    marks = "".join(
        f'<text x="{place(mark)}" y="15" text-anchor="middle">{_number(mark)}</text>' for mark in ticks(low, high, 4)
    )
    items: list[str] = []
    for row in rows:
        bar = ""
        if row.half is not None:
            ends_at = place(row.middle - row.half), place(row.middle + row.half)
            bar = f'<line class="key" stroke="var(--c0)" x1="{ends_at[0]}" x2="{ends_at[1]}" y1="11" y2="11"/>'
            bar += "".join(f'<line class="key" stroke="var(--c0)" x1="{x}" x2="{x}" y1="6" y2="16"/>' for x in ends_at)
        dot = f'<circle cx="{place(row.middle)}" cy="11" r="4.5" fill="var(--c0)"/>'
        items.append(
            f'<li><span class="name">{escaped(row.name)}</span><span class="value">{escaped(row.said)}</span>'
            f'<svg height="22" aria-hidden="true">{zero}{bar}{dot}</svg></li>'
        )
    said = f"{title}: dot and 95 % interval, in {unit}; the dashed line is zero."
    scale = f'<li class="scale" aria-hidden="true"><svg height="22">{marks}</svg></li>'
    shown_, more = items[:SPANS], items[SPANS:]
    first, rest = (Html(f'<ul class="spans">{"".join(some)}{scale}</ul>') for some in (shown_, more))
    folded = details(f"{len(more)} more, on the same scale", rest) if more else ""
    return Html(f"<figure><figcaption>{escaped(said)}</figcaption>{first}{folded}</figure>")


def thinned(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most ``most`` points that keep the shape: first, last, and of each stretch its lowest and highest."""
    if len(points) <= most:
        return list(points)
    inner, stretches = points[1:-1], max((most - 2) // 2, 1)
    kept = {0, len(points) - 1}
    for number in range(stretches):
        start, end = (len(inner) * edge // stretches for edge in (number, number + 1))
        if start < end:
            places = range(start, end)
            kept |= {1 + min(places, key=lambda i: inner[i][1]), 1 + max(places, key=lambda i: inner[i][1])}
    return [points[place] for place in sorted(kept)]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``, about that many: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * times for times in (1, 2, 5, 10) if power * times >= rough * 0.999)
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    marks = [round(number * step, 12 - math.floor(math.log10(step))) for number in numbers]
    # far from zero a quotient is exact to some steps only
    return [mark for mark in marks if low - 1e-9 * step <= mark <= high + 1e-9 * step]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between two, which are given as logarithms; with their 2 and 5 where they are few."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    every = max(1, len(decades) // 6)
    times = (1, 2, 5) if sum(low <= power <= high for power in decades) < 3 else (1,)
    logs = [(power, one) for power in decades if power % every == 0 for one in times]
    return [float(f"{one}e{power}") for power, one in logs if low <= power + math.log10(one) <= high]


def as_number(value: float) -> float:
    """A number of anybody's file as a figure can take it: integers may be larger than any float."""
    try:
        return float(value)
    except OverflowError:
        return math.nan


def _drawable(*values: float) -> bool:
    """Finite, and so that differences are, too."""
    return all(abs(value) < _HUGE for value in values)


def _finite(series: Series) -> Series:
    points = [point for point in series.points if _drawable(*point)]
    band = [one for one in series.band if _drawable(*one)]
    return Series(series.name, points, band, series.style)


def _number(value: float) -> str:
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e6):
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}"


def _in_words(series: Series) -> str:
    (x0, first), (x1, last) = series.points[0], series.points[-1]
    lowest, highest = (pick(y for _, y in series.points) for pick in (min, max))
    if len(series.points) == 1:
        return f"{series.name}: {_number(first)} at {_number(x0)}."
    return (
        f"{series.name}: from {_number(first)} at {_number(x0)} to {_number(last)} at {_number(x1)}, "
        f"lowest {_number(lowest)}, highest {_number(highest)}."
    )


def _data(shown: Chart, curves: Sequence[Series], drawn: Sequence[Series]) -> Html:
    """The numbers: a table of what each curve does, and the points that are drawn."""
    rows = [
        {
            "series": series.name,
            "points": len(series.points),
            f"first {shown.x}": series.points[0][0],
            "first": series.points[0][1],
            "lowest": min(y for _, y in series.points),
            "highest": max(y for _, y in series.points),
            "last": series.points[-1][1],
        }
        for series in curves
    ]
    fewer = any(len(a.points) > len(b.points) for a, b in zip(curves, drawn, strict=True))
    lines = [
        f"{series.name}: " + " ".join(f"{x:.7g},{y:.5g}" for x, y in series.points) for series in drawn if series.points
    ]
    name = f"{shown.title}: {'points drawn, of more' if fewer else 'all points'}, as {shown.x},value"
    return details(
        "Data of this figure", joined([table(rows, f"{shown.title}, in numbers"), listing("\n".join(lines), name)])
    )


def _svg(series: Sequence[Series], values: Sequence[float], x_name: str, log: bool, title: str) -> str:
    xs = [float(x) for one in series for x, _ in one.points]
    x_low, x_high = min(xs), max(xs)
    if x_low == x_high:
        x_low, x_high = x_low - 1, x_high + 1
    low, high = min(values), max(values)
    if log:
        low, high = math.log10(low) - 0.06, math.log10(high) + 0.06
        marks = _log_ticks(low, high)
    else:
        room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        low, high = low - room, high + room
        marks = ticks(low, high)
    left = 14 + 6.6 * max((len(_number(mark)) for mark in marks), default=1)
    top, right, bottom = 8.0, WIDTH - 10.0, HEIGHT - 38.0

    def at_x(value: float) -> float:
        return left + (value - x_low) / (x_high - x_low) * (right - left)

    def at_y(value: float) -> float:
        share = ((math.log10(value) if log else value) - low) / (high - low)
        return bottom - share * (bottom - top)

    parts = []
    for mark in marks:
        y = f"{at_y(mark):.1f}"
        parts.append(f'<path class="grid" d="M{left:.1f} {y}H{right}"/>')
        parts.append(f'<text x="{left - 6:.1f}" y="{at_y(mark) + 4:.1f}" text-anchor="end">{_number(mark)}</text>')
    whole = all(x.is_integer() for x in xs)  # there is no step or epoch and a half
    for mark in [mark for mark in ticks(x_low, x_high, 4) if not whole or mark.is_integer()]:
        parts.append(f'<path class="axis" d="M{at_x(mark):.1f} {bottom}v4"/>')
        parts.append(f'<text x="{at_x(mark):.1f}" y="{bottom + 17}" text-anchor="middle">{_number(mark)}</text>')
    parts.append(f'<path class="axis" d="M{left:.1f} {top}V{bottom}H{right}"/>')
    parts.append(f'<text x="{(left + right) / 2:.1f}" y="{HEIGHT - 5}" text-anchor="middle">{escaped(x_name)}</text>')
    for one in sorted(series, key=lambda one: one.style is not None):  # the gray ones below
        if one.band:
            there = [f"{at_x(x):.1f} {at_y(top_):.1f}" for x, _, top_ in one.band]
            back = [f"{at_x(x):.1f} {at_y(low_):.1f}" for x, low_, _ in reversed(one.band)]
            parts.append(f'<path class="band" fill="{_color(one.style)}" d="M{"L".join(there + back)}Z"/>')
        places = [(at_x(x), at_y(y)) for x, y in one.points]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        kind = "faint" if one.style is None else "curve"
        name = f"<title>{escaped(one.name)}</title>"
        parts.append(f'<path class="{kind}"{_dashed(one.style)} d="M{path}">{name}</path>')
        every = 1 if len(places) <= 3 * _MARKED else len(places) / _MARKED
        start = 0 if every == 1 else every * (0.5 + ((one.style or 0) % 5) / 5 - 0.4)  # not all at the same x
        chosen = [places[int(start + number * every)] for number in range(int((len(places) - 1 - start) / every) + 1)]
        parts.append(_marker(one.style, chosen))
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{title}{"".join(parts)}</svg>'


def _color(style: int | None) -> str:
    return "var(--muted)" if style is None else f"var(--c{style % COLORS})"


def _dashed(style: int | None) -> str:
    if style is None:
        return ""
    dash = _DASHES[style % len(_DASHES)]
    return f' stroke="{_color(style)}"' + (f' stroke-dasharray="{dash}"' if dash else "")


def _marker(style: int | None, places: Sequence[tuple[float, float]]) -> str:
    if style is None:
        return ""
    shape = style % len(_MARKERS)
    path = "".join(f"M{x:.1f} {y:.1f}{_MARKERS[shape]}" for x, y in places)
    if shape < len(_CAPS):
        return f'<path class="dots" stroke="{_color(style)}" stroke-linecap="{_CAPS[shape]}" d="{path}"/>'
    fill = "none" if shape == len(_MARKERS) - 1 else _color(style)
    return f'<path class="sign" stroke="{_color(style)}" fill="{fill}" d="{path}"/>'
