"""Mutations of valid files: bits, lengths, splices; structure of JSON, TOML, pickled tensors and zips; kinds of files.

A mutation is ``(name, a, b)`` with two whole numbers, which say where and what; hypothesis draws and shrinks them, and
the same numbers do the same to the same file.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

Mutation = tuple[str, int, int]

ODD: list[Any] = [
    None, True, False, 0, 1, -1, -7, 255, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64, 10**30,
    10**400, 0.5, -0.5, 1e-320, 1e18, 1e39, 1e308, float("inf"), float("-inf"), float("nan"), "", "x", "x" * 5000,
    "\x00", "a\x00b", "\x1b[2J\x1b]0;evil\x07", "\x9b31m", "\u202eevil", "[/red]", "../../../etc/passwd", "/dev/zero",
    "/proc/self", "/", "nan", "1e999", "os:system", "zoo/wrn-10-1", [], {}, [[]], [0] * 10000, {"a": {"b": {}}},
    ["x"] * 300, "\ud800", "０", -(2**63), 1e-9, {"": None}, [None],
]  # fmt: skip
TEXTS = [b"\x00", b"\xff" * 8, b"\xff\xff\xff\x7f", b"9" * 5000, b"[" * 3000, b"{" * 3000, b"\n", b"\r", b"\x1b[2J",
         b"1e999", b"-1", b"NaN", b'"', b"'''", b"\\u0000", b"\xed\xa0\x80", b"\xf0\x9f\x92\xa9", b"=", b".a" * 2000,
         b"\x00" * 4096, b"PK\x01\x02", b"PK\x05\x06", b"IEND", b"\xff\xd9", b"\xff\xe1", b"\xff\xc0"]  # fmt: skip


def _at(data: bytes, number: int) -> int:
    return number % (len(data) + 1)


BYTES: dict[str, Callable[[bytes, int, int], bytes]] = {
    "flip": lambda d, a, b: d if not d else _with(d, a % len(d), bytes([d[a % len(d)] ^ (1 << b % 8)])),
    "byte": lambda d, a, b: d if not d else _with(d, a % len(d), bytes([b % 256])),
    "cut": lambda d, a, b: d[: _at(d, a)],
    "behead": lambda d, a, b: d[_at(d, a) :],
    "drop": lambda d, a, b: d[: _at(d, a)] + d[_at(d, a) + 1 + b % 64 :],
    "repeat": lambda d, a, b: d[: _at(d, a)] + d[max(0, _at(d, a) - 1 - b % 4096) :],
    "splice": lambda d, a, b: d[: _at(d, a)] + d[_at(d, b) :],
    "insert": lambda d, a, b: d[: _at(d, a)] + TEXTS[b % len(TEXTS)] + d[_at(d, a) :],
    "overwrite": lambda d, a, b: _with(d, _at(d, a), TEXTS[b % len(TEXTS)]),
    "word": lambda d, a, b: _with(d, _at(d, a), struct.pack("<Q", b * 2654435761 % 2**64)[: 1 << a % 4]),
    "big-endian": lambda d, a, b: _with(d, _at(d, a), struct.pack(">I", b * 2654435761 % 2**32)),
    "lines": lambda d, a, b: b"".join(_swapped(d.splitlines(keepends=True), a, b)),
    "line": lambda d, a, b: d + b"".join(d.splitlines(keepends=True)[a % 40 : a % 40 + 1]) * (1 + b % 3),
}


def _with(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def _swapped(lines: list[bytes], a: int, b: int) -> list[bytes]:
    if lines:
        a, b = a % len(lines), b % len(lines)
        lines[a], lines[b] = lines[b], lines[a]
    return lines


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every node below ``tree``."""
    found, waiting = [], [tree]
    while waiting:
        node = waiting.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            found.append((node, key))
            waiting.append(node[key])
    return found


def mutate_tree(tree: Any, name: str, a: int, b: int, odd: list[Any]) -> None:
    """Change one node of nested dicts and lists in place."""
    places = _places(tree)
    if not places:
        return
    node, key = places[a % len(places)]
    if name == "set":
        node[key] = odd[b % len(odd)]
    elif name == "delete":
        del node[key]
    elif name == "copy":
        other, which = places[b % len(places)]
        with contextlib.suppress(ValueError):
            node[key] = json.loads(json.dumps(other[which], default=str))
    elif name == "nest":
        for _ in range(b % 300):
            node[key] = [node[key]] if b % 2 else {"a": node[key]}
    elif name == "rename" and isinstance(node, dict):
        text = odd[b % len(odd)]
        node[text if isinstance(text, str) else str(text)[:50]] = node.pop(key)
    elif name == "scale" and isinstance(node[key], (int, float)) and not isinstance(node[key], bool):
        node[key] = node[key] * (2 ** (b % 70)) * (-1 if b % 2 else 1)


TREE = ("set", "delete", "copy", "nest", "rename", "scale")


def mutate_json(data: bytes, name: str, a: int, b: int) -> bytes:
    """Through the structure of a JSON text, or of one line of it."""
    lines = data.splitlines(keepends=True) if data.count(b"\n{") else [data]
    at = b // 64 % len(lines)
    try:
        tree = [json.loads(lines[at])]
    except (ValueError, RecursionError):
        return BYTES["splice"](data, a, b)
    mutate_tree(tree, name, a, b, ODD)
    lines[at] = json.dumps(tree[0] if tree else {}, separators=(",", ":")).encode() + b"\n"
    return b"".join(lines)


def mutate_toml(data: bytes, name: str, a: int, b: int) -> bytes:
    """One value of a line ``key = value``."""
    lines = data.decode(errors="replace").splitlines()
    assigned = [number for number, line in enumerate(lines) if "=" in line]
    if not assigned:
        return data
    at = assigned[a % len(assigned)]
    key = lines[at].split("=")[0]
    value = ODD[b % len(ODD)]
    if name == "delete":
        del lines[at]
    elif name == "copy":
        lines.insert(b % len(lines), lines[at])
    elif name == "nest":
        lines[at] = f"{key} = " + "[" * (b % 400) + "1" + "]" * (b % 400)
    elif name == "rename":
        lines[at] = f"{'.'.join([key.strip()] * (1 + b % 100))} = 1"
    else:
        text = (
            {None: "''", True: "true", False: "false"}.get(value) if value is None or isinstance(value, bool) else None
        )
        lines[at] = f"{key} = {text or (value if isinstance(value, float) else json.dumps(value))}"
    return "\n".join(lines).encode(errors="surrogatepass")


def _odd_tensors(like: Any) -> list[Any]:
    tensor = like if isinstance(like, torch.Tensor) else torch.ones(2, 3)
    real = tensor.detach().float() if tensor.dim() else tensor.detach().float().reshape(1)
    return [
        real * float("nan"), real + float("inf"), real.to("meta"), real.to_sparse(), real.reshape(-1), real[:0],
        real.to(torch.complex64), real.to(torch.int8), real.to(torch.bfloat16), real.double(), real * 1e30, -real,
        torch.zeros(1).expand(10**6, 10**6), torch.tensor(0.0), real.bool(), torch.zeros(0), real * 0,
    ]  # fmt: skip


def mutate_torch(data: bytes, name: str, a: int, b: int) -> bytes:
    """One node of what ``torch.save`` wrote: a value, a key, a tensor of another kind."""
    try:
        tree = [torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")]
    except Exception:
        return BYTES["splice"](data, a, b)
    tree = [dict(tree[0])] if isinstance(tree[0], dict) else tree
    places = _places(tree)
    node, key = places[a % len(places)]
    if name in ("set", "scale"):
        choices = _odd_tensors(node[key]) if b % 2 else ODD
        node[key] = choices[b // 2 % len(choices)]
    elif name == "copy":
        other, which = places[b % len(places)]
        node[key] = other[which] if not isinstance(other[which], (dict, list)) else 0
    else:
        mutate_tree(tree, name, a, b, ODD)
    out = io.BytesIO()
    torch.save(tree[0] if tree else {}, out, _use_new_zipfile_serialization=b % 7 != 0)
    return out.getvalue()


def mutate_npz(data: bytes, name: str, a: int, b: int) -> bytes:
    """One member of a zip of arrays: its header, its content, its compression, its name."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {info.filename: archive.read(info) for info in archive.infolist()}
    except Exception:
        return BYTES["splice"](data, a, b)
    if not members:
        return data
    which = sorted(members)[a % len(members)]
    content = members[which]
    if name == "delete":
        del members[which]
    elif name == "rename":
        members[str(ODD[b % len(ODD)])[:50].replace("\x00", "0").encode(errors="replace").decode()] = members.pop(which)
    elif name == "scale":  # another shape in the header, at the same length
        for digit in b"23456789":
            content = content.replace(bytes([digit]), b"9") if b % 8 == digit % 8 else content
        members[which] = content
    elif name == "nest":
        head = content.find(b"(")
        members[which] = _with(content, head, b"(" * (b % 100))
    elif name == "set":
        odd = np.array(ODD[b % len(ODD)] if not isinstance(ODD[b % len(ODD)], (dict, list)) else [1, 2])
        out = io.BytesIO()
        np.save(out, odd if odd.dtype != object else np.zeros(3), allow_pickle=False)
        members[which] = out.getvalue()
    else:
        names = list(BYTES)
        members[which] = BYTES[names[b % len(names)]](content, a % 160, b)
    out = io.BytesIO()
    kinds = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    with zipfile.ZipFile(out, "w", kinds[b % len(kinds)]) as archive:
        for member, value in members.items():
            archive.writestr(member or "x", value)
    return out.getvalue()


def mutate_kind(path: Path, a: int) -> None:
    """Something else in the place of a file."""
    path.unlink(missing_ok=True)
    kind = a % 8
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.symlink_to("/dev/zero")
    elif kind == 2:
        path.mkdir()
    elif kind == 3:
        path.touch()
    elif kind == 4:
        path.symlink_to(path.name)  # a loop
    elif kind == 5:
        path.touch()
        os.truncate(path, 200 << 30)
    elif kind == 6:
        path.symlink_to("/dev/tty")


STRUCTURE = {"json": mutate_json, "lines": mutate_json, "toml": mutate_toml, "torch": mutate_torch, "npz": mutate_npz}


def plans(content: str) -> st.SearchStrategy[list[Mutation]]:
    """Lists of mutations that make sense for a kind of content."""
    place = st.integers(0, 2**32 - 1)
    raw = st.tuples(st.sampled_from(sorted(BYTES)), place, place)
    kind = st.tuples(st.just("kind"), place, place)
    # the structure comes first: nothing can be parsed any more after a bit has been flipped
    if content not in STRUCTURE:
        return st.one_of(st.lists(raw, min_size=1, max_size=4), st.lists(kind, min_size=1, max_size=1))
    shape = st.tuples(st.sampled_from(TREE), place, place)
    both = st.builds(lambda first, then: [*first, *then], st.lists(shape, max_size=3), st.lists(raw, max_size=2))
    shapes = st.lists(shape, min_size=1, max_size=4)
    return st.one_of(shapes, shapes, both.filter(bool), st.lists(kind, min_size=1, max_size=1))


def apply(path: Path, content: str, plan: list[Mutation]) -> None:
    """Mutate a file."""
    for name, a, b in plan:
        if name == "kind":
            mutate_kind(path, a)
        elif path.is_file() and not path.is_symlink():
            data = path.read_bytes()
            path.write_bytes(BYTES[name](data, a, b) if name in BYTES else STRUCTURE[content](data, name, a, b))
