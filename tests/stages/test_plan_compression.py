"""Which codes are worth compressing: by the decoder, the disk, the student's step and the room there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import feedfast
from small import KNOWN, as_toml, digits_recipe, write_teacher

from feedfast.stages.plan_compression import Reading, TapCost, cached_ms, cheapest_kinds

# of a batch; both shrink enough for zstd
LARGE = TapCost(raw_bytes=20e6, zstd_bytes=16e6, raw_ms=1.0, zstd_ms=17.0, fixed="zstd")
SMALL = TapCost(raw_bytes=3e6, zstd_bytes=1.5e6, raw_ms=0.1, zstd_ms=3.0, fixed="zstd")
TAPS = {"large": LARGE, "small": SMALL}


def reading(step_ms: float = 150.0, *, shared: bool = True, disk: float | None = 1e9) -> Reading:
    return Reading(step_ms=step_ms, threads=2, cores=2, shared=shared, bytes_per_second=disk)


@pytest.mark.parametrize(
    ("where", "batches", "room", "kinds"),
    [
        # 150 + 20 / 2 against 150 + 1.1 / 2: 6 % slower; what saves most per byte goes first, and is enough
        (reading(), 10, 1e9, ("none", "zstd")),
        (reading(), 10, 30e6, ("zstd", "none")),  # 40 MB more do not fit
        (reading(), 10, 0.0, ("zstd", "zstd")),
        (reading(1500.0), 10, 1e9, ("zstd", "zstd")),  # decoding is lost in a long step
        (reading(30.0), 10, 1e9, ("none", "none")),
        (reading(shared=False), 10, 1e9, ("zstd", "zstd")),  # a GPU trains, the cores are free
        (reading(5.0, shared=False, disk=1e12), 10, 1e9, ("none", "zstd")),  # but it is waiting for the decoder
        (reading(150.0, disk=5e7), 10, 1e9, ("zstd", "zstd")),  # raw codes would wait for the disk
        (reading(disk=None), 10, 1e9, ("none", "zstd")),
    ],
)
def test_what_slows_a_step_down_is_stored_raw_where_it_fits(
    where: Reading, batches: float, room: float, kinds: tuple[str, str]
) -> None:
    found = cheapest_kinds(TAPS, where, batches, room)
    assert tuple(found.values()) == kinds
    assert cached_ms(TAPS, found, where) <= cached_ms(TAPS, dict.fromkeys(TAPS, "zstd"), where)


def test_what_does_not_shrink_stays_raw() -> None:
    plain = TapCost(raw_bytes=20e6, zstd_bytes=19e6, raw_ms=1.0, zstd_ms=17.0, fixed="none")
    assert cheapest_kinds({"a": plain}, reading(), 1, 1e9) == {"a": "none"}


@pytest.mark.slow
def test_a_cache_is_stored_as_it_was_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By `cache` of the same recipe with "auto"; what is asked for, and another recipe, are not touched by a plan."""
    write_teacher(tmp_path / "a.pt", epochs=1)
    file = as_toml(digits_recipe(tmp_path, KNOWN), tmp_path / "recipe.toml")

    def made(name: str, *words: str, plan: bool = True) -> dict[str, Any]:
        words = (f"cache.path={tmp_path / name}", *words)
        planned = feedfast("plan", "--no-check", file, *words).document["compression"] if plan else None
        outcome = feedfast("cache", "--no-check", file, *words)
        assert outcome.code == 0, outcome.err
        kinds = {key: tap["compression"] for key, tap in outcome.document["taps"].items()}
        assert planned in (None, kinds)
        return kinds

    monkeypatch.setattr("feedfast.stages.plan.cheapest_kinds", lambda taps, *_: dict.fromkeys(taps, "zstd"))
    assert set(made("z").values()) == {"zstd"}
    assert set(made("asked", "cache.compression=raw").values()) == {"none"}
    monkeypatch.setattr("feedfast.stages.plan.cheapest_kinds", lambda taps, *_: dict.fromkeys(taps, "none"))
    assert set(made("r").values()) == {"none"}
    (tmp_path / "other.plan.json").write_bytes((tmp_path / "r.plan.json").read_bytes())
    assert made("other", "cache.pilot=64", plan=False) == made("unplanned", "cache.pilot=64", plan=False)
