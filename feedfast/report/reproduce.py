"""What it takes to do a run again: versions, commit, command, and the recipe as the TOML that the command reads."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from feedfast.provenance import Provenance
from feedfast.report.page import Html, block, joined, notes, provenance

__all__ = ["reproduce_html"]


def reproduce_html(processes: Sequence[Provenance], recipe: str, command: str) -> Html:
    """Lines to be copied, the recipe in full, and the processes that were at work.

    Args:
        processes: who did it; the last one's versions and commit are given.
        recipe: as TOML.
        command: of feedfast, as ``train``.
    """
    lines: list[str] = []
    sentences: list[str] = []
    if processes:
        last = processes[-1]
        if last.commit:
            lines.append(f"git checkout {last.commit}")
            if last.dirty:
                sentences.append(f"Tracked files differed from commit {last.commit[:12]} when this was run.")
        packages = [f"{name}=={version}" for name, version in last.versions.items() if version and name != "python"]
        lines.append(f"pip install {shlex.join(packages)}" if packages else "pip install feedfast")
        python = last.versions.get("python")
        sentences.append(f"As it was run: {last.command}" + (f" (Python {python})" if python else ""))
    lines.append(f"feedfast {command} recipe.toml")
    return joined(
        [
            block("\n".join(lines), "commands that do this again"),
            notes(*sentences, muted=True),
            notes("recipe.toml, every option in full:"),
            block(recipe, "recipe.toml"),
            provenance(processes),
        ]
    )
