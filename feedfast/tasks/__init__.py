"""Tasks: what a student learns (classification today), apart from whom it learns from (`feedfast.methods`)."""

from feedfast.tasks.base import Metric, Task
from feedfast.tasks.classify import Classify, label_loss

__all__ = ["Classify", "Metric", "Task", "label_loss"]
