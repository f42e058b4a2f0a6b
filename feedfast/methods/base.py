"""The words all methods share: what a student gives, what teachers give, and what a method declares.

A method is one class: its options with types, ranges and defaults, the taps it needs, its adapters, its loss terms
and their weights. Help, docs and checks are made from it, so a new method is a new file and a name in `METHODS`.

Terms are unweighted and hold no task loss: what is learned is the task's business. The loss of a step is

    loss = task_weight * task loss + sum over methods, sum over terms of  entry weight * weight * term

Methods know neither caches nor teachers: a target is codes or a float map, whoever made it. Adapters are ordinary
parameters of the method: `method.parameters()` goes into the optimizer, and the student never carries them.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from torch import Tensor, nn

from feedfast.errors import RequestError
from feedfast_kernels import Sampled, Target
from feedfast_kernels.positions import as_row

LOGITS = "logits"

Shapes = Mapping[str, tuple[int, ...]]
"""Tap name -> (C, H, W), (C, N) for tokens or (C,) for a vector, of one sample of the student."""

Targets = Mapping[str, Mapping[str, Target]]
"""Teacher name -> tap name -> target. "logits" is a float [B, K]; other taps are maps or vectors.

Of a sampled map they are a map of one row, [B, C, 1, P]: see `StudentOutput.at`."""

GivenTargets = Mapping[str, Mapping[str, Target | Sampled]]
"""The same as a batch has them: of a sampled map with its positions."""

Passes = Callable[[int], Iterator[Targets]]
"""Number of an epoch -> its batches of targets, without images: what `Method.prepare` learns from."""


@dataclass(frozen=True)
class TapInfo:
    """One tap of one teacher, as a method needs to know it.

    Attributes:
        shape: (C, H, W), (C, N) for tokens or (C,) for a vector, of one sample.
        margin: fp32 [C], OFD's lower bound of a pre-activation map, or None.
        positions: how many of a map's H * W positions targets hold; None = it is whole.
    """

    shape: tuple[int, ...]
    margin: Tensor | None = None
    positions: int | None = None

    @property
    def stored(self) -> tuple[int, ...]:
        """Shape of a target's values: (C, P) of a sampled map, else ``shape``."""
        return self.shape if self.positions is None else (self.shape[0], self.positions)


Teachers = Mapping[str, Mapping[str, TapInfo]]
"""Teacher name -> tap name -> shape and margin."""


@dataclass
class StudentOutput:
    """What the student's forward pass gives.

    Attributes:
        output: what the network returns, with gradient; for a classifier logits [B, K].
        taps: tap name -> [B, C, H, W], [B, C, N] or [B, C], with gradient.
        ids: int64 [B], which samples these are; None unless a method `remembers`.
        sampled: teacher -> tap -> target with its positions, of the maps that are sampled.
    """

    output: Any
    taps: dict[str, Tensor]
    ids: Tensor | None = None
    sampled: Mapping[str, Mapping[str, Sampled]] = field(default_factory=dict)
    _gathered: dict[tuple[str, int], Tensor] = field(default_factory=dict, repr=False)

    def at(self, tap: str, teacher: str) -> tuple[Tensor, float]:
        """A tap where a teacher's target of it is, and what a sum over its positions is multiplied with.

        Returns:
            [B, C, H, W] and 1; or of a sampled target [B, C, 1, P], gathered, and H * W / P. Teachers who share their
            positions share what is gathered.
        """
        found = self.sampled.get(teacher, {}).get(tap)
        if found is None:
            return self.taps[tap], 1.0
        key = (tap, id(found.positions))
        if key not in self._gathered:
            self._gathered[key] = found.gather(self.taps[tap]).unsqueeze(2)
        return self._gathered[key], found.rescale


def apart(given: GivenTargets) -> tuple[Targets, dict[str, dict[str, Sampled]]]:
    """Targets as methods read them, and those that are sampled."""
    plain = {
        name: {tap: as_row(target.values) if isinstance(target, Sampled) else target for tap, target in taps.items()}
        for name, taps in given.items()
    }
    sampled = {
        name: {tap: target for tap, target in taps.items() if isinstance(target, Sampled)}
        for name, taps in given.items()
    }
    return plain, sampled


class MethodOptions(BaseModel):
    """Base of every method's options: frozen, no unknown keys, no guessed types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Method(nn.Module):
    """Base of every method.

    Attributes:
        name: in recipes.
        paper: where it is from; "reconstruction" where the paper's details are not known.
        needs: selectors of the taps it reads of teachers and student: ``final``, ``ofd*`` (ofd1, ofd2, ...),
            ``stage*``, and ``logits``, which of the student are its output. A cache is read for nothing else.
        student_needs: selectors of the student's taps where they are others; None = the same.
        remembers: whether it keeps something of every sample: it is told of all, see `meet`, and gets their ids.
        one_label: whether it needs exactly one class per image, so that mixed images cannot be learned from.
        dense: whether it serves networks that answer place by place, too: the tasks segment and detect (of these, what
            reads no logits); their logits are [B, K, h, w].
        samples: whether it serves targets at some positions of a map: its loss is a sum or mean over positions, which
            those stand for, or nearly so; see `StudentOutput.at`. Decided per class, and where it is False
        whole: says why.
        fuses: a task whose loss this method computes together with its own, see `fused`; None = it fuses none.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    student_needs: ClassVar[tuple[str, ...] | None] = None
    remembers: ClassVar[bool] = False
    one_label: ClassVar[bool] = False
    dense: ClassVar[bool] = False
    samples: ClassVar[bool] = False
    whole: ClassVar[str] = "compares whole maps"
    fuses: ClassVar[type | None] = None

    class Options(MethodOptions):
        """No options."""

    def __init__(self, options: Any, student: Shapes, teachers: Teachers) -> None:
        """Build adapters for these shapes; RequestError where they do not fit."""
        super().__init__()
        if self.needs and not teachers:
            raise RequestError(f"method.name: {self.name!r} needs at least one teacher, found none")
        self._refuse_sampled(options, student, teachers)
        for name, infos in teachers.items() if not self.dense and LOGITS in self.needed(options) else ():
            if LOGITS in infos and len(infos[LOGITS].shape) > 1:
                raise RequestError(
                    f"method.name: {self.name!r} compares one row of logits per image, expected teachers that give it, "
                    f"found (class, height, width) = {infos[LOGITS].shape} of teacher {name!r}"
                )

    def _refuse_sampled(self, options: Any, student: Shapes, teachers: Teachers) -> None:
        for name, infos in teachers.items():
            for tap in matching(self.needed(options), infos):
                info = infos[tap]
                if info.positions is None:
                    continue
                found = f"found {info.positions} of {math.prod(info.shape[1:])} positions"
                if not self.samples:
                    raise RequestError(
                        f"tap {tap!r} of teacher {name!r}: method {self.name!r} {self.whole}; expected all positions, "
                        f"{found}: store the tap without a share"
                    )
                if tap in student and student[tap][1:] != info.shape[1:]:
                    raise RequestError(
                        f"tap {tap!r} of teacher {name!r}: {found} of a map of {list(info.shape[1:])}, expected that "
                        f"grid of the student, which has {list(student[tap][1:])}; store the tap without a share"
                    )

    def meet(self, ids: Tensor, labels: Tensor) -> None:
        """Make room for every sample of the run; when the method is built, before a checkpoint is loaded.

        Args:
            ids: int64 [n], ascending.
            labels: int64 [n], -1 = unlabeled.
        """

    @classmethod
    def needed(cls, options: Any) -> tuple[str, ...]:
        """What it reads with these options; ``needs`` unless they change it. A cache is made for ``needs``."""
        return cls.needs

    def prepare(self, passes: Passes) -> None:
        """Learn what must be known before the first step, from targets alone; once per run, not when it resumes.

        What the first rank learns counts: it must be parameters or buffers, which the others are sent. They are not
        asked, but where targets are recorded as they are read, which takes all ranks.

        Args:
            passes: batches of an epoch's targets.
        """

    def forward(self, student: StudentOutput, targets: Targets, annotations: Any) -> dict[str, Tensor]:
        """Unweighted loss terms by name, scalars with gradient.

        Args:
            student: output and taps of a batch.
            targets: what `needs` names, of every teacher.
            annotations: what the batch is annotated with, for methods that look at it.
        """
        return {}

    def weights(self, progress: float) -> dict[str, float]:
        """Weight of each term at ``progress`` 0..1 of the run; pure, so that phases and ramps survive resuming."""
        return {}

    def task_weight(self, progress: float) -> float:
        """What the task's own loss is multiplied with."""
        return 1.0

    def fused(
        self,
        student: StudentOutput,
        targets: Targets,
        annotations: Any,
        weight: float,
        task_weight: float,
        progress: float,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The task's loss and the terms in one pass, for a task of type ``fuses``.

        Returns:
            The weighted sum, with gradient (terms weighted by ``weight`` times `weights`, the task's loss by
            ``task_weight``), the task's loss, and the terms, both without gradient.
        """
        raise NotImplementedError(f"{self.name} names a task in `fuses` and has no `fused`")


def matching(needs: Iterable[str], names: Iterable[str]) -> tuple[str, ...]:
    """The names that selectors mean, in the selectors' order; those of ``ofd*`` by their number."""
    names = list(names)
    found: list[str] = []
    for need in needs:
        found += numbered_taps(names, need[:-1]) if need.endswith("*") else [name for name in names if name == need]
    return tuple(dict.fromkeys(found))


def numbered_taps(taps: Iterable[str], prefix: str) -> tuple[str, ...]:
    """The taps called ``prefix`` and a number, by that number: ofd1, ofd2, ..."""
    found = [name for name in taps if name.startswith(prefix) and name[len(prefix) :].isdecimal()]
    return tuple(sorted(found, key=lambda name: int(name[len(prefix) :])))


def tap_groups(needs: Iterable[str]) -> tuple[str, ...]:
    """The groups that a network is tapped for: ``ofd`` for ``ofd*``; logits need no tap."""
    return tuple(need.removesuffix("*") for need in needs if need != LOGITS)


def parse_options(method: type[Method], values: Mapping[str, Any], where: str = "method") -> Any:
    """The ``Options`` of a method from a recipe's words.

    Raises:
        RequestError: an unknown key, a wrong type or a value out of range; ``where`` and the key begin each sentence.
    """
    try:
        return method.Options.model_validate(dict(values))
    except ValidationError as error:
        fields = method.Options.model_fields
        sentences = (_sentence(item, method.name, where, fields) for item in error.errors())
        raise RequestError("; ".join(sentences)) from None


def _sentence(item: Any, method: str, where: str, fields: Mapping[str, FieldInfo]) -> str:
    """One of pydantic's errors as key, expected, found."""
    key, kind = ".".join(str(part) for part in item["loc"]), item["type"]
    if kind == "extra_forbidden":
        close = difflib.get_close_matches(key, fields, 1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        return f"{where}.{key}: not an option of {method!r}, expected {' | '.join(fields) or 'none at all'}{hint}"
    if kind == "value_error":
        return f"{where}.{item['ctx']['error']!s}"
    return f"{where}.{key}: expected {expected_words(fields[str(item['loc'][0])])}, found {item['input']!r}"


def expected_words(field: FieldInfo) -> str:
    """What a field takes, in words: ``a number from 0 to 1``, ``true or false``, ``'sum' or 'mean'``."""
    text = str(field.annotation)
    if "Literal[" in text:
        return " or ".join(text[text.index("Literal[") + 8 : text.rindex("]")].split(", "))
    if "tuple[" in text:
        return "a list of whole numbers" if "int" in text else "a list of numbers"
    if "bool" in text:
        return "true or false"
    kind = "a whole number" if "int" in text else "a number" if "float" in text else "a word"
    bounds = {
        name: getattr(part, name) for part in field.metadata for name in ("gt", "ge", "lt", "le") if hasattr(part, name)
    }
    if "ge" in bounds and "le" in bounds:
        return f"{kind} from {bounds['ge']:g} to {bounds['le']:g}"
    words = {"gt": "more than {:g}", "ge": "of {:g} or more", "lt": "less than {:g}", "le": "of {:g} or less"}
    limits = [words[name].format(value) for name, value in bounds.items()]
    return " and ".join([f"{kind} {limits[0]}", *limits[1:]]) if limits else kind
