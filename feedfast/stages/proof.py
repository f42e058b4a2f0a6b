"""Proof that a cache still says what its teachers would say: plan, pixels and maps, checked against a live run.

Three checks of rising cost. *Plan*: the stored order, crops and flips equal those the plan gives today (no
decoding). *Replay*: blocks of pixels are decoded again and compared with the checksum taken when the teachers saw
them; a difference means another decoder, another version or another data set, and the message shows both sides'
versions. *Teachers*: a share of the rows is run through the teachers again, encoded again and compared with what is
stored, so that what the codec loses is no difference.

Training runs the first two by itself; `feedfast verify` offers all three, after the checksums. Which blocks and rows
are looked at differs from run to run: what the first run missed, a later one may find.
"""

from __future__ import annotations

import logging
from typing import cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from feedfast.data.augment import crop_of, operations_of
from feedfast.data.dataset import Dataset
from feedfast.data.loader import Loader
from feedfast.data.views import Augment, ViewPlan
from feedfast.data.work import boxes_of, refuse_unfit
from feedfast.errors import CacheDamageError, CacheMismatchError, RequestError
from feedfast.files import parse_json
from feedfast.recipe import TaskName
from feedfast.stages.data import Selection
from feedfast.stages.ensemble import FrozenTeacher
from feedfast.stages.probe import refuse_other_probe
from feedfast.stages.progress import Meter
from feedfast.stages.record import committed_sums, encode_rows, other_pixels
from feedfast.stages.sampling import sampling_of_manifest
from feedfast.storage import names
from feedfast.storage.blocks import row_sums
from feedfast.storage.layout import array_specs
from feedfast.storage.log import Problem, problem
from feedfast.storage.reader import CacheReader
from feedfast.storage.schema import CodecName
from feedfast.storage.transform import Transform, transform_of
from feedfast_kernels import Codes, decode
from feedfast_kernels.codes import is_quantized

log = logging.getLogger(__name__)

MIN_COSINE = 0.999
BLOCK_ROWS = 32  # rows decoded again together


def check_views(reader: CacheReader, data: Dataset, plan: ViewPlan, views: int) -> None:
    """Raise unless labels are those of the data, and order, crops and flips of the first ``views`` views the plan's.

    Raises:
        CacheDamageError: an array was changed.
    """
    refuse_unfit(plan, data.annotations)
    stored = reader.read_array(names.LABEL)[data.ids]
    if not np.array_equal(stored, data.labels):
        position = int(np.flatnonzero(stored != data.labels)[0])
        detail = (
            f"sample {data.ids[position]}: expected {data.labels[position]} as in the data, found {stored[position]}"
        )
        raise CacheDamageError(
            f"{reader.path}: {names.LABEL}: {detail}", [problem(names.LABEL, "c/0", "labels", detail)]
        )
    for view in range(views):
        order = plan.order(view, data.ids)
        positions = np.searchsorted(data.ids, order)
        expected = {"order": order, **plan.resolved(view, order, data.sizes[positions], boxes_of(data, positions))}
        for array in reader.manifest.plan.arrays:
            name = array.removeprefix("views/")
            want = expected[name]
            stored = reader.read_array(array, view)
            if not np.array_equal(stored, want):
                row = int(np.flatnonzero((stored != want).reshape(len(want), -1).any(axis=1))[0])
                detail = (
                    f"view {view}, row {row}: expected {want[row].tolist()} as the plan gives it, "
                    f"found {stored[row].tolist()}"
                )
                raise CacheDamageError(
                    f"{reader.path}: views/{name}: {detail}", [problem(f"views/{name}", str(view), "plan", detail)]
                )


def content_of(reader: CacheReader, data: Dataset) -> NDArray[np.uint64]:
    """What `Dataset.content` said of each sample when the cache was made, by position: for `Loader`.

    Raises:
        CacheDamageError: not committed, or damaged.
    """
    found: NDArray[np.uint64] = reader.read_array(names.CONTENT)[data.ids]
    return found


def replay_pixels(reader: CacheReader, data: Dataset, plan: ViewPlan, *, blocks: int, views: int) -> int:
    """Decode ``blocks`` blocks of pixels again, spread over the views, and compare checksums.

    Decoding here is always that of the CPU or GPU the manifest names, whatever the training device is.

    Returns:
        How many blocks were compared; 0 only where none was asked for.

    Raises:
        CacheMismatchError: a sample's stored bytes or pixels differ; the message names it, or holds both sides' library
            versions. Or nothing could be compared: the manifest names a GPU and there is none.
    """
    if not blocks:
        return 0
    manifest = reader.manifest
    rng = np.random.default_rng()
    device = "cuda" if manifest.decoder.backend == "dali-mixed" else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise CacheMismatchError(
            f"{reader.path}: its images were decoded on a GPU, and none is here to decode {blocks} blocks again and "
            "compare; run this on a machine with a GPU, or ask for no comparison (train.replay=0)"
        )
    loader = Loader(data, plan, batch_size=BLOCK_ROWS, device=device, content=content_of(reader, data))
    compared = 0
    try:
        for view in sorted(rng.choice(views, size=min(views, blocks), replace=False).tolist()):
            sums, known = committed_sums(reader, view)
            starts = np.arange(0, manifest.num_rows, BLOCK_ROWS)
            starts = starts[np.logical_and.reduceat(known, starts)]
            share = -(-blocks // min(views, blocks))
            picked = rng.choice(starts, size=min(share, len(starts)), replace=False) if len(starts) else starts
            for start in sorted(picked.tolist()):
                rows = np.arange(start, min(start + BLOCK_ROWS, manifest.num_rows))
                found = np.concatenate([row_sums(batch.images.cpu().numpy()) for batch in loader.stream(view, rows)])
                if (found != sums[rows]).any():
                    raise other_pixels(reader, view, rows[found != sums[rows]], loader.describe())
                compared += 1
    finally:
        loader.close()
    if not compared:
        raise CacheMismatchError(
            f"{reader.path}: {names.SUMS}: expected the checksums of at least one block of pixels to compare with, "
            "found none; run `feedfast cache` with this recipe to complete it"
        )
    return compared


def recompute_teachers(
    reader: CacheReader,
    data: Dataset,
    plan: ViewPlan,
    teachers: dict[str, FrozenTeacher],
    percent: float,
) -> tuple[list[Problem], dict[str, float]]:
    """Run ``percent`` % of the batches of every view through the teachers again and compare with what is stored.

    A map, encoded and decoded, must agree with the stored one to a cosine of at least `MIN_COSINE` (float64), for every
    batch. Batches are the cache's own, so a teacher on batch statistics can be checked too. A cosine does not see a
    factor, so what the teachers compute on the first batch is also compared with the probe in the manifest.

    Returns:
        The problems, and per array the smallest cosine of a stored batch with the teacher's exact maps: that one shows
        what the codec loses, coarse steps and values out of its range included.
    """
    manifest = reader.manifest
    size, total = manifest.batch_rows, -(-manifest.num_rows // manifest.batch_rows)
    picks = max(1, round(percent / 100 * total))
    sampling = sampling_of_manifest(manifest, reader.path)
    problems: list[Problem] = []
    smallest: dict[str, float] = {}
    loader = Loader(data, plan, batch_size=size, content=content_of(reader, data))
    rng = np.random.default_rng()
    if not teachers:
        problems.append(problem("", "", "teacher", "there is no teacher to compare with"))
    problems += _other_probes(reader, loader, teachers)
    with Meter("recompute", picks * size * manifest.views) as meter:
        for view in range(manifest.views):
            chosen = np.sort(rng.choice(total, size=picks, replace=False))
            parts = [np.arange(number * size, min((number + 1) * size, manifest.num_rows)) for number in chosen]
            rows = np.concatenate(parts)
            for batch in loader.stream(view, rows):
                places = sampling.places(view, batch.ids, torch.device("cpu"))
                for name, teacher in teachers.items():
                    for tap, values in teacher(batch.images).items():
                        if tap not in manifest.teachers[name].taps:
                            continue
                        array = names.codes(name, tap)
                        stored = stored_values(reader, name, tap, view, batch.rows)
                        values = sampling.gathered(name, tap, values.cpu(), places)
                        exact = transform_of(manifest.teachers[name].taps[tap]).teacher(values)
                        smallest[array] = min(smallest.get(array, 1.0), _cosine(exact, stored))
                        cosine = _cosine(_encoded(reader, name, tap, exact), stored)
                        if not cosine >= MIN_COSINE:
                            spec = array_specs(manifest)[array]
                            shard = spec.key(view, int(batch.rows[0]) // spec.shard_rows)
                            detail = (
                                f"rows {batch.rows[0]}..{batch.rows[-1]}: cosine {cosine:.6f} with the recomputed "
                                f"maps, expected at least {MIN_COSINE}"
                            )
                            problems.append(problem(array, shard, "teacher", detail))
                meter.advance(len(batch.rows))
    loader.close()
    return problems, smallest


def _other_probes(reader: CacheReader, loader: Loader, teachers: dict[str, FrozenTeacher]) -> list[Problem]:
    manifest = reader.manifest
    if loader.describe()["backend"] != manifest.decoder.backend:
        log.warning("verify: %s was decoded on a GPU; its teachers' probes are not compared here", reader.path)
        return []
    first = next(iter(loader.stream(0, np.arange(min(manifest.num_rows, loader.batch_size))))).images
    problems = []
    for name, teacher in teachers.items():
        stored = manifest.teachers[name]
        try:
            refuse_other_probe(name, stored.precision, stored.probe, teacher.probe(first))
        except CacheMismatchError as error:
            problems.append(problem(names.codes(name, names.LOGITS), "", "teacher", str(error)))
    return problems


def stored_values(reader: CacheReader, teacher: str, tap: str, view: int, rows: np.ndarray) -> torch.Tensor:
    """Decoded float32 maps [row, channel, height, width] of a cache, [row, channel, position] or [row, channel]."""
    codec = reader.manifest.teachers[teacher].taps[tap].codec
    stored = torch.from_numpy(reader.read_rows(names.codes(teacher, tap), view, rows))
    return decode_rows(stored, codec, *scale_of(reader, teacher, tap))


def scale_of(reader: CacheReader, teacher: str, tap: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Offset and step [channel] of a stored tap; read from the cache, so ask once."""
    offset, step = (torch.from_numpy(row.copy()) for row in reader.scale(teacher, tap))
    return offset, step


def decode_rows(rows: torch.Tensor, codec: CodecName, offset: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Stored rows of a tap, channels last, as float32 [row, channel, …]: height and width, tokens, or nothing more."""
    if is_quantized(codec):
        return decode(Codes(rows, offset, step, codec))
    return rows.float().movedim(-1, 1)


def _encoded(reader: CacheReader, teacher: str, tap: str, values: torch.Tensor) -> torch.Tensor:
    """``values`` as the cache would give them back, by the operations that wrote and read it."""
    codec = reader.manifest.teachers[teacher].taps[tap].codec
    offset, step = scale_of(reader, teacher, tap)
    rows, _ = encode_rows(values, codec, offset, step, Transform())
    return decode_rows(torch.from_numpy(rows), codec, offset, step)


def _cosine(live: torch.Tensor, stored: torch.Tensor) -> float:
    live, stored = live.reshape(-1).double(), stored.reshape(-1).double()
    norm = float(live.norm() * stored.norm())
    return float(live @ stored) / norm if norm else float(torch.equal(live, stored))


def selection_of(reader: CacheReader) -> Selection:
    """Which images were taken, and where they were. Whoever opens those paths must have been told by a person.

    Raises:
        RequestError: the manifest does not say.
    """
    try:
        source = parse_json(reader.manifest.dataset.source)
        # caches made before there were fractions do not name one
        fraction = float(source.get("fraction", 1.0))
        arrays = tuple(str(name) for name in source.get("arrays", ()))
        task = get_args(TaskName)[get_args(TaskName).index(source.get("task", "classify"))]
        return Selection(tuple(str(path) for path in source["train"]), int(source["limit"]), fraction, arrays, task)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise RequestError(f"{reader.path}: the manifest does not say where the images are; give --recipe") from None


def source_of(reader: CacheReader) -> Selection:
    """`selection_of` a cache that lies where it was made; the paths are logged before anything is opened.

    Raises:
        RequestError: the manifest does not say, or the cache was copied or made elsewhere: its paths are a stranger's.
    """
    chosen = selection_of(reader)
    where = ", ".join(chosen.train)[:500]
    if not reader.original:
        raise RequestError(
            f"{reader.path}: was copied or made elsewhere, and what its manifest names is not opened by itself: "
            f"{where}. Say where the images are: feedfast verify --recipe, or open_cache(path, data=...)"
        )
    log.info("images: %s, as the manifest of %s names them", where, reader.path)
    return chosen


def plan_of(reader: CacheReader) -> ViewPlan:
    """The view plan a manifest describes."""
    plan = reader.manifest.plan
    return ViewPlan(
        seed=plan.seed,
        size=plan.size,
        augment=cast(Augment, plan.augment),  # ViewPlan itself refuses other words
        flip=plan.flip,
        pad=-1 if plan.pad is None else plan.pad,
        scale=plan.scale,
        ratio=plan.ratio,
        granule=plan.granule,
        window=plan.window,
        operations=() if plan.operations is None else operations_of(plan.operations.listed, plan.operations.table),
        crop=None if plan.crop is None else crop_of(plan.crop),
    )
