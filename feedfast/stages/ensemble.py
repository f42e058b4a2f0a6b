"""The frozen ensemble: teachers as the recipe describes them, from uint8 pixels to named float maps.

Used by the offline stage (which stores the maps), by the live source of the student stage (which uses them at once)
and by the audit (which compares stored maps with fresh ones). All three call `FrozenTeacher.__call__`, so there is
one forward pass to trust. Each teacher normalizes the pixels its own way: pixels stay uint8 until here.

Maps leave as float32, logical [batch, channel, height, width] with channels-last strides, whatever the network used
inside, because reductions must not depend on where a map came from: a live map and a cached f32 map then give
bit-equal losses.

``bn = "batch"`` runs the teacher on batch statistics, as the OFD authors do. Such maps depend on the batch a sample
is in; they are reproducible only because offline batches are cut at fixed rows of a view, and the manifest says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from feedfast import recipe as recipes
from feedfast.errors import RequestError
from feedfast.methods import RunningMargin, TapInfo, margin_from_bn, method_named
from feedfast.methods.base import tap_groups
from feedfast.models.build import build_model, weights_sha256
from feedfast.models.presets import preset_taps
from feedfast.models.taps import Tap, Tapped, bn_parameters, parse_tap
from feedfast.tasks import Classify

LOGITS = "logits"
MARGIN_SUFFIX = "+margin"


class Normalize(nn.Module):
    """(x/255 - mean) / std: uint8 pixels [batch, height, width, 3] to float32 [batch, 3, height, width].

    The result keeps the channels-last strides of its pixels.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        mean_C, std_C = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        self.register_buffer("scale", (1 / (255 * std_C)).float().view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", (-mean_C / std_C).float().view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        return torch.addcmul(self.shift, images.permute(0, 3, 1, 2).float(), self.scale)


@dataclass(frozen=True)
class TapRequest:
    """A tap and whether it is stored after OFD's margin ReLU."""

    tap: Tap
    margin: bool


def tap_requests(model: nn.Module, specs: Sequence[str], example: Tensor, where: str) -> tuple[TapRequest, ...]:
    """The taps that ``specs`` ask for ("final", "ofd", "name=path:pre", each with an optional "+margin").

    Raises:
        RequestError: a group the model has no preset for, a bad path, or one name asked for twice.
    """
    found: dict[str, TapRequest] = {}
    for spec in specs:
        text = spec.removesuffix(MARGIN_SUFFIX)
        taps = (parse_tap(text),) if "=" in text else preset_taps(model, text, example)
        for tap in taps:
            if tap.name in found or tap.name == LOGITS:
                raise RequestError(f"{where}.taps: every tap needs its own name, found {tap.name!r} twice or reserved")
            found[tap.name] = TapRequest(tap, margin=spec.endswith(MARGIN_SUFFIX))
    return tuple(found.values())


class FrozenTeacher:
    """One teacher on one device, in evaluation mode, without gradients.

    Attributes:
        name: as in the recipe.
        requests: the taps it serves, by name.
        shapes: (channel, height, width) of each tap; (class,) of ``logits``.
        weights_sha256: hex digest of the loaded state_dict.
        margins: OFD's margin per channel for every tap whose last layer is a BatchNorm (float32, CPU).
    """

    def __init__(self, spec: recipes.Teacher, recipe: recipes.Recipe, num_classes: int, device: torch.device) -> None:
        where = f"teachers[{spec.name}]"
        # Unlabeled images say nothing of classes: the model's own number, unless the recipe has one.
        classes = spec.classes or (num_classes if spec.weights else 0) or None
        try:
            model = build_model(spec.model, num_classes=classes, weights=spec.weights, seed=recipe.seed)
        except RequestError as error:
            hint = "" if spec.classes or num_classes else f"; the images have no labels, so {where}.classes must say it"
            raise RequestError(f"{where}: {error}{hint}") from error
        self.name, self.spec, self.device = spec.name, spec, device
        self.weights_sha256 = weights_sha256(model)
        model.eval().requires_grad_(False)
        if spec.bn == "batch":
            _use_batch_statistics(model)
        model = model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        mean, std = recipe.data.normalization
        self.mean, self.std = spec.mean or mean, spec.std or std
        self.normalize = Normalize(self.mean, self.std).to(device)
        # Two samples: batch statistics of a single 1x1 map are undefined.
        size = recipe.data.size
        example = self.normalize(torch.full((2, size, size, 3), 128, dtype=torch.uint8, device=device))
        needs = [need for entry in recipe.method for need in method_named(entry.name).needs]
        specs = spec.taps or tuple(dict.fromkeys(tap_groups(needs)))
        self.requests = {request.tap.name: request for request in tap_requests(model, specs, example, where)}
        self.tapped = Tapped(model, tuple(request.tap for request in self.requests.values()), example)
        Classify().check(self.tapped.outputs, where)
        self.shapes: dict[str, tuple[int, ...]] = {**self.tapped.shapes, LOGITS: self.tapped.outputs or ()}
        self.margins: dict[str, Tensor] = {}
        for tap in self.tapped.taps:  # resolved: a hand-written place has been given the norm in front of it
            parameters = bn_parameters(model, tap)
            if parameters is not None:
                gamma, beta = parameters
                self.margins[tap.name] = margin_from_bn(gamma.cpu(), beta.cpu())

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 pixels [batch, height, width, 3] to float32 maps by tap name, and ``logits`` [batch, class]."""
        pixels = self.normalize(images.to(self.device, non_blocking=True))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.spec.precision == "bf16"):
            logits, maps = self.tapped(pixels)
        out = {name: _channels_last(value.float()) for name, value in maps.items()}
        out[LOGITS] = logits.float().contiguous()
        return out

    def tap_info(self, name: str) -> TapInfo:
        """What a method needs to know of a tap."""
        return TapInfo(shape=self.shapes[name], margin=self.margins.get(name))

    @property
    def needs_pilot(self) -> bool:
        """Whether `fit_margins` has pre-activation taps to fit that no BatchNorm stands behind."""
        return bool(self._unfitted())

    def fit_margins(self, batches: Sequence[Tensor]) -> None:
        """Running-mean margins from pilot pixels, for pre-activation taps that no BatchNorm stands behind."""
        running = {name: RunningMargin(self.shapes[name][0]) for name in self._unfitted()}
        for images in batches if running else ():
            maps = self(images)
            for name, margin in running.items():
                margin.update(maps[name].cpu())
        self.margins.update({name: margin.value() for name, margin in running.items()})

    def _unfitted(self) -> list[str]:
        return [name for name, request in self.requests.items() if is_signed(request.tap) and name not in self.margins]


def is_signed(tap: Tap) -> bool:
    """Whether a map has not been through its activation, so that its sign tells something (OFD's partial distance)."""
    return tap.position == "pre" or tap.bn is not None


def load_teachers(recipe: recipes.Recipe, num_classes: int, device: torch.device) -> dict[str, FrozenTeacher]:
    """Every teacher of the recipe, by name, in the recipe's order."""
    return {spec.name: FrozenTeacher(spec, recipe, num_classes, device) for spec in recipe.teachers}


def method_taps(teachers: Mapping[str, FrozenTeacher]) -> dict[str, dict[str, TapInfo]]:
    """Teacher → tap → what a method needs to know, with ``logits``."""
    return {name: {tap: teacher.tap_info(tap) for tap in teacher.shapes} for name, teacher in teachers.items()}


def _channels_last(value: Tensor) -> Tensor:
    return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value.contiguous()


def _use_batch_statistics(model: nn.Module) -> None:
    """Make every BatchNorm normalize with the batch, and never touch a running average."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
