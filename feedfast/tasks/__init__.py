"""Tasks: what a student learns, apart from whom it learns from (`feedfast.methods`)."""

from feedfast.errors import RequestError
from feedfast.tasks.base import Metric, Outputs, Task
from feedfast.tasks.classify import Classify, label_loss
from feedfast.tasks.detect import Detect
from feedfast.tasks.segment import Segment, pixel_loss

__all__ = ["Classify", "Detect", "Metric", "Outputs", "Segment", "Task", "label_loss", "pixel_loss", "task_named"]


def task_named(name: str, classes: int, size: int = 0) -> Task:
    """The task that recipes call ``name``.

    Args:
        name: "classify", "segment" or "detect".
        classes: how many, without background for detection; 0 = as many as the network has.
        size: side in pixels of the square that the network sees; of use to dense metrics only.

    Raises:
        RequestError: there is no such task.
    """
    tasks: dict[str, Task] = {
        "classify": Classify(classes),
        "segment": Segment(classes, size),
        "detect": Detect(classes, size),
    }
    if name not in tasks:
        raise RequestError(f"task.name: expected one of {', '.join(tasks)}, found {name!r}")
    return tasks[name]
