"""Stored factors: what a cache holds of them, their identity, kills, damage, and that ft learns the same from them."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import feedfast
from small import as_toml, digits_recipe

import feedfast as package
from feedfast.methods.ft import FT
from feedfast.recipe import Recipe
from feedfast.stages.factors import run_factors
from feedfast.stages.offline import run_cache
from feedfast.stages.student import StudentRun
from feedfast.stages.worker import Worker
from feedfast.storage.log import cache_digest
from feedfast.storage.reader import CacheReader

OPTIONS = {"name": "ft", "paraphraser_epochs": 2, "paraphraser_lr": 0.02}


def recipe_for(folder: Path, codec: str = "f32", **sections: Any) -> Recipe:
    sections = {"method": OPTIONS, **sections}
    cache = {"codec": codec, "path": str(folder / f"{codec}.zarr"), **sections.pop("cache", {})}
    words = ('teachers.0.taps=["final"]', 'teachers.1.taps=["final"]')
    return digits_recipe(folder, words, cache=cache, **sections)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches of two teachers' final maps, without factors as X.bare and with them as X.zarr."""
    folder = tmp_path_factory.mktemp("factors")
    for codec in ("f32", "u8"):
        run_cache(recipe_for(folder, codec))
        shutil.copytree(folder / f"{codec}.zarr", folder / f"{codec}.bare")
        run_factors(recipe_for(folder, codec))
    return folder


def encoded(flat: np.ndarray, x: torch.Tensor) -> torch.Tensor:
    """An encoder of rate 0.5 by hand, from its stored weights."""
    c, at = x.shape[1], 0
    for a, b in ((c, c), (c, c // 2), (c // 2, c // 2)):
        weight = torch.from_numpy(flat[at : at + 9 * a * b].copy()).view(b, a, 3, 3)
        bias = torch.from_numpy(flat[at + 9 * a * b : at + 9 * a * b + b].copy())
        at += 9 * a * b + b
        x = F.conv2d(x, weight, bias, padding=1)
        x = torch.where(x > 0, x, 0.1 * x)
    assert at == len(flat)
    return x


def test_factors_are_a_tap_of_half_the_channels_made_by_the_stored_weights(world: Path) -> None:
    reader = CacheReader(world / "f32.zarr")
    for name in "ab":
        taps = reader.manifest.teachers[name].taps
        info, source = taps["factor"], taps["final"]
        assert info.shape == (source.shape[0] // 2, *source.shape[1:])
        assert (info.transform, info.codec) == ("factor", source.codec)
        flat = reader.read_array(f"targets/{name}/factor/weights")
        assert info.factor is not None
        assert info.factor.weights_sha256 == hashlib.sha256(flat.astype("<f4").tobytes()).hexdigest()
        rows = np.array([0, 7, 199])
        for view in (0, 1):
            maps = torch.from_numpy(reader.read_rows(f"targets/{name}/final/codes", view, rows)).permute(0, 3, 1, 2)
            stored = reader.read_rows(f"targets/{name}/factor/codes", view, rows)
            expected = encoded(flat, maps).permute(0, 2, 3, 1).numpy()
            np.testing.assert_allclose(stored, expected, rtol=1e-4, atol=1e-5)
    with package.open_cache(world / "u8.zarr") as cache:
        batch = next(iter(cache.stream(0, 16, taps={"a": "factor"})))
        assert tuple(batch.targets["a"]["factor"].shape) == (16, *cache.manifest.teachers["a"].taps["factor"].shape)
    assert feedfast("verify", world / "u8.zarr", "--full").document["ok"]


@pytest.mark.slow
def test_other_weights_are_another_identity_and_the_rest_keeps_its_own(world: Path, tmp_path: Path) -> None:
    other = tmp_path / "f32.zarr"
    shutil.copytree(world / "f32.bare", other)
    longer = recipe_for(world, method={**OPTIONS, "paraphraser_epochs": 1}, cache={"path": str(other)})
    run_factors(longer)
    ours, bare, theirs = (CacheReader(p).manifest for p in (world / "f32.zarr", world / "f32.bare", other))
    assert ours.digest_for("targets/a/factor/codes") != theirs.digest_for("targets/a/factor/codes")
    for array in ("targets/a/final/codes", "targets/b/logits/codes"):
        assert ours.digest_for(array) == bare.digest_for(array)
    assert run_factors(recipe_for(world))["rows_written"] == 0
    again = run_cache(recipe_for(world))
    assert (again["rows_written"], again["complete"]) == (0, True)


@pytest.mark.slow
def test_verify_recomputes_the_maps_and_says_that_factors_are_not_compared(world: Path, tmp_path: Path) -> None:
    file = as_toml(recipe_for(world), tmp_path / "recipe.toml")
    found = feedfast("verify", world / "f32.zarr", "--teachers", 20, "--recipe", file)
    assert found.code == 0, found.err
    assert found.document["cosine"].keys() == {f"targets/{t}/{tap}/codes" for t in "ab" for tap in ("final", "logits")}
    assert "a/factor, b/factor: not compared" in found.err


@pytest.mark.slow
def test_killed_it_goes_on_to_the_same_digest(world: Path, tmp_path: Path) -> None:
    path = tmp_path / "f32.zarr"
    shutil.copytree(world / "f32.bare", path)
    recipe = as_toml(recipe_for(world, cache={"path": str(path)}), tmp_path / "recipe.toml")
    code = (
        "import itertools, os, signal, sys\n"
        "from feedfast.storage.writer import CacheWriter\n"
        "from feedfast.recipe import load_recipe\n"
        "from feedfast.stages.factors import run_factors\n"
        "real, calls = CacheWriter.append, itertools.count(1)\n"
        "def append(*a, **k):\n"
        "    next(calls) == int(sys.argv[2]) and os.kill(os.getpid(), signal.SIGKILL)\n"
        "    real(*a, **k)\n"
        "CacheWriter.append = append\n"
        "run_factors(load_recipe(sys.argv[1]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    job = subprocess.run([sys.executable, "-c", code, recipe, "9"], env=environment, capture_output=True, check=False)
    assert job.returncode == -signal.SIGKILL, job.stderr.decode()
    missing = CacheReader(path).missing()
    assert missing
    done = run_factors(recipe_for(world, cache={"path": str(path)}))
    assert done["digest"] == cache_digest(world / "f32.zarr")


def losses(world: Path, codec: str, factors: str, out: Path, steps: int) -> list[float]:
    """The loss of every step, both sides with the cache's paraphrasers and the same translators."""
    recipe = recipe_for(
        world, codec, method={**OPTIONS, "factors": factors}, train={"source": "cache", "out": str(out)}
    )
    run = StudentRun(recipe, Worker.from_env())
    (method,) = run.trainer.methods
    assert isinstance(method, FT)
    reader = CacheReader(world / f"{codec}.zarr")
    for number, paraphraser in enumerate(method.paraphrasers):
        flat = torch.from_numpy(reader.read_array(f"targets/{'ab'[number]}/factor/weights").copy())
        torch.nn.utils.vector_to_parameters(flat, paraphraser.get_submodule("encoder").parameters())
    g = torch.Generator().manual_seed(3)
    for parameter in method.translators.parameters():
        parameter.data = torch.randn(parameter.shape, generator=g) * 0.1
    assert run.source.taps["a"].keys() == {"factor" if factors == "stored" else "final"}
    found: list[float] = []
    batches = (batch for epoch in (0, 1) for batch in run.loop.batches(epoch))
    for batch, _ in zip(batches, range(steps), strict=False):
        loss = run.trainer.trainee(batch.images, batch.targets, batch.annotations, 0.5)["loss"]
        run.trainer.optimizer.zero_grad()
        loss.backward()
        run.trainer.optimizer.step()
        found.append(loss.item())
    run.close()
    return found


def test_stored_factors_give_the_losses_of_own_ones(world: Path, tmp_path: Path) -> None:
    own = losses(world, "f32", "own", tmp_path / "own", 10)
    assert len(own) == 10
    np.testing.assert_allclose(losses(world, "f32", "stored", tmp_path / "stored", 10), own, rtol=1e-6)
    exact, coded = (losses(world, "u8", kind, tmp_path / f"u8-{kind}", 1)[0] for kind in ("own", "stored"))
    assert coded != exact
    assert abs(coded - exact) <= 0.005 * exact


def test_verify_finds_a_flipped_byte(world: Path, tmp_path: Path) -> None:
    for part in ("codes", "weights"):
        shutil.copytree(world / "u8.zarr", tmp_path / part)
        file = sorted(p for p in (tmp_path / part / "targets/a/factor" / part / "c").rglob("*") if p.is_file())[0]
        data = bytearray(file.read_bytes())
        data[40] ^= 1
        file.write_bytes(data)
        found = feedfast("verify", tmp_path / part, "--full")
        assert found.code == 1
        assert {entry["array"] for entry in found.document["problems"]} == {f"targets/a/factor/{part}"}


def test_mistakes_are_one_sentence(world: Path, tmp_path: Path) -> None:
    file = as_toml(recipe_for(world), tmp_path / "recipe.toml")

    def error(*overrides: str, command: str = "factors") -> str:
        outcome = feedfast(command, file, *overrides)
        assert outcome.code == 2, outcome.err
        return outcome.error

    assert "cache.path: required" in error("cache.path=")
    assert str(tmp_path / "no.zarr") in error(f"cache.path={tmp_path / 'no.zarr'}")
    assert "teachers: expected one of" in error("teachers.0.name=z")
    assert "rate: expected 0.25 as the recipe says, found 0.5" in error("method.rate=0.25")
    other = (f"cache.path={tmp_path / 'ofd.zarr'}", 'teachers.0.taps=["ofd"]', 'teachers.1.taps=["ofd"]')
    assert feedfast("cache", file, *other, "cache.views=1", "--no-check").code == 0
    assert "teacher 'a': expected a stored map 'final', found ['logits', 'ofd1'" in error(*other)
    bare = f"cache.path={world / 'f32.bare'}"
    assert "run `feedfast factors`" in error(
        bare, "method.factors=stored", f"train.out={tmp_path / 'o'}", command="train"
    )
    live = error("method.factors=stored", "train.source=live", f"train.out={tmp_path / 'p'}", command="train")
    assert live.startswith("method.factors: 'stored' needs train.source='cache'")
