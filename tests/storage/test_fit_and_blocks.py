"""Fits against brute force, measurements against float64 formulas, blocks and shards against other implementations."""

from __future__ import annotations

import itertools
import struct

import google_crc32c
import numcodecs.zstd
import numpy as np
import pytest
import scipy.spatial
import torch
import zarr
import zarr.codecs
from code_samples import integers
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from feedfast.errors import CacheDamageError, FeedfastError
from feedfast.storage.assemble import ShardBuffer, encode_shard
from feedfast.storage.blocks import (
    choose_compression,
    compress_block,
    crc32c,
    decompress,
    index_bytes,
    index_length,
    parse_index,
    zstd_content_size,
)
from feedfast.storage.fit import fit_affine, measure, round_trip
from feedfast.storage.layout import ArraySpec
from feedfast.storage.schema import Compression
from feedfast_kernels import Codes, decode, encode
from feedfast_kernels.codes import CODECS

QUANTIZED = ["u8", "u6", "u5", "u4"]
rng = np.random.default_rng(5)
N = 5_000
SAMPLES = {
    "normal": rng.normal(0.3, 2.0, N),
    "relu": np.maximum(rng.normal(0, 1, N), 0),
    "sparse": np.maximum(rng.normal(-2, 1, N), 0),
    "margin": np.maximum(rng.normal(0, 1.5, N), np.float32(-0.7)),
    "heavy": rng.standard_t(2.5, N),
    "laplace": rng.laplace(-1, 1, N),
    "exponential": rng.exponential(3, N),
    "relu6": np.clip(rng.normal(3, 4, N), 0, 6),
    "outlier": np.append(rng.normal(0, 1, N - 1), 1e4),
    "two-humped": np.where(rng.random(N) < 0.5, rng.normal(-5, 1, N), rng.normal(5, 0.3, N)),
    "integers": rng.integers(0, 10, N),
    "shifted": rng.normal(1e4, 1.0, N),
}


def rms(values: np.ndarray, offset: np.ndarray, step: np.ndarray, codec: str) -> float:
    """Clip, round, decode in float64, written independently of the codec."""
    x, low, width = values.astype(np.float64), np.float64(offset), np.float64(step)
    code = np.clip(np.rint((x - low) / width), 0, CODECS[codec].top_code) if width > 0 else 0
    return float(np.sqrt(np.mean((low + width * code - x) ** 2)))


def brute_force(values: np.ndarray, codec: str, *, pinned: bool) -> float:
    """The least error over a fine two-dimensional grid of ranges."""
    ordered = np.sort(values)
    quantiles = [0, *np.geomspace(1e-4, 0.2, 14)]
    lows = [ordered[0]] if pinned else np.quantile(ordered, quantiles)
    middle = np.median(ordered)
    best = np.inf
    spans = np.concatenate(
        [np.quantile(ordered, 1 - np.array(quantiles)) - middle, (ordered[-1] - middle) * np.geomspace(1e-3, 1, 60)]
    )
    for low, span in itertools.product(lows, spans):
        if middle + span > low:
            best = min(best, rms(values, low, (middle + span - low) / CODECS[codec].top_code, codec))
    return best


@pytest.mark.parametrize("codec", QUANTIZED)
@pytest.mark.parametrize("name", SAMPLES)
def test_fit_is_as_good_as_brute_force_and_never_worse_than_min_max(name: str, codec: str) -> None:
    values = SAMPLES[name].astype(np.float32)
    offset, step = fit_affine(values[:, None], codec)  # type: ignore[arg-type]
    found = rms(values, offset[0], step[0], codec)
    low, high = values.min(), values.max()
    assert found <= rms(values, low, (high - low) / CODECS[codec].top_code, codec) * (1 + 1e-6)
    pinned = (values == low).mean() > 0.01
    assert found <= brute_force(values, codec, pinned=pinned) * 1.02


def test_gaussian_u8_is_within_one_percent() -> None:
    values = rng.normal(0, 3, (1 << 17, 4)).astype(np.float32)
    offset, step = fit_affine(values[::2], "u8")
    fresh = measure(values[1::2], offset, step, "u8")
    assert fresh["relative_rms_error"] <= 0.01
    assert fresh["cosine"] >= 0.9999
    assert fresh["saturated_fraction"] <= 1e-3


@pytest.mark.parametrize("codec", QUANTIZED)
def test_atoms_at_the_lower_end_are_exact(codec: str) -> None:
    margins = np.float32([-0.1, -1 / 3, -2.718281828, 0.0])
    values = np.maximum(rng.normal(0, 1, (5000, 4)).astype(np.float32), margins)
    offset, step = fit_affine(values, codec)  # type: ignore[arg-type]
    decoded = round_trip(values, offset, step, codec)  # type: ignore[arg-type]
    assert np.array_equal(offset, margins)
    at_floor = values == margins
    assert at_floor.any(axis=0).all()
    assert np.array_equal(decoded[at_floor], values[at_floor])


@pytest.mark.parametrize("codec", QUANTIZED)
@pytest.mark.parametrize("constant", [0.0, 3.3, -1e-30, 1e30])
def test_constant_channels_are_exact(constant: float, codec: str) -> None:
    for n in (1, 50):
        values = np.full((n, 2), constant, np.float32)
        offset, step = fit_affine(values, codec)  # type: ignore[arg-type]
        codes, _ = encode(*map(torch.from_numpy, (values, offset, step)), codec=codec)
        assert (step == 0).all()
        assert (codes == 0).all()
        assert np.array_equal(round_trip(values, offset, step, codec), values)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=60)
@given(
    values=hnp.arrays(
        np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40), elements=st.floats(-1e6, 1e6, width=32)
    ),
    codec=st.sampled_from(QUANTIZED),
)
def test_any_pilot_gives_a_finite_range_no_worse_than_min_max(values: np.ndarray, codec: str) -> None:
    offset, step = fit_affine(values, codec)  # type: ignore[arg-type]
    assert np.isfinite(offset).all()
    assert np.isfinite(step).all()
    assert (step >= 0).all()
    codes, _ = encode(*map(torch.from_numpy, (values, offset, step)), codec=codec)
    assert int(integers(codes.numpy(), values.shape[1], codec).max()) <= CODECS[codec].top_code
    for channel, column in enumerate(values.T):
        low, high = column.min(), column.max()
        limit = rms(column, low, (float(high) - float(low)) / CODECS[codec].top_code, codec)
        # rounding of offset and step may cost a few ulp of the largest value, subnormal ranges count as constant
        assert rms(column, offset[channel], step[channel], codec) <= limit * 1.001 + 4e-7 * np.abs(column).max() + 1e-35


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_pilots_that_are_not_finite_are_refused(bad: float) -> None:
    values = rng.normal(size=(10, 3)).astype(np.float32)
    values[4, 1] = bad
    with pytest.raises(FeedfastError, match="channel 1 has 1 of 10"):
        fit_affine(values, "u8")
    with pytest.raises(FeedfastError, match="n > 0"):
        fit_affine(np.empty((0, 3), np.float32), "u8")


def test_floats_are_stored_as_they_are() -> None:
    values = rng.normal(size=(100, 3)).astype(np.float32)
    for codec, dtype in (("f32", np.float32), ("f16", np.float16)):
        offset, step = fit_affine(values, codec)  # type: ignore[arg-type]
        assert (offset == 0).all()
        assert (step == 1).all()
        found = round_trip(values, offset, step, codec)  # type: ignore[arg-type]
        assert np.array_equal(found, values.astype(dtype).astype(np.float32))
    assert measure(values, offset, step, "f32") == {
        "relative_rms_error": 0.0,
        "worst_channel_rms_error": 0.0,
        "cosine": 1.0,
        "saturated_fraction": 0.0,
    }
    assert 1e-5 < measure(values, offset, step, "f16")["relative_rms_error"] < 5e-4
    assert measure(np.float32([[1e6, 1, 1]]), offset, step, "f16")["saturated_fraction"] == pytest.approx(1 / 3)


def test_a_channel_that_dwarfs_the_others_does_not_hide_them() -> None:
    values = rng.normal(size=(4000, 4)).astype(np.float32)
    values[:, 0] = 1e4 + rng.normal(size=4000) * 1e-2
    found = measure(values, *fit_affine(values, "u4"), "u4")
    assert found["relative_rms_error"] < 1e-3
    assert found["worst_channel_rms_error"] == pytest.approx(
        max(
            measure(values[:, c : c + 1], *fit_affine(values[:, c : c + 1], "u4"), "u4")["relative_rms_error"]
            for c in range(4)
        )
    )
    assert found["worst_channel_rms_error"] > 0.05


def test_measurements_follow_their_formulas() -> None:
    values = np.float32([[-2.0, 0.04], [0.9, 0.06], [9.0, -0.4]])
    offset, step, margin = np.float32([-1, -0.3]), np.float32([0.5, 0.1]), np.float32([-1, -0.3])
    found = measure(values, offset, step, "u4", margin, pre_activation=True)
    target = np.array([[-1, 0.04], [0.9, 0.06], [9, -0.3]])
    decoded = np.array([[-1, 0.0], [1.0, 0.1], [6.0, -0.3]])
    assert found["relative_rms_error"] == pytest.approx(
        np.linalg.norm(decoded - target) / np.linalg.norm(target), rel=1e-6
    )
    worst = np.linalg.norm(decoded - target, axis=0) / np.linalg.norm(target, axis=0)
    assert found["worst_channel_rms_error"] == pytest.approx(worst.max(), rel=1e-6)
    assert found["cosine"] == pytest.approx(
        1 - scipy.spatial.distance.cosine(decoded.ravel(), target.ravel()), rel=1e-6
    )
    assert found["saturated_fraction"] == pytest.approx(1 / 6)
    # 0.04 decodes to 0 (or a rounding above it), 0.06 to 0.1: only a sign that turns counts
    flips = (target > 0) != (round_trip(values, offset, step, "u4", margin) > 0)
    assert found["mask_flip_rate"] == pytest.approx(flips.mean())
    assert "mask_flip_rate" not in measure(values, offset, step, "u4")


@settings(deadline=None)
@given(
    codes=hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=19), elements=st.integers(0, 62)),
    codec=st.sampled_from(["u6", "u5", "u4"]),
)
def test_packed_codes_round_trip_with_any_channels(codes: np.ndarray, codec: str) -> None:
    """Every code comes back, bits that belong to no channel are 0, and no row reads as missing."""
    codes = np.minimum(codes, CODECS[codec].top_code)
    channels = codes.shape[1]
    offset, step = torch.zeros(channels), torch.ones(channels)
    packed, saturated = encode(torch.from_numpy(codes).float(), offset, step, codec=codec)
    assert int(saturated) == 0
    assert np.array_equal(integers(packed.numpy(), channels, codec), codes)  # bit by bit
    assert (packed.numpy() != 0xFF).any(axis=1).all()
    assert codec != "u4" or (packed != 0xFF).all()
    assert np.array_equal(decode(Codes(packed, offset, step, codec)).numpy(), codes)


def test_packed_bytes_by_hand() -> None:
    """Of ten channels: nibbles, two per byte, then the upper two bits, four per byte, or the upper one, eight."""
    codes = torch.tensor([[0, 17, 34, 51, 62, 15, 16, 32, 48, 5]])
    scale = torch.zeros(10), torch.ones(10)
    low = [0x10, 0x32, 0xFE, 0x00, 0x50]
    six = [0b11_10_01_00, 0b10_01_00_11, 0b00_00_00_11]
    assert encode(codes.float(), *scale, codec="u6")[0].tolist() == [[*low, *six]]
    five = [0b0110_1010, 0b0000_0001]  # of the codes below, 17 and 30 have it
    codes = torch.tensor([[0, 17, 2, 19, 14, 30, 16, 0, 16, 5]])
    assert encode(codes.float(), *scale, codec="u5")[0].tolist() == [[0x10, 0x32, 0xEE, 0x00, 0x50, *five]]
    assert encode(torch.clamp(codes, max=14).float(), *scale, codec="u4")[0].tolist() == [
        [0xE0, 0xE2, 0xEE, 0x0E, 0x5E]
    ]


# ---- bytes


def test_crc32c_of_any_buffer() -> None:
    data = bytes(range(200))
    array = np.frombuffer(data, np.uint8)
    assert crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C
    assert crc32c(data) == crc32c(bytearray(data)) == crc32c(memoryview(data)) == crc32c(array.copy())
    assert crc32c(data[50:], crc32c(data[:50])) == google_crc32c.value(data)
    assert crc32c(array.copy().reshape(10, 20)) == crc32c(data)


@settings(deadline=None)
@given(data=st.binary(min_size=1, max_size=3000), compression=st.sampled_from(["zstd", "none"]))
def test_blocks_round_trip(data: bytes, compression: str) -> None:
    out = np.zeros(len(data), np.uint8)
    decompress(compress_block(data, compression), compression, out)  # type: ignore[arg-type]
    assert out.tobytes() == data


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_every_flipped_bit_of_a_block_is_noticed(compression: str) -> None:
    data = np.minimum(rng.integers(0, 255, 400, dtype=np.uint8), 60)
    stored = compress_block(data, compression)  # type: ignore[arg-type]
    out, caught = np.empty_like(data), 0
    for bit in range(8 * len(stored)):
        bad = bytearray(stored)
        bad[bit // 8] ^= 1 << (bit % 8)
        try:
            decompress(bad, compression, out)  # type: ignore[arg-type]
        except CacheDamageError as error:
            caught += "block" in str(error)
        else:  # a few bits of an entropy-coded stream mean nothing
            assert np.array_equal(out, data)
    assert caught > (0.97 if compression == "zstd" else 0.9999) * 8 * len(stored)
    for size in range(len(stored)):
        with pytest.raises(CacheDamageError, match="block"):
            decompress(stored[:size], compression, out)  # type: ignore[arg-type]


def test_a_frame_may_not_choose_its_size_or_drop_its_checksum() -> None:
    out = np.empty(1000, np.uint8)
    for frame in (
        numcodecs.zstd.compress(b"x" * 999, 1, True),
        numcodecs.zstd.compress(b"x" * (1 << 22), 1, True),
        numcodecs.zstd.compress(b"x" * 1000, 1, False),
        b"",
    ):
        with pytest.raises(CacheDamageError, match="zstd frame of 1000 bytes"):
            decompress(frame, "zstd", out)


@pytest.mark.parametrize("size", [1, 255, 256, 257, 65791, 65792, 65793, 1 << 20])
def test_announced_sizes(size: int) -> None:
    assert zstd_content_size(numcodecs.zstd.compress(bytes(size), 1, True)[:18]) == size


def test_compression_must_pay() -> None:
    noise = [rng.integers(0, 255, 50_000, dtype=np.uint8) for _ in range(3)]
    zeros = [np.maximum(block, 128) for block in noise]  # half of the codes are one value
    assert choose_compression(noise) == "none"
    assert choose_compression(zeros) == "zstd"
    assert choose_compression([]) == "none"
    assert choose_compression(noise, "zstd") == "zstd", "asked for"
    assert choose_compression(zeros, "raw") == "none", "asked for"


@settings(deadline=None)
@given(st.lists(st.one_of(st.none(), st.binary(max_size=50)), min_size=1, max_size=40))
def test_an_index_leads_to_every_block(blocks: list[bytes | None]) -> None:
    index = index_bytes([None if block is None else len(block) for block in blocks])
    shard = b"".join([*(block for block in blocks if block is not None), index])
    size = index_length(len(blocks))
    assert len(index) == size
    table = parse_index(shard[-size:], len(blocks), len(shard))
    assert np.array_equal(table, parse_index(shard, len(blocks), len(shard)))
    for (offset, length), block in zip(table.tolist(), blocks, strict=True):
        if block is None:
            assert (offset, length) == (2**64 - 1, 2**64 - 1)
        else:
            assert shard[offset : offset + length] == block


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_a_shard_is_what_zarr_packs(compression: Compression) -> None:
    """40 rows of 64: the third block of 16 is half full, the fourth absent."""
    rows = rng.integers(0, 200, (64, 6), dtype=np.uint8)
    spec = ArraySpec(
        name="codes",
        shape=(1, 64, 6),
        dtype=rows.dtype,
        fill=255,
        chunk=(1, 64, 6),
        block=(1, 16, 6),
        compression=compression,
        dims=("view", "row", "channel"),
        views=1,
        rows=40,
    )
    store = zarr.storage.MemoryStore()
    coded = zarr.codecs.ZstdCodec(level=1, checksum=True) if compression == "zstd" else zarr.codecs.Crc32cCodec()
    array = zarr.create_array(
        store,
        shape=spec.shape,
        shards=spec.chunk,
        chunks=spec.block,
        dtype="uint8",
        fill_value=255,
        compressors=[coded],
    )
    array[0, :40] = rows[:40]
    (theirs,) = (data.to_bytes() for key, data in store._store_dict.items() if key.startswith("c/"))
    assert b"".join(encode_shard(ShardBuffer(spec, 0, 0, rows, filled=40))) == theirs


@pytest.mark.parametrize(
    ("entry", "object_bytes"),
    [
        ((0, 101), 104 + 36),
        ((101, 0), 136),
        ((2**63, 2**63), 136),
        ((2**64 - 2, 2), 136),
        ((5, 2**64 - 1), 136),
        ((90, 11), 136),
    ],
)
def test_index_entries_outside_the_object_are_refused(entry: tuple[int, int], object_bytes: int) -> None:
    data = struct.pack("<4Q", 0, 4, *entry)
    tail = data + crc32c(data).to_bytes(4, "little")
    with pytest.raises(CacheDamageError, match=r"outside|index"):
        parse_index(tail, 2, object_bytes if entry != (0, 101) else 136)


def test_damaged_indexes_are_refused() -> None:
    tail = index_bytes([3, None, 8])
    for bit in range(8 * len(tail)):
        bad = bytearray(tail)
        bad[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(CacheDamageError, match="index"):
            parse_index(bad, 3, 1000)
    for size in range(len(tail)):
        with pytest.raises(CacheDamageError, match="index"):
            parse_index(tail[:size], 3, 1000)
    with pytest.raises(CacheDamageError, match="index"):
        parse_index(tail, 3, 20)
