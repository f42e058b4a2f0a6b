"""The pixels that the teachers saw: a checksum of every row, a hash of every sample, and what is refused without."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from commands import feedfast
from small import as_toml, digits_recipe, write_teacher
from torch import Tensor

from feedfast.data.dataset import open_dataset
from feedfast.data.loader import Loader
from feedfast.data.views import ViewPlan
from feedfast.errors import CacheMismatchError
from feedfast.recipe import Recipe
from feedfast.stages.ensemble import FrozenTeacher
from feedfast.stages.offline import run_cache
from feedfast.storage.reader import CacheReader


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    made = digits_recipe(tmp_path, teachers=1)
    run_cache(made)
    return made


def contents(cache: str) -> dict[str, bytes]:
    root = Path(cache)
    return {str(file.relative_to(root)): file.read_bytes() for file in root.glob("*/**/c/**/*") if file.is_file()}


def test_every_row_has_the_checksum_of_its_pixels(recipe: Recipe) -> None:
    """Also of views and rows that were cut into batches and shards differently."""
    reader = CacheReader(recipe.cache.path)
    data = open_dataset(recipe.data.train, limit=recipe.data.limit)
    with Loader(data, ViewPlan(0, 16, "pad-crop-flip"), batch_size=7) as loader:
        for view in range(2):
            images = np.concatenate([batch.images.numpy() for batch in loader.stream(view, np.arange(200))])
            expected = [google_crc32c.value(image.tobytes()) for image in images]
            assert reader.read_rows("pixels/sums", view, np.arange(200)).tolist() == expected
            assert len(set(expected)) > 190


def test_every_sample_has_the_hash_of_its_bytes(recipe: Recipe) -> None:
    data = open_dataset(recipe.data.train, limit=recipe.data.limit)
    stored = CacheReader(recipe.cache.path).read_array("samples/content")
    for position, sample in enumerate(data.ids.tolist()):
        content = data.pixels([position])[0].tobytes()
        assert int(stored[sample]) == len(content) << 32 | google_crc32c.value(content)
    assert not np.delete(stored, data.ids).any(), "samples beyond the limit have none"


def test_a_file_is_hashed_as_it_lies_on_the_disk(shared_data: Path) -> None:
    data = open_dataset(shared_data / "photos-varied")
    content = data.path(3).read_bytes()
    assert data.content([3]).tolist() == [len(content) << 32 | google_crc32c.value(content)]
    assert len(set(data.content().tolist())) == len(data)


def test_a_file_on_the_disk_is_compared_as_it_is_read(shared_data: Path, tmp_path: Path) -> None:
    """Encoded images, too: one byte of the quantization table, which leaves size and markers as they were."""
    some = sorted((shared_data / "photos-varied").glob("*.JPEG"))[:4]
    for file in some:
        shutil.copy(file, tmp_path)
    data = open_dataset(tmp_path)
    content = data.content()
    with Loader(data, ViewPlan(0, 32, "resized-crop-flip"), batch_size=2, content=content) as loader:
        assert len(list(loader.stream(0, np.arange(4)))) == 2
        victim = data.path(2)
        data_bytes = bytearray(victim.read_bytes())
        data_bytes[data_bytes.index(b"\xff\xdb") + 8] ^= 1
        victim.write_bytes(data_bytes)
        with pytest.raises(CacheMismatchError, match=f"{victim.name} .sample 2.: the image has changed"):
            list(loader.stream(0, np.arange(4)))


def test_training_refuses_a_cache_without_the_checksums(recipe: Recipe, tmp_path: Path) -> None:
    """A replay that could compare nothing would prove nothing."""
    log = Path(recipe.cache.path) / "commits" / "part-0-of-1.jsonl"
    log.write_text("".join(line for line in log.read_text().splitlines(True) if '"pixels/sums"' not in line))
    file = as_toml(recipe, tmp_path / "r.toml")
    error = feedfast("train", file, "train.replay=1").error
    assert "incomplete" in error
    assert "pixels/sums" in error
    assert "pixels/sums" in {entry["array"] for entry in feedfast("verify", recipe.cache.path).document["problems"]}
    assert feedfast("cache", file).code == 0
    assert feedfast("verify", recipe.cache.path, "--replay", "2").document["ok"] is True


def test_a_replay_that_compares_nothing_is_a_failure(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feedfast.stages.verify.replay_pixels", lambda *_, **__: 0)  # as where a GPU decoded
    document = feedfast("verify", recipe.cache.path, "--replay", "3").document
    assert document["ok"] is False
    assert [entry["kind"] for entry in document["problems"]] == ["pixels"]


def test_a_later_teacher_must_see_the_pixels_of_the_first(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with another version of a decoder: its maps would be of other images, filed under the same rows."""
    stream = Loader.stream

    def other(self: Loader, view: int, rows: Any, **options: Any) -> Any:
        for batch in stream(self, view, rows, **options):
            batch.images[batch.rows == 37] ^= 1
            yield batch

    before = contents(recipe.cache.path)
    write_teacher(tmp_path / "z.pt", seed=9)
    z = recipe.teachers[0].model_copy(update={"name": "z", "weights": str(tmp_path / "z.pt")})
    more = recipe.model_copy(update={"teachers": (*recipe.teachers, z)})
    file = as_toml(more, tmp_path / "r.toml")
    monkeypatch.setattr(Loader, "stream", other)
    outcome = feedfast("cache", file)
    assert outcome.code == 2
    assert "view 0, rows 37: the pixels are not those the teachers saw. Versions that differ" in outcome.error
    after = contents(recipe.cache.path)
    assert {key: after[key] for key in before} == before
    assert not any(key.startswith("targets/z/final/codes") for key in after)
    monkeypatch.setattr(Loader, "stream", stream)
    assert feedfast("cache", file).document["complete"] is True


def test_a_teacher_that_computes_something_else_is_refused(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights in changed code: their hash says nothing of it, what they compute does."""
    info = CacheReader(recipe.cache.path).manifest.teachers["a"]
    assert set(info.probe) == {"final", "ofd1", "ofd2", "ofd3", "logits"}
    stored = CacheReader(recipe.cache.path).read_rows("targets/a/logits/codes", 0, np.arange(8)).astype(np.float64)
    assert info.probe["logits"] == pytest.approx((stored.mean(), np.sqrt((stored**2).mean())), rel=2e-3)
    file = as_toml(
        recipe.model_copy(update={"cache": recipe.cache.model_copy(update={"views": 3})}), tmp_path / "r.toml"
    )
    call = FrozenTeacher.__call__

    def changed(self: FrozenTeacher, images: Tensor) -> dict[str, Tensor]:
        maps = call(self, images)
        return {**maps, "final": maps["final"] * 1.01}

    monkeypatch.setattr(FrozenTeacher, "__call__", changed)
    outcome = feedfast("cache", file)
    assert outcome.code == 2
    assert "teachers[a], tap 'final': with the same weights it computes something else" in outcome.error
    assert CacheReader(recipe.cache.path).manifest.views == 2
    monkeypatch.setattr(FrozenTeacher, "__call__", call)
    assert feedfast("cache", file).document["complete"] is True
