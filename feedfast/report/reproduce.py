"""What it takes to do a run again: versions, commit, command, and the recipe as the TOML that the command reads."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from feedfast.provenance import Provenance
from feedfast.report.page import Html, block, joined, notes, provenance

__all__ = ["reproduce_html", "toml_text"]

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def reproduce_html(processes: Sequence[Provenance], recipe: Mapping[str, Any], command: str) -> Html:
    """Lines to be copied, the recipe in full, and the processes that were at work.

    Args:
        processes: who did it; the last one's versions and commit are given.
        recipe: as JSON values.
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
            block(toml_text(recipe), "recipe.toml"),
            provenance(processes),
        ]
    )


def toml_text(tree: Mapping[str, Any]) -> str:
    """JSON values as TOML; what is None is left out, as TOML has no word for it."""
    return "\n".join(_table(tree, ())).strip() + "\n"


def _table(tree: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    """Lines of a table: its own values first, as those below a header belong to the header."""
    lines = [
        f"{_key(name)} = {_value(value)}" for name, value in tree.items() if value is not None and not _is_tables(value)
    ]
    for name, value in tree.items():
        below = (*path, name)
        header = ".".join(map(_key, below))
        if isinstance(value, Mapping):
            lines += ["", f"[{header}]", *_table(value, below)]
        elif _is_tables(value):
            for entry in value:
                lines += ["", f"[[{header}]]", *_table(entry, below)]
    return lines


def _is_tables(value: Any) -> bool:
    if isinstance(value, Mapping):
        return True
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(entry, Mapping) for entry in value)


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else _value(name)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        inner = ", ".join(f"{_key(name)} = {_value(entry)}" for name, entry in value.items() if entry is not None)
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(entry) for entry in value if entry is not None)}]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # inf, -inf and nan are called so in both
    return repr(value)
