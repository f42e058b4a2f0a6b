"""`feedfast factors`: factor transfer's factors as targets of their own, made from what a cache holds.

    stored `final` ──► paraphraser, trained on them ──► its encoder ──► codes of the tap `factor`

A command of its own and no part of `feedfast cache`: it needs neither teachers nor images, and every view of `final`
must be complete before. The encoder's weights lie in the cache and their sha256 in the manifest, so a job that was
killed goes on with the same encoder. Batches are the cache's own: the bytes do not depend on where a job resumes.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from feedfast.errors import CacheMismatchError, FeedfastError, RequestError
from feedfast.methods.ft import FACTOR, FT, TAP, Paraphraser, train_paraphraser
from feedfast.provenance import Provenance
from feedfast.recipe import Recipe
from feedfast.stages.pilot import fit_values, thin
from feedfast.stages.progress import Meter
from feedfast.stages.proof import decode_rows, scale_of
from feedfast.stages.record import encode_rows
from feedfast.stages.tiers import tier_of
from feedfast.stages.trainee import method_entries
from feedfast.stages.worker import pick_device
from feedfast.storage import names
from feedfast.storage.create import open_for_writing, record_pass
from feedfast.storage.log import cache_digest
from feedfast.storage.reader import CacheReader
from feedfast.storage.schema import FactorInfo, TapInfo
from feedfast.storage.store import Place
from feedfast.storage.transform import Transform
from feedfast.storage.writer import CacheWriter

log = logging.getLogger(__name__)


def run_factors(recipe: Recipe) -> dict[str, Any]:
    """Add (or finish) the tap ``factor`` of the recipe's teachers, of all in the cache if it names none.

    Options are those of a ``[method]`` named ft, else its defaults; the paraphraser starts from ``seed``.

    Returns:
        The JSON of `feedfast factors`: ``taps`` (teacher/factor → shape, codec, measured errors, ``weights_sha256``),
        ``rows_written``, ``digest``, ``path``.

    Raises:
        RequestError: no cache, no such teacher, or a final tap that is no map or not there.
        CacheMismatchError: the cache holds factors of another rate, or of weights that cannot be made again.
        CacheDamageError: the final maps are incomplete or damaged.
    """
    if not recipe.cache.path:
        raise RequestError("cache.path: required, found nothing")
    options = next((e.options for e in method_entries(recipe.method) if e.kind is FT), FT.Options())
    reader = CacheReader(recipe.cache.path, threads=recipe.cache.threads, tier=tier_of(recipe))
    held = reader.manifest.teachers
    chosen = [teacher.name for teacher in recipe.teachers] or list(held)
    for name in chosen:
        if name not in held:
            raise RequestError(f"teachers: expected one of {reader.path}, which holds {sorted(held)}, found {name!r}")
        tap = held[name].taps.get(TAP)
        if tap is None or len(tap.shape) != 3:
            raise RequestError(
                f"{reader.path}: teacher {name!r}: expected a stored map {TAP!r}, found {sorted(held[name].taps)}; "
                "run `feedfast cache` with this tap first"
            )
        if tap.sample is not None:
            raise RequestError(
                f"{reader.path}: teacher {name!r}: expected whole maps of {TAP!r}, of which 3x3 convolutions make "
                f"factors, found {tap.sample.positions} of their positions; store the tap without a share"
            )
        known = held[name].taps.get(FACTOR)
        if known is not None and (known.factor is None or known.factor.rate != options.rate):
            found = "another tap of this name" if known.factor is None else known.factor.rate
            raise CacheMismatchError(
                f"{reader.path}: targets/{name}/{FACTOR}: rate: expected {options.rate} as the recipe says, "
                f"found {found}; choose another cache.path"
            )
        reader.require([names.codes(name, TAP), names.scale(name, TAP)], range(reader.manifest.views))
    job = Provenance.begin(recipe.model_dump(mode="json"))
    written = sum(_Factors(reader.path, name, recipe, options, job).write() for name in chosen)
    if written:
        record_pass(reader.path, job.finished())
    manifest = CacheReader(reader.path).manifest
    taps = {}
    for name in chosen:
        info = manifest.teachers[name].taps[FACTOR]
        assert info.factor is not None
        about = {"shape": list(info.shape), "codec": info.codec, "weights_sha256": info.factor.weights_sha256}
        taps[f"{name}/{FACTOR}"] = {**about, **info.error}
    return {"taps": taps, "rows_written": written, "digest": cache_digest(reader.path), "path": str(reader.path)}


@dataclass
class _Factors:
    """The factors of one teacher."""

    path: Place
    teacher: str
    recipe: Recipe
    options: Any
    job: Provenance

    def __post_init__(self) -> None:
        self.reader = CacheReader(self.path, threads=self.recipe.cache.threads, tier=tier_of(self.recipe))
        self.device = pick_device(self.recipe.train.device)
        self.source = self.reader.manifest.teachers[self.teacher].taps[TAP]
        self.scale = scale_of(self.reader, self.teacher, TAP)

    def write(self) -> int:
        """All of it; returns the rows written."""
        manifest = self.reader.manifest
        held = manifest.teachers[self.teacher].taps.get(FACTOR)
        weights_array, codes = names.weights(self.teacher, FACTOR), names.codes(self.teacher, FACTOR)
        paraphraser = self._paraphraser()
        if held is not None and not self.reader.missing([weights_array]):
            # read as checked bytes: nothing in a cache is ever unpickled
            vector_to_parameters(
                torch.from_numpy(self.reader.read_array(weights_array).copy()).to(self.device),
                paraphraser.encoder.parameters(),
            )
        else:
            self._train(paraphraser)
        info, scale = self._fit(paraphraser)
        if held is not None and info.factor != held.factor:
            raise CacheMismatchError(
                f"{self.path}: {weights_array}: expected the weights whose sha256 the manifest holds, found others; "
                "they were never stored, and this machine cannot make them again: choose another cache.path"
            )
        teacher = manifest.teachers[self.teacher]
        teacher = teacher.model_copy(update={"taps": {**teacher.taps, FACTOR: held or info}})
        asked = manifest.model_copy(update={"teachers": {**manifest.teachers, self.teacher: teacher}})
        merged = open_for_writing(self.path, asked)
        rows_written, size = 0, manifest.batch_rows
        with CacheWriter(self.path, merged, workers=self.recipe.cache.threads) as writer:
            writer.put(weights_array, _flat(paraphraser))
            writer.put(names.scale(self.teacher, FACTOR), scale)
            offset, step = torch.from_numpy(scale.copy()).to(self.device)
            work = list(writer.pending([codes]).batches(size))
            if work:
                record_pass(self.path, self.job)
            with Meter(f"factors of {self.teacher}", sum(len(rows) for _, rows in work)) as meter:
                for view, rows in work:
                    for number, maps in enumerate(self._maps(view, rows, size)):
                        found, saturated = encode_rows(paraphraser.encode(maps), info.codec, offset, step, Transform())
                        writer.append(codes, view, int(rows[number * size]), found, saturated=int(saturated))
                        rows_written += len(maps)
                        meter.advance(len(maps))
        return rows_written

    def _paraphraser(self) -> Paraphraser:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.recipe.seed)
            return Paraphraser(self.source.channels, self.options.rate).to(self.device)

    def _maps(self, view: int, rows: np.ndarray, size: int) -> Iterator[Tensor]:
        array = names.codes(self.teacher, TAP)
        for item in self.reader.stream([array], view, rows, size):
            rows_stored = torch.from_numpy(item[array].copy())
            yield decode_rows(rows_stored, self.source.codec, *self.scale).to(self.device)

    def _train(self, paraphraser: Paraphraser) -> None:
        manifest, options = self.reader.manifest, self.options
        every, size = np.arange(manifest.num_rows), min(self.recipe.train.batch, manifest.num_rows)
        total = options.paraphraser_epochs
        with Meter(f"paraphraser of {self.teacher}", total * manifest.num_rows) as meter:

            def metered(view: int) -> Iterator[Tensor]:
                for maps in self._maps(view, every, size):
                    yield maps
                    meter.advance(len(maps))

            epochs = (metered(epoch % manifest.views) for epoch in range(total))
            means = train_paraphraser(paraphraser, epochs, lr=options.paraphraser_lr, loss=options.reconstruction)
            for epoch, mean in enumerate(means, start=1):
                log.info("factors: %s, epoch %d of %d: loss %.4g", self.teacher, epoch, total, mean)

    def _fit(self, paraphraser: Paraphraser) -> tuple[TapInfo, np.ndarray]:
        """The manifest's entry, and offset and step [2, channel], from the first rows of view 0."""
        manifest, codec = self.reader.manifest, self.source.codec
        size = manifest.batch_rows
        fitted = min(-(-self.recipe.cache.pilot // size) * size, manifest.num_rows)
        stop = min(fitted + max(fitted // 4, size), manifest.num_rows)
        parts = [np.arange(fitted), np.arange(fitted, stop) if stop > fitted else np.arange(fitted)]
        samples, first = [], None
        for rows in parts:
            batches = -(-len(rows) // size)
            values = []
            for maps in self._maps(0, rows, size):
                factors = paraphraser.encode(maps).cpu()
                if not torch.isfinite(factors).all():
                    raise FeedfastError(f"teacher {self.teacher!r}: expected finite factors, found NaN or infinity")
                first = factors[: manifest.plan.granule] if first is None else first
                values.append(thin(factors, batches))
            samples.append(np.concatenate(values))
        assert first is not None
        scale, compression, error = fit_values(
            samples[0], samples[1], first, codec, Transform(), self.recipe.cache.compression
        )
        flat = _flat(paraphraser)
        info = TapInfo(
            name=FACTOR,
            path=self.source.path,
            position=self.source.position,
            shape=(paraphraser.factors, *self.source.shape[1:]),
            transform="factor",
            factor=FactorInfo(
                source=TAP,
                rate=self.options.rate,
                num_weights=len(flat),
                weights_sha256=hashlib.sha256(flat.tobytes()).hexdigest(),
            ),
            codec=codec,
            compression=compression,
            fit={"values_per_channel": len(samples[0]), "pilot": "factors of the first rows of view 0"},
            error=error,
        )
        return info, scale


def _flat(paraphraser: Paraphraser) -> np.ndarray:
    """float32 [num_weights]: the encoder's parameters, one after the other."""
    return parameters_to_vector(paraphraser.encoder.parameters()).detach().cpu().float().numpy()
