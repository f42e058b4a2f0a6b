"""The recipe: the one typed description of a run, read by both stages.

A recipe is a TOML file (or the same object built in Python). `feedfast cache`, `train` and `plan` read the same
file, so the run that makes the targets and the runs that use them cannot disagree about the data, the plan or the
teachers. `key=value` arguments override any dotted key; a list entry is addressed by its number:
`teachers.0.weights=runs/a/student.pt`. Values are read as TOML where that is possible (`2`, `true`, `[1, 2]`) and
as plain text otherwise.

Every mistake ends in one `RequestError` that names the key, what was expected and what was found. Paths are
relative to the current directory. The recipe knows nothing of torch, DALI or Zarr: validation costs milliseconds,
and only facts that need no data are checked here (whether a path exists is the stage's business).
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    model_validator,
)

from feedfast.errors import RequestError
from feedfast.files import deeper_than, read_file
from feedfast.tap_entry import CodecName, TapEntry
from feedfast.words import MAX_DEPTH, override, read_toml, refuse_odd_values

MAX_RECIPE_BYTES: Final = 1 << 18  # 256 KiB; the longest packaged one has 3

TaskName = Literal["classify", "segment", "detect"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]
Triple = tuple[FiniteFloat, FiniteFloat, FiniteFloat]
Positive = Annotated[FiniteFloat, Field(gt=0)]
Positives = tuple[Positive, Positive, Positive]


def _within_unit(value: tuple[float, float, float]) -> tuple[float, float, float]:
    if not all(0 <= number <= 1 for number in value):
        scaled = ", ".join(f"{number / 255:.4g}" for number in value)
        raise ValueError(f"expected numbers in 0..1; if these are of pixels in 0..255, divided by 255: [{scaled}]")
    return value


Mean = Annotated[Triple, AfterValidator(_within_unit)]
Std = Annotated[Positives, AfterValidator(_within_unit)]


def _home(text: str) -> str:
    """``~`` and ``~user`` at the front as the shell would have them; a shell does not, behind ``key=``."""
    path = os.path.expanduser(text)
    if text.startswith("~") and path == text:
        raise ValueError(
            f"expected a path, {text.partition('/')[0]!r} is nobody's home (./~... is a folder of that name)"
        )
    return path


PathText = Annotated[str, AfterValidator(_home)]
Sources = Annotated[tuple[PathText, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]
Arrays = Annotated[tuple[str, ...], Field(max_length=3)]
LoggerName = Literal["tensorboard", "wandb", "mlflow"]
Loggers = Annotated[
    tuple[LoggerName, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)
]
Tag = Annotated[str, Field(min_length=1, max_length=128)]

_PACKAGED = files("feedfast") / "recipes"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(_Section):
    """Where the images are and how a view of them is drawn."""

    train: Sources = Field(
        min_length=1,
        description="a folder of class folders (or of images); CIFAR's binary file(s), cifar-10-batches-py or .tar.gz; "
        "an .npz; MNIST's folder or …images-idx3-ubyte(.gz); WebDataset's shards (train-{000000..000099}.tar); Arrow "
        'or Parquet files, or the folder of either; "python" = a data set that is passed as an object (docs/python.md)',
    )
    val: Sources = Field(
        (),
        description="the same for validation, with the same classes (of a source with both parts, its test part); "
        "none = no accuracy",
    )
    arrays: Arrays = Field(
        (),
        description="what images and labels are called within the source. An .npz: its arrays, [images, labels, "
        "classes], the last may be left out; tables: columns, [image, label]; tar shards: endings, [jpg, cls], or "
        "json:KEY for a label; none = these",
    )
    val_arrays: Arrays = Field((), description="the same for `val`; none = as `arrays`")
    size: int = Field(32, ge=4, le=2048, description="pixels, side of the square the networks see")
    val_size: int = Field(
        0, ge=0, le=4096, description="the same for validation, for networks that take any size; 0 = as `size`"
    )
    augment: str | tuple[dict[str, Any], ...] = Field(
        "pad-crop-flip",
        description="pad-crop-flip: shifted by up to size // 8 pixels, as on CIFAR; resized-crop-flip: a random part "
        "of the image, resized, as on ImageNet; scale-crop-flip: for masks; expand-crop-flip: for boxes; none: as for "
        "evaluation; a preset, or a list of operations "
        '`{ op = "rand-augment", … }`: docs/augmentations.md has both',
    )
    flip: float = Field(
        0.5, ge=0, le=1, description="probability of a horizontal flip; 0 = never. Presets and lists have their own"
    )
    limit: int = Field(0, ge=0, description="0 = all samples; n = the first n per class")
    fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of each class that is trained on (at least one sample); the same fraction always takes the "
        "same samples, a smaller one some of them. An epoch is a pass over what is left; "
        "`train.steps` makes runs on different fractions equally long",
    )
    mean: Mean | None = Field(
        None, description="per channel in 0..1; default: CIFAR's at 32 px and below, else ImageNet's"
    )
    std: Std | None = Field(None, description="as `mean`")
    check: Literal["fast", "full"] = Field(
        "fast", description="encoded images: headers and end marks, or a complete decode"
    )
    threads: int = Field(0, ge=0, le=1024, description="decoding threads; 0 = one per core")

    @property
    def normalization(self) -> tuple[Triple, Triple]:
        """Per-channel mean and standard deviation, in 0..1 units."""
        small = self.size <= 32
        mean = self.mean or ((0.4914, 0.4824, 0.4467) if small else (0.485, 0.456, 0.406))
        std = self.std or ((0.2471, 0.2435, 0.2616) if small else (0.229, 0.224, 0.225))
        return mean, std


class Cache(_Section):
    """What the offline stage stores, and how."""

    path: PathText = Field(
        "",
        description="folder of the cache, or a bucket with a prefix: s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or "
        'az://CONTAINER/PREFIX (docs/buckets.md); needed by `cache` and by `train.source = "cache"` or `"record"`',
    )
    views: int = Field(
        4,
        ge=0,
        le=65535,
        description="augmentation seeds, used in turn by epoch; 0 = a new one every epoch (live, none)",
    )
    codec: CodecName = Field("u8", description="the stored form of a map's values, of taps that name none of their own")
    compression: Literal["auto", "zstd", "raw"] = Field(
        "auto",
        description="of maps: auto = zstd where it makes the pilot's codes at least 1.15 times smaller, but for those "
        "of which `feedfast plan` of this recipe found that decoding them slows the student down; zstd = always; "
        "raw = never. A tap that is cached already keeps what it has; logits and pixels are raw",
    )
    images: Literal["replay", "stored"] = Field(
        "replay", description="replay: pixels are decoded again; stored: the cache keeps them too, as uint8"
    )
    batch: int = Field(128, ge=1, le=1 << 20, description="teacher batch size in rows; part of the cache's identity")
    pilot: int = Field(2048, ge=16, le=1 << 24, description="samples the codec is fitted on")
    shard_mb: float = Field(32.0, gt=0, le=1024, description="MiB of codes a shard may hold")
    part: str = Field(
        "auto",
        pattern=r"^(auto|[0-9]{1,6}/[0-9]{1,6})$",
        description="i/n: write every n-th unit of 1,024 rows from the i-th; auto: the place in a Slurm array or a "
        "Kubernetes indexed job, else all of them. Ranks of torchrun or srun divide that among themselves",
    )
    threads: int = Field(
        2, ge=1, le=64, description="reading and writing threads; from a bucket as many more read as are needed"
    )
    local: PathText = Field(
        "",
        description="of a cache in a bucket: a folder on a local disk where its objects are kept as they are read; "
        "none = every pass reads from the bucket",
    )
    local_gb: float = Field(
        50.0, gt=0, le=1 << 20, description="GiB that `local` may hold; what was used longest ago goes first"
    )


class Teacher(_Section):
    """A frozen network of the ensemble."""

    name: Name = Field(description="its folder in the cache, and its key in `batch.targets`")
    model: str = Field(description="zoo/…, torchvision/…, timm/… or package.module:factory")
    weights: PathText = Field(
        "",
        description='a weights file (of torch.save or safetensors); "" = the model\'s own pretrained weights',
    )
    key: str = Field(
        "", description="which entry of a weights file, as state_dict_ema; needed where it holds several that fit"
    )
    prefix: str = Field(
        "",
        description="only the entries of a weights file whose names begin with it, as model., are taken, without it; "
        "one that all names have is found by itself",
    )
    classes: int = Field(0, ge=0, le=1 << 20, description="outputs of the model; 0 = the classes of the data set")
    bn: Literal["eval", "batch"] = Field(
        "eval", description="statistics of its batch norms: its own, or those of each batch of `cache.batch` rows"
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast")
    taps: tuple[TapEntry, ...] = Field(
        (), description="what is stored of it, each as text or as a table (below); [] = what the methods need"
    )
    mean: Mean | None = Field(
        None,
        description="what it was trained with, per channel in 0..1; default: its weights' own (timm's, torchvision's "
        "published, or of the run that saved them), else the data's",
    )
    std: Std | None = Field(None, description="as `mean`")
    size: int = Field(
        0,
        ge=0,
        le=2048,
        description="pixels, side of its input; images are resized for it on the device. 0 = its own, for published "
        "weights, those a run saved, and networks of one size; else `data.size`",
    )


class Student(_Section):
    """The network that is trained."""

    model: str = Field("zoo/wrn-16-1", description="zoo/…, torchvision/…, timm/… or package.module:factory")
    weights: PathText | None = Field(
        None,
        description='a weights file to start from, "" = the published ones; none = a random start. A classifier of '
        "another number of classes is left out and starts at random, with a warning",
    )
    key: str = Field("", description="as of a teacher")
    prefix: str = Field("", description="as of a teacher")
    backbone: PathText | None = Field(
        None,
        description='a classifier\'s weights to start the backbone of a dense network from, "" = the published ones',
    )
    branches: int = Field(
        1, ge=1, le=64, description="parallel branches on a shared stem, for method ekd; zoo networks only"
    )


class MethodEntry(BaseModel):
    """One distillation method; every further key is an option of it, checked against its class by the student stage."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = Field("none", description="none, kd, ofd, pfeed, ...; `feedfast methods` lists them")
    weight: float = Field(1.0, ge=0, description="multiplies all its terms; for several methods together")

    @property
    def parameters(self) -> dict[str, Any]:
        """The keys besides ``name`` and ``weight``."""
        return dict(self.model_extra or {})


def _one_or_several(value: Any) -> Any:
    return (value,) if isinstance(value, (dict, MethodEntry)) else value


Methods = Annotated[tuple[MethodEntry, ...], BeforeValidator(_one_or_several)]


class Task(_Section):
    """What is learned, apart from whom it is learned from."""

    name: TaskName = Field(
        "classify", description="classes of images, of pixels, or of boxes; docs/dense.md has the latter two"
    )
    weight: float = Field(1.0, ge=0, description="of the task's own loss, next to the methods' terms")


class Train(_Section):
    """The student stage."""

    source: Literal["cache", "live", "record", "none"] = Field(
        "cache",
        description="where targets come from: the cache; live: teachers that run with the student; record: the same, "
        "and the cache fills as it trains, views that are complete are read (several ranks: `batch` is best a multiple "
        "of ranks x `cache.batch`); or none (plain training)",
    )
    seed: int | None = Field(
        None, ge=0, lt=2**63, description="the student's start, its adapters and dropout; none = the recipe's seed"
    )
    epochs: int = Field(30, ge=1, le=1 << 32, description="passes over the data; each uses the next view")
    steps: int = Field(
        0, ge=0, description="length of the run in steps instead of epochs, e.g. the same for every data.fraction"
    )
    max_steps: int = Field(0, ge=0, description="stop after this many steps; 0 = by epochs alone")
    batch: int = Field(128, ge=1, le=1 << 24, description="global batch, over all ranks")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="for the student and the methods' adapters")
    lr: float = Field(0.1, gt=0, description="the highest learning rate of the run")
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd only")
    nesterov: bool = Field(True, description="sgd with momentum only")
    weight_decay: float = Field(5e-4, ge=0, description="the optimizer's own; of all parameters")
    schedule: Literal["cosine", "step", "one-cycle", "poly", "constant"] = Field(
        "cosine", description="how the learning rate falls, a function of the step alone"
    )
    milestones: tuple[float, ...] = Field((0.5, 0.75), description="step schedule: fractions of the run")
    gamma: float = Field(0.1, gt=0, le=1, description="step schedule: factor at every milestone")
    warmup_epochs: float = Field(
        0.0, ge=0, le=1e9, description="linear rise of the learning rate before the schedule begins"
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast; weights stay fp32")
    channels_last: bool = Field(True, description="memory format of the student and its images")
    compile: bool = Field(False, description="torch.compile the student")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto: CUDA where there is some")
    threads: int = Field(0, ge=0, le=1024, description="torch threads on the CPU; 0 = torch's own choice")
    out: PathText = Field("runs/student", description="folder of the run; a run that lies there is continued")
    replay: int = Field(2, ge=0, description="blocks of pixels checked against the cache before training; 0 = none")
    residency: Literal["auto", "disk", "ram", "gpu"] = Field(
        "auto",
        description="where cached targets come from after the first pass of a view: disk, or memory of the host (ram) "
        "or of the training device (gpu) in which they are held as codes; auto: ram if all that the run reads fits in "
        "half of the memory that is available, else disk. The batches are the same",
    )
    check_teachers: bool = Field(
        True,
        description="build the recipe's teachers once and compare weights, taps and normalization with those of the "
        "cache; false: the cache alone says what they are, on machines that have neither their code nor their weights",
    )
    checkpoint_minutes: float = Field(10.0, ge=0, description="also at the end of every epoch; 0 = only there")
    eval_every: int = Field(1, ge=0, description="epochs between evaluations; 0 = only after the last")
    log_every: int = Field(20, ge=1, description="steps between rows of metrics.jsonl")
    loggers: Loggers | None = Field(
        None,
        description="who is told these rows, too: tensorboard, wandb, mlflow (docs/logging.md); [] = nobody; "
        "none = tensorboard, where it is installed",
    )
    tags: tuple[Tag, ...] = Field(
        (), max_length=64, description="words, or key=value, that wandb and mlflow keep with the run"
    )


class Chain(_Section):
    """Generations of students, each taught by the one before; for `feedfast chain`."""

    generations: int = Field(
        0,
        ge=0,
        le=64,
        description="how many; the first is trained plainly or by the one teacher. Each joins the cache as a teacher "
        "with the taps its method needs, whole and in `cache.codec`",
    )


class Recipe(_Section):
    """A whole run: two keys of its own, and the sections."""

    seed: int = Field(0, ge=0, lt=2**63, description="the view plan's: order, windows, flips")
    overwrite: bool = Field(False, description="start afresh where a result lies, instead of continuing it")
    data: Data = Field(description="the images")
    task: Task = Field(Task(), description="what is learned")
    cache: Cache = Field(Cache(), description="what is stored")
    teachers: tuple[Teacher, ...] = Field((), description="one [[teachers]] per teacher")
    student: Student = Field(Student(), description="the network that is trained")
    method: Methods = Field((MethodEntry(),), min_length=1, description="one [method], or several [[method]] together")
    train: Train = Field(Train(), description="the student stage")
    chain: Chain = Field(Chain(), description="students that teach one another")

    @property
    def train_seed(self) -> int:
        """The seed of the student's start, its adapters and dropout; ``seed`` itself is the view plan's."""
        return self.seed if self.train.seed is None else self.train.seed

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [teacher.name for teacher in self.teachers]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"teachers: every name must be different, found {repeated} more than once")
        taught = [entry.name for entry in self.method if entry.name != "none"]
        if taught and self.train.source != "none" and not self.teachers and not self.chain.generations:
            raise ValueError(f"teachers: method {taught[0]!r} needs at least one [[teachers]], found none")
        index, _, parts = self.cache.part.partition("/")
        if parts and int(index) >= int(parts):
            raise ValueError(f"cache.part: expected i/n with i < n, found {self.cache.part!r}")
        return self


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a TOML recipe and apply ``key=value`` overrides.

    Raises:
        RequestError: the file is missing or not TOML, an override is not ``key=value``, or a key is unknown or has a
            bad value.
    """
    path = Path(path).expanduser()
    return parse_recipe(read_recipe(path), overrides, where=str(path))


def read_recipe(path: Path) -> dict[str, Any]:
    """The tables of a TOML file, not yet looked at.

    Raises:
        RequestError: the file is missing or not TOML.
    """
    try:
        text = read_file(path, MAX_RECIPE_BYTES).decode("utf-8")
    except FileNotFoundError:
        name = path.name.removesuffix(".toml")
        packaged = (
            f"; feedfast recipes {name} --out {name}.toml copies the packaged one" if name in _packaged_names() else ""
        )
        raise RequestError(f"recipe {path}: expected a TOML file, found nothing there{packaged}") from None
    except OSError as error:
        raise RequestError(f"recipe {path}: expected a readable TOML file: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"recipe {path}: expected a TOML file, which is UTF-8: {error}") from None
    try:
        return read_toml(text)
    except ValueError as error:
        raise RequestError(f"recipe {path}: not valid TOML: {error}") from None


def packaged_recipes() -> dict[str, str]:
    """The recipes that come with the package: name → what it is, the first line of the file; by name."""
    return {name: packaged_recipe(name).partition("\n")[0].removeprefix("# ") for name in _packaged_names()}


def packaged_recipe(name: str) -> str:
    """The TOML text of a packaged recipe.

    Raises:
        RequestError: there is none of that name; close names are in the message.
    """
    known = _packaged_names()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(close)}?" if close else "feedfast recipes lists them"
        raise RequestError(f"recipe {name!r}: expected the name of a packaged recipe; {hint}")
    return (_PACKAGED / f"{name}.toml").read_text(encoding="utf-8")


def _packaged_names() -> list[str]:
    # what is asked for is looked up among these, so that ../ and the like lead nowhere
    found = (file.name for file in _PACKAGED.iterdir())
    return sorted(name.removesuffix(".toml") for name in found if name.endswith(".toml"))


def parse_recipe(tree: Mapping[str, Any], overrides: Sequence[str] = (), *, where: str = "recipe") -> Recipe:
    """Validate a nested mapping as a recipe, after applying ``key=value`` overrides (see the module docstring)."""
    if deeper_than(tree, MAX_DEPTH):
        raise RequestError(f"{where}: expected keys and lists at most {MAX_DEPTH} deep, found deeper ones")
    copy: dict[str, Any] = json.loads(json.dumps(tree, default=str))
    for text in overrides:
        override(copy, text)
    refuse_odd_values(copy, where, "")
    try:
        return Recipe.model_validate(copy)
    except ValidationError as error:
        raise RequestError(f"{where}: " + "; ".join(_sentence(item) for item in error.errors())) from None


_SECTIONS: dict[str, type[BaseModel]] = {
    "": Recipe, "data": Data, "task": Task, "cache": Cache, "teachers": Teacher, "taps": TapEntry, "student": Student,
    "method": MethodEntry, "train": Train, "chain": Chain,
}  # fmt: skip


def _sentence(item: Mapping[str, Any]) -> str:
    """One pydantic error as key, expected, found."""
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        section = next((part for part in reversed(item["loc"][:-1]) if part in _SECTIONS), "")
        known = sorted(_SECTIONS[section].model_fields)
        close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(known)}"
        return f"{where}: unknown key{hint}"
    if item["type"] == "missing":
        return f"{where}: required, found nothing"
    message: str = item["msg"].removeprefix("Value error, ")
    if not where:
        return message
    found = repr(item["input"])
    return f"{where}: {message[0].lower()}{message[1:]}, found {found if len(found) <= 200 else found[:200] + '…'}"
