"""The reconstruction analysis: its numbers against a loop written by hand, its page, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import feedfast
from small import digits_recipe
from torch import Tensor, nn

from feedfast.errors import RequestError
from feedfast.files import read_sealed, write_sealed
from feedfast.models.build import build_model
from feedfast.recipe import Recipe
from feedfast.stages.analyze import Setting, run_reconstruction
from feedfast.stages.data import open_train, view_plan
from feedfast.stages.student import run_train


def plain(folder: Path, name: str, **sections: Any) -> Recipe:
    sections = {"method": {"name": "none"}, **sections}
    sections["train"] = {"source": "none", "epochs": 1, "out": str(folder / name), **sections.get("train", {})}
    return digits_recipe(folder, teachers=0, **sections)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two networks of different seeds and widths, trained for a moment."""
    folder = tmp_path_factory.mktemp("runs")
    data = {"augment": "none", "flip": 0.0}
    run_train(plain(folder, "narrow", data=data))
    run_train(plain(folder, "wide", data=data, student={"model": "zoo/wrn-10-2"}, train={"seed": 3}))
    return folder


def own_maps(folder: Path, name: str, model: str) -> tuple[Tensor, Tensor]:
    """Final maps of the training images by sample id and of the validation images, by plain torch."""
    network = build_model(model, num_classes=10, weights=folder / name / "student.pt").eval()
    caught: list[Tensor] = []
    network.get_submodule("relu").register_forward_hook(lambda *call: caught.append(call[2].detach().clone()))
    train = open_train(plain(folder, name))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in plain(folder, name).data.normalization)
    maps = []
    for file, chosen in (("digits-train.npz", train.ids), ("digits-val.npz", slice(None))):
        images = torch.from_numpy(np.load(folder / file)["images"][chosen])[:, None].expand(-1, 3, -1, -1) / 255
        network((images - mean) / std)
        maps.append(caught.pop())
    return maps[0], maps[1]


def by_hand(maps: Tensor, unseen: Tensor, orders: list[np.ndarray], seed: int) -> tuple[list[float], list[float]]:
    """Curves of an autoencoder made and trained here."""
    torch.manual_seed(seed)
    c, f = maps.shape[1], maps.shape[1] // 2
    ends = [(c, c), (c, f), (f, f)]
    layers = [nn.Conv2d(a, b, 3, padding=1) for a, b in ends]
    layers += [nn.ConvTranspose2d(b, a, 3, padding=1) for a, b in reversed(ends)]  # type: ignore[misc]
    parameters = [p for layer in layers for p in layer.parameters()]
    moved = [torch.zeros_like(p) for p in parameters]

    def rebuilt(x: Tensor) -> Tensor:
        for layer in layers:
            x = F.leaky_relu(layer(x), 0.1)
        return x

    train, test = [], []
    for order in orders:
        losses = []
        for start in range(0, len(order), 128):
            x = maps[order[start : start + 128]]
            loss = (rebuilt(x) - x).abs().mean()
            losses.append(loss.item())
            for p, m, g in zip(parameters, moved, torch.autograd.grad(loss, parameters), strict=True):
                m.mul_(0.9).add_(g + 5e-4 * p.detach())
                p.data -= 0.1 * m
        train.append(float(np.mean(losses)))
        with torch.no_grad():
            test.append((rebuilt(unseen) - unseen).abs().mean().item())
    return train, test


@pytest.mark.slow
def test_the_curves_are_those_of_a_loop_by_hand(runs: Path, tmp_path: Path) -> None:
    found = run_reconstruction([runs / "narrow", runs / "wide"], tmp_path, Setting(epochs=3, seed=5))
    plan = view_plan(plain(runs, "narrow", data={"augment": "none", "flip": 0.0}).data, 5)
    ids = open_train(plain(runs, "narrow")).ids
    orders = [np.searchsorted(ids, plan.order(view, ids)) for view in range(3)]
    for run, (name, model) in zip(found["runs"], [("narrow", "zoo/wrn-10-1"), ("wide", "zoo/wrn-10-2")], strict=True):
        maps, unseen = own_maps(runs, name, model)
        train, test = by_hand(maps, unseen, orders, 5)
        np.testing.assert_allclose(run["train_l1"], train, rtol=1e-3, err_msg=name)
        np.testing.assert_allclose(run["test_l1"], test, rtol=1e-3, err_msg=name)
        np.testing.assert_allclose(run["test_mean_abs"], unseen.abs().mean().item(), rtol=1e-4)
        assert (run["name"], run["shape"], run["factors"]) == (name, list(maps.shape[1:]), maps.shape[1] // 2)
        assert run["final_l1"] == run["test_l1"][-1]
        assert run["final_relative_l1"] == pytest.approx(run["final_l1"] / run["test_mean_abs"])
        assert run["val_accuracy"] == json.loads((runs / name / "result.json").read_text())["val_accuracy"]
    alone = run_reconstruction([runs / "wide"], tmp_path / "alone", Setting(epochs=3, seed=5))
    assert alone["runs"][0]["test_l1"] == found["runs"][1]["test_l1"], "a run's figures depend on no other run"


def test_the_command_writes_a_page_and_a_document(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "analysis"
    outcome = feedfast(
        "analyze", "reconstruction", runs / "narrow", runs / "wide",
        "--epochs", 2, "--limit", 64, "--rate", 0.25, "--lr", 0.05, "--out", out,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    document = outcome.document
    assert document["setting"] == {"rate": 0.25, "epochs": 2, "seed": 0, "limit": 64, "lr": 0.05}
    assert json.loads((out / "reconstruction.json").read_text()) == document
    assert [len(run[key]) for run in document["runs"] for key in ("train_l1", "test_l1")] == [2] * 4
    page = Path(document["report"]).read_text(encoding="utf-8")
    assert Path(document["report"]) == out / "reconstruction.html"
    assert "<svg" in page
    assert "data:image" not in page, "figures are drawn, with their numbers"
    assert not re.search(r'(src|href)="(?!data:|#)|@import|url\(', page), "it fetches nothing"
    for run in document["runs"]:
        assert run["name"] in page
        assert f"{run['final_l1']:.4g}" in page
        assert f"{run['final_relative_l1']:.4g}" in page
        assert f"reconstruction: {run['name']}: mean L1" in outcome.err


def test_what_cannot_be_compared_is_refused(runs: Path, tmp_path: Path) -> None:
    def changed(name: str, **keys: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(runs / "narrow", folder)
        tree = read_sealed(folder / "recipe.json")
        for key, value in keys.items():
            section, word = key.split("__")
            tree[section][word] = value
        write_sealed(folder / "recipe.json", tree)
        return folder

    first = runs / "narrow"
    (tmp_path / "empty").mkdir()
    broken = changed("broken")
    (broken / "recipe.json").write_text("{")
    unfinished = changed("unfinished")
    (unfinished / "student.pt").unlink()
    cases: list[tuple[list[Path], str]] = [
        ([], "runs: expected at least one folder"),
        ([first, first], "runs: expected different folders"),
        ([tmp_path / "gone"], r"run .*gone: expected a folder of `feedfast train`, found nothing there"),
        ([tmp_path / "empty"], r"run .*empty: expected a finished run.*found no recipe.json and no student.pt"),
        ([unfinished], r"run .*: expected a finished run of `feedfast train`, found no student.pt"),
        ([broken], r"run .*: recipe.json cannot be read"),
        ([first, changed("smaller", data__size=12)], r"smaller: data.size: expected 16 as in .*narrow, found 12"),
        ([first, changed("other", data__train=["x.npz"])], r"other: data.train.0: expected .*, found '.*x.npz'"),
        ([changed("blind", data__val=[])], r"data.val: expected validation images to measure on, found none"),
        ([changed("many", student__branches=2)], r"student.branches: expected a network with one final map, found 2"),
        ([changed("wrong", student__model="zoo/wrn-16-1")], r"do not fit model zoo/wrn-16-1"),
    ]
    for paths, message in cases:
        with pytest.raises(RequestError, match=message):
            run_reconstruction(paths, tmp_path / "out", Setting())
    for setting, message in (
        (Setting(rate=0), "rate: expected above 0 and at most 4, found 0"),
        (Setting(lr=float("nan")), "lr: expected above 0"),
        (Setting(epochs=0), "epochs: expected at least 1, found 0"),
    ):
        with pytest.raises(RequestError, match=message):
            run_reconstruction([first], tmp_path / "out", setting)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    outcome = feedfast("analyze", "reconstruction", tmp_path / "gone", "--out", tmp_path / "out")
    assert outcome.code == 2
    assert outcome.error.startswith("run ")
    outcome = feedfast("analyze", "reconstruction", first, "--lr", "1e9", "--out", tmp_path / "out")
    assert outcome.error.startswith("lr: expected")
