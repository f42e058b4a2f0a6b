"""Every packaged recipe, as a user meets it: it parses, its networks fit its methods, and it runs on tiny data.

Runs are the product's own stages on a few generated images, with random teachers; only sizes, batches and the number of
steps are overridden. Whole runs of everything are slow together: a teacher, a cached student and a chain are quick.
Recipes of segmentation and detection run on scenes of squares and discs.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from scenes import DATA as SCENES
from scenes import write_scenes

from feedfast.methods import Method, StudentOutput, TapInfo, margin_from_bn
from feedfast.models.branched import Branched
from feedfast.models.build import build_model
from feedfast.models.presets import preset_taps
from feedfast.models.taps import Tapped, bn_parameters
from feedfast.recipe import Recipe, load_recipe, packaged_recipe, packaged_recipes
from feedfast.stages.chain import run_chain
from feedfast.stages.ensemble import tap_requests
from feedfast.stages.offline import run_cache
from feedfast.stages.plan import run_plan
from feedfast.stages.schedule import Schedule, total_steps
from feedfast.stages.student import run_train
from feedfast.stages.trainee import build_methods, losses_of, method_entries, needs_of, student_needs_of, tap_student
from feedfast.tasks import Classify, task_named

NAMES = tuple(packaged_recipes())
SMALL = {28: 28, 32: 16, 224: 64, 513: 65, 300: 64, 160: 64}  # size of a recipe → of the test
QUICK = ("lp-mnist", "teacher-wrn-16-2-mnist")
BATCH = 4
CLASSES = {"classify": 10, "segment": 3, "detect": 2}  # of the generated images


def read(name: str, folder: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    file = folder / f"{name}.toml"
    file.write_text(packaged_recipe(name))
    return load_recipe(file, overrides)


def every(quick: tuple[str, ...]) -> list[object]:
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in NAMES]


# ---- what is in them


def test_the_settings_of_the_papers_are_there() -> None:
    expected = {f"ofd-{letter}-cifar100" for letter in "abcdef"}
    expected |= {f"kd-resnet-50-{ratio}-imagenet" for ratio in ("p25", "p37.5", "p50")}
    expected |= {"plain-resnet-50-pruned-imagenet", "ofd-resnet152-resnet50-imagenet"}
    expected |= {"ofd-resnet50-mobilenetv1-imagenet", "ft-resnet-20-cifar10", "repdistiller-wrn-16-2-cifar100"}
    expected |= {"ofd-voc-segmentation-resnet18", "ofd-voc-segmentation-mobilenetv2"}
    expected |= {"ofd-voc0712-detection-ssd300-resnet18"}
    assert expected <= set(NAMES)
    for beginning in ("pfeed-", "sfeed-", "ekd-", "lp-", "teacher-"):
        assert [name for name in NAMES if name.startswith(beginning)], beginning


@pytest.mark.parametrize("name", NAMES)
def test_every_line_says_where_its_value_is_from(name: str) -> None:
    """One line what it is; then each choice is the paper's, its code's, or ours."""
    text = packaged_recipe(name)
    title, *rest = text.splitlines()
    assert title.startswith("# ")
    assert title.endswith(".")
    assert max(len(line) for line in text.splitlines()) <= 120
    section = ""
    silent = []
    for line in rest:
        if line.startswith("["):
            section = line.strip("[]")
        elif section in ("method", "train") and " = " in line and not line.startswith("#"):
            key = line.partition(" = ")[0]
            plain = key in ("source", "out") or line == 'name = "none"'  # no paper's choice: where things lie
            if not plain and "#" not in line and key not in ("milestones", "tau", "name"):
                silent.append(line)
    assert silent == []


@pytest.mark.parametrize("name", NAMES)
def test_names_in_it_lead_somewhere(name: str, tmp_path: Path) -> None:
    """Teachers' weights are what a packaged teacher recipe writes, or published; paths carry the recipe's own name."""
    recipe = read(name, tmp_path)
    text = packaged_recipe(name)
    assert recipe.train.out == f"runs/{name}"
    assert recipe.cache.path in ("", f"runs/{name}.zarr")
    for teacher in recipe.teachers:
        folder = Path(teacher.weights).parent.name
        if not folder:  # the library's published weights
            assert teacher.model.startswith(("torchvision/", "timm/"))
            continue
        made_by = [other for other in NAMES if folder == other or folder.rpartition("-")[0] == other]
        if made_by:
            assert f"feedfast train {made_by[0]}.toml" in text
            trained = read(made_by[0], tmp_path)
            assert trained.student.model == teacher.model
            mean, std = recipe.data.normalization
            assert trained.data.normalization == (teacher.mean or mean, teacher.std or std)
        else:  # the reader's own
            (line,) = [line for line in text.splitlines() if f'"{teacher.weights}"' in line]
            assert line.endswith("# placeholder")


PUBLISHED = {
    # epochs, batch, rate at the start and after each milestone: from the papers' code, as epoch → learning rate
    "ofd-c-cifar100": (200, 128, {0: 0.1, 99: 0.1, 100: 0.01, 149: 0.01, 150: 0.001}),
    "ofd-e-cifar100": (200, 64, {0: 0.1, 100: 0.01, 150: 0.001}),
    # 0.1 ** (epoch // 30) with epochs from 1: the 30th is the first at the lower rate
    "ofd-resnet152-resnet50-imagenet": (100, 256, {28: 0.1, 29: 0.01, 58: 0.01, 59: 0.001, 89: 1e-4}),
    "ft-resnet-20-cifar10": (164, 128, {81: 0.1, 82: 0.01, 122: 0.01, 123: 0.001}),
    "repdistiller-wrn-16-2-cifar100": (240, 64, {149: 0.05, 150: 5e-3, 179: 5e-3, 180: 5e-4, 210: 5e-5}),
    "kd-resnet-50-p50-imagenet": (360, 256, {5: 0.1, 119: 0.1, 120: 0.01, 239: 0.01, 240: 1e-3, 319: 1e-3, 320: 1e-4}),
    "ofd-voc-segmentation-resnet18": (50, 12, {}),  # poly there, cosine here
    "ofd-voc-segmentation-mobilenetv2": (50, 12, {}),  # poly there, cosine here
    "plain-resnet-50-pruned-imagenet": (360, 256, {5: 0.1, 119: 0.1, 120: 0.01, 240: 1e-3, 320: 1e-4}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_schedules_are_the_published_ones(name: str, tmp_path: Path) -> None:
    train = read(name, tmp_path).train
    epochs, batch, rates = PUBLISHED[name]
    assert (train.epochs, train.batch) == (epochs, batch)
    steps = 390  # per epoch
    schedule = Schedule(train, steps * epochs, steps)
    for epoch, lr in rates.items():
        middle = schedule.lr(steps * epoch + steps // 2)
        assert middle == pytest.approx(lr), epoch


def test_limited_data_is_trained_on_for_as_long(tmp_path: Path) -> None:
    """CIFAR-100's 50,000 images in whole batches of the other recipe's epochs."""
    whole, tenth = read("ekd-cifar100", tmp_path).train, read("ekd-cifar100-10-percent", tmp_path)
    assert total_steps(tenth.train, 5_000) == total_steps(whole, 50_000) == 50_000 // 128 * 200
    assert tenth.data.fraction == 0.1


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("ofd-voc-segmentation-")])
def test_the_loss_of_segmentation_is_the_authors(name: str, tmp_path: Path) -> None:
    """CE / B + 1e-5 / B * sum of d_i / divider_i: term by term what the recipe's weights make of ours."""
    recipe = read(name, tmp_path)
    (entry,) = method_entries(recipe.method)
    assert recipe.task.weight == pytest.approx(1 / recipe.train.batch, rel=1e-4)
    assert entry.weight == 1
    assert entry.options.alpha == 1e-5  # ours divides the sum over a batch by B, too
    assert [1 / weight for weight in entry.options.tap_weights] == [8, 4, 2, 1, 1, 16]


# ---- the networks fit the methods


OTHER_STUDENTS = [(name, f"zoo/fitnet-{number}") for name in NAMES if name.startswith("lp-") for number in (2, 3, 4)]
OTHER_STUDENTS += [("plain-resnet-50-pruned-imagenet", f"zoo/resnet-50-{ratio}") for ratio in ("p25", "p37.5")]


FIT = ("lp-mnist", "ekd-cifar100", "sfeed-resnet-56-cifar100", "ofd-d-cifar100")  # the others take seconds to build


@pytest.mark.parametrize(
    ("name", "student"),
    [
        pytest.param(name, student, marks=[] if name in FIT else [pytest.mark.slow])
        for name, student in [*((name, None) for name in NAMES), *OTHER_STUDENTS]
    ],
)
def test_its_networks_fit_its_methods(name: str, student: str | None, tmp_path: Path) -> None:
    """Built at the recipe's own size where that is small; torchvision's and timm's at 64 pixels."""
    recipe = read(name, tmp_path, (f"student.model={student}",) if student else ())
    size, task = SMALL[recipe.data.size], task_named(recipe.task.name, CLASSES[recipe.task.name])
    example = torch.randn(2, 3, size, size)
    entries = method_entries(recipe.method)
    networks = [
        build_model(recipe.student.model, num_classes=task.classes, seed=n) for n in range(recipe.student.branches)
    ]
    network = Branched(networks) if len(networks) > 1 else networks[0]
    tapped = tap_student(network, student_needs_of(entries), example, task, "student")
    teachers: dict[str, dict[str, TapInfo]] = {}
    for spec in recipe.teachers:
        model = build_model(spec.model, num_classes=task.classes, seed=0)
        specs = spec.taps or tuple(need.removesuffix("*") for need in needs_of(entries) if need != "logits")
        taps = [request.tap for request in tap_requests(model, specs, example, spec.name)]
        assert taps or needs_of(entries) == ("logits",)
        found = Tapped(model, taps, example)
        task.check(found.outputs, spec.name)
        teachers[spec.name] = {"logits": TapInfo((task.classes,))} if recipe.task.name == "classify" else {}
        for tap in taps:
            parameters = bn_parameters(model, tap)
            margin = None if parameters is None else margin_from_bn(*parameters)
            teachers[spec.name][tap.name] = TapInfo(found.shapes[tap.name], margin)
    if recipe.chain.generations:  # the first generation's student is the second's teacher
        (tap,) = preset_taps(networks[0], "final")
        teachers["generation-1"] = {"logits": TapInfo((task.classes,)), "final": TapInfo(tapped.shapes[tap.name])}
    methods = build_methods(entries, tapped.shapes, teachers, tapped.outputs, seed=0)
    assert len(methods) == len(recipe.method)


@pytest.mark.parametrize("ratio", ["p25", "p37.5", "p50"])
def test_the_pruned_students_loss_is_the_authors(ratio: str, tmp_path: Path) -> None:
    """0.4 CE + 0.6 KL(student || mean of the teachers' logits) at temperature 1, in float64 by hand."""
    (entry,) = method_entries(read(f"kd-resnet-50-{ratio}-imagenet", tmp_path).method)
    generator = torch.Generator().manual_seed(0)
    classes = CLASSES["classify"]
    z, a, b = (torch.randn(6, classes, generator=generator, dtype=torch.float64) for _ in range(3))
    labels = torch.arange(6)
    infos = {name: {"logits": TapInfo((classes,))} for name in "ab"}
    (method,) = build_methods((entry,), {"logits": (classes,)}, infos, (classes,), seed=0)
    targets = {"a": {"logits": a.float()}, "b": {"logits": b.float()}}
    student = StudentOutput(z.float(), {})
    found = losses_of(Classify(classes), (entry,), [cast("Method", method)], student, targets, labels, 0.5)["loss"]
    p, q = z.log_softmax(1), ((a + b) / 2).log_softmax(1)
    expected = 0.4 * -p[torch.arange(6), labels].mean() + 0.6 * (p.exp() * (p - q)).sum(1).mean()
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


# ---- it runs


@torch.no_grad()
def settle(model: torch.nn.Module, images: torch.Tensor) -> None:
    """Batch norms that have seen the images: with fresh ones the maps of 110 layers grow beyond float16."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    model.train()(images)


def tiny(name: str, folder: Path) -> Recipe:
    """The recipe with sixteen generated images, random teachers and two steps of four."""
    recipe = read(name, folder)
    size, classes = SMALL[recipe.data.size], CLASSES[recipe.task.name]
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (16, size + 8 * (size == 64), size, 3), dtype=np.uint8)
    if recipe.task.name != "classify":
        write_scenes(folder / "scenes", train=16, val=4)
        train = folder / "scenes" / SCENES[recipe.task.name][0]
    elif size == 64:  # photographs in class folders
        train = folder / "images"
        for number, pixels in enumerate(images):
            (train / f"class-{number % classes}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(train / f"class-{number % classes}" / f"{number}.jpg")
    else:
        train = folder / "images.npz"
        np.savez(train, images=images, labels=np.arange(16) % classes, classes=np.arange(classes).astype(str))
    overrides = [f"data.train={train}", f"data.val={train}", f"data.size={size}", "cache.pilot=16", "train.device=cpu"]
    overrides += [f"cache.batch={BATCH}", f"train.batch={BATCH}", f"cache.views={min(recipe.cache.views, 1)}"]
    overrides += ["train.max_steps=2", f"train.out={folder / 'out'}", "train.lr=0.001", "train.log_every=1"]
    overrides += ["train.epochs=1", "train.warmup_epochs=0"]
    if recipe.method[0].name == "ft":
        overrides.append("method.paraphraser_lr=0.001")  # four images a step are no 128
    if recipe.cache.path:
        overrides.append(f"cache.path={folder / 'cache.zarr'}")
    if recipe.chain.generations:
        overrides.append("chain.generations=2")
    if recipe.student.backbone is not None:  # the published weights are not to be had here
        network = build_model(recipe.student.model, num_classes=classes, seed=0)
        torch.save(torchvision.models.get_model(network.published).state_dict(), folder / "backbone.pt")
        overrides.append(f"student.backbone={folder / 'backbone.pt'}")
    for number, teacher in enumerate(recipe.teachers):
        weights = folder / f"teacher-{number}.pt"
        model = build_model(teacher.model, num_classes=classes, seed=number)
        settle(model, torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1)
        torch.save(model.state_dict(), weights)
        overrides.append(f"teachers.{number}.weights={weights}")
    return load_recipe(folder / f"{name}.toml", overrides)


@pytest.mark.parametrize("name", every(QUICK))
def test_it_plans_caches_and_trains_two_steps(name: str, tmp_path: Path) -> None:
    recipe = tiny(name, tmp_path)
    count = 10 if recipe.data.fraction < 1 else 16
    if recipe.chain.generations:
        result = run_chain(recipe)
        assert [one["steps"] for one in result["generations"]] == [2, 2]
        assert (tmp_path / "out" / "generation-2" / "student.pt").is_file()
        return
    if recipe.teachers:
        planned = run_plan(recipe)
        cached = run_cache(recipe)
        assert cached["rows_written"] == count * recipe.cache.views
        assert (
            planned["targets"].keys() - {f"{teacher.name}/logits" for teacher in recipe.teachers}
            == cached["taps"].keys()
        )
    result = run_train(recipe)
    assert result["steps"] == 2
    assert np.isfinite(result["final_loss"])
    state = torch.load(tmp_path / "out" / "student.pt", weights_only=True)
    if recipe.student.branches == 1:
        classes = CLASSES[recipe.task.name]
        build_model(recipe.student.model, num_classes=classes).load_state_dict(state)
