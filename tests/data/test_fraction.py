"""A fraction of a dataset: the same share of every class, the same samples always."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from feedfast.data.dataset import open_dataset
from feedfast.errors import RequestError

RNG = np.random.default_rng(0)
FRACTIONS = (0.004, 0.1, 0.25, 0.3, 0.75, 0.9, 1.0)


def test_a_fraction_is_balanced_repeatable_and_part_of_every_larger_one(tmp_path: Path) -> None:
    labels = np.repeat(np.arange(4), [200, 40, 10, 3])
    labels = labels[np.random.default_rng(5).permutation(len(labels))]
    np.savez(tmp_path / "x.npz", images=RNG.integers(0, 256, (253, 4, 4), dtype=np.uint8), labels=labels)
    whole = open_dataset(tmp_path / "x.npz")
    before: set[int] = set()
    for fraction in FRACTIONS:
        some, again = (open_dataset(tmp_path / "x.npz", fraction=fraction) for _ in range(2))
        expected = [max(1, round(fraction * n)) for n in (200, 40, 10, 3)]
        assert np.bincount(some.labels).tolist() == expected
        assert some.ids.dtype == np.uint32
        assert (np.diff(some.ids.astype(int)) > 0).all()
        np.testing.assert_array_equal(some.ids, again.ids)
        np.testing.assert_array_equal(some.labels, labels[some.ids])
        np.testing.assert_array_equal(some.pixels(range(len(some))), whole.pixels(some.ids))
        assert some.classes == whole.classes
        assert before <= set(some.ids.tolist())
        before = set(some.ids.tolist())
    assert len(before) == 253
    # a fraction of what a limit leaves, and no two of them are told to be the same data
    limited = open_dataset(tmp_path / "x.npz", limit=20, fraction=0.5)
    assert np.bincount(limited.labels).tolist() == [10, 10, 5, 2]
    assert set(limited.ids.tolist()) <= set(open_dataset(tmp_path / "x.npz", limit=20).ids.tolist())
    prints = [json.dumps(open_dataset(tmp_path / "x.npz", fraction=f).fingerprint()) for f in FRACTIONS]
    assert len(set(prints)) == len(FRACTIONS)
    assert prints[-1] == json.dumps(whole.fingerprint())


def test_the_samples_of_a_fraction_are_these(tmp_path: Path) -> None:
    """Pinned: another order would make every cache and every result of a thinned set unrepeatable."""
    np.savez(tmp_path / "x.npz", images=np.zeros((60, 4, 4), np.uint8), labels=np.arange(60) % 3)
    assert open_dataset(tmp_path / "x.npz", fraction=0.2).ids.tolist() == [0, 6, 20, 32, 33, 41, 43, 46, 49, 51, 52, 56]


def test_a_fraction_is_no_run_of_the_file(tmp_path: Path) -> None:
    """Files are often sorted by source or by time: what is taken is spread over the whole class."""
    np.savez(tmp_path / "x.npz", images=np.zeros((4000, 2, 2), np.uint8), labels=np.arange(4000) % 2)
    ids = open_dataset(tmp_path / "x.npz", fraction=0.1).ids.astype(float)
    # the mean of 400 of 4,000 evenly likely places has a deviation of 1155 / 20
    assert abs(ids.mean() - 1999.5) < 4 * 58
    assert np.histogram(ids, bins=8, range=(0, 4000))[0].min() > 20
    # classes are drawn apart: the same places in two classes would follow the order of the file
    assert set((ids[ids % 2 == 0] // 2).tolist()) != set((ids[ids % 2 == 1] // 2).tolist())


def test_a_fraction_of_a_folder_looks_at_its_own_files_only(tmp_path: Path) -> None:
    root = tmp_path / "train"
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (40 + i, 30)).save(root / name / f"{i}.jpg")
    some = open_dataset(root, fraction=0.3)
    assert np.bincount(some.labels).tolist() == [3, 3]
    left = sorted({f"{c}/{i}.jpg" for c in ("cat", "dog") for i in range(10)} - {some.name(i) for i in range(6)})
    (root / left[0]).write_bytes(b"broken, but not taken")
    assert open_dataset(root, fraction=0.3).ids.tolist() == some.ids.tolist()


@pytest.mark.parametrize("fraction", [0, -0.1, 1.1, float("nan")])
def test_fractions_that_are_none(tmp_path: Path, fraction: float) -> None:
    np.savez(tmp_path / "x.npz", images=np.zeros((6, 4, 4), np.uint8), labels=[0, 1, 0, 1, 0, 1])
    with pytest.raises(RequestError, match="fraction: expected a share of the samples, above 0 to 1, found"):
        open_dataset(tmp_path / "x.npz", fraction=fraction)


def test_a_fraction_needs_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=np.zeros((3, 4, 4), np.uint8), labels=[0, -1, 0])
    with pytest.raises(
        RequestError, match=r"fraction: expected labeled samples.*found 1 of 3 without a label in .*x\.npz"
    ):
        open_dataset(tmp_path / "x.npz", fraction=0.5)
    for i in range(5):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    with pytest.raises(RequestError, match="found 5 of 5 without a label"):
        open_dataset(tmp_path, fraction=0.5)
    assert len(open_dataset(tmp_path, fraction=1.0)) == 5
