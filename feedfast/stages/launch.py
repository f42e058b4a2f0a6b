"""The lines that start a caching job past one machine: ``feedfast cache RECIPE --print slurm|kubernetes|torchrun``.

Shards are written independently and logged by their writer, so no engine is needed: a scheduler starts the same command
once per part, and each takes its part from its variables. Printed are as many parts as have work: of the units of rows
that the cache lacks, none where nothing is missing. Whatever the job would refuse is refused here, before a hundred
tasks have waited in a queue for it.

Nothing is written, and nothing is asked of the cluster: partitions, images and volumes are the reader's to fill in.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray

from feedfast.data.dali import require_dali
from feedfast.errors import CacheDamageError, RequestError
from feedfast.recipe import Recipe
from feedfast.stages.agree import refuse_other_tap
from feedfast.stages.data import open_train, view_plan
from feedfast.stages.identity import refuse_differences
from feedfast.stages.pilot import mixing_plan, row_bytes, tap_row_bytes
from feedfast.stages.plan_record import predicted_cache
from feedfast.stages.prepare import Preparation
from feedfast.stages.trainee import method_entries
from feedfast.stages.usable import coming_taps, refuse_unusable
from feedfast.stages.worker import pick_device
from feedfast.storage import names
from feedfast.storage.create import refuse_foreign
from feedfast.storage.layout import block_rows_for, shard_rows_for, unit_rows
from feedfast.storage.manifest import held_manifest
from feedfast.storage.places import place_of
from feedfast.storage.reader import CacheReader
from feedfast.storage.schema import Manifest
from feedfast.storage.store import Place

log = logging.getLogger(__name__)

MOST_TASKS = 1001  # MaxArraySize of Slurm, unless a site has set another
LEAST_LEAD_S = 120  # to finish the shards that are begun, on a machine whose speed nobody has measured
RETRIES = 3  # of what ends with exit code 1
SUM_BYTES = 4  # of a row's checksum: no array has longer shards than that of the smallest rows


@dataclass(frozen=True)
class Launch:
    """What is to be started.

    Attributes:
        command: of ``feedfast``, its arguments.
        cache: the cache's folder, or its bucket with the prefix.
        parts: how many tasks, pods or processes.
        missing: units of rows that the cache lacks.
        units: of all views.
        gpu: whether each is to have one.
        cores: for each.
        lead_s: seconds between SIGTERM and the end.
    """

    command: tuple[str, ...]
    cache: Place
    parts: int
    missing: int
    units: int
    gpu: bool
    cores: int
    lead_s: int

    @property
    def name(self) -> str:
        """Of the job, as Kubernetes takes one."""
        stem = re.sub(r"[^a-z0-9]+", "-", PurePosixPath(self.cache).stem.lower()).strip("-")
        return f"feedfast-{stem}"[:50].rstrip("-")

    @property
    def logs(self) -> Path:
        """A folder next to the cache's; of one in a bucket, in this folder."""
        if isinstance(self.cache, str):
            return Path.cwd() / f"{PurePosixPath(self.cache).name}.logs"
        return self.cache.with_name(f"{self.cache.name}.logs")

    @property
    def said(self) -> str:
        """What the lines do."""
        kind = "part" if self.parts == 1 else "parts"
        return f"{self.cache}: {self.missing:,} of {self.units:,} units of rows are missing, in {self.parts:,} {kind}"


def run_print(
    recipe: Recipe, launcher: str, command: Sequence[str], *, tasks: int | None = None, check: bool = True
) -> str:
    """The lines to paste, or a comment that nothing is missing.

    Args:
        recipe: of the cache.
        launcher: slurm, kubernetes or torchrun.
        command: arguments of ``feedfast`` that cache this recipe.
        tasks: at most so many array tasks, pods or processes; None = 1001, and of torchrun one per GPU of this machine.
        check: refuse what the recipe's own student could not use, as `run_cache` does.

    Raises:
        RequestError, CacheMismatchError: an unknown launcher, or as `run_cache`.
    """
    writers = {"slurm": _slurm, "kubernetes": _kubernetes, "torchrun": _torchrun}
    if launcher not in writers:
        raise RequestError(f"--print: expected slurm, kubernetes or torchrun, found {launcher!r}")
    for key, found in (("cache.path", recipe.cache.path), ("cache.views", recipe.cache.views)):
        if not found:
            raise RequestError(f"{key}: required, found nothing")
    if not recipe.teachers:
        raise RequestError("teachers: expected at least one [[teachers]], found none")
    require_dali()
    path = place_of(recipe.cache.path)
    path = Path(os.path.abspath(path)) if isinstance(path, Path) else path
    device = pick_device(recipe.train.device) if torch.cuda.is_available() else torch.device("cpu")
    missing, units = _missing_units(recipe, device, check=check)
    if not len(missing):
        return f"# {path}: nothing is missing, all {units:,} units of rows are there"
    if tasks is None:
        tasks = max(torch.cuda.device_count(), 1) if launcher == "torchrun" else MOST_TASKS
    launch = Launch(
        command=tuple(command),
        cache=path,
        parts=even_parts(missing, tasks),
        missing=len(missing),
        units=units,
        gpu=recipe.train.device != "cpu",
        cores=recipe.cache.threads + (recipe.data.threads or 6),
        lead_s=_lead_s(predicted_cache(recipe, device), units),
    )
    return "\n".join(writers[launcher](launch))


def even_parts(units: NDArray[np.int64], most: int) -> int:
    """Into how many parts to divide, so that each has some of the missing units; unit u goes to part u modulo parts.

    No more than ``most``, and no more than keep the largest part as small.
    """
    rounds = math.ceil(len(units) / most)
    for parts in range(math.ceil(len(units) / rounds), 1, -1):
        if len(np.unique(units % parts)) == parts:
            return parts
    return 1


def _missing_units(recipe: Recipe, device: torch.device, *, check: bool) -> tuple[NDArray[np.int64], int]:
    """Numbers of the units of rows that lack anything the recipe asks for, counted through all views; and of all."""
    path = place_of(recipe.cache.path)
    refuse_foreign(path)
    data, plan = open_train(recipe), view_plan(recipe.data, recipe.seed)
    job = Preparation(recipe, data, plan, device, (0, 1))
    try:
        held = held_manifest(path)
        entries = method_entries(recipe.method)
        coming = coming_taps(job.teachers, held, entries)
        refuse_unusable(recipe, entries, coming, len(data.classes), check=check)
        if held is None:
            return _units_of_a_new_cache(recipe, job)
        # what decodes where the tasks run need not be here, as on a login node without a GPU
        asked = job.manifest(held, {}).model_copy(update={"decoder": held.decoder})
        refuse_differences(path, asked, held)
        return _units_left(recipe, job, held)
    finally:
        job.loader.close()


def _units_of_a_new_cache(recipe: Recipe, job: Preparation) -> tuple[NDArray[np.int64], int]:
    size = row_bytes(job.teachers.values(), job.codecs, recipe.cache.images, recipe.data.size)
    granule = mixing_plan(job.plan, size).granule
    taps = [(teacher, tap) for teacher in job.teachers.values() for tap in teacher.shapes]
    least = min([SUM_BYTES, *(tap_row_bytes(one.stored(tap), job.codecs.of(one.name, tap)) for one, tap in taps)])
    unit = shard_rows_for(least, block_rows_for(least, granule), int(recipe.cache.shard_mb * 2**20))
    total = math.ceil(len(job.data) / unit) * recipe.cache.views
    return np.arange(total), total


def _units_left(recipe: Recipe, job: Preparation, held: Manifest) -> tuple[NDArray[np.int64], int]:
    path, views = place_of(recipe.cache.path), max(recipe.cache.views, held.views)
    reader = CacheReader(path)
    unit = unit_rows(reader.specs)
    per_view = math.ceil(held.num_rows / unit)
    total = per_view * views
    arrays = [*held.plan.arrays, names.LABEL, names.CONTENT, names.SUMS]
    arrays += [names.PIXELS] if names.PIXELS in reader.specs else []
    for name, teacher in job.teachers.items():
        known = held.teachers[name].taps if name in held.teachers else {}
        if not teacher.shapes.keys() <= known.keys():
            return np.arange(total), total
        for tap in teacher.requests:
            refuse_other_tap(path, teacher, tap, job.codecs.of(name, tap), known[tap])
        arrays += [names.codes(name, tap) for tap in teacher.shapes]
        arrays += [names.scale(name, tap) for tap in teacher.shapes]

    def unit_of(array: str, view: int, shard: int) -> int:
        spec = reader.specs[array]
        return view * per_view + (shard * spec.shard_rows // unit if spec.sharded else 0)

    missing = {unit_of(*place) for place in reader.missing(arrays)} | set(range(held.views * per_view, total))
    if not missing:  # what is logged must also be there; the job would write it again
        try:
            reader.require(arrays, range(held.views))
        except CacheDamageError as error:
            lost = [(found["array"], found["shard"]) for found in error.problems]
            missing = {unit_of(array, *reader.specs[array].locate(key)) for array, key in lost}
    return np.array(sorted(missing), np.int64), total


def _lead_s(predicted: dict[str, float] | None, units: int) -> int:
    """Seconds in which begun shards are finished: two units' by the plan of this recipe, if there is one."""
    if predicted is None:
        return LEAST_LEAD_S
    return max(LEAST_LEAD_S, math.ceil(60 + 2 * predicted["seconds"] / units))


def _shell(words: Sequence[str | Path]) -> str:
    return shlex.join(map(str, words))


def _slurm(launch: Launch) -> list[str]:
    logs, here = shlex.quote(str(launch.logs)), os.getcwd()
    return [
        f"# {launch.said}; for a shell. Add what your site asks for: --partition, --account, --time",
        f"mkdir -p {logs}",
        "sbatch <<'FEEDFAST'",
        "#!/bin/bash",
        f"#SBATCH --job-name={launch.name}",
        f"#SBATCH --array=0-{launch.parts - 1}",
        f'#SBATCH --chdir="{here}"',
        f'#SBATCH --output="{launch.logs}/%A_%a.log"',
        "#SBATCH --open-mode=append",
        f"#SBATCH --cpus-per-task={launch.cores}",
        *(["#SBATCH --gpus-per-node=1"] if launch.gpu else []),
        f"#SBATCH --signal=B:TERM@{launch.lead_s}",
        "#SBATCH --requeue",
        f"# SIGTERM comes {launch.lead_s} s before the time limit: begun shards are finished, and the task",
        f"# queues again. So does what fails with exit code 1, {RETRIES} times; 2 is a wrong request, and ends.",
        f"{_shell([sys.executable, '-m', 'feedfast', *launch.command])} &",
        "job=$!",
        "trap 'kill -TERM \"$job\"' TERM",
        'wait "$job"; code=$?',
        'while kill -0 "$job" 2>/dev/null; do wait "$job"; code=$?; done',
        f'if [ "$code" -eq 143 ] || {{ [ "$code" -ne 0 ] && [ "$code" -ne 2 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt '
        f"{RETRIES} ]; }}; then",
        '    scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        'exit "$code"',
        "FEEDFAST",
    ]


def _kubernetes(launch: Launch) -> list[str]:
    limits = {"cpu": str(launch.cores), **({"nvidia.com/gpu": "1"} if launch.gpu else {})}
    here = json.dumps(os.getcwd())
    command = json.dumps(["feedfast", *launch.command])
    return [
        f"# {launch.said}; for kubectl apply -f",
        "# Yours to fill in: image, claim of the volume with recipe, data and cache, and what your nodes ask for.",
        "# Exit code 2 is a wrong request: the job ends. 1 is tried again. A pod that is evicted does not count.",
        "apiVersion: batch/v1",
        "kind: Job",
        "metadata:",
        f"  name: {launch.name}",
        "spec:",
        "  completionMode: Indexed",
        f"  completions: {launch.parts}",
        f"  parallelism: {launch.parts}",
        f"  backoffLimitPerIndex: {RETRIES}",
        "  podFailurePolicy:",
        "    rules:",
        "      - action: FailJob",
        "        onExitCodes: {containerName: feedfast, operator: In, values: [2]}",
        "      - action: Ignore",
        '        onPodConditions: [{type: DisruptionTarget, status: "True"}]',
        "  template:",
        "    spec:",
        "      restartPolicy: Never",
        f"      terminationGracePeriodSeconds: {launch.lead_s}  # SIGTERM: the shards that are begun are finished",
        "      containers:",
        "        - name: feedfast",
        "          image: IMAGE",
        f"          command: {command}",
        f"          workingDir: {here}",
        "          env:",
        f'            - {{name: JOB_COMPLETIONS, value: "{launch.parts}"}}',
        f"          resources: {{limits: {json.dumps(limits)}}}",
        "          volumeMounts:",
        f"            - {{name: work, mountPath: {here}}}",
        "      volumes:",
        "        - {name: work, persistentVolumeClaim: {claimName: CLAIM}}",
    ]


def _torchrun(launch: Launch) -> list[str]:
    task = _shell([f"--log-dir={launch.logs}", "--tee=3", "-m", "feedfast", *launch.command])
    per_node = f"--nproc-per-node={launch.parts}"
    return [
        f"# {launch.said}, a process each on this machine; --nproc-per-node=gpu starts one per GPU",
        f"torchrun --standalone {per_node} {task}",
        "# on M machines that share the folder, on each:",
        f"# torchrun --nnodes=M {per_node} --rdzv-backend=c10d --rdzv-endpoint=FIRST_HOST:29500 {task}",
    ]
