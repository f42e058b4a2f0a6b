"""Documents of what says which networks can be tapped, which methods and recipes there are, and what runs here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from feedfast.documents.base import Document
from feedfast.models.doctor import TapPlace
from feedfast.stages.doctor import Finding
from feedfast.stages.probes import Facts


@dataclass(frozen=True)
class TapsDocument(Document):
    """The tappable places of a network: `feedfast taps`.

    Attributes:
        model: as it was named.
        size: pixels, side of the input.
        taps: one entry per place.
        methods: method → what to write as ``teachers.N.taps`` for it; () where the network has no such places.
    """

    model: str
    size: int
    taps: tuple[TapPlace, ...]
    methods: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class MethodEntry:
    """A method among all.

    Attributes:
        paper: where it is from.
        needs: selectors of the taps it reads.
        tasks: values of ``task.name`` that it serves.
        options: their names.
        bytes_per_sample: what it would store of the recipe's teachers, per view; None without a recipe, or where one
            of them has no such maps.
        refused: which teacher that is; None = none.
    """

    paper: str
    needs: tuple[str, ...]
    tasks: tuple[str, ...]
    options: tuple[str, ...]
    bytes_per_sample: int | None = None
    refused: str | None = None


@dataclass(frozen=True)
class MethodsDocument(Document):
    """All methods: `feedfast methods`.

    Attributes:
        methods: name → what it is.
    """

    methods: Mapping[str, MethodEntry]


@dataclass(frozen=True)
class MethodOption:
    """An option of a method.

    Attributes:
        name: of the key in [method].
        expected: type and range in words.
        default: where the recipe says nothing.
        meaning: in a line.
    """

    name: str
    expected: str
    default: Any
    meaning: str


@dataclass(frozen=True)
class MethodTarget:
    """What a method would have a cache store of a teacher's tap.

    Attributes:
        shape: of one sample's map.
        codec: the stored form of its values.
        bytes_per_sample: of one view, before compression.
    """

    shape: tuple[int, ...]
    codec: str
    bytes_per_sample: int


@dataclass(frozen=True)
class MethodDocument(Document):
    """One method: `feedfast methods NAME`.

    Attributes:
        name: of the method.
        paper: where it is from.
        needs: selectors of the taps it reads.
        tasks: values of ``task.name`` that it serves.
        options: all of them.
        bytes_per_sample: as of `MethodEntry`.
        targets: teacher/tap → what would be stored; None without a recipe.
        refused: as of `MethodEntry`.
    """

    name: str
    paper: str
    needs: tuple[str, ...]
    tasks: tuple[str, ...]
    options: tuple[MethodOption, ...]
    bytes_per_sample: int | None = None
    targets: Mapping[str, MethodTarget] | None = None
    refused: str | None = None


@dataclass(frozen=True)
class RecipesDocument(Document):
    """The packaged recipes: `feedfast recipes`.

    Attributes:
        recipes: name → what it is, in a line.
    """

    recipes: Mapping[str, str]


@dataclass(frozen=True)
class RecipeDocument(Document):
    """One packaged recipe: `feedfast recipes NAME`.

    Attributes:
        name: of the recipe.
        title: what it is, in a line.
        toml: its text.
        out: the file it was copied to; None = to none.
    """

    name: str
    title: str
    toml: str
    out: str | None


@dataclass(frozen=True)
class Machine:
    """What runs here.

    Attributes:
        host: the first 12 hex digits of the sha256 of its name.
        system: operating system and architecture.
        cpu: the processor's name.
        cores: as many as this process may use.
        gpus: names of its CUDA devices.
        driver: version of their driver; None without one.
        memory_bytes: main memory; 0 = not known.
    """

    host: str
    system: str
    cpu: str
    cores: int
    gpus: tuple[str, ...]
    driver: str | None
    memory_bytes: int


@dataclass(frozen=True)
class Bf16:
    """Whether bf16 pays on this processor.

    Attributes:
        instructions: whether it has any for it.
        over_fp32: measured time over that of fp32.
    """

    instructions: bool
    over_fp32: float


@dataclass(frozen=True)
class DoctorDocument(Document):
    """What this machine is: `feedfast doctor`.

    Attributes:
        versions: package → version; None = not there.
        machine: what runs here.
        commit: of the git repository that the working folder lies in; None outside of one.
        dirty: whether tracked files differ from it.
        bf16: on the processor.
        facts: what else was looked at.
        findings: what will be slow or fail here, and what helps; what is broken comes first.
        ok: nothing is broken.
    """

    versions: Mapping[str, str | None]
    machine: Machine
    commit: str | None
    dirty: bool | None
    bf16: Bf16
    facts: Facts
    findings: tuple[Finding, ...]
    ok: bool
