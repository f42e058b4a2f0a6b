"""The DALI graph of a view's pixels: decode, box, resize, window, mirror, the program's steps, mixing.

All that differs from sample to sample comes in as an input; nothing here draws a number. A step of the program is a
conditional: DALI splits the batch by code, runs each operator on the samples that have it, and puts the batch together
again, so a sample's bytes depend on its own parameters alone and cost only what it uses.

Pixels are uint8 [H, W, 3] throughout; every step rounds and saturates, as torchvision's do on uint8 images. Where
DALI's operators are not torchvision's: hue turns in YIQ (torchvision: HSV), equalize is OpenCV's, the border of a
sharpened image repeats the edge (PIL leaves it as it was). DALI's autograph rewrites these functions: plain syntax.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feedfast.data.dali import load_dali
from feedfast.data.geometry import Geometry
from feedfast.data.operations import PixelOperation
from feedfast.data.steps import CODES
from feedfast.data.views import ViewPlan
from feedfast.data.work import Work

__all__ = ["FLAGS", "MIXED_FLAGS", "Stored", "build_pipeline"]

Node = Any  # a DALI DataNode; DALI's stubs know no operators on it

FLAGS: dict[str, Any] = {
    "output_type": "RGB",
    "adjust_orientation": True,
    "use_fast_idct": False,
    "resize": "linear, antialias=True, subpixel_scale=False",
}
# All images on one decoder, and chroma upsampled as on the CPU. The two backends still differ by rounding, so
# `Loader.describe` names the backend and a cache remembers it.
MIXED_FLAGS: dict[str, Any] = {"hw_decoder_load": 0.0, "jpeg_fancy_upsampling": True}


@dataclass(frozen=True)
class Stored:
    """How the bytes that come in are to be read: encoded ``files``, or pixels, in planes (CHW) or not."""

    files: bool
    planar: bool


@dataclass(frozen=True)
class Slot:
    """One step of the program: the codes that it may have, and what its operation says for all samples."""

    codes: tuple[int, ...]
    static: Mapping[str, Any]


def _slots(operations: Sequence[PixelOperation]) -> list[Slot]:
    return [Slot(codes, op.model_dump()) for op in operations for codes in op.emits_by_slot]


Source = Callable[[list[NDArray[Any]]], Callable[[], tuple[Any, ...]]]


def build_pipeline(
    plan: ViewPlan,
    work: Work,
    stored: Stored,
    source: Source,
    *,
    batch_size: int,
    threads: int,
    prefetch: int,
    device_id: int | None,
) -> Any:
    """The one pipeline: source → decode (region) → box → resize → window → mirror → steps → mixing → uint8 NHWC.

    Args:
        plan: gives size and operations.
        work: every row that will be asked for, in order.
        stored: what ``source`` hands over.
        source: from arrays of parameters to DALI's source callback: per call the next batch's bytes, its partners'
            bytes where there are partners, and of each array the batch's rows.
        batch_size: rows per batch.
        threads: DALI's CPU threads.
        prefetch: batches DALI works ahead.
        device_id: of the GPU; None for the CPU.
    """
    dali, fn, types = load_dali()
    gpu = device_id is not None
    slots = _slots(plan.pixel_operations)
    # Per-sample parameters, only those that are used: DALI warns about the others.
    params = _image_parameters(plan.size, slots, work, "")
    images = [work]
    if work.partner is not None and work.mixing is not None:
        images.append(work.partner)
        params |= _image_parameters(plan.size, slots, work.partner, "partner_")
        boxed = work.mixing.box[:, 2:].all(axis=1)
        params["mixed"] = np.where(boxed, 2, work.mixing.weight < 1).astype(np.int32)
        params["weight"] = work.mixing.weight
        params["mix_corner"], params["mix_extent"] = (
            work.mixing.box[:, :2].astype(np.float32),
            work.mixing.box[:, 2:].astype(np.float32),
        )

    names = list(params)
    feed = dali.pipeline.do_not_convert(source(list(params.values())))

    @dali.pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=batch_size,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=prefetch,
        enable_conditionals=bool(plan.operations),
    )
    def pixels() -> Node:
        bytes_in = len(images)
        layout = "" if stored.files else ("CHW" if stored.planar else "HWC")
        nodes = fn.external_source(
            source=feed,
            num_outputs=bytes_in + len(params),
            batch=True,
            dtype=[types.UINT8] * bytes_in
            + [types.FLOAT if array.dtype == np.float32 else types.INT32 for array in params.values()],
            ndim=[1 if stored.files else 3] * bytes_in + [array.ndim - 1 for array in params.values()],
            layout=[layout] * bytes_in + [""] * len(params),
        )
        given = {name: nodes[bytes_in + place] for place, name in enumerate(names)}
        x = _image(nodes[0], plan, slots, work, given, "", stored, gpu)
        if bytes_in == 2:
            partner = _image(nodes[1], plan, slots, images[1], given, "partner_", stored, gpu)
            x = run_mixing(x, partner, given, gpu)
        return x

    pipeline = pixels()
    pipeline.build()
    return pipeline


def _image_parameters(size: int, slots: Sequence[Slot], work: Work, prefix: str) -> dict[str, NDArray[Any]]:
    """What differs from sample to sample, by input name."""
    geometry = work.geometry
    params: dict[str, NDArray[Any]] = {}
    if geometry.boxed:
        params["box_corner"] = geometry.box[:, :2]
        if not _same_extent(geometry):
            params["box_extent"] = geometry.box[:, 2:]
    if geometry.scaled:
        params["resized"] = geometry.resized.astype(np.float32)  # DALI takes sizes as floats
    if geometry.windowed(size):
        params["window"] = geometry.window
    if geometry.mirrored:
        params["flip"] = geometry.flip
    if work.program is not None:
        for slot, (code, values) in enumerate(
            zip(work.program.codes.T, work.program.parameters.swapaxes(0, 1), strict=True)
        ):
            names = {CODES[number] for number in slots[slot].codes}
            if len(names) > 1:
                params[f"code{slot}"] = code.astype(np.int32)
            if names - {"identity", "affine", "erase", "permute-channels", "invert", "auto-contrast", "equalize"}:
                params[f"value{slot}"] = values[:, 0]
            if "affine" in names:
                params[f"matrix{slot}"] = values.reshape(-1, 2, 3)
            if "permute-channels" in names:
                params[f"mixing{slot}"] = np.eye(3, dtype=np.float32)[values[:, :3].astype(np.int64)]
            if "erase" in names:
                params[f"corner{slot}"], params[f"extent{slot}"] = values[:, :2], values[:, 2:4]
    return {prefix + name: array for name, array in params.items()}


def _same_extent(geometry: Geometry) -> bool:
    """Whether all boxes are of one size: then it is a constant, one input less to copy per sample."""
    extent = geometry.box[:, 2:]
    return bool(np.all(extent == extent[0]))


def _image(
    data: Node,
    plan: ViewPlan,
    slots: Sequence[Slot],
    work: Work,
    inputs: Mapping[str, Node],
    prefix: str,
    stored: Stored,
    gpu: bool,
) -> Node:
    """One image of each sample, before mixing."""
    _, fn, types = load_dali()
    geometry = work.geometry
    given = {name.removeprefix(prefix): node for name, node in inputs.items() if name.startswith(prefix)}
    extent = geometry.box[0, 2:].tolist() if _same_extent(geometry) else given.get("box_extent")
    # On the GPU images are decoded whole and then cut: nvImageCodec's GPU region decoding fails on ordinary boxes
    # in some 0.9 builds (nvImageCodec issue 55), and a crash cannot be caught.
    region = stored.files and geometry.boxed and not geometry.padded and not gpu
    decode = {"output_type": types.RGB, "adjust_orientation": True, "use_fast_idct": False}
    if region:
        x = fn.decoders.image_slice(data, given["box_corner"], extent, axis_names="HW", device="cpu", **decode)
    elif stored.files:
        x = fn.decoders.image(data, device="mixed" if gpu else "cpu", **decode, **(MIXED_FLAGS if gpu else {}))
    else:
        x = data.gpu() if gpu else data
    if geometry.boxed and not region:
        policy = "pad" if geometry.padded else "error"
        x = fn.slice(x, given["box_corner"], extent, axis_names="HW", out_of_bounds_policy=policy, fill_values=0)
    if geometry.scaled:
        # sizes are explicit, and subpixel_scale only acts where DALI computes them
        x = fn.resize(x, size=given["resized"], interp_type=types.INTERP_LINEAR, antialias=True, subpixel_scale=False)
    if "window" in given:
        x = fn.slice(
            x, given["window"], [plan.size, plan.size], axis_names="HW",
            out_of_bounds_policy="pad" if geometry.overhung(plan.size) else "error", fill_values=list(plan.fill),
        )  # fmt: skip
    if geometry.mirrored or stored.planar:
        # mean 0, std 1: a copy that mirrors and turns planes into pixels in one go, exact for uint8
        mirror = {"mirror": given["flip"]} if geometry.mirrored else {}
        x = fn.crop_mirror_normalize(x, dtype=types.UINT8, output_layout="HWC", **mirror)
    if work.program is not None:
        x = run_program(x, slots, given, gpu)
    return x


_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # PIL's ImageFilter.SMOOTH


_INPUTS = ("code", "value", "matrix", "mixing", "corner", "extent")


def run_program(x: Node, slots: Sequence[Slot], given: Mapping[str, Node], gpu: bool) -> Node:
    """All steps of each sample.

    Args:
        x: images, uint8 HWC.
        slots: what each step may be.
        given: per slot s ``code{s}`` int32, and of those that are needed ``value{s}`` float32, ``matrix{s}`` float32
            [2, 3], ``mixing{s}`` float32 [3, 3], ``corner{s}`` and ``extent{s}`` float32 [2].
        gpu: whether images are on the GPU.
    """
    for number, slot in enumerate(slots):
        own = {name: given.get(f"{name}{number}") for name in _INPUTS}
        x = _choose(x, slot.codes, own, slot.static, gpu)
    return x


def run_mixing(x: Node, partner: Node, inputs: Mapping[str, Node], gpu: bool) -> Node:
    """Images mixed with their partners.

    Args:
        x: images, uint8 HWC.
        partner: those of the partners.
        inputs: ``mixed`` int32 (0 = not, 1 = the whole image, 2 = a box), ``weight`` float32, ``mix_corner`` and
            ``mix_extent`` int32 [2].
        gpu: whether images are on the GPU.
    """
    _, fn, _ = load_dali()
    if inputs["mixed"] == 0:
        y = x
    else:
        if inputs["mixed"] == 1:
            weight = _here(inputs["weight"], gpu)
            y = fn.cast_like(x * weight + partner * (1.0 - weight), x)
        else:
            # exact in bytes: what is left of the partner once everything but the box is taken away is added to a hole
            box = {"anchor": inputs["mix_corner"], "shape": inputs["mix_extent"], "axis_names": "HW"}
            y = fn.erase(x, **box) + (partner - fn.erase(partner, **box))
            y = fn.cast_like(y, x)
    return y


def _choose(x: Node, codes: tuple[int, ...], own: Mapping[str, Node], static: Mapping[str, Any], gpu: bool) -> Node:
    """One step: a binary search over the codes that the slot may hold, each level a conditional."""
    if len(codes) == 1:
        return _apply(x, CODES[codes[0]], own, static, gpu)
    middle = len(codes) // 2
    if own["code"] < codes[middle]:
        y = _choose(x, codes[:middle], own, static, gpu)
    else:
        y = _choose(x, codes[middle:], own, static, gpu)
    return y


def _apply(x: Node, name: str, own: Mapping[str, Node], static: Mapping[str, Any], gpu: bool) -> Node:
    """One operator on the samples that have it."""
    dali, fn, types = load_dali()
    clamp = dali.math.clamp
    value = own["value"]
    if name == "identity":
        return x
    if name == "brightness":
        return fn.brightness(x, brightness=value)
    if name == "saturation":
        return fn.saturation(x, saturation=value)
    if name == "hue":
        return fn.hue(x, hue=value)
    if name == "contrast":
        gray = fn.color_space_conversion(x, image_type=types.RGB, output_type=types.GRAY)
        mean = fn.reductions.mean(gray, keep_dims=True)
        return fn.cast_like(clamp(mean + (x - mean) * _here(value, gpu), 0, 255), x)
    if name == "sharpness":
        smooth = fn.filter(x, types.Constant(_SMOOTH, device="gpu" if gpu else "cpu"))
        factor = _here(value, gpu)
        return fn.cast_like(clamp(x * factor + smooth * (1.0 - factor), 0, 255), x)
    if name == "posterize":
        return x & fn.cast(_here(value, gpu), dtype=types.UINT8)
    if name == "solarize":
        return _inverted(x, fn.cast(x >= _here(value, gpu), dtype=types.UINT8))
    if name == "solarize-add":
        low = fn.cast(x < 128, dtype=types.UINT8)
        return fn.cast_like(clamp(x + low * _here(value, gpu), 0, 255), x)
    if name == "invert":
        return x ^ types.Constant(255, dtype=types.UINT8)
    if name == "auto-contrast":
        low = fn.cast(fn.reductions.min(x, axis_names="HW", keep_dims=True), dtype=types.FLOAT)
        span = fn.cast(fn.reductions.max(x, axis_names="HW", keep_dims=True), dtype=types.FLOAT) - low
        flat = fn.cast(span == 0, dtype=types.FLOAT)  # a channel of one value stays as it is
        scale = (255.0 * (1.0 - flat) + flat) / (span + flat)
        return fn.cast_like(clamp((x - low * (1.0 - flat)) * scale, 0, 255), x)
    if name == "equalize":
        return fn.equalize(x)
    if name == "gaussian-blur":
        return fn.gaussian_blur(x, sigma=value, window_size=static["kernel"])
    if name == "affine":
        nearest = static["interpolation"] == "nearest"
        kind = types.INTERP_NN if nearest else types.INTERP_LINEAR
        # fill_value is one number for all channels: what comes from outside is told apart by warping ones along
        warped = fn.warp_affine(x, matrix=own["matrix"], inverse_map=True, interp_type=kind, fill_value=0)
        fill = [float(byte) for byte in static["fill"]]
        if not any(fill):
            return warped
        ones = fn.cast_like((x | 255), x)
        inside = fn.warp_affine(ones, matrix=own["matrix"], inverse_map=True, interp_type=kind, fill_value=0)
        outside = 1.0 - inside / 255.0
        return fn.cast_like(warped + outside * types.Constant(np.array(fill, np.float32)), x)
    if name == "permute-channels":  # a matrix of zeros and ones moves bytes exactly
        return fn.reshape(fn.coord_transform(x, M=own["mixing"], dtype=types.UINT8), layout="HWC")
    assert name == "erase", name
    return fn.erase(
        x, anchor=own["corner"], shape=own["extent"], axis_names="HW", fill_value=[float(b) for b in static["fill"]]
    )


def _inverted(x: Node, where: Node) -> Node:
    """Bytes inverted where ``where`` (uint8 of 0 and 1) says."""
    _, _, types = load_dali()
    return x ^ (where * types.Constant(255, dtype=types.UINT8))


def _here(value: Node, gpu: bool) -> Node:
    """A number per sample where the images are: arithmetic takes operands of one device."""
    return value.gpu() if gpu else value
