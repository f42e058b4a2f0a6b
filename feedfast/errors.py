"""The one exception family. Each error is a sentence: what is wrong, what was expected, what was found.

The command line turns the class into the exit code and prints the sentence without a traceback:
2 when the *request* was wrong (recipe, path, name), 1 when the *job or check* failed (damage, a full disk): it may go
better another time.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# C0 but for tab and newline, DEL and C1; marks that turn the direction of text; halves of characters, which no stream
# can write
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Text from anybody's file as a terminal may show it: control characters spelled out, so that none is obeyed."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


class FeedfastError(ValueError):
    """Base of every error feedfast raises on purpose; the job or the check failed.

    Its message is printable whatever names of strangers it quotes.
    """

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


class RequestError(FeedfastError):
    """The request was wrong: a bad recipe key, a missing path, an unknown model or tap."""

    exit_code = 2


class BusyError(RequestError):
    """Another process is at work where this one was sent: it may be waited for, so a scheduler may try again."""

    exit_code = 1


class PartTakenError(BusyError):
    """Another process is writing this part of a cache."""


class CacheMismatchError(RequestError):
    """The cache was made from something else than the recipe asks for (data, plan, teacher, weights)."""


class CacheDamageError(FeedfastError):
    """Committed data are missing, short or changed; ``problems`` names array, shard and kind of each."""

    def __init__(self, message: str, problems: Sequence[dict[str, str]] = ()) -> None:
        super().__init__(message)
        self.problems = list(problems)


class PeerFailedError(FeedfastError):
    """Another rank failed first and says why; this one only ends, without a message of its own."""
