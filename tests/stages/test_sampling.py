"""Sampled taps from recipe to loss: what is stored, who serves it with which positions, and who refuses it."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small import digits_recipe

import feedfast
from feedfast.data.positions import ALGORITHM, sample_positions
from feedfast.errors import CacheDamageError, CacheMismatchError, RequestError
from feedfast.recipe import Recipe
from feedfast.report.run import read_metrics
from feedfast.stages.catalog import run_methods
from feedfast.stages.data import open_train, pixel_loader, view_plan
from feedfast.stages.ensemble import load_teachers
from feedfast.stages.factors import run_factors
from feedfast.stages.inspect import run_inspect
from feedfast.stages.offline import run_cache
from feedfast.stages.plan import run_plan
from feedfast.stages.student import run_train
from feedfast.stages.verify import run_verify
from feedfast.storage import names
from feedfast.storage.create import open_for_writing
from feedfast.storage.reader import CacheReader
from feedfast.storage.schema import Manifest
from feedfast_kernels import Codes, Sampled, decode, gather_positions, partial_l2

TAPS = ["final", "ofd1+margin@0.25:{}", "ofd2+margin@0.3:{}", "ofd3+margin:{}"]  # 16x16, 8x8 and 4x4 maps
GRIDS = {"ofd1": (16, 64), "ofd2": (8, 19), "ofd3": (4, 16)}  # side, positions


def asked(folder: Path, codec: str = "f32", *overrides: str, taps: list[str] | None = None, **sections: Any) -> Recipe:
    """Three maps of two teachers, two of them sampled."""
    taps = [tap.format(codec) for tap in TAPS] if taps is None else taps
    named = [f"teachers.{number}.taps={json.dumps(taps)}" for number in range(2)]
    cache = {"codec": codec, "path": str(folder / f"{codec}.zarr"), "batch": 24}
    sections = {"cache": cache, "method": {"name": "ofd", "alpha": 1e-3}, **sections}
    return digits_recipe(folder, ("data.limit=8", *named, *overrides), **sections)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sampling")
    for codec in ("f32", "u8"):
        run_cache(asked(folder, codec))
    return folder


def losses(recipe: Recipe) -> list[float]:
    run_train(recipe)
    return [row["loss"] for row in read_metrics(Path(recipe.train.out) / "metrics.jsonl") if "loss" in row]


def test_what_is_stored_is_the_teachers_map_at_the_positions(world: Path) -> None:
    """Gathered here value by value, from maps of the teachers as they are now."""
    recipe, reader = asked(world), CacheReader(world / "f32.zarr")
    taps, data = reader.manifest.teachers["a"].taps, open_train(asked(world))
    teacher = load_teachers(recipe, 10, torch.device("cpu"))["a"]
    with pixel_loader(data, view_plan(recipe.data, 0), 24, torch.device("cpu")) as loader:
        batch = next(iter(loader.stream(1, np.arange(24))))
    maps = teacher(batch.images)
    for tap, (side, count) in GRIDS.items():
        array = names.codes("a", tap)
        stored = reader.read_rows(array, 1, np.arange(24))
        whole = np.maximum(maps[tap].numpy(), np.array(taps[tap].margin, np.float32)[:, None, None])
        assert taps[tap].shape == (whole.shape[1], side, side)
        if tap == "ofd3":
            np.testing.assert_array_equal(stored, whole.transpose(0, 2, 3, 1))
            continue
        places = sample_positions(recipe.seed, 1, batch.ids, tap, side, side, count)
        for row in range(24):
            for number, place in enumerate(places[row].tolist()):
                np.testing.assert_array_equal(stored[row, number], whole[row, :, place // side, place % side])
        assert reader.specs[array].dims == ("view", "row", "position", "channel")
        assert taps[tap].sample is not None
        assert (taps[tap].sample.positions, taps[tap].sample.algorithm) == (count, ALGORITHM)
        assert taps[tap].row_bytes == 4 * count * whole.shape[1] == reader.specs[array].row_bytes


@pytest.mark.parametrize(("source", "steps"), [("live", 20), ("record", 7)])
def test_live_and_recorded_are_the_cached_run(world: Path, source: str, steps: int, tmp_path: Path) -> None:
    """Both views of 3 steps, later mixed: f32 losses within 1e-6, and the recorded cache is the cached one."""
    train = {"epochs": 9, "max_steps": steps, "batch": 24, "eval_every": 0, "threads": 1}
    cached = losses(asked(world, train={**train, "out": str(tmp_path / "c")}))
    changes = {"cache": {"codec": "f32", "path": str(tmp_path / "r.zarr"), "batch": 24}} if source == "record" else {}
    other = losses(asked(world, train={**train, "source": source, "out": str(tmp_path / source)}, **changes))
    assert len(cached) == steps
    np.testing.assert_allclose(other, cached, rtol=1e-6)
    if source == "record":
        assert CacheReader(tmp_path / "r.zarr").digest() == CacheReader(world / "f32.zarr").digest()


def test_u8_codes_train_nearly_the_same(world: Path, tmp_path: Path) -> None:
    train = {"epochs": 1, "max_steps": 3, "batch": 24, "eval_every": 0, "threads": 1}
    exact, coded = (
        losses(asked(world, codec, train={**train, "out": str(tmp_path / codec)})) for codec in ("f32", "u8")
    )
    np.testing.assert_allclose(coded, exact, rtol=5e-3)
    assert coded != exact


def test_a_loop_of_ones_own_is_given_the_positions(world: Path) -> None:
    cache = feedfast.open_cache(world / "u8.zarr")
    with pytest.raises(RequestError, match=r"taps: expected teacher → target or targets, as .*, found \['ofd1'\]"):
        cache.stream(taps=["ofd1"])  # type: ignore[arg-type]
    batch = next(iter(cache.stream(view=1, batch_size=16, taps={"a": ["ofd1", "ofd3"], "b": "ofd1"}, pass_index=1)))
    found = batch.targets["a"]["ofd1"]
    assert isinstance(found, Sampled)
    assert isinstance(found.values, Codes)
    assert isinstance(batch.targets["a"]["ofd3"], Codes)
    assert torch.equal(found.positions, batch.targets["b"]["ofd1"].positions)
    assert found.positions.numpy().tolist() == sample_positions(0, 1, batch.ids, "ofd1", 16, 16, 64).tolist()
    student = torch.randn(16, found.shape[1], 16, 16, requires_grad=True)
    loss = partial_l2(student, found.values, weight=found.rescale, positions=found.positions)
    loss.backward()
    t = decode(found.values)
    s = gather_positions(student.detach(), found.positions)
    d = torch.where((s <= t) & (t <= 0), 0, s - t)
    torch.testing.assert_close(loss.detach(), d.square().sum() * 4 / 16)
    assert batch.to("cpu").targets["a"]["ofd1"].grid == (16, 16)


def test_the_cache_proves_itself(world: Path) -> None:
    verified = run_verify(str(world / "u8.zarr"), full=True, replay=2, teachers_percent=20.0, recipe=asked(world, "u8"))
    assert (verified["ok"], verified["problems"]) == (True, [])
    assert min(verified["cosine"][names.codes("a", tap)] for tap in GRIDS) > 0.999
    found = run_inspect(str(world / "u8.zarr"))["targets"][names.codes("a", "ofd2")]
    assert found["sample"] == {"share": 0.3, "positions": 19, "algorithm": ALGORITHM}
    assert found["row_shape"] == [19, found["row_shape"][1]]


def test_a_plan_and_the_catalog_count_what_is_stored(world: Path) -> None:
    recipe, reader = asked(world, "u8"), CacheReader(world / "u8.zarr")
    planned, costs = run_plan(recipe)["targets"], run_methods("ofd", recipe)["targets"]
    for tap in GRIDS:
        row_bytes = reader.specs[names.codes("a", tap)].row_bytes
        assert planned[f"a/{tap}"]["raw_bytes"] == row_bytes * reader.manifest.num_rows * 2
        assert costs[f"a/{tap}"]["bytes_per_sample"] == row_bytes
        info = reader.manifest.teachers["a"].taps[tap]
        assert planned[f"a/{tap}"]["shape"] == list(info.shape)
        assert planned[f"a/{tap}"].get("positions") == (None if info.sample is None else info.sample.positions)


def test_a_cache_is_extended_by_the_same_share_only(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = asked(tmp_path, "u8", "cache.views=1", taps=["ofd1+margin@0.25"])
    run_cache(first, check=False)
    before = {array: commit.sha256 for array, commit in _lines(first)}
    summary = run_cache(
        asked(tmp_path, "u8", "cache.views=2", taps=["ofd1+margin@0.25", "ofd2+margin@0.5"]), check=False
    )
    assert summary["complete"]
    assert before.items() <= {array: commit.sha256 for array, commit in _lines(first)}.items()
    for taps in (["ofd1+margin@0.5"], ["ofd1+margin"]):
        with pytest.raises(CacheMismatchError, match=r"ofd1: sample: expected .* as the recipe says, found 0.25"):
            run_cache(asked(tmp_path, "u8", taps=taps), check=False)
        train = {"check_teachers": False, "out": str(tmp_path / "s")}
        with pytest.raises(CacheMismatchError, match=r"ofd1: sample: expected .* as the recipe says, found 0.25"):
            run_train(asked(tmp_path, "u8", taps=taps, train=train))
    run_plan(asked(tmp_path, "u8", taps=["ofd1+margin@0.5"]), check=False)
    assert "plan: " in caplog.text
    assert "ofd1: sample: expected 0.5 as the recipe says, found 0.25" in caplog.text


def _lines(recipe: Recipe) -> list[tuple[tuple[str, str], Any]]:
    return list(CacheReader(recipe.cache.path).log.commits.items())


@pytest.mark.parametrize(
    ("taps", "method", "words"),
    [
        (["final@0.5"], "ft", "tap 'final' of teacher 'a': method 'ft' makes factors by 3x3 convolutions"),
        (["final@0.5"], "pfeed", "tap 'final' of teacher 'a': method 'pfeed' transforms maps by 3x3 convolutions"),
        (
            ["final@0.5"],
            "rkd",
            "method 'rkd' compares images by the mean of a map; expected all positions, found 8 of 16",
        ),
        (["ofd@0.5", "final"], "reviewkd", "tap 'ofd1' of teacher 'a': method 'reviewkd' fuses maps of several stages"),
        (["x=fc@0.5"], "kd", "teachers[a].taps: 'x': expected a map [C, H, W], of whose positions @0.5 is stored"),
    ],
)
def test_what_needs_whole_maps_is_refused_before_anything_is_cached(
    taps: list[str], method: str, words: str, tmp_path: Path
) -> None:
    options = {"factors": "stored"} if method == "ft" else {}
    with pytest.raises(RequestError) as caught:
        run_cache(asked(tmp_path, taps=taps, method={"name": method, **options}))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "f32.zarr" / "targets").exists()


def test_a_students_other_grid_is_refused(tmp_path: Path) -> None:
    """Whose maps have another grid, pooled otherwise: positions mean nothing there."""
    recipe = asked(
        tmp_path, "u8", "teachers.0.size=32", "teachers.1.size=32", taps=["stage@0.5"], method={"name": "at"}
    )
    with pytest.raises(RequestError, match=r"found 512 of 1024 positions of a map of \[32, 32\], expected that grid"):
        run_cache(recipe)


def test_maps_too_large_to_draw_positions_of_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feedfast.stages.ensemble.MAX_CELLS", 100)
    with pytest.raises(RequestError, match=r"'ofd1': expected a map of up to 100 positions with @0.25, found 16 x 16"):
        run_cache(asked(tmp_path, "u8", taps=["ofd1+margin@0.25"]), check=False)


def test_factors_need_whole_maps(tmp_path: Path) -> None:
    recipe = asked(tmp_path, "u8", "cache.views=1", taps=["final@0.5"])
    run_cache(recipe, check=False)
    with pytest.raises(RequestError, match=r"expected whole maps of 'final'.*found 8 of their positions"):
        run_factors(recipe)


def test_a_manifest_says_it_only_where_it_is_so(world: Path, tmp_path: Path) -> None:
    """Caches without it are what they were; positions of another algorithm are not guessed."""
    manifest = CacheReader(world / "u8.zarr").manifest
    said = manifest.to_attrs()["feedfast"]["teachers"]["a"]["taps"]
    assert "sample" not in said["final"]
    assert said["ofd1"]["sample"]["share"] == 0.25
    array = names.codes("a", "ofd1")
    digests = {manifest.digest_for(array)}
    for change in ({"positions": 65}, {"share": 0.26}, {"algorithm": "other/1"}):
        other = _with(manifest, change)
        assert [key for key, _, _ in feedfast.storage.schema.differences(other, manifest)] == [
            f"teachers.a.taps.ofd1.sample.{key}" for key in change
        ]
        digests.add(other.digest_for(array))
    assert len(digests) == 4
    for wrong, words in (({"positions": 257}, "up to 4194304 positions"), ({"share": 1.0}, "less than 1")):
        with pytest.raises(CacheDamageError, match=words):
            _with(manifest, wrong)
    with pytest.raises(CacheDamageError, match="only a map"):
        _with(manifest, {}, shape=[manifest.teachers["a"].taps["ofd1"].channels, 256])
    with pytest.raises(CacheDamageError, match="up to 4194304 positions"):  # ordering the cells would take gigabytes
        _with(manifest, {}, shape=[manifest.teachers["a"].taps["ofd1"].channels, 1 << 16, 1 << 16])
    open_for_writing(tmp_path / "o.zarr", _with(manifest, {"algorithm": "other/1"}))
    cache = CacheReader(tmp_path / "o.zarr")
    with pytest.raises(CacheMismatchError, match=rf"ofd1: expected positions drawn by '{ALGORITHM}', found 'other/1'"):
        feedfast.stages.sampling.sampling_of_manifest(cache.manifest, cache.path)


def _with(manifest: Manifest, change: dict[str, Any], **tap: Any) -> Manifest:
    tree = json.loads(json.dumps(manifest.to_attrs()))
    tree["feedfast"]["teachers"]["a"]["taps"]["ofd1"] |= tap
    tree["feedfast"]["teachers"]["a"]["taps"]["ofd1"]["sample"] |= change
    return Manifest.from_attrs(tree)


@pytest.mark.slow
def test_pictures_show_sampled_maps_where_they_are_stored(world: Path, tmp_path: Path) -> None:
    """On the page of the cache and of a run: opaque at the positions of that row, blank elsewhere."""
    reader = CacheReader(world / "f32.zarr")
    run_inspect(str(world / "f32.zarr"), tmp_path)
    run_train(asked(world, train={"out": str(tmp_path / "s"), "max_steps": 1}))
    for page, who in ((tmp_path / "inspect.html", "a"), (tmp_path / "s" / "report.html", "teacher a")):
        found = re.findall(r'alt="([^"]*)"[^>]*src="data:image/png;base64,([^"]*)"', page.read_text())
        ids = reader.read_array(names.ORDER, 0)
        for tap, (side, count) in GRIDS.items():
            shown = [text for alt, text in found if f": {who}, {tap}, " in alt]
            assert len(shown) >= 2
            for row, text in enumerate(shown):
                pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGBA"))
                assert pixels.shape == (side, side, 4)
                places = sample_positions(0, 0, ids[row : row + 1], tap, side, side, count)[0]
                stored = np.arange(side * side) if tap == "ofd3" else np.sort(places)
                np.testing.assert_array_equal(np.flatnonzero(pixels[..., 3]), stored)
        assert any(re.search(rf"{who}, ofd1, \d+x16x16, 25% of positions: ", alt) for alt, _ in found)
    report = (tmp_path / "s" / "report.html").read_text()
    assert report.count("student before training, ofd1") == report.count("student after training, ofd1") > 0
