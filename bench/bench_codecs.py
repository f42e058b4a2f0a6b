"""What does a codec cost, and what does it lose, on real maps? Every codec on the taps that caches hold.

    python bench/bench_codecs.py DATA TEACHER.pt ... [--model zoo/wrn-16-2] [--out bench/results_codecs.csv]
    python bench/bench_codecs.py --tiny               digits and a small network; nothing is written

DATA is a folder with CIFAR-100's train.bin and test.bin. Scales are fitted as `feedfast cache` fits them, on 2,048
augmented training images; errors are of 512 others, averaged over the teachers. Times are of some rows of the first
teacher, in nanoseconds per value, with a student's map in fp32. Codecs take turns in every round and the least of all
rounds counts, because other work on a machine only ever adds; the fewer rows, the more rounds nothing interrupts.

    error            relative root mean square; of the worst channel
    bytes            per value, as stored raw; how many times smaller zstd makes a block, and GB/s of its decoder
    encode, decode   a map to its stored bytes, and those to an fp32 map
    the losses       forward and backward, from the stored bytes themselves

The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from paired import environment, record
from torch import Tensor

from feedfast.cli import configure_logging
from feedfast.data.loader import Loader
from feedfast.models.build import build_model
from feedfast.recipe import Recipe, parse_recipe
from feedfast.report.compare import print_table
from feedfast.stages.data import open_train, pixel_loader, view_plan
from feedfast.stages.demo import write_digits
from feedfast.stages.ensemble import FrozenTeacher, is_signed, load_teachers
from feedfast.stages.pilot import fit_values, pilot_pixels, tap_row_bytes, thin
from feedfast.stages.record import encode_rows
from feedfast.storage.blocks import compress_block, decompress
from feedfast.storage.layout import block_rows_for
from feedfast.storage.schema import CodecName
from feedfast_kernels import Codes, Target, connector_partial_l2, decode, normalized_l1, partial_l2
from feedfast_kernels.codes import is_quantized

log = logging.getLogger("feedfast.bench")

RESULTS = Path(__file__).with_name("results_codecs.csv")
CODECS: tuple[CodecName, ...] = get_args(CodecName)
TAPS = ["ofd+margin", "final"]
GRANULE = 64
TIMES = ("encode", "decode", "partial_l2", "connector_partial_l2", "normalized_l1")
COLUMNS = (
    "date", "commit", "device", "torch", "threads", "model", "teachers", "batch", "tap", "shape", "codec", "error",
    "worst_channel_error", "bytes_per_value", "zstd_shrinks", "zstd_decode_gbps", *(f"{name}_ns" for name in TIMES),
)  # fmt: skip


def recipe_of(args: argparse.Namespace, folder: Path) -> Recipe:
    """Data and teachers; nothing of it is cached."""
    data = {"train": str(args.data / "train.bin"), "val": str(args.data / "test.bin"), "limit": args.limit}
    teachers = [str(path) for path in args.teachers]
    if args.tiny:
        train, val = write_digits(folder)
        data, teachers = {"train": str(train), "val": str(val), "size": 16, "limit": 10}, [str(folder / "random.pt")]
        torch.save(build_model(args.model, num_classes=10, seed=0).state_dict(), teachers[0])
    return parse_recipe(
        {
            "data": data,
            "cache": {"batch": args.batch, "path": str(folder / "none.zarr")},
            "teachers": [
                {"name": f"teacher-{i}", "model": args.model, "weights": weights, "taps": TAPS}
                for i, weights in enumerate(teachers, start=1)
            ],
        }
    )


@dataclass(frozen=True)
class Sample:
    """Of one tap: values [n, C] to fit and to measure with, as they are encoded, and the first held-out maps."""

    fit: np.ndarray
    unseen: np.ndarray
    maps: Tensor


def samples_of(teacher: FrozenTeacher, fit: list[Tensor], unseen: list[Tensor]) -> dict[str, Sample]:
    """Every tap's, in one pass over the pilot's pixels."""
    teacher.fit_margins(fit)
    parts: dict[str, list[list[np.ndarray]]] = {tap: [[], []] for tap in teacher.requests}
    first: dict[str, Tensor] = {}
    for number, group in enumerate((fit, unseen)):
        for images in group:
            maps = teacher(images)
            for tap, kept in parts.items():
                values = thin(maps[tap].cpu(), len(group))
                kept[number].append(teacher.transform(tap).teacher(torch.from_numpy(values)).numpy())
                if number:
                    first.setdefault(tap, maps[tap].cpu())
    return {tap: Sample(*map(np.concatenate, kept), first[tap]) for tap, kept in parts.items()}


def fitted(
    teacher: FrozenTeacher, tap: str, codec: CodecName, sample: Sample
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Offset and step of a tap, and its measured error."""
    signed = is_signed(teacher.requests[tap].tap)
    given = (sample.fit, sample.unseen, sample.maps[:2], codec, teacher.transform(tap), "raw")
    (offset, step), _, error = fit_values(*given, signed=signed)
    return torch.from_numpy(offset), torch.from_numpy(step), error


def target_of(stored: Tensor, codec: CodecName, offset: Tensor, step: Tensor) -> Target:
    """Stored rows as a loss takes them."""
    return Codes(stored, offset, step, codec) if is_quantized(codec) else stored.movedim(-1, 1)


def calls_of(
    values: Tensor, teacher: FrozenTeacher, tap: str, codec: CodecName, offset: Tensor, step: Tensor
) -> dict[str, Callable[[], object]]:
    """What is timed, by the names of `TIMES`."""
    transform = teacher.transform(tap)
    stored, _ = encode_rows(values, codec, offset, step, transform)
    target = target_of(torch.from_numpy(stored), codec, offset, step)
    margin = transform.floor(values.device)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(values.shape, generator=generator) * values.std()
    student = (values + noise).contiguous(memory_format=torch.channels_last).requires_grad_()
    gamma, beta = values.std((0, 2, 3)).requires_grad_(), values.mean((0, 2, 3)).requires_grad_()
    leaves = (student, gamma, beta)

    def stepped(loss: Callable[[], Tensor]) -> Callable[[], object]:
        def call() -> None:
            for leaf in leaves:
                leaf.grad = None
            loss().backward()  # type: ignore[no-untyped-call]

        return call

    return {
        "encode": lambda: encode_rows(values, codec, offset, step, transform),
        "decode": lambda: decode(target) if isinstance(target, Codes) else target.float(),
        "partial_l2": stepped(lambda: partial_l2(student, target, margin_C=margin)),
        "connector_partial_l2": stepped(lambda: connector_partial_l2(student, target, gamma, beta, margin_C=margin)),
        "normalized_l1": stepped(lambda: normalized_l1([student], [target], reduction="mean")),
    }


def least_ns(calls: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Of each the least time, taken in turns; the first round warms up."""
    least = [float("inf")] * len(calls)
    for number in range(rounds + 1):
        for index, call in enumerate(calls):
            begin = time.perf_counter_ns()
            call()
            if number:
                least[index] = min(least[index], time.perf_counter_ns() - begin)
    return least


def of_zstd(stored: np.ndarray, block_rows: int, rounds: int) -> tuple[float, float]:
    """How many times smaller level 1 makes a block, and GB/s of decoded bytes."""
    block = np.ascontiguousarray(stored[:block_rows]).reshape(-1).view(np.uint8)
    frame, out = compress_block(block, "zstd"), np.empty_like(block)
    (took,) = least_ns([lambda: decompress(frame, "zstd", out)], rounds)
    return block.nbytes / len(frame), block.nbytes / took


def rows_of(
    teachers: Sequence[FrozenTeacher], loader: Loader, pilot: int, timed: int, rounds: int
) -> list[dict[str, Any]]:
    """A row for every tap and codec."""
    fit, unseen, _ = pilot_pixels(loader, pilot)
    samples = [samples_of(teacher, fit, unseen) for teacher in teachers]
    rows = []
    for tap in teachers[0].requests:
        log.info("bench: %s, %s", tap, list(teachers[0].shapes[tap]))
        found = {
            codec: [fitted(teacher, tap, codec, own[tap]) for teacher, own in zip(teachers, samples, strict=True)]
            for codec in CODECS
        }
        maps = samples[0][tap].maps
        batch = maps[:timed]
        made = {codec: calls_of(batch, teachers[0], tap, codec, *found[codec][0][:2]) for codec in CODECS}
        times = {name: least_ns([made[codec][name] for codec in CODECS], rounds) for name in TIMES}
        for index, codec in enumerate(CODECS):
            offset, step, _ = found[codec][0]
            stored, _ = encode_rows(maps, codec, offset, step, teachers[0].transform(tap))
            errors = [error for *_, error in found[codec]]
            shape = teachers[0].shapes[tap]
            shrinks, decoding = of_zstd(stored, block_rows_for(tap_row_bytes(shape, codec), GRANULE), rounds)
            rows.append(
                {
                    "batch": len(batch),
                    "tap": tap,
                    "shape": "x".join(map(str, shape)),
                    "codec": codec,
                    "error": statistics.mean(error["relative_rms_error"] for error in errors),
                    "worst_channel_error": max(error["worst_channel_rms_error"] for error in errors),
                    "bytes_per_value": stored.nbytes / maps.numel(),
                    "zstd_shrinks": shrinks,
                    "zstd_decode_gbps": decoding,
                    **{f"{name}_ns": times[name][index] / batch.numel() for name in TIMES},
                }
            )
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The table for people, per tap."""
    for tap in dict.fromkeys(row["tap"] for row in rows):
        lines = [
            {
                "codec": row["codec"],
                "error": f"{row['error']:.2%}",
                "bytes per value": f"{row['bytes_per_value']:.3f}",
                "zstd": f"{row['zstd_shrinks']:.2f}",
                **{f"{name}, ns": f"{row[f'{name}_ns']:.2f}" for name in TIMES},
            }
            for row in rows
            if row["tap"] == tap
        ]
        print_table(f"{tap}, {next(row['shape'] for row in rows if row['tap'] == tap)}", lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, nargs="?", default=Path("data"))
    parser.add_argument("teachers", type=Path, nargs="*", help="weights that feedfast saved (student.pt)")
    parser.add_argument("--model", default="zoo/wrn-16-2")
    parser.add_argument("--limit", type=int, default=32, help="images per class")
    parser.add_argument("--pilot", type=int, default=2048, help="images that scales are fitted on")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--timed", type=int, default=128, help="rows that are timed")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--tiny", action="store_true", help="digits: does it run?")
    args = parser.parse_args(arguments)
    if args.tiny:
        args.model, args.pilot, args.batch, args.rounds = "zoo/wrn-10-1", 32, 16, 1
    elif not args.teachers:
        parser.error("expected the weights of one teacher at least, found none")
    configure_logging()
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(args, Path(folder))
        data, device = open_train(recipe), torch.device("cpu")
        teachers = list(load_teachers(recipe, len(data.classes), device).values())
        loader = pixel_loader(data, view_plan(recipe.data, recipe.seed), args.batch, device)
        rows = rows_of(teachers, loader, args.pilot, args.timed, args.rounds)
    about = {
        **environment(),
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "model": args.model,
        "teachers": len(teachers),
    }
    if not args.tiny:
        for row in rows:
            record({**about, **row}, COLUMNS, args.out)
    show(rows)
    print(json.dumps({**about, "rows": rows}))


if __name__ == "__main__":
    main()
