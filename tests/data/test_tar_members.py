"""Members of tars that are no samples, headers that nobody means well, and shards that lie behind links."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from packed_samples import image_bytes, write_tar

from feedfast.data.dataset import open_dataset
from feedfast.errors import RequestError

JPEG = image_bytes(0)


def test_what_systems_put_into_tars_is_no_sample(tmp_path: Path) -> None:
    """macOS's ``._`` members lie between those of a key; of a file with two names tar stores the second as a link."""
    members = [("d/._0.jpg", b"\0\5"), ("d/0.jpg", JPEG), ("d/._0.cls", b"\0\5"), ("d/0.cls", b"3"), ("d/.jpg", JPEG)]
    path = write_tar(tmp_path / "x.tar", members)
    with tarfile.open(path, "a") as out:
        for name, kind in (("d/1.png", tarfile.LNKTYPE), ("d/2.png", tarfile.SYMTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "d/0.jpg"
            out.addfile(link)
    data = open_dataset(path)
    assert [data.name(at) for at in range(len(data))] == ["x.tar/d/0.jpg"]
    assert data.labels.tolist() == [3]
    assert data.skipped == {".jpg (hidden)": 2, ".png (link)": 2}


@pytest.mark.parametrize("record", ["size=" + "9" * 5000, "size=-1", "size=1e3", "size=\u0663", "size="])
def test_a_size_that_is_none(tmp_path: Path, record: str) -> None:
    key, _, value = record.partition("=")
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as out:
        member = tarfile.TarInfo("a.jpg")
        member.size, member.pax_headers = len(JPEG), {"tize": value}
        out.addfile(member, io.BytesIO(JPEG))
    whole = (tmp_path / "x.tar").read_bytes()
    assert whole.count(b"tize=") == 1
    (tmp_path / "x.tar").write_bytes(whole.replace(b"tize=", key.encode() + b"="))
    with pytest.raises(RequestError, match=r"x\.tar: damaged: a size of '.{0,22}' in a pax header at byte 0$"):
        open_dataset(tmp_path / "x.tar")


@pytest.mark.timeout(60)  # of time that grows with the square: a quarter of an hour
def test_a_long_name_takes_no_longer_than_it_is(tmp_path: Path) -> None:
    members = [("x" + "/" * 200_000, b""), ("a.jpg", JPEG)]
    assert len(open_dataset(write_tar(tmp_path / "x.tar", members))) == 1


@pytest.mark.parametrize("kind", ["folders that are links", "a way back"])
def test_shards_behind_links(tmp_path: Path, kind: str) -> None:
    for number in range(2):
        real = tmp_path / f"disk{number}" / "deep"
        real.mkdir(parents=True)
        write_tar(real / f"{number}.tar", [(f"{number}.jpg", image_bytes(number)), (f"{number}.cls", b"%d" % number)])
        (tmp_path / f"part{number}").symlink_to(real)
    second = tmp_path / "part1" / "1.tar"
    if kind == "a way back":
        second = tmp_path / "part0" / ".." / ".." / "disk1" / "deep" / "1.tar"
    for _ in range(2):
        data = open_dataset([tmp_path / "part0" / "0.tar", second])
        assert data.labels.tolist() == [0, 1]
        assert [each.tobytes() for each in data.encoded([0, 1])] == [image_bytes(0), image_bytes(1)]
