"""Does a recipe agree with the cache it wants to train from? As strictly as when it wants to extend it.

Same images, same view plan, same batches; under each teacher's name the same model, weights and normalization; under
each tap's name the same place in the network, transform and codec. Which place a group such as ``final`` means, only
the network knows, so it is built here, run once on two gray images, and dropped. Weights that a library publishes are
not fetched for that: their name is their identity, and nothing else of them is needed.

``train.check_teachers = false`` says that the cache alone counts, where neither code nor weights of the teachers are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from feedfast import recipe as recipes
from feedfast.data.loader import Loader
from feedfast.data.views import ViewPlan
from feedfast.errors import CacheMismatchError, FeedfastError, RequestError
from feedfast.methods.base import LOGITS, matching
from feedfast.models.build import published_weights
from feedfast.stages.codecs import codecs_of
from feedfast.stages.ensemble import FrozenTeacher, Networks, teacher_from_recipe
from feedfast.stages.identity import decoder_info, plan_info, refuse_differences
from feedfast.stages.probe import Probe, refuse_other_probe
from feedfast.storage.manifest import read_manifest
from feedfast.storage.reader import CacheReader
from feedfast.storage.schema import CodecName, DatasetInfo, TapInfo, TeacherInfo, differences
from feedfast.storage.store import Place


def refuse_other_recipe(
    reader: CacheReader,
    dataset: DatasetInfo,
    plan: ViewPlan,
    recipe: recipes.Recipe,
    needs: Sequence[str],
    networks: Networks | None = None,
) -> None:
    """Raise unless ``reader``'s cache was made from these images, this plan, these teachers and these taps.

    Args:
        reader: the cache.
        dataset: the images, as `dataset_info` describes them.
        plan: their views.
        recipe: what is to be trained; its teachers, codecs and batch.
        needs: selectors of the taps that its methods read.
        networks: of teachers that need not be built.

    Raises:
        RequestError: a teacher cannot be built, or its weights are not where the recipe says.
        CacheMismatchError: with the differing keys in two columns, or the tap that differs.
    """
    found, networks = reader.manifest, networks or {}
    for spec in recipe.teachers:
        published, held = _is_published(spec, networks), found.teachers.get(spec.name)
        if held is not None and held.published not in (None, published):
            expected, there = (("a file", "its library")[value] for value in (published, held.published))
            raise CacheMismatchError(
                f"{reader.path}: teachers.{spec.name}.weights: expected weights of {expected} as the recipe says, "
                f"found those of {there}; mend the recipe, or choose another cache.path"
            )
    unknown = [spec.name for spec in recipe.teachers if spec.name not in found.teachers]
    if unknown:
        raise CacheMismatchError(
            f"{reader.path}: expected teachers {unknown}, found {sorted(found.teachers)}; "
            "run `feedfast cache` with this recipe to add them"
        )
    built = {
        spec.name: _teacher(spec, recipe, needs, found.teachers[spec.name], networks)
        for spec in recipe.teachers
        if recipe.train.check_teachers
    }
    asked: dict[str, Any] = {
        "dataset": dataset,
        "plan": plan_info(plan),
        "num_rows": dataset.count,
        "batch_rows": recipe.cache.batch,
        "teachers": {
            spec.name: _asked(spec, built.get(spec.name), found.teachers[spec.name], recipe.data.size, networks)
            for spec in recipe.teachers
        },
    }
    refuse_differences(reader.path, found.model_copy(update=asked), found)
    codecs = codecs_of(recipe.teachers, recipe.cache.codec)
    for spec in recipe.teachers:
        stored = found.teachers[spec.name].taps
        for tap in matching(needs, stored):
            if tap == LOGITS:  # f16 or f32, by the taps of the recipe that stored them
                continue
            said = {"sample": codecs.share(spec.name, tap)} if spec.taps else {}
            _refuse_other(reader.path, spec.name, stored[tap], {"codec": codecs.of(spec.name, tap), **said})
    for spec in recipe.teachers if recipe.train.check_teachers else ():
        stored, teacher = found.teachers[spec.name].taps, built[spec.name]
        for tap in teacher.requests:
            if tap in stored:
                # A recipe that names no taps says nothing of margins; who reads these maps floors them itself.
                codec = codecs.of(spec.name, tap)
                refuse_other_tap(reader.path, teacher, tap, codec, stored[tap], transform=bool(spec.taps))


def refuse_other_outputs(
    recipe: recipes.Recipe,
    dataset: DatasetInfo,
    loader: Loader,
    teachers: Mapping[str, FrozenTeacher],
    probes: Mapping[str, Probe],
) -> None:
    """Raise if live teachers compute something else than they did for the recipe's own cache, where there is one.

    A cache of other images, another plan or other weights has nothing to say, and is passed over.

    Args:
        recipe: names the cache.
        dataset: the images, as `dataset_info` describes them.
        loader: of the pixels the probes were taken on.
        teachers: by name.
        probes: of each, on the first batch of view 0.

    Raises:
        CacheMismatchError: a teacher has the weights it had, and another output.
    """
    if not recipe.cache.path:
        return
    try:
        found = read_manifest(recipe.cache.path)
    except FeedfastError:
        return
    for name, teacher in teachers.items():
        stored = found.teachers.get(name)
        if stored is None:
            continue
        asked = {
            "dataset": dataset,
            "plan": plan_info(loader.plan),
            "decoder": decoder_info(loader.describe()),
            "batch_rows": loader.batch_size,
            "teachers": {name: stored.model_copy(update=teacher.described(loader.plan.size))},
        }
        if not differences(found.model_copy(update=asked), found):
            refuse_other_probe(name, teacher.precision, stored.probe, probes[name])


def refuse_other_tap(
    path: Place, teacher: FrozenTeacher, tap: str, codec: CodecName, known: TapInfo, *, transform: bool = True
) -> None:
    """Raise unless a teacher's tap is what a cache holds under its name.

    Args:
        path: of the cache.
        teacher: has the tap.
        tap: its name.
        codec: the recipe's for it.
        known: the manifest's entry.
        transform: whether margin and share count.

    Raises:
        CacheMismatchError: the first key that differs.
    """
    request = teacher.requests[tap]
    asked: dict[str, Any] = {"path": request.tap.path, "position": request.tap.position}
    if transform:
        asked |= {"transform": "margin" if request.margin else "none", "sample": request.share}
    asked |= {"codec": codec, "shape": teacher.shapes[tap]}
    _refuse_other(path, teacher.name, known, asked)


def _refuse_other(path: Place, teacher: str, known: TapInfo, asked: dict[str, Any]) -> None:
    for key, value in asked.items():
        found = getattr(known, key)
        if key == "sample" and found is not None:
            found = found.share
        if value != found:
            raise CacheMismatchError(
                f"{path}: targets/{teacher}/{known.name}: {key}: expected {value!r} as the recipe says, "
                f"found {found!r}; choose another tap name or cache.path"
            )


def _is_published(spec: recipes.Teacher, networks: Networks) -> bool:
    """Whether its name is its identity: of a network that was passed, its weights are."""
    return spec.name not in networks and published_weights(spec.model, spec.weights)


def _asked(
    spec: recipes.Teacher, built: FrozenTeacher | None, stored: TeacherInfo, size: int, networks: Networks
) -> TeacherInfo:
    """The manifest's entry of a teacher, with what the recipe says of it; ``size`` is the views'."""
    if built is not None:
        own = built.described(size)
        if _is_published(spec, networks):  # built without them
            del own["weights_sha256"]
    else:
        own = {"model": spec.model, "bn": spec.bn, "precision": spec.precision}
        own |= {key: value for key, value in (("mean", spec.mean), ("std", spec.std)) if value is not None}
        own |= {"size": 0 if spec.size == size else spec.size} if spec.size else {}
    return stored.model_copy(update=own)


def _teacher(
    spec: recipes.Teacher, recipe: recipes.Recipe, needs: Sequence[str], stored: TeacherInfo, networks: Networks
) -> FrozenTeacher:
    """The recipe's teacher on the CPU; of published weights the network without them.

    Raises:
        RequestError: it cannot be built, as when its weights are not there.
    """
    try:
        return teacher_from_recipe(
            spec,
            recipe.data,
            needs,
            classes=stored.num_classes,
            seed=recipe.seed,
            device=torch.device("cpu"),
            task=recipe.task.name,
            without_weights=_is_published(spec, networks),
            network=networks.get(spec.name),
        )
    except RequestError as error:
        raise RequestError(f"{error}; train.check_teachers=false trains from what the cache says alone") from error
