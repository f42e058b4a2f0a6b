"""What a student's source gives: the targets that the built method reads, of the teachers that the recipe names."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from small import digits_recipe
from torch import Tensor

from feedfast.errors import RequestError
from feedfast.methods import METHODS as ALL
from feedfast.methods import PFEED, StudentOutput, Targets
from feedfast.models.build import build_model
from feedfast.recipe import Recipe
from feedfast.stages.offline import run_cache
from feedfast.stages.source import Cached
from feedfast.stages.student import StudentRun, run_train
from feedfast.stages.worker import Worker
from feedfast_kernels import as_float, ensemble_kl

READS = {"kd": ("logits",), "ofd": ("ofd1", "ofd2", "ofd3"), "pfeed": ("final",)}
METHODS = tuple(READS)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of two teachers in f32: what a live run computes is then what a cached run reads."""
    folder = tmp_path_factory.mktemp("sources")
    run_cache(digits_recipe(folder, cache={"codec": "f32"}))
    return folder


def recipe_for(world: Path, source: str, out: Path, method: str) -> Recipe:
    return digits_recipe(
        world,
        cache={"codec": "f32"},
        method={"name": method},
        train={"source": source, "out": str(out), "max_steps": 3, "eval_every": 0},
    )


class MapsAndLogits(PFEED):
    """A second method that reads logits, and maps too; nothing but ``needs`` says so."""

    needs: ClassVar[tuple[str, ...]] = ("final", "logits")

    def forward(self, student: StudentOutput, targets: Targets, annotations: Any) -> dict[str, Tensor]:
        logits = [as_float(taps["logits"]) for taps in targets.values()]
        return {
            **super().forward(student, targets, annotations),
            "kl": ensemble_kl(student.output, logits, tau=4.0),
        }

    def weights(self, progress: float) -> dict[str, float]:
        return {**super().weights(progress), "kl": 1.0}


@pytest.fixture
def second_logits_method(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe's ``pfeed`` is `MapsAndLogits`."""
    monkeypatch.setitem(ALL, "pfeed", MapsAndLogits)


@pytest.mark.parametrize("method", METHODS)
def test_a_cache_is_read_for_what_the_method_says_it_reads(world: Path, tmp_path: Path, method: str) -> None:
    run = StudentRun(recipe_for(world, "cache", tmp_path, method), Worker.from_env())
    batch = next(iter(run.loop.batches(0)))
    run.close()
    reads = READS[method]
    assert {name: tuple(taps) for name, taps in batch.targets.items()} == dict.fromkeys("ab", reads)
    assert isinstance(run.source, Cached)
    assert len(run.source.arrays) == 2 * len(reads), "nothing is read in vain"


@pytest.mark.usefixtures("second_logits_method")
def test_another_method_gets_its_logits_without_being_known_by_name(world: Path, tmp_path: Path) -> None:
    cached, live = (
        run_train(recipe_for(world, source, tmp_path / source, "pfeed"))["final_loss"] for source in ("cache", "live")
    )
    assert cached == pytest.approx(live, rel=1e-5)


@pytest.mark.usefixtures("second_logits_method")
def test_whoever_compares_logits_needs_teachers_of_the_same_classes(world: Path, tmp_path: Path) -> None:
    torch.save(build_model("zoo/wrn-10-1", num_classes=12, seed=0).state_dict(), tmp_path / "b.pt")
    recipe = recipe_for(world, "live", tmp_path / "out", "pfeed")
    other = recipe.teachers[1].model_copy(update={"weights": str(tmp_path / "b.pt"), "classes": 12})
    with pytest.raises(RequestError, match=r"'pfeed' compares classes.*expected 10 in every teacher, found 12 in 'b'"):
        run_train(recipe.model_copy(update={"teachers": (recipe.teachers[0], other)}))


@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_may_name_some_of_the_caches_teachers(world: Path, tmp_path: Path, method: str) -> None:
    """In its own order: adapters are drawn in it, so that a cached run starts as a live one does."""
    for teachers in ((0,), (1, 0)):
        losses = []
        for source in ("cache", "live"):
            recipe = recipe_for(world, source, tmp_path / f"{source}{len(teachers)}", method)
            chosen = tuple(recipe.teachers[number] for number in teachers)
            losses.append(run_train(recipe.model_copy(update={"teachers": chosen}))["final_loss"])
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
