"""What `--engine ray` refuses and how it divides a cluster, without one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from commands import feedfast
from small import as_toml, digits_recipe

from feedfast.errors import PartTakenError, RequestError
from feedfast.stages.engine_ray import Needs, Size
from feedfast.stages.offline_ray import _patiently, _placed


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("requests")
    return as_toml(digits_recipe(folder, teachers=1), folder / "recipe.toml")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--workers", "2"), "--workers: expected --engine ray, whose workers they are, found --workers 2 alone"),
        (("--engine", "dask"), "--engine: expected ray, found 'dask'"),
        (("--engine", "ray", "--workers", "2-"), "--workers: expected N or MIN-MAX with 1 <= MIN <= MAX"),
        (
            ("--engine", "ray", "cache.part=1/3"),
            "--engine ray: expected one command for the whole cache, found part 1/3",
        ),
        (("--engine", "ray", "data.train=python"), "--engine ray: expected data.train to name files"),
        (("--engine", "ray"), "expected the package ray, found none; pip install 'feedfast[ray]'"),
    ],
)
def test_one_sentence(file: Path, arguments: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # none of these gets as far as to start anything
    outcome = feedfast("cache", file, *arguments)
    assert outcome.code == 2
    assert words in outcome.error
    assert "\n" not in outcome.error


def test_ranks_are_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would start a crew of its own."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "found part 0/2 of it" in feedfast("cache", file, "--engine", "ray").error


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("ray://127.0.0.1:1", "`ray job submit -- feedfast cache ...`"),
        ("127.0.0.1:1", "RAY_ADDRESS=127.0.0.1:1: expected a Ray cluster, found: "),
        ("127.0.0.1:70000", "RAY_ADDRESS=127.0.0.1:70000: expected a Ray cluster, found: "),
    ],
)
def test_a_cluster_that_cannot_be_used_is_refused_at_once(
    file: Path, address: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert words in feedfast("cache", file, "--engine", "ray").error


@pytest.mark.parametrize(
    ("text", "size"), [("1", (1, 1)), ("12", (12, 12)), ("2-8", (2, 8)), (" 3-3 ", (3, 3)), ("10000", (10000, 10000))]
)
def test_sizes(text: str, size: tuple[int, int]) -> None:
    assert Size.of(text) == Size(*size)


@pytest.mark.parametrize("text", ["", "0", "0-2", "3-2", "-1", "1-2-3", "1.5", "two", "1 - 2", "10001", "1e3", "²"])
def test_odd_sizes_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match="--workers: expected N or MIN-MAX"):
        Size.of(text)


def node(cpus: float, gpus: float = 0, *, alive: bool = True) -> dict[str, Any]:
    return {"Alive": alive, "Resources": {"CPU": cpus, **({"GPU": gpus} if gpus else {}), "memory": 1e9}}


@pytest.mark.parametrize(
    ("nodes", "device", "asked", "size", "needs", "threads"),
    [
        ([node(2)], "auto", Size(2, 2), Size(2, 2), Needs(1, 0), 1),
        ([node(8)], "auto", None, Size(1, 1), Needs(8, 0), 8),
        ([node(8), node(8), node(0)], "cpu", None, Size(2, 2), Needs(8, 0), 8),
        ([node(8), node(8)], "auto", Size(1, 3), Size(1, 3), Needs(5, 0), 5),
        ([node(8), node(4)], "auto", Size(1, 1), Size(1, 1), Needs(8, 0), 8),  # more than one node has is never placed
        ([node(2)], "auto", Size(5, 5), Size(5, 5), Needs(1, 0), 1),
        ([node(32, 8), node(16, 2), node(64)], "auto", None, Size(10, 10), Needs(4, 1), 4),
        ([node(32, 8)], "cuda", Size(2, 4), Size(2, 4), Needs(4, 1), 4),
        ([node(4, 8)], "auto", None, Size(8, 8), Needs(0, 1), 1),
        ([node(32, 8)], "cpu", None, Size(1, 1), Needs(32, 0), 32),
        ([node(16)], "cuda", Size(1, 4), Size(1, 4), Needs(1, 1), 1),  # an autoscaler may bring them
        ([node(32, 8, alive=False), node(4)], "auto", None, Size(1, 1), Needs(4, 0), 4),
    ],
)
def test_what_each_worker_occupies(
    nodes: list[dict[str, Any]], device: str, asked: Size | None, size: Size, needs: Needs, threads: int
) -> None:
    assert _placed(nodes, device, asked) == (size, needs, threads)


def test_gpus_that_are_not_there_are_waited_for_only_where_it_is_said_how_many() -> None:
    with pytest.raises(RequestError, match=r"train.device: expected GPUs in the Ray cluster for 'cuda', found none"):
        _placed([node(8)], "cuda", None)


def test_a_part_that_is_taken_is_waited_for() -> None:
    calls = []

    def taken(times: int) -> int:
        calls.append(1)
        if len(calls) <= times:
            raise PartTakenError("taken")
        return len(calls)

    assert _patiently(lambda: taken(2), 60) == 3
    with pytest.raises(PartTakenError):
        _patiently(lambda: taken(1000), 0)
