"""The manifest, the layout it implies, and the commit log."""

from __future__ import annotations

import json
import math
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_samples import make_manifest, make_tap, make_teacher, standard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from feedfast.errors import CacheDamageError, CacheMismatchError
from feedfast.storage.layout import array_specs, block_rows_for, shard_rows_for, unit_rows
from feedfast.storage.log import Commit, cache_digest, check_commit, collect, log_name, object_key, parse_log, read_log
from feedfast.storage.reader import CacheReader
from feedfast.storage.schema import Manifest, describe_differences, differences, merge

FINAL = "targets/a/final/codes"


def changed(manifest: Manifest, **values: Any) -> Manifest:
    """A copy with dotted keys replaced, through JSON as a stranger would do it."""
    content = json.loads(json.dumps(manifest.to_attrs()))
    for key, value in values.items():
        place = content["feedfast"]
        *path, last = key.split("__")
        for part in path:
            place = place[part]
        place[last] = value
    return Manifest.from_attrs(content)


def test_files_that_were_passed_over_are_no_difference() -> None:
    manifest = make_manifest()
    dataset = manifest.dataset.model_copy(update={"skipped": {".gif": 1}, "source": "elsewhere"})
    assert differences(manifest, manifest.model_copy(update={"dataset": dataset})) == []


def test_attributes_round_trip() -> None:
    tap = make_tap(
        "m", (3, 2, 2), transform="margin", margin=(-0.5, float(np.float32(-1 / 3)), 0.0), error={"cosine": 0.9}
    )
    manifest = make_manifest(make_teacher("a", tap, make_tap("v", (11,), "f16")), images="stored")
    assert Manifest.from_attrs(json.loads(json.dumps(manifest.to_attrs()))) == manifest


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", "2"),
        ("format", True),
        ("format", None),
        ("views", 10**9),
        ("views", 0),
        ("views", "2"),
        ("num_rows", 151),
        ("num_rows", -1),
        ("plan__granule", 7),
        ("shard_bytes", 1 << 40),
        ("plan__size", 1 << 20),
        ("dataset__count", 2**40),
        ("unheard_of", 1),
        ("teachers__a__name", "../../etc"),
        ("teachers__a__weights_sha256", "0"),
        ("teachers__a__taps__logits__shape", [1 << 40]),
        ("teachers__a__bn", "none"),
        ("teachers__a__taps__final__shape", [1 << 20, 1 << 16, 1 << 16]),
        ("teachers__a__taps__final__shape", [512, 1024, 1024]),
        ("teachers__a__taps__final__shape", [4, -1, 2]),
        ("teachers__a__taps__final__shape", [4, 1 << 17]),
        ("teachers__a__taps__final__shape", [4, 2, 2, 2]),
        ("teachers__a__taps__final__shape", []),
        ("teachers__a__taps__final__codec", "pickle"),
        ("teachers__a__taps__final__transform", "margin"),
        ("teachers__a__taps__final__margin", [1.0] * 4),
    ],
)
def test_hostile_manifests_are_refused(key: str, value: Any) -> None:
    with pytest.raises(CacheDamageError, match="manifest"):
        changed(standard(), **{key: value})


@pytest.mark.parametrize(
    "name", ["..", ".", "", "a/b", "/a", "a\\b", ".hidden", "a\n", "a b", "ä", "zarr.json", "x" * 65, "-x"]
)
def test_names_are_one_plain_component(name: str) -> None:
    with pytest.raises(ValidationError):
        make_tap(name)
    with pytest.raises(ValidationError):
        make_teacher(name)


def test_a_tap_cannot_take_the_place_of_the_logits() -> None:
    with pytest.raises(ValidationError, match="logits"):
        make_tap("logits")


@pytest.mark.parametrize("attrs", [{}, {"feedfast": None}, {"feedfast": [1]}, {"other": {}}, {"feedfast": {}}])
def test_not_a_manifest(attrs: dict[str, Any]) -> None:
    with pytest.raises(CacheDamageError):
        Manifest.from_attrs(attrs)


def test_every_array_has_blocks_of_its_own_size() -> None:
    """A row of 64 MiB is a block by itself and leaves those of other arrays alone; none exceeds the granule."""
    manifest = make_manifest(make_teacher("a", make_tap("t", (64, 1024, 1024))), granule=32)
    blocks = {name: spec.block_rows for name, spec in array_specs(manifest).items() if spec.sharded}
    assert blocks == {"pixels/sums": 32, "targets/a/t/codes": 1, "targets/a/logits/codes": 32}


INDIFFERENT = {
    "views": 7,
    "versions": {"torch": "9"},
    "created": "2030",
    "dataset__source": "elsewhere",
    "decoder__versions": {"dali": "3"},
    "teachers__a__taps__final__fit": {"range": 1},
    "teachers__a__taps__final__error": {"cosine": 1},
}
DECISIVE = {
    "dataset__fingerprint": {"ids": "other"},
    "dataset__count": 151,
    "plan__seed": 4,
    "plan__flip": 0.25,
    "decoder__backend": "mixed",
    "decoder__flags": {},
    "batch_rows": 21,
    "plan__granule": 16,
    "shard_bytes": 2000,
    "teachers__a__weights_sha256": "f" * 64,
    "teachers__a__bn": "batch",
    "teachers__a__precision": "bf16",
    "teachers__a__mean": [0, 0, 0],
    "teachers__a__model": "zoo/other",
    "teachers__a__taps__final__path": "elsewhere",
    "teachers__a__taps__final__codec": "u4",
    "teachers__a__taps__final__compression": "zstd",
    "teachers__a__taps__final__position": "post",
}


@pytest.mark.parametrize(("found", "cure"), [(1, "run `feedfast cache` again"), (3, "use a newer feedfast")])
def test_another_format_is_refused_in_one_sentence(found: int, cure: str, tmp_path: Path) -> None:
    attributes = {"feedfast": {**standard().to_attrs()["feedfast"], "format": found}}
    (tmp_path / "zarr.json").write_text(json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}))
    with pytest.raises(CacheMismatchError) as caught:
        CacheReader(tmp_path)
    said = str(caught.value)
    assert said == f"{tmp_path}/zarr.json: manifest: expected cache format 2, found {found}; {said.split('; ')[1]}"
    assert cure in said
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("key", INDIFFERENT)
def test_digest_ignores(key: str) -> None:
    manifest = standard()
    other = changed(manifest, **{key: INDIFFERENT[key]})
    assert other != manifest
    assert all(other.digest_for(name) == manifest.digest_for(name) for name in array_specs(manifest))


@pytest.mark.parametrize("key", DECISIVE)
def test_digest_depends_on(key: str) -> None:
    manifest = standard()
    other = changed(manifest, **{key: DECISIVE[key]})
    assert other.digest_for(FINAL) != manifest.digest_for(FINAL)
    moved = {name for name in array_specs(manifest) if other.digest_for(name) != manifest.digest_for(name)}
    if key.startswith("teachers__a"):
        assert not any(name.startswith(("targets/b", "views", "samples/label", "pixels")) for name in moved)
    if key.startswith("teachers__a__taps"):
        assert moved == {FINAL, "targets/a/final/scale"}


def test_digests_are_part_of_the_format() -> None:
    """Pinned: another value here means that existing caches are no longer recognized."""
    manifest = standard()
    assert {name: manifest.digest_for(name)[:12] for name in ("samples/label", "views/order", FINAL)} == PINNED
    with pytest.raises(KeyError):
        manifest.digest_for("targets/nobody/final/codes")


PINNED = {"samples/label": "84c4d6d07d46", "views/order": "9bd6130ab2a3", FINAL: "0e547d11edfe"}


def test_every_array_has_its_own_digest() -> None:
    manifest = standard()
    assert len({manifest.digest_for(name) for name in array_specs(manifest)}) == len(array_specs(manifest))


def test_differences_name_keys_and_both_values() -> None:
    manifest = standard()
    other = changed(manifest, plan__seed=9, teachers__a__weights_sha256="f" * 64, teachers__a__taps__final__codec="u4")
    rows = differences(manifest, other)
    assert [row[0] for row in rows] == ["plan.seed", "teachers.a.weights_sha256", "teachers.a.taps.final.codec"]
    assert rows[0] == ("plan.seed", 3, 9)
    table = describe_differences(rows)
    assert table.splitlines()[0].split() == ["key", "expected", "found"]
    assert table.splitlines()[1].split() == ["plan.seed", "3", "9"]


def test_additions_are_no_differences_unless_asked_for() -> None:
    small = make_manifest(make_teacher("a", make_tap("final")), views=1)
    large = make_manifest(
        make_teacher("a", make_tap("final"), make_tap("more")), make_teacher("b"), views=3, images="stored"
    )
    assert differences(large, small) == differences(small, large) == differences(small, large, missing=True) == []
    keys = [row[0] for row in differences(large, small, missing=True)]
    assert keys == ["views", "images", "teachers.a.taps.more", "teachers.b"]


def test_found_out_fields_are_no_differences_and_the_existing_ones_stay() -> None:
    old = make_tap(
        "m", (1, 2, 2), transform="margin", margin=(-1.0,), compression="zstd", fit={"n": 1}, error={"cosine": 1}
    )
    new = make_tap("m", (1, 2, 2), transform="margin", margin=(-2.0,), compression="none")
    existing = make_manifest(make_teacher("a", old), views=2, shard_bytes=1000, granule=8)
    asked = make_manifest(
        make_teacher("a", new, make_tap("n")),
        make_teacher("b"),
        views=1,
        shard_bytes=99,
        granule=64,
        images="stored",
    )
    assert differences(asked, existing) == []
    merged = merge(existing, asked)
    logits = existing.teachers["a"].taps["logits"]
    assert merged.teachers["a"].taps == {"m": old, "n": make_tap("n"), "logits": logits}
    assert set(merged.teachers) == {"a", "b"}
    assert (merged.views, merged.images, merged.shard_bytes, merged.plan.granule) == (2, "stored", 1000, 8)
    for name in array_specs(existing):
        assert merged.digest_for(name) == existing.digest_for(name)


# ---- layout


def test_layout_by_hand() -> None:
    tap = make_tap("t", (65, 7, 5), "u4")
    manifest = make_manifest(
        make_teacher("a", tap), rows=1000, views=3, granule=16, shard_bytes=64 * 1155, images="stored"
    )
    specs = array_specs(manifest)
    codes = specs["targets/a/t/codes"]
    # 65 channels pack into 33 bytes; 33 * 7 * 5 = 1155 bytes per row; 64 rows are the most that fit a shard
    assert (codes.shape, codes.chunk, codes.block) == ((3, 1024, 7, 5, 33), (1, 64, 7, 5, 33), (1, 16, 7, 5, 33))
    assert (codes.row_bytes, codes.block_bytes, codes.num_shards, codes.blocks_per_shard) == (1155, 18480, 16, 4)
    # each part of the others is whole bytes: 33 and 17 of u6, 33 and 9 of u5
    assert {codec: make_tap("t", (65, 7, 5), codec).row_bytes for codec in ("f32", "f16", "u8", "u6", "u5", "u4")} == {
        "f32": 9100, "f16": 4550, "u8": 2275, "u6": 1750, "u5": 1470, "u4": 1155
    }  # fmt: skip
    assert (codes.shard_span(15), codes.real_blocks(15)) == ((960, 1000), 3)
    assert specs["targets/a/logits/codes"].shape == (3, 1024, 7)
    assert specs["targets/a/logits/codes"].chunk == (1, 1024, 7)
    assert specs["targets/a/logits/codes"].dtype == np.dtype("<f2")
    assert specs["targets/a/t/scale"].shape == (2, 65)
    assert specs["pixels/codes"].row_shape == (4, 4, 3)
    assert not specs["pixels/codes"].sentinel
    assert specs["views/window"].key(2, 0) == "c/2/0/0"
    assert specs["samples/label"].key(0, 0) == "c/0"
    assert codes.key(1, 15) == "c/1/15/0/0/0"
    assert unit_rows(specs) == 1024


def test_labels_reach_the_largest_id() -> None:
    manifest = make_manifest(rows=10)
    assert array_specs(changed(manifest, dataset__id_space=500))["samples/label"].shape == (500,)


@pytest.mark.parametrize(
    ("row_bytes", "granule", "rows"),
    [
        (1, 64, 64),
        (131072, 64, 64),
        (131073, 64, 32),
        (524288, 64, 16),
        (524288, 8, 8),
        (5 << 20, 64, 1),
        (1 << 30, 64, 1),
        (1, 1, 1),
    ],
)
def test_a_block_is_at_most_8_mib_and_a_granule(row_bytes: int, granule: int, rows: int) -> None:
    assert block_rows_for(row_bytes, granule) == rows


@settings(deadline=None)
@given(
    rows=st.integers(1, 5000),
    channels=st.integers(1, 300),
    side=st.integers(1, 12),
    granule=st.sampled_from([8, 16, 32, 64]),
    shard_bytes=st.integers(1, 1 << 22),
    codec=st.sampled_from(["u8", "u6", "u5", "u4", "f16", "f32"]),
    views=st.integers(1, 4),
)
@example(rows=100, channels=228, side=12, granule=64, shard_bytes=1, codec="f32", views=1)  # 64 rows exceed a block
def test_chunk_arithmetic(
    rows: int, channels: int, side: int, granule: int, shard_bytes: int, codec: str, views: int
) -> None:
    teacher = make_teacher("a", make_tap("t", (channels, side, side), codec))
    manifest = make_manifest(teacher, rows=rows, views=views, granule=granule, shard_bytes=shard_bytes)
    specs = array_specs(manifest)
    unit = unit_rows(specs)
    for spec in (spec for spec in specs.values() if spec.sharded):
        per_shard, block = spec.shard_rows, spec.block_rows
        assert granule % block == 0
        assert block == 1 or block * spec.row_bytes <= 8 << 20
        assert block == granule or 2 * block * spec.row_bytes > 8 << 20
        assert per_shard % block == 0
        assert math.log2(per_shard // block).is_integer()
        assert per_shard == block or (per_shard <= 1024 and per_shard * spec.row_bytes <= shard_bytes)
        assert 2 * per_shard > 1024 or 2 * per_shard * spec.row_bytes > shard_bytes
        assert per_shard == shard_rows_for(spec.row_bytes, block, shard_bytes)
        assert unit % per_shard == 0
        assert spec.shape[1] % per_shard == 0
        assert 0 <= spec.shape[1] - rows < per_shard
        spans = [spec.shard_span(shard) for shard in range(spec.num_shards)]
        assert [row for span in spans for row in range(*span)] == list(range(rows))
        for shard, (start, stop) in enumerate(spans):
            blocks = spec.real_blocks(shard)
            assert (blocks - 1) * block < stop - start <= blocks * block <= per_shard
        keys = {spec.key(view, shard): (view, shard) for view in range(views) for shard in range(spec.num_shards)}
        assert len(keys) == views * spec.num_shards
        assert all(spec.locate(key) == place for key, place in keys.items())


@pytest.mark.parametrize(
    "key",
    [
        "",
        "c",
        "c/0/0/0/0",
        "c/0/0/0/0/0/0",
        "c/00/0/0/0/0",
        "c/0/99/0/0/0",
        "c/2/0/0/0/0",
        "c/0/0/0/0/1",
        "c/-1/0/0/0/0",
        "c/0/٣/0/0/0",
        "x/0/0/0/0/0",
        "../../c/0/0",
        "c/0/0/../../0",
        "c/0/1e0/0/0/0",
        "c/0/ 1/0/0/0",
        f"c/0/{10**30}/0/0/0",
    ],
)
def test_only_keys_of_this_array_are_located(key: str) -> None:
    with pytest.raises(IndexError):
        array_specs(standard())[FINAL].locate(key)


# ---- log


def make_commit(number: int = 0, **fields: Any) -> Commit:
    given = {
        "array": FINAL,
        "shard": f"c/0/{number}/0/0/0",
        "view": 0,
        "rows": (number * 32, min(number * 32 + 32, 150)),
        "bytes": 1000,
        "crc32c": "00c0ffee",
        "sha256": "ab" * 32,
        "manifest": "cd" * 32,
        "block_sums": ("0" * 8,) * (3 if number == 4 else 4),  # blocks of 8 rows
        **fields,
    }
    return Commit(**given)


@settings(deadline=None)
@given(
    saturated=st.integers(0, 2**60),
    attempt=st.integers(0, 9),
    sums=st.lists(st.text("0123456789abcdef", min_size=8, max_size=8)),
    fit=st.text("0123456789abcdef", min_size=16, max_size=16),
    text=st.text(),
)
def test_commit_lines_round_trip(saturated: int, attempt: int, sums: list[str], fit: str, text: str) -> None:
    commit = make_commit(saturated=saturated, attempt=attempt, block_sums=tuple(sums), fit=fit, crc32c=text)
    line = commit.to_line()
    assert line.index("\n") == len(line) - 1
    assert Commit.from_line(line) == commit


def test_a_log_cut_anywhere_keeps_its_whole_lines() -> None:
    commits = [make_commit(shard) for shard in range(3)]
    lines = [commit.to_line().encode() for commit in commits]
    data = b"".join(lines)
    for size in range(len(data) + 1):
        whole = sum(size >= len(b"".join(lines[: n + 1])) for n in range(3))
        found, sound, problems = parse_log(BytesIO(data[:size]), "x.jsonl")
        assert found == commits[:whole]
        assert sound == len(b"".join(lines[:whole]))
        torn = size != sound
        assert [entry["kind"] for entry in problems] == (["log-torn"] if torn else [])


@pytest.mark.parametrize("tail", [b"\x00" * 40 + b"\n", b'{"array": 1}\n', b"[]\n", b"garbage\n"])
def test_an_unreadable_last_line_is_torn_and_an_earlier_one_damage(tail: bytes) -> None:
    line = make_commit().to_line().encode()
    found, sound, problems = parse_log(BytesIO(line + tail), "x")
    assert (found, sound, problems[0]["kind"]) == ([make_commit()], len(line), "log-torn")
    found, _, problems = parse_log(BytesIO(tail + line), "x")
    assert (found, problems[0]["kind"], problems[0]["shard"]) == ([make_commit()], "log-damaged", "x")


@pytest.mark.parametrize(
    "change",
    [
        {"rows": [4, 4]},
        {"rows": [0]},
        {"rows": [-1, 4]},
        {"rows": [0, True]},
        {"bytes": -1},
        {"bytes": 1.5},
        {"view": None},
        {"block_sums": [1]},
        {"fit": 1},
        {"extra": 1},
        {"saturated": "3"},
    ],
)
def test_ill_typed_lines_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        Commit.from_line(json.dumps({**json.loads(make_commit().to_line()), **change}))


def test_the_highest_attempt_counts_and_contradictions_are_reported() -> None:
    first, again = make_commit(), make_commit(crc32c="11111111", attempt=1)
    for order in ([first, again], [again, first]):
        log = collect(order)
        assert (list(log.commits.values()), log.problems) == ([again], [])
    assert collect([first, first]).problems == []
    (found,) = collect([first, make_commit(crc32c="22222222")]).problems
    assert (found["kind"], found["array"], found["shard"]) == ("log-duplicate", FINAL, first.shard)


def test_lines_are_checked_against_the_manifest() -> None:
    specs = array_specs(standard())
    assert check_commit(make_commit(4), specs) is None
    for bad in (
        make_commit(0, rows=(0, 31)),
        make_commit(0, view=1),
        make_commit(0, array="x"),
        make_commit(0, shard="../x"),
    ):
        found = check_commit(bad, specs)
        assert found is not None
        assert found["kind"] == "log-damaged"


def test_digest_depends_on_objects_alone(tmp_path: Path) -> None:
    commits = [make_commit(shard) for shard in range(4)]
    digests = set()
    for name, parts in {"one": [commits], "two": [commits[::2], commits[1::2][::-1]]}.items():
        folder = tmp_path / name / "commits"
        folder.mkdir(parents=True)
        for number, lines in enumerate(parts):
            text = "".join(Commit(**{**_fields(line), "saturated": number}).to_line() for line in lines)
            (folder / log_name((number, len(parts)))).write_text(text)
        assert len(read_log(tmp_path / name).of(FINAL)) == 4
        digests.add(cache_digest(tmp_path / name))
    assert len(digests) == 1
    with (folder / log_name((0, 2))).open("a") as file:
        file.write(make_commit(5, rows=(160, 170)).to_line())
    assert cache_digest(tmp_path / "two") not in digests
    assert object_key(FINAL, "c/0/1/0/0/0") == f"{FINAL}/c/0/1/0/0/0"


def _fields(commit: Commit) -> dict[str, Any]:
    return {name: getattr(commit, name) for name in Commit.__slots__}
