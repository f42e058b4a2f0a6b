"""The command line as a user meets it: arguments in; exit code, the JSON on stdout, and stderr out.

`feedfast` runs `feedfast.cli.main` in this process, the same function the installed command calls: what escapes it is
what a user would see as a traceback, and fails the test. `in_a_process` is the real thing, for what only a process can
show.
"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from feedfast.cli import main


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """The JSON on stdout, where nothing else may stand."""
        found: dict[str, Any] = json.loads(self.out)
        return found

    @property
    def error(self) -> str:
        """The one error of a command that failed: its text from ``error: `` on. Nothing may have gone to stdout."""
        assert self.code in (1, 2), (self.code, self.err)
        assert self.out == "", self.out
        assert "Traceback" not in self.err, self.err
        found = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(found) == 1, self.err
        return self.err[self.err.index(found[0]) + len("error: ") :].rstrip("\n")


def feedfast(*arguments: object) -> Outcome:
    """Run a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        patch.object(sys, "argv", ["feedfast", *map(str, arguments)]),
        patch.object(sys, "path", [*sys.path]),
    ):
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    return Outcome(code, out.getvalue(), err.getvalue())


def in_a_process(*arguments: object, **options: Any) -> Outcome:
    """Run a command as a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "feedfast", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        **options,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)
