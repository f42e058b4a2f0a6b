"""`feedfast inspect` and `taps`: what a cache holds, and what a model could give.

Both print a table for people on stderr and return the same facts as JSON. With ``--out``, inspect also draws the
maps: a few images as the teachers saw them, and for every tap the mean over channels of the decoded map.
"""

from __future__ import annotations

import html
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from feedfast.data.loader import Loader
from feedfast.errors import FeedfastError
from feedfast.files import write_text
from feedfast.methods import METHODS
from feedfast.methods.base import LOGITS, matching
from feedfast.models.build import build_model
from feedfast.models.doctor import describe_taps
from feedfast.models.given import copied, word_of
from feedfast.models.own import built_size, own_input
from feedfast.provenance import Provenance
from feedfast.report.compare import print_table
from feedfast.report.run import figure_html, page, provenance_html, table_html
from feedfast.stages.accuracy import near_chance
from feedfast.stages.folder import ensure_dir
from feedfast.stages.progress import format_bytes
from feedfast.stages.proof import plan_of, source_of, stored_values
from feedfast.stages.sheet import contact_sheet
from feedfast.storage import names
from feedfast.storage.reader import CacheReader

log = logging.getLogger(__name__)

SHOWN = 6
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
        listing = html.escape(json.dumps(document["manifest"], indent=2)[:200_000])
        made = provenance_html(manifest.passes, "How the cache was made")
        made += provenance_html([Provenance.begin().finished()], "How this page was made")
        tables = f"{table_html(rows)}{table_html(teachers)}"
        body = f"{tables}{_pictures(reader)}{_views(reader)}{made}<h2>Manifest</h2><pre>{listing}</pre>"
        report = out / "inspect.html"
        write_text(report, page(f"Cache {cache}", body))
        document["report"] = str(report)
    return document


def _pictures(reader: CacheReader) -> str:
    """The first rows of view 0: the image, then the channel mean of every stored map."""
    from matplotlib.figure import Figure

    complete = [
        array
        for array, spec in reader.specs.items()
        if spec.sharded and names.parse(array) and len(reader.committed(array, 0)) == spec.num_shards
    ]
    maps = []
    rows = np.arange(min(SHOWN, reader.manifest.num_rows))
    for array in complete:
        target = names.parse(array)
        assert target is not None
        teacher, tap = target.teacher, target.tap
        values = stored_values(reader, teacher, tap, 0, rows)
        if values.dim() == 4:
            maps.append((f"{teacher}/{tap}", values.mean(1).numpy()))
    images: np.ndarray | None = None
    try:
        loader = Loader(source_of(reader).open(), plan_of(reader), batch_size=len(rows))
        images = next(iter(loader.stream(0, rows))).images.numpy()
        loader.close()
    except FeedfastError as error:
        log.warning("inspect: images not shown: %s", error)
    columns = ([("image", images)] if images is not None else []) + maps
    if not columns:
        return ""
    figure = Figure(figsize=(1.6 * len(columns), 1.6 * len(rows)))
    axes = np.atleast_2d(figure.subplots(len(rows), len(columns), squeeze=False))
    for column, (name, pictures) in enumerate(columns):
        for row in range(len(rows)):
            axes[row][column].imshow(pictures[row], cmap=None if name == "image" else "viridis")
            axes[row][column].set_axis_off()
        axes[0][column].set_title(name, fontsize=8)
    figure.tight_layout()
    return "<h2>Maps (mean over channels), first rows of view 0</h2>" + figure_html(figure)


def _views(reader: CacheReader) -> str:
    """A contact sheet; empty where the images are not to be found."""
    try:
        return contact_sheet(source_of(reader).open(), plan_of(reader), reader.manifest.views)
    except FeedfastError as error:
        log.warning("inspect: views not shown: %s", error)
        return ""


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
