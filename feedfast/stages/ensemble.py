"""The frozen ensemble: teachers as the recipe describes them, from uint8 pixels to named float maps.

Used by the offline stage (which stores the maps), by the live source of the student stage (which uses them at once)
and by the audit (which compares stored maps with fresh ones). All three call `FrozenTeacher.__call__`, so there is
one forward pass to trust. Each teacher normalizes the pixels its own way: pixels stay uint8 until here.

Maps leave as float32, logical [batch, channel, height, width] with channels-last strides (tokens [batch, channel,
token] likewise), whatever the network used inside, because reductions must not depend on where a map came from: a live
map and a cached f32 map then give bit-equal losses.

``bn = "batch"`` runs the teacher on batch statistics, as the OFD authors do. Such maps depend on the batch a sample
is in; they are reproducible only because offline batches are cut at fixed rows of a view, and the manifest says so.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feedfast import recipe as recipes
from feedfast.data.positions import ALGORITHM, positions_per_map
from feedfast.errors import CacheMismatchError, FeedfastError, RequestError
from feedfast.methods import RunningMargin, TapInfo, margin_from_bn, method_named
from feedfast.methods.base import numbered_taps, tap_groups
from feedfast.models.build import build_model, refuse_misnamed, weights_sha256
from feedfast.models.given import copied, is_given
from feedfast.models.normalize import Normalize
from feedfast.models.presets import preset_taps
from feedfast.models.taps import Tap, Tapped, bn_parameters, parse_tap, refuse_lone_norms
from feedfast.stages.accuracy import Accuracies
from feedfast.stages.inputs import teacher_input
from feedfast.stages.trainee import gray_images, method_entries, needs_of
from feedfast.storage.schema import MAX_CELLS, SampleInfo, TeacherInfo
from feedfast.storage.transform import Transform
from feedfast.tap_entry import TapEntry
from feedfast.tasks import Outputs, Task, task_named

log = logging.getLogger(__name__)

Triple = tuple[float, float, float]
LOGITS = "logits"
BOX_LOGITS = "cls_logits"  # of a detector, as torchvision calls them
PROBE_ROWS = 8
Networks = Mapping[str, nn.Module]
"""Teacher → the network, of those that a caller passed as objects."""


@dataclass(frozen=True)
class TapRequest:
    """A tap, whether it is stored after OFD's margin ReLU, and which share of its positions; None = all."""

    tap: Tap
    margin: bool
    share: float | None = None


def tap_requests(
    model: nn.Module, specs: Sequence[str | TapEntry], example: Tensor, where: str
) -> tuple[TapRequest, ...]:
    """The taps that ``specs`` ask for: a recipe's entries, or places without options ("final", "ofd", "name=path:pre").

    Raises:
        RequestError: a group the model has no preset for, a bad path, or one name asked for twice.
    """
    found: dict[str, TapRequest] = {}
    for spec in specs:
        text, margin, share = (spec, False, None) if isinstance(spec, str) else (spec.tap, spec.margin, spec.sample)
        taps = (parse_tap(text),) if "=" in text else preset_taps(model, text, example)
        for tap in taps:
            if tap.name in found or tap.name == LOGITS:
                raise RequestError(f"{where}.taps: every tap needs its own name, found {tap.name!r} twice or reserved")
            found[tap.name] = TapRequest(tap, margin, share)
    return tuple(found.values())


class FrozenTeacher:
    """One teacher on one device, in evaluation mode, without gradients.

    Attributes:
        name: as in the recipe.
        source: what it was built from.
        size: side of its input in pixels.
        requests: the taps it serves, by name.
        shapes: (channel, height, width), (channel, token) or (channel,) of each tap; (class,) of ``logits``, (class,
            height, width) where every pixel has its own.
        classes: that it tells apart.
        dense: whether it tells them apart in places of an image.
        weights_sha256: hex digest of the loaded state_dict.
        positions: how many are stored of the taps that are sampled.
        margins: OFD's margin per channel for every tap whose last layer is a BatchNorm (float32, CPU).
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        taps: Callable[[Tensor], Sequence[TapRequest]],
        *,
        source: str,
        bn: str,
        precision: str,
        mean: Triple,
        std: Triple,
        size: int,
        device: torch.device,
        task: Task | None = None,
        logits: bool = True,
        batch: int = 0,
    ) -> None:
        """Freeze a network.

        Args:
            name: as in the recipe.
            model: with its weights.
            taps: normalized example images [2, 3, H, W] → the taps wanted of it.
            source: what `build_model` made it from.
            bn: "eval", or "batch" for batch statistics.
            precision: "fp32" or "bf16".
            mean: of its input, in 0..1 units.
            std: of its input.
            size: side of its input in pixels; images of another size are resized.
            device: where it runs.
            task: what it must have learned; None = that is known.
            logits: whether its logits are served; those of a detector never are.
            batch: images it is run on together; 0 = unknown.

        Raises:
            RequestError: a tap is not there, or it is no network for the task.
        """
        self.name, self.source, self.device = name, source, device
        self.bn, self.precision, self.mean, self.std, self.size = bn, precision, mean, std, size
        self.weights_sha256 = weights_sha256(model)
        model.eval().requires_grad_(False)
        if bn == "batch":
            _use_batch_statistics(model)
        model = model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.normalize = Normalize(mean, std).to(device)
        # Two samples: batch statistics of a single 1x1 map are undefined.
        example = gray_images(self.normalize, size, device)
        self.requests = {request.tap.name: request for request in taps(example)}
        self.tapped = Tapped(model, tuple(request.tap for request in self.requests.values()), example)
        if bn == "batch" and batch == 1:
            refuse_lone_norms(model, example, f"teachers[{name}]: expected cache.batch of 2 or more with bn = 'batch'")
        outputs = self.tapped.outputs
        if task is not None:
            task.check(outputs, f"teachers[{name}]")
        self.shapes: dict[str, tuple[int, ...]] = dict(self.tapped.shapes)
        if logits and isinstance(outputs, tuple):
            self.shapes[LOGITS] = outputs
        self.positions = self._positions()
        self.classes = classes_of(outputs)
        self.dense = not (isinstance(outputs, tuple) and len(outputs) == 1)
        self.margins: dict[str, Tensor] = {}
        for tap in self.tapped.taps:  # resolved: a hand-written place has been given the norm in front of it
            parameters = bn_parameters(model, tap)
            if parameters is not None:
                gamma, beta = parameters
                self.margins[tap.name] = margin_from_bn(gamma.cpu(), beta.cpu())

    @torch.no_grad()
    def __call__(self, images: Tensor, *, widen: bool = True) -> dict[str, Tensor]:
        """uint8 pixels [batch, height, width, 3] to float32 maps by tap name, and ``logits`` [batch, class, ...].

        Logits of pixels come along where they are not served, too: they show whether the network knows its images.
        Without ``widen`` maps stay as the network made them, of 16 bits perhaps and in any order: the encoder makes the
        same codes of them, from half the bytes.
        """
        pixels = self.normalize(images.to(self.device, non_blocking=True))
        if pixels.shape[2:] != (self.size, self.size):
            pixels = F.interpolate(pixels, (self.size, self.size), mode="bilinear", antialias=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            logits, maps = self.tapped(pixels)
        out = {name: _channels_last(value.float()) if widen else value for name, value in maps.items()}
        if isinstance(logits, Tensor):
            out[LOGITS] = _channels_last(logits.float())
        return out

    def described(self, side: int) -> dict[str, Any]:
        """What a manifest says of it but for name, taps and what is measured; ``side`` is the views', in pixels."""
        return {
            "model": self.source,
            "weights_sha256": self.weights_sha256,
            "bn": self.bn,
            "precision": self.precision,
            "mean": self.mean,
            "std": self.std,
            "size": 0 if self.size == side else self.size,
            "outputs": self.classes if self.dense else 0,
        }

    def tap_info(self, name: str) -> TapInfo:
        """What a method needs to know of a tap."""
        return TapInfo(self.shapes[name], self.margins.get(name), self.positions.get(name))

    def stored(self, name: str) -> tuple[int, ...]:
        """Shape of a tap's stored values: (C, P) of a sampled map, else that of the tap."""
        return self.tap_info(name).stored

    def sample_info(self, name: str) -> SampleInfo | None:
        """What a manifest says of a tap's positions; None = all are stored."""
        share = self.requests[name].share
        return None if share is None else SampleInfo(share=share, positions=self.positions[name], algorithm=ALGORITHM)

    def _positions(self) -> dict[str, int]:
        found = {}
        for name, request in self.requests.items():
            if request.share is not None:
                shape = self.shapes[name]
                if len(shape) != 3:
                    raise RequestError(
                        f"teachers[{self.name}].taps: {name!r}: expected a map [C, H, W], of whose positions "
                        f"@{request.share!r} is stored, found {list(shape)}; leave the share out"
                    )
                if math.prod(shape[1:]) > MAX_CELLS:
                    raise RequestError(
                        f"teachers[{self.name}].taps: {name!r}: expected a map of up to {MAX_CELLS:,} positions with "
                        f"@{request.share!r}, found {shape[1]} x {shape[2]}; leave the share out"
                    )
                found[name] = positions_per_map(request.share, *shape[1:])
        return found

    def transform(self, name: str) -> Transform:
        """What happens to a tap's map before it is stored.

        Raises:
            RequestError: a margin is asked for, and the map has none.
        """
        request, margin = self.requests[name], self.margins.get(name)
        if not request.margin:
            return Transform()
        if margin is None:
            raise RequestError(
                f"teacher {self.name!r}, tap {name!r}: +margin needs a map before its activation, "
                f"found {request.tap.path} {request.tap.position!r}"
            )
        return Transform("margin", tuple(margin.tolist()))

    def probe(self, images: Tensor) -> dict[str, tuple[float, float]]:
        """Per tap, mean and root mean square over the first `PROBE_ROWS` of a batch of pixels: what it computes."""
        found = {}
        for tap, values in self(images).items():
            first = values[:PROBE_ROWS].double()
            found[tap] = (float(first.mean()), float(first.square().mean().sqrt()))
            if not math.isfinite(found[tap][1]):
                raise FeedfastError(
                    f"teacher {self.name!r}, tap {tap!r}: expected finite maps, found NaN or infinity; "
                    "are the weights and the normalization right?"
                )
        return found

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
    """Whether a map's sign tells something (OFD's partial distance): it is taken before its activation, or is OFD's."""
    # ConvNeXt's stages end linearly and without a batch norm: only the name says that a margin will be needed
    return tap.position == "pre" or tap.bn is not None or bool(numbered_taps((tap.name,), "ofd"))


def classes_of(outputs: Outputs) -> int:
    """Classes that a network of these outputs tells apart, without a detector's background; 0 = unknown."""
    if isinstance(outputs, Mapping):
        return outputs[BOX_LOGITS][-1] - 1 if BOX_LOGITS in outputs else 0
    return outputs[0] if outputs else 0


def outputs_of(spec: recipes.Teacher, classes: int) -> int | None:
    """How many classes a recipe's teacher is built with; None = as many as the model has by itself.

    Unlabeled images (``classes`` 0) say nothing: the model's own number, unless the recipe has one.
    """
    return spec.classes or (classes if spec.weights else 0) or None


def teacher_from_recipe(
    spec: recipes.Teacher,
    data: recipes.Data,
    needs: Sequence[str],
    *,
    classes: int,
    seed: int,
    device: torch.device,
    task: recipes.TaskName = "classify",
    batch: int = 0,
    without_weights: bool = False,
    network: nn.Module | None = None,
) -> FrozenTeacher:
    """A teacher as a recipe describes it.

    Args:
        spec: the recipe's entry.
        data: normalization where the entry has none, and the size of images.
        needs: selectors of the methods; what is tapped where the entry names no taps.
        classes: of the images; 0 = they have no labels.
        seed: of a network without weights.
        device: where it runs.
        task: what it must have learned. Logits of pixels are served only where they are asked for, in ``needs`` or by
            the entry's taps: they are large.
        batch: images it will be run on together; 0 = unknown.
        without_weights: leave it as it was born: for its taps and shapes alone.
        network: in the place of a built one, with its weights; it is copied.

    Raises:
        RequestError: it cannot be built, has no such taps, or is no network for the task.
    """
    where = f"teachers[{spec.name}]"
    weights = None if without_weights else spec.weights
    if network is not None:
        if not is_given(spec.model):
            refuse_misnamed(network, spec.model, (spec.classes or classes or None, None), where)
        if spec.weights:
            log.info("%s: the network that was passed is used; %s is not read", where, spec.weights)
        model = copied(network, where)
    else:
        try:
            model = build_model(
                spec.model,
                num_classes=outputs_of(spec, classes),
                weights=weights,
                seed=seed,
                key=spec.key,
                prefix=spec.prefix,
            )
        except RequestError as error:
            unsaid = not (spec.classes or classes or is_given(spec.model))
            hint = f"; the images have no labels, so {where}.classes must say it" if unsaid else ""
            raise RequestError(f"{where}: {error}{hint}") from error
    own = teacher_input(spec, data, model, given=network is not None)
    specs = (
        [entry for entry in spec.taps if entry.tap != LOGITS] if spec.taps else list(dict.fromkeys(tap_groups(needs)))
    )
    dense_logits = LOGITS in ([entry.tap for entry in spec.taps] or needs)
    return FrozenTeacher(
        spec.name,
        model,
        lambda example: tap_requests(model, specs, example, where),
        source=spec.model,
        bn=spec.bn,
        precision=spec.precision,
        mean=own.mean,
        std=own.std,
        size=own.size,
        device=device,
        task=task_named(task, 0),
        batch=batch,
        logits=task == "classify" or dense_logits,
    )


def teacher_from_manifest(
    info: TeacherInfo,
    size: int,
    spec: recipes.Teacher | None,
    device: torch.device,
    network: nn.Module | None = None,
) -> FrozenTeacher:
    """A teacher of a cache, with exactly the taps that are stored.

    Args:
        info: the manifest's entry.
        size: side of the cache's pixels.
        spec: the recipe's entry, which says where its weights are; None = the model's own published ones.
        device: where it runs.
        network: in the place of a built one, with its weights; it is copied.

    Raises:
        RequestError: it cannot be built, or has no such taps.
        CacheMismatchError: its weights are not those of the cache.
    """
    where = f"teachers[{info.name}]"
    try:
        model = (
            copied(network, where)
            if network is not None
            else build_model(
                spec.model if spec and is_given(info.model) else info.model,
                num_classes=info.num_classes or None,
                weights=spec.weights if spec else "",
                seed=0,
                key=spec.key if spec else "",
                prefix=spec.prefix if spec else "",
            )
        )
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from error
    maps = [tap for tap in info.taps.values() if tap.name != LOGITS and tap.factor is None]
    form = {3: ":map", 2: ":tokens", 1: ""}  # a map is one whatever the word says; of tokens it says what was kept
    specs = [f"{tap.name}={tap.path}:{tap.position}{form[len(tap.shape)]}" for tap in maps]
    teacher = FrozenTeacher(
        info.name,
        model,
        lambda example: tap_requests(model, specs, example, where),
        source=info.model,
        bn=info.bn,
        precision=info.precision,
        mean=info.mean,
        std=info.std,
        size=info.size or size,
        device=device,
        logits=LOGITS in info.taps,
    )
    if teacher.weights_sha256 != info.weights_sha256:
        raise CacheMismatchError(
            f"{where}.weights: expected sha256 {info.weights_sha256[:16]}…, found {teacher.weights_sha256[:16]}… "
            f"in {(spec.weights if spec else '') or 'the pretrained weights'}; give --recipe with the right files"
        )
    return teacher


def load_teachers(
    recipe: recipes.Recipe, classes: int, device: torch.device, networks: Networks | None = None
) -> dict[str, FrozenTeacher]:
    """Every teacher of the recipe, by name, in the recipe's order; ``networks`` are those that need not be built."""
    needs: Sequence[str] = [need for entry in recipe.method for need in method_named(entry.name).needs]
    if recipe.task.name != "classify":  # whose maps are large: what these options read, and no more
        needs = needs_of(method_entries(recipe.method))
    given: dict[str, Any] = {
        "classes": classes,
        "seed": recipe.seed,
        "device": device,
        "task": recipe.task.name,
        "batch": recipe.cache.batch,
    }
    known = networks or {}
    return {
        spec.name: teacher_from_recipe(spec, recipe.data, needs, **given, network=known.get(spec.name))
        for spec in recipe.teachers
    }


def accuracies(teachers: Mapping[str, FrozenTeacher], classes: int) -> Accuracies:
    """To be told what teachers say of labeled images or pixels; detectors are not asked."""
    asked = {name: teacher.classes for name, teacher in teachers.items() if isinstance(teacher.tapped.outputs, tuple)}
    return Accuracies(asked, classes)


def method_taps(teachers: Mapping[str, FrozenTeacher]) -> dict[str, dict[str, TapInfo]]:
    """Teacher → tap → what a method needs to know, with ``logits`` where they are served."""
    return {name: {tap: teacher.tap_info(tap) for tap in teacher.shapes} for name, teacher in teachers.items()}


def _channels_last(value: Tensor) -> Tensor:
    if value.dim() == 3:
        return value.transpose(1, 2).contiguous().transpose(1, 2)
    return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value.contiguous()


def _use_batch_statistics(model: nn.Module) -> None:
    """Make every BatchNorm normalize with the batch, and never touch a running average."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
