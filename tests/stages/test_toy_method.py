"""A method is one class: a new one trains from a recipe, cached and live, and nothing else of the house changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from commands import feedfast
from pydantic import Field
from small import as_toml, digits_recipe
from torch import Tensor, nn

from feedfast.methods import METHODS, Method, MethodOptions, StudentOutput, Targets
from feedfast.methods.parts import paired_maps
from feedfast.report.run import read_metrics
from feedfast.stages.offline import run_cache
from feedfast_kernels import as_float


class Toy(Method):
    """A regressor onto every teacher's last map, in its second half with the features' weight doubled."""

    name: ClassVar[str] = "toy"
    paper: ClassVar[str] = "FitNets with a phase; made up for this test"
    needs: ClassVar[tuple[str, ...]] = ("final",)

    class Options(MethodOptions):
        """gamma."""

        gamma: float = Field(0.5, ge=0, description="weight of the hint in the first half of the run")

    def __init__(self, options: Options, student: Any, teachers: Any) -> None:
        super().__init__(options, student, teachers)
        self.gamma, self.names = options.gamma, tuple(teachers)
        pairs = paired_maps(student, teachers, ("final",))
        self.hints = nn.ModuleList(nn.Conv2d(ours[0], theirs.shape[0], 1) for _, _, ours, theirs in pairs)

    def forward(self, student: StudentOutput, targets: Targets, annotations: Any) -> dict[str, Tensor]:
        maps = [hint(student.taps["final"]) for hint in self.hints]
        wanted = [as_float(targets[name]["final"]) for name in self.names]
        return {"hint": torch.stack([(x - t).square().mean() for x, t in zip(maps, wanted, strict=True)]).sum()}

    def weights(self, progress: float) -> dict[str, float]:
        return {"hint": self.gamma * (2 if progress >= 0.5 else 1)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    run_cache(digits_recipe(folder, cache={"codec": "f32"}))
    return folder


def test_a_new_method_trains_from_a_recipe(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "toy", Toy)
    losses = {}
    for source in ("cache", "live"):
        train = {"source": source, "out": str(tmp_path / source), "epochs": 1, "eval_every": 0}
        recipe = digits_recipe(world, cache={"codec": "f32"}, method={"name": "kd"}, train=train)
        outcome = feedfast("train", as_toml(recipe, tmp_path / "r.toml"), "method.name=toy", "method.gamma=0.25")
        assert outcome.code == 0, outcome.err
        assert outcome.document["method"] == "toy"
        losses[source] = [row for row in read_metrics(tmp_path / source / "metrics.jsonl") if "loss" in row]
    assert len(losses["cache"]) == 6
    for cached, live in zip(losses["cache"], losses["live"], strict=True):
        assert (cached["loss"], cached["ce"], cached["hint"]) == (live["loss"], live["ce"], live["hint"])
        weight = 0.25 if cached["step"] <= 3 else 0.5  # steps 1 to 3 of 6 are the first half
        assert cached["loss"] == pytest.approx(cached["ce"] + weight * cached["hint"], rel=1e-5)
    assert not any(name.startswith("hints") for name in torch.load(tmp_path / "cache" / "student.pt"))
    error = feedfast("train", as_toml(recipe, tmp_path / "r.toml"), "method.name=toy", "method.gama=1").error
    assert error.startswith("method.gama: not an option of 'toy', expected gamma")


def test_a_new_method_lists_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "toy", Toy)
    assert "toy" in feedfast("methods").document["methods"]
    said = feedfast("methods", "toy")
    (option,) = said.document["options"]
    assert option == {
        "name": "gamma",
        "expected": "a number of 0 or more",
        "default": 0.5,
        "meaning": "weight of the hint in the first half of the run",
    }
    assert "FitNets with a phase" in said.err
    assert "did you mean 'toy'" in feedfast("methods", "tou").error
