"""The command line: argv → a function of `feedfast.api` → its document.

Progress and messages go to stderr; on stdout stands one JSON document. Exit codes: 0 done, 1 the job or
the check failed, 2 the request was wrong; 130 after Ctrl-C, 143 after SIGTERM, 128 and its number after another signal:
what is under way is finished first, and the same command continues. A scheduler tries again after 1 and not after 2. A
user's mistake gets one message that names the key or path, what was expected and what was found; a traceback here is
always a bug of ours. Functions import their stages as they are called, so that `feedfast --help` is instant.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from feedfast import api, completion
from feedfast.errors import FeedfastError, PeerFailedError, RequestError, printable
from feedfast.recipe import load_recipe
from feedfast.stages.interrupt import interruptible
from feedfast.stages.progress import first_rank


class _Document(Protocol):
    """`feedfast.documents.Document`, which torch comes with."""

    def to_json(self) -> str: ...


_Answer = _Document | str | tuple[_Document, bool]  # and whether all is well; if not, the exit code is 1


def _examples(*lines: str) -> str:
    """The end of a command's help; the first character keeps the lines as they are."""
    return "\b\n" + ("Example:" if len(lines) == 1 else "Examples:") + "".join(f"\n  {line}" for line in lines)


app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Distil from an ensemble of teachers: run them once, then train students from what they said.",
    epilog=_examples(
        "feedfast demo",
        "feedfast recipes ofd-c-cifar100 --out recipe.toml",
        "feedfast cache recipe.toml",
        "feedfast train recipe.toml train.epochs=5 -v",
    ),
)

analyze = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Look into trained networks.",
    epilog=_examples("feedfast analyze reconstruction runs/a runs/b"),
)
app.add_typer(analyze, name="analyze")

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="a TOML recipe")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="override any dotted key of the recipe",
        autocompletion=completion.overrides,
    ),
]
NoCheck = Annotated[
    bool, typer.Option("--no-check", help="go on where the recipe's own method or student could not use the cache")
]

INTERRUPTED = 130  # how typer passes a KeyboardInterrupt on
CONTINUING = {"cache", "train", "chain", "factors", "demo", "copy", "sweep"}


def _home(path: Path | None) -> Path | None:
    """``--out=~/x`` as ``--out ~/x``, which a shell expands."""
    return path and path.expanduser()


@app.callback()
def options(
    verbose: Annotated[int, typer.Option("--verbose", "-v", count=True, help="also debugging messages")] = 0,
    quiet: Annotated[
        int, typer.Option("--quiet", "-q", count=True, help="warnings and errors only; twice: errors")
    ] = 0,
) -> None:
    """Set what the logger ``feedfast`` says on stderr."""
    configure_logging(verbose - quiet)


def configure_logging(level: int = 0) -> None:
    """One handler for the logger ``feedfast``, on stderr: plain lines on a terminal, with date and time elsewhere.

    Args:
        level: 0 is INFO, each step up or down one more or less; of several ranks all but the first say only warnings.
    """
    logger = logging.getLogger("feedfast")
    for handler in [handler for handler in logger.handlers if getattr(handler, "of_the_command_line", False)]:
        logger.removeHandler(handler)
    handler = _ToStderr()
    handler.of_the_command_line = True  # type: ignore[attr-defined]
    handler.setFormatter(_Printable("%(message)s" if sys.stderr.isatty() else "%(asctime)s %(message)s"))
    logger.addHandler(handler)
    logger.propagate = False
    least = logging.INFO if first_rank() else logging.WARNING
    logger.setLevel(min(max(least - 10 * level, logging.DEBUG), logging.ERROR))


class _ToStderr(logging.StreamHandler[Any]):
    """To whatever is stderr at the moment: above a live line of progress, which stands in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class _Printable(logging.Formatter):
    """Lines quote file names, manifests and log lines of strangers: a terminal must not obey them."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _command(group: typer.Typer, *examples: str) -> Callable[[Callable[..., _Answer]], Callable[..., None]]:
    """Make a function a command whose answer is all that stands on stdout, so that it can be piped.

    What others print meanwhile (MLflow the address of a run, a user's network whatever it likes) goes to stderr.
    """

    def register(function: Callable[..., _Answer]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(**options: Any) -> None:
            with contextlib.redirect_stdout(sys.stderr):
                answer = function(**options)
            said, good = answer if isinstance(answer, tuple) else (answer, True)
            print(said if isinstance(said, str) else said.to_json(), flush=True)
            raise typer.Exit(0 if good else 1)

        return group.command(epilog=_examples(*examples))(run)

    return register


def _refuse_lone(overrides: list[str] | None, recipe: Path | None) -> None:
    if recipe is None and overrides:
        raise RequestError(f"{overrides[0]}: expected --recipe, whose key it overrides, found none")


@_command(app, "feedfast demo --out runs/demo")
def demo(
    out: Annotated[Path, typer.Option(callback=_home, help="folder for the cache, the runs and report.html")] = Path(
        "runs/demo"
    ),
    overwrite: Annotated[bool, typer.Option(help="start afresh instead of resuming")] = False,
) -> _Answer:
    """Run the whole pipeline on handwritten digits: teachers, cache, four students, a report. No download, no GPU."""
    return api.demo(out, overwrite=overwrite)


@_command(app, "feedfast plan recipe.toml cache.views=8")
def plan(recipe: RecipeFile, overrides: Overrides = None, no_check: NoCheck = False) -> _Answer:
    """Bytes, time, free disk, break-even and use of a cache, before it is made; exit code 1 if it cannot fit."""
    document = api.plan(recipe, overrides or (), check=not no_check)
    return document, document.fits


@_command(app, "feedfast cache recipe.toml cache.codec=u4", "feedfast cache recipe.toml --print slurm --tasks 16")
def cache(
    recipe: RecipeFile,
    overrides: Overrides = None,
    no_check: NoCheck = False,
    engine: Annotated[
        str | None,
        typer.Option(metavar="ray", help="who runs it: ray = actors of a Ray cluster; default: this process"),
    ] = None,
    workers: Annotated[
        str | None,
        typer.Option(metavar="N|MIN-MAX", help="actors of the engine; default: one per GPU, or per node without GPUs"),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="cache.part; default: the place in a Slurm array or Kubernetes indexed job"),
    ] = None,
    launcher: Annotated[
        str | None,
        typer.Option(
            "--print",
            metavar="slurm|kubernetes|torchrun",
            help="write nothing; print the lines to paste that start a job sized to what is missing",
            autocompletion=completion.one_of("slurm", "kubernetes", "torchrun"),
        ),
    ] = None,
    tasks: Annotated[
        int | None, typer.Option(min=1, max=999_999, help="with --print: at most so many tasks, pods or processes")
    ] = None,
) -> _Answer:
    """Run the teachers once over every view and write the cache; resumes by itself."""
    asked = [*(overrides or ()), *([f"cache.part={part}"] if part else [])]
    if engine not in (None, "ray"):
        raise RequestError(f"--engine: expected ray, found {engine!r}")
    if engine is None and workers is not None:
        raise RequestError(f"--workers: expected --engine ray, whose workers they are, found --workers {workers} alone")
    if launcher is None and tasks is not None:
        raise RequestError(f"--tasks: expected with --print, found {tasks} without; --part i/n does one part of a job")
    if launcher is not None:
        if engine is not None:
            raise RequestError("--print: expected no --engine, which starts its own workers, found --engine ray")
        return _lines(recipe, asked, launcher, tasks, check=not no_check)
    return api.cache(recipe, asked, engine=engine, workers=workers, check=not no_check)


def _lines(path: Path, asked: list[str], launcher: str, tasks: int | None, *, check: bool) -> str:
    from feedfast.stages.launch import run_print

    recipe = load_recipe(path, asked)
    if recipe.cache.part != "auto":
        raise RequestError(
            f"cache.part: expected auto with --print, whose lines divide the job, found {recipe.cache.part}"
        )
    command = ["cache", str(path.expanduser().absolute()), *asked, *([] if check else ["--no-check"])]
    return run_print(recipe, launcher, command, tasks=tasks, check=check)


@_command(app, "feedfast train recipe.toml method.name=ofd train.out=runs/ofd")
def train(recipe: RecipeFile, overrides: Overrides = None) -> _Answer:
    """Train a student from the cache, with live teachers, or plainly (for teachers too); resumes by itself."""
    return api.train(recipe, overrides or ())


@_command(app, "feedfast sweep recipe.toml --set method.name=none,kd,ofd --set seed=0:3 --jobs 2")
def sweep(
    recipe: RecipeFile,
    overrides: Overrides = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=V1,V2,...",
            help="values of a key, or FIRST:STOP; several make a grid",
            autocompletion=completion.overrides,
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, max=1024, help="runs at a time; they share cores and GPUs")] = 1,
    out: Annotated[Path, typer.Option(callback=_home, help="folder of the runs and of compare.html")] = Path(
        "runs/sweep"
    ),
    baseline: Annotated[str | None, typer.Option(help="see feedfast compare")] = None,
    script: Annotated[
        str | None, typer.Option("--print", metavar="slurm", help="print a job array of what is missing, run nothing")
    ] = None,
) -> _Answer:
    """Train every combination of --set over one cache, then compare; resumes by itself, exit code 1 if a run failed."""
    if script is not None:
        from feedfast.stages.sweep import sweep_script

        if script != "slurm":
            raise RequestError(f"--print: expected slurm, found {script!r}")
        return sweep_script(recipe, settings or (), overrides or (), out=out)
    document = api.sweep(recipe, overrides or (), set=settings or (), out=out, jobs=jobs, baseline=baseline)
    return document, not document.failed


@_command(app, "feedfast compare runs/sweep --out runs/compared")
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="folders of runs, or of folders of runs")],
    baseline: Annotated[
        str | None, typer.Option(help="the row that the others are compared with; default: the plain student")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(callback=_home, help="folder for compare.html and compare.csv; none = only the table")
    ] = None,
) -> _Answer:
    """Compare finished runs: mean and deviation over seeds, difference to a baseline with interval, cost, curves."""
    return api.compare(runs, baseline=baseline, out=out)


@_command(app, "feedfast export runs/student --format onnx")
def export(
    run: Annotated[Path, typer.Argument(help="folder of a finished run: train.out")],
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            help="state_dict, safetensors, torch-export or onnx; may be repeated; default: all",
            autocompletion=completion.one_of("state_dict", "safetensors", "torch-export", "onnx"),
        ),
    ] = None,
    branch: Annotated[bool, typer.Option("--branch", help="of a student of branches the best one alone")] = False,
    out: Annotated[Path | None, typer.Option(callback=_home, help="default: export in the run's folder")] = None,
) -> _Answer:
    """Write a trained student as weights and programs for others, each checked on real images."""
    return api.export(run, formats=formats or (), branch=branch, out=out)


@_command(app, "feedfast chain recipe.toml chain.generations=3 method.name=sfeed")
def chain(recipe: RecipeFile, overrides: Overrides = None) -> _Answer:
    """Train generations of students, each taught by the one before, over one cache (sfeed, ban); resumes by itself."""
    return api.chain(recipe, overrides or ())


@_command(app, "feedfast factors recipe.toml method.name=ft")
def factors(recipe: RecipeFile, overrides: Overrides = None) -> _Answer:
    """Train a paraphraser per teacher over the cache's final maps and add its factors as the tap `factor` (ft)."""
    return api.factors(recipe, overrides or ())


@_command(app, "feedfast verify runs/cache.zarr --full --replay 8")
def verify(
    cache: Annotated[str, typer.Argument(help="a cache: a folder, or s3://…, gs://… or az://…")],
    overrides: Overrides = None,
    full: Annotated[bool, typer.Option("--full", help="read every byte and check every checksum")] = False,
    replay: Annotated[int, typer.Option(min=0, help="blocks of pixels decoded again and compared; 0 = none")] = 0,
    teachers: Annotated[
        float, typer.Option(min=0, max=100, help="percent of the rows whose maps are recomputed; 0 = none")
    ] = 0.0,
    recipe: Annotated[Path | None, typer.Option(help="where to find data and weights when they have moved")] = None,
) -> _Answer:
    """Check a cache: log and lengths always; checksums, pixels and maps on request."""
    _refuse_lone(overrides, recipe)
    document = api.verify(cache, overrides or (), full=full, replay=replay, teachers=teachers, recipe=recipe)
    return document, document.ok


@_command(app, "feedfast inspect runs/cache.zarr --out runs/inspected")
def inspect(
    cache: Annotated[str, typer.Argument(help="a cache: a folder, or s3://…, gs://… or az://…")],
    out: Annotated[
        Path | None,
        typer.Option(callback=_home, help="folder for inspect.html with pictures of maps; none = no pictures"),
    ] = None,
) -> _Answer:
    """Show what a cache holds: manifest, sizes, ratios, measured errors, pictures of maps."""
    return api.inspect(cache, out=out)


@_command(app, "feedfast copy runs/cache.zarr s3://bucket/cache.zarr")
def copy(
    source: Annotated[str, typer.Argument(help="a cache: a folder, or s3://…, gs://… or az://…")],
    target: Annotated[str, typer.Argument(help="where to: a folder, or s3://…, gs://… or az://…")],
) -> _Answer:
    """Copy a cache to or from a bucket, or between folders; verified on the way, continues by itself."""
    return api.copy(source, target)


@_command(app, "feedfast taps torchvision/resnet18 --size 64 --classes 10")
def taps(
    model: Annotated[
        str,
        typer.Argument(help="zoo/…, torchvision/…, timm/… or package.module:factory", autocompletion=completion.models),
    ],
    size: Annotated[
        int | None, typer.Option(min=4, max=2048, help="pixels, side of the input; default: the model's own, else 32")
    ] = None,
    classes: Annotated[int, typer.Option(min=1, help="outputs of the classifier")] = 100,
) -> _Answer:
    """List the tappable places of a model: path, shape, bytes, activation, hazards, and which method wants which."""
    return api.taps(model, size=size, classes=classes)


@_command(app, "feedfast doctor", "feedfast doctor --recipe recipe.toml")
def doctor(
    overrides: Overrides = None,
    recipe: Annotated[Path | None, typer.Option(help="whose cache.path the disk's speed is measured at")] = None,
    folder: Annotated[
        Path | None, typer.Option(callback=_home, help="that is measured instead; default: the current one")
    ] = None,
) -> _Answer:
    """What this machine is, and what will be slow or fail here: versions, DALI, GPU, disk; exit code 1 if broken."""
    _refuse_lone(overrides, recipe)
    document = api.doctor(overrides or (), recipe=recipe, folder=folder)
    return document, document.ok


@_command(app, "feedfast methods ofd")
def methods(
    name: Annotated[
        str | None, typer.Argument(help="one method, with its options", autocompletion=completion.methods)
    ] = None,
    overrides: Overrides = None,
    recipe: Annotated[
        Path | None, typer.Option(help="also bytes per sample that a cache of its teachers would store for a method")
    ] = None,
) -> _Answer:
    """List the distillation methods, or one of them: paper, taps it needs, options with their defaults."""
    if name is not None and "=" in name:  # no method: the first override of all methods' recipe
        overrides = [name, *(overrides or ())]
        name = None
    _refuse_lone(overrides, recipe)
    return api.list_methods(name, overrides or (), recipe=recipe)


@_command(app, "feedfast recipes ofd-c-cifar100 --out recipe.toml")
def recipes(
    name: Annotated[
        str | None, typer.Argument(help="one recipe, shown on stderr", autocompletion=completion.recipe_names)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(callback=_home, help="a new file it is copied to, instead of being shown")
    ] = None,
) -> _Answer:
    """List the packaged recipes, one per setting of the papers; show or copy one of them."""
    return api.list_recipes(name, out=out)


@_command(analyze, "feedfast analyze reconstruction runs/a runs/b --epochs 3")
def reconstruction(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="folders of `feedfast train`: train.out")],
    rate: Annotated[float, typer.Option(help="channels of the factors per channel of the map")] = 0.5,
    epochs: Annotated[int, typer.Option(min=1, help="passes over the training images")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="of the paraphrasers' start and of the views")] = 0,
    limit: Annotated[int, typer.Option(min=0, help="training images per epoch; 0 = all")] = 0,
    lr: Annotated[float, typer.Option(help="of the paraphrasers' SGD")] = 0.1,
    out: Annotated[Path, typer.Option(callback=_home, help="folder for reconstruction.html and .json")] = Path(
        "runs/reconstruction"
    ),
) -> _Answer:
    """FEED's analysis: how well a paraphraser of each network's own final maps rebuilds them. A report, no verdict."""
    return api.analyze_reconstruction(runs, rate=rate, epochs=epochs, seed=seed, limit=limit, lr=lr, out=out)


def _speaking_first(words: Sequence[str]) -> list[str]:
    """``train recipe.toml -v`` as ``-v train recipe.toml``: people write either."""
    end = words.index("--") if "--" in words else len(words)
    said = [word for word in words[:end] if re.fullmatch("-[vq]+|--verbose|--quiet", word)]
    return [*said, *(word for word in words[:end] if word not in said), *words[end:]]


def main() -> None:
    """Entry point of the ``feedfast`` command."""
    sys.path.insert(0, "")  # package.module:factory is looked up from the current directory, as `python -m` would
    with interruptible() as ending:
        try:
            app(_speaking_first(sys.argv[1:]), prog_name="feedfast")
        except PeerFailedError:  # another rank has said why, or has been ended as this one
            sys.exit(1 if ending.number is None else ending.exit_code)
        except FeedfastError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(error.exit_code)
        except ModuleNotFoundError as error:
            name = (error.name or "").partition(".")[0]
            if not name or name.startswith("feedfast"):
                raise
            # of an installation without dependencies: DALI, which an extra chooses, and other extras say it themselves
            helps = "pip install 'feedfast[cuda13]' or 'feedfast[cuda12]' brings what feedfast needs (docs/install.md)"
            print(f"error: package {name}: expected to be installed, found none; {helps}", file=sys.stderr)
            sys.exit(2)
        except OSError as error:  # a disk that fills up or vanishes under a file no stage looks after
            print(printable(f"error: {error.filename or 'a file'}: {error.strerror or error}"), file=sys.stderr)
            sys.exit(1)
        except SystemExit as end:
            if end.code != INTERRUPTED:
                raise
            again = "continues" if CONTINUING & set(sys.argv[1:]) else "starts again"
            with contextlib.suppress(OSError):  # the terminal may be what is gone
                if first_rank():
                    print(f"interrupted by {ending.name}; the same command {again}", file=sys.stderr)
            sys.exit(ending.exit_code)
