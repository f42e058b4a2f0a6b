"""Losses and encoders of feedfast, usable without it: depends on torch (and, on NVIDIA GPUs, Triton) only.

Every loss takes codes (:class:`Codes`) or float maps, so the cached and the live path share their arithmetic.
"""

from feedfast_kernels.codes import Codes, Target, as_float, decode, encode
from feedfast_kernels.connector_partial_l2 import connector_partial_l2
from feedfast_kernels.ensemble_kl import ensemble_kl
from feedfast_kernels.locality import locality, locality_weights
from feedfast_kernels.normalized_l1 import normalized_l1
from feedfast_kernels.partial_l2 import partial_l2
from feedfast_kernels.positions import Sampled, gather_positions

__all__ = [
    "Codes",
    "Sampled",
    "Target",
    "as_float",
    "connector_partial_l2",
    "decode",
    "encode",
    "ensemble_kl",
    "gather_positions",
    "locality",
    "locality_weights",
    "normalized_l1",
    "partial_l2",
]
