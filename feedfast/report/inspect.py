"""The page of a cache: what it holds, how well it holds it, pictures of it, and how it was made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from feedfast.files import write_text
from feedfast.provenance import Provenance
from feedfast.report.page import Section, details, facts, joined, listing, made_by, page, provenance, table, tiles

__all__ = ["write_inspection"]

MOST_CHARACTERS = 200_000  # of the manifest's text on the page


def write_inspection(
    path: Path,
    cache: str,
    numbers: Mapping[str, Any],
    about: Mapping[str, Any],
    targets: Sequence[Mapping[str, Any]],
    teachers: Sequence[Mapping[str, Any]],
    manifest: Mapping[str, Any],
    pictures: Sequence[Section],
    passes: Sequence[Provenance],
    made: Provenance,
) -> Path:
    """Write the page.

    Args:
        path: the page.
        cache: what is inspected.
        numbers: the few that matter, shown large: name → words.
        about: facts in words: images, plan, digest.
        targets: rows of a table, one per stored array: bytes, ratio, errors.
        teachers: rows of a table.
        manifest: in full, as JSON values.
        pictures: sections with maps and views.
        passes: processes that wrote the cache.
        made: who inspects.
    """
    text = json.dumps(manifest, indent=2)
    name = "manifest" if len(text) <= MOST_CHARACTERS else f"the first {MOST_CHARACTERS:,} characters of the manifest"
    sections = [
        Section("What it holds", joined([tiles(numbers), facts(about)])),
        Section("Targets", table(targets, "Stored arrays: size, and errors measured while they were written")),
        Section("Teachers", table(teachers, "Teachers, judged on labeled images of the pilot")),
        *pictures,
        Section("How the cache was made", provenance(passes, "Processes that wrote the cache")),
        Section("Manifest", details("The manifest in full", listing(text[:MOST_CHARACTERS], name))),
        Section("How this page was made", provenance([made], "Process that made this page")),
    ]
    write_text(path, page("Cache", cache, "", sections, made_by([made])))
    return path
