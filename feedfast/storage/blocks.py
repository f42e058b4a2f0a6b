"""Blocks and shards as bytes: compression, checksums, and the index at the end of a shard.

A block is one zstd frame (level 1, frame checksum on) or raw bytes followed by their crc32c; a shard is its blocks and
an index of (offset, length) per block with a crc32c, as Zarr's ``sharding_indexed`` lays them out with the index at
the end. Decoding trusts nothing: frame header, announced size, checksum flag, offsets and lengths are checked before
memory is touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs import zstd

from feedfast.errors import CacheDamageError
from feedfast.storage.layout import NO_CHUNK, ZSTD_LEVEL
from feedfast.storage.schema import Compression

Array = npt.NDArray[Any]
AskedCompression = Literal["auto", "zstd", "raw"]
Buffer = bytes | bytearray | memoryview | Array

ZSTD_PAYS: Final = 1.15
_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"


def crc32c(data: Buffer, start: int = 0) -> int:
    """CRC-32C of a buffer, continuing from ``start``."""
    return int(google_crc32c.extend(start, data if isinstance(data, bytes) else np.frombuffer(data, np.uint8)))


def crc32c_of(parts: Iterable[npt.NDArray[np.uint8]]) -> int:
    """CRC-32C of contiguous uint8 arrays laid end to end."""
    found = 0
    for part in parts:
        found = google_crc32c.extend(found, part)
    return int(found)


def row_sums(rows: Array) -> npt.NDArray[np.uint32]:
    """crc32c of each row of ``rows`` [n, ...], uint32 [n]; 0xFFFFFFFF, which would read as missing, is one less."""
    found = np.array([crc32c(np.ascontiguousarray(row)) for row in rows], np.uint32)
    return np.minimum(found, np.uint32(0xFFFFFFFE))


def crc_bytes(value: int) -> bytes:
    """A checksum as Zarr stores it: four bytes, little-endian."""
    return value.to_bytes(4, "little")


def compress_block(block: Buffer, compression: Compression) -> bytes:
    """One block as stored: a zstd frame with checksum, or the bytes and their crc32c."""
    if compression == "zstd":
        return bytes(zstd.compress(block, ZSTD_LEVEL, True))
    return b"".join((np.frombuffer(block, np.uint8).data, crc_bytes(crc32c(block))))


def decompress(stored: Buffer, compression: Compression, out: Array) -> None:
    """Decode a stored block into ``out``, whose byte size is the one expected, verifying its checksum.

    Raises:
        CacheDamageError: wrong size, checksum or frame; ``out`` then holds nothing of use.
    """
    target = out.reshape(-1).view(np.uint8)
    source = np.frombuffer(stored, np.uint8)
    if compression == "none":
        if source.size != target.size + 4:
            raise CacheDamageError(f"block: expected {target.size + 4} bytes, found {source.size}")
        if crc_bytes(crc32c(source[:-4])) != source[-4:].tobytes():
            raise CacheDamageError("block: crc32c differs")
        target[:] = source[:-4]
        return
    announced = zstd_content_size(source[:18].tobytes())
    if announced != target.size:
        raise CacheDamageError(f"block: expected a zstd frame of {target.size} bytes with checksum, found {announced}")
    try:
        zstd.decompress(source, target)
    except RuntimeError as error:
        raise CacheDamageError(f"block: {error}") from error


def zstd_content_size(header: bytes) -> int | None:
    """Decoded size a zstd frame announces (RFC 8878, 3.1.1); None for no frame, or one without size or checksum."""
    if len(header) < 6 or header[:4] != _ZSTD_MAGIC:
        return None
    descriptor = header[4]
    single_segment, checksum = bool(descriptor & 0x20), bool(descriptor & 0x04)
    width = (1 if single_segment else 0, 2, 4, 8)[descriptor >> 6]
    start = 5 + (0 if single_segment else 1) + (0, 1, 2, 4)[descriptor & 0x03]
    if not checksum or width == 0 or len(header) < start + width:
        return None
    size = int.from_bytes(header[start : start + width], "little")
    return size + 256 if width == 2 else size


def choose_compression(blocks: Iterable[Buffer], asked: AskedCompression = "auto") -> Compression:
    """What is asked for; "auto": ``zstd`` if it shrinks these pilot blocks of codes by 1.15 or more, else ``none``."""
    if asked != "auto":
        return "zstd" if asked == "zstd" else "none"
    raw = stored = 0
    for block in blocks:
        raw += np.frombuffer(block, np.uint8).size
        stored += len(compress_block(block, "zstd"))
    return "zstd" if stored and raw / stored >= ZSTD_PAYS else "none"


def index_bytes(lengths: Sequence[int | None]) -> bytes:
    """A shard's index for blocks of these stored lengths laid end to end from offset 0; None marks an absent block."""
    table = np.full((len(lengths), 2), NO_CHUNK, "<u8")
    offset = 0
    for number, length in enumerate(lengths):
        if length is not None:
            table[number] = offset, length
            offset += length
    data = table.tobytes()
    return data + crc_bytes(crc32c(data))


def index_length(num_blocks: int) -> int:
    """Bytes of a shard's index."""
    return 16 * num_blocks + 4


def parse_index(tail: Buffer, num_blocks: int, object_bytes: int) -> npt.NDArray[np.uint64]:
    """The (offset, length) table [num_blocks, 2] in the last `index_length` bytes of a shard.

    Absent blocks are (2^64-1, 2^64-1).

    Raises:
        CacheDamageError: too short, wrong checksum, or an entry outside the object's data.
    """
    size = index_length(num_blocks)
    data = np.frombuffer(tail, np.uint8)
    if data.size < size or object_bytes < size:
        raise CacheDamageError(f"index: expected {size} bytes, found {min(data.size, object_bytes)}")
    data = data[-size:]
    if crc_bytes(crc32c(data[:-4])) != data[-4:].tobytes():
        raise CacheDamageError("index: crc32c differs")
    table = data[:-4].view("<u8").reshape(num_blocks, 2)
    present = ~(table == NO_CHUNK).all(axis=1)
    room = np.uint64(object_bytes - size)
    offsets, lengths = table[present, 0], table[present, 1]
    if ((offsets > room) | (lengths > room - np.minimum(offsets, room))).any():
        raise CacheDamageError(f"index: a block lies outside the {object_bytes - size} bytes before it")
    return table.astype(np.uint64)
