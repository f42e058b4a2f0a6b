"""Shards of WebDataset: the images of a folder, wherever they are packed; and shards as people damage them."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packed_samples import CLASSES, image_bytes, json_member, samples_of, write_folder, write_shards, write_tar

from feedfast.data import packed as packed_module
from feedfast.data.dataset import Dataset, open_dataset
from feedfast.data.index import load, place_of, stamps_of
from feedfast.data.loader import Loader
from feedfast.data.shards import expanded
from feedfast.data.views import ViewPlan
from feedfast.errors import RequestError

PLAN = ViewPlan(seed=1, size=16, augment="resized-crop-flip")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A folder, and shards of its files."""
    root = tmp_path_factory.mktemp("packed")
    return write_folder(root / "folder"), write_shards(root / "shards", root / "folder")


def pixels(data: Dataset) -> np.ndarray:
    with Loader(data, PLAN, batch_size=5, threads=1) as loader:
        return np.concatenate([batch.images.numpy() for batch in loader.stream(0, np.arange(len(data)))])


def test_shards_are_the_folder_of_the_same_files(world: tuple[Path, list[Path]]) -> None:
    folder, shards = world
    plain = open_dataset(folder)
    place = str(shards[0].parent)
    for source in (shards, place, f"{place}/train-{{000000..000001}}.tar"):
        data = open_dataset(source)
        assert data.fingerprint() == plain.fingerprint()
        assert (data.classes, data.kind, data.skipped, data.remarks) == (CLASSES, "files", {}, {})
        assert data.ids.tolist() == plain.ids.tolist()
        assert data.labels.tolist() == plain.labels.tolist()
        assert data.sizes.tolist() == plain.sizes.tolist()
        for position in range(len(plain)):
            assert data.encoded([position])[0].tobytes() == plain.path(position).read_bytes()
    assert data.name(7) == "train-000001.tar/dog-0003.jpg"
    np.testing.assert_array_equal(data.content(), plain.content())
    np.testing.assert_array_equal(pixels(data), pixels(plain))
    np.testing.assert_array_equal(pixels(pickle.loads(pickle.dumps(data))), pixels(plain))
    for options in ({"limit": 2}, {"fraction": 0.5}):
        assert open_dataset(shards, **options).ids.tolist() == open_dataset(folder, **options).ids.tolist()
        assert open_dataset(shards, **options).fingerprint() == open_dataset(folder, **options).fingerprint()


def test_webdatasets_own_reader_sees_the_same(world: tuple[Path, list[Path]]) -> None:
    from webdataset.tariterators import group_by_keys, tar_file_expander

    _, shards = world
    with contextlib.ExitStack() as opened:  # their WebDataset leaves files open
        streams = [{"url": str(path), "stream": opened.enter_context(open(path, "rb"))} for path in shards]
        theirs = list(group_by_keys(tar_file_expander(streams)))
    data = open_dataset(shards)
    assert len(theirs) == len(data)
    for position, sample in enumerate(theirs):
        image = next(sample[ending] for ending in ("jpg", "png") if ending in sample)
        assert data.encoded([position])[0].tobytes() == image
        assert data.labels[position] == int(sample["cls"])
        assert sample["__key__"] in data.name(position)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_form_of_tar_is_read_as_tarfile_reads_it(tmp_path: Path, form: int) -> None:
    long = "deep/" * 25 + "x" * 60 if form != tarfile.USTAR_FORMAT else "deep/" * 20 + "x" * 60
    members = [
        (f"{long}.jpg", image_bytes(0)), (f"{long}.cls", b"1\n"), ("./käse/Ü.1.PNG", image_bytes(1, "PNG")),
        ("__meta__", b"left out"), ("./käse/ü.json", json_member(label=0)), ("./käse/ü.jpg", image_bytes(2)),
        ("./käse/ü.cls", b"0"), ("README", b"no ending"), (".hidden.jpg", image_bytes(3)),
    ]  # fmt: skip
    members = [entry for entry in members if not entry[0].endswith(".1.PNG")]
    path = write_tar(tmp_path / "x.tar", members, form)
    with tarfile.open(path, "a", format=form) as out:
        out.add(tmp_path, "folder", recursive=False)
        link = tarfile.TarInfo("zz.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "ü.jpg"
        out.addfile(link)
    data = open_dataset(path)
    assert [data.name(i) for i in range(len(data))] == [f"x.tar/{long}.jpg", "x.tar/käse/ü.jpg"]
    assert data.labels.tolist() == [1, 0]
    assert data.skipped == {".jpg (hidden)": 1, ".jpg (link)": 1}
    with tarfile.open(path) as theirs:
        for position, name in enumerate((f"{long}.jpg", "./käse/ü.jpg")):
            held = theirs.extractfile(name)
            assert held is not None
            assert data.encoded([position])[0].tobytes() == held.read()


def test_labels_by_number_by_name_and_in_json(tmp_path: Path) -> None:
    images = [image_bytes(seed) for seed in range(3)]
    named = write_tar(
        tmp_path / "named.tar",
        [
            (f"{i}.{e}", c)
            for i, n in enumerate(("dog", "ape", "dog"))
            for e, c in (("jpg", images[i]), ("cls", n.encode()))
        ],
    )
    data = open_dataset(named)
    assert (data.labels.tolist(), data.classes) == ([1, 0, 1], ("ape", "dog"))
    in_json = write_tar(
        tmp_path / "json.tar",
        [
            member
            for i in range(3)
            for member in (
                (f"{i}.json", json_member(Label=2 - i, text="x")),
                (f"{i}.jpg", images[i]),
                (f"{i}.cls", b"9"),
            )
        ],
    )
    data = open_dataset(in_json, arrays=["jpg", "json:Label"])
    assert (data.labels.tolist(), data.classes) == ([2, 1, 0], ("0", "1", "2"))
    several = write_tar(
        tmp_path / "several.tar",
        [(f"{i}.{e}", c) for i in range(3) for e, c in (("jpg", images[0]), ("left.jpg", images[i]), ("class", b"0"))],
    )
    data = open_dataset(several, arrays=["left.jpg", "class"])
    assert [each.tobytes() for each in data.encoded(range(3))] == images
    data = open_dataset(write_tar(tmp_path / "bare.tar", [(f"{i}.jpg", images[i]) for i in range(3)]))
    assert (data.labels.tolist(), data.classes) == ([-1, -1, -1], ())


JPEG, PNG = image_bytes(0), image_bytes(0, "PNG")
FAULTS: dict[str, tuple[list[tuple[str, bytes]], str]] = {
    "no image": ([("a.jpg", JPEG), ("a.cls", b"0"), ("b.cls", b"1")], r"x\.tar/b: expected an image, found \.cls"),
    "another format": ([("a.gif", b"GIF8"), ("a.cls", b"0")], r"x\.tar/a: expected an image, found \.gif"),
    "no class": ([("a.jpg", JPEG), ("a.cls", b"0"), ("b.jpg", JPEG)], r"/b\.jpg: expected its class, found no \.cls"),
    "two images": ([("a.jpg", JPEG), ("a.png", PNG), ("a.cls", b"0")], r"x\.tar/a: two images, \.jpg and \.png; data"),
    "one twice": ([("a.jpg", JPEG), ("a.JPG", JPEG)], r"x\.tar/a: two members end in \.jpg"),
    "not in a row": ([("a.jpg", JPEG), ("b.jpg", JPEG), ("a.cls", b"0")], r"x\.tar/a: its members do not follow one"),
    "empty class": ([("a.jpg", JPEG), ("a.cls", b" \n")], r"x\.tar/a: \.cls: expected a class, found nothing"),
    "binary class": ([("a.jpg", JPEG), ("a.cls", b"\xff\xfe")], r"x\.tar/a: \.cls: 'utf-8' codec"),
    "long class": ([("a.jpg", JPEG), ("a.cls", b"1" * 2000)], r"x\.tar/a: \.cls: expected at most 1024 bytes"),
    "class too large": ([("a.jpg", JPEG), ("a.cls", b"1048576")], r"x\.tar: expected labels .* 1048575 .*1048576"),
    "class below": ([("a.jpg", JPEG), ("a.cls", b"-2")], r"x\.tar: expected labels from 0 to .*found -2"),
    "numbers and a name": ([("a.jpg", JPEG), ("a.cls", b"10"), ("b.jpg", JPEG), ("b.cls", b"cat")],
        r"x\.tar: expected labels that all are numbers or all names, found '10' and 'cat'"),
    "no samples": ([("README", b"x")], r"x\.tar: expected images, found none"),
    "not an image": ([("a.jpg", b"<html>"), ("a.cls", b"0")], r"1 of 1 images .*\n.*x\.tar/a\.jpg: none of JPEG"),
    "cut image": ([("a.jpg", JPEG[:-9]), ("a.cls", b"0")], r"x\.tar/a\.jpg: cut short: no JPEG end marker"),
}  # fmt: skip


@pytest.mark.parametrize("which", FAULTS)
def test_a_fault_is_named_by_shard_and_key(tmp_path: Path, which: str) -> None:
    members, said = FAULTS[which]
    write_tar(tmp_path / "x.tar", members)
    for _ in range(2):  # from its index, too, where it has one
        with pytest.raises(RequestError, match=said):
            open_dataset(tmp_path / "x.tar")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"not an object", "Expecting value"),
        (b"[1]", "expected a number or a name as 'label', found None"),
        (b'{"label": null}', "expected .* found None"),
        (b'{"label": true}', "expected .* found True"),
        (b'{"label": 1.5}', r"expected .* found 1\.5"),
        (b"[" * 3000, "nested too deeply"),
    ],
)
def test_json_that_says_no_class(tmp_path: Path, content: bytes, said: str) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.jpg", JPEG), ("a.json", content)])
    with pytest.raises(RequestError, match=rf"x\.tar/a: \.json: {said}") as caught:
        open_dataset(path, arrays=["jpg", "json:label"])
    assert str(caught.value).count("\n") == 1


def damaged(whole: bytes) -> dict[str, tuple[bytes, str]]:
    flipped = bytearray(whole)
    flipped[513 + 512] ^= 1
    header = bytearray(whole)
    second = 512 + -(-len(JPEG) // 512) * 512
    header[second + 3] ^= 1
    return {
        "empty": (b"", "no tar file: it is empty"),
        "text": (b"<html>" * 200, "no tar file: begins with b'<html><h"),
        "gzip": (b"\x1f\x8b\x08" + bytes(2000), "no tar file: begins with"),
        "in a member": (whole[: 512 + len(JPEG) - 5], r"cut short: 5 of [0-9,]+ bytes of a\.jpg are missing"),
        "in a header": (whole[: second + 100], "cut short: a header at byte"),
        "between members": (whole[:second], "cut short: no end mark at byte"),
        "header": (bytes(header), "damaged: a header with a wrong checksum"),
        "appended": (whole + whole, "[0-9,]+ bytes lie behind its end mark"),
    }


@pytest.mark.parametrize("which", damaged(b"\0" * 4096))
def test_a_damaged_tar_is_refused(tmp_path: Path, which: str) -> None:
    whole = write_tar(tmp_path / "x.tar", [("a.jpg", JPEG), ("a.cls", b"0")]).read_bytes()
    content, said = damaged(whole)[which]
    (tmp_path / "x.tar").write_bytes(content)
    write_tar(tmp_path / "w.tar", [("a.jpg", JPEG), ("a.cls", b"0")])
    with pytest.raises(RequestError, match=rf"found 1 fault:\n  .*x\.tar: {said}"):
        open_dataset([tmp_path / "w.tar", tmp_path / "x.tar"])


def test_any_damage_is_one_sentence(tmp_path: Path) -> None:
    """Every byte of the headers, and every length."""
    path = write_tar(tmp_path / "x.tar", [("a.jpg", JPEG), ("a.cls", b"0"), ("l" * 120 + ".jpg", JPEG)])
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(150):
        content = bytearray(whole)
        for at in rng.integers(0, len(whole), 3):
            content[at] = rng.integers(0, 256)
        path.write_bytes(bytes(content[: int(rng.integers(0, len(whole) + 1))]))
        try:
            data = open_dataset(path)
            data.encoded(range(len(data)))
        except RequestError as error:
            assert str(error).startswith(str(path))  # noqa: PT017


def test_many_faults_are_counted_and_twenty_shown(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [(f"{i:03d}.cls", b"0") for i in range(33)])
    with pytest.raises(RequestError, match=r"found 33 faults:\n(  .*\n){20}  and 13 more$"):
        open_dataset(path)


def test_unreadable_images_count_where_they_are_used(tmp_path: Path) -> None:
    members = [(f"{i}.{e}", c) for i in range(4) for e, c in (("jpg", JPEG if i < 3 else b"no"), ("cls", b"0"))]
    path = write_tar(tmp_path / "x.tar", members)
    assert len(open_dataset(path, limit=3)) == 3
    with pytest.raises(RequestError, match=r"1 of 4 images are unreadable:\n.*x\.tar/3\.jpg"):
        open_dataset(path)


# --- the index


def walks(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Paths that are walked from now on."""
    from feedfast.data import indexing

    walked: list[Path] = []

    def counted(path: Path, wanted: Any) -> Any:
        walked.append(path)
        return real(path, wanted)

    real = indexing.walk_tar
    monkeypatch.setattr(indexing, "walk_tar", counted)
    return walked


def test_the_index_is_made_once_and_again_when_a_shard_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = write_shards(tmp_path / "shards", write_folder(tmp_path / "folder"))
    walked = walks(monkeypatch)
    first = open_dataset(shards)
    assert sorted(walked) == shards
    (index,) = (tmp_path / "shards").glob(".feedfast-*.index")
    assert open_dataset(shards).fingerprint() == first.fingerprint()
    assert len(walked) == 2, "opened from its index"
    content = index.read_bytes()
    for damage in (
        content[:100],
        content[:-1],
        content[:300] + b"\xff" + content[301:],
        b"",
        b"feedfast-index 2 9 0\n",
    ):
        index.write_bytes(damage)
        walked.clear()
        assert open_dataset(shards).fingerprint() == first.fingerprint()
        assert len(walked) == 2
        assert index.read_bytes() == content
    walked.clear()
    key, ending, _, _ = samples_of(tmp_path / "folder")[0]
    write_tar(shards[0], [(f"{key}.{ending}", image_bytes(77)), (f"{key}.cls", b"2")])
    again = open_dataset(shards)
    assert len(walked) == 2
    assert len(again) < len(first)
    assert again.labels[0] == 2
    with pytest.raises(RequestError, match=r"images have changed since .*\n  .*train-000000\.tar/cat-0000\.jpg: "):
        first.encoded([0])
    shards[0].write_bytes(b"")
    with pytest.raises(RequestError, match=r"train-000000\.tar/cat-0001\.jpg: cut short: 0 of [0-9]+ bytes"):
        first.encoded([1])


def test_an_index_does_not_remember_a_moment_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.jpg", JPEG), ("a.cls", b"0"), ("b.jpg", b"<html>"), ("b.cls", b"1")])
    with monkeypatch.context() as broken:
        broken.setattr(
            packed_module.os, "preadv", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error"))
        )
        with pytest.raises(RequestError, match=r"2 of 2 images .*\n.*a\.jpg: Input/output error"):
            open_dataset(path)
    walked = walks(monkeypatch)
    for _ in range(2):
        with pytest.raises(RequestError, match=r"1 of 2 images .*\n.*b\.jpg: none of JPEG"):
            open_dataset(path)
    assert len(walked) == 1, "what is still wrong is believed"


def test_a_shard_written_anew_is_another(tmp_path: Path) -> None:
    """The same members in another order: of the same length, with headers that fit."""
    pair = [[(f"{i}.jpg", JPEG), (f"{i}.cls", b"%d" % i)] for i in range(2)]
    path = write_tar(tmp_path / "x.tar", [*pair[0], *pair[1]])
    open_dataset(path)
    packed_module._opened.cache_clear()
    data = open_dataset(path)  # from its index: no file has been opened yet
    write_tar(tmp_path / "y.tar", [*pair[1], *pair[0]]).rename(path)
    with pytest.raises(RequestError, match=r"x\.tar/0\.jpg: its file has been written anew since it was opened"):
        data.encoded([0])
    assert open_dataset(path).labels.tolist() == [1, 0]


def test_several_who_open_at_once_make_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = write_shards(tmp_path / "shards", write_folder(tmp_path / "folder"))
    walked = walks(monkeypatch)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: open_dataset(shards).fingerprint(), range(4)))
    assert found == [found[0]] * 4
    assert sorted(walked) == shards


def test_where_nothing_can_be_written_the_index_goes_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = write_shards(tmp_path / "shards", write_folder(tmp_path / "folder"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    from feedfast.data import index as index_module

    real = index_module.replace_file

    def refuse(path: Path, parts: Any) -> None:
        if path.parent == tmp_path / "shards":
            raise PermissionError(13, "Permission denied", str(path))  # as root this machine's tests can write anywhere
        real(path, parts)

    monkeypatch.setattr(index_module, "replace_file", refuse)
    walked = walks(monkeypatch)
    open_dataset(shards)
    assert list((tmp_path / "shards").glob(".feedfast*")) == []
    assert len(list((tmp_path / "home" / "feedfast").glob("*.index"))) == 1
    open_dataset(shards)
    assert len(walked) == 2
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert len(open_dataset(shards)) == 12  # nowhere at all: made every time
    assert len(walked) == 4


def test_an_index_that_points_elsewhere_is_not_believed(tmp_path: Path) -> None:
    """One with sound checksums: somebody has made it."""
    from feedfast.data.index import save

    path = write_tar(tmp_path / "x.tar", [("a.jpg", JPEG), ("a.cls", b"0")])
    whole = open_dataset(path).packed
    assert whole is not None
    place = place_of([path], ["tar", "", ""])
    stamps = stamps_of(place.folder, [path])
    for name, value in (
        ("offset", 2**40),
        ("length", 2**31),
        ("label", 7),
        ("name_end", 99),
        ("first", -1),
        ("size", 0),
    ):
        arrays = {key: array.copy() for key, array in whole.index.arrays.items()}
        arrays[name][0] = value
        save(place, type(whole.index)(whole.index.facts, whole.index.sources, whole.index.files, arrays))
        assert load(place, stamps) is None, name
        assert open_dataset(path).labels.tolist() == [0]
    for classes in (["\udc80"], [5], "x"):
        facts = {**whole.index.facts, "classes": classes}
        save(place, type(whole.index)(facts, whole.index.sources, whole.index.files, whole.index.arrays))
        assert load(place, stamps) is None, classes


def test_full_check_decodes_and_says_how_far_it_is(tmp_path: Path) -> None:
    content = bytearray(PNG)
    content[-40] ^= 0x55  # inside IDAT: only decoding notices
    members = [(f"{i:03d}.{e}", c) for i in range(150) for e, c in (("jpg", JPEG), ("cls", b"0"))]
    path = write_tar(tmp_path / "x.tar", [*members, ("999.png", bytes(content)), ("999.cls", b"0")])
    assert len(open_dataset(path)) == 151
    seen: list[tuple[int, int]] = []
    with pytest.raises(RequestError, match=r"1 of 151 images .*\n  .*x\.tar/999\.png: does not decode"):
        open_dataset(path, check="full", progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len(seen) > 2
    assert seen[-1] == (151, 151)


def test_no_more_files_are_open_than_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = [write_tar(tmp_path / f"{i:03d}.tar", [("a.jpg", image_bytes(i)), ("a.cls", b"0")]) for i in range(40)]
    cached = packed_module.lru_cache(4)(packed_module._opened.__wrapped__)
    monkeypatch.setattr(packed_module, "_opened", cached)
    before = len(os.listdir("/proc/self/fd"))
    data = open_dataset(shards)
    assert [each.tobytes() for each in data.encoded(range(40))] == [image_bytes(i) for i in range(40)]
    assert len(os.listdir("/proc/self/fd")) <= before + 4


# --- which files


@pytest.mark.parametrize(
    ("path", "paths"),
    [
        ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{8..10}.tar", ["8.tar", "9.tar", "10.tar"]),
        ("{a,b}/{0..1}", ["a/0", "a/1", "b/0", "b/1"]),
        ("{x}", ["{x}"]),
        ("plain", ["plain"]),
    ],
)
def test_braces(path: str, paths: list[str]) -> None:
    assert expanded(path) == paths


def test_braces_that_are_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("{0..1}.tar").touch()
    assert expanded("{0..1}.tar") == ["{0..1}.tar"]
    with pytest.raises(RequestError, match="at most 1048576 files, found 1000000000"):
        expanded("{000000000..999999999}")


def test_folders_of_shards_and_of_other_things(world: tuple[Path, list[Path]], tmp_path: Path) -> None:
    _, shards = world
    both = tmp_path / "both"
    both.mkdir()
    for path, name in zip(shards, ("imagenet-train-0.tar", "imagenet-validation-0.tar"), strict=True):
        (both / name).symlink_to(path)
    assert open_dataset(both).name(0) == "imagenet-train-0.tar/cat-0000.jpg"
    assert open_dataset(both, split="val").name(0) == "imagenet-validation-0.tar/dog-0002.png"
    (both / "imagenet-validation-0.tar").unlink()
    with pytest.raises(
        RequestError, match=r"both: expected files of validation or valid or val or test, found imagenet-t"
    ):
        open_dataset(both, split="val")
    (both / "picture.jpg").write_bytes(JPEG)  # a folder of images, with something else next to them
    assert open_dataset(both).name(0) == "picture.jpg"
    with pytest.raises(RequestError, match=r"not found: .*train-000002\.tar, .*train-000003\.tar; expected"):
        open_dataset(f"{shards[0].parent}/train-{{000000..000003}}.tar")
    (tmp_path / "y.parquet").touch()
    with pytest.raises(
        RequestError, match=r"expected files of one kind, \.tar, \.arrow or \.parquet, found \.parquet, \.tar"
    ):
        open_dataset([shards[0], tmp_path / "y.parquet"])
    with pytest.raises(RequestError, match="arrays: expected names for images and labels, found 3"):
        open_dataset(shards, arrays=["jpg", "cls", "names"])
