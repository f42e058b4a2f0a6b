"""What an installation downloads, per dependency: the sizes that decide what is of the core and what is an extra.

    python tools/install_sizes.py [EXTRA ...]       # of `.`, or of `.[EXTRA,...]`
    python tools/install_sizes.py --python 3.12     # as another Python would resolve it

pip resolves for an empty environment (`--dry-run --ignore-installed --report`), which installs nothing; the report says
where each wheel lies, and the index how long it is. A package that several dependencies bring counts for each under
"with what it brings", and under "only for it" for none of them: that column is what leaving a dependency out saves.
Installed sizes are those of the Python that runs this, where it has the package in the same version.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import tomllib
import urllib.request
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
MB = 1e6


def resolve(project: Path, extras: Iterable[str], python: str | None) -> dict[str, Any]:
    """pip's report on the project with these extras, for an empty environment."""
    wanted = f"{project}[{','.join(extras)}]" if extras else str(project)
    target = ["--python-version", python, "--only-binary=:all:", "--target", tempfile.gettempdir()] if python else []
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        subprocess.run([*command, "--report", str(report), *target, wanted], check=True)
        document: dict[str, Any] = json.loads(report.read_text())
    return document


def length(url: str) -> int:
    """Bytes of a wheel, on this disk or where the index keeps it."""
    parts = urlsplit(url)
    if parts.scheme == "file":
        path = Path(unquote(parts.path))
        return path.stat().st_size if path.is_file() else 0  # the project itself is a folder
    with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=60) as answer:
        return int(answer.headers["Content-Length"])


def brought(report: Mapping[str, Any]) -> dict[str, dict[str, set[str]]]:
    """Which packages each package of the report asks for: name → extra ("" = none) → names."""
    environment = dict(report["environment"])
    graph: dict[str, dict[str, set[str]]] = {}
    for item in report["install"]:
        about = item["metadata"]
        edges = graph.setdefault(canonicalize_name(about["name"]), {})
        for extra in ["", *about.get("provides_extra", [])]:
            here = {**environment, "extra": extra}
            needs = [Requirement(line) for line in about.get("requires_dist", [])]
            needs = [need for need in needs if need.marker is None or need.marker.evaluate(here)]
            edges[extra] = {f"{canonicalize_name(need.name)}[{one}]" for need in needs for one in ("", *need.extras)}
    return graph


def closure(graph: Mapping[str, Mapping[str, set[str]]], start: Iterable[str], without: str = "") -> set[str]:
    """Every package that ``start`` brings along, itself included; ``without`` is passed over."""
    found: set[str] = set()
    waiting = list(start)
    while waiting:
        place = waiting.pop()
        name, extra = place.rstrip("]").split("[")
        if place in found or name == without or name not in graph:
            continue
        found.add(place)
        waiting += graph[name].get(extra, set())
    return {place.partition("[")[0] for place in found}


def installed_bytes(name: str, version: str) -> int | None:
    """Bytes on disk of a package of this Python; None where it is not there in this version."""
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
    return sum(file.size or 0 for file in found.files or ()) if found.version == version else None


def main() -> None:
    """Resolve, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("extras", nargs="*", metavar="EXTRA")
    parser.add_argument("--python", help="resolve for this version, e.g. 3.12")
    asked = parser.parse_args()
    report = resolve(ROOT, asked.extras, asked.python)
    own = canonicalize_name(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"])
    items = {canonicalize_name(item["metadata"]["name"]): item for item in report["install"]}
    bytes_of = {name: length(item["download_info"]["url"]) for name, item in items.items()}
    on_disk = {name: installed_bytes(name, item["metadata"]["version"]) for name, item in items.items()}
    graph = brought(report)
    direct = set().union(*(graph[own][extra] for extra in ("", *asked.extras)))
    roots = {place.partition("[")[0] for place in direct} - {own}
    everything = closure(graph, direct) - {own}

    def total(names: Iterable[str], sizes: Mapping[str, int | None]) -> float:
        return sum(sizes[name] or 0 for name in names) / MB

    rows = []
    for root in roots:
        comes = closure(graph, [place for place in direct if place.startswith(f"{root}[")])
        others = closure(graph, [place for place in direct if not place.startswith(f"{root}[")], without=root)
        rows.append((total(everything - others, bytes_of), root, comes, everything - others))
    print("| package | alone MB | with what it brings MB | only for it MB | only for it, installed MB | only for it |")
    print("|---|---|---|---|---|---|")
    for saved, root, comes, only in sorted(rows, reverse=True):
        version, names = items[root]["metadata"]["version"], ", ".join(sorted(only - {root}))
        print(
            f"| {root} {version} | {total([root], bytes_of):.1f} | {total(comes, bytes_of):.1f} | {saved:.1f} "
            f"| {total(only, on_disk):.1f} | {names} |"
        )
    absent = sorted(name for name in everything if on_disk[name] is None)
    print(f"\n{len(everything)} packages, {total(everything, bytes_of):.1f} MB downloaded", end="")
    print(f", {total(everything, on_disk):.1f} MB installed" + (f" (unknown: {', '.join(absent)})" if absent else ""))


if __name__ == "__main__":
    main()
