"""The commands that look at something as functions: verify, inspect, compare, export, taps, methods, recipes, doctor.

Each returns the document of its command. Stages are imported inside the functions: importing this costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from feedfast.api.paths import PathLike, maybe_path, path_of, paths_of, place_text
from feedfast.arguments import Asked, Overrides, RecipeLike, asked
from feedfast.errors import RequestError

if TYPE_CHECKING:
    from feedfast import documents


def verify(
    cache: PathLike,
    overrides: Overrides = (),
    *,
    full: bool = False,
    replay: int = 0,
    teachers: float | Mapping[str, Any] = 0.0,
    percent: float = 5.0,
    recipe: RecipeLike | None = None,
    data: Any = None,
) -> documents.VerifyDocument:
    """Check a cache: log and lengths always; checksums, pixels and maps on request.

    Args:
        cache: its folder, or s3://…, gs://… or az://….
        overrides: of ``recipe``, as of `cache`.
        full: read every byte and check every checksum.
        replay: blocks of pixels that are decoded again and compared; 0 = none.
        teachers: percent of the rows whose maps are recomputed; 0 = none. Or name → network, for a cache that was made
            of networks which were passed.
        percent: of the rows, where ``teachers`` holds networks.
        recipe: where data and weights are, when they have moved; networks and data sets may stand in it, too.
        data: where the training images are, or the Dataset that gives them; None = as the recipe or the cache says.

    Returns:
        The document; ``ok`` and ``problems`` say what was found.

    Example:
        >>> feedfast.verify("runs/c100.zarr", full=True).ok
        True
    """
    known = _optional(recipe, overrides, data=data)
    networks = {**(known.teachers if known else {}), **(teachers if isinstance(teachers, Mapping) else {})}
    from feedfast.documents import VerifyDocument, document_of
    from feedfast.stages.verify import run_verify

    found = run_verify(
        place_text(cache),
        full=full,
        replay=replay,
        teachers_percent=percent if isinstance(teachers, Mapping) else teachers,
        recipe=known.recipe if known else None,
        train=known.train if known else data,
        networks=networks,
    )
    return document_of(VerifyDocument, found)


def inspect(cache: PathLike, *, out: PathLike | None = None) -> documents.InspectDocument:
    """Show what a cache holds: manifest, sizes, ratios, measured errors, pictures of maps.

    Args:
        cache: its folder, or s3://…, gs://… or az://….
        out: folder for ``inspect.html`` with pictures of maps; None = no pictures.

    Example:
        >>> feedfast.inspect("runs/c100.zarr").targets["targets/a/final/codes"].codec
        'u8'
    """
    from feedfast.documents import InspectDocument, document_of
    from feedfast.stages.inspect import run_inspect

    return document_of(InspectDocument, run_inspect(place_text(cache), maybe_path(out)))


def compare(
    runs: PathLike | Sequence[PathLike], *, baseline: str | None = None, out: PathLike | None = None
) -> documents.CompareDocument:
    """Compare finished runs: mean and deviation over seeds, difference to a baseline with its interval, cost.

    Args:
        runs: folders of runs, or of folders of runs.
        baseline: the group that the others are compared with; None = the plain student.
        out: folder for ``compare.html`` and ``compare.csv``; None = none are written.

    Example:
        >>> compared = feedfast.compare(["runs/plain", "runs/pfeed"])
        >>> sorted((group.name, group.baseline) for group in compared.groups)
        [('none', None), ('pfeed', 'none')]
    """
    from feedfast.documents import CompareDocument, document_of
    from feedfast.stages.compare import run_compare

    return document_of(CompareDocument, run_compare(paths_of(runs), maybe_path(out), baseline))


def export(
    run: PathLike,
    *,
    formats: str | Sequence[str] = (),
    branch: bool = False,
    out: PathLike | None = None,
    student: Any = None,
    data: Any = None,
) -> documents.ExportDocument:
    """Write a trained student as weights and programs for others, each checked on real images.

    Args:
        run: folder of a finished run: ``train.out``.
        formats: of "state_dict", "safetensors", "torch-export" and "onnx"; () = all.
        branch: of a student of branches the best one alone.
        out: folder; None = ``export`` in the run's.
        student: the network, of a run whose student was passed as one; the run's weights are loaded into a copy.
        data: of a run whose images were Datasets: these, as of `cache`.

    Example:
        >>> feedfast.export("runs/pfeed", formats="state_dict").files["state_dict"].path
        'runs/pfeed/export/student.pt'
    """
    from feedfast.documents import ExportDocument, document_of
    from feedfast.stages.export import FILES, run_export

    wanted = (formats,) if isinstance(formats, str) else tuple(formats)
    images = data if isinstance(data, Mapping) else {"train": data}
    found = run_export(
        path_of(run),
        maybe_path(out),
        wanted or tuple(FILES),
        branch=branch,
        student=student,
        train=images.get("train"),
        val=images.get("val"),
    )
    return document_of(ExportDocument, found)


def taps(model: Any, *, size: int | None = None, classes: int = 100) -> documents.TapsDocument:
    """List the tappable places of a network: path, shape, bytes, activation, hazards, and which method wants which.

    Args:
        model: zoo/…, torchvision/…, timm/… or package.module:factory; or an `nn.Module`.
        size: pixels, side of the input; None = the model's own, else 32.
        classes: outputs of the classifier.

    Example:
        >>> feedfast.taps("zoo/wrn-16-2").methods["pfeed"]
        ('final=relu:post',)
    """
    from feedfast.documents import TapsDocument, document_of
    from feedfast.stages.inspect import run_taps

    return document_of(TapsDocument, run_taps(model, size, classes))


def doctor(
    overrides: Overrides = (), *, recipe: RecipeLike | None = None, folder: PathLike | None = None
) -> documents.DoctorDocument:
    """What this machine is, the versions that run on it, and what will be slow or fail here.

    Args:
        overrides: ``key=value`` of the recipe.
        recipe: whose ``cache.path`` the disk's speed is measured at.
        folder: that is measured instead; None = the recipe's, or the current one.

    Example:
        >>> feedfast.doctor().machine.cores > 0
        True
    """
    from feedfast.documents import DoctorDocument, document_of
    from feedfast.stages.doctor import run_doctor

    known = _optional(recipe, overrides)
    return document_of(DoctorDocument, run_doctor(known.recipe if known else None, maybe_path(folder)))


def list_methods(
    name: str | None = None, overrides: Overrides = (), *, recipe: RecipeLike | None = None
) -> documents.MethodsDocument | documents.MethodDocument:
    """The distillation methods, or one of them: paper, taps it needs, options. What `feedfast methods` does.

    Args:
        name: one method, with its options; None = all.
        overrides: of ``recipe``, as of `cache`.
        recipe: also bytes per sample that a cache of its teachers would store for a method.

    Example:
        >>> feedfast.list_methods("ofd").needs
        ('ofd*',)
    """
    known = _optional(recipe, overrides)
    from feedfast.documents import MethodDocument, MethodsDocument, document_of
    from feedfast.stages.catalog import run_methods

    found = run_methods(name, known.recipe if known else None, networks=known.teachers if known else {})
    return document_of(MethodsDocument, found) if name is None else document_of(MethodDocument, found)


def list_recipes(
    name: str | None = None, *, out: PathLike | None = None
) -> documents.RecipesDocument | documents.RecipeDocument:
    """The packaged recipes, one per setting of the papers, or one of them. What `feedfast recipes` does.

    Args:
        name: one recipe; None = all.
        out: a new file it is copied to.

    Example:
        >>> feedfast.list_recipes("lp-cifar100").title  # doctest: +ELLIPSIS
        '...'
    """
    from feedfast.documents import RecipeDocument, RecipesDocument, document_of
    from feedfast.stages.catalog import run_recipes

    found = run_recipes(name, maybe_path(out))
    return document_of(RecipesDocument, found) if name is None else document_of(RecipeDocument, found)


def analyze_reconstruction(
    runs: PathLike | Sequence[PathLike],
    *,
    rate: float = 0.5,
    epochs: int = 5,
    seed: int = 0,
    limit: int = 0,
    lr: float = 0.1,
    out: PathLike = "runs/reconstruction",
) -> documents.ReconstructionDocument:
    """FEED's analysis: how well a paraphraser of each network's own final maps rebuilds them. A report, no verdict.

    Args:
        runs: folders of runs.
        rate: channels of the factors per channel of the map.
        epochs: passes over the training images.
        seed: of the paraphrasers' start and of the views.
        limit: training images per epoch; 0 = all.
        lr: of the paraphrasers' SGD.
        out: folder for ``reconstruction.html`` and ``.json``.

    Example:
        >>> found = feedfast.analyze_reconstruction(["runs/plain", "runs/pfeed"], epochs=1, limit=8)
        >>> [run.name for run in found.runs]
        ['plain', 'pfeed']
    """
    from feedfast.documents import ReconstructionDocument, document_of
    from feedfast.stages.analyze import Setting, run_reconstruction

    setting = Setting(rate=rate, epochs=epochs, seed=seed, limit=limit, lr=lr)
    return document_of(ReconstructionDocument, run_reconstruction(paths_of(runs), path_of(out), setting))


def _optional(recipe: RecipeLike | None, overrides: Overrides, **tables: Any) -> Asked | None:
    """The recipe of a function that may do without one."""
    if recipe is None and overrides:
        raise RequestError(f"{next(iter(overrides))}: expected recipe=..., whose key it overrides, found none")
    return None if recipe is None else asked(recipe, overrides, **tables)
