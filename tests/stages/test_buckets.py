"""A recipe whose cache lies in a bucket: every command works as with a folder, and nobody's key is ever repeated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from buckets import DENIED, KEY_ID, SECRET, SLOW_DOWN, Cloud, Fault
from commands import feedfast, in_a_process
from small import as_toml, digits_recipe

from feedfast.errors import RequestError
from feedfast.stages.open_cache import open_cache
from feedfast.storage.bucket import Bucket
from feedfast.storage.objects import Patience
from feedfast_kernels import as_float

pytest.importorskip("obstore")
pytest.importorskip("moto")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits, a teacher, a recipe, and its cache in a folder."""
    folder = tmp_path_factory.mktemp("world")
    recipe = digits_recipe(folder, teachers=1, cache={"views": 1}, train={"epochs": 1, "max_steps": 3, "replay": 1})
    as_toml(recipe, folder / "recipe.toml")
    outcome = feedfast("cache", folder / "recipe.toml")
    assert outcome.code == 0, outcome.err
    (folder / "digest").write_text(outcome.document["digest"])
    return folder


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    brisk = Patience(tries=4, first_s=0.01, longest_s=0.05, connect_s=2.0, answer_s=2.0)
    monkeypatch.setattr("feedfast.storage.objects.PATIENCE", brisk)


@pytest.mark.slow
def test_every_command_as_with_a_folder(world: Path, cloud: Cloud, tmp_path: Path) -> None:
    recipe, digest, place = world / "recipe.toml", (world / "digest").read_text(), cloud.url()
    said: list[str] = []

    def run(*arguments: object) -> dict[str, object]:
        outcome = feedfast("-v", *arguments)
        assert outcome.code == 0, (arguments, outcome.err)
        said.extend((outcome.out, outcome.err))
        return outcome.document

    plan = run("plan", recipe, f"cache.path={place}")
    assert (plan["fits"], plan["free_bytes"], plan["bytes_present"]) == (True, None, 0)
    launch = feedfast("cache", recipe, f"cache.path={place}", "--print", "slurm")
    assert (launch.code, f"cache.path={place}" in launch.out, f"# {place}: " in launch.out) == (0, True, True), (
        launch.err
    )
    made = run("cache", recipe, f"cache.path={place}")
    assert (made["digest"], made["complete"], made["path"]) == (digest, True, place)
    again = run("cache", recipe, f"cache.path={place}")
    assert (again["digest"], again["rows_written"]) == (digest, 0)
    assert run("verify", place, "--full")["ok"] is True
    assert run("verify", place, "--replay", "1", "--recipe", recipe)["replayed"] == 1
    inspected = run("inspect", place, "--out", tmp_path / "page")
    assert (inspected["digest"], inspected["complete"]) == (digest, True)
    here = run("train", recipe, f"train.out={tmp_path / 'here'}")
    near = f"cache.local={tmp_path / 'near'}"
    there = run("train", recipe, f"train.out={tmp_path / 'there'}", f"cache.path={place}", near, "train.residency=disk")
    assert here["steps"] == there["steps"] == 3
    weights = [torch.load(tmp_path / name / "student.pt", weights_only=True) for name in ("here", "there")]
    assert_same(*weights)
    assert [path for path in (tmp_path / "near").iterdir() if not path.name.startswith(".")]
    other = cloud.url()
    recording = (
        "train.source=record",
        f"cache.path={other}",
        f"train.out={tmp_path / 'recorded'}",
        "train.max_steps=0",
    )
    run("train", recipe, *recording)
    assert run("verify", other, "--full")["ok"] is True
    assert run("inspect", other)["digest"] == digest
    copied = run("copy", place, tmp_path / "copy.zarr")
    assert copied["digest"] == digest
    assert run("verify", tmp_path / "copy.zarr", "--full")["ok"] is True

    # nobody's key, in anything that was said or written
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    store = Bucket(place)
    written += [store.read(key) for key in store._objects.below("")]
    for secret in (SECRET, KEY_ID):
        assert not [text for text in said if secret in text]
        assert not [data for data in written if secret.encode() in data]


def assert_same(one: object, two: object) -> None:
    if isinstance(one, torch.Tensor):
        assert isinstance(two, torch.Tensor)
        assert torch.equal(one, two)
    elif isinstance(one, dict):
        assert isinstance(two, dict)
        assert one.keys() == two.keys()
        for key in one:
            assert_same(one[key], two[key])


def test_open_cache_from_a_bucket(world: Path, cloud: Cloud, tmp_path: Path) -> None:
    place = cloud.url()
    assert feedfast("copy", world / "digits.zarr", place).code == 0
    with pytest.raises(RequestError, match=r"was copied or made elsewhere.*open_cache\(path, data"):
        open_cache(place)
    data = str(world / "digits-train.npz")
    local = open_cache(world / "digits.zarr")
    far = open_cache(place, data=data, local=tmp_path / "near", local_gb=0.1)
    assert f"OpenedCache('{place}'" in repr(far)
    for mine, theirs in zip(far.stream(0, 32), local.stream(0, 32), strict=True):
        assert torch.equal(mine.images, theirs.images)
        assert torch.equal(as_float(mine.targets["a"]["final"]), as_float(theirs.targets["a"]["final"]))


FAILURES = {
    "denied": (Fault(403, DENIED), 2, "HTTP 403 AccessDenied"),
    "later, and later": (Fault(503, SLOW_DOWN), 1, "HTTP 503 SlowDown, after 4 tries"),
}


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("name", FAILURES)
def test_a_store_that_fails_is_one_sentence(world: Path, cloud: Cloud, name: str) -> None:
    fault, code, words = FAILURES[name]
    place = cloud.url()
    cloud.proxy.rule = lambda method, path, headers: fault
    for command in (("verify", place), ("inspect", place), ("cache", world / "recipe.toml", f"cache.path={place}")):
        outcome = feedfast("-vv", *command)
        assert outcome.code == code, outcome.err
        assert words in outcome.error
        assert "\n" not in outcome.error
        assert SECRET not in outcome.err


@pytest.mark.usefixtures("cloud")
def test_what_is_no_bucket_is_one_sentence(world: Path) -> None:
    for place, words in (
        ("s3://nobody-has-this-one/c.zarr", "expected a bucket (container) named 'nobody-has-this-one', found none"),
        ("s3://feedfast-tests/nothing-here", "expected a feedfast cache, found no zarr.json in it"),
        ("ftp://feedfast-tests/c", "expected a folder, or s3://BUCKET/PREFIX"),
    ):
        outcome = feedfast("verify", place)
        assert (outcome.code, words in outcome.error) == (2, True), outcome.err
    outcome = feedfast("cache", world / "recipe.toml", "cache.path=s3://nobody-has-this-one/c.zarr")
    assert (outcome.code, "found none" in outcome.error) == (2, True), outcome.err


@pytest.mark.slow
def test_without_the_package_it_says_which(world: Path) -> None:
    code = (
        "import sys; sys.modules['obstore'] = None; from feedfast.cli import main; sys.argv[1:] = sys.argv[2:]; main()"
    )
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-c", code, "-", "verify", "s3://bucket/c.zarr"],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "pip install 'feedfast[cloud]'" in done.stderr


@pytest.mark.slow
def test_in_a_process_of_its_own(world: Path, cloud: Cloud) -> None:
    """As a user has it: settings from the environment, exit code 0, one document."""
    outcome = in_a_process("copy", world / "digits.zarr", cloud.url())
    assert outcome.code == 0, outcome.err
    assert outcome.document["digest"] == (world / "digest").read_text()
    assert json.loads(outcome.out.splitlines()[-1])["objects_copied"] > 0
