"""Tables of images: what Hugging Face's own library writes, and reads back, is the folder of the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packed_samples import CLASSES, hf_dataset, image_bytes, samples_of, write_folder

from feedfast.data.dataset import open_dataset
from feedfast.errors import RequestError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images, and what Hugging Face's datasets write of it."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    root = tmp_path_factory.mktemp("tables")
    table = hf_dataset(write_folder(root / "folder"))
    table.save_to_disk(root / "saved", num_shards=2)
    datasets.DatasetDict({"train": table, "test": table.select(range(5))}).save_to_disk(root / "both")
    (root / "hub" / "data").mkdir(parents=True)
    for number in range(2):
        part = table.shard(2, number, contiguous=True)
        part.to_parquet(root / "hub" / "data" / f"train-{number:05d}-of-00002.parquet", batch_size=4)
    table.select(range(3)).to_parquet(root / "hub" / "data" / "validation-00000-of-00001.parquet")
    return root


@pytest.mark.parametrize("name", ["saved", "both", "hub", "saved/data-0000{0..1}-of-00002.arrow"])
def test_tables_are_the_folder_of_the_same_files(world: Path, name: str) -> None:
    plain = open_dataset(world / "folder")
    for _ in range(2):  # as it was written, and from its index
        data = open_dataset(str(world / name))
        assert data.fingerprint() == plain.fingerprint()
        assert data.classes == CLASSES
        assert data.labels.tolist() == plain.labels.tolist()
        assert data.sizes.tolist() == plain.sizes.tolist()
        for position in range(len(plain)):
            assert data.encoded([position])[0].tobytes() == plain.path(position).read_bytes()
    np.testing.assert_array_equal(data.content(), plain.content())
    assert open_dataset(str(world / name), limit=2).ids.tolist() == open_dataset(world / "folder", limit=2).ids.tolist()


def test_names_and_splits(world: Path) -> None:
    assert open_dataset(world / "saved").name(7) == "data-00001-of-00002.arrow[1]"
    assert open_dataset(world / "hub").name(7) == "train-00001-of-00002.parquet[1]"
    assert len(open_dataset(world / "both", split="val")) == 5
    assert len(open_dataset(world / "hub", split="val")) == 3


def test_their_own_reader_sees_the_same(world: Path) -> None:
    datasets = pytest.importorskip("datasets")
    theirs = datasets.load_from_disk(str(world / "saved"))
    data = open_dataset(world / "saved", check="full")
    from PIL import Image

    for position, row in enumerate(theirs):
        with Image.open(__import__("io").BytesIO(data.encoded([position])[0].tobytes())) as image:
            np.testing.assert_array_equal(np.asarray(image), np.asarray(row["image"]))
        assert data.labels[position] == row["label"]
        assert data.classes[data.labels[position]] == theirs.features["label"].int2str(row["label"])


IMAGES = [image_bytes(seed) for seed in range(3)]


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def write_arrow(path: Path, columns: dict[str, Any], *, footer: bool = False, **options: Any) -> Path:
    table = pa.table(columns)
    opened = (pa.ipc.new_file if footer else pa.ipc.new_stream)(str(path), table.schema, **options)
    with opened as out:
        out.write_table(table, max_chunksize=2)
    return path


@pytest.mark.parametrize("kind", ["arrow", "footer", "parquet"])
def test_plain_columns(tmp_path: Path, kind: str) -> None:
    """Binary without a struct, other names, labels that are names, labels that are missing."""

    def write(name: str, columns: dict[str, Any]) -> Path:
        if kind == "parquet":
            return write_parquet(tmp_path / f"{name}.parquet", columns, row_group_size=2)
        return write_arrow(tmp_path / f"{name}.arrow", columns, footer=kind == "footer")

    path = write("a", {"jpeg": pa.array(IMAGES, pa.large_binary()), "kind": ["b", "a", None]})
    data = open_dataset(path, arrays=["jpeg", "kind"])
    assert [each.tobytes() for each in data.encoded(range(3))] == IMAGES
    assert (data.labels.tolist(), data.classes) == ([1, 0, -1], ("a", "b"))
    data = open_dataset(write("b", {"image": IMAGES, "label": pa.array([4, -1, 0], pa.int8())}))
    assert (data.labels.tolist(), data.classes) == ([4, -1, 0], tuple("01234"))
    data = open_dataset(write("c", {"image": IMAGES}))
    assert (data.labels.tolist(), data.classes) == ([-1, -1, -1], ())


FAULTS: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "no image column": ({"jpeg": IMAGES, "label": [0, 1, 2]}, [], r"column 'image' of images, found \['jpeg', 'l"),
    "no label column": ({"image": IMAGES}, ["image", "kind"], r"expected a column 'kind' of labels, found \['image'\]"),
    "images of text": ({"image": ["a", "b", "c"]}, [], "column 'image' of encoded images, binary or .*found string"),
    "labels of floats": ({"image": IMAGES, "label": [0.0, 1.0, 2.0]}, [], "column 'label' of integers .*found double"),
    "an absent image": ({"image": [IMAGES[0], None, IMAGES[2]]}, [], r"found 1 fault:\n  .*x\.\w+\[1\]: no image"),
    "an image outside": (
        {"image": [{"bytes": IMAGES[0], "path": None}, {"bytes": None, "path": "/data/1.jpg"}]}, [],
        r"x\.\w+\[1\]: its image lies in a file of its own, '/data/1\.jpg'",
    ),
    "a label out of range": ({"image": IMAGES, "label": [0, 1, -5]}, [], "expected labels from 0 to .*found -5"),
    "not an image": ({"image": [IMAGES[0], b"<html>", IMAGES[1]]}, [], r"1 of 3 images .*x\.\w+\[1\]: none of"),
    "no rows": ({"image": pa.array([], pa.binary())}, [], "expected images, found none"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
@pytest.mark.parametrize("which", FAULTS)
def test_a_fault_is_named_by_file_and_row(tmp_path: Path, which: str, kind: str) -> None:
    columns, arrays, said = FAULTS[which]
    path = (write_arrow if kind == "arrow" else write_parquet)(tmp_path / f"x.{kind}", columns)
    for _ in range(2):
        with pytest.raises(RequestError, match=rf"(?s)^{path}: .*{said}"):
            open_dataset(path, arrays=arrays)
    left = {entry.suffix for entry in tmp_path.iterdir()} - {f".{kind}", ".index", ".images"}
    assert left == set(), "temporary files are gone"


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_damage_is_one_sentence(tmp_path: Path, kind: str) -> None:
    columns = {"image": IMAGES, "label": [0, 1, 2]}
    path = (write_arrow if kind == "arrow" else write_parquet)(tmp_path / f"x.{kind}", columns)
    whole = path.read_bytes()
    for content in (b"", b"PAR1", whole[: len(whole) // 2], b"<html>" * 50):
        path.write_bytes(content)
        with pytest.raises(
            RequestError, match=rf"^{path}: expected an? (Arrow|Parquet) file that can be read; ."
        ) as caught:
            open_dataset(path)
        assert "\n" not in str(caught.value)


def test_compressed_buffers_are_refused(tmp_path: Path) -> None:
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    path = write_arrow(tmp_path / "x.arrow", {"image": [bytes(4000)] * 3}, options=options)
    with pytest.raises(RequestError, match=r"x\.arrow: expected images that lie in it as they are, found compressed"):
        open_dataset(path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("state.json", "{", r"state\.json: expected what datasets' save_to_disk writes"),
        ("state.json", '{"_data_files": []}', "expected the files that its state.json names"),
        ("state.json", '{"_data_files": [{"filename": "../x.arrow"}]}', r"found no \['\.\./x\.arrow'\]"),
        ("state.json", '{"_data_files": [{"filename": "gone.arrow"}]}', r"found no \['gone\.arrow'\]"),
        ("state.json", '{"_indices_data_files": [{}], "_data_files": []}', "flatten_indices"),
        ("dataset_dict.json", '{"splits": ["extra"]}', r"expected a split train, found \['extra'\]"),
        ("dataset_dict.json", '{"splits": 3}', r"expected a split train, found \[\]"),
    ],
)
def test_folders_that_say_what_they_do_not_hold(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / name).write_text(content)
    with pytest.raises(RequestError, match=said):
        open_dataset(tmp_path)


def test_parquet_is_unpacked_once_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from feedfast.data import columns

    large = [np.random.default_rng(seed).bytes(1 << 20) for seed in range(24)]
    held = [
        image + more for image, more in zip(IMAGES * 8, large, strict=True)
    ]  # bytes after the end mark are harmless
    path = write_parquet(tmp_path / "x.parquet", {"image": held}, row_group_size=4)
    monkeypatch.setattr(columns, "_ROWS", 2)
    before = pa.total_allocated_bytes()
    peaks: list[int] = []
    real = columns.write_all

    def counted(fd: int, parts: Any) -> None:
        peaks.append(pa.total_allocated_bytes() - before)
        real(fd, parts)

    monkeypatch.setattr(columns, "write_all", counted)
    data = open_dataset(path)
    fingerprint = data.fingerprint()
    assert len(peaks) == 12
    assert max(peaks) < 16 << 20
    assert [each.tobytes() for each in data.encoded([0, 23])] == [held[0], held[23]]
    assert len(open_dataset(path)) == 24
    assert len(peaks) == 12, "opened from its index"
    (images,) = tmp_path.glob(".feedfast-*.images")
    images.write_bytes(images.read_bytes()[:-1])
    assert open_dataset(path).fingerprint() == fingerprint
    assert len(peaks) == 24, "unpacked again"


def test_an_index_leads_to_no_other_file(tmp_path: Path) -> None:
    from dataclasses import replace

    from feedfast.data.index import load, place_of, save, stamps_of

    path = write_parquet(tmp_path / "x.parquet", {"image": IMAGES})
    whole = open_dataset(path).packed
    assert whole is not None
    (images,) = tmp_path.glob(".feedfast-*.images")
    other = tmp_path / "somebody-elses"
    other.write_bytes(images.read_bytes())
    place = place_of([path], ["parquet", "", ""])
    stamps = stamps_of(tmp_path, [path])
    assert load(place, stamps) is not None
    save(place, replace(whole.index, files=stamps_of(tmp_path, [other])))
    assert load(place, stamps) is None
    assert [each.tobytes() for each in open_dataset(path).encoded(range(3))] == IMAGES


def test_a_full_disk_is_said_before_it_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    from feedfast.errors import FeedfastError

    path = write_parquet(tmp_path / "x.parquet", {"image": IMAGES})
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(
        FeedfastError, match=r"x\.parquet: Parquet's images are unpacked once, expected \d+ bytes free in"
    ):
        open_dataset(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.parquet"]


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for kind in ("arrow", "parquet"):
        (tmp_path / f"x.{kind}").touch()
        with pytest.raises(
            RequestError, match=rf"x\.{kind}: Arrow and Parquet are read with pyarrow; pip install 'feed"
        ):
            open_dataset(tmp_path / f"x.{kind}")


def test_rows_in_another_order(world: Path) -> None:
    """What ``select`` leaves is flattened by ``save_to_disk``: rows lie in the order that was asked for."""
    table = hf_dataset(world / "folder").select([7, 3, 11])
    table.save_to_disk(world / "selected")
    data = open_dataset(world / "selected")
    expected = [samples_of(world / "folder")[at][2] for at in (7, 3, 11)]
    assert [each.tobytes() for each in data.encoded(range(3))] == expected
