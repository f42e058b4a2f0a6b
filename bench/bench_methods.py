"""Which method helps, and by how much: students of every method from one cache, several seeds each, against plain ones.

All students see the same views of the same images in the same order and take the same number of steps; the plain ones
too, so what is compared is the method and nothing else. A seed is a student's start (and its adapters'); differences to
plain are taken seed by seed, and their interval is Student's t at 95 % over the seeds.

    python bench/bench_methods.py DATA [--out runs/methods] [--limit 100] [--views 4] [--epochs 12] [--seeds 3]
    python bench/bench_methods.py DATA --curves       accuracy against the number of views and against the codec
    python bench/bench_methods.py DATA --augments     students of stronger views: --views stored ones, or all new
    python bench/bench_methods.py DATA --steps        step over plain, targets in RAM, variants alternating
    python bench/bench_methods.py DATA --summary      no run, only the tables and plots of what there is

DATA is a folder with CIFAR-100's train.bin and test.bin. The setting of the papers is the same command with --limit 0
--epochs 200 --teacher-epochs 200 on a GPU. Whatever is interrupted continues: every part is a stage that resumes, and
one line per student is added to bench/results_methods.csv when it ends; `error` is what the codec loses of the maps the
student reads, as the cache's manifest has it. The last stdout line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import paired
import plot_students
from paired import Row, environment, record, relative_error

from feedfast.cli import configure_logging
from feedfast.data.batch import Batch
from feedfast.methods import METHODS
from feedfast.recipe import Recipe, parse_recipe
from feedfast.report.compare import print_table
from feedfast.stages.chain import chain_recipes
from feedfast.stages.compare import bytes_per_sample
from feedfast.stages.demo import write_digits
from feedfast.stages.folder import ensure_dir
from feedfast.stages.offline import run_cache
from feedfast.stages.student import StudentRun, run_train
from feedfast.stages.worker import Worker
from feedfast.storage.manifest import read_manifest
from feedfast.storage.schema import CodecName

log = logging.getLogger("feedfast.bench")

RESULTS = Path(__file__).with_name("results_methods.csv")
COLUMNS = (
    "date", "commit", "device", "torch", "images", "epochs", "batch", "augment", "variant", "views", "codec", "seed",
    "accuracy", "loss", "bytes_per_sample", "parameters", "teacher_accuracy", "error",
)  # fmt: skip
TAPS = ["final", "ofd", "stage"]
SETTING = ("device", "images", "epochs", "batch")
STUDENT = ("augment", "variant", "views", "codec", "seed")
CHAINS = ("sfeed", "ban")
GENERATIONS = 3

# variant → recipe words; a variant is a method with its defaults unless it says more
SAMPLED: dict[str, dict[str, Any]] = {
    f"ofd-1@{share}": {"name": "ofd", "teachers": 1, "share": share} for share in (0.5, 0.25, 0.125)
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"name": "none"},
    **{name: {"name": name} for name in METHODS if name != "none"},
    "kd-1": {"name": "kd", "teachers": 1},
    "pfeed-1": {"name": "pfeed", "teachers": 1},
    "ofd-1": {"name": "ofd", "teachers": 1},
    "fitnet-1stage": {"name": "fitnet", "stages": 1},
    "ofd-batch": {"name": "ofd", "bn": "batch"},  # teachers on batch statistics, as the authors run theirs
}
# run where they are named: answers to what a default did
TRIED: dict[str, dict[str, Any]] = {
    "ofd-alpha3e-3": {"name": "ofd", "alpha": 3e-3},
    "ofd-1-alpha3e-3": {"name": "ofd", "alpha": 3e-3, "teachers": 1},
    "ab-labels": {"name": "ab", "second": "task"},
    "ab-one-stage": {"name": "ab", "first_share": 0.0},
}
BRANCHES = {"ekd": 3}
CURVES = ("plain", "kd", "pfeed", "ofd")
VIEWS = (1, 2, 4, 8)  # and as many as epochs: what live teachers see, cached once for all of these students
CODECS = get_args(CodecName)
# CIFAR's crop and flip, and what is added to it
BASE: list[dict[str, Any]] = [{"op": "pad-crop", "pad": 4}, {"op": "flip"}]
AUGMENTS: dict[str, Any] = {
    "crop-flip": "pad-crop-flip",
    "rand-augment": [*BASE, {"op": "rand-augment"}, {"op": "random-erasing", "p": 0.25}],
    "mixup": [*BASE, {"op": "mixup", "alpha": 0.2}],
}


def tree_of(args: argparse.Namespace) -> dict[str, Any]:
    """Data, teachers and training as every student has them."""
    out = Path(args.out)
    data = {"train": str(args.data / "train.bin"), "val": str(args.data / "test.bin"), "limit": args.limit}
    if args.tiny:
        train, val = write_digits(ensure_dir(out, "--out"))
        data = {"train": str(train), "val": str(val), "size": 16, "limit": args.limit}
    return {
        "seed": 0,
        "data": data,
        "cache": {"views": args.views, "batch": 128, "codec": "u8", "path": str(out / f"cache-{args.limit}.zarr")},
        "teachers": [
            {
                "name": f"teacher-{number}",
                "model": "zoo/wrn-10-1" if args.tiny else "zoo/wrn-16-2",
                "weights": str(out / f"teacher-{number}" / "student.pt"),
                "precision": "bf16",
                "taps": args.taps,
            }
            for number in (1, 2, 3)
        ],
        "student": {"model": "zoo/wrn-10-1" if args.tiny else "zoo/wrn-16-1"},
        "train": {
            "epochs": args.epochs,
            "batch": args.batch,
            "lr": 0.1,
            "schedule": "one-cycle",
            "precision": "bf16",
            "eval_every": 0,
            "threads": args.threads,
            "replay": 0,
        },
    }


def train_teachers(args: argparse.Namespace, tree: dict[str, Any]) -> list[float]:
    """Three WRN-16-2 on all images; their accuracies."""
    found = []
    for number in (1, 2, 3):
        recipe = parse_recipe(
            {
                "seed": number,
                "data": {**tree["data"], "limit": 0},
                "cache": {"views": 0},
                "student": {"model": tree["teachers"][0]["model"]},
                "train": {
                    "source": "none", "epochs": args.teacher_epochs, "batch": 32 if args.tiny else 128, "lr": 0.2,
                    "schedule": "one-cycle", "precision": "bf16", "eval_every": 5,
                    "out": str(Path(args.out) / f"teacher-{number}"),
                },
            }
        )  # fmt: skip
        found.append(finished(recipe)["val_accuracy"])
    return found


def finished(recipe: Recipe) -> dict[str, Any]:
    """The result of a run, from its folder if it has ended there."""
    held = Path(recipe.train.out) / "result.json"
    if held.is_file():
        found: dict[str, Any] = json.loads(held.read_bytes())
        if found.get("val_accuracy") is not None:
            return found
    return run_train(recipe)


def cache_of(tree: dict[str, Any], codec: str, views: int) -> dict[str, Any]:
    """The section of a codec's cache: each has a folder of its own, the tree's that of u8."""
    path = tree["cache"]["path"]
    own = path if codec == tree["cache"]["codec"] else path.replace(".zarr", f"-{codec}.zarr")
    return {**tree["cache"], "codec": codec, "views": views, "path": own}


def augmented(tree: dict[str, Any], augment: str) -> dict[str, Any]:
    """The tree with other views; each has a cache of its own."""
    if augment == "crop-flip":
        return tree
    path = tree["cache"]["path"].replace(".zarr", f"-{augment}.zarr")
    return {**tree, "data": {**tree["data"], "augment": AUGMENTS[augment]}, "cache": {**tree["cache"], "path": path}}


def with_method(tree: dict[str, Any], words: dict[str, Any], teachers: list[dict[str, Any]]) -> dict[str, Any]:
    """The tree with a method, the teachers it learns from, and the student and source it needs."""
    plain = words["name"] == "none"
    student = {**tree["student"], "branches": BRANCHES.get(words["name"], 1)}
    train = {**tree["train"], "source": "none" if plain else "cache"}
    return {**tree, "method": words, "teachers": [] if plain else teachers, "student": student, "train": train}


def variant_recipe(tree: dict[str, Any], variant: str, seed: int, *, views: int, codec: str, folder: Path) -> Recipe:
    """One student: a variant at a seed, from so many views of a codec."""
    words = dict({**VARIANTS, **SAMPLED, **TRIED}[variant])
    teachers = tree["teachers"][: words.pop("teachers", 3)]
    if share := words.pop("share", None):  # stored next to the whole maps, as if by other teachers
        taps = [f"ofd@{share}"]
        teachers = [{**entry, "name": f"{entry['name']}-{share}", "taps": taps} for entry in teachers]
    if bn := words.pop("bn", None):
        teachers = [{**entry, "name": f"{entry['name']}-{bn}", "bn": bn, "taps": ["ofd"]} for entry in teachers]
    sections = with_method(tree, words, teachers)
    out = folder / f"{variant}-{codec}-{views}" / str(seed)
    sections["train"] |= {"seed": seed, "out": str(out)}
    if views:
        sections["cache"] = cache_of(tree, codec, views)
    else:  # a new one every epoch, which no cache has
        sections["cache"] = {"views": 0, "batch": tree["cache"]["batch"]}
        if words["name"] != "none":
            sections["train"]["source"] = "live"
    if words["name"] in CHAINS:
        # generation 1 is the plain student of the same seed in length and data, so the chain adds what it teaches
        sections |= {"teachers": [], "chain": {"generations": GENERATIONS}}
        sections["cache"] = {**sections["cache"], "path": str(out / "chain.zarr")}
    return parse_recipe(sections)


def train_student(recipe: Recipe) -> dict[str, Any]:
    """One student; of a chain the last generation."""
    if not recipe.chain.generations:
        if recipe.train.source == "cache":
            held = read_manifest(Path(recipe.cache.path)).teachers
            if any(teacher.name not in held for teacher in recipe.teachers):
                run_cache(recipe)
        return finished(recipe)
    result: dict[str, Any] = {}
    for link in chain_recipes(recipe):
        if link.teachers and not (Path(link.train.out) / "result.json").is_file():
            run_cache(link)
        result = finished(link)
    return result


def settings_of(path: Path) -> dict[tuple[str, ...], list[Row]]:
    """The lines by setting, of each student the last."""
    return paired.settings_of(path, SETTING, STUDENT)


def run_variants(
    args: argparse.Namespace, tree: dict[str, Any], jobs: list[tuple[str, str, int, str]], images: int, teachers: float
) -> None:
    """Every job (augmentation, variant, views, codec) at every seed, seed by seed: what is cut off has whole seeds.

    ``teachers``: their mean accuracy, for the rows.
    """
    where = environment()
    here = settings_of(args.results).get((where["device"], str(images), str(args.epochs), str(args.batch)), [])
    done = {(row["augment"], row["variant"], int(row["views"]), row["codec"], int(row["seed"])) for row in here}
    for seed in range(1, args.seeds + 1):
        for augment, variant, views, codec in jobs:
            if (augment, variant, views, codec, seed) in done or time.monotonic() > args.until:
                continue
            folder = Path(args.out) / ("" if augment == "crop-flip" else augment)
            own = augmented(tree, augment)
            recipe = variant_recipe(own, variant, seed, views=views, codec=codec, folder=folder)
            log.info("bench: %s, %s, seed %d, %d views, %s", augment, variant, seed, views, codec)
            result = train_student(recipe)
            record(
                {
                    **where,
                    "images": images,
                    "epochs": args.epochs,
                    "batch": args.batch,
                    "augment": augment,
                    "variant": variant,
                    "views": views,
                    "codec": codec,
                    "seed": seed,
                    "accuracy": result["val_accuracy"],
                    "loss": result["final_loss"],
                    "bytes_per_sample": bytes_per_sample(recipe),
                    "parameters": result["parameters"],
                    "teacher_accuracy": teachers,
                    "error": relative_error(recipe),
                },
                COLUMNS,
                args.results,
            )


def summarize(rows: list[Row], key: tuple[str, ...]) -> list[dict[str, Any]]:
    """Mean, deviation and paired difference to plain of every group of rows."""
    pair = ("augment", "views", "seed")
    return paired.summarize(rows, key, value="accuracy", pair=pair, baseline=lambda row: row["variant"] == "plain")


def show(title: str, table: list[dict[str, Any]], key: tuple[str, ...]) -> None:
    """The table for people, in percent."""
    lines = [
        {
            **{name: line[name] for name in key},
            "seeds": line["seeds"],
            "accuracy": f"{line['mean']:.2%} ± {line['deviation']:.2%}",
            "over plain (95 %)": f"{100 * line['over_plain']:+.2f} ± {100 * line['half_interval']:.2f}",
            "bytes per sample": f"{line['bytes_per_sample']:,.0f}" if line["bytes_per_sample"] else "",
        }
        for line in table
    ]
    if lines:
        print_table(title, lines)


def held_batches(run: StudentRun, count: int) -> list[Batch]:
    """The first batches of an epoch, kept."""
    batches: Iterator[Batch] = run.loop.batches(0)
    return [batch for batch, _ in zip(batches, range(count), strict=False)]


def bench_steps(args: argparse.Namespace, tree: dict[str, Any], variants: list[str]) -> dict[str, str]:
    """Step of every variant over the plain step, pixels and targets in RAM: median of rounds (lowest to highest)."""
    found: dict[str, str] = {}
    plain = StudentRun(step_recipe(args, tree, "plain"), Worker())
    images = held_batches(plain, 4)
    for variant in variants:
        run = StudentRun(step_recipe(args, tree, variant), Worker())
        batches = held_batches(run, 4)
        ratios = []
        for number in range(args.rounds + 1):
            spent = []
            for trainer, held in ((plain.trainer, images), (run.trainer, batches)):
                begin = time.perf_counter()
                for step, batch in enumerate(held):
                    float(trainer.step(step, batch)["loss"])
                spent.append(time.perf_counter() - begin)
            if number:  # the first round warms up
                ratios.append(spent[1] / spent[0])
        run.close()
        found[variant] = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"
        log.info("bench: step of %s over plain: %s", variant, found[variant])
    plain.close()
    return found


def step_recipe(args: argparse.Namespace, tree: dict[str, Any], variant: str) -> Recipe:
    """A variant for timing: in a folder of its own, a chain's method with one teacher of the cache."""
    everything = {**VARIANTS, **TRIED}[variant]
    words = {key: value for key, value in everything.items() if key not in ("bn", "teachers")}
    count = 1 if words["name"] in CHAINS else everything.get("teachers", 3)
    sections = with_method(tree, words, tree["teachers"][:count])
    sections["train"] |= {"out": str(Path(args.out) / "steps" / variant)}
    return parse_recipe(sections)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What may be asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, nargs="?", default=Path("data"))
    parser.add_argument("--tiny", action="store_true", help="digits and tiny networks: does it run?")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", default="runs/methods")
    parser.add_argument("--limit", type=int, default=100, help="images per class; 0 = all")
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=128, help="of the students")
    parser.add_argument("--teacher-epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="*", default=list(VARIANTS), choices=[*VARIANTS, *TRIED])
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no student after so long")
    parser.add_argument("--taps", nargs="*", default=TAPS, help="what the cache holds; more can be added later")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--curves", action="store_true")
    parser.add_argument("--augments", nargs="*", choices=list(AUGMENTS), help="which; none named = all")
    parser.add_argument("--live", action="store_true", help="curves with live teachers only: do they agree?")
    parser.add_argument("--steps", action="store_true")
    parser.add_argument("--summary", action="store_true")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """See the module."""
    args = arguments(argv)
    args.batch = 32 if args.tiny else args.batch
    configure_logging()
    args.until = time.monotonic() + args.minutes * 60
    tree = tree_of(args)
    images = args.limit * (10 if args.tiny else 100) or 50_000
    document: dict[str, Any] = {}
    if not args.summary:
        teachers = statistics.mean(train_teachers(args, tree))
        asked = args.augments or list(AUGMENTS)
        most = max(*VIEWS, args.epochs) if args.curves else args.views
        codecs = CODECS if args.curves and not args.live else ("u8",)
        for codec in codecs if args.augments is None else ():
            run_cache(parse_recipe({**tree, "cache": cache_of(tree, codec, most if codec == "u8" else args.views)}))
        if args.steps:
            document["step_over_plain"] = bench_steps(args, tree, [name for name in args.methods if name != "plain"])
        else:
            jobs = [("crop-flip", name, args.views, "u8") for name in args.methods]
            if args.curves:
                counts = [0] if args.live else list(dict.fromkeys([args.views, *VIEWS, args.epochs]))
                jobs = [("crop-flip", variant, number, "u8") for number in counts for variant in CURVES]
                jobs += [("crop-flip", variant, args.views, codec) for codec in codecs for variant in CURVES[1:]]
            if args.augments is not None:
                both = (args.views, args.epochs)
                jobs = [(name, variant, number, "u8") for name in asked for variant in CURVES for number in both]
                for name in asked:
                    run_cache(parse_recipe(augmented({**tree, "cache": cache_of(tree, "u8", args.epochs)}, name)))
            run_variants(args, tree, list(dict.fromkeys(jobs)), images, teachers)
    document["settings"] = []
    for setting, rows in settings_of(args.results).items():
        found: dict[str, Any] = dict(zip(SETTING, setting, strict=True))
        words = f"{found['images']} images, {found['epochs']} epochs, batches of {found['batch']}, {found['device']}"
        everything, rows = rows, [row for row in rows if row["augment"] == "crop-flip"]
        usual = [row for row in rows if (row["views"], row["codec"]) == (str(args.views), "u8")]
        found["methods"] = summarize(usual, ("variant",))
        show(f"students of every method: {words}", found["methods"], ("variant",))
        curves = [row for row in rows if row["variant"] in CURVES]
        if len({(row["views"], row["codec"]) for row in curves}) > 1:
            found["curves"] = summarize(curves, ("variant", "views", "codec"))
            show(f"views and codecs: {words}", found["curves"], ("variant", "views", "codec"))
            slug = "-".join(setting).lower().replace(" ", "-")
            found["plots"] = plot_students.curves(
                curves, CURVES, CODECS, args.results.with_name(f"methods_curves-{slug}.svg")
            )
            found["codecs"] = plot_students.codec_points(curves, CURVES[1:], CODECS, str(args.views))
            if len({point["codec"] for point in found["codecs"]}) > 1:
                plain = [float(row["accuracy"]) for row in usual if row["variant"] == "plain"]
                picture = args.results.with_name(f"methods_codecs-{slug}.svg")
                found["plots"] += plot_students.codecs(found["codecs"], plain, picture)
        stronger = [row for row in everything if row["variant"] in CURVES and row["codec"] == "u8"]
        stronger = [row for row in stronger if row["views"] in (str(args.views), row["epochs"], "0")]
        if len({row["augment"] for row in stronger}) > 1:
            found["augments"] = summarize(stronger, ("augment", "variant", "views"))
            show(f"stronger views: {words}", found["augments"], ("augment", "variant", "views"))
        document["settings"].append(found)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
