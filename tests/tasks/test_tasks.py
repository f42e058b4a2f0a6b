"""What all tasks share: names, the metric a run is judged by, and what a network must return."""

from __future__ import annotations

import sys

import pytest
import torch

from feedfast.errors import RequestError
from feedfast.tasks import Classify, Detect, Outputs, Segment, Task, task_named
from feedfast.tasks.classify import Top1

CLASSIFIER: Outputs = (10,)
SEGMENTER: Outputs = (10, 17, 17)
DETECTOR: Outputs = {"cls_logits": (30, 11), "bbox_regression": (30, 4), "anchors": (4,)}
FITS = [(Classify(10), CLASSIFIER), (Segment(10), SEGMENTER), (Detect(10), DETECTOR)]


@pytest.mark.parametrize(("task", "outputs"), FITS)
def test_a_network_of_the_task_passes_whether_classes_are_known_or_not(task: Task, outputs: Outputs) -> None:
    task.check(outputs, "student")
    task_named(task.name, 0).check(outputs, "student")


@pytest.mark.parametrize(("task", "own"), FITS)
@pytest.mark.parametrize("outputs", [CLASSIFIER, SEGMENTER, DETECTOR, None, {"out": (10, 17, 17)}])
def test_another_network_is_refused_in_one_sentence(task: Task, own: Outputs, outputs: Outputs) -> None:
    if outputs is own:
        return
    with pytest.raises(RequestError, match=r"^student: expected a .* that returns .*, found .") as caught:
        task.check(outputs, "student")
    message = str(caught.value)
    assert "\n" not in message
    shown = {"NoneType": "no tensor", "tuple": f"{outputs}"[1:-1].strip(","), "dict": "a mapping of "}
    assert shown[type(outputs).__name__] in message
    assert ("zoo/" in message) == (task.name != "classify")


@pytest.mark.parametrize(
    ("task", "outputs", "said"),
    [
        (Classify(9), CLASSIFIER, "expected logits of 9 classes, found 10"),
        (Segment(9), SEGMENTER, "expected logits of 9 classes, found 10"),
        (Segment(), (256, 9, 9), "expected at most 255 classes, found 256"),
        (Detect(9), DETECTOR, "expected cls_logits of 10 classes, 9 and background, found 11"),
        (Detect(10), {**DETECTOR, "bbox_regression": (31, 4)}, r"bbox_regression \['…', 31, 4\]"),  # type: ignore[dict-item]
        (Detect(10), {**DETECTOR, "anchors": (30, 4)}, r"anchors \['…', 30, 4\]"),  # type: ignore[dict-item]
    ],
)
def test_other_classes_or_shapes_are_refused(task: Task, outputs: Outputs, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        task.check(outputs, "student")


def test_a_detector_without_pycocotools_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pycocotools", "pycocotools.cocoeval"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RequestError, match=r"^student: .* pip install 'feedfast\[detect\]'$"):
        Detect(10).check(DETECTOR, "student")
    Segment(10).check(SEGMENTER, "student")


def test_tasks_by_name() -> None:
    assert task_named("classify", 3) == Classify(3)
    assert task_named("segment", 3, 65) == Segment(3, 65)
    assert task_named("detect", 3, 300) == Detect(3, 300)
    with pytest.raises(RequestError, match=r"^task.name: expected one of classify, segment, detect, found 'pose'$"):
        task_named("pose", 3)


@pytest.mark.parametrize("name", ["classify", "segment", "detect"])
def test_the_score_is_one_of_the_metrics_and_none_without_images(name: str) -> None:
    task = task_named(name, 3, 16)
    metric = task.metric()
    values = metric.compute()
    assert values[task.score] is None
    assert set(values.values()) == {None}
    metric.merge([task.metric().state(), metric.state()])
    assert metric.compute() == values


def test_top1_of_ranks_together_is_that_of_one() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 5, generator=generator)
    labels = torch.randint(-1, 5, (40,), generator=generator)
    one, ranks = Top1(), [Top1(), Top1()]
    one.update(logits, labels)
    for number, rank in enumerate(ranks):
        rank.update(logits[number::2], labels[number::2])
    ranks[0].merge([rank.state() for rank in ranks])
    assert ranks[0].compute() == one.compute()
