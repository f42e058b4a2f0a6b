"""Codes: `encode` against the written formula in NumPy, `decode`, packing, layouts, tiles, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from code_samples import TOP, integers, some_map, stored_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data._utils.pin_memory import pin_memory as torch_pin_memory

from feedfast_kernels import Codes, _layout, as_float, decode, encode
from feedfast_kernels.codes import CODECS, decode_reference

SHAPES = [(2, 3, 5, 7), (1, 1, 1, 1), (3, 32, 8, 8), (2, 17, 1, 31), (5, 10), (1, 129), (0, 4, 3, 3)]


def formula(x: Tensor, offset: Tensor, step: Tensor, margin: Tensor | None, codec: str) -> tuple[np.ndarray, int]:
    """The definition, in fp32 NumPy: codes [B, H, W, C] or [B, C], and how many the clip changed."""
    nhwc = x.float().numpy()
    nhwc = nhwc.transpose(0, 2, 3, 1) if nhwc.ndim == 4 else nhwc
    clipped = nhwc if margin is None else np.maximum(nhwc, margin.numpy())
    divisor = np.where(step.numpy() == 0, np.float32(1), step.numpy())
    codes = np.where(step.numpy() == 0, 0, np.rint((clipped - offset.numpy()) / divisor))
    inside = np.clip(codes, 0, TOP[codec])
    return inside.astype(np.uint8), int((codes != inside).sum())


def layouts(x: Tensor) -> list[Tensor]:
    """The same values under different strides."""
    if x.ndim == 2:
        return [x, x.t().contiguous().t(), torch.cat([x, x], 1)[:, : x.shape[1]]]
    wider = torch.zeros(*x.shape[:3], 2 * x.shape[3], dtype=x.dtype)
    wider[..., ::2] = x
    return [x, x.contiguous(memory_format=torch.channels_last), wider[..., ::2]]


@pytest.mark.parametrize("codec", TOP)
@pytest.mark.parametrize("with_margin", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_encode_is_the_formula_in_every_layout(shape: tuple[int, ...], with_margin: bool, codec: str) -> None:
    x, offset, step, margin = some_map(shape)
    bound = margin if with_margin else None
    expected, saturated = formula(x, offset, step, bound, codec)
    for given_x in layouts(x):
        codes, count = encode(given_x, offset, step, codec=codec, margin_C=bound)
        assert codes.dtype == torch.uint8
        assert codes.is_contiguous()
        got = integers(codes.numpy(), shape[1], codec)
        np.testing.assert_array_equal(got, expected)
        assert count.dtype == torch.int64
        assert int(count) == saturated


@pytest.mark.parametrize("codec", ["u8", "u6"])
@pytest.mark.parametrize("floor", [None, 0.0, -0.4, -3.0, 2.0, 300.0])
@pytest.mark.parametrize(("low", "high"), [(0, 14), (-0.5, 14.5), (-9, 14), (0, 400), (-9, 400)])
def test_what_is_clipped_is_counted_at_both_ends(low: float, high: float, floor: float | None, codec: str) -> None:
    """Tiles that need no clip, one at an end or both, and margins below, at, in and above the range of codes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 5, 7, generator=generator) * (high - low) + low
    x[0, :, 0, 0], x[1, :, 4, 6] = low, high
    x[0, 0, 0, 1:5] = torch.tensor([0.5, 1.5, 2.5, 13.5])
    offset, step = torch.zeros(3), torch.ones(3)
    margin = None if floor is None else torch.full((3,), floor)
    for given_x in layouts(x):
        codes, count = encode(given_x, offset, step, codec=codec, margin_C=margin)
        expected, saturated = formula(x, offset, step, margin, codec)
        np.testing.assert_array_equal(integers(codes.numpy(), 3, codec), expected)
        assert int(count) == saturated


def test_ties_go_to_the_even_code() -> None:
    halves = torch.arange(-4, 20).reshape(2, 1, 3, 4) / 2
    codes, saturated = encode(halves - 8, torch.tensor([-8.0]), torch.tensor([1.0]), codec="u8")
    expected = [0, 0, 0, 0, 0, 0, 1, 2, 2, 2, 3, 4, 4, 4, 5, 6, 6, 6, 7, 8, 8, 8, 9, 10]
    assert codes.flatten().tolist() == expected
    assert int(saturated) == 3  # -2, -1.5 (to -2) and -1; -0.5 rounds to 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_encode_of_16_bit_maps(dtype: torch.dtype) -> None:
    x, offset, step, margin = some_map((2, 5, 4, 4))
    expected, saturated = formula(x.to(dtype), offset, step, margin, "u8")
    for given_x in layouts(x.to(dtype)):
        codes, count = encode(given_x, offset, step, codec="u8", margin_C=margin)
        np.testing.assert_array_equal(codes.numpy(), expected)
        assert int(count) == saturated


@pytest.mark.parametrize("elements", [1, 64, 100, 1000])
def test_tiles_do_not_change_codes(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, offset, step, margin = some_map((5, 6, 9, 4))
    expected, saturated = formula(x, offset, step, margin, "u8")
    monkeypatch.setattr(_layout, "TILE_ELEMENTS_PER_THREAD", elements)
    for given_x in layouts(x):
        codes, count = encode(given_x, offset, step, codec="u8", margin_C=margin)
        np.testing.assert_array_equal(codes.numpy(), expected)
        assert int(count) == saturated


@pytest.mark.parametrize("elements", [1, 100, 10**6])
@pytest.mark.parametrize("codec", TOP)
def test_tiles_do_not_change_values(codec: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_layout, "TILE_ELEMENTS_PER_THREAD", elements)
    for shape in ((5, 6, 9, 4), (7, 5), (0, 6, 3, 3), (0, 5)):
        x, offset, step, _ = some_map(shape)
        codes = Codes(encode(x, offset, step, codec=codec)[0], offset, step, codec)  # type: ignore[arg-type]
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            expected = decode_reference(codes, dtype)
            assert torch.equal(decode(codes, dtype), expected)
    wide = codes.data.new_zeros(7, 2 * codes.data.shape[1])
    assert torch.equal(decode(Codes(wide[:, ::2], offset, step, codes.codec)), offset.expand(7, -1))


def test_encode_writes_into_out_of_any_strides() -> None:
    x, offset, step, _ = some_map((2, 6, 3, 3))
    for codec in TOP:
        stored = stored_bytes(6, codec)
        expected, _ = encode(x, offset, step, codec=codec)
        rows = torch.full((2, 3, 3, 2 * stored), 77, dtype=torch.uint8)
        codes, _ = encode(x, offset, step, codec=codec, out=rows[..., ::2])
        assert codes.data_ptr() == rows.data_ptr()
        assert torch.equal(rows[..., ::2], expected)
        assert (rows[..., 1::2] == 77).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("with_margin", [False, True])
def test_encode_refuses_values_that_are_not_finite(bad: float, with_margin: bool) -> None:
    x, offset, step, margin = some_map((2, 3, 4, 4))
    for channel in (0, 2):  # 0 is the constant channel, which ignores its values
        for given_x in layouts(x.clone().index_put((torch.tensor(1), torch.tensor(channel)), torch.tensor(bad))):
            with pytest.raises(ValueError, match="finite"):
                encode(given_x, offset, step, codec="u8", margin_C=margin if with_margin else None)


def test_huge_finite_values_only_saturate() -> None:
    x = torch.full((2, 3, 4, 4), 3e38)
    codes, count = encode(x, torch.zeros(3), torch.ones(3), codec="u8")
    assert (codes == 254).all()
    assert int(count) == x.numel()


@settings(deadline=None, max_examples=40)
@given(data=st.data(), codec=st.sampled_from(list(TOP)), channels=st.integers(1, 19))
def test_round_trips(data: st.DataObject, codec: str, channels: int) -> None:
    seed = data.draw(st.integers(0, 1 << 30))
    generator = torch.Generator().manual_seed(seed)
    offset = 10 * torch.randn(channels, generator=generator)
    step = 2.0 ** torch.randint(-12, 3, (channels,), generator=generator) * (
        1 + torch.rand(channels, generator=generator)
    )
    every = torch.randint(0, TOP[codec] + 1, (2, channels, 3, 2), generator=generator)
    values = offset[:, None, None] + step[:, None, None] * every
    codes = Codes(encode(values, offset, step, codec=codec)[0], offset, step, codec)  # type: ignore[arg-type]
    # code -> value -> code is exact, value -> code -> value is off by half a step at most
    as_integers = integers(codes.data.numpy(), channels, codec)
    np.testing.assert_array_equal(as_integers, every.permute(0, 2, 3, 1).numpy())
    jitter = (torch.rand(values.shape, generator=generator) - 0.5) * step[:, None, None]
    inside = torch.minimum(torch.maximum(values + jitter, offset[:, None, None]), values.amax())
    inside = torch.minimum(inside, (offset + TOP[codec] * step)[:, None, None])
    packed, saturated = encode(inside, offset, step, codec=codec)
    assert int(saturated) == 0
    back = decode(Codes(packed, offset, step, codec), torch.float64)  # type: ignore[arg-type]
    slack = 1e-6 * (offset.abs() + TOP[codec] * step)
    assert ((back - inside.double()).abs() <= (0.5 * step + slack)[:, None, None]).all()


def test_decode_is_the_formula_in_logical_shape() -> None:
    for shape in ((2, 5, 3, 4), (4, 7)):
        x, offset, step, _ = some_map(shape)
        for codec in TOP:
            data, _ = encode(x, offset, step, codec=codec)
            codes = Codes(data, offset, step, codec)  # type: ignore[arg-type]
            found = integers(data.numpy(), shape[1], codec)
            expected = offset.double().numpy() + step.double().numpy() * found
            expected = expected.transpose(0, 3, 1, 2) if len(shape) == 4 else expected
            assert tuple(codes.shape) == shape
            np.testing.assert_allclose(decode(codes, torch.float64).numpy(), expected, rtol=1e-15)
            np.testing.assert_allclose(decode(codes).numpy(), expected, rtol=2e-7, atol=2e-7)
            assert decode(codes, torch.bfloat16).dtype == torch.bfloat16
            assert torch.equal(as_float(codes), decode(codes))
            if len(shape) == 4:
                assert decode(codes).is_contiguous(memory_format=torch.channels_last)
    assert as_float(torch.ones(2, 3, dtype=torch.float16)).dtype == torch.float32


@pytest.mark.parametrize("codec", TOP)
@pytest.mark.parametrize("with_margin", [False, True])
def test_encode_compiles_in_one_graph(codec: str, with_margin: bool) -> None:
    x, offset, step, margin = some_map((3, 5, 4, 7))
    step[1] = 0
    x[0, 0, 0] = 100.0
    options = {"codec": codec, "margin_C": margin if with_margin else None}
    compiled = torch.compile(encode, fullgraph=True, backend="aot_eager")
    for like_it in (x, x.contiguous(memory_format=torch.channels_last), x.bfloat16()):
        torch._dynamo.reset()
        expected, saturated = encode(like_it, offset, step, **options)
        codes, count = compiled(like_it, offset, step, **options)
        assert torch.equal(codes, expected)
        assert count.dtype == torch.int64
        assert int(count) == int(saturated) > 0
        out = torch.empty_like(expected)
        assert compiled(like_it, offset, step, **options, out=out)[0].equal(expected)
        assert torch.equal(out, expected)
    counts = []
    for value in (offset[2], torch.nan):  # nobody looks while compiled: a NaN counts as saturated
        x[1, 2, 3, 4] = value
        counts.append(int(compiled(x, offset, step, codec=codec)[1]))
    assert counts[1] == counts[0] + 1


def test_encode_of_tensors_that_only_stand_for_others() -> None:
    x, offset, step, _ = some_map((3, 5, 4, 7))
    expected = encode(x, offset, step, codec="u8")
    with FakeTensorMode() as mode:
        codes, count = encode(*(mode.from_tensor(value) for value in (x, offset, step)), codec="u8")
        assert (codes.shape, codes.dtype, count.shape) == (expected[0].shape, torch.uint8, ())
    again = encode(x, offset, step, codec="u8")
    assert torch.equal(again[0], expected[0])
    assert torch.equal(again[1], expected[1])


def test_codes_move_between_devices() -> None:
    codes = Codes(torch.zeros(2, 3, 3, 4, dtype=torch.uint8), torch.zeros(4), torch.ones(4), "u8")
    moved = codes.to("meta")
    assert {moved.data.device.type, moved.offset.device.type, moved.step.device.type} == {"meta"}
    assert moved.device.type == "meta"
    assert moved.shape == codes.shape == (2, 4, 3, 3)


def some_codes() -> Codes:
    x, offset, step, _ = some_map((2, 5, 3, 3))
    return Codes(encode(x, offset, step, codec="u4")[0], offset, step, "u4")


def test_pinning_is_of_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """`DataLoader(pin_memory=True)` calls the same method; here the memory only says that it was asked for."""
    asked: list[Tensor] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: asked.append(self) or self.clone())
    codes = some_codes()
    for pin in (Codes.pin_memory, lambda c: torch_pin_memory([c])[0]):
        pinned = pin(codes)
        for part, source in zip(asked, (codes.data, codes.offset, codes.step), strict=True):
            assert part is source
        asked.clear()
        assert pinned.data.data_ptr() != codes.data.data_ptr()
        assert torch.equal(decode(pinned), decode(codes))
        assert pinned.codec == "u4"


@pytest.mark.gpu
def test_pinned_codes_reach_a_gpu_without_a_wait() -> None:
    codes = some_codes().pin_memory()
    assert all(part.is_pinned() for part in (codes.data, codes.offset, codes.step))
    moved = codes.to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(moved.data.cpu(), codes.data)


def test_the_table_of_codecs_is_what_is_stored() -> None:
    assert {name: (codec.bits, codec.top_code) for name, codec in CODECS.items()} == {
        "f32": (32, None),
        "f16": (16, None),
        "u8": (8, 254),
        "u6": (6, 62),
        "u5": (5, 30),
        "u4": (4, 14),
    }
    x = torch.full((1, 8, 2, 2), 1e6)
    for name, codec in CODECS.items():
        assert (codec.name, codec.quantized) == (name, name in TOP)
        if codec.quantized:
            data, _ = encode(x, torch.zeros(8), torch.ones(8), codec=name)
            assert data.numel() * 8 == x.numel() * codec.bits
            highest = integers(data.numpy(), 8, name)
            assert (highest == codec.top_code).all()
        else:
            with pytest.raises(ValueError, match=r"expected one of \['u4', 'u5', 'u6', 'u8'\]"):
                encode(x, torch.zeros(8), torch.ones(8), codec=name)


def test_what_does_not_fit_is_refused() -> None:
    x, ones = torch.zeros(2, 3, 4, 4), torch.ones(3)
    byte = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    for message, call in [
        (r"u8", lambda: encode(x, ones, ones, codec="f16")),
        (r"\[B, 2, H, W\].*\[2, 3, 4, 4\]", lambda: encode(x, ones[:2], ones[:2], codec="u8")),
        (r"float map", lambda: encode(x.int(), ones, ones, codec="u8")),
        (r"step: expected fp32 \[3\], got torch.float32 \[2\]", lambda: encode(x, ones, ones[:2], codec="u8")),
        (r"margin expected \[3\], got \[1\]", lambda: encode(x, ones, ones, codec="u8", margin_C=ones[:1])),
        (r"out expected uint8 \[2, 4, 4, 2\]", lambda: encode(x, ones, ones, codec="u4", out=byte)),
        (r"expected uint8 \[B, H, W, 2\]", lambda: Codes(byte, ones, ones, "u4")),
        (r"expected uint8", lambda: Codes(byte.float(), ones, ones, "u8")),
        (r"offset: expected fp32", lambda: Codes(byte, ones.double(), ones, "u8")),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
