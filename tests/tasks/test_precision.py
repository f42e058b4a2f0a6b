"""Average precision against a plain count of our own, and on cases whose answer is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from feedfast.tasks.precision import Precision

Image = dict[str, Tensor]


class Given:
    """A network whose output is the detections themselves."""

    keep = 200

    def detections(self, output: Mapping[str, Tensor], truth: Sequence[Mapping[str, Tensor]]) -> list[Image]:
        return output["found"]  # type: ignore[return-value]


def measured(found: list[Image], truth: list[Image]) -> dict[str, float | None]:
    metric = Precision(Given())
    metric.update({"found": found}, truth)  # type: ignore[dict-item]
    return metric.compute()


def detected(boxes: list[list[float]], scores: list[float], labels: list[int]) -> Image:
    return {"boxes": torch.tensor(boxes).view(-1, 4), "scores": torch.tensor(scores), "labels": torch.tensor(labels)}


def true(boxes: list[list[float]], labels: list[int], difficult: list[bool] | None = None) -> Image:
    return {
        "boxes": torch.tensor(boxes).view(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "difficult": torch.tensor(difficult or [False] * len(labels), dtype=torch.bool),
    }


def precision(found: list[Image], truth: list[Image], label: int, least: float, voc: bool) -> float | None:
    """Average precision of one class, counted detection by detection in order of their scores."""
    ranked = sorted(
        (-float(score), image, at)
        for image, own in enumerate(found)
        for at, score in enumerate(own["scores"])
        if own["labels"][at] == label
    )
    taken: set[tuple[int, int]] = set()
    right: list[bool] = []
    for _, image, at in ranked:
        own, box = truth[image], found[image]["boxes"][at : at + 1].double()
        same = (own["labels"] == label).nonzero()[:, 0].tolist()
        ious = {n: float(box_iou(box, own["boxes"][n : n + 1].double())) for n in same}
        hard = {n for n in same if own["difficult"][n]}
        if voc:  # only the box it overlaps most is asked about
            best = max(same, key=lambda n: ious[n], default=None)
            if best is not None and ious[best] >= least:
                if best not in hard:
                    right.append((image, best) not in taken)
                    taken.add((image, best))
            else:
                right.append(False)
            continue
        free = [n for n in same if n not in hard and (image, n) not in taken and ious[n] >= least]
        inside = (
            box[0, 2:] - box[0, :2]
        ).prod() * least  # a crowd counts by the share of the detection that lies in it
        shared = [
            (torch.minimum(box[0, 2:], own["boxes"][n, 2:]) - torch.maximum(box[0, :2], own["boxes"][n, :2]))
            for n in hard
        ]
        if free:
            taken.add((image, max(free, key=lambda n: ious[n])))
            right.append(True)
        elif not any(float(side.clamp(min=0).prod()) >= float(inside) for side in shared):
            right.append(False)
    boxes = sum(int(((own["labels"] == label) & ~own["difficult"]).sum()) for own in truth)
    if not boxes:
        return None
    hits = np.cumsum(right)
    recalls, precisions = hits / boxes, hits / np.arange(1, len(right) + 1)
    wanted = np.arange(0.0, 1.1, 0.1) if voc else np.linspace(0, 1, 101)
    return float(np.mean([max(precisions[recalls >= at], default=0.0) for at in wanted]))


def mean(found: list[Image], truth: list[Image], least: float, voc: bool = False) -> float:
    values = [precision(found, truth, label, least, voc) for label in range(4)]
    return float(np.mean([value for value in values if value is not None]))


def world(seed: int, images: int = 12) -> tuple[list[Image], list[Image]]:
    """Detections around the true boxes, some twice, some of another class, some of nothing; few boxes are difficult."""
    rng = np.random.default_rng(seed)
    found, truth = [], []
    for _ in range(images):
        count = int(rng.integers(0, 6))
        corners = rng.uniform(0, 60, (count, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(8, 30, (count, 2))], 1)
        labels = rng.integers(0, 3, count)  # class 3 is never true
        truth.append(
            {
                "boxes": torch.from_numpy(boxes).float(),
                "labels": torch.from_numpy(labels),
                "difficult": torch.from_numpy(rng.random(count) < 0.25),
            }
        )
        again = rng.integers(0, 3, count)
        near = np.repeat(boxes, again, 0)
        corners = rng.uniform(0, 60, (3, 2))
        near = np.concatenate([near + rng.normal(0, 1.5, near.shape), np.concatenate([corners, corners + 15], 1)])
        said = np.concatenate([np.repeat(labels, again), rng.integers(0, 4, 3)])
        said = np.where(rng.random(len(said)) < 0.1, (said + 1) % 3, said)
        found.append(
            {
                "boxes": torch.from_numpy(near).float(),
                "scores": torch.from_numpy(rng.random(len(near))),
                "labels": torch.from_numpy(said),
            }
        )
    return found, truth


@pytest.mark.parametrize("seed", range(6))
def test_precision_is_what_counting_gives(seed: int) -> None:
    found, truth = world(seed)
    values = measured(found, truth)
    assert values["ap50"] == pytest.approx(mean(found, truth, 0.5))
    assert values["ap50_voc07"] == pytest.approx(mean(found, truth, 0.5, voc=True))
    overlaps = [mean(found, truth, least) for least in np.linspace(0.5, 0.95, 10)]
    assert values["ap"] == pytest.approx(np.mean(overlaps))
    assert 0.02 < np.mean(overlaps) < mean(found, truth, 0.5) < 0.9


A, B, C = [0.0, 0.0, 10.0, 10.0], [1.0, 0.0, 11.0, 10.0], [40.0, 40.0, 60.0, 50.0]


@pytest.mark.parametrize(
    ("found", "truth", "ap50", "voc"),
    [
        (detected([A, C], [0.9, 0.8], [0, 1]), true([A, C], [0, 1]), 1, 1),
        (detected([], [], []), true([A], [0]), 0, 0),
        (detected([C], [0.9], [0]), true([A], [0]), 0, 0),
        (detected([A], [0.9], [1]), true([A], [0]), 0, 0),  # the right place, the wrong class
        # twice the same box: right, wrong, right of two to find
        (
            detected([A, A, C], [0.9, 0.8, 0.7], [0] * 3),
            true([A, C], [0, 0]),
            (51 + 50 * 2 / 3) / 101,
            (6 + 5 * 2 / 3) / 11,
        ),
        # COCO gives the second detection to the neighbor, which it overlaps well enough; the devkit does not
        (detected([A, A], [0.9, 0.8], [0] * 2), true([A, B], [0, 0]), 1, 6 / 11),
        # whatever is said about a difficult box, it is neither right nor wrong
        (detected([A, A, C], [0.9, 0.8, 0.7], [0] * 3), true([A, C], [0, 0], [True, False]), 1, 1),
        # a part of a crowd is left out by COCO; to the devkit it is no such box
        (detected([[0, 0, 4, 4], C], [0.9, 0.8], [0] * 2), true([A, C], [0, 0], [True, False]), 1, 0.5),
        (detected([A], [0.9], [0]), true([A], [0], [True]), None, None),
        (detected([A], [0.9], [0]), true([], []), None, None),
    ],
)
def test_known_cases(found: Image, truth: Image, ap50: float | None, voc: float | None) -> None:
    values = measured([found], [truth])
    assert values["ap50"] == (None if ap50 is None else pytest.approx(ap50))
    assert values["ap50_voc07"] == (None if voc is None else pytest.approx(voc))


def test_images_without_truth_still_hold_false_detections() -> None:
    found = [detected([A], [0.9], [0]), detected([A], [0.8], [0])]
    assert measured(found, [true([], []), true([A], [0])])["ap50"] == pytest.approx(0.5)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("numbered", [True, False])
def test_ranks_together_measure_as_one(world_size: int, numbered: bool) -> None:
    found, truth = world(7, 11)
    for number, own in enumerate(found):
        own["scores"] = (own["scores"] * 4).round() / 4  # many ties, which images' order decides
        if numbered:
            truth[number]["sample"] = torch.tensor(number)
    one, ranks = Precision(Given()), [Precision(Given()) for _ in range(world_size)]
    one.update({"found": found}, truth)  # type: ignore[dict-item]
    for number, rank in enumerate(ranks):
        for at in range(number, len(found), world_size):
            rank.update({"found": found[at : at + 1]}, truth[at : at + 1])  # type: ignore[dict-item]
    ranks[-1].merge([rank.state() for rank in ranks])
    assert ranks[-1].compute() == one.compute()
    assert {name: value.dtype for name, value in ranks[-1].state().items()} == {
        "samples": torch.int64,
        "found": torch.float64,
        "found_counts": torch.int64,
        "true": torch.float64,
        "true_counts": torch.int64,
    }


def test_a_sample_that_is_seen_twice_counts_once() -> None:
    found, truth = world(8)
    for number, own in enumerate(truth):
        own["sample"] = torch.tensor(number)
    once = measured(found, truth)
    assert measured([*found, *found[:5]], [*truth, *truth[:5]]) == once
    ranks = [Precision(Given()) for _ in range(2)]
    ranks[0].update({"found": found[:7]}, truth[:7])  # type: ignore[dict-item]
    ranks[1].update({"found": found[4:]}, truth[4:])  # type: ignore[dict-item]
    ranks[0].merge([rank.state() for rank in ranks])
    assert ranks[0].compute() == once


def test_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    measured(*world(0))
    assert capsys.readouterr() == ("", "")
