"""Numbers and pages for people: what plan promises is what the cache takes, what inspect shows is what is there."""

from __future__ import annotations

import base64
import re
import struct
from pathlib import Path

import pytest
from commands import feedfast
from small import as_toml, digits_recipe


def bytes_of(folder: Path) -> int:
    """Bytes of the objects below a folder, without Zarr's own metadata."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and file.name != "zarr.json")


@pytest.mark.parametrize(
    ("overrides", "tolerance"),
    [
        ([], 0.05),
        (["cache.codec=f32", "cache.views=1", "cache.batch=23"], 0.01),
        (["cache.codec=u4", "cache.images=stored"], 0.05),
        (["cache.codec=f16", 'teachers.0.taps=["final"]'], 0.05),
    ],
)
def test_plan_promises_what_the_cache_takes(tmp_path: Path, overrides: list[str], tolerance: float) -> None:
    recipe = as_toml(digits_recipe(tmp_path, teachers=1), tmp_path / "recipe.toml")
    planned = feedfast("plan", recipe, *overrides)
    assert planned.code == 0, planned.err
    assert not (tmp_path / "digits.zarr").exists(), "planning makes nothing"
    made = feedfast("cache", recipe, *overrides).document
    plan, cache = planned.document, tmp_path / "digits.zarr"
    assert made["bytes"] == sum(bytes_of(cache / part) for part in ("views", "samples", "targets", "pixels"))
    assert plan["bytes"] == pytest.approx(made["bytes"], rel=tolerance)
    assert plan["bytes_per_sample"] == pytest.approx(made["bytes_per_sample"], rel=tolerance)
    assert plan["bytes_present"] == 0
    for name, entry in plan["targets"].items():
        folder = cache / ("pixels" if name == "pixels" else f"targets/{name}") / "codes"
        assert entry["bytes"] == pytest.approx(bytes_of(folder), rel=2 * tolerance), name
        values = 1
        for side in entry["shape"]:
            values *= side
        if name == "a/final":
            width = {"f32": 4, "f16": 2, "u4": 0.5}.get(
                next((o[-3:].strip("=") for o in overrides if "codec" in o), ""), 1
            )
            rows = made["rows_written"]
            assert entry["raw_bytes"] == width * values * rows
    again = feedfast("plan", recipe, *overrides).document
    assert again["bytes_present"] == made["bytes"]


def test_plan_times_add_up(tmp_path: Path) -> None:
    recipe = as_toml(digits_recipe(tmp_path, teachers=2), tmp_path / "recipe.toml")
    plan = feedfast("plan", recipe).document
    assert plan["teachers_ms"] > 0
    assert plan["student_ms"] > 0
    assert plan["live_over_cached"] == pytest.approx((plan["teachers_ms"] + plan["student_ms"]) / plan["student_ms"])
    assert plan["images_per_second"] == pytest.approx(32 / plan["pass_ms"] * 1e3)
    assert plan["pass_ms"] >= plan["teachers_ms"] + plan["encode_ms"]
    # the pilot with the quarter that measures it, then two views
    batches_ms = (plan["teachers_ms"] * 160 * 1.25 + plan["pass_ms"] * 400) / 32
    assert plan["seconds"] == pytest.approx(plan["setup_seconds"] + batches_ms / 1e3 + 2 * plan["view_seconds"])
    assert plan["setup_seconds"] > plan["view_seconds"] > 0
    assert plan["break_even_epochs"] == pytest.approx(plan["seconds"] / (plan["teachers_ms"] * 200 / 32 / 1e3))
    assert set(plan["targets"]) == {f"{t}/{tap}" for t in "ab" for tap in ("final", "ofd1", "ofd2", "ofd3", "logits")}


def pictures(page: str) -> list[tuple[int, int]]:
    """Width and height of every inline PNG."""
    found = [base64.b64decode(text) for text in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    assert all(data.startswith(b"\x89PNG\r\n\x1a\n") for data in found)
    return [struct.unpack(">II", data[16:24]) for data in found]


def fetches_nothing(page: str) -> bool:
    return not re.search(r'src="(?!data:)|href="(?!#)|@import|url\(', page)


def test_inspect_draws_the_maps(tmp_path: Path) -> None:
    recipe = as_toml(digits_recipe(tmp_path, teachers=2), tmp_path / "recipe.toml")
    made = feedfast("cache", recipe).document
    outcome = feedfast("inspect", tmp_path / "digits.zarr", "--out", tmp_path / "pages" / "deep")
    assert outcome.code == 0, outcome.err
    document = outcome.document
    assert document["bytes"] == made["bytes"]
    assert (document["rows"], document["views"], document["complete"]) == (200, 2, True)
    for name, entry in document["targets"].items():
        assert entry["bytes"] == bytes_of(tmp_path / "digits.zarr" / name), name
        assert entry["rows"] == 400
    assert (
        document["targets"]["targets/a/final/codes"]["relative_rms_error"]
        == made["taps"]["a/final"]["relative_rms_error"]
    )
    page = Path(document["report"]).read_text(encoding="utf-8")
    assert Path(document["report"]) == tmp_path / "pages" / "deep" / "inspect.html"
    sides = [16, *(4, 4, 16, 16, 8, 8, 4, 4)]  # the image; final, ofd1, ofd2 and ofd3 of both teachers
    views = [16] * 2 * 3  # a contact sheet: two views of each of three images
    assert pictures(page) == [(side, side) for side in [*sides * 6, *views]]
    assert page.count("<img alt=") == len(sides) * 6 + len(views)
    assert fetches_nothing(page)
    for text in ("a/ofd1", "b/final", document["manifest"]["teachers"]["a"]["weights_sha256"]):
        assert text in page


def test_inspect_without_the_images(tmp_path: Path) -> None:
    """A cache from somebody else: its images are not here, its maps are drawn all the same."""
    recipe = as_toml(digits_recipe(tmp_path, teachers=1), tmp_path / "recipe.toml")
    feedfast("cache", recipe)
    (tmp_path / "digits-train.npz").unlink()
    outcome = feedfast("inspect", tmp_path / "digits.zarr", "--out", tmp_path / "pages")
    assert outcome.code == 0, outcome.err
    assert "images not shown" in outcome.err
    shown = pictures(Path(outcome.document["report"]).read_text(encoding="utf-8"))
    assert shown == [(side, side) for side in (4, 16, 8, 4)] * 6


def test_inspect_a_cache_in_the_making(tmp_path: Path) -> None:
    recipe = as_toml(digits_recipe(tmp_path, teachers=1), tmp_path / "recipe.toml")
    half = feedfast("cache", recipe, "cache.part=1/2")
    assert half.code == 0, half.err
    assert half.document["complete"] is False
    outcome = feedfast("inspect", tmp_path / "digits.zarr", "--out", tmp_path / "pages")
    assert outcome.code == 0, outcome.err
    assert outcome.document["complete"] is False
    assert 0 < outcome.document["targets"]["targets/a/final/codes"]["rows"] < 400
    assert feedfast("verify", tmp_path / "digits.zarr").code == 1


def test_the_report_of_a_run(tmp_path: Path) -> None:
    recipe = as_toml(digits_recipe(tmp_path, teachers=1), tmp_path / "recipe.toml")
    outcome = feedfast("train", recipe, "method.name=none", "train.source=none")
    page = (tmp_path / "student" / "report.html").read_text(encoding="utf-8")
    assert pictures(page) == [(16, 16)] * 2 * 3, "a contact sheet of the views"
    assert page.count('role="img"') >= 5, "loss, validation, learning rate, throughput, waiting"
    assert fetches_nothing(page)
    assert f"{outcome.document['val_accuracy']:.4g}" in page
    assert f"{outcome.document['val_accuracy']:.2%}" in page
    assert "zoo/wrn-10-1" in page
