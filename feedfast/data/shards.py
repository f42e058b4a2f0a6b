"""Which files a source of packed images means: braces, folders of shards, Hugging Face's folders, splits.

``train-{000000..000099}.tar`` is expanded as the shell and WebDataset do. A folder is taken for one of shards only
where it holds nothing that a folder of images could mean. Where the names of its files say train, validation or test,
those of the split are taken.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

from feedfast.data.dense import names_in, plain_path
from feedfast.data.images import EXTENSIONS
from feedfast.errors import RequestError
from feedfast.files import read_json

__all__ = ["Kind", "expanded", "packed_files"]

Kind = Literal["tar", "arrow", "parquet"]
Split = Literal["train", "val"]

_MAX_FILES: Final = 1 << 20
_BRACES: Final = re.compile(r"\{([^{}]*)\}")
_RANGE: Final = re.compile(r"([0-9]{1,18})\.\.([0-9]{1,18})")
_KINDS: Final[dict[str, Kind]] = {".tar": "tar", ".arrow": "arrow", ".parquet": "parquet"}
_WORDS: Final[dict[Split, tuple[str, ...]]] = {"train": ("train",), "val": ("validation", "valid", "val", "test")}


def expanded(path: str) -> list[str]:
    """The paths that braces stand for: ``{000..099}`` numbers with leading zeros, ``{a,b}`` words; several multiply.

    A path that exists as it is written, and braces with neither in them, are left alone.

    Raises:
        RequestError: more than a million paths.
    """
    pieces = _BRACES.split(path)
    if len(pieces) == 1 or os.path.exists(path):
        return [path]
    choices: list[Sequence[str]] = []
    total = 1
    for at, piece in enumerate(pieces):
        numbers = _RANGE.fullmatch(piece)
        if at % 2 == 0:
            choices.append([piece])
        elif numbers:
            first, last = int(numbers[1]), int(numbers[2])
            total *= abs(last - first) + 1
            _refuse_many(path, total)
            padded = any(text != str(int(text)) for text in numbers.groups())
            width = max(map(len, numbers.groups())) if padded else 0
            step = 1 if last >= first else -1
            choices.append([f"{number:0{width}d}" for number in range(first, last + step, step)])
        elif "," in piece:
            choices.append(piece.split(","))
            total *= len(choices[-1])
            _refuse_many(path, total)
        else:
            choices.append([f"{{{piece}}}"])
    return ["".join(parts) for parts in itertools.product(*choices)]


def _refuse_many(path: str, total: int) -> None:
    if total > _MAX_FILES:
        raise RequestError(f"{path}: expected braces that stand for at most {_MAX_FILES} files, found {total}")


def packed_files(paths: Sequence[Path], split: Split) -> tuple[Kind, list[Path]] | None:
    """The files that some paths mean, and what they are; None where the paths mean something else.

    Args:
        paths: files of one kind, or one folder; they exist.
        split: which files of a folder that holds both.

    Raises:
        RequestError: files of several kinds, or a folder that says what it holds and does not hold it.
    """
    if len(paths) == 1 and paths[0].is_dir():
        return _in_folder(paths[0], split)
    kinds = {_KINDS.get(path.suffix.lower()) for path in paths}
    if kinds == {None}:
        return None
    if len(kinds) > 1:
        raise RequestError(
            f"{paths[0]}: expected files of one kind, .tar, .arrow or .parquet, found "
            f"{', '.join(sorted({path.suffix or path.name for path in paths}))}"
        )
    folder = next((path for path in paths if path.is_dir()), None)
    if folder is not None:
        raise RequestError(f"{folder}: expected a file, found a folder")
    kind = kinds.pop()
    return None if kind is None else (kind, list(paths))


def _in_folder(folder: Path, split: Split) -> tuple[Kind, list[Path]] | None:
    names = names_in(folder)
    if "dataset_dict.json" in names:
        splits = _said(folder / "dataset_dict.json").get("splits")
        held = [name for name in splits if plain_path(name)] if isinstance(splits, list) else []
        word = next((word for word in _WORDS[split] if word in held), None)
        if word is None:
            raise RequestError(
                f"{folder}: expected a split {' or '.join(_WORDS[split])}, found {held}; name one of them"
            )
        return _in_folder(folder / word, split)
    if "state.json" in names and "dataset_info.json" in names:
        return "arrow", _saved(folder)
    for kind in (".parquet", ".arrow"):
        for place in (folder, folder / "data"):  # as in repositories of the Hub
            held = [name for name in names_in(place) if name.endswith(kind)] if place.is_dir() else []
            if held:
                return _KINDS[kind], [place / name for name in _of_split(place, held, split)]
    tars = [name for name in names if name.endswith(".tar")]
    if not tars or any(name.lower().endswith(EXTENSIONS) or (folder / name).is_dir() for name in names):
        return None
    return "tar", [folder / name for name in _of_split(folder, tars, split)]


def _of_split(folder: Path, names: Sequence[str], split: Split) -> list[str]:
    """Those whose names say the split; all, where none says any."""
    said = {
        word: [name for name in names if re.search(rf"(^|[^a-z]){word}([^a-z]|$)", name.lower())]
        for words in _WORDS.values()
        for word in words
    }
    if not any(said.values()):
        return list(names)
    found = next((said[word] for word in _WORDS[split] if said[word]), None)
    if found is None:
        words = " or ".join(_WORDS[split])
        raise RequestError(f"{folder}: expected files of {words}, found {', '.join(names[:3])}; name the files")
    return found


def _saved(folder: Path) -> list[Path]:
    """The files of a folder that ``save_to_disk`` wrote."""
    state = _said(folder / "state.json")
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise RequestError(
            f"{folder}: expected rows in order, found a table of indices; flatten_indices(), and save again"
        )
    files = state.get("_data_files")
    named = [entry.get("filename") for entry in files if isinstance(entry, dict)] if isinstance(files, list) else []
    wrong = [name for name in named if not plain_path(name) or not (folder / str(name)).is_file()]
    if not named or wrong:
        raise RequestError(
            f"{folder}: expected the files that its state.json names, found {'no' if wrong else ''} {wrong or named}"
        )
    return [folder / str(name) for name in named]


def _said(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise RequestError(f"{path}: expected what datasets' save_to_disk writes; {error}") from error
    return found if isinstance(found, dict) else {}
