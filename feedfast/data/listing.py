"""What a walk over packed images finds, whatever they are packed in: where each image lies, its name and its label.

Tars are walked by ``tars.py``, Arrow and Parquet files by ``columns.py``; ``indexing.py`` makes an index of the result.
Labels are class numbers, or names, which are numbered in sorted order as class folders are. About 50 bytes are held
per image, so that a walk over any number of them fits in memory.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final

from feedfast.data.folder import refuse_odd_text
from feedfast.data.images import MAX_ENCODED_BYTES
from feedfast.errors import RequestError

__all__ = ["MAX_CLASSES", "Label", "Listed", "Wanted", "numbered"]

MAX_CLASSES: Final = 1 << 20  # each gets a name
Label = int | str | None
IMAGE: Final = "image"  # what columns of images and labels are called, where nobody says it
LABEL: Final = "label"

_WHOLE: Final = re.compile("-?[0-9]{1,9}")


@dataclass(frozen=True)
class Wanted:
    """What images and labels are called within the source: columns, or endings of a tar's members; "" = by default."""

    image: str = ""
    label: str = ""


BY_DEFAULT: Final = Wanted()


@dataclass
class Listed:
    """The images of one file, in order.

    Attributes:
        offsets: byte where each begins.
        lengths: bytes of each.
        labels: of each, its place in ``kinds``.
        kinds: every label that occurs: class number, class name, or None for an image without.
        rows: how many rows have been gone through, of tables; those without an image, too.
        name_text: UTF-8 names within the file, one after the other; empty where rows have none.
        name_ends: where each name ends.
        classes: names by number, if the file says them.
        skipped: ending → members that look like images and are no samples.
        faults: (where, why) of everything that is wrong.
    """

    offsets: array[int] = field(default_factory=lambda: array("Q"))
    lengths: array[int] = field(default_factory=lambda: array("L"))
    labels: array[int] = field(default_factory=lambda: array("l"))
    kinds: dict[Label, int] = field(default_factory=dict)
    rows: int = 0
    name_text: bytearray = field(default_factory=bytearray)
    name_ends: array[int] = field(default_factory=lambda: array("Q"))
    classes: tuple[str, ...] = ()
    skipped: Counter[str] = field(default_factory=Counter)
    faults: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.offsets)

    def add(self, where: str, name: str, offset: int, length: int, label: Label) -> None:
        """One more image; ``where`` is its name in messages."""
        if length > MAX_ENCODED_BYTES:
            self.faults.append((where, f"{length} bytes long"))
            return
        self.offsets.append(offset)
        self.lengths.append(length)
        self.labels.append(self.kinds.setdefault(label, len(self.kinds)))
        if name:
            self.name_text += name.encode(errors="surrogateescape")
            self.name_ends.append(len(self.name_text))


def numbered(
    source: str, kinds: Collection[Label], classes: tuple[str, ...] = ()
) -> tuple[dict[Label, int], tuple[str, ...]]:
    """Numbers and names of classes.

    Args:
        source: named in messages.
        kinds: all labels that occur: numbers (also as text) or names, None for an image without.
        classes: names by number, where they are known.

    Returns:
        The number of each label, -1 for None; and the names: none without labels, else ``classes``, else of labels that
        are names those, sorted, else the numbers up to the largest.

    Raises:
        RequestError: a number out of range, a name that is none of ``classes``, or numbers and names without these.
    """
    numbers: dict[Label, int] = {None: -1}
    labels = [label for label in kinds if label is not None]
    if not labels:
        return numbers, ()
    if all(_WHOLE.fullmatch(str(label)) for label in labels):
        numbers |= {label: int(label) for label in labels}
        most = len(classes) or MAX_CLASSES
        wrong = sorted(number for number in numbers.values() if not -1 <= number < most)
        if wrong:
            raise RequestError(f"{source}: expected labels from 0 to {most - 1} (-1 = none), found {wrong[0]}")
        names = classes or tuple(str(number) for number in range(max(numbers.values()) + 1))
    else:
        numeral = next((str(label) for label in labels if _WHOLE.fullmatch(str(label))), None)
        if numeral is not None and not classes:  # sorted as a name, "10" would come before "2"
            word = next(str(label) for label in labels if not _WHOLE.fullmatch(str(label)))
            raise RequestError(
                f"{source}: expected labels that all are numbers or all names, found {numeral!r} and {word!r:.60}; if "
                "both are names, list all of them in classes.txt"
            )
        names = classes or tuple(sorted(str(label) for label in labels))
        known = {name: number for number, name in enumerate(names)}
        unknown = sorted(str(label) for label in labels if str(label) not in known)
        if unknown or len(names) > MAX_CLASSES:
            found = f"{unknown[:3]}" if unknown else f"{len(names)} names"
            expected = f"the {len(classes)} classes that are known" if unknown else f"at most {MAX_CLASSES} classes"
            raise RequestError(f"{source}: expected labels among {expected}, found {found}")
        numbers |= {label: known[str(label)] for label in labels}
    for name in names:
        refuse_odd_text(name, f"{source}: classes with names")
    return numbers, names
