"""The Triton kernels of `encode` and `decode` have the bits of NumPy and of the CPU, interpreted and on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from code_samples import TOP, integers, some_map, stored_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_checks import assert_rounded, captured, orders
from torch import Tensor

from feedfast_kernels import Codes, decode, encode
from feedfast_kernels._ops import OPS
from feedfast_kernels.codes import decode_reference, encode_reference

# odd and prime sizes, one past a block of channels and of rows, one element, vectors, widths that are no power of two
SHAPES = [(2, 16, 5, 7), (3, 17, 4, 4), (2, 160, 3, 3), (1, 257, 1, 9), (1, 1, 1, 1), (2, 24, 7, 7), (5, 10), (129, 16)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _quiet_interpreter() -> Iterator[None]:
    with np.errstate(all="ignore"):  # NumPy computes the kernels there, and would report values that overflow
        yield


def formula(x: Tensor, offset: Tensor, step: Tensor, margin: Tensor | None, codec: str) -> tuple[np.ndarray, int]:
    """The definition, in fp32 NumPy: codes [B, H, W, C] or [B, C], and how many the clip changed."""
    nhwc = x.float().cpu().numpy()
    nhwc = nhwc.transpose(0, 2, 3, 1) if nhwc.ndim == 4 else nhwc
    clipped = nhwc if margin is None else np.maximum(nhwc, margin.cpu().numpy())
    divisor = step.cpu().numpy()
    codes = np.where(divisor == 0, 0, np.rint((clipped - offset.cpu().numpy()) / np.where(divisor == 0, 1, divisor)))
    inside = np.clip(codes, 0, TOP[codec])
    return inside.astype(np.uint8), int((codes != inside).sum())


def assert_is_the_formula(
    x: Tensor, offset: Tensor, step: Tensor, margin: Tensor | None, codec: str, device: torch.device
) -> None:
    """Codes and count of the kernel and of the PyTorch path are those of NumPy."""
    expected, saturated = formula(x, offset, step, margin, codec)
    on_device = [None if value is None else value.to(device) for value in (x, offset, step, margin)]
    for encoder, arguments in ((encode, on_device), (encode_reference, [x, offset, step, margin])):
        codes, count = encoder(*arguments[:3], codec=codec, margin_C=arguments[3])
        got = integers(codes.cpu().numpy(), x.shape[1], codec)
        np.testing.assert_array_equal(got, expected, err_msg=encoder.__name__)
        assert (count.dtype, int(count)) == (torch.int64, saturated), encoder.__name__


@pytest.mark.parametrize("codec", TOP)
@pytest.mark.parametrize("with_margin", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_encode_is_the_formula(
    kernel_device: torch.device, shape: tuple[int, ...], with_margin: bool, codec: str
) -> None:
    x, offset, step, margin = some_map(shape)
    for dtype in DTYPES:
        for x_in_order in orders(x.to(dtype)).values():
            assert_is_the_formula(x_in_order, offset, step, margin if with_margin else None, codec, kernel_device)


@pytest.mark.parametrize("codec", TOP)
def test_rows_one_past_what_a_program_takes(kernel_device: torch.device, codec: str) -> None:
    for batch in (127, 128, 129):  # a tile of 16 channels is 128 rows
        x, offset, step, margin = some_map((batch, 16))
        assert_is_the_formula(x, offset, step, margin, codec, kernel_device)


def test_several_tiles_a_program(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feedfast_kernels.gpu.codes.FEW_TILES", 2)
    for shape in ((5, 32, 9, 9), (2, 8, 24, 16), (2, 32, 20, 20)):
        x, offset, step, margin = some_map(shape)
        for x_in_order in orders(x).values():
            assert_is_the_formula(x_in_order, offset, step, margin, "u8", kernel_device)
        codes = Codes(encode_reference(x, offset, step, codec="u8")[0], offset, step, "u8")
        assert torch.equal(decode(codes.to(kernel_device)).cpu(), decode_reference(codes))


# ---- the bits


def ulps_away(x: np.ndarray, ulps: np.ndarray) -> np.ndarray:
    """``x`` moved by so many fp32 neighbors, through 0 where it lies between."""
    ordered = x.view(np.int32).astype(np.int64)
    ordered = np.where(ordered < 0, -(ordered & 0x7FFFFFFF), ordered) + ulps
    bits = np.where(ordered < 0, -ordered | 0x80000000, ordered)
    return bits.astype(np.uint32).view(np.float32)


SCALES = st.floats(-126, 126).map(lambda e: 2.0**e) | st.sampled_from(
    [0.0, 2.0**-149, 2.0**-140, 2.0**-126, 2.0**-65, 2.0**-64, 2.0**-63, 1 / 64, 1.0, 1 / 3, 2.0**120, 2.0**126]
)
OFFSETS = st.floats(-4, 4, width=32) | st.sampled_from([0.0, -0.0, 1e-42, -1e-38, 1e17, -1e19, 2.0**60, -1e30, 3e38])


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 1 << 30),
    scales=st.lists(st.tuples(SCALES, OFFSETS, st.booleans()), min_size=1, max_size=9),
    codec=st.sampled_from(list(TOP)),
    dtype=st.sampled_from(DTYPES),
    with_margin=st.booleans(),
)
def test_bits_at_ties_and_at_the_ends_of_the_range(
    kernel_device: torch.device,
    seed: int,
    scales: list[tuple[float, float, bool]],
    codec: str,
    dtype: torch.dtype,
    with_margin: bool,
) -> None:
    random = np.random.default_rng(seed)
    step = np.array([scale for scale, _, _ in scales], np.float32)
    # an offset of the step's own size is what a fit gives; others exercise what it does not
    own = random.uniform(-300, 300, len(scales)).astype(np.float32) * step
    offset = np.where([fitted for *_, fitted in scales], own, np.array([o for _, o, _ in scales], np.float32))
    offset[(step == 0) & (np.abs(offset) > 1e30)] = 0  # the difference overflows: infinity / infinity on the CPU
    margin = offset + random.uniform(-3, 20, len(scales)).astype(np.float32) * step
    size = (8, len(scales))
    boundary = random.integers(-2, TOP[codec] + 3, size) + random.choice([0.5, 0.5, 0.0], size)
    x = ulps_away((offset + boundary * step).astype(np.float32), random.integers(-2, 3, size))
    x[4:6] = offset + random.uniform(-9, TOP[codec] + 9, (2, len(scales))) * step
    extremes = [0.0, -0.0, 1e-45, -1e-45, 1.1754942e-38, 3.4028235e38, -3.4028235e38, 1.0, -1.0, 65504.0]
    x[6:] = random.choice(np.array(extremes, np.float32), (2, len(scales)))
    x = np.where(np.isfinite(x), x, 0).astype(np.float32)
    margin = np.where(np.isfinite(margin), margin, 0).astype(np.float32)
    values = torch.from_numpy(x).to(dtype)
    values = torch.where(values.isfinite(), values, torch.ones((), dtype=dtype))
    if dtype == torch.bfloat16 and kernel_device.type == "cpu":  # the interpreter misreads bf16's subnormal values
        values = torch.where(values.abs() < 2.0**-126, torch.zeros((), dtype=dtype), values)
    vectors = (torch.from_numpy(offset), torch.from_numpy(step), torch.from_numpy(margin) if with_margin else None)
    assert_is_the_formula(values, *vectors, codec, kernel_device)


def near_midpoints(most: int) -> tuple[np.ndarray, np.ndarray]:
    """Every a, b, up to powers of two, with a / b within most / (2 * b) ulp of a float's midpoint next to a tie.

    With mantissas A, B in [2^23, 2^24), the quotient in ulps is A * 2^s / B, s 23 or 24. The midpoints next to the tie
    k + 1/2 are M / 2 ulps, M odd and known. Then A * 2^(s+1) = M * B + residue has one solution B mod 2^(s+1).
    """
    pairs = []
    for code in range(256):
        tie = 2 * code + 1
        exponent = tie.bit_length() - 25  # the tie is tie * 2^-1 = (tie << -exponent - 1) ulps of 2^exponent
        above, below = 2 * (tie << (-exponent - 1)) + 1, 2 * (tie << (-exponent - 1)) - 1
        for middle, ulp in ((above, exponent), (below, exponent) if code else ((1 << 25) - 1, exponent - 1)):
            for residue in (*range(-most, 0), *range(1, most + 1)):
                for s in (23, 24):
                    b = -residue * pow(middle, -1, 2 << s) % (2 << s)
                    a = (middle * b + residue) >> (s + 1)
                    if 1 << 23 <= b < 1 << 24 and 1 << 23 <= a < 1 << 24:
                        pairs.append((np.ldexp(np.float32(a), s + ulp), np.float32(b)))
    a_all, b_all = zip(*pairs, strict=True)
    return np.array(a_all, np.float32), np.array(b_all, np.float32)


def fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x * y + z of fp32, rounded once: the product is exact in fp64, and the sum is rounded to odd before fp32."""
    product, addend = x.astype(np.float64) * y, z.astype(np.float64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    bits = total.view(np.int64)
    toward = np.where((error > 0) == (total > 0), 1, -1)
    return np.where((error != 0) & (bits % 2 == 0), bits + toward, bits).view(np.float64).astype(np.float32)


def test_the_quotient_needs_no_division() -> None:
    """The whole proof: elsewhere the error, below 3 * 2^-24 ulp, crosses no midpoint (3 * 2^-24 * 2 * 2^24 = 6)."""
    random = np.random.default_rng(0)
    a, b = near_midpoints(16)
    assert len(a) > 5000
    ties = (random.integers(0, 256, 100_000) + np.float32(0.5)).astype(np.float32)
    divisors = random.integers(1 << 23, 1 << 24, 100_000).astype(np.float32)
    exact = (divisors.astype(np.float64) * ties).astype(np.float32)
    a = np.concatenate([a, *(ulps_away(exact, np.full(len(exact), n)) for n in (-2, -1, 0, 1, 2))])
    b = np.concatenate([b, *[divisors] * 5])
    a, b = np.concatenate([a, -a]), np.concatenate([b, b])
    inverse = np.float32(1) / b

    def codes_with(inverse: np.ndarray) -> np.ndarray:
        q = np.minimum(a * inverse, np.float32(255))
        return np.rint(fma(fma(-q, b, a), inverse, q))

    def clip(codes: np.ndarray) -> np.ndarray:
        return np.clip(codes, -1, 255)

    np.testing.assert_array_equal(clip(codes_with(inverse)), clip(np.rint(a / b)))
    for neighbor in (0, np.inf):  # the test can fail: an inverse off by one ulp gives other codes
        assert (clip(codes_with(np.nextafter(inverse, np.float32(neighbor)))) != clip(np.rint(a / b))).any()


@pytest.mark.parametrize("power", [0, -120, -88, 100])
def test_the_kernel_at_the_hard_quotients(kernel_device: torch.device, power: int) -> None:
    a, b = near_midpoints(6)
    scale = 2.0 ** (power - 24)
    x = torch.from_numpy(np.stack([a, -a]).astype(np.float64) * scale).float()
    assert_is_the_formula(x, torch.zeros(len(b)), torch.from_numpy(b * scale).float(), None, "u8", kernel_device)


# ---- what else a caller may rely on


def test_values_that_are_not_finite_count_as_saturated(kernel_device: torch.device) -> None:
    x, offset, step, margin = (value.to(kernel_device) for value in some_map((2, 16, 4, 4)))
    x = 0 * x
    step += 1  # nothing else saturates
    _, before = encode(x, offset, step, codec="u8", margin_C=margin)
    for bad, bound in [(float("nan"), None), (float("inf"), None), (-float("inf"), None), (float("nan"), margin)]:
        x[1, 3, 2, 1] = bad
        x[0, 5, 0, 0] = bad
        for x_in_order in orders(x).values():
            codes, count = encode(x_in_order, offset, step, codec="u8", margin_C=bound)
            assert int(count) == int(before) + 2
            assert codes.amax() <= 254


def test_out_of_any_strides(kernel_device: torch.device) -> None:
    x, offset, step, _ = (value.to(kernel_device) for value in some_map((2, 6, 3, 3)))
    for codec in TOP:
        stored = stored_bytes(6, codec)
        expected, _ = encode_reference(x.cpu(), offset.cpu(), step.cpu(), codec=codec)
        plain = torch.empty(2, 3, 3, stored, dtype=torch.uint8, device=kernel_device)
        codes, _ = encode(x, offset, step, codec=codec, out=plain)
        assert codes is plain
        assert torch.equal(plain.cpu(), expected)
        rows = torch.full((2, 3, 3, 2 * stored), 77, dtype=torch.uint8, device=kernel_device)
        codes, _ = encode(x, offset, step, codec=codec, out=rows[..., ::2])
        assert codes.data_ptr() == rows.data_ptr()
        assert torch.equal(rows[..., ::2].cpu(), expected)
        assert (rows[..., 1::2] == 77).all()


def test_vectors_of_any_strides(kernel_device: torch.device) -> None:
    x, offset, step, margin = (value.to(kernel_device) for value in some_map((2, 16, 3, 3)))
    apart = [torch.stack([value, value - 9], 1)[:, 0] for value in (offset, step, margin)]
    expected, _ = encode(x, offset, step, codec="u8", margin_C=margin)
    codes, _ = encode(x, apart[0], apart[1], codec="u8", margin_C=apart[2])
    assert torch.equal(codes, expected)
    assert torch.equal(decode(Codes(codes, apart[0], apart[1], "u8")), decode(Codes(codes, offset, step, "u8")))


def test_empty_batch(kernel_device: torch.device) -> None:
    scale = (torch.zeros(5, device=kernel_device), torch.ones(5, device=kernel_device))
    for shape, stored in (((0, 5, 3, 3), (0, 3, 3, 5)), ((0, 5), (0, 5))):
        codes, count = encode(torch.empty(shape, device=kernel_device), *scale, codec="u6")
        assert (codes.shape, int(count), count.dtype) == (stored, 0, torch.int64)
        assert decode(Codes(codes, *scale, "u6")).shape == shape


def test_float64_is_left_to_pytorch(kernel_device: torch.device) -> None:
    x, offset, step, _ = (value.to(kernel_device) for value in some_map((2, 6, 3, 3)))
    codes, _ = encode(x.double(), offset, step, codec="u8")
    assert torch.equal(codes, encode(x, offset, step, codec="u8")[0])
    values = decode(Codes(codes, offset, step, "u8"), torch.float64)
    assert torch.equal(values, decode_reference(Codes(codes, offset, step, "u8"), torch.float64))


@pytest.mark.parametrize("codec", TOP)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_has_the_bits_of_the_cpu(kernel_device: torch.device, shape: tuple[int, ...], codec: str) -> None:
    x, offset, step, _ = some_map(shape)
    data, _ = encode_reference(x, offset, step, codec=codec)
    apart = torch.stack([data, data], -1)[..., 0]
    codes = Codes(data, offset, step, codec)  # type: ignore[arg-type]
    for dtype in DTYPES:
        expected = decode_reference(codes, dtype)
        for stored in (data, apart):
            values = decode(Codes(stored, offset, step, codec).to(kernel_device), dtype)  # type: ignore[arg-type]
            assert (values.dtype, values.shape) == (dtype, expected.shape)
            assert values.ndim == 2 or values.is_contiguous(memory_format=torch.channels_last)
            if dtype == torch.bfloat16 and kernel_device.type == "cpu":  # the interpreter truncates to bf16
                assert_rounded(values, decode_reference(codes))
            else:
                assert torch.equal(values.cpu(), expected)


@pytest.mark.parametrize("codec", TOP)
def test_compiles_in_one_graph(kernel_device: torch.device, codec: str) -> None:
    x, offset, step, margin = (value.to(kernel_device) for value in some_map((2, 16, 4, 4)))
    expected, saturated = encode(x, offset, step, codec=codec, margin_C=margin)
    values = decode(Codes(expected, offset, step, codec))  # type: ignore[arg-type]

    @torch.no_grad()
    def there_and_back(x: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        codes, count = encode(x, offset, step, codec=codec, margin_C=margin, out=out)
        return codes, count, decode(Codes(codes, offset, step, codec))  # type: ignore[arg-type]

    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    for out in (None, torch.zeros_like(expected)):
        codes, count, back = compiled(x, out)
        assert torch.equal(codes, expected)
        assert int(count) == int(saturated)
        assert torch.equal(back, values)
        assert out is None or torch.equal(out, expected)


def test_operators_keep_their_schema(kernel_device: torch.device) -> None:
    x, offset, step, margin = (value.to(kernel_device) for value in some_map((2, 5, 3, 3)))
    for codec in ("u8", "u6"):
        out = torch.zeros(2, 3, 3, stored_bytes(5, codec), dtype=torch.uint8, device=kernel_device)
        for x_in_order in orders(x).values():
            torch.library.opcheck(OPS.encode, (x_in_order, offset, step, codec, margin, out))
        torch.library.opcheck(OPS.decode, (out, offset, step, codec, torch.float16))


def test_under_autocast(kernel_device: torch.device) -> None:
    x, offset, step, margin = (value.to(kernel_device) for value in some_map((2, 16, 4, 4)))
    expected, _ = encode(x, offset, step, codec="u8", margin_C=margin)
    with torch.autocast(kernel_device.type, dtype=torch.bfloat16):
        codes, _ = encode(x, offset, step, codec="u8", margin_C=margin)
        assert decode(Codes(codes, offset, step, "u8")).dtype == torch.float32
    assert torch.equal(codes, expected)


# ---- what only a GPU shows


@pytest.mark.gpu
@pytest.mark.parametrize("codec", TOP)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_large_map_has_the_bits_of_the_cpu(dtype: torch.dtype, codec: str) -> None:
    x, offset, step, margin = some_map((64, 256, 56, 56))
    for x_in_order in orders(x.to(dtype)).values():
        expected, saturated = encode_reference(x_in_order, offset, step, codec=codec, margin_C=margin)
        vectors = [value.cuda() for value in (offset, step, margin)]
        codes, count = encode(x_in_order.cuda(), *vectors[:2], codec=codec, margin_C=vectors[2])
        assert torch.equal(codes.cpu(), expected)
        assert int(count) == int(saturated)
        again = Codes(codes, vectors[0], vectors[1], codec)  # type: ignore[arg-type]
        assert torch.equal(decode(again, dtype).cpu(), decode_reference(again.to("cpu"), dtype))


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements() -> None:
    rows, channels = (1 << 24) + 3, 144  # 2.4 G elements
    x = torch.zeros(rows, channels, dtype=torch.bfloat16, device="cuda")
    x[-1], x[-2] = 3, 1000
    offset, step = torch.zeros(channels, device="cuda"), torch.ones(channels, device="cuda")
    codes, saturated = encode(x, offset, step, codec="u8")
    assert int(saturated) == channels
    assert codes[-2:].tolist() == [[254] * channels, [3] * channels]
    assert codes[:-2].count_nonzero() == 0
    del x
    values = decode(Codes(codes, offset, step, "u8"), torch.bfloat16)
    assert values[-2:].tolist() == [[254.0] * channels, [3.0] * channels]
    assert values[:-2].count_nonzero() == 0


@pytest.mark.gpu
def test_capture_replays_without_a_sync() -> None:
    x, offset, step, margin = (value.cuda() for value in some_map((32, 64, 16, 16)))
    expected, saturated = encode(x, offset, step, codec="u8", margin_C=margin)
    out = torch.zeros_like(expected)
    graph, (_, count) = captured(lambda: encode(x, offset, step, codec="u8", margin_C=margin, out=out))
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)
    assert int(count) == int(saturated)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
def test_runs_on_the_tensors_device() -> None:
    with torch.cuda.device(0):
        x, offset, step, _ = (value.to("cuda:1") for value in some_map((2, 16, 4, 4)))
        codes, _ = encode(x, offset, step, codec="u8")
    assert torch.equal(codes, encode_reference(x, offset, step, codec="u8")[0])
