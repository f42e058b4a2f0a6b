"""Each tap has a codec and a compression of its own: what is stored, what it costs, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from code_samples import integers
from small import digits_recipe

from feedfast.errors import CacheMismatchError
from feedfast.recipe import Recipe, parse_recipe
from feedfast.stages.codecs import codecs_of
from feedfast.stages.data import open_train, pixel_loader, view_plan
from feedfast.stages.ensemble import load_teachers
from feedfast.stages.offline import run_cache
from feedfast.stages.plan import run_plan
from feedfast.stages.plan_record import predicted_cache
from feedfast.stages.student import run_train
from feedfast.storage import names, schema
from feedfast.storage.log import cache_digest
from feedfast.storage.reader import CacheReader
from feedfast.tap_entry import CodecName
from feedfast_kernels.codes import CODECS

TWO = 'teachers.0.taps=["final", { tap = "ofd1", margin = true, codec = "u4" }, "ofd2+margin:u6", "ofd3+margin"]'
SMALL = ("data.limit=10", "cache.views=1", "cache.pilot=64", "method.name=ofd")


def two(folder: Path, *overrides: str) -> Recipe:
    """u4 for the largest map, u6 for the next, u8 for the others."""
    return digits_recipe(folder, (*SMALL, TWO, *overrides), teachers=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("codecs")
    return folder, run_cache(two(folder))


@pytest.mark.parametrize(
    ("taps", "default", "expected"),
    [
        ([], "u8", {"final": "u8", "ofd1": "u8", "logits": "f16", "factor": "u8"}),
        ([], "f32", {"ofd1": "f32", "logits": "f32"}),
        (
            ["final:u4", "ofd:f16"],
            "u8",
            {"final": "u4", "factor": "u4", "ofd2": "f16", "stage1": "u8", "logits": "f16"},
        ),
        (["final:f32", "ofd+margin:f32"], "u8", {"logits": "f32"}),
        (["final", "ofd+margin:u8"], "f32", {"final": "f32", "ofd3": "u8", "logits": "f16"}),
        (["logits"], "f32", {"logits": "f32"}),
        (["logits", "final:u4"], "f32", {"logits": "f16"}),
        (["ofd1=layer1:pre:u4", "ofd2=layer2:pre"], "f16", {"ofd1": "u4", "ofd2": "f16"}),
        (["ofd:u4", "ofd9=layer1:pre"], "u8", {"ofd1": "u4", "ofd9": "u8"}),
        (["ofd=layer1:u4"], "u8", {"ofd": "u4", "ofd1": "u8"}),  # a place called ofd is no group
    ],
)
def test_whose_codec_a_tap_has(taps: list[str], default: Any, expected: dict[str, str]) -> None:
    recipe = parse_recipe({"data": {"train": "x"}, "teachers": [{"name": "a", "model": "m", "taps": taps}]})
    codecs = codecs_of(recipe.teachers, default)
    assert {tap: codecs.of("a", tap) for tap in expected} == expected


def test_codecs_have_the_same_names_everywhere() -> None:
    assert get_args(CodecName) == get_args(schema.CodecName) == tuple(CODECS)


def test_each_tap_is_stored_and_measured_by_its_own_codec(made: tuple[Path, dict[str, Any]]) -> None:
    """Decoded here from bytes, and compared with the maps that the teacher computes now."""
    folder, summary = made
    recipe, reader = two(folder), CacheReader(folder / "digits.zarr")
    taps = reader.manifest.teachers["a"].taps
    found = {tap: info.codec for tap, info in taps.items()}
    assert found == {"final": "u8", "ofd1": "u4", "ofd2": "u6", "ofd3": "u8", "logits": "f16"}
    teacher = load_teachers(recipe, 10, torch.device("cpu"))["a"]
    data = open_train(recipe)
    with pixel_loader(data, view_plan(recipe.data, 0), 32, torch.device("cpu")) as loader:
        maps = [teacher(batch.images) for batch in loader.stream(0, np.arange(len(data)))]
    for tap, low, high in (("ofd1", 0.03, 0.3), ("ofd2", 0.01, 0.06), ("ofd3", 0.001, 0.02)):
        floor = np.array(taps[tap].margin, np.float32)[:, None, None]
        exact = np.maximum(torch.cat([found[tap] for found in maps]).numpy(), floor)
        codes = np.concatenate([reader.read_rows(names.codes("a", tap), 0, [row]) for row in range(len(data))])
        codes = integers(codes, taps[tap].channels, taps[tap].codec)
        offset, step = reader.read_array(names.scale("a", tap))
        decoded = np.moveaxis(offset + step * codes, -1, 1)
        error = math.sqrt(np.square(decoded - exact).mean() / np.square(exact).mean())
        assert error == pytest.approx(summary["taps"][f"a/{tap}"]["relative_rms_error"], rel=0.3)
        assert low < error < high


@pytest.mark.parametrize(("asked", "other"), [("zstd", "raw"), ("raw", "auto")])
def test_a_plan_counts_each_tap_by_its_own_codec(made: tuple[Path, dict[str, Any]], asked: str, other: str) -> None:
    recipe = two(made[0], f"cache.compression={asked}")
    planned = run_plan(recipe)["targets"]
    assert {entry["compression"] == 1.0 for tap, entry in planned.items() if tap != "a/logits"} == {asked == "raw"}
    device = torch.device("cpu")
    assert predicted_cache(recipe, device) is not None
    assert predicted_cache(two(made[0], f"cache.compression={other}"), device) is None, "of other bytes"
    for tap, bits in {"final": 8, "ofd1": 4, "ofd2": 6, "ofd3": 8, "logits": 16}.items():
        entry = planned[f"a/{tap}"]
        assert entry["raw_bytes"] == 100 * math.prod(entry["shape"]) * bits // 8


@pytest.mark.parametrize("checked", ["true", "false"])
def test_a_student_learns_from_two_codecs(made: tuple[Path, dict[str, Any]], tmp_path: Path, checked: str) -> None:
    out = (f"train.out={tmp_path / 'out'}", "train.max_steps=2", f"train.check_teachers={checked}")
    assert run_train(two(made[0], *out))["steps"] == 2


@pytest.mark.parametrize("run", [run_cache, run_train])
@pytest.mark.parametrize(
    ("taps", "words"),
    [
        ('["final", "ofd+margin"]', "targets/a/ofd1: codec: expected 'u8' as the recipe says, found 'u4'"),
        ('["final", "ofd+margin:u4"]', "targets/a/ofd2: codec: expected 'u4' as the recipe says, found 'u6'"),
        ('["ofd1+margin:f16"]', "targets/a/ofd1: codec: expected 'f16' as the recipe says, found 'u4'"),
    ],
)
def test_another_codec_than_the_cache_s(
    made: tuple[Path, dict[str, Any]], tmp_path: Path, run: Any, taps: str, words: str
) -> None:
    recipe = two(made[0], f"teachers.0.taps={taps}", f"train.out={tmp_path / 'out'}")
    with pytest.raises(CacheMismatchError, match=words):
        run(recipe)


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "other", "stored"), [("zstd", "raw", "zstd"), ("raw", "zstd", "none")])
def test_compression_is_chosen_once(tmp_path: Path, asked: str, other: str, stored: str) -> None:
    """The same bytes in two runs; a cache that is extended keeps what its taps have, the new ones get what is asked."""
    words = ('teachers.0.taps=["final"]', "method.name=pfeed", "data.limit=4", "cache.pilot=16")
    digests = []
    for number in (0, 1):
        path = tmp_path / f"{number}.zarr"
        run_cache(two(tmp_path, *words, f"cache.path={path}", f"cache.compression={asked}"))
        digests.append(cache_digest(path))
    assert digests[0] == digests[1]
    grown = (*words[1:], f"cache.path={path}", "cache.views=2", f"cache.compression={other}")
    assert run_cache(two(tmp_path, 'teachers.0.taps=["final", "ofd1"]', *grown))["complete"]
    reader = CacheReader(path)
    found = {tap: info.compression for tap, info in reader.manifest.teachers["a"].taps.items()}
    assert found == {"final": stored, "ofd1": "none" if stored == "zstd" else "zstd", "logits": "none"}
    frame = b"\x28\xb5\x2f\xfd"
    for tap, compression in found.items():
        files = [file for file in (path / "targets/a" / tap / "codes/c").rglob("*") if file.is_file()]
        assert files
        assert {file.read_bytes()[:4] == frame for file in files} == {compression == "zstd"}


def test_logits_are_stored_as_they_are_whatever_taps_a_recipe_names(tmp_path: Path) -> None:
    """First with float32 maps alone, then with a u8 tap more, then trained from by a recipe that names the first."""
    alone, both = 'teachers.0.taps=["final:f32"]', 'teachers.0.taps=["final:f32", "ofd+margin:u8"]'
    run_cache(digits_recipe(tmp_path, (*SMALL[:3], alone, "method.name=kd"), teachers=1))
    assert run_cache(digits_recipe(tmp_path, (*SMALL, both), teachers=1))["complete"]
    overrides = (*SMALL[:3], alone, "method.name=kd", "train.max_steps=2", f"train.out={tmp_path / 's'}")
    assert run_train(digits_recipe(tmp_path, overrides, teachers=1))["steps"] == 2
