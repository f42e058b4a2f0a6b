"""`feedfast.distiller` in a plain loop: the losses of `feedfast train`, whoever calls the student."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from small import digits_recipe
from torch import Tensor, nn

import feedfast
from feedfast.errors import CacheMismatchError, FeedfastError, RequestError
from feedfast.models.build import build_model
from feedfast.recipe import Recipe, parse_recipe
from feedfast.stages.loop import seed_step
from feedfast.stages.offline import run_cache
from feedfast.stages.open_cache import OpenedCache
from feedfast.stages.schedule import Schedule, total_steps
from feedfast.stages.student import run_train

BATCH, STEPS = 32, 8  # six steps are an epoch: the second view is begun


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("distiller")
    made = digits_recipe(folder, data={"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]})
    tree = made.model_dump(mode="json", exclude_none=True)
    for teacher in tree["teachers"]:
        teacher["taps"] = ["final", "ofd+margin", "stage"]
    made = parse_recipe(tree)
    run_cache(made)
    return made


@pytest.fixture(scope="module")
def cache(recipe: Recipe) -> OpenedCache:
    return feedfast.open_cache(recipe.cache.path, replay=0)


def network(recipe: Recipe) -> nn.Module:
    built = build_model("zoo/wrn-10-1", num_classes=10, weights=None, seed=recipe.train_seed)
    return built.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def trained(recipe: Recipe, folder: Path, method: Any) -> list[dict[str, float]]:
    """Rows of metrics.jsonl of `feedfast train`."""
    tree = recipe.model_dump(mode="json", exclude_none=True)
    tree["method"] = method
    tree["data"]["val"] = []
    tree["train"] = {**tree["train"], "max_steps": STEPS, "out": str(folder), "replay": 0}
    run_train(parse_recipe(tree))
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def looped(recipe: Recipe, cache: OpenedCache, method: Any, run: Any = None, **call: Any) -> list[dict[str, Tensor]]:
    """Losses of a loop of one's own; ``run`` makes of the student what is called in its place."""
    student = network(recipe)
    distiller = feedfast.distiller(cache, student, method, seed=recipe.train_seed, batch_size=BATCH)
    called = student if run is None else run(student)
    weights = [w for w in (*student.parameters(), *distiller.parameters()) if w.requires_grad]
    train = recipe.train
    optimizer = torch.optim.SGD(weights, 0.0, train.momentum, weight_decay=train.weight_decay, nesterov=train.nesterov)
    steps = total_steps(train, len(cache))
    schedule = Schedule(train, steps, len(cache) // BATCH)
    loader = cache.epochs(BATCH, taps=distiller.taps, normalize=recipe.data.normalization)
    rows: list[dict[str, Tensor]] = []
    student.train()
    while len(rows) < STEPS:
        for batch in loader:
            step = len(rows)
            optimizer.param_groups[0]["lr"] = schedule.lr(step)
            seed_step(torch.device("cpu"), recipe.train_seed, step, 0)  # crd draws from torch's generator
            given = {key: value(called, batch) for key, value in call.items()}
            losses = distiller(called(batch.images), batch, progress=step / steps, **given)
            optimizer.zero_grad()
            losses["loss"].backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            rows.append({name: value.detach() for name, value in losses.items()})
            if len(rows) == STEPS:
                break
    distiller.remove()
    return rows


SLOW = pytest.mark.slow
METHODS = [
    pytest.param({"name": "none"}, marks=SLOW),
    {"name": "kd"},
    {"name": "ofd", "alpha": 1e-3},
    pytest.param({"name": "fitnet"}, marks=SLOW),
    pytest.param({"name": "crd"}, marks=SLOW),  # remembers samples
    pytest.param({"name": "ft", "paraphraser_epochs": 1}, marks=SLOW),  # learns before the first step
    [{"name": "kd", "weight": 0.5}, {"name": "at"}],
]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_loop_of_ones_own_has_the_losses_of_feedfast_train(
    recipe: Recipe, cache: OpenedCache, tmp_path: Path, method: Any
) -> None:
    expected = trained(recipe, tmp_path / "run", method)
    found = looped(recipe, cache, method)
    assert len(found) == len(expected) == STEPS
    for ours, theirs in zip(found, expected, strict=True):
        assert {name: float(value) for name, value in ours.items()} == {name: theirs[name] for name in ours}


def compiled(student: nn.Module) -> Any:
    return torch.compile(student, backend="aot_eager")  # what is traced and differentiated; no C++ to wait for


class Returns(nn.Module):
    """A student as Hugging Face writes them: an object with ``logits``, which a wrapper rounds."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> Any:
        return type("Output", (), {"logits": self.student(images).double().float()})()


@pytest.mark.parametrize("run", [pytest.param(compiled, marks=SLOW), Returns])
def test_a_student_is_heard_through_what_is_wrapped_around_it(recipe: Recipe, cache: OpenedCache, run: Any) -> None:
    method = {"name": "ofd", "alpha": 1e-3}
    for ours, theirs in zip(looped(recipe, cache, method, run), looped(recipe, cache, method), strict=True):
        for name in theirs:
            assert torch.allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


def test_a_task_loss_may_be_ones_own(recipe: Recipe, cache: OpenedCache) -> None:
    """kd fuses cross-entropy otherwise: the same sum in another order."""

    def own(student: Any, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(student(batch.images), batch.labels)

    found, expected = looped(recipe, cache, "kd", task_loss=own), looped(recipe, cache, "kd")
    for ours, theirs in zip(found[:2], expected[:2], strict=True):  # later ones differ as roundings grow
        assert torch.allclose(ours["loss"], theirs["loss"], rtol=1e-5)


def test_a_student_is_left_as_it_was_found(recipe: Recipe, cache: OpenedCache) -> None:
    student = network(recipe)
    keys, images = list(student.state_dict()), torch.rand(2, 3, 16, 16)
    expected = student.eval()(images)
    with feedfast.distiller(cache, student, "ofd") as distiller:
        assert torch.equal(student(images), expected)
        assert list(student.state_dict()) == keys
        assert distiller.student is student
        assert not {id(p) for p in student.parameters()} & {id(p) for p in distiller.parameters()}
        assert distiller.taps == {"a": ("ofd1", "ofd2", "ofd3"), "b": ("ofd1", "ofd2", "ofd3")}
        assert "ofd, taps={'a'" in repr(distiller)
        averaged = copy.deepcopy(student)  # with a pass heard and not taken
        assert torch.equal(averaged(images), expected)
        pickle.loads(pickle.dumps(student))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())


def test_what_is_not_heard_is_said(recipe: Recipe, cache: OpenedCache) -> None:
    student = network(recipe)
    distiller = feedfast.distiller(cache, student, [{"name": "ofd"}, {"name": "kd"}], teachers=["b"])
    batch = next(iter(cache.epochs(BATCH, taps=distiller.taps)))
    with torch.no_grad():
        student(batch.images)
    with pytest.raises(FeedfastError, match=r"^student: expected one forward pass with gradient"):
        distiller(None, batch)
    output = student(batch.images)
    assert set(distiller(None, batch)) == {"loss", "ce", "kd.kd", "ofd.feature"}
    with pytest.raises(FeedfastError, match="found none since the last"):
        distiller(output, batch)
    output = student(batch.images[:7])
    with pytest.raises(RequestError, match="expected the 7 images of the student's last forward pass, found 32"):
        distiller(output, batch)
    output = student(batch.images)
    with pytest.raises(
        CacheMismatchError, match=r"^batch.targets: expected tap 'ofd1' of teacher 'b', found .*'logits'"
    ):
        distiller(output, next(iter(cache.epochs(BATCH, taps={"b": "logits"}))))
    twin = student._replicate_for_data_parallel()  # what nn.DataParallel runs on each of its GPUs
    with pytest.raises(FeedfastError, match="DataParallel is not supported"):
        twin(batch.images)


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("kdd", {}, r"^method.name: expected .* \(did you mean 'kd'\?\)"),
        ({"name": "kd", "alpa": 1.0}, {}, r"^method.alpa: not an option of 'kd'"),
        (3, {}, r"^method: expected a name, .* found 3"),
        ("mgd", {"teachers": ["c"]}, r"^teachers: expected names among \['a', 'b'\], .* found \['c'\]"),
    ],
)
def test_wrong_words_are_refused(
    recipe: Recipe, cache: OpenedCache, method: Any, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        feedfast.distiller(cache, network(recipe), method, **options)


def test_a_cache_without_the_taps_is_refused(tmp_path: Path, recipe: Recipe, cache: OpenedCache) -> None:
    with pytest.raises(CacheMismatchError, match=r"'ft' needs the 'factor' taps of teacher 'a'"):
        feedfast.distiller(cache, network(recipe), {"name": "ft", "factors": "stored"})
    with pytest.raises(RequestError, match=r"^student Linear: "):
        feedfast.distiller(cache, nn.Linear(16, 10), "kd")


def test_a_method_that_changes_in_a_run_asks_how_far_it_is(recipe: Recipe, cache: OpenedCache) -> None:
    student = network(recipe)
    with feedfast.distiller(cache, student, {"name": "dkd", "warmup": 0.01}) as distiller:
        batch = next(iter(cache.epochs(BATCH, taps=distiller.taps)))
        output = student(batch.images)
        with pytest.raises(RequestError, match=r"^progress: method 'dkd' changes with it"):
            distiller(output, batch)
        assert distiller(output, batch, progress=0.5)["loss"].requires_grad


def test_images_come_normalized_as_asked(cache: OpenedCache) -> None:
    pixels = next(cache.stream(0, 8, taps={}, normalize=False)).images
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 0.125)
    found = next(cache.stream(0, 8, taps={}, normalize=(mean, std))).images
    expected = (pixels.permute(0, 3, 1, 2).double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(
        3, 1, 1
    )
    assert torch.allclose(found.double(), expected, atol=1e-6)
    with pytest.raises(RequestError, match=r"^normalize: expected True, False, or \(mean, std\)"):
        cache.epochs(8, normalize=((0.5,), (0.5,)))
