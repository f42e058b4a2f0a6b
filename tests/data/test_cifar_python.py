"""CIFAR's pickled batches: as torchvision reads them, without running anything in them."""

from __future__ import annotations

import contextlib
import gzip
import importlib
import io
import pickle
import struct
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feedfast.data import cifar, pickles
from feedfast.data.dataset import open_dataset
from feedfast.data.pickles import PickleError, read_pickle
from feedfast.errors import RequestError

RNG = np.random.default_rng(0)
PER_BATCH = 4
NAMES = [f"name-{number}" for number in range(100)]


def short(text: str) -> bytes:
    return b"U" + bytes([len(text)]) + text.encode()


def numbers(values: list[int]) -> bytes:
    return b"](" + b"".join(b"K" + bytes([value]) for value in values) + b"e"


def as_python_2(batch: dict[str, object]) -> bytes:
    """A batch as Python 2.7 pickled it, protocol 2: text is bytes, an array is built and then given its state."""
    out = b"\x80\x02}q\x01("
    for key, value in batch.items():
        out += short(key)
        if isinstance(value, np.ndarray):
            rows, columns = (b"M" + struct.pack("<H", size) for size in value.shape)
            body = value.tobytes()
            out += b"cnumpy.core.multiarray\n_reconstruct\nq\x04cnumpy\nndarray\nq\x05K\x00\x85U\x01b\x87R(K\x01"
            out += rows + columns + b"\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN"
            out += b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T" + struct.pack("<I", len(body)) + body + b"tb"
        else:
            assert isinstance(value, list)
            out += numbers(value) if isinstance(value[0], int) else b"](" + b"".join(map(short, value)) + b"e"
    return out + b"u."


def as_python_3(protocol: int):
    return lambda batch: pickle.dumps(batch, protocol=protocol)


WRITERS = {"python-2": as_python_2, **{f"protocol-{number}": as_python_3(number) for number in (2, 3, 4, 5)}}


def batch(labels: dict[str, int]) -> dict[str, object]:
    images = RNG.integers(0, 256, (PER_BATCH, 3072), dtype=np.uint8)
    drawn = {key: RNG.integers(0, bound, PER_BATCH).tolist() for key, bound in labels.items()}
    return {"data": images, **drawn, "filenames": [f"{number}.png" for number in range(PER_BATCH)]}


def cifar_10(root: Path, write=as_python_2) -> Path:
    """The folder of torchvision's CIFAR-10, four images in each batch."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(write(batch({"labels": 10})))
    (folder / "batches.meta").write_bytes(write({"label_names": NAMES[:10]}))
    return folder


def cifar_100(root: Path, write=as_python_2) -> Path:
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for name in ("train", "test"):
        (folder / name).write_bytes(write(batch({"fine_labels": 100, "coarse_labels": 20})))
    (folder / "meta").write_bytes(write({"fine_label_names": NAMES, "coarse_label_names": NAMES[:20]}))
    return folder


def archive(folder: Path, path: Path) -> Path:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as out:
        out.add(folder, folder.name)
    return path


@pytest.mark.parametrize(
    ("make", "kind", "write"),
    [(cifar_10, "CIFAR10", "python-2"), *((cifar_100, "CIFAR100", write) for write in WRITERS)],
)
def test_as_torchvision_reads_it(tmp_path: Path, make, kind: str, write: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path, WRITERS[write])
    packed = archive(folder, tmp_path / "x.tar.gz")
    module = importlib.import_module("torchvision.datasets.cifar")
    monkeypatch.setattr(module, "check_integrity", lambda *_: True)  # it knows the originals' checksums
    for split in ("train", "val"):
        theirs = getattr(module, kind)(str(tmp_path), train=split == "train")
        for source in (folder, packed):
            data = open_dataset(source, split=split)  # type: ignore[arg-type]
            np.testing.assert_array_equal(data.pixels(range(len(data))), theirs.data)
            assert data.labels.tolist() == theirs.targets
            assert list(data.classes) == theirs.classes


def test_one_identity_with_the_binary_files(tmp_path: Path) -> None:
    folder = cifar_10(tmp_path)
    batches = [folder / f"data_batch_{number}" for number in range(1, 6)]
    held = [pickle.loads(path.read_bytes(), encoding="bytes") for path in batches]
    for path, value in zip(batches, held, strict=True):
        labels = np.array(value[b"labels"], np.uint8)[:, None]
        path.with_suffix(".bin").write_bytes(np.concatenate([labels, value[b"data"]], 1).tobytes())
    binary = open_dataset([path.with_suffix(".bin") for path in batches])
    for source in (folder, batches, archive(folder, tmp_path / "x.tar")):
        data = open_dataset(source)
        assert data.fingerprint() == binary.fingerprint()
        np.testing.assert_array_equal(data.content(), binary.content())
        assert data.name(PER_BATCH) == "data_batch_2[0]"


def test_what_is_missing_or_something_else(tmp_path: Path) -> None:
    folder = cifar_10(tmp_path)
    with pytest.raises(RequestError, match=r"found cifar-10-batches-py in it; name .*cifar-10-batches-py$"):
        open_dataset(tmp_path)
    (folder / "batches.meta").unlink()
    assert open_dataset(folder).classes == tuple("0123456789")
    (folder / "data_batch_3").unlink()
    with pytest.raises(RequestError, match=r"data_batch_5, found no data_batch_3$"):
        open_dataset(folder)
    with pytest.raises(RequestError, match=r"x\.tgz: expected data_batch_1.*found no data_batch_3"):
        open_dataset(archive(folder, tmp_path / "x.tgz"))
    assert len(open_dataset(folder, split="val")) == PER_BATCH
    (folder / "test_batch").write_bytes(as_python_2(batch({"labels": 11}) | {"labels": [10] * PER_BATCH}))
    with pytest.raises(RequestError, match=r"test_batch: expected 4 labels from 0 to 9"):
        open_dataset(folder, split="val")
    (folder / "test_batch").write_bytes(pickle.dumps({"labels": [1], "data": np.zeros((1, 3072))}))
    with pytest.raises(RequestError, match=r"test_batch: expected 'data' as uint8 \[n, 3072\]"):
        open_dataset(folder, split="val")
    other = tmp_path / "other.pkl"
    other.write_bytes(pickle.dumps({"weights": [1]}))
    with pytest.raises(
        RequestError, match="expected a batch of CIFAR's Python files, found a pickle of something else"
    ):
        open_dataset(other)
    with pytest.raises(RequestError, match="a list may only name CIFAR"):
        open_dataset([folder, folder])
    (tmp_path / "empty.tar.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "text.tar.gz").write_bytes(b"<html>404</html>")
    for name in ("empty.tar.gz", "text.tar.gz"):
        with pytest.raises(RequestError, match=f"{name}: expected CIFAR's archive"):
            open_dataset(tmp_path / name)


class Runs:
    """Would write a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


ATTACKS = {
    "calls": lambda path: pickle.dumps({"data": Runs(path)}, protocol=4),
    "os.system": lambda path: b"cos\nsystem\n(S'touch %s'\ntR." % bytes(path),
    "instance": lambda path: b"(S'touch %s'\nios\nsystem\n." % bytes(path),
    "object": lambda path: b"(cos\nsystem\nS'touch %s'\no." % bytes(path),
    "calls-dtype": lambda path: b"cnumpy\ndtype\n(S'%s'\ntR." % bytes(path),
    "object-array": lambda path: pickle.dumps(np.array([{}], dtype=object)),
    "records": lambda path: pickle.dumps(np.zeros(2, dtype="i4,f4")),
    "shape": lambda path: pickle.dumps(np.zeros(100, np.uint8), 2).replace(b"Kd\x85", b"J\xff\xff\xff\x7f\x85"),
    "memo": lambda path: b"\x80\x02}r\xff\xff\xff\xff.",  # the C unpickler allocates a table of this size
    "no-memo": lambda path: b"\x80\x02jff\xff\xff.",
    "deep": lambda path: b"\x80\x02}(K\x01" + b"\x85" * 30_000 + b"K\x01u.",
    "digits": lambda path: b"L" + b"9" * 5000 + b"L\n.",
    "empty": lambda path: b"\x80\x02.",
    "marks": lambda path: b"\x80\x02(((u.",
    "long": lambda path: b"\x80\x02\x8a\xff" + b"\1" * 10,
    "bytes": lambda path: b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"x.",
    "persistent": lambda path: b"\x80\x02K\x01Q.",
    "extension": lambda path: b"\x80\x02\x82\x01.",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_in_a_pickle_runs(tmp_path: Path, attack: str) -> None:
    content = ATTACKS[attack](tmp_path / "touched")
    tracemalloc.start()
    if attack == "memo":
        assert read_pickle(content) == {}
    else:
        with pytest.raises(PickleError) as caught:
            read_pickle(content)
        assert "\n" not in str(caught.value)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20
    assert not (tmp_path / "touched").exists()


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_a_damaged_pickle_is_one_sentence(data: st.DataObject) -> None:
    base = data.draw(st.sampled_from(DAMAGED))
    content = bytearray(base)
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(base) - 1), st.integers(0, 255)), max_size=4)):
        content[at] = value
    with contextlib.suppress(PickleError):
        read_pickle(bytes(content[: data.draw(st.integers(0, len(content)))]))


DAMAGED = [write({"label_names": NAMES[:5], "data": np.zeros((2, 300), np.uint8)}) for write in WRITERS.values()]


def test_what_an_archive_unpacks_to_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "_MAX_UNPACKED_BYTES", 1 << 20)
    with tarfile.open(tmp_path / "bomb.tar.gz", "w:gz") as out:
        member = tarfile.TarInfo("cifar-10-batches-py/data_batch_0")
        member.size = 4 << 20
        out.addfile(member, io.BytesIO(bytes(member.size)))
    with pytest.raises(RequestError, match=r"bomb\.tar\.gz: .*unpacks to more than 1048576 bytes"):
        open_dataset(tmp_path / "bomb.tar.gz")
    monkeypatch.setattr(pickles, "MAX_STEPS", 100)
    with pytest.raises(PickleError, match="more than 100 instructions"):
        read_pickle(b"\x80\x02" + b"N" * 200 + b".")


def test_mnists_folder_holds_both_splits(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "mnist"
    assert len(open_dataset(folder)) == 60_000
    held = open_dataset(folder, split="val")
    assert held.fingerprint() == open_dataset(folder / "t10k-images-idx3-ubyte.gz").fingerprint()
    raw = tmp_path / "MNIST" / "raw"  # as torchvision downloads it
    raw.mkdir(parents=True)
    for name in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):  # it keeps both forms
        (raw / f"{name}.gz").symlink_to(folder / f"{name}.gz")
        (raw / name).write_bytes(gzip.decompress((folder / f"{name}.gz").read_bytes()))
    assert open_dataset(raw, split="val").name(3) == "t10k-images-idx3-ubyte[3]"
    with pytest.raises(RequestError, match=r"found MNIST/raw in it; name .*MNIST/raw$"):
        open_dataset(tmp_path)
