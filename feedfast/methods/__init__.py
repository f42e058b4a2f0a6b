"""Distillation methods: what a student is trained with, given teachers' targets from a cache or live."""

from feedfast.methods.base import StudentOutput, TapInfo, Targets
from feedfast.methods.build import build_method, needs_of, taps_needed
from feedfast.methods.feed import NTL, PFEED
from feedfast.methods.kd import KD, CrossEntropy
from feedfast.methods.ofd import OFD, Connector, RunningMargin, margin_from_bn

__all__ = [
    "KD",
    "NTL",
    "OFD",
    "PFEED",
    "Connector",
    "CrossEntropy",
    "RunningMargin",
    "StudentOutput",
    "TapInfo",
    "Targets",
    "build_method",
    "margin_from_bn",
    "needs_of",
    "taps_needed",
]
