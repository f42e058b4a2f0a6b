"""Tables with a column of encoded images: Arrow files as Hugging Face's ``save_to_disk`` writes them, and Parquet.

An Arrow file is mapped once: its images lie in it as they are, so the index holds their places and nothing reads
Arrow afterwards. Parquet packs images into compressed pages of a megabyte and row groups of a hundred images and more;
one image costs its whole page, a random order a hundred times the bytes. So its images are put one after the other in
a file once, as Hugging Face's own library does, in bounded memory, and read from there.

The image column is a struct with ``bytes`` (Hugging Face's ``Image``) or plain binary; the label column a
``ClassLabel`` (its names are in the schema), integers or names; null or -1 is no label. Nothing here is ever unpickled.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from feedfast.data.listing import IMAGE, LABEL, Label, Listed, Wanted
from feedfast.errors import FeedfastError, RequestError
from feedfast.files import MAX_JSON_BYTES, parse_json, write_all

__all__ = ["unpack_parquet", "unpacked_bytes", "walk_arrow"]

_ROWS: Final = 64  # of Parquet at a time
_BUFFER_BYTES: Final = 1 << 20
_METADATA: Final = b"huggingface"


def walk_arrow(path: Path, wanted: Wanted) -> Listed:
    """The images of an Arrow file, a stream (``save_to_disk``) or a file with a footer.

    Raises:
        RequestError: it is neither, has no such columns, or its buffers are compressed.
    """
    pa = _pyarrow(path)
    try:
        with pa.memory_map(str(path)) as source:
            whole = source.read_buffer()
            is_file = bytes(whole[:6]) == b"ARROW1"
            reader = pa.ipc.open_file(whole) if is_file else pa.ipc.open_stream(whole)
            table = _Table(path, reader.schema, wanted)
            found = Listed(classes=table.classes)
            batches = (reader.get_batch(at) for at in range(reader.num_record_batches)) if is_file else iter(reader)
            for batch in batches:
                _take_places(table, batch, whole, found)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _unreadable(path, "an Arrow file", error) from error
    return found


def _take_places(table: _Table, batch: Any, whole: Any, found: Listed) -> None:
    column = table.images(batch)
    labels = table.labels(batch)
    starts, ends, values = _bounds(column)
    at = values.address - whole.address if values.size else 0  # no bytes lie anywhere
    if not 0 <= at <= whole.size - values.size:
        raise RequestError(
            f"{table.path}: expected images that lie in it as they are, found compressed buffers; save it without "
            "compression"
        )
    valid, before = table.valid(batch), found.rows
    found.rows += len(column)
    for row in range(len(column)):
        where = f"{table.path}[{before + row}]"
        start, end = int(starts[row]), int(ends[row])
        if not valid[row]:
            found.faults.append((where, table.absent(batch, row)))
        elif not 0 <= start <= end <= values.size:
            raise ValueError(f"row {before + row} lies outside its buffer")
        else:
            found.add(where, "", at + start, end - start, labels[row])


def _bounds(column: Any) -> tuple[NDArray[Any], NDArray[Any], Any]:
    """Where each value of a binary column starts and ends in its buffer of values, and that buffer."""
    import pyarrow as pa

    large = pa.types.is_large_binary(column.type) or pa.types.is_large_string(column.type)
    dtype = np.dtype("<i8") if large else np.dtype("<i4")
    _, offsets, values = column.buffers()
    values = pa.py_buffer(b"") if values is None else values
    if not len(column):
        return np.empty(0, dtype), np.empty(0, dtype), values
    found = np.frombuffer(offsets, dtype=dtype, count=len(column) + 1, offset=column.offset * dtype.itemsize)
    return found[:-1], found[1:], values


def unpacked_bytes(paths: Sequence[Path], wanted: Wanted) -> tuple[int, int]:
    """Rows of some Parquet files, and about how many bytes their images take unpacked."""
    rows = size = 0
    for path in paths:
        file = _parquet(path)
        _Table(path, file.schema_arrow, wanted)
        meta = file.metadata
        rows += meta.num_rows
        for group in range(meta.num_row_groups):
            columns = (meta.row_group(group).column(at) for at in range(meta.num_columns))
            image = wanted.image or IMAGE
            size += sum(c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] == image)
    return rows, size


def unpack_parquet(path: Path, wanted: Wanted, fd: int, at: int, advance: Callable[[int], None]) -> Listed:
    """Write the images of a Parquet file one after the other.

    Args:
        path: the file.
        wanted: names of its columns.
        fd: an open file, positioned where the first image goes.
        at: that place.
        advance: called with rows done.

    Returns:
        Where each image lies in the file that was written.

    Raises:
        RequestError: it is no Parquet file, is damaged, or has no such columns.
        OSError: it cannot be written.
    """
    pa = _pyarrow(path)
    file = _parquet(path)
    table = _Table(path, file.schema_arrow, wanted)
    found = Listed(classes=table.classes)
    for batch in _batches(file, table, pa):
        column, labels = table.images(batch), table.labels(batch)
        starts, ends, values = _bounds(column)
        pieces: list[memoryview] = []
        data = memoryview(values)
        valid, before = table.valid(batch), found.rows
        found.rows += len(column)
        for row in range(len(column)):
            where = f"{path}[{before + row}]"
            if not valid[row]:
                found.faults.append((where, table.absent(batch, row)))
                continue
            start, end = int(starts[row]), int(ends[row])
            pieces.append(data[start:end])
            found.add(where, "", at, end - start, labels[row])
            at += end - start
        write_all(fd, pieces)
        advance(len(column))
    return found


def _batches(file: Any, table: _Table, pa: Any) -> Iterator[Any]:
    try:
        yield from file.iter_batches(batch_size=_ROWS, columns=table.columns, use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _unreadable(table.path, "a Parquet file", error) from error


class _Table:
    """The two columns of a table, whatever form they have."""

    def __init__(self, path: Path, schema: Any, wanted: Wanted) -> None:
        import pyarrow as pa

        self.path = path
        self._image, self._label = wanted.image or IMAGE, wanted.label or LABEL
        if self._image not in schema.names:
            raise RequestError(
                f"{path}: expected a column {self._image!r} of images, found {schema.names[:20]}; "
                "data.arrays = [images, labels] says which are which"
            )
        kind = schema.field(self._image).type
        self._nested = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        inner = kind.field(kind.get_field_index("bytes")).type if self._nested else kind
        if not (pa.types.is_binary(inner) or pa.types.is_large_binary(inner)):
            raise RequestError(
                f"{path}: expected column {self._image!r} of encoded images, binary or a struct with bytes, "
                f"found {kind}"
            )
        self._labeled = self._label in schema.names
        if not self._labeled and wanted.label:
            raise RequestError(f"{path}: expected a column {self._label!r} of labels, found {schema.names[:20]}")
        if self._labeled:
            said = schema.field(self._label).type
            if not (pa.types.is_integer(said) or pa.types.is_string(said) or pa.types.is_large_string(said)):
                raise RequestError(f"{path}: expected column {self._label!r} of integers or names, found {said}")
        self.columns = [self._image, self._label] if self._labeled else [self._image]
        self.classes = self._names(schema) if self._labeled else ()

    def images(self, batch: Any) -> Any:
        """The binary column of a batch."""
        column = batch.column(batch.schema.get_field_index(self._image))
        return column.field(column.type.get_field_index("bytes")) if self._nested else column

    def valid(self, batch: Any) -> NDArray[np.bool_]:
        """Which rows of a batch have an image; that of a struct which is null is null, whatever lies there."""
        column = batch.column(batch.schema.get_field_index(self._image))
        found: NDArray[np.bool_] = column.is_valid().to_numpy(zero_copy_only=False)
        found &= self.images(batch).is_valid().to_numpy(zero_copy_only=False)
        return found

    def labels(self, batch: Any) -> list[Label]:
        """The labels of a batch; None where there is none."""
        if not self._labeled:
            return [None] * len(batch)
        found: list[Label] = batch.column(batch.schema.get_field_index(self._label)).to_pylist()
        return [None if label == -1 else label for label in found]

    def absent(self, batch: Any, row: int) -> str:
        """Why a row has no image."""
        value = batch.column(batch.schema.get_field_index(self._image))[row].as_py()
        outside = value.get("path") if isinstance(value, dict) else None
        if outside:
            return f"its image lies in a file of its own, {outside!r:.100}; embed the images before you save the table"
        return "no image"

    def _names(self, schema: Any) -> tuple[str, ...]:
        """The names of a ``ClassLabel``, from what Hugging Face's library writes into the schema."""
        raw = (schema.metadata or {}).get(_METADATA, b"")
        try:
            tree = parse_json(raw) if raw and len(raw) <= MAX_JSON_BYTES else {}
            names = tree["info"]["features"][self._label].get("names")
        except (ValueError, KeyError, TypeError, AttributeError):
            return ()
        return tuple(str(name) for name in names) if isinstance(names, list) else ()


def refuse_full_disk(folder: Path, size_bytes: int, source: str) -> None:
    """Raise unless a folder has room for images unpacked from Parquet.

    Raises:
        FeedfastError: it has not.
    """
    free = shutil.disk_usage(folder).free
    if free < size_bytes:
        raise FeedfastError(
            f"{source}: Parquet's images are unpacked once, expected {size_bytes} bytes free in {folder}, found {free}"
        )


def _parquet(path: Path) -> Any:
    pa = _pyarrow(path)
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _unreadable(path, "a Parquet file", error) from error


def _unreadable(path: Path, what: str, error: Exception) -> RequestError:
    if isinstance(error, RequestError):
        return error
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return RequestError(f"{path}: expected {what} that can be read; {reason[:300]}")


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow as pa
    except ImportError as error:
        raise RequestError(f"{path}: Arrow and Parquet are read with pyarrow; pip install 'feedfast[hf]'") from error
    return pa
