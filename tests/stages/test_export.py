"""Exported students: read by what is not ours, and equal to the trained network on real images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from small import digits_recipe

from feedfast.errors import FeedfastError, RequestError
from feedfast.models.build import build_model
from feedfast.stages import export
from feedfast.stages.export import FILES, run_export
from feedfast.stages.student import run_train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    recipe = digits_recipe(
        folder,
        teachers=0,
        method={"name": "none"},
        train={"source": "none", "epochs": 1},
        data={"mean": [0.2, 0.3, 0.4], "std": [0.5, 0.4, 0.3]},
    )
    run_train(recipe)
    return folder / "student"


@pytest.fixture(scope="module")
def exported(trained: Path) -> dict[str, Any]:
    return run_export(trained)


def _digits(folder: Path) -> np.ndarray:
    images: np.ndarray = np.load(folder.parent / "digits-val.npz")["images"][:50]
    return np.repeat(images[..., None], 3, axis=-1) if images.ndim == 3 else images


def _expected(trained: Path, pixels: np.ndarray) -> np.ndarray:
    """The plain network with the weights of the run, on pixels normalized in float64."""
    network = build_model("zoo/wrn-10-1", num_classes=10)
    network.load_state_dict(torch.load(trained / "student.pt", weights_only=True))
    images = (pixels.astype(np.float64) / 255 - [0.2, 0.3, 0.4]) / [0.5, 0.4, 0.3]
    with torch.inference_mode():
        logits: np.ndarray = network.double().eval()(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    return logits


def test_every_form_says_what_the_trained_network_says(trained: Path, exported: dict[str, Any]) -> None:
    folder = trained / "export"
    pixels = _digits(trained)
    expected = _expected(trained, pixels)
    scale = np.abs(expected).max()
    weights = torch.load(trained / "student.pt", weights_only=True)
    for state in (torch.load(folder / "student.pt", weights_only=True), load_file(folder / "student.safetensors")):
        assert state.keys() == weights.keys()
        assert all(torch.equal(state[key], weights[key]) for key in weights)
    program = torch.export.load(folder / "student.pt2").module()
    onnx.checker.check_model(onnx.load(folder / "student.onnx"), full_check=True)
    session = onnxruntime.InferenceSession(folder / "student.onnx")
    for count in (1, 3, 50):
        found = program(torch.from_numpy(pixels[:count])).detach().numpy()
        assert np.abs(found - expected[:count]).max() < 1e-4 * scale
        (found,) = session.run(None, {"pixels": pixels[:count]})
        assert np.abs(found - expected[:count]).max() < 1e-4 * scale
    said = json.loads((folder / "export.json").read_text())
    assert said["input"] == {"dtype": "uint8", "shape": ["batch", 16, 16, 3], "order": "RGB"}
    assert (
        said["parameters"]
        == exported["parameters"]
        == sum(p.numel() for p in build_model("zoo/wrn-10-1", num_classes=10).parameters())
    )
    assert len(said["classes"]) == 10
    assert list(said["files"]) == list(FILES)


def test_what_says_something_else_is_not_left_behind(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "export.json").write_text("{}")  # of an older export: it describes files that are gone
    real = export._onnx
    monkeypatch.setattr(export, "_onnx", lambda path: lambda pixels: real(path)(pixels) * 1.001)
    with pytest.raises(FeedfastError, match="logits of real images differ"):
        run_export(trained, tmp_path, ["onnx"])
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(
        export,
        "_write_weights",
        lambda name, path, student, model: torch.save(
            build_model("zoo/wrn-10-1", num_classes=10, seed=5).state_dict(), path
        ),
    )
    with pytest.raises(FeedfastError, match="not the student's"):
        run_export(trained, tmp_path, ["state_dict"])
    assert not (tmp_path / "student.pt").exists()


def test_one_image_is_enough_for_a_program_of_any_batch(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "_IMAGES", 1)
    assert run_export(trained, tmp_path, ["torch-export"])["images"] == 1
    pixels = _digits(trained)[:5]
    found = torch.export.load(tmp_path / "student.pt2").module()(torch.from_numpy(pixels)).detach().numpy()
    expected = _expected(trained, pixels)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"formats": ["tflite"]}, "--format: expected of"),
        ({"formats": []}, "found none"),
        ({"branch": True}, "--branch"),
    ],
)
def test_what_cannot_be_exported_is_refused(change: dict[str, Any], said: str, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=said):
        run_export(trained, tmp_path / "out", **change)
    with pytest.raises(RequestError, match="expected a finished run"):
        run_export(tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_student_of_branches_is_exported_whole_and_as_its_best_branch(tmp_path: Path) -> None:
    recipe = digits_recipe(
        tmp_path, teachers=0, method={"name": "none"}, student={"branches": 2}, train={"source": "none", "epochs": 1}
    )
    run_train(recipe)
    whole = run_export(tmp_path / "student", tmp_path / "whole")
    best = run_export(tmp_path / "student", tmp_path / "best", branch=True)
    assert (
        whole["parameters"]
        > best["parameters"]
        == sum(p.numel() for p in build_model("zoo/wrn-10-1", num_classes=10).parameters())
    )
    network = build_model("zoo/wrn-10-1", num_classes=10)
    network.load_state_dict(load_file(tmp_path / "best" / "student.safetensors"))
