"""`feedfast analyze reconstruction`: how much of each trained network's final map a paraphraser can rebuild (FEED).

One paraphraser per run, on that network's own maps of the training images, measured on the validation images after
every epoch. All runs have the same images, views, rate, epochs and seed, so that only the networks differ; the error
is also given per mean |map|, because maps of a larger scale have larger errors.

The protocol is our reading: the paper's is not known in detail. So it is a report, and judges nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from feedfast.data.dali import require_dali
from feedfast.data.dataset import Dataset
from feedfast.data.loader import Loader
from feedfast.errors import FeedfastError, RequestError
from feedfast.files import read_sealed, write_json
from feedfast.methods.ft import TAP, Paraphraser, train_paraphraser
from feedfast.models.build import build_model
from feedfast.provenance import Provenance
from feedfast.recipe import Recipe, parse_recipe
from feedfast.report.reconstruction import write_reconstruction
from feedfast.stages.data import open_train, open_val, pixel_loader, view_plan
from feedfast.stages.ensemble import FrozenTeacher, tap_requests
from feedfast.stages.evaluate import BATCH
from feedfast.stages.folder import RECIPE, differences, ensure_dir
from feedfast.stages.progress import Meter
from feedfast.stages.trainee import method_entries, names_of
from feedfast.stages.worker import pick_device

log = logging.getLogger(__name__)

TRAIN_BATCH = 128  # as the authors of factor transfer train theirs


@dataclass(frozen=True)
class Setting:
    """How every paraphraser is trained.

    Attributes:
        rate: channels of the factors per channel of the map.
        epochs: passes over the training images, each over another view of them.
        seed: of the paraphrasers' start and of the views.
        limit: training images per epoch; 0 = all.
        lr: of SGD.
    """

    rate: float = 0.5
    epochs: int = 5
    seed: int = 0
    limit: int = 0
    lr: float = 0.1

    def check(self) -> None:
        """Raise RequestError where a number is out of range."""
        for key, value, low, high in (("rate", self.rate, 0, 4), ("lr", self.lr, 0, 1000)):
            if not low < value <= high:
                raise RequestError(f"{key}: expected above {low} and at most {high}, found {value}")
        for name, number, least in (("epochs", self.epochs, 1), ("seed", self.seed, 0), ("limit", self.limit, 0)):
            if number < least:
                raise RequestError(f"{name}: expected at least {least}, found {number}")


@dataclass(frozen=True)
class _Run:
    path: Path
    recipe: Recipe
    accuracy: float | None


def run_reconstruction(paths: Sequence[Path], out: Path, setting: Setting) -> dict[str, Any]:
    """Train and measure one paraphraser per run; write ``out/reconstruction.html`` and ``.json``.

    Args:
        paths: folders of `feedfast train`, all of the same images and the same size of input.
        out: where page and document go.
        setting: the same for all runs.

    Returns:
        The JSON of `feedfast analyze reconstruction`: ``setting``, ``report``, ``provenance``, and per run ``name``,
        ``path``, ``model``, ``method``, ``val_accuracy``, ``shape`` of the map, ``factors`` (channels), ``train_l1``
        and ``test_l1`` (one mean L1 per epoch; that of training is taken while it trains), ``test_mean_abs`` (mean
        |map|), ``final_l1`` and ``final_relative_l1`` (on the validation images, after the last epoch).

    Raises:
        RequestError: a folder holds no run, or none that can be compared with the first.
        FeedfastError: a paraphraser diverged.
    """
    setting.check()
    require_dali()
    job = Provenance.begin()
    runs = _open_runs(paths)
    ensure_dir(out, "out")
    recipe = runs[0].recipe
    data = recipe.data
    log.info("images: %s, as %s names them", ", ".join([*data.train, *data.val])[:500], runs[0].path / RECIPE)
    train = open_train(recipe)
    val = open_val(recipe, train)
    if val is None:
        raise RequestError(f"{runs[0].path}: data.val: expected validation images to measure on, found none")
    device = pick_device("auto", key="device")
    rows = min(setting.limit or len(train), len(train))
    plan = view_plan(data, setting.seed)
    networks = [_network(run, train, val, device) for run in runs]
    found: list[dict[str, Any]] = []
    with (
        pixel_loader(train, plan, min(TRAIN_BATCH, rows), device, data.threads) as pixels,
        pixel_loader(val, plan, BATCH, device, data.threads) as unseen,
        Meter("reconstruction", len(runs) * setting.epochs * (rows + len(val))) as meter,
    ):
        for run, name, network in zip(runs, _names(runs), networks, strict=True):
            measured = _measure(network, pixels, rows, unseen, setting, meter)
            log.info(
                "reconstruction: %s: mean L1 %.4g on the validation images, %.2f %% of the mean |map|",
                name,
                measured["final_l1"],
                100 * measured["final_relative_l1"],
            )
            taught = names_of(method_entries(run.recipe.method))
            about = {"model": run.recipe.student.model, "method": taught, "val_accuracy": run.accuracy}
            found.append({"name": name, "path": str(run.path), **about, **measured})
    job = job.finished()
    page = write_reconstruction(out / "reconstruction.html", found, asdict(setting), job)
    made = [job.model_dump(mode="json")]
    document = {"setting": asdict(setting), "runs": found, "report": str(page), "provenance": made}
    write_json(out / "reconstruction.json", document)
    return document


def _network(run: _Run, train: Dataset, val: Dataset, device: torch.device) -> FrozenTeacher:
    """The run's student as a frozen network with its final map."""
    recipe, where = run.recipe, f"run {run.path}"
    classes = len(train.classes) or len(val.classes)
    model = build_model(recipe.student.model, num_classes=classes, weights=run.path / "student.pt", seed=0)
    mean, std = recipe.data.normalization
    network = FrozenTeacher(
        str(run.path),
        model,
        lambda example: tap_requests(model, (TAP,), example, where),
        source=recipe.student.model,
        bn="eval",
        precision="fp32",
        mean=mean,
        std=std,
        size=recipe.data.size,
        device=device,
    )
    if len(network.shapes[TAP]) != 3:
        raise RequestError(f"{run.path}: expected a final map [C, H, W], found {list(network.shapes[TAP])}")
    return network


def _measure(
    network: FrozenTeacher, pixels: Loader, rows: int, unseen: Loader, setting: Setting, meter: Meter
) -> dict[str, Any]:
    """Curves of one network's paraphraser."""
    shape = network.shapes[TAP]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setting.seed)
        paraphraser = Paraphraser(shape[0], setting.rate)
    paraphraser = paraphraser.to(network.device)

    def maps(view: int) -> Iterator[Tensor]:
        for batch in pixels.stream(view, np.arange(rows)):
            yield network(batch.images)[TAP]
            meter.advance(len(batch.rows))

    train_l1: list[float] = []
    test_l1: list[float] = []
    scale = 0.0
    epochs = (maps(epoch) for epoch in range(setting.epochs))
    for mean in train_paraphraser(paraphraser, epochs, lr=setting.lr, key="lr"):
        error, scale = _mean_l1(network, paraphraser, unseen, meter)
        train_l1.append(mean)
        test_l1.append(error)
    return {
        "shape": list(shape),
        "factors": paraphraser.factors,
        "train_l1": train_l1,
        "test_l1": test_l1,
        "test_mean_abs": scale,
        "final_l1": test_l1[-1],
        "final_relative_l1": test_l1[-1] / scale if scale else 0.0,
    }


@torch.no_grad()
def _mean_l1(network: FrozenTeacher, paraphraser: Paraphraser, unseen: Loader, meter: Meter) -> tuple[float, float]:
    """Mean |reconstruction - map| and mean |map| over all validation images, in float64 sums."""
    wrong, size, values = 0.0, 0.0, 0
    for batch in unseen.evaluation():
        map_NCHW = network(batch.images)[TAP]
        wrong += float((paraphraser(map_NCHW) - map_NCHW).abs().double().sum())
        size += float(map_NCHW.abs().double().sum())
        values += map_NCHW.numel()
        meter.advance(len(batch.rows))
    return wrong / values, size / values


def _open_runs(paths: Sequence[Path]) -> list[_Run]:
    """Recipes and results of all folders, checked to be comparable."""
    if not paths:
        raise RequestError("runs: expected at least one folder of `feedfast train`, found none")
    if len({path.resolve() for path in paths}) < len(paths):
        raise RequestError(f"runs: expected different folders, found {', '.join(map(str, paths))}")
    runs = [_open_run(path) for path in paths]
    first = runs[0]
    for run in runs[1:]:
        differing = differences(_images(first.recipe), _images(run.recipe), "data")
        if differing:
            key, expected, found = differing[0]
            raise RequestError(
                f"{run.path}: {key}: expected {expected!r} as in {first.path}, found {found!r}; "
                "only networks on the same images can be compared"
            )
    return runs


def _images(recipe: Recipe) -> dict[str, Any]:
    """What decides which images a network sees, and at which size."""
    data = recipe.data
    tree = data.model_dump(mode="json", exclude={"threads", "check", "mean", "std"})
    tree |= {key: [str(Path(path).resolve()) for path in tree[key]] for key in ("train", "val")}
    return tree  # how the pixels are normalized is the network's own


def _open_run(path: Path) -> _Run:
    if not path.is_dir():
        raise RequestError(f"run {path}: expected a folder of `feedfast train`, found nothing there")
    missing = [name for name in (RECIPE, "student.pt") if not (path / name).is_file()]
    if missing:
        raise RequestError(
            f"run {path}: expected a finished run of `feedfast train`, found no {' and no '.join(missing)}"
        )
    try:
        recipe = parse_recipe(read_sealed(path / RECIPE), where=str(path / RECIPE))
    except FeedfastError as error:
        raise RequestError(f"run {path}: {error}") from error
    except (OSError, ValueError) as error:
        raise RequestError(f"run {path}: {RECIPE} cannot be read: {error}") from error
    if ":" in recipe.student.model:
        raise RequestError(f"run {path}: student.model: {recipe.student.model!r} would import code that a folder names")
    if recipe.student.branches > 1:
        raise RequestError(
            f"run {path}: student.branches: expected a network with one final map, found {recipe.student.branches} "
            "branches; its best one is in branch.pt"
        )
    accuracy = None
    if (path / "result.json").is_file():
        try:
            value = read_sealed(path / "result.json").get("val_accuracy")
        except (OSError, ValueError):  # only shown
            value = None
        accuracy = float(value) if isinstance(value, (int, float)) else None
    return _Run(path, recipe, accuracy)


def _names(runs: Sequence[_Run]) -> list[str]:
    """The folders' own names where they tell the runs apart, else their paths."""
    short = [run.path.resolve().name for run in runs]
    return short if len(set(short)) == len(short) else [str(run.path) for run in runs]
