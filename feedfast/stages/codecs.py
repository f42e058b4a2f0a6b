"""Which codec and share each stored tap of a recipe has: the one answer, for `cache`, `train`, `plan` and `methods`.

By name alone, since a student may train from a cache on a machine that has none of the teachers: an entry of
``teachers.N.taps`` is of the tap of its name, and one of a group ("ofd") of the taps that it numbers (ofd1, ...).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from feedfast import recipe as recipes
from feedfast.methods.base import LOGITS, numbered_taps
from feedfast.methods.ft import FACTOR, TAP
from feedfast.storage.schema import CodecName
from feedfast.tap_entry import TapEntry


@dataclass(frozen=True)
class Codecs:
    """A recipe's codecs.

    Attributes:
        default: `cache.codec`.
        entries: teacher → what the recipe says of its taps; none = all have the default.
    """

    default: CodecName
    entries: Mapping[str, tuple[TapEntry, ...]]

    def of(self, teacher: str, tap: str) -> CodecName:
        """The codec of one tap, ``logits`` and stored factors included.

        Logits are float16, except where all maps are float32: what is made for exact comparison is exact throughout.
        """
        entries = [entry for entry in self.entries.get(teacher, ()) if entry.tap != LOGITS]
        if tap == LOGITS:
            exact = (
                all((entry.codec or self.default) == "f32" for entry in entries) if entries else self.default == "f32"
            )
            return "f32" if exact else "f16"
        # factors are stored as the map that they are made from
        entry = _entry_of(TAP if tap == FACTOR else tap, entries)
        return self.default if entry is None or entry.codec is None else entry.codec

    def share(self, teacher: str, tap: str) -> float | None:
        """Which share of a tap's positions is stored; None = all."""
        entry = _entry_of(tap, self.entries.get(teacher, ()))
        return None if entry is None else entry.sample


def _entry_of(name: str, entries: Sequence[TapEntry]) -> TapEntry | None:
    """What a recipe says of a tap: its own entry, else that of a group that numbers it."""
    named = [entry for entry in entries if entry.name == name]
    number = name.partition(".")[0]  # branch1 of branch1.final
    groups = [entry for entry in entries if not entry.by_hand and numbered_taps((number,), entry.name)]
    return next(iter((*named, *groups)), None)


def codecs_of(teachers: Iterable[recipes.Teacher], default: CodecName) -> Codecs:
    """The codecs of a recipe's ``teachers`` with its ``cache.codec``."""
    return Codecs(default, {spec.name: spec.taps for spec in teachers})
