"""What a recipe's ``data.augment`` means: a preset, or a list of tables in the order in which they run.

A list begins with at most one crop and at most one flip (they place the window; boxes and masks follow them), goes on
with operations on pixels, and ends with mixing. Presets are lists with the names people know; where one departs from
its source, `PRESETS` says so. ``none``, ``pad-crop-flip`` and ``resized-crop-flip`` keep their numbers to the bit;
``data.flip`` belongs to the names of `WORDS` alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, FiniteFloat, ValidationError

from feedfast.data import operations as ops
from feedfast.data.crops import ExpandCrop, MultiCrop
from feedfast.data.distort import PhotometricDistort
from feedfast.data.mixing import CutMix, Mixup
from feedfast.data.operations import Options, Probability
from feedfast.data.steps import TABLE
from feedfast.data.views import Augment, ViewPlan
from feedfast.errors import RequestError

__all__ = ["OPERATIONS", "PRESETS", "WORDS", "crop_of", "operations_of", "plan_with"]


class PadCrop(Options):
    """A window of the output's size shifted by up to ``pad`` pixels; what leaves the image is black."""

    op: Literal["pad-crop"] = "pad-crop"
    pad: int = Field(-1, ge=-1, description="output pixels; -1 = an eighth of the side")


class ResizedCrop(Options):
    """A random part of the image, resized (torchvision's RandomResizedCrop)."""

    op: Literal["resized-crop"] = "resized-crop"
    scale: tuple[FiniteFloat, FiniteFloat] = Field((0.08, 1.0), description="share of the area, from and to")
    ratio: tuple[FiniteFloat, FiniteFloat] = Field((3 / 4, 4 / 3), description="width over height, from and to")


class ScaleJitter(Options):
    """The image zoomed in or out and a window of it, black outside (torchvision's ScaleJitter and FixedSizeCrop)."""

    op: Literal["scale-jitter"] = "scale-jitter"
    scale: tuple[FiniteFloat, FiniteFloat] = Field(
        (0.1, 2.0), description="zoom, from and to; at 1 the longer side fills the output"
    )


class ScaleCrop(Options):
    """The shorter side scaled to a whole number of pixels, and a window of it, as segmentation is trained.

    Where the image is the smaller one it lies in the upper left corner; what is outside is black, of masks 255.
    """

    op: Literal["scale-crop"] = "scale-crop"
    scale: tuple[FiniteFloat, FiniteFloat] = Field(
        (0.5, 2.0), description="of the output's side, from and to; at 1 the shorter side fills the output"
    )


class Flip(Options):
    """Mirrored left to right."""

    op: Literal["flip"] = "flip"
    p: Probability = Field(0.5, description="how often")


OPERATIONS: dict[str, type[Options]] = {
    str(kind.model_fields["op"].default): kind
    for kind in (
        PadCrop, ResizedCrop, ScaleJitter, ScaleCrop, ExpandCrop, MultiCrop, Flip, ops.ColorJitter, PhotometricDistort,
        ops.Grayscale, ops.GaussianBlur, ops.Solarize, ops.RandomErasing, ops.Affine, ops.Rotate, ops.RandAugment,
        ops.TrivialAugment, ops.AutoAugment, Mixup, CutMix,
    )
}  # fmt: skip
"""The tables that a list may hold, by ``op``."""

WORDS: dict[str, dict[str, Any]] = {
    "none": {}, "pad-crop-flip": {}, "resized-crop-flip": {}, "scale-crop-flip": {"scale": (0.5, 2.0)},
    "expand-crop-flip": {},
}  # fmt: skip
"""Names that are no lists: a crop with its defaults, and ``data.flip``."""

_CROPS = (PadCrop, ResizedCrop, ScaleJitter, ScaleCrop, ExpandCrop, MultiCrop)

_MEAN = (124, 116, 104)  # ImageNet's mean in bytes: what timm fills with
_TIMM = ops.RandAugment(
    space="timm", count=2, p=0.5, magnitude=9, magnitude_std=0.5, interpolation="bilinear", fill=_MEAN
)
_TIMM_ERASE = ops.RandomErasing(p=0.25, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), fill=_MEAN)


@dataclass(frozen=True)
class Preset:
    """A list with a name, and where it is from."""

    tables: tuple[Options, ...]
    note: str


PRESETS: dict[str, Preset] = {
    "cifar-standard": Preset((PadCrop(pad=4), Flip()), "torchvision's RandomCrop(32, padding=4) and flip"),
    "imagenet-standard": Preset((ResizedCrop(), Flip()), "torchvision's RandomResizedCrop and flip"),
    "timm-ra": Preset(
        (ResizedCrop(), Flip(), _TIMM, _TIMM_ERASE),
        "timm's --aa rand-m9-mstd0.5-inc1 --reprob 0.25; boxes are erased to the mean color where --remode pixel fills "
        "them with noise, and warps are bilinear where timm draws bilinear or bicubic",
    ),
    "deit": Preset(
        (ResizedCrop(), Flip(), _TIMM, _TIMM_ERASE, Mixup(alpha=0.8, p=0.5), CutMix(alpha=1.0, p=0.5)),
        "DeiT's training: timm-ra with mixup 0.8 and cutmix 1.0, either with probability 0.5; departs as timm-ra does, "
        "and partners are of the whole view, not of the batch",
    ),
    "lightly-distill": Preset(
        (
            ResizedCrop(scale=(0.14, 1.0)),
            Flip(),
            ops.ColorJitter(p=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1),
            ops.Grayscale(p=0.2),
            Mixup(alpha=1.0, p=1.0),
        ),
        "Lightly-Train's distillation transform (color jitter of strength 0.5) with its method's mixup, a weight per "
        "image where it draws one per batch; its blur of at most 0.1 pixels changes no byte and is left out",
    ),
    "ml-dr": Preset(
        (
            ResizedCrop(),
            Flip(),
            ops.RandAugment(),
            ops.RandomErasing(p=0.25),
            Mixup(alpha=1.0, p=0.5),
            CutMix(alpha=1.0, p=0.5),
        ),
        "Dataset reinforcement's randaug_mixing; mixup and cutmix exclude each other here, and mixup's weight is not "
        "halved",
    ),
    "deeplab": Preset(
        (ScaleCrop(), Flip(), ops.GaussianBlur(p=0.5, sigma=(0.001, 1.0), kernel=7)),
        "the transforms of pytorch-deeplab-xception, which OFD's segmentation uses: the shorter side is 0.5 to 2 times "
        "the output's, a window, flip, PIL's blur of radius 0 to 1 half of the time (here a true Gaussian of that "
        "deviation). They pad masks with 0, the background; here padding is 255 and counts in no loss",
    ),
    "ssd": Preset(
        (ExpandCrop(), Flip(), PhotometricDistort()),
        "SSD's, as in torchvision's reference training: RandomPhotometricDistort, RandomZoomOut(fill=mean), "
        "RandomIoUCrop, flip. They distort colors before the window is cut, here after it, so the canvas is distorted "
        "too and contrast turns about the window's mean; hue turns as DALI's",
    ),
}  # fmt: skip


def plan_with(augment: str | Sequence[Mapping[str, Any]], *, seed: int, size: int, flip: float) -> ViewPlan:
    """The view plan of a recipe's ``data.augment``.

    Args:
        augment: a name of `WORDS`, a preset, or tables ``{ op = ..., ... }``.
        seed: of the plan.
        size: side of the square in pixels.
        flip: probability, of the names of `WORDS`.

    Raises:
        RequestError: an unknown name, operation or option, a value out of range, or an order that cannot run; the
            message names the key.
    """
    if isinstance(augment, str) and augment in WORDS:
        return ViewPlan(seed=seed, size=size, augment=augment, flip=flip, **WORDS[augment])  # type: ignore[arg-type]
    if isinstance(augment, str):
        if augment not in PRESETS:
            known = ", ".join([*WORDS, *PRESETS])
            raise RequestError(f"data.augment: expected one of {known}, or a list of operations, found {augment!r}")
        tables: Sequence[Options] = PRESETS[augment].tables
    else:
        tables = [_parsed(place, table) for place, table in enumerate(augment)]
    rest = list(tables)
    crop = rest.pop(0) if rest and isinstance(rest[0], _CROPS) else None
    mirror = rest.pop(0) if rest and isinstance(rest[0], Flip) else None
    late = [table.op for table in rest if isinstance(table, (*_CROPS, Flip))]
    if late:
        raise RequestError(
            f"data.augment: expected at most one crop, then at most one flip, first; found {late[0]!r} later"
        )
    geometry: Augment = "pad-crop-flip"
    fields: dict[str, Any] = {"pad": 0}  # no crop is a shift by nothing: the central square, resized
    if isinstance(crop, ResizedCrop):
        geometry, fields = "resized-crop-flip", {"scale": crop.scale, "ratio": crop.ratio}
    elif isinstance(crop, ScaleJitter):
        geometry, fields = "scale-jitter-flip", {"scale": crop.scale}
    elif isinstance(crop, ScaleCrop):
        geometry, fields = "scale-crop-flip", {"scale": crop.scale}
    elif isinstance(crop, ExpandCrop):
        geometry, fields = "expand-crop-flip", {"crop": crop}
    elif isinstance(crop, MultiCrop):
        geometry, fields = "multi-crop-flip", {"crop": crop}
    elif isinstance(crop, PadCrop):
        fields = {"pad": crop.pad}
    fields["flip"] = mirror.p if isinstance(mirror, Flip) else 0.0
    kept = tuple(table for table in rest if isinstance(table, (ops.PixelOperation, Mixup, CutMix)))
    return ViewPlan(seed=seed, size=size, augment=geometry, operations=kept, **fields)


def operations_of(listed: Sequence[Mapping[str, Any]], table: str) -> tuple[Any, ...]:
    """A plan's operations from what `ViewPlan.to_dict` said of them.

    Raises:
        RequestError: they are of another version of the table of steps, or not what this version knows.
    """
    if table != TABLE:
        raise RequestError(
            f"view plan: its operations are of version {table!r}, this feedfast knows {TABLE!r}; "
            "use the one it was made with"
        )
    return tuple(_parsed(place, entry) for place, entry in enumerate(listed))


def crop_of(listed: Mapping[str, Any]) -> ExpandCrop | MultiCrop:
    """A plan's crop from what `ViewPlan.to_dict` said of it.

    Raises:
        RequestError: it is not what this version knows.
    """
    crop = _parsed(0, listed)
    if not isinstance(crop, (ExpandCrop, MultiCrop)):
        raise RequestError(f"view plan, crop: expected expand-crop or multi-crop, found {listed['op']!r}")
    return crop


def _parsed(place: int, table: Mapping[str, Any]) -> Options:
    name = table.get("op")
    if name not in OPERATIONS:
        found = "nothing" if name is None else repr(name)
        raise RequestError(f"data.augment.{place}.op: expected one of {', '.join(OPERATIONS)}, found {found}")
    kind = OPERATIONS[str(name)]
    try:
        return kind.model_validate(dict(table))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join([f"data.augment.{place}", *map(str, first["loc"])])
        if first["type"] == "extra_forbidden":
            known = ", ".join(kind.model_fields)
            raise RequestError(f"{key}: unknown option of {name}; expected one of {known}") from None
        message = first["msg"].removeprefix("Value error, ")
        message = message[0].lower() + message[1:]
        found = (
            "" if message.startswith(tuple(kind.model_fields)) or not first["loc"] else f", found {first['input']!r}"
        )
        raise RequestError(f"{key}: {message}{found}") from None
