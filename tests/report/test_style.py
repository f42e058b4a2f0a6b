"""Colors of the pages: every text and every line stands out from what it is on, light and dark."""

from __future__ import annotations

import re

import pytest

from feedfast.report.style import COLORS, STYLE


def schemes() -> dict[str, dict[str, tuple[float, ...]]]:
    """Scheme → custom property → red, green and blue in 0..1."""
    light, dark = (
        {name: tuple(int(text[at : at + 2], 16) / 255 for at in (0, 2, 4)) for name, text in found}
        for found in (re.findall(r"--(\w+):#([0-9a-f]{6})", part) for part in STYLE.split("@media screen and", 1))
    )
    return {"light": light, "dark": dark}


def luminance(color: tuple[float, ...]) -> float:
    """Relative, as WCAG 2 defines it."""
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in color]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrasts(scheme: str) -> None:
    colors = schemes()[scheme]
    for ground in ("bg", "panel"):
        for text in ("text", "muted", "accent"):
            assert contrast(colors[text], colors[ground]) >= 4.5, (text, ground)
    for number in range(COLORS):
        assert contrast(colors[f"c{number}"], colors["bg"]) >= 3, number
    assert contrast(colors["text"], colors["bg"]) >= 12


def test_both_schemes_have_all_colors() -> None:
    light, dark = schemes().values()
    assert set(light) == set(dark) >= {f"c{number}" for number in range(COLORS)}
    assert all(light[name] != dark[name] for name in light)


# What two kinds of color blindness see (Machado, Oliveira and Fernandes 2009, full severity), on linear light.
DEUTERANOPIA = ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881))
PROTANOPIA = ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998))


def lab(linear: list[float]) -> list[float]:
    to_xyz = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    shares = [
        sum(a * max(b, 0.0) for a, b in zip(row, linear, strict=True)) / white
        for row, white in zip(to_xyz, (0.9505, 1.0, 1.089), strict=True)
    ]
    f = [share ** (1 / 3) if share > 0.008856 else 7.787 * share + 16 / 116 for share in shares]
    return [116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("seen", [None, DEUTERANOPIA, PROTANOPIA], ids=["all", "deuteranopia", "protanopia"])
def test_series_that_follow_each_other_differ_for_everybody(
    scheme: str, seen: tuple[tuple[float, ...], ...] | None
) -> None:
    """The first four, which most figures have: about 2 can just be seen, 10 is another color."""
    found = []
    for number in range(4):
        linear = [
            value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
            for value in schemes()[scheme][f"c{number}"]
        ]
        if seen is not None:
            linear = [sum(a * b for a, b in zip(row, linear, strict=True)) for row in seen]
        found.append(lab(linear))
    for number, first in enumerate(found):
        for second in found[number + 1 :]:
            distance = sum((a - b) ** 2 for a, b in zip(first, second, strict=True)) ** 0.5
            assert distance > 10, (number, found.index(second), distance)
