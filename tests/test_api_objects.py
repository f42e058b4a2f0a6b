"""Networks and data sets that are passed as objects: the same caches and students as from names, left as they were."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import feedfast as command
from small import as_toml, digits_recipe
from torch import Tensor, nn

import feedfast
from feedfast.errors import CacheMismatchError, RequestError
from feedfast.models.build import build_model
from feedfast.models.given import word_of
from feedfast.recipe import Recipe
from feedfast.stages.inputs import teacher_input
from feedfast.storage.manifest import read_manifest

WORD = "python/feedfast.models.zoo.WideResNet"
TAPS = ["final", "ofd+margin"]


@dataclass(frozen=True)
class World:
    """A recipe of files, and what the command line made of it."""

    folder: Path
    recipe: Recipe
    digest: str

    def teacher(self) -> nn.Module:
        return build_model("zoo/wrn-10-1", num_classes=10, weights=self.folder / "a.pt")

    def student(self) -> nn.Module:
        """As the recipe's starts."""
        return build_model("zoo/wrn-10-1", num_classes=10, seed=self.recipe.train_seed)

    def tables(self, **changes: Any) -> dict[str, Any]:
        """The recipe without teachers and student."""
        tree = self.recipe.model_dump(mode="json", exclude_unset=True)
        return {key: value for key, value in tree.items() if key not in ("teachers", "student")} | changes


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("objects")
    small = ("data.limit=5", "cache.pilot=40", "cache.views=1", "train.batch=16", "train.epochs=2")
    recipe = digits_recipe(folder, small, teachers=1)
    made = command("cache", as_toml(recipe, folder / "recipe.toml"))
    return World(folder, recipe, made.document["digest"])


def state_of(network: nn.Module) -> dict[str, Any]:
    """All that a caller can see of a network."""
    modules = list(network.modules())
    return {
        "modes": [module.training for module in modules],
        "inplace": [getattr(module, "inplace", None) for module in modules],
        "hooks": [[*m._forward_hooks, *m._forward_pre_hooks, *m._backward_hooks] for m in modules],
        "parameters": [(id(p), p.requires_grad, p.device, p.stride()) for p in network.parameters()],
        "values": {key: value.clone() for key, value in network.state_dict().items()},
        "statistics": [getattr(module, "track_running_stats", None) for module in modules],
    }


def same_values(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def unchanged(network: nn.Module, before: dict[str, Any]) -> bool:
    after = state_of(network)
    values = same_values(after.pop("values"), before["values"])
    return values and after == {key: value for key, value in before.items() if key != "values"}


def wrapped(kind: str, network: nn.Module) -> nn.Module:
    if kind == "compiled":
        return torch.compile(network)  # type: ignore[return-value]
    return nn.DataParallel(network) if kind == "data-parallel" else network


@pytest.mark.parametrize("kind", ["bare", pytest.param("compiled", marks=pytest.mark.slow), "data-parallel"])
def test_the_cache_of_a_live_network(world: World, tmp_path: Path, kind: str) -> None:
    network = world.teacher()
    network.train()
    next(iter(network.children())).eval()
    next(iter(network.parameters())).requires_grad_(False)
    network.register_forward_hook(lambda *_: None)
    before = state_of(network)
    teachers = {"a": {"model": wrapped(kind, network), "taps": TAPS}}
    made = feedfast.cache(world.tables(), teachers=teachers, cache=tmp_path / "c.zarr")
    assert made.digest == world.digest
    assert unchanged(network, before)
    held = read_manifest(tmp_path / "c.zarr").teachers["a"]
    own = read_manifest(world.recipe.cache.path).teachers["a"]
    assert (held.model, held.published) == (WORD, False)
    assert held.weights_sha256 == own.weights_sha256


def test_a_teacher_on_batch_statistics_is_left_alone(world: World, tmp_path: Path) -> None:
    network = world.teacher().eval()
    before = state_of(network)
    teachers = {"a": {"model": network, "taps": ["final"], "bn": "batch"}}
    feedfast.cache(world.tables(method={"name": "pfeed"}), teachers=teachers, cache=tmp_path / "c.zarr")
    assert unchanged(network, before)


def test_the_command_line_goes_on_with_the_saved_weights(world: World, tmp_path: Path) -> None:
    """Its recipe names the network: another view is added, pixels and maps are verified, a student is trained."""
    path = tmp_path / "c.zarr"
    teachers = {"a": {"model": world.teacher(), "taps": TAPS}}
    feedfast.cache(world.tables(), teachers=teachers, cache=path)
    recipe = as_toml(world.recipe, tmp_path / "r.toml")
    more = command("cache", recipe, f"cache.path={path}", "cache.views=2")
    own = feedfast.cache(world.recipe, {"cache.views": 2, "cache.path": tmp_path / "own.zarr"})
    assert more.document["digest"] == own.digest
    assert command("verify", path, "--replay", 1, "--teachers", 50, "--recipe", recipe).document["ok"]
    trained = command("train", recipe, f"cache.path={path}", "train.max_steps=1", f"train.out={tmp_path / 'run'}")
    assert trained.code == 0, trained.err
    # other weights under the same name are noticed in both directions
    torch.save(build_model("zoo/wrn-10-1", num_classes=10, seed=9).state_dict(), tmp_path / "other.pt")
    assert (
        "weights_sha256"
        in command("cache", recipe, f"cache.path={path}", f"teachers.0.weights={tmp_path / 'other.pt'}").error
    )
    other = build_model("zoo/wrn-10-1", num_classes=10, seed=9)
    with pytest.raises(CacheMismatchError, match="weights_sha256"):
        feedfast.fit(world.recipe, {"cache.path": path, "train.out": tmp_path / "x"}, teachers={"a": other})


def test_whoever_has_only_the_name_is_told_what_to_pass(world: World, tmp_path: Path) -> None:
    network, path = world.teacher(), tmp_path / "c.zarr"
    feedfast.cache(world.tables(), teachers={"a": {"model": network, "taps": TAPS}}, cache=path)
    said = r"teachers\[a\]: model python/feedfast.models.zoo.WideResNet: was passed as a Python object"
    with pytest.raises(RequestError, match=said):
        feedfast.verify(path, teachers=50)
    found = feedfast.verify(path, teachers={"a": network}, percent=50)
    assert found.ok
    assert found.cosine["targets/a/final/codes"] > 0.99
    with pytest.raises(RequestError, match="expected networks of a, found one of 'b'"):
        feedfast.verify(path, teachers={"b": network})
    named = [{"name": "a", "model": WORD}]
    for source in ("live", "cache"):
        tree = world.tables(teachers=named, train={**world.tables()["train"], "source": source})
        with pytest.raises(RequestError, match=said):
            feedfast.fit(tree, {"cache.path": path, "train.out": tmp_path / source})
    learned = feedfast.fit(
        world.tables(teachers=named),
        {"cache.path": path, "train.out": tmp_path / "run", "train.max_steps": 1},
        teachers={"a": network},
    )
    assert learned.steps == 1


@pytest.mark.parametrize("name", ["python/evil.Network", "python/evil:Network", "python/evil"])
def test_the_word_for_a_network_is_never_imported(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    (tmp_path / "python").mkdir()
    (tmp_path / "python" / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match="was passed as a Python object, which its name cannot bring back"):
        build_model(name, num_classes=10)


@pytest.mark.parametrize("source", ["cache", "live", pytest.param("record", marks=pytest.mark.slow)])
def test_a_live_student_learns_what_the_command_line_teaches(world: World, tmp_path: Path, source: str) -> None:
    """Bit for bit; and it is the caller's own object that has learned."""
    words = [f"train.source={source}", "train.max_steps=3", f"cache.path={tmp_path / 'c.zarr'}"]
    if source == "cache":
        words[-1] = f"cache.path={world.recipe.cache.path}"
    trained = command("train", as_toml(world.recipe, tmp_path / "r.toml"), *words, f"train.out={tmp_path / 'cli'}")
    assert trained.code == 0, trained.err
    student, teacher = world.student().eval(), world.teacher()
    student.register_forward_hook(lambda *_: None)
    before, theirs = state_of(student), state_of(teacher)
    words[-1] = words[-1].replace("c.zarr", "d.zarr")
    found = feedfast.fit(
        world.recipe, [*words, f"train.out={tmp_path / 'py'}"], student={"model": student}, teachers={"a": teacher}
    )
    assert unchanged(teacher, theirs)
    after = state_of(student)
    for key in ("modes", "inplace", "hooks"):
        assert after[key] == before[key], key
    assert [kept[:2] for kept in after["parameters"]] == [kept[:2] for kept in before["parameters"]]
    weights = [torch.load(tmp_path / name / "student.pt", weights_only=True) for name in ("cli", "py")]
    assert same_values(*weights)
    assert same_values(weights[0], student.state_dict())
    assert not same_values(weights[0], before["values"])
    assert (found.steps, found.final_loss) == (3, trained.document["final_loss"])


@pytest.mark.usefixtures("heard")
def test_ctrl_c_and_a_fresh_network(world: World, tmp_path: Path) -> None:
    """The step under way is finished; the same call with another object of that architecture goes on."""
    whole = world.student()
    options: dict[str, Any] = {"method": "none", "train": {"source": "none"}}
    feedfast.fit(world.recipe, {"train.out": tmp_path / "whole"}, student=whole, **options)

    class Interrupted:
        """Ctrl-C in the middle of the second step."""

        steps = 0

        def __call__(self, module: nn.Module, *_: Any) -> None:
            self.steps += module.training
            if self.steps == 2 and module.training:
                os.kill(os.getpid(), signal.SIGINT)

    first = world.student().train()
    first.register_forward_hook(Interrupted())
    with pytest.raises(KeyboardInterrupt):
        feedfast.fit(world.recipe, {"train.out": tmp_path / "run"}, student=first, **options)
    assert not same_values(first.state_dict(), world.student().state_dict())
    assert first.training
    second = build_model("zoo/wrn-10-1", num_classes=10, seed=77)  # its own start counts for nothing
    found = feedfast.fit(world.recipe, {"train.out": tmp_path / "run"}, student=second, **options)
    assert same_values(second.state_dict(), whole.state_dict())
    assert found.steps == 6
    other = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))
    with pytest.raises(RequestError, match="expected the network passed to be zoo/wrn-10-1"):
        feedfast.fit(world.recipe, {"train.out": tmp_path / "run"}, student=other, **options)


class Small(nn.Sequential):
    """A student of nobody's library."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(
            nn.Conv2d(3, width, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)
        )


def test_a_student_of_ones_own(world: World, tmp_path: Path) -> None:
    """Its run names the class; planned, trained, resumed, exported; another architecture is refused."""
    recipe, options = world.tables(), {"train.out": tmp_path / "run", "train.max_steps": 1, "method.name": "kd"}
    del recipe["method"]
    student = Small()
    assert feedfast.plan(recipe, {"method.name": "kd"}, teachers={"a": world.teacher()}, student=student).step_ms
    found = feedfast.fit(recipe, options, teachers={"a": {"model": world.teacher(), "taps": TAPS}}, student=student)
    assert found.model == word_of(student) == f"python/{Small.__module__}.Small"
    saved = torch.load(tmp_path / "run" / "student.pt", weights_only=True)
    assert same_values(saved, student.state_dict())
    assert feedfast.export(tmp_path / "run", formats="state_dict", student=Small()).model == found.model
    with pytest.raises(RequestError, match="was passed as a Python object"):
        feedfast.export(tmp_path / "run", formats="state_dict")
    with pytest.raises(feedfast.FeedfastError, match=r"checkpoint|weights|student"):
        feedfast.fit(
            recipe,
            {**options, "train.max_steps": 2},
            teachers={"a": {"model": world.teacher(), "taps": TAPS}},
            student=Small(12),
        )


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "branches": ({"student.branches": 2}, "student.branches: expected 1 of a network that is passed"),
    "weights": ({"student.weights": "a.pt"}, "student.weights: expected none with a network that is passed"),
    "backbone": ({"student.backbone": ""}, "student.backbone: expected none with a network that is passed"),
    "classes": ({}, r"student.model: expected the network passed to be zoo/wrn-10-1.*\[10, 64\], found \[7, 64\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_students_that_are_refused(world: World, tmp_path: Path, case: str) -> None:
    overrides, said = REFUSED[case]
    student = build_model("zoo/wrn-10-1", num_classes=7 if case == "classes" else 10)
    before = state_of(student)
    with pytest.raises(RequestError, match=said):
        feedfast.fit(world.recipe, {**overrides, "train.out": tmp_path / "run"}, student=student)
    assert unchanged(student, before)


def test_networks_that_cannot_be_copied(world: World, tmp_path: Path) -> None:
    locked, lazy = world.teacher(), nn.Sequential(nn.LazyConv2d(4, 3))
    locked.handle = threading.Lock()  # type: ignore[assignment]
    for network, said in ((locked, "copy.deepcopy can copy"), (lazy, "expected a network whose weights have values")):
        with pytest.raises(RequestError, match=rf"teachers\[a\]: .*{said}"):
            feedfast.cache(world.tables(), teachers={"a": {"model": network}}, cache=tmp_path / "c.zarr")


def test_a_live_network_says_how_its_input_is_normalized(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """timm's by their pretrained_cfg; others by nothing, whatever their name says, then the data's count."""
    network = nn.Linear(1, 1)
    network.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "input_size": (3, 64, 64)}  # type: ignore[assignment]
    tree = {"data": {"train": "x", "size": 32}, "teachers": [{"name": "a", "model": "python/x.Y"}]}
    (spec,) = feedfast.load_recipe(as_toml(world.recipe, world.folder / "own.toml")).teachers
    data = world.recipe.data
    word = spec.model_copy(update={"model": tree["teachers"][0]["model"]})
    found = teacher_input(word, data, network, given=True)
    assert (found.mean, found.std, found.size) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 64)
    said = teacher_input(word.model_copy(update={"mean": (0, 0, 0), "size": 16}), data, network, given=True)
    assert (said.mean, said.std, said.size) == ((0, 0, 0), (0.4, 0.5, 0.6), 16)
    published = spec.model_copy(update={"model": "torchvision/resnet18", "weights": ""})
    assert teacher_input(published, data, nn.Linear(1, 1)).size == 224
    with caplog.at_level("INFO", logger="feedfast"):
        plain = teacher_input(published, data, nn.Linear(1, 1), given=True)
    assert ((plain.mean, plain.std), plain.size) == (data.normalization, data.size)
    assert "normalized by the data's mean" in caplog.text


class Rows:
    """The images of an .npz, as Hugging Face's data sets give them."""

    def __init__(self, path: str, image: str = "image", label: str = "label") -> None:
        with np.load(path) as held:
            self.images, self.labels = held["images"], held["labels"]
        self.names = image, label

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = self.names
        return {"id": str(index), image: self.images[index], label: int(self.labels[index])}

    def __iter__(self) -> Iterator[Any]:
        raise NotImplementedError  # nobody should need it


@pytest.mark.parametrize("names", [("image", "label"), ("img", "fine_label")])
def test_a_data_set_of_mappings(world: World, tmp_path: Path, names: tuple[str, str]) -> None:
    """The cache of the file with the same pixels, byte for byte; verified and trained with the object."""
    train, val = (Rows(source, *names) for (source,) in (world.recipe.data.train, world.recipe.data.val))
    data: dict[str, Any] = {"train": train, "val": val}
    if names[0] != "image":
        with pytest.raises(
            RequestError, match=r"Rows\[0\]: expected a key 'image', found \['id', 'img', 'fine_label'\]"
        ):
            feedfast.cache(world.recipe, data=data, cache=tmp_path / "c.zarr")
        data["arrays"] = list(names)
    made = feedfast.cache(world.recipe, data=data, cache=tmp_path / "c.zarr")
    assert made.digest == world.digest
    if names[0] == "image":
        assert feedfast.verify(tmp_path / "c.zarr", replay=1, data=train).ok
        assert "Python object" in command("verify", tmp_path / "c.zarr", "--replay", 1).error
        run = {"cache.path": tmp_path / "c.zarr", "train.out": tmp_path / "run", "train.max_steps": 1}
        assert feedfast.fit(world.recipe, run, data=data).val_accuracy is not None
        assert feedfast.export(tmp_path / "run", formats="state_dict", data=data).images == 32


def test_class_names_of_a_feature(tmp_path: Path) -> None:
    class Feature:
        names = ("cat", "dog", "emu")

    from feedfast.data.dataset import open_dataset

    class Named(Rows):
        features = {"label": Feature(), "image": None}  # noqa: RUF012

    np.savez(tmp_path / "x.npz", images=np.zeros((4, 4, 4), np.uint8), labels=np.array([0, 1, 1, 0]))
    assert open_dataset(Named(str(tmp_path / "x.npz"))).classes == ("cat", "dog", "emu")
    with pytest.raises(RequestError, match=r"Named\[0\]: expected a key 'kind', found"):
        open_dataset(Named(str(tmp_path / "x.npz")), arrays=["image", "kind"])
    with pytest.raises(RequestError, match=r"list\[0\]: expected a mapping with the key 'image' of data.arrays"):
        open_dataset([(np.zeros((4, 4), np.uint8), 0)], arrays=["image"])  # type: ignore[arg-type]
