"""Distillation methods: what a student is trained with, given teachers' targets from a cache or live.

A method is one class in a file of its own (see `feedfast.methods.base`) and one entry of `METHODS`.
"""

import difflib

from feedfast.errors import RequestError
from feedfast.methods.ab import ActivationBoundaries
from feedfast.methods.attention import AttentionTransfer
from feedfast.methods.base import Method, MethodOptions, StudentOutput, TapInfo, Targets, parse_options
from feedfast.methods.camkd import CAMKD
from feedfast.methods.crd import CRD
from feedfast.methods.cwd import CWD
from feedfast.methods.ekd import EKD
from feedfast.methods.feed import PFEED, SFEED
from feedfast.methods.fitnet import FitNet
from feedfast.methods.ft import FT
from feedfast.methods.kd import BAN, KD, Plain
from feedfast.methods.locality import Locality
from feedfast.methods.logit import DIST, DKD
from feedfast.methods.mgd import MGD
from feedfast.methods.ofd import OFD
from feedfast.methods.parts import NTL, Connector, RunningMargin, margin_from_bn
from feedfast.methods.relation import PKT, RKD, SP
from feedfast.methods.reviewkd import ReviewKD
from feedfast.methods.vid import VID

_ALL: tuple[type[Method], ...] = (
    *(Plain, KD, BAN, DKD, DIST, CAMKD),
    *(FitNet, AttentionTransfer, ActivationBoundaries, VID, OFD, ReviewKD, CWD, MGD),
    *(FT, PFEED, SFEED, EKD, Locality, RKD, SP, PKT, CRD),
)
METHODS: dict[str, type[Method]] = {method.name: method for method in _ALL}


def method_named(name: str, where: str = "method") -> type[Method]:
    """The class of a recipe's method.

    Raises:
        RequestError: there is no such method; close names are in the message.
    """
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, 1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise RequestError(f"{where}.name: expected {' | '.join(METHODS)}, found {name!r}{hint}")
    return METHODS[name]


__all__ = [
    "BAN",
    "CAMKD",
    "CRD",
    "DIST",
    "DKD",
    "EKD",
    "FT",
    "KD",
    "METHODS",
    "NTL",
    "OFD",
    "PFEED",
    "PKT",
    "RKD",
    "SFEED",
    "SP",
    "Connector",
    "Locality",
    "Method",
    "MethodOptions",
    "Plain",
    "RunningMargin",
    "StudentOutput",
    "TapInfo",
    "Targets",
    "margin_from_bn",
    "method_named",
    "parse_options",
]
