"""What the arrays of a cache are called; nobody else puts such a name together or takes it apart.

views/order · views/window · views/flip     what each row of a view shows
views/steps · views/parameters              the operations on its pixels: codes, and the numbers that go with them
views/weight · views/box                    mixing: the row's own share, and what of its partner is pasted
samples/label · samples/content             what is known of each sample
targets/TEACHER/TAP/codes · .../scale       stored maps, and what turns them into values; logits are a tap
targets/TEACHER/TAP/weights                 of a factor tap: the encoder that made it from another tap's stored values
pixels/sums                                 a checksum of each row's decoded image, as the teachers saw it
pixels/codes                                the decoded images themselves, where they are stored
"""

from __future__ import annotations

from typing import Final, NamedTuple

ORDER: Final = "views/order"
WINDOW: Final = "views/window"
FLIP: Final = "views/flip"
VIEWS: Final = (ORDER, WINDOW, FLIP)
STEPS: Final = "views/steps"
PARAMETERS: Final = "views/parameters"
WEIGHT: Final = "views/weight"
BOX: Final = "views/box"
LABEL: Final = "samples/label"
CONTENT: Final = "samples/content"
PIXELS: Final = "pixels/codes"
SUMS: Final = "pixels/sums"
LOGITS: Final = "logits"


class TargetName(NamedTuple):
    """``targets/TEACHER/TAP/PART``; ``part`` is ``codes``, ``scale`` or ``weights``."""

    teacher: str
    tap: str
    part: str


def codes(teacher: str, tap: str) -> str:
    """The stored rows of a tap."""
    return f"targets/{teacher}/{tap}/codes"


def scale(teacher: str, tap: str) -> str:
    """Offset and step per channel of a tap."""
    return f"targets/{teacher}/{tap}/scale"


def weights(teacher: str, tap: str) -> str:
    """The encoder's weights of a factor tap, one after the other."""
    return f"targets/{teacher}/{tap}/weights"


def parse(array: str) -> TargetName | None:
    """Teacher, tap and part of a target's array; None for any other array."""
    words = array.split("/")
    return TargetName(*words[1:]) if len(words) == 4 and words[0] == "targets" else None
