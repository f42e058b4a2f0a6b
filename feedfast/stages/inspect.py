"""`feedfast inspect` and `taps`: what a cache holds, and what a model could give.

Both print a table for people on stderr and return the same facts as JSON. With ``--out``, inspect also draws the
maps: a few images as the teachers saw them, and for every tap the mean over channels of the decoded map.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from feedfast.data.loader import Loader
from feedfast.errors import FeedfastError
from feedfast.methods import METHODS
from feedfast.methods.base import LOGITS, matching
from feedfast.models.build import build_model
from feedfast.models.doctor import describe_taps
from feedfast.models.given import copied, word_of
from feedfast.models.own import built_size, own_input
from feedfast.provenance import Provenance
from feedfast.report.compare import print_table
from feedfast.report.inspect import write_inspection
from feedfast.report.page import Html, Section
from feedfast.report.pictures import Mapped, mapped_html
from feedfast.stages.accuracy import near_chance
from feedfast.stages.folder import ensure_dir
from feedfast.stages.progress import format_bytes
from feedfast.stages.proof import plan_of, source_of, stored_values
from feedfast.stages.sampling import Places, on_grid, sampling_of_manifest
from feedfast.stages.sheet import contact_sheet
from feedfast.storage import names
from feedfast.storage.reader import CacheReader

log = logging.getLogger(__name__)

SHOWN = 6
CLASSES = 12  # names of classes that a page lists
TAPS_SIZE = 32  # pixels; of a network that does not say what it wants
DENSE_SIZE = 300  # of one for boxes or pixels: SSD's


def run_inspect(cache: str, out: Path | None = None) -> dict[str, Any]:
    """Describe a cache.

    Returns:
        The JSON of `feedfast inspect`: ``path``, ``rows``, ``views``, ``bytes``, ``digest``, ``complete``, ``targets``
        (array → codec, shape, ``sample`` with share and number of drawn positions, bytes per sample, compression,
        measured errors), ``teachers`` (name → ``top1`` and the labeled pilot rows it is of), ``data`` (images, classes,
        first names of classes, files skipped by extension),
        ``manifest``, ``report`` (with ``out``).
    """
    reader = CacheReader(cache)
    manifest = reader.manifest
    rows: list[dict[str, Any]] = []
    targets: dict[str, dict[str, Any]] = {}
    for array, spec in reader.specs.items():
        if not spec.sharded:
            continue
        commits = [commit for view in range(spec.num_views) for commit in reader.committed(array, view).values()]
        stored = sum(commit.bytes for commit in commits)
        count = sum(commit.rows[1] - commit.rows[0] for commit in commits)
        target = names.parse(array)
        info = manifest.teachers[target.teacher].taps[target.tap] if target else None
        entry: dict[str, Any] = {
            **(info.error if info else {}),
            "dtype": str(spec.dtype),
            "row_shape": list(spec.row_shape),
            "codec": info.codec if info else None,
            "transform": info.transform if info else None,
            "sample": info.sample.model_dump() if info and info.sample else None,
            "compression": spec.compression,
            "rows": count,
            "bytes": stored,
            "bytes_per_sample": stored / count if count else None,
            "ratio": count * spec.row_bytes / stored if stored else None,
        }
        targets[array] = entry
        row = {
            "array": array.removesuffix("/codes"),
            "row": "x".join(map(str, spec.row_shape)) + (f" @{entry['sample']['share']}" if entry["sample"] else ""),
            "codec": entry["codec"] or entry["dtype"],
            "rows": count,
            "size": format_bytes(stored),
            "per sample": format_bytes(entry["bytes_per_sample"] or 0),
            "ratio": entry["ratio"],
            "rel. RMS error": entry.get("relative_rms_error"),
            "worst channel": entry.get("worst_channel_rms_error"),
            "signs flipped": entry.get("mask_flip_rate"),
        }
        rows.append(row)
    print_table(f"{cache}: {manifest.num_rows:,} rows, {manifest.views} views", rows)
    teachers = [
        {
            "teacher": name,
            "model": info.model,
            "px": info.size or manifest.plan.size,
            "top-1": "not measured" if info.top1 is None else f"{info.top1:.1%} of {info.top1_rows:,} rows",
            "judged": "near chance" if near_chance(info.top1, info.top1_rows, info.num_classes) else "",
        }
        for name, info in manifest.teachers.items()
    ]
    print_table("teachers, on labeled pilot rows", teachers)
    print_table("passes", [process.row() for process in manifest.passes])
    document = {
        "path": cache,
        "rows": manifest.num_rows,
        "views": manifest.views,
        "bytes": reader.log.commits.total_bytes,
        "digest": reader.digest(),
        "complete": reader.complete,
        "targets": targets,
        "teachers": {
            name: {"top1": info.top1, "top1_rows": info.top1_rows} for name, info in manifest.teachers.items()
        },
        "data": {
            "images": manifest.dataset.count,
            "classes": len(manifest.dataset.classes),
            "first_classes": list(manifest.dataset.classes[:3]),
            "skipped": manifest.dataset.skipped,
        },
        "manifest": manifest.to_attrs()["feedfast"],
    }
    if out is not None:
        ensure_dir(out, "--out")
        report = write_inspection(
            out / "inspect.html",
            cache,
            {
                "rows per view": f"{manifest.num_rows:,}",
                "views": str(manifest.views),
                "size": format_bytes(document["bytes"]),
                "stored arrays": str(len(rows)),
                "state": "complete" if reader.complete else "in the making",
            },
            _about(reader),
            rows,
            teachers,
            document["manifest"],
            [Section("Maps", mapped_html(_mapped(reader))), Section("Views", _views(reader))],
            manifest.passes,
            Provenance.begin().finished(),
        )
        document["report"] = str(report)
    return document


def _about(reader: CacheReader) -> dict[str, Any]:
    """The manifest's facts in words."""
    manifest = reader.manifest
    data, classes = manifest.dataset, list(manifest.dataset.classes)
    shown = ", ".join(classes[:CLASSES]) + (f" and {len(classes) - CLASSES:,} more" if len(classes) > CLASSES else "")
    return {
        "Images": f"{data.count:,}, at {manifest.plan.size} px",
        "Classes": f"{len(classes):,}: {shown}" if classes else "not labeled",
        "Files left out": [f"{count:,} {kind}" for kind, count in data.skipped.items()] or None,
        "Images are": "stored in the cache" if manifest.images == "stored" else "decoded again from their files",
        "Decoded by": manifest.decoder.backend,
        "Seed of the views": manifest.plan.seed,
        "Digest": reader.digest(),
    }


def _mapped(reader: CacheReader) -> list[Mapped]:
    """The first rows of view 0: the image, where it is at hand, and every stored map."""
    rows = np.arange(min(SHOWN, reader.manifest.num_rows))
    maps: dict[str, dict[str, NDArray[Any]]] = {}
    places: Places = {}
    if sampling := sampling_of_manifest(reader.manifest, reader.path):
        places = sampling.places(0, reader.read_array(names.ORDER, 0)[rows], torch.device("cpu"))
    for array, spec in reader.specs.items():
        target = names.parse(array)
        if not spec.sharded or target is None or len(reader.committed(array, 0)) != spec.num_shards:
            continue
        values = stored_values(reader, target.teacher, target.tap, 0, rows)
        there = places.get((target.teacher, target.tap))
        shown: NDArray[Any]
        if there is not None:
            shown = on_grid(values, there, sampling.grids[target.teacher, target.tap][:2])
        elif values.dim() == 4:
            shown = values.numpy()
        else:  # logits, vectors and tokens are no maps
            continue
        maps.setdefault(target.tap, {})[target.teacher] = shown
    images: Sequence[Any] = [None] * len(rows)
    said = [f"row {row}" for row in rows]
    try:
        data = source_of(reader).open()
        with Loader(data, plan_of(reader), batch_size=len(rows)) as loader:
            batch = next(iter(loader.stream(0, rows)))
        images = list(batch.images.numpy())
        said = [data.name(place) for place in np.searchsorted(data.ids, batch.ids).tolist()]
    except FeedfastError as error:
        log.warning("inspect: images not shown: %s", error)
    return [
        Mapped(
            said[row],
            images[row],
            {tap: {who: some[row] for who, some in found.items()} for tap, found in maps.items()},
        )
        for row in range(len(rows))
    ]


def _views(reader: CacheReader) -> Html:
    """A contact sheet; empty where the images are not to be found."""
    try:
        return contact_sheet(source_of(reader).open(), plan_of(reader), reader.manifest.views)
    except FeedfastError as error:
        log.warning("inspect: views not shown: %s", error)
        return Html("")


def run_taps(model: str | nn.Module, size: int | None, classes: int) -> dict[str, Any]:
    """Describe the tappable places of a model with random weights.

    Args:
        model: as in a recipe, or the network itself; it is copied.
        size: pixels, side of the input; None = the model's own, else 32.
        classes: outputs of the classifier.

    Returns:
        The JSON of `feedfast taps`: ``model``, ``size``, ``taps`` (one entry per place, with the fields of
        `feedfast.models.doctor.TapPlace`), ``methods`` (method → what to write as ``teachers.N.taps`` for it, [] where
        this network has none of the places it needs).
    """
    given = isinstance(model, nn.Module)
    if isinstance(model, nn.Module):
        network, model = copied(model, "model").eval(), word_of(model)
    else:
        network = build_model(model, num_classes=classes, weights=None, seed=0).eval()
    if size is None:
        own = own_input(model, None, network, given=given)
        default = DENSE_SIZE if model.startswith(("zoo/deeplabv3plus-", "zoo/ssd300-")) else TAPS_SIZE
        size = (own.size if own is not None else built_size(network)) or default
    rows = [asdict(row) for row in describe_taps(network, torch.zeros(2, 3, size, size))]
    hazards = dict.fromkeys(hazard for row in rows for hazard in row["hazards"])
    notes = {hazard: number for number, hazard in enumerate(hazards, 1)}
    shown = [
        {
            "path": row["path"],
            "kind": row["kind"],
            "shape": "x".join(map(str, row["shape"])),
            "layout": row["layout"],
            "u8 bytes": row["values"],
            "positions": ", ".join(row["positions"]),
            "for": ", ".join(row["suggestions"]),
            "hazards": ", ".join(str(notes[hazard]) for hazard in row["hazards"]),
        }
        for row in rows
    ]
    print_table(f"{model} at {size} px", shown)
    for hazard, number in notes.items():
        log.info("hazard %d: %s", number, hazard)
    suggested = _suggested([spec for row in rows for spec in row["specs"]])
    print_table(
        "taps per method",
        [{"method": name, "taps": ", ".join(specs) or "name them by hand"} for name, specs in suggested.items()],
    )
    return {"model": model, "size": size, "taps": rows, "methods": suggested}


def _suggested(specs: list[str]) -> dict[str, list[str]]:
    """Method → the taps of a teacher that it needs; methods of logits alone need none and are left out."""
    by_name = {spec.partition("=")[0]: spec for spec in specs}
    out = {}
    for name, kind in METHODS.items():
        groups = [need for need in kind.needs if need != LOGITS]
        found = [matching((need,), by_name) for need in groups]
        if groups:
            out[name] = [by_name[tap] for taps in found for tap in taps] if all(found) else []
    return out
