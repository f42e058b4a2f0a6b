"""Every command from the outside: one JSON document on stdout, progress on stderr, the exit code.

For every mistake a careless or hostile user can make there is one sentence that names it; `commands.feedfast` fails on
anything like a traceback.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Outcome, feedfast, in_a_process
from small import as_toml, digits_recipe

from feedfast.models.build import build_model


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe file with its cache made and its student trained; the outcomes lie next to it as JSON."""
    folder = tmp_path_factory.mktemp("cli")
    file = as_toml(digits_recipe(folder, ("method.name=kd",), teachers=1), folder / "recipe.toml")
    for command in ("plan", "cache", "train"):
        outcome = feedfast(command, file)
        (folder / f"{command}.json").write_text(json.dumps([outcome.code, outcome.out, outcome.err]))
    return file


def done(recipe: Path, command: str) -> Outcome:
    return Outcome(*json.loads((recipe.parent / f"{command}.json").read_text()))


def cache_of(recipe: Path) -> Path:
    return recipe.parent / "digits.zarr"


# ---- what each command says when all is well


DOCUMENTED = {
    "plan": {"bytes", "bytes_per_sample", "targets", "free_bytes", "fits", "seconds", "break_even_epochs"},
    "cache": {"rows_written", "rows_resumed", "bytes", "bytes_per_sample", "images_per_second", "digest", "taps"},
    "train": {"val_accuracy", "final_loss", "steps", "images_per_second", "data_wait_fraction", "out"},
}


@pytest.mark.parametrize("command", DOCUMENTED)
def test_a_job_ends_with_one_json_document(recipe: Path, command: str) -> None:
    outcome = done(recipe, command)
    assert outcome.code == 0
    assert len(outcome.out.splitlines()) == 1
    assert DOCUMENTED[command] <= outcome.document.keys()
    assert outcome.err.strip(), "progress goes to stderr"


def test_what_the_documents_say(recipe: Path) -> None:
    cached, trained = done(recipe, "cache").document, done(recipe, "train").document
    assert (cached["rows_written"], cached["rows_resumed"]) == (400, 0)
    assert len(cached["digest"]) == 64
    assert cached["taps"].keys() == {"a/final", "a/ofd1", "a/ofd2", "a/ofd3"}
    for tap in cached["taps"].values():
        assert 0 < tap["relative_rms_error"] < 0.02
        assert tap["relative_rms_error"] <= tap["worst_channel_rms_error"] <= 1
        assert 0 <= tap["saturated_fraction"] < 0.01
    assert trained["steps"] == 12
    assert 0 <= trained["val_accuracy"] <= 1
    assert 0 <= trained["data_wait_fraction"] <= 1
    assert (Path(trained["out"]) / "student.pt").is_file()


def test_verify_and_inspect(recipe: Path) -> None:
    verified = feedfast("verify", cache_of(recipe), "--full", "--replay", "2")
    assert verified.code == 0
    assert verified.document["ok"] is True
    assert verified.document["problems"] == []
    assert verified.document["replayed"] == 2
    recomputed = feedfast("verify", cache_of(recipe), "--teachers", "20", "--recipe", recipe)
    assert recomputed.code == 0
    assert min(recomputed.document["cosine"].values()) > 0.999
    assert "(worst channel " in done(recipe, "cache").err
    inspected = feedfast("inspect", cache_of(recipe))
    assert inspected.code == 0
    assert inspected.document["digest"] == done(recipe, "cache").document["digest"]
    assert inspected.document["complete"] is True
    assert "a/ofd1" in inspected.err, "the table names its rows in full"


@pytest.mark.parametrize(
    "command", [("verify", "--teachers", "1"), ("methods",), ("methods", "kd")], ids=["verify", "methods", "method"]
)
def test_a_recipe_by_option_takes_overrides(recipe: Path, tmp_path: Path, command: tuple[str, ...]) -> None:
    """The data have moved: said on the command line, as to every command that reads a recipe."""
    name, *rest = command
    place = [cache_of(recipe)] if name == "verify" else []
    moved = tmp_path / "moved.npz"
    shutil.copy(recipe.parent / "digits-train.npz", moved)
    file = tmp_path / "r.toml"
    file.write_text(recipe.read_text().replace(str(recipe.parent / "digits-train.npz"), "gone.npz"))
    said = feedfast(name, *place, *rest, f"data.train={moved}", "--recipe", file)
    assert said.code == 0, said.err
    assert name != "verify" or min(said.document["cosine"].values()) > 0.999
    wrong = feedfast(name, *place, *rest, "data.sise=3", "--recipe", file)
    assert wrong.code == 2
    assert "did you mean 'size'" in wrong.error
    alone = feedfast(name, *place, *rest, "data.size=3")
    assert alone.code == 2
    assert "data.size=3: expected --recipe" in alone.error


@pytest.mark.parametrize(
    ("model", "size", "final"),
    [("zoo/wrn-10-1", 16, "relu"), ("zoo/resnet-20", 32, None), ("torchvision/resnet18", 64, "layer4")],
)
def test_taps(model: str, size: int, final: str | None) -> None:
    outcome = feedfast("taps", model, "--size", size)
    assert outcome.code == 0
    places = outcome.document["taps"]
    suggested = {name: place["path"] for place in places for name in place["suggestions"]}
    assert {name.split(":")[0] for name in suggested} >= {"final", "ofd1", "ofd2", "ofd3"}
    assert final is None or suggested["final:post"] == final
    for place in places:
        assert place["values"] == np.prod(place["shape"])
        assert place["path"] in outcome.err


def test_taps_of_a_transformer() -> None:
    """At the network's own size; layouts, and what to write for each method."""
    outcome = feedfast("taps", "networks:vit")
    assert outcome.code == 0, outcome.err
    assert outcome.document["size"] == 32
    places = {place["path"]: place for place in outcome.document["taps"]}
    assert places["norm"]["layout"] == "tokens (1 + 4x4)"
    assert places["patch_embed.proj"]["layout"] == "map"
    assert places["head"]["layout"] == "vector"
    assert outcome.document["methods"]["pfeed"] == ["final=norm:post"]
    assert outcome.document["methods"]["ofd"] == ["ofd1=blocks.0:post", "ofd2=blocks.1:post"]
    assert "kd" not in outcome.document["methods"]
    assert "final=norm:post" in outcome.err.replace("\n", "")


def test_the_same_command_again_continues(recipe: Path) -> None:
    cached = feedfast("cache", recipe).document
    assert (cached["rows_written"], cached["rows_resumed"]) == (0, 400)
    assert cached["digest"] == done(recipe, "cache").document["digest"]
    trained = feedfast("train", recipe)
    assert trained.document["val_accuracy"] == done(recipe, "train").document["val_accuracy"]
    assert "resumed at step 12" in trained.err


def test_help_names_every_command() -> None:
    outcome = feedfast("--help")
    assert outcome.code == 0
    assert all(
        name in outcome.out for name in ("demo", "plan", "cache", "train", "verify", "inspect", "taps", "recipes")
    )


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["cache"], ["verify", "x", "--replay", "-1"], ["taps", "m", "--size", "1"]]
)
def test_a_wrong_command_line(arguments: list[str]) -> None:
    outcome = feedfast(*arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert "Error: " in outcome.err


# ---- mistakes in a recipe: exit code 2, one sentence with these words, nothing on stdout


MISTAKES: dict[str, tuple[str, list[str], list[str]]] = {
    "unknown key": ("plan", ["data.sise=3"], ["data.sise", "did you mean 'size'"]),
    "bad value": ("train", ["train.lr=fast"], ["train.lr", "number", "'fast'"]),
    "no override": ("cache", ["seed"], ["'seed'", "key=value"]),
    "std of zero": ("train", ["data.std=[0.2, 0, 0.2]"], ["data.std", "greater than 0"]),
    "no such data": ("cache", ["data.train=nowhere.bin"], ["nowhere.bin", "not found"]),
    "no such validation": ("train", ["data.val=nowhere.npz", "overwrite=true"], ["nowhere.npz", "not found"]),
    "text as data": ("plan", ["data.train={recipe}"], ["recipe.toml", "CIFAR", "found"]),
    "unknown model": ("cache", ["teachers.0.model=zoo/wrn-16-22"], ["teachers[a]", "zoo/wrn-16-22"]),
    "nearly a model": ("train", ["student.model=torchvision/resnet1"], ["resnet1", "did you mean", "/resnet18"]),
    "model without its family": ("train", ["student.model=resnet18"], ["resnet18", "torchvision/resnet18"]),
    "no such module": ("train", ["student.model=nowhere.at:all"], ["nowhere", "cannot import"]),
    "not a factory": ("train", ["student.model=os:getcwd"], ["os:getcwd"]),
    "not a network": ("train", ["student.model=builtins:dict"], ["builtins:dict", "nn.Module", "dict"]),
    "too small an image": ("train", ["student.model=torchvision/vgg11", "method.name=none", "train.source=none"],
                           ["VGG", "cannot run", "16, 16"]),
    "too small for plan": ("plan", ["student.model=torchvision/vgg11"], ["VGG", "cannot run", "16, 16"]),
    "other network's weights": ("cache", ["teachers.0.model=zoo/wrn-16-1"], ["a.pt", "zoo/wrn-16-1", "missing"]),
    "text as weights": ("cache", ["teachers.0.weights={recipe}"], ["recipe.toml", "state_dict", "weights_only=True"]),
    "folder as weights": ("cache", ["teachers.0.weights={folder}"], ["state_dict", "a folder"]),
    "no weights": ("cache", ["teachers.0.weights=nowhere.pt"], ["nowhere.pt", "nothing"]),
    "zoo without weights": ("cache", ["teachers.0.weights="], ["zoo", "published weights"]),
    "no such tap": ("cache", ['teachers.0.taps=["x=block9"]'], ["block9"]),
    "no such tap group": ("cache", ['teachers.0.taps=["finale"]'], ["finale", "'final'"]),
    "unknown method": ("train", ["method.name=pfed"], ["method.name", "'pfed'", "pfeed"]),
    "a tap not in the cache": ("train", ["method.name=at"], ["method 'at'", "'stage*' taps", "feedfast cache"]),
    "branches without branches": ("train", ["method.name=ekd"], ["student.branches", "branches = 2"]),
    "a chain of one": ("chain", ["chain.generations=1"], ["chain.generations", "2 or more"]),
    "unknown parameter": ("train", ["method.temperature=3"], ["method.temperature", "tau"]),
    "ill-typed parameter": ("train", ["method.tau=hot"], ["method.tau", "a number", "'hot'"]),
    "no targets for kd": ("train", ["train.source=none"], ["train.source", "'kd'"]),
    "too large a batch": ("train", ["train.batch=999"], ["train.batch", "200", "999"]),
    "no cache": ("train", ["cache.path={folder}/none.zarr"], ["none.zarr", "expected a feedfast cache"]),
    "too many views": ("train", ["cache.views=9"], ["cache.views", "9"]),
    "a file as cache": ("cache", ["cache.path={recipe}"], ["recipe.toml", "found a file"]),
    "a cache inside a file": ("cache", ["cache.path={recipe}/c.zarr"], ["recipe.toml", "found a file"]),
    "a file as cache of plan": ("plan", ["cache.path={recipe}/c.zarr"], ["recipe.toml", "found a file"]),
    "somebody's folder as cache": ("cache", ["cache.path={folder}"], ["expected a feedfast cache", "a.pt"]),
    "a file as output": ("train", ["train.out={recipe}"], ["train.out", "recipe.toml"]),
    "output inside a file": ("train", ["train.out={recipe}/out"], ["train.out", "recipe.toml"]),
    "output that cannot be": ("train", ["train.out=/proc/nowhere"], ["train.out", "/proc/nowhere"]),
    "cache that cannot be": ("cache", ["cache.path=/proc/nowhere.zarr"], ["cache.path", "/proc/nowhere.zarr"]),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(recipe: Path, tmp_path: Path, mistake: str) -> None:
    command, overrides, words = MISTAKES[mistake]
    folder = recipe.parent
    filled = [text.format(recipe=recipe, folder=folder) for text in overrides]
    out = [] if any("train.out" in text for text in filled) else [f"train.out={tmp_path / 'out'}"]
    cache = [f"cache.path={tmp_path / 'c.zarr'}"] if command == "cache" and "cache.path" not in " ".join(filled) else []
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    outcome = feedfast(command, recipe, *out, *cache, *filled)
    assert outcome.code == 2, outcome.err
    for word in words:
        assert word in outcome.error
    assert len(outcome.error.splitlines()) == 1
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before
    assert not [file for file in tmp_path.rglob("*") if file.is_file()], "a refused request leaves no files"


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none")
@pytest.mark.parametrize("command", ["plan", "cache", "train"])
def test_cuda_without_a_gpu(recipe: Path, tmp_path: Path, command: str) -> None:
    for device in ("cuda", "cuda:3"):
        outcome = feedfast(command, recipe, f"train.device={device}", f"train.out={tmp_path}")
        assert outcome.code == 2
        assert "train.device" in outcome.error
        assert repr(device) in outcome.error


@pytest.mark.parametrize("content", [None, "seed = ", b"\xff\xfe", "folder"])
def test_no_recipe(tmp_path: Path, content: str | bytes | None) -> None:
    path = tmp_path / "r.toml"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for command in ("plan", "cache", "train"):
        outcome = feedfast(command, path)
        assert outcome.code == 2
        assert str(path) in outcome.error
    outcome = feedfast("verify", tmp_path, "--recipe", path)
    assert outcome.code == 2
    assert str(path) in outcome.error


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_no_cache(recipe: Path, tmp_path: Path, command: str) -> None:
    for path in (tmp_path, tmp_path / "nowhere", recipe, recipe.parent):
        outcome = feedfast(command, path)
        assert outcome.code == 2
        assert str(path) in outcome.error


def test_inspect_into_a_file(recipe: Path) -> None:
    outcome = feedfast("inspect", cache_of(recipe), "--out", recipe)
    assert outcome.code == 2
    assert "--out" in outcome.error
    assert "recipe.toml" in outcome.error


@pytest.mark.parametrize("model", ["zoo/wrn-10", "torchvision/resnet1", "nowhere:net", "nothing", "torchvision/vgg11"])
def test_taps_of_no_model(model: str) -> None:
    outcome = feedfast("taps", model, "--size", "8")
    assert outcome.code == 2
    assert model.split("/")[-1].split(":")[0][:3].lower() in outcome.error.lower()


def test_a_factory_that_makes_no_classifier(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code of the user's own, found in the working directory: what it returns is looked at before the first step."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\n"
        "class Pair(nn.Module):\n"
        "    def __init__(self, num_classes):\n"
        "        super().__init__()\n"
        "        self.conv = nn.Conv2d(3, num_classes, 3)\n"
        "    def forward(self, x):\n"
        "        return self.conv(x), x\n"
        "def maps(num_classes): return nn.Conv2d(3, num_classes, 3)\n"
        "def stubborn(num_classes): return nn.Sequential(nn.Conv2d(3, 7, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
        "def good(num_classes): return nn.Sequential(nn.Flatten(), nn.Linear(768, num_classes))\n"
    )
    plain = ("train", recipe, "method.name=none", "train.source=none", "train.max_steps=1", "train.out=out")
    for name, found in {"Pair": "[10, 14, 14]", "maps": "[10, 14, 14]", "stubborn": "found 7"}.items():
        outcome = feedfast(*plain, f"student.model=my_nets:{name}")
        assert outcome.code == 2
        assert f"my_nets:{name}" in outcome.error
        assert found in outcome.error
    assert feedfast(*plain, "student.model=my_nets:good").code == 0


def test_a_teacher_of_other_classes(recipe: Path, tmp_path: Path) -> None:
    """KD compares class by class; features do not care."""
    torch.save(build_model("zoo/wrn-10-1", num_classes=12, seed=0).state_dict(), tmp_path / "b.pt")
    other = (
        f"teachers.0.weights={tmp_path / 'b.pt'}",
        "teachers.0.classes=12",
        "train.source=live",
        "train.max_steps=1",
    )
    outcome = feedfast("train", recipe, *other, f"train.out={tmp_path / 'kd'}")
    assert outcome.code == 2
    assert "expected 10 in every teacher, found 12 in 'a'" in outcome.error
    assert feedfast("train", recipe, *other, "method.name=pfeed", f"train.out={tmp_path / 'pfeed'}").code == 0


# ---- what is there already


def test_a_typo_costs_nothing(recipe: Path, tmp_path: Path) -> None:
    """A refused request leaves the folder free for the corrected one, and an older result where it was."""
    out = tmp_path / "out"
    command = ("train", recipe, f"train.out={out}", "train.max_steps=1")
    assert feedfast(*command, "data.val=nowhere.npz").code == 2
    assert feedfast(*command).code == 0
    before = {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}
    for typo in ("data.val=nowhere.npz", "student.model=zoo/wrm-10-1", "method.taau=3", "cache.path=nowhere"):
        assert feedfast(*command, typo, "overwrite=true").code == 2
        assert {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()} == before
    refused = feedfast(*command, "train.lr=0.5")
    assert refused.code == 2
    assert "train.lr: there 0.02, here 0.5" in refused.error
    assert feedfast(*command, "train.lr=0.5", "overwrite=true").code == 0
    assert (out / "student.pt").read_bytes() != before["student.pt"]


def test_results_of_unknown_origin_are_left_alone(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "student.pt").write_bytes(b"the only copy")
    outcome = feedfast("train", recipe, f"train.out={out}", "train.max_steps=1")
    assert outcome.code == 2
    assert "student.pt" in outcome.error
    assert (out / "student.pt").read_bytes() == b"the only copy"


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only to root")
def test_read_only_folders(recipe: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(stat.S_IRUSR | stat.S_IXUSR)
    for command, key in (("train", "train.out"), ("cache", "cache.path")):
        for path in (locked, locked / "below"):
            outcome = feedfast(command, recipe, f"{key}={path}")
            assert outcome.code == 2
            assert key in outcome.error
            assert str(path) in outcome.error
    assert feedfast("inspect", cache_of(recipe), "--out", locked).code == 2


def test_plan_says_when_it_cannot_fit(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=200_000))
    new = (f"cache.path={tmp_path / 'new.zarr'}",)
    outcome = feedfast("plan", recipe, *new)
    assert outcome.code == 1
    assert outcome.document["fits"] is False
    assert outcome.document["free_bytes"] == 200_000
    assert feedfast("plan", recipe).code == 0, "what is there already needs no room"
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=10**12))
    assert feedfast("plan", recipe, *new).code == 0


# ---- real processes


@pytest.mark.parametrize("command", ["inspect", "verify", "cache", "train"])
def test_a_cache_of_format_1_is_refused(recipe: Path, tmp_path: Path, command: str) -> None:
    """Nobody's first cache is guessed at: one sentence, whichever command meets it, and nothing of it is touched."""
    old = tmp_path / "old.zarr"
    (old / "commits").mkdir(parents=True)
    root = old / "zarr.json"
    root.write_text('{"zarr_format": 3, "node_type": "group", "attributes": {"feedfast": {"format": 1, "views": 4}}}')
    given = (old,) if command in ("inspect", "verify") else (recipe, f"cache.path={old}", f"train.out={tmp_path / 'o'}")
    outcome = feedfast(command, *given)
    assert outcome.code == 2
    assert "expected cache format 2, found 1; run `feedfast cache` again with another cache.path" in outcome.error
    assert [path.name for path in old.rglob("*") if path.is_file() and not path.name.startswith(".")] == ["zarr.json"]


def test_what_a_network_of_ones_own_prints_is_no_document(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "talkative.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Sequential):\n"
        "    def forward(self, x):\n"
        "        print('forward')\n"
        "        return super().forward(x)\n"
        "def made(num_classes=10):\n"
        "    print('made')\n"
        "    return Net(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    outcome = feedfast("train", recipe, "student.model=talkative:made", f"train.out={tmp_path / 'out'}")
    assert outcome.code == 0, outcome.err
    assert outcome.document["model"] == "talkative:made"
    assert {"made", "forward"} <= set(outcome.err.splitlines())


@pytest.mark.slow
def test_a_process_of_its_own(recipe: Path, tmp_path: Path) -> None:
    """The module as a command: exit codes, and stdout for the document alone."""
    good = in_a_process("cache", recipe)
    assert good.code == 0, good.err
    assert len(good.out.splitlines()) == 1
    assert good.document["rows_resumed"] == 400
    bad = in_a_process("train", recipe, "student.model=zoo/wrn-10-1x", f"train.out={tmp_path / 'out'}", cwd=tmp_path)
    assert bad.code == 2
    assert "zoo/wrn-10-1x" in bad.error


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_ctrl_c_is_no_traceback(recipe: Path, tmp_path: Path, number: int, code: int) -> None:
    # A shell starts background jobs with SIGINT ignored, and children inherit that: the job is given its handler back.
    start = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from feedfast.cli import main; main()"
    )
    arguments = ["train", recipe, f"train.out={tmp_path / 'out'}", "train.epochs=100000"]
    command = [sys.executable, "-c", start, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        try:
            metrics = tmp_path / "out" / "metrics.jsonl"
            while job.poll() is None and not (metrics.exists() and metrics.stat().st_size):
                time.sleep(0.02)
            job.send_signal(number)
            out, err = job.communicate(timeout=60)
        finally:
            job.kill()
    assert job.returncode == code, err
    assert out == ""
    assert "Traceback" not in err
    assert "continues" in err
