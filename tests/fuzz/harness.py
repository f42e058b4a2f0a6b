"""Inputs through the real commands, and the verdict: what a stranger's file may do to feedfast, and what it may not.

Allowed: exit code 0 with the numbers of the unharmed world, or 1 or 2 with one sentence (for `verify` its list). Never:
a traceback, a crash, a hang, more than 1 GiB, a control character on the terminal, or other numbers without a word.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MOST_MIB = 1024
LIMIT_S = 60  # per input; a busy machine needs a second for what takes a tenth of one
NUMBERS = ("final_loss", "digest", "steps")  # of a command's JSON: what must not change unnoticed


@dataclass
class Zygote:
    """The process that forks one child per input; see zygote.py. A context manager."""

    scratch: Path
    process: subprocess.Popen[str] = field(init=False)

    def __enter__(self) -> Self:
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "zygote.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        assert "ready" in self._line()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()  # type: ignore[union-attr]
        self.process.stdout.close()  # type: ignore[union-attr]
        self.process.wait(60)

    def run(self, commands: Sequence[Sequence[str]], cwd: Path, limit_s: int = LIMIT_S) -> dict[str, Any]:
        """The fate of one fork that runs ``commands`` one after another in ``cwd``."""
        job = {"commands": [list(words) for words in commands], "cwd": str(cwd), "limit_s": limit_s}
        job["stderr"] = str(self.scratch / "stderr")
        self.process.stdin.write(json.dumps(job) + "\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        return self._line()

    def _line(self) -> dict[str, Any]:
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        assert line, "the zygote has died"
        found: dict[str, Any] = json.loads(line)
        return found


def numbers(outcome: dict[str, Any]) -> dict[str, Any]:
    """What a command that ended well reported of `NUMBERS`."""
    lines = outcome["out"].splitlines()
    document = json.loads(lines[-1]) if lines else {}
    return {key: document[key] for key in NUMBERS if key in document}


def complaints(fate: dict[str, Any], expected: Sequence[dict[str, Any] | None]) -> list[str]:
    """What is wrong with the fate of one input; nothing if it is allowed.

    Args:
        fate: as `Zygote.run` returns it.
        expected: per command the numbers of the unharmed world, None where any will do.
    """
    found = []
    if fate["died"]:
        found.append(f"died: {fate['died']} after {fate['seconds']:.1f} s: {fate.get('native', '')[-1500:]}")
    if fate["peak_mib"] > MOST_MIB:
        found.append(f"memory: {fate['peak_mib']:.0f} MiB")
    for number, outcome in enumerate(fate["outcomes"]):
        if outcome["trace"]:
            found.append(f"traceback: {outcome['trace'][-1500:]}")
            continue
        if outcome["code"] not in (0, 1, 2):
            found.append(f"exit code {outcome['code']}")
        said = [line for line in outcome["err"].splitlines() if line.startswith("error: ")]
        if outcome["code"] and len(said) != 1 and not _is_verdict(outcome):
            found.append(f"exit code {outcome['code']} with {len(said)} sentences: {outcome['err'][-500:]!r}")
        odd = sorted({char for char in outcome["err"] if ord(char) < 32 and char not in "\n\t"})
        if odd:
            found.append(f"control characters on the terminal: {odd}")
        if not outcome["code"] and expected[number] is not None and numbers(outcome) != expected[number]:
            found.append(f"other numbers: expected {expected[number]}, found {numbers(outcome)}")
    return found


def _is_verdict(outcome: dict[str, Any]) -> bool:
    """Whether a command that failed has listed why as JSON, as `verify` and `plan` do."""
    lines = outcome["out"].splitlines()
    document = json.loads(lines[-1]) if lines else {}
    return document.get("ok") is False or document.get("fits") is False


@dataclass
class Tally:
    """What came of how many inputs, and the ones that failed."""

    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    peak_mib: float = 0.0
    slowest_s: float = 0.0
    failures: list[tuple[str, str, Path]] = field(default_factory=list)

    def add(self, target: str, fate: dict[str, Any]) -> None:
        counts = self.outcomes.setdefault(target, Counter())
        codes = [outcome["code"] for outcome in fate["outcomes"]]
        counts["inputs"] += 1
        counts["commands"] += len(codes)
        counts.update(f"exit {code}" for code in codes)
        self.peak_mib = max(self.peak_mib, fate["peak_mib"])
        self.slowest_s = max(self.slowest_s, fate["seconds"])

    @property
    def total(self) -> Counter[str]:
        return sum(self.outcomes.values(), Counter())

    def lines(self) -> list[str]:
        """For people."""
        rows = [*sorted(self.outcomes.items()), ("all", self.total)]
        text = [f"{name:12s} " + ", ".join(f"{value} {key}" for key, value in counts.items()) for name, counts in rows]
        return [*text, f"most memory {self.peak_mib:.0f} MiB, slowest input {self.slowest_s:.1f} s"]


def keep_input(folder: Path, world: Path, target: str, plan: Any, files: Sequence[str], what: list[str]) -> Path:
    """Save a failing input for replay: the plan of its mutations, what was wrong, and the mutated files."""
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / f"{target}-{len(list(folder.iterdir())):03d}"
    place.mkdir()
    content = {"target": target, "plan": plan, "complaints": what}
    (place / "input.json").write_text(json.dumps(content, indent=1, default=str))
    for name in files:
        source = world / name
        if source.is_file() and not source.is_symlink() and source.stat().st_size < 1 << 22:
            shutil.copy(source, place / Path(name).name)
    return place
