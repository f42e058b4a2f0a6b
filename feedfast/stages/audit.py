"""Proof that a cache still says what its teachers would say: plan, pixels and maps, checked against a live run.

Three checks of rising cost. *Plan*: the stored order, crops and flips equal those the plan gives today (no
decoding). *Replay*: blocks of pixels are decoded again and compared with the checksum taken when the teachers saw
them; a difference means another decoder, another version or another data set, and the message shows both sides'
versions. *Teachers*: a share of the rows is run through the teachers again, encoded again and compared with what is
stored, so that what the codec loses is no difference.

Training runs the first two by itself; `feedfast verify` offers all three, after the checksums.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from feedfast.cache import names
from feedfast.cache.codec import dequantize, quantize, row_sums, unpack_u4
from feedfast.cache.layout import array_specs
from feedfast.cache.log import Problem, problem
from feedfast.cache.reader import CacheReader
from feedfast.cache.schema import TapInfo
from feedfast.cache.verify import verify_cache
from feedfast.data.dataset import Dataset, open_dataset
from feedfast.data.loader import Loader
from feedfast.data.views import Augment, ViewPlan
from feedfast.errors import CacheDamageError, CacheMismatchError, RequestError
from feedfast.recipe import Recipe, Teacher, parse_recipe
from feedfast.stages.ensemble import FrozenTeacher
from feedfast.stages.identity import refuse_other_recipe
from feedfast.stages.progress import Meter
from feedfast.stages.record import committed_sums, other_pixels

log = logging.getLogger(__name__)

MIN_COSINE = 0.999
BLOCK_ROWS = 32  # rows decoded again together


def check_views(reader: CacheReader, data: Dataset, plan: ViewPlan, views: int) -> None:
    """Raise unless labels are those of the data, and order, crops and flips of the first ``views`` views the plan's.

    Raises:
        CacheDamageError: an array was changed.
    """
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
        expected: dict[str, np.ndarray] = {
            "order": order,
            "window": plan.crops(view, order, data.sizes[positions]),
            "flip": plan.flips(view, order),
        }
        for name, want in expected.items():
            stored = reader.read_array(f"views/{name}", view)
            if not np.array_equal(stored, want):
                row = int(np.flatnonzero((stored != want).reshape(len(want), -1).any(axis=1))[0])
                detail = (
                    f"view {view}, row {row}: expected {want[row].tolist()} as the plan gives it, "
                    f"found {stored[row].tolist()}"
                )
                raise CacheDamageError(
                    f"{reader.path}: views/{name}: {detail}", [problem(f"views/{name}", str(view), "plan", detail)]
                )


def replay_pixels(
    reader: CacheReader,
    data: Dataset,
    plan: ViewPlan,
    *,
    blocks: int,
    views: int,
    seed: int,
    threads: int | None = None,
) -> int:
    """Decode ``blocks`` blocks of pixels again, spread over the views, and compare checksums.

    Decoding here is always that of the CPU or GPU the manifest names, whatever the training device is.

    Returns:
        How many blocks were compared; 0 where the manifest names a GPU and there is none.

    Raises:
        CacheMismatchError: a sample's stored bytes or pixels differ; the message names it, or holds both sides' library
            versions.
    """
    if not blocks:
        return 0
    manifest = reader.manifest
    rng = np.random.default_rng(seed)
    device = "cuda" if manifest.decoder.backend == "dali-mixed" else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        log.warning("replay: %s was decoded on a GPU and none is here; pixels not compared", reader.path)
        return 0
    loader = Loader(data, plan, batch_size=BLOCK_ROWS, device=device, threads=threads)
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
                _refuse_other_content(reader, data, plan.order(view, data.ids)[rows])
                found = np.concatenate([row_sums(batch.images.cpu().numpy()) for batch in loader.stream(view, rows)])
                if (found != sums[rows]).any():
                    raise other_pixels(reader, view, rows[found != sums[rows]], loader.describe())
                compared += 1
    finally:
        loader.close()
    return compared


def _refuse_other_content(reader: CacheReader, data: Dataset, ids: np.ndarray) -> None:
    """Raise unless the stored bytes of some samples are those the cache was made from."""
    positions = np.searchsorted(data.ids, ids)
    expected, found = reader.read_array(names.CONTENT)[ids], data.content(positions)
    for position in positions[found != expected].tolist():
        raise CacheMismatchError(
            f"{reader.path}: {data.name(position)} (sample {data.ids[position]}): the image has changed since "
            "the cache was made; put the old one back, or cache again"
        )


def recompute_teachers(
    reader: CacheReader,
    data: Dataset,
    plan: ViewPlan,
    teachers: dict[str, FrozenTeacher],
    percent: float,
) -> tuple[list[Problem], dict[str, float]]:
    """Run ``percent`` % of the batches of every view through the teachers again and compare with what is stored.

    A map, encoded and decoded, must agree with the stored one to a cosine of at least `MIN_COSINE` (float64), for every
    batch. Batches are the cache's own, so a teacher on batch statistics can be checked too.

    Returns:
        The problems, and per array the smallest cosine of a stored batch with the teacher's exact maps: that one shows
        what the codec loses, coarse steps and values out of its range included.
    """
    manifest = reader.manifest
    size, total = manifest.batch_rows, -(-manifest.num_rows // manifest.batch_rows)
    picks = max(1, round(percent / 100 * total))
    problems: list[Problem] = []
    smallest: dict[str, float] = {}
    loader = Loader(data, plan, batch_size=size)
    rng = np.random.default_rng(0)
    with Meter("recompute", picks * size * manifest.views) as meter:
        for view in range(manifest.views):
            chosen = np.sort(rng.choice(total, size=picks, replace=False))
            parts = [np.arange(number * size, min((number + 1) * size, manifest.num_rows)) for number in chosen]
            rows = np.concatenate(parts)
            for batch in loader.stream(view, rows):
                for name, teacher in teachers.items():
                    for tap, values in teacher(batch.images).items():
                        if tap not in manifest.teachers[name].taps:
                            continue
                        array = names.codes(name, tap)
                        stored = stored_values(reader, name, tap, view, batch.rows)
                        exact = _floored(values, manifest.teachers[name].taps[tap])
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


def stored_values(reader: CacheReader, teacher: str, tap: str, view: int, rows: np.ndarray) -> torch.Tensor:
    """Decoded float32 maps [row, channel, height, width] (or [row, channel]) of a cache."""
    codes = reader.read_rows(names.codes(teacher, tap), view, rows)
    info = reader.manifest.teachers[teacher].taps[tap]
    if info.codec in ("u8", "u4"):
        offset, step = reader.scale(teacher, tap)
        codes = dequantize(unpack_u4(codes, info.channels) if info.codec == "u4" else codes, offset, step)
    values = torch.from_numpy(np.ascontiguousarray(codes, dtype=np.float32))
    return values.permute(0, 3, 1, 2) if values.dim() == 4 else values


def _floored(values: torch.Tensor, info: TapInfo) -> torch.Tensor:
    """What the codec is given: the map on the CPU, not below OFD's margin where the cache says so."""
    values = values.cpu()
    if info.transform != "margin":
        return values
    return torch.maximum(values, torch.tensor(info.margin).view(1, -1, *[1] * (values.dim() - 2)))


def _encoded(reader: CacheReader, teacher: str, tap: str, values: torch.Tensor) -> torch.Tensor:
    """``values`` as the cache would give them back."""
    info = reader.manifest.teachers[teacher].taps[tap]
    if info.codec not in ("u8", "u4"):
        return values
    offset, step = reader.scale(teacher, tap)
    decoded = dequantize(quantize(values.movedim(1, -1).numpy(), offset, step, info.codec), offset, step)
    return torch.from_numpy(decoded).movedim(-1, 1)


def _cosine(live: torch.Tensor, stored: torch.Tensor) -> float:
    live, stored = live.reshape(-1).double(), stored.reshape(-1).double()
    norm = float(live.norm() * stored.norm())
    return float(live @ stored) / norm if norm else float(torch.equal(live, stored))


def recipe_of(reader: CacheReader) -> Recipe:
    """The recipe a cache can be audited with by itself: its data where they were, its teachers without weights.

    Raises:
        RequestError: the manifest does not say where the data were.
    """
    manifest = reader.manifest
    try:
        source = json.loads(manifest.dataset.source)
        train, limit = [str(path) for path in source["train"]], int(source["limit"])
    except (ValueError, KeyError, TypeError):
        raise RequestError(f"{reader.path}: the manifest does not say where the images are; give --recipe") from None
    plan = manifest.plan
    data = {"train": train, "limit": limit, "size": plan.size, "augment": plan.augment, "flip": plan.flip}
    return parse_recipe(
        {"seed": plan.seed, "data": data, "cache": {"path": str(reader.path), "views": manifest.views}},
        where=str(reader.path),
    )


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
    )


def run_verify(
    cache: str,
    *,
    full: bool = False,
    replay: int = 0,
    teachers_percent: float = 0.0,
    recipe: Recipe | None = None,
) -> dict[str, Any]:
    """Check a cache.

    Args:
        cache: its folder.
        full: read every byte and check every checksum.
        replay: blocks of pixels to decode again.
        teachers_percent: share of the rows whose maps are recomputed; needs ``recipe``, which knows the weights' files,
            unless the teachers are pretrained ones.
        recipe: where data and weights are; the manifest's own paths without it.

    Returns:
        The JSON of `feedfast verify`: ``ok``, ``problems`` (array, shard, kind, detail), ``objects``, ``bytes``,
        ``replayed``, ``cosine`` (per array, smallest).
    """
    if not Path(cache).is_dir():
        found_there = "a file" if Path(cache).exists() else "nothing"
        raise RequestError(f"cache: expected a folder, found {found_there} at {cache}")
    problems: list[Problem] = []
    try:
        problems += verify_cache(cache, full=full)
        reader = CacheReader(cache)
    except CacheDamageError as error:
        known = problems + (error.problems or [problem("", "", "cache", str(error))])
        problems = [entry for number, entry in enumerate(known) if entry not in known[:number]]
        _tell(problems)
        return {"ok": False, "problems": problems, "objects": 0, "bytes": 0, "replayed": 0, "cosine": {}}
    replayed = 0
    cosine: dict[str, float] = {}
    if (replay or teachers_percent) and not problems:
        recipe = recipe or recipe_of(reader)
        data = open_dataset(recipe.data.train, limit=recipe.data.limit)
        plan = plan_of(reader)
        try:
            refuse_other_recipe(reader, recipe.model_copy(update={"teachers": ()}), data, plan)
            check_views(reader, data, plan, reader.manifest.views)
            replayed = replay_pixels(reader, data, plan, blocks=replay, views=reader.manifest.views, seed=0)
            if replay and not replayed:
                problems.append(problem(names.SUMS, "", "pixels", "--replay: there was nothing to compare with"))
        except CacheDamageError as error:
            problems += error.problems
        except CacheMismatchError as error:
            problems.append(problem("", "", "pixels", str(error)))
        if teachers_percent and not problems:
            loaded = _teachers(reader, recipe)
            found, cosine = recompute_teachers(reader, data, plan, loaded, teachers_percent)
            problems += found
    commits = reader.log.commits.values()
    _tell(problems)
    return {
        "ok": not problems,
        "problems": problems,
        "objects": len(commits),
        "bytes": sum(commit.bytes for commit in commits),
        "replayed": replayed,
        "cosine": cosine,
    }


def _tell(problems: list[Problem]) -> None:
    for entry in problems:
        log.error("%s: %s %s: %s", entry["kind"], entry["array"], entry["shard"], entry["detail"])


def _teachers(reader: CacheReader, recipe: Recipe) -> dict[str, FrozenTeacher]:
    """The cache's teachers with exactly the stored taps."""
    files = {spec.name: spec.weights for spec in recipe.teachers}
    trusted = {spec.model for spec in recipe.teachers}
    out = {}
    for name, info in reader.manifest.teachers.items():
        if ":" in info.model and info.model not in trusted:
            raise RequestError(
                f"teachers[{name}].model: {info.model!r} would import code that a cache names; "
                "give --recipe with this model in it"
            )
        maps = (tap for tap in info.taps.values() if tap.name != names.LOGITS)
        taps = tuple(f"{tap.name}={tap.path}:{tap.position}" for tap in maps)
        spec = Teacher(
            name=name,
            model=info.model,
            weights=files.get(name, ""),
            classes=info.num_classes,
            bn=info.bn,
            precision=info.precision,
            taps=taps,
            mean=info.mean,
            std=info.std,
        )
        try:
            teacher = FrozenTeacher(spec, recipe, info.num_classes, torch.device("cpu"))
        except RequestError as error:
            if name in files:
                raise
            raise RequestError(f"{error}; if its weights are in a file, give --recipe, which names it") from error
        if teacher.weights_sha256 != info.weights_sha256:
            origin = files.get(name) or "the pretrained weights"
            raise CacheMismatchError(
                f"teachers[{name}].weights: expected sha256 {info.weights_sha256[:16]}…, "
                f"found {teacher.weights_sha256[:16]}… in {origin}; give --recipe with the right files"
            )
        out[name] = teacher
    return out
