"""A trained student for other programs: a state_dict, safetensors, a `torch.export` program, ONNX; each one checked.

    student.pt, student.safetensors   the bare network's weights, as `timm`, torchvision or the zoo build it
    student.pt2, student.onnx         programs: uint8 pixels [B, H, W, 3] → logits; normalization is inside

Pixels go in as the cache and the student saw them, so that nobody can normalize them otherwise or twice; any batch
size, the size of image that was trained on. What is written is read back and compared with the trained network on real
images, first one, then many; a file that says something else is removed and the export fails. Logits of a segmenter
are per pixel at the network's own resolution. A detector's boxes come from code, not from a graph: weights only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from feedfast.data.dali import require_dali
from feedfast.data.dataset import Dataset, ImageSource
from feedfast.errors import FeedfastError, RequestError
from feedfast.files import read_sealed, write_json
from feedfast.models.build import build_model, weights_sha256
from feedfast.models.given import copied
from feedfast.models.normalize import Normalize
from feedfast.models.taps import logits_of
from feedfast.models.weights import load_weights
from feedfast.provenance import Provenance
from feedfast.recipe import Recipe, parse_recipe
from feedfast.stages.data import open_train, open_val, pixel_loader, view_plan
from feedfast.stages.folder import BRANCH, RECIPE, ensure_dir
from feedfast.stages.trainee import build_student

log = logging.getLogger(__name__)

FILES: Final = {
    "state_dict": "student.pt",
    "safetensors": "student.safetensors",
    "torch-export": "student.pt2",
    "onnx": "student.onnx",
}
ABOUT: Final = "export.json"
PROGRAMS: Final = ("torch-export", "onnx")
_IMAGES = 32
# Of the largest logit: a program may add in another order, and another runtime has other kernels.
_TOLERANCE: Final = {"torch-export": 1e-5, "onnx": 1e-4}

Run = Callable[[Tensor], Tensor]  # pixels → logits


def run_export(
    run: Path,
    out: Path | None = None,
    formats: Sequence[str] = tuple(FILES),
    *,
    branch: bool = False,
    student: nn.Module | None = None,
    train: ImageSource | None = None,
    val: ImageSource | None = None,
) -> dict[str, Any]:
    """Write a run's student in other forms.

    Args:
        run: folder of `feedfast train`, whose images are still where its recipe says.
        out: where the files go; None = ``export`` in the run's folder.
        formats: of `FILES`.
        branch: of a student of branches the best one alone, instead of all.
        student: the network, of a run whose student was passed as an object; it is copied.
        train: the object that the images came from; ``val`` likewise.

    Returns:
        The JSON of `feedfast export`, also written as ``export.json``: ``model``, ``parameters``, ``sha256`` of the
        weights, ``classes``, ``input`` (what programs take), ``normalization`` (what the bare network takes), and
        ``files``: format → ``path``, ``bytes``, and ``difference``, the largest of the logits over the largest logit,
        on ``images`` real images.

    Raises:
        RequestError: no finished run, an unknown format, a missing package, or a network that has no such form.
        FeedfastError: what was written does not say what the network says.
    """
    wanted = list(dict.fromkeys(formats))
    _refuse_formats(wanted)
    require_dali()
    recipe, weights = _opened(run, branch, given=student is not None)
    if recipe.task.name == "detect" and set(PROGRAMS) & set(wanted):
        raise RequestError(
            "--format: a detector's boxes come from code, not from a graph; expected state_dict or safetensors, found "
            f"{', '.join(sorted(set(PROGRAMS) & set(wanted)))}"
        )
    data = open_train(recipe, train)
    images = _images(recipe, data, val)
    network = partial(_network, recipe, classes=len(data.classes), branch=branch, given=student)
    trained = network(weights)
    mean, std = recipe.data.normalization
    program = _Program(Normalize(mean, std), trained).eval()
    folder = ensure_dir(run / "export" if out is None else out, "--out")
    (folder / ABOUT).unlink(missing_ok=True)  # of an older export, whose files are replaced
    files = {}
    for name in wanted:
        path = folder / FILES[name]
        path.unlink(missing_ok=True)
        try:
            if name in PROGRAMS:
                found = _differences(name, _write_program(name, path, program, images), program, images)
            else:
                _write_weights(name, path, trained, recipe.student.model)
                found = _refuse_other_weights(path, network(path), trained)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        log.info("export: %s: on %d images within %.1e of the largest logit", path, len(images), found)
        files[name] = {"path": str(path), "bytes": path.stat().st_size, "difference": found}
    height, width = images.shape[1:3]
    document = {
        "run": str(run),
        "model": recipe.student.model,
        "branches": 1 if branch else recipe.student.branches,
        "parameters": sum(weight.numel() for weight in trained.parameters()),
        "sha256": weights_sha256(trained),
        "task": recipe.task.name,
        "classes": list(data.classes),
        "input": {"dtype": "uint8", "shape": ["batch", height, width, 3], "order": "RGB"},
        "normalization": {"of": "pixels / 255", "mean": list(mean), "std": list(std), "layout": "NCHW"},
        "images": len(images),
        "files": files,
    }
    write_json(folder / ABOUT, {**document, "provenance": [Provenance.begin().model_dump(mode="json")]})
    return document


class _Program(nn.Module):
    """Pixels to logits."""

    def __init__(self, normalize: Normalize, student: nn.Module) -> None:
        super().__init__()
        self.normalize, self.student = normalize, student

    def forward(self, pixels: Tensor) -> Any:
        """uint8 [B, H, W, 3] → logits."""
        return logits_of(self.student(self.normalize(pixels)))


def _refuse_formats(formats: Sequence[str]) -> None:
    unknown = [name for name in formats if name not in FILES]
    if unknown or not formats:
        raise RequestError(f"--format: expected of {', '.join(FILES)}; found {', '.join(unknown) or 'none'}")
    for name, package in (("safetensors", "safetensors"), ("onnx", "onnxscript"), ("onnx", "onnxruntime")):
        if name in formats:
            try:
                __import__(package)
            except ImportError as error:
                raise RequestError(
                    f"--format {name}: needs the package {package}: pip install 'feedfast[export]'; --format "
                    "state_dict and torch-export need none"
                ) from error


def _opened(run: Path, branch: bool, *, given: bool) -> tuple[Recipe, Path]:
    """The run's recipe and the weights that are exported."""
    weights = run / (BRANCH if branch else "student.pt")
    missing = [name for name in (RECIPE, "student.pt") if not (run / name).is_file()]
    if missing:
        raise RequestError(f"run {run}: expected a finished run of feedfast train, found no {' and no '.join(missing)}")
    try:
        recipe = parse_recipe(read_sealed(run / RECIPE), where=str(run / RECIPE))
    except (OSError, ValueError) as error:
        raise RequestError(f"run {run}: {RECIPE} cannot be read: {error}") from error
    if ":" in recipe.student.model and not given:
        raise RequestError(f"run {run}: student.model: {recipe.student.model!r} would import code that a folder names")
    if not weights.is_file():
        raise RequestError(f"run {run}: --branch: expected a student of branches, found no {BRANCH}")
    return recipe, weights


def _images(recipe: Recipe, train: Dataset, val: ImageSource | None) -> Tensor:
    """Real pixels, uint8 [B, H, W, 3]: of the validation images, else of those that were trained on."""
    data = open_val(recipe, train, val) or train
    with pixel_loader(data, view_plan(recipe.data, recipe.seed), _IMAGES, torch.device("cpu"), 1) as loader:
        return next(iter(loader.evaluation())).images[:_IMAGES].clone()


def _network(recipe: Recipe, weights: Path, classes: int, *, branch: bool, given: nn.Module | None) -> nn.Module:
    """The bare student with its trained weights, in evaluation mode; of a ``given`` one a copy."""
    if given is not None:
        own = copied(given, "student")
        load_weights(own, weights, name=recipe.student.model)
        return own.eval()
    asked = recipe.student.model_copy(
        update={"weights": None, "backbone": None, "branches": 1 if branch else recipe.student.branches}
    )
    student = (
        build_student(asked, classes, 0)
        if asked.branches > 1
        else build_model(asked.model, num_classes=classes, seed=0)
    )
    load_weights(student, weights, name=asked.model)
    return student.eval()


def _write_weights(name: str, path: Path, student: nn.Module, model: str) -> None:
    state = {key: value.detach().clone().contiguous() for key, value in student.state_dict().items()}
    if name == "state_dict":
        torch.save(state, path)
    else:
        from safetensors.torch import save_file

        save_file(state, path, metadata={"format": "pt", "model": model})


def _refuse_other_weights(path: Path, read: nn.Module, student: nn.Module) -> float:
    """0.0: a network that has read the file is the student, bit for bit."""
    if weights_sha256(read) != weights_sha256(student):
        raise FeedfastError(f"{path}: read back, the weights are not the student's; nothing was exported")
    return 0.0


def _write_program(name: str, path: Path, program: _Program, images: Tensor) -> Run:
    """Write a program; what reads it back."""
    batch = torch.export.Dim("batch", min=1, max=1 << 20)
    try:
        # two images, also where there is one, so that a batch of one is not taken for a constant
        exported = torch.export.export(program, (torch.cat([images[:1], images[-1:]]),), dynamic_shapes=({0: batch},))
        if name == "torch-export":
            torch.export.save(exported, path)
            return torch.export.load(path).module()
        torch.onnx.export(
            exported,
            f=str(path),
            dynamo=True,
            input_names=["pixels"],
            output_names=["logits"],
            external_data=False,
            verbose=False,
        )
    except OSError:
        raise
    except Exception as error:  # whatever a network does that a graph cannot say
        raise RequestError(
            f"--format {name}: no such form of this network can be made: {type(error).__name__}: {str(error)[:300]}; "
            "state_dict and safetensors hold any"
        ) from error
    return _onnx(path)


def _differences(name: str, read: Run, program: _Program, images: Tensor) -> float:
    """The largest difference of logits over the largest logit, of one image and of all.

    Raises:
        FeedfastError: it is more than the order of additions explains.
    """
    worst = 0.0
    with torch.inference_mode():
        for some in (images[:1], images):
            expected, found = program(some), read(some)
            if found.shape != expected.shape or not all(bool(torch.isfinite(one).all()) for one in (found, expected)):
                raise FeedfastError(
                    f"--format {name}: expected finite logits {list(expected.shape)} of {len(some)} images, found "
                    f"{list(found.shape)}; nothing was exported"
                )
            worst = max(worst, float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12)))
    if worst > _TOLERANCE[name]:
        raise FeedfastError(
            f"--format {name}: logits of real images differ by {worst:.1e} of the largest, expected at most "
            f"{_TOLERANCE[name]:.0e}; nothing was exported"
        )
    return worst


def _onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(pixels: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(session.run(["logits"], {"pixels": pixels.numpy()})[0]))

    return run
