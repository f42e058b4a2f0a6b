"""Fuzz feedfast's commands: ``python tests/fuzz/fuzz.py --seconds 3600`` for hours, test_fuzz.py for a minute.

Each input is one valid file of one world, mutated, through the real commands in a fork of its own (harness.py says what
may come of it). Seeds are printed; inputs that fail are kept for ``--replay FOLDER/input.json``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import Tally, Zygote, complaints, keep_input, numbers
from hypothesis import HealthCheck, Phase, given, seed, settings
from mutations import BYTES, Mutation, apply, plans
from subjects import SETUP, TARGETS, Target, make_world

ROUND = 12  # inputs of one target before the next has its turn


class Fuzzer:
    """The world, the process that forks, and the count."""

    def __init__(self, scratch: Path, zygote: Zygote, keep: Path) -> None:
        self.scratch, self.zygote, self.keep = scratch, zygote, keep
        self.seed_world, self.world = scratch / "seed", scratch / "world"
        self.tally = Tally()
        make_world(self.world)
        fate = zygote.run(SETUP, self.world, 300)
        assert not complaints(fate, [None] * len(SETUP)), fate
        assert [outcome["code"] for outcome in fate["outcomes"]] == [0] * len(SETUP), fate
        shutil.copytree(self.world, self.seed_world)
        self.expected = {name: self._unharmed(target) for name, target in TARGETS.items()}

    def _unharmed(self, target: Target) -> list[dict[str, Any] | None]:
        self.renew()
        fate = self.zygote.run(target.commands, self.world, 300)
        assert not fate["died"], fate
        assert [outcome["code"] for outcome in fate["outcomes"]] == [0] * len(target.commands), fate
        pairs = zip(fate["outcomes"], target.same, strict=True)
        return [numbers(outcome) if same else None for outcome, same in pairs]

    def renew(self) -> None:
        """The world as it was."""
        shutil.rmtree(self.world, ignore_errors=True)
        shutil.copytree(self.seed_world, self.world)

    def try_input(self, name: str, which: int, plan: list[Mutation]) -> list[str]:
        """Mutate one file and run the target's commands; what is wrong with their fate."""
        target = TARGETS[name]
        self.renew()
        found = sorted({path for pattern in target.files for path in self.world.glob(pattern) if path.is_file()})
        file = found[which % len(found)]
        apply(file, target.content, plan)
        fate = self.zygote.run(target.commands, self.world)
        self.tally.add(name, fate)
        # Whoever saves other numbers as torch does has made another file, not damaged this one.
        made = target.content == "torch" and any(step[0] not in BYTES for step in plan)
        wrong = complaints(fate, [None] * len(target.commands) if made else self.expected[name])
        if wrong:
            relative = str(file.relative_to(self.world))
            place = keep_input(self.keep, self.world, name, [which, plan], [relative], wrong)
            self.tally.failures.append((name, wrong[0], place))
            print(f"FAILED {name} {relative} {plan}: kept in {place}\n  {wrong[0][-700:]}", flush=True)
        return wrong

    def round(self, name: str, number: int) -> None:
        """Some inputs of one target, drawn from ``number``."""
        from hypothesis import strategies as st

        @seed(number)
        @settings(
            max_examples=ROUND, deadline=None, database=None, phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(st.integers(0, 999), plans(TARGETS[name].content))
        def inputs(which: int, plan: list[Mutation]) -> None:
            self.try_input(name, which, plan)

        inputs()


def fuzz(seconds: float, first_seed: int, keep: Path, names: list[str]) -> Tally:
    """Fuzz the targets in turn until the time is over."""
    with tempfile.TemporaryDirectory(prefix="feedfast-fuzz-") as folder, Zygote(Path(folder)) as zygote:
        fuzzer = Fuzzer(Path(folder), zygote, keep)
        started, number = time.monotonic(), first_seed
        while time.monotonic() - started < seconds:
            name = names[number % len(names)]
            print(f"seed {number}: {name}", flush=True)
            fuzzer.round(name, number)
            number += 1
        print("\n".join(fuzzer.tally.lines()), flush=True)
        return fuzzer.tally


def replay(file: Path, keep: Path) -> list[str]:
    """Run a kept input again."""
    saved = json.loads(file.read_text())
    with tempfile.TemporaryDirectory(prefix="feedfast-fuzz-") as folder, Zygote(Path(folder)) as zygote:
        which, plan = saved["plan"]
        return Fuzzer(Path(folder), zygote, keep).try_input(saved["target"], which, [tuple(step) for step in plan])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), help="folder for inputs that failed")
    parser.add_argument("--replay", type=Path, help="an input.json from there")
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)}; all without")
    asked = parser.parse_args()
    if asked.replay:
        sys.exit(1 if replay(asked.replay, asked.keep) else 0)
    sys.exit(1 if fuzz(asked.seconds, asked.seed, asked.keep, asked.targets or list(TARGETS)).failures else 0)


if __name__ == "__main__":
    main()
