"""LP: samples that are neighbors for the teacher stay close for the student (Chen et al., TNNLS 2021).

    L = CE(y, z) + gamma / (N * k * m) * sum over teachers n, i, j of  alpha_nij * |f_i - f_j|^2
    alpha_nij = exp(-|t_ni - t_nj|^2 / sigma^2)  where j is one of the k samples of the batch nearest to i, else 0

f is the student's feature of a sample, t the teacher's; their widths need not agree, and nothing is learned but the
student. A reconstruction: the form of the loss is in the abstract and in two re-implementations; k, sigma, gamma and
the layer are not known to us. A constant student is the term's optimum, and a sigma that does not fit the features'
scale makes it 0: both would go unnoticed, so both are looked for while training.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from feedfast.methods.base import Method, MethodOptions, Shapes, StudentOutput, Targets, Teachers
from feedfast.methods.parts import embedding
from feedfast_kernels import Target, locality, locality_weights

log = logging.getLogger(__name__)

TAP = "final"
CHECK_EVERY = 200  # steps between looks at weights and spread: each look waits for the device
NEGLIGIBLE = 1e-6  # mean weight of a neighbor below which nothing is learned
COLLAPSED = 1e-4  # variance over the batch, as a share of the mean square, below which features are one point


class Locality(Method):
    """Locality-preserving embedding: no new parameters."""

    name: ClassVar[str] = "locality"
    paper: ClassVar[str] = (
        "Chen et al., Learning Student Networks via Feature Embedding, TNNLS 2021 (reconstruction: k, sigma, gamma and "
        "the layer are not from the paper)"
    )
    needs: ClassVar[tuple[str, ...]] = (TAP,)
    whole: ClassVar[str] = "compares images by the mean of a map"

    class Options(MethodOptions):
        """Neighborhoods, their scale and the weight."""

        k: int = Field(5, ge=1, description="neighbors per sample within the batch; not from the paper")
        sigma: float | None = Field(
            None,
            gt=0,
            description="in units of the teacher's features; default: of each batch the root mean square distance of "
            "neighbors, which fits any scale; not from the paper",
        )
        gamma: float = Field(0.1, ge=0, description="weight of the term; not from the paper")
        features: Literal["embedding", "map"] = Field(
            "embedding", description="the last map averaged over its grid, or all of it; not from the paper"
        )

    def __init__(self, options: Options, student: Shapes, teachers: Teachers) -> None:
        super().__init__(options, student, teachers)
        self.options, self.teacher_names = options, tuple(teachers)
        self._calls = 0
        self._warned: set[str] = set()

    def forward(self, student: StudentOutput, targets: Targets, annotations: Any) -> dict[str, Tensor]:
        """``locality``: weighted squared distances between neighbors, averaged over neighbors, batch and teachers."""
        options = self.options
        ours = self._feature(student.taps[TAP])
        sigma_squared = None if options.sigma is None else options.sigma**2
        denominator = float(len(self.teacher_names) * options.k * max(len(ours), 1))
        terms = []
        for name in self.teacher_names:
            theirs = targets[name][TAP]
            theirs = embedding(theirs) if options.features == "embedding" else theirs
            terms.append(locality(ours, theirs, k=options.k, sigma_squared=sigma_squared, denominator=denominator))
            if self.training and self._calls % CHECK_EVERY == 0 and len(ours) > 1:
                self._look(name, ours.detach(), theirs, sigma_squared)
        self._calls += self.training
        return {"locality": torch.stack(terms).sum()}

    def weights(self, progress: float) -> dict[str, float]:
        """gamma."""
        return {"locality": self.options.gamma}

    def _feature(self, map_NCHW: Tensor) -> Tensor:
        return map_NCHW.mean((2, 3)) if self.options.features == "embedding" and map_NCHW.ndim == 4 else map_NCHW

    @torch.no_grad()
    def _look(self, name: str, ours: Tensor, theirs: Target, sigma_squared: float | None) -> None:
        """Warn, once each, where the term has become nothing."""
        alpha = locality_weights(theirs, k=self.options.k, sigma_squared=sigma_squared)
        mean_alpha = float(alpha.sum()) / (len(ours) * min(self.options.k, len(ours) - 1))
        if mean_alpha < NEGLIGIBLE:
            self._warn(
                f"method.sigma: teacher {name!r}: the weights of neighbors have a mean of {mean_alpha:.1e}, so nothing "
                f"is learned; expected a sigma of the features' scale, found {self.options.sigma} (none fits any scale)"
            )
        flat = ours.flatten(1).double()
        spread = float(flat.var(0, unbiased=False).sum() / flat.square().sum(1).mean().clamp(min=1e-300))
        if spread < COLLAPSED:
            self._warn(
                f"method.gamma: the student's features differ by {spread:.1e} of their mean square: they have "
                f"collapsed into one point; lower gamma, found {self.options.gamma:g}"
            )

    def _warn(self, message: str) -> None:
        if message[:20] not in self._warned:
            self._warned.add(message[:20])
            log.warning(message)
