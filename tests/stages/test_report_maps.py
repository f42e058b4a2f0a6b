"""Maps on a run's report: those of the student before training are its start's, those after it the saved weights'."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small import digits_recipe
from torch import nn

from feedfast.models.build import build_model
from feedfast.models.presets import preset_taps
from feedfast.models.taps import Tapped
from feedfast.recipe import Recipe
from feedfast.report.pictures import map_pixels
from feedfast.stages.offline import run_cache
from feedfast.stages.student import StudentRun, run_train
from feedfast.stages.worker import Worker

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("maps")
    run_cache(asked(folder, "cache"))
    return folder


def asked(folder: Path, out: str, steps: int = 2) -> Recipe:
    train = {"out": str(folder / out), "max_steps": steps}
    return digits_recipe(folder, ("data.limit=8",), teachers=1, method={"name": "pfeed"}, train=train)


def shown(folder: Path, who: str) -> list[np.ndarray]:
    """Pixels of a network's final maps on the report, sample by sample."""
    page = (folder / "report.html").read_text()
    found = re.findall(rf'alt="[^"]*: {who}, final, [^"]*"[^>]*src="data:image/png;base64,([^"]*)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGBA")) for text in found]


@torch.no_grad()
def expected(recipe: Recipe, network: nn.Module) -> list[np.ndarray]:
    """The same from the network itself, on pixels of the run's first rows."""
    run = StudentRun(recipe, Worker.from_env())
    batch = next(iter(run.source.batches(0, np.arange(2), 2)))
    images = run.normalize(batch.images)
    run.close()
    tapped = Tapped(network.eval(), preset_taps(network, "final", images), images)
    tapped.eval()
    _, maps = tapped(images)
    return [map_pixels(maps["final"][row].numpy()) for row in range(2)]


@pytest.mark.parametrize("given", [False, True], ids=["built", "passed as an object"])
def test_maps_before_and_after_training(world: Path, given: bool) -> None:
    recipe = asked(world, f"run-{given}")
    model = recipe.student.model
    network = build_model(model, num_classes=10, seed=7) if given else None
    start = build_model(model, num_classes=10, seed=7 if given else recipe.train_seed)
    run_train(recipe, student=network)
    out = Path(recipe.train.out)
    trained = build_model(model, num_classes=10, weights=out / "student.pt", seed=0)
    other = asked(world, f"look-{given}")
    before, after = expected(other, start), expected(other, trained)
    for found, wanted in (
        (shown(out, "student before training"), before),
        (shown(out, "student after training"), after),
    ):
        assert len(found) == 2
        for one, two in zip(found, wanted, strict=True):
            assert np.abs(one.astype(int) - two).max() <= 2  # a batch of another size rounds otherwise
    assert any((a != b).any() for a, b in zip(before, after, strict=True)), "training changed something"
    assert len(shown(out, "teacher a")) == 2


def test_a_resumed_run_still_shows_its_start(world: Path) -> None:
    recipe = asked(world, "resumed", steps=1)
    run_train(recipe)
    first = shown(Path(recipe.train.out), "student before training")
    run_train(asked(world, "resumed", steps=3))
    again = shown(Path(recipe.train.out), "student before training")
    assert len(first) == 2
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, two)
