"""Sampled positions: every one as likely as any other, spread over the map, and a function of the key alone."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from feedfast.data import positions as module
from feedfast.data.philox import Purpose, many_words
from feedfast.data.positions import positions_per_map, sample_positions

MAPS = [(32, 32, 256), (16, 16, 32), (7, 7, 12), (5, 9, 44), (14, 14, 98), (1, 13, 3), (6, 4, 24), (3, 3, 1)]


@pytest.mark.parametrize(("height", "width", "count"), MAPS)
def test_every_position_is_equally_likely_by_arithmetic(
    height: int, width: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every turn of the cuts, and each outcome of every run: the chances of a position add up to P / (H * W)."""
    cells, seen = height * width, np.zeros(height * width, object)
    turns = cells if cells % count else 1
    sizes = np.diff(np.arange(count + 1) * cells // count)
    for turn in range(turns):
        for outcome in range(int(sizes.max())):
            # the number in the middle of those that mean this outcome, of a run of each size
            middle = ((2 * np.minimum(outcome, sizes - 1) + 1) << 31) // sizes
            halves = np.zeros(count + count % 2, np.uint64)
            halves[:count] = middle
            turned = np.uint64(((2 * turn + 1) << 31) // cells) << np.uint64(32)
            words = np.concatenate([[turned], halves[0::2] << np.uint64(32) | halves[1::2]])
            monkeypatch.setattr(module, "many_words", lambda *_, found=words: found[None])
            found = sample_positions(0, 0, np.array([0]), "x", height, width, count)[0]
            for run, position in enumerate(found.tolist()):
                if outcome < sizes[run]:
                    seen[position] += Fraction(1, turns * int(sizes[run]))
    assert set(seen) == {Fraction(count, cells)}


def test_drawn_numbers_are_uniform() -> None:
    """What the arithmetic above takes for granted: 20,000 keys, each cell within five standard deviations."""
    for height, width, count in ((8, 8, 16), (7, 7, 12)):
        cells, keys = height * width, 20_000
        found = sample_positions(3, 1, np.arange(keys), "ofd1", height, width, count)
        share = count / cells
        counts = np.bincount(found.ravel(), minlength=cells)
        assert np.abs(counts - keys * share).max() < 5 * np.sqrt(keys * share * (1 - share))


@pytest.mark.parametrize(("height", "width", "count"), MAPS)
def test_positions_are_distinct_and_of_the_map(height: int, width: int, count: int) -> None:
    found = sample_positions(1, 2, np.arange(300), "final", height, width, count)
    assert (found.dtype, found.shape) == (np.int32, (300, count))
    assert found.min() >= 0
    assert found.max() < height * width
    assert all(len(set(row)) == count for row in found.tolist())


@pytest.mark.parametrize(("side", "count"), [(32, 256), (16, 64), (8, 16), (8, 8), (32, 128)])
def test_every_patch_has_its_share(side: int, count: int) -> None:
    """Of maps of 2^k: exactly one position in each patch of the size that a position stands for, so per quadrant."""
    found = sample_positions(0, 0, np.arange(50), "ofd1", side, side, count)
    y, x = found // side, found % side
    for part in (2, 4):
        if side // part * side // part * count % (side * side) == 0:
            patch = (y // (side // part)) * part + x // (side // part)
            share = [np.bincount(row, minlength=part * part) for row in patch]
            assert (np.array(share) == count // (part * part)).all()


def test_uneven_maps_are_spread_too() -> None:
    """14x14 at a quarter: no quadrant is off by more than the runs that cross its edges; without strata it would be."""
    found = sample_positions(0, 0, np.arange(2000), "ofd3", 14, 14, 49)
    quadrant = (found // 14 // 7) * 2 + found % 14 // 7
    share = np.array([np.bincount(row, minlength=4) for row in quadrant])
    assert share.std(axis=0).max() < 1.5  # of 49 drawn independently: 3.0
    assert np.abs(share.mean(axis=0) - 49 / 4).max() < 0.15


def test_a_sample_has_its_own_whatever_the_batch() -> None:
    ids = np.array([7, 3, 70_000, 3, 0], np.uint32)
    together = sample_positions(5, 1, ids, "ofd1", 9, 11, 25)
    alone = np.concatenate([sample_positions(5, 1, ids[n : n + 1], "ofd1", 9, 11, 25) for n in range(5)])
    assert np.array_equal(together, alone)
    assert np.array_equal(together[::-1], sample_positions(5, 1, ids[::-1], "ofd1", 9, 11, 25))
    assert sample_positions(5, 1, ids[:0], "ofd1", 9, 11, 25).shape == (0, 25)


def test_every_part_of_the_key_counts() -> None:
    base = {"seed": 0, "view": 0, "ids": np.array([5]), "tap": "ofd1", "height": 16, "width": 16, "count": 64}
    others = ({"seed": 1}, {"view": 1}, {"ids": np.array([6])}, {"tap": "ofd2"})
    found = [tuple(sample_positions(**{**base, **other})[0]) for other in ({}, *others)]  # type: ignore[arg-type]
    assert len(set(found)) == len(found)


def test_words_of_samples_far_apart_are_the_streams_own() -> None:
    """Each from a generator of its own, set to where the sample's words begin."""
    ids = np.array([4_000_000_000, 0, 17, 18, 17])
    found = many_words(5, 3, Purpose.POSITION, 99, ids, 6)
    for row, sample in enumerate(ids.tolist()):
        counter = np.array([2 * sample, 0, Purpose.POSITION, 99], np.uint64)
        own = np.random.Philox(counter=counter, key=np.array([5, 3], np.uint64)).random_raw(8)
        assert found[row].tolist() == own[:6].tolist()


def test_these_numbers_do_not_move() -> None:
    """A cache written today is read tomorrow."""
    found = sample_positions(7, 2, np.array([0, 123_456]), "ofd1", 6, 5, 7)
    assert found.tolist() == FIXED


FIXED = [[16, 26, 27, 29, 5, 1, 13], [15, 28, 24, 9, 1, 8, 11]]


@pytest.mark.parametrize(
    ("share", "height", "width", "count"),
    [(0.25, 32, 32, 256), (0.001, 8, 8, 1), (0.25, 7, 7, 12), (0.999, 2, 2, 4), (0.5, 3, 3, 4)],
)
def test_how_many(share: float, height: int, width: int, count: int) -> None:
    assert positions_per_map(share, height, width) == count
