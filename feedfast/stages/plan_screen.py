"""What `feedfast plan` found, on one screen for a person; everything on it is in the JSON document too."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from feedfast.recipe import Recipe
from feedfast.stages.progress import format_bytes

WIDEST = 120


def screen_width() -> int:
    """Columns of the terminal on stderr, of a log file 100."""
    console = Console(stderr=True)
    return min(console.width, WIDEST) if console.is_terminal else 100


def plan_screen(document: Mapping[str, Any], recipe: Recipe, folder: str, width: int) -> str:
    """Tables of teachers and targets, and what follows from them.

    Args:
        document: of `run_plan`.
        recipe: what was planned.
        folder: whose free space it is.
        width: columns; no line is longer.
    """
    views = recipe.cache.views
    teachers = [
        (
            name,
            entry["model"],
            _top1(entry),
            f"{entry['ms']:,.1f}",
            format_bytes(entry["bytes_per_view"]),
            format_bytes(entry["bytes"]),
        )
        for name, entry in document["teachers"].items()
    ]
    targets = [
        (
            name,
            "x".join(map(str, entry["shape"])),
            entry["codec"],
            format_bytes(entry["bytes_per_sample"]),
            format_bytes(entry["bytes_per_view"]),
            format_bytes(entry["bytes"]),
        )
        for name, entry in document["targets"].items()
    ]
    per_sample, per_view, total = (document[key] for key in ("bytes_per_sample", "bytes_per_view", "bytes"))
    targets.append(("all", "", "", format_bytes(per_sample), format_bytes(per_view), format_bytes(total)))
    all_views = f"{views} view{'s' * (views > 1)}"
    parts: list[RenderableType] = [
        _table(("teacher", "model", "top-1", "ms/batch", "per view", all_views), teachers, left=2),
        Text(),
        _table(("target", "shape", "codec", "per sample", "per view", all_views), targets, left=1),
        _facts(_sentences(document, recipe, folder)),
    ]
    console = Console(file=io.StringIO(), width=width, no_color=True, highlight=False)
    with console.capture() as captured:
        console.print(Group(*parts))
    return "\n".join(line.rstrip() for line in captured.get().rstrip().splitlines())


def _top1(entry: Mapping[str, Any]) -> str:
    if entry["top1"] is None:
        return "–"
    return f"{entry['top1']:.1%}" + (" !" if entry["near_chance"] else "")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for number, name in enumerate(head):
        # What names a row is never cut short; words of a user's are no markup.
        justify = "left" if number < left else "right"
        table.add_column(Text(name), justify=justify, no_wrap=number != 1, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _facts(sentences: Mapping[str, str]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row()
    for name, sentence in sentences.items():
        grid.add_row(Text(name), Text(sentence))
    return grid


def _room(document: Mapping[str, Any], needed: str, folder: str, views: int) -> str:
    if document["free_bytes"] is None:
        return f"{needed} in {folder}"
    fit = document["views_that_fit"]
    verdict = f"fits, and {fit:,} views would" if document["fits"] else f"DOES NOT FIT; {fit} of {views} views would"
    return f"{needed}, {format_bytes(document['free_bytes'])} free in {folder}: {verdict}"


def _sentences(document: Mapping[str, Any], recipe: Recipe, folder: str) -> dict[str, str]:
    """Key → what a person asks first: time, disk, break-even, accuracy, use."""
    views, present = recipe.cache.views, document["bytes_present"]
    needed = format_bytes(max(document["bytes"] - present, 0))
    there = f" ({format_bytes(present)} are there already)" if present else ""
    ratio = document["live_over_cached"]
    faster = "" if ratio is None else f"; a live step takes {ratio:.1f} times a cached one"
    found = {
        "time": f"{_duration(document['seconds'])} to cache {views} view{'s' * (views > 1)}, "
        f"{document['images_per_second']:,.0f} images/s",
        "pixels": f"{document['pixels_per_core_second']:,.0f} augmented images/s per core, "
        f"{document['view_bytes_per_row']} bytes per row say what was done",
        "disk": _room(document, f"{needed} needed{there}", folder, views),
        "reading": _reading(document),
        "codes": _codes(document),
        "break-even": f"after {_count(document['break_even_epochs'], 'student epoch')}, "
        f"{_count(document['break_even_runs'], 'run')} of this recipe" + faster,
    }
    found["student"] = _first_student(document["first_student"])
    rows = max(entry["top1_rows"] for entry in document["teachers"].values())
    if rows:
        what = "labeled places of training images" if recipe.task.name == "segment" else "training images"
        found["top-1"] = f"on the first {rows:,} {what} as augmented; ! = near chance"
    found["recipe"] = f"{document['method']} with {recipe.student.model}: {document['unusable'] or 'can use it'}"
    found["serves"] = ", ".join(document["serves"]) or "no method"
    lacking: dict[str, list[str]] = {}
    for name, reason in document["serves_not"].items():
        lacking.setdefault(reason, []).append(name)
    if lacking:
        found["not"] = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in lacking.items())
    if document["bf16_over_fp32"] is not None:
        found["bf16"] = f"{document['bf16_over_fp32']:.1f} times the time of fp32 on this processor"
    return found


def _reading(document: Mapping[str, Any]) -> str:
    """Whether the cache pays at all, and the rates that say so."""
    if document["pays"] is None:
        return "not measured: no file could be written there"
    times = f"a batch is read in {document['read_ms']:,.1f} ms and computed in {document['teachers_ms']:,.1f} ms"
    rates = f"{'disk' if document['disk_direct'] else 'page cache'} {format_bytes(document['disk_bytes_per_second'])}/s"
    if document["decoder_bytes_per_second"] is not None:
        rates += f", decoder {format_bytes(document['decoder_bytes_per_second'])}/s"
    rates += f": {format_bytes(document['available_bytes_per_second'])}/s available"
    if document["needed_bytes_per_second"] is not None:
        rates += f", {format_bytes(document['needed_bytes_per_second'])}/s needed"
    verdict = "" if document["pays"] else 'A CACHE WOULD NOT PAY, use train.source = "live": '
    return f"{verdict}{times}; {rates}"


def _codes(document: Mapping[str, Any]) -> str:
    """How maps are stored, and what speaks for it."""
    kinds = document["compression"]
    names = [name for name, kind in kinds.items() if kind == "zstd"]
    how = "raw" if not names else "zstd" if len(names) == len(kinds) else f"zstd ({', '.join(names)}), the others raw"
    if not kinds or document["cached_step_ms"] is None:
        return how if kinds else "logits alone"
    said = f"{how}: a step from the cache takes {document['cached_step_ms']:,.1f} ms"
    if document["zstd_step_ms"] > document["cached_step_ms"]:
        said += f", {document['zstd_step_ms']:,.1f} ms if all that shrinks were decoded"
    return said


def _first_student(found: Mapping[str, Mapping[str, float | None]]) -> str:
    """When the first student begins to learn, and when it has learned, both ways."""
    first, words = {"cache": "cache, then train", "record": "train.source=record"}, []
    for way, times in found.items():
        wait, whole = times["wait_seconds"], times["seconds"]
        assert wait is not None
        after = "" if whole is None else f", trained after {_duration(whole)}"
        words.append(f"{first[way]}: first step after {_duration(wait)}{after}")
    return "; ".join(words)


def _count(value: float, unit: str) -> str:
    text = f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
    return f"{text} {unit}{'' if text == '1.0' else 's'}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:,.1f} min" if seconds < 6000 else f"{seconds / 3600:,.1f} h"
