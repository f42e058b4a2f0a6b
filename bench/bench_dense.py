"""Does a teacher help a student that segments or detects, and is a cached teacher as good as a live one?

CamVid (SegNet's 11 classes): DeepLabV3+ students on its masks, judged by mIoU at the images' own resolution, and SSD
students on boxes of cars, pedestrians and bicyclists that `tools/boxes_of_masks.py` derives from the masks, judged by
AP50. Nothing published is fetched here: segmenters start at random, detectors from the backbone of one of them
(``--pretrain``), without which they learn next to nothing from so few boxes. The teacher is a larger network of the
same family, trained longer and on all images. All students of a seed start from the same weights and see the same
views in the same order; plain ones too. A live teacher sees the cached views (``live``) or a new one every epoch
(``fresh``).

    python bench/bench_dense.py DATA/camvid [--task segment detect] [--seeds 3] [--out runs/dense]
    python bench/bench_dense.py DATA/camvid --methods ofd-1e-3 ofd-1e-4 --sources cache --seeds 1 --epochs 8   a search
    python bench/bench_dense.py --summary       no run, only the tables of what there is
    python bench/bench_dense.py --overfit DATA/coco128/train.json   six photographs by heart: does a detector learn?
    python bench/bench_dense.py --tiny          scenes of squares and bars: does it run?

Whatever is interrupted continues: every part is a stage that resumes, and one line per student is added to
bench/results_dense.csv when it ends. The last stdout line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import runpy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import paired
from paired import Row, environment, record
from PIL import Image

from feedfast.cli import configure_logging
from feedfast.methods import METHODS
from feedfast.recipe import Recipe, parse_recipe
from feedfast.report.compare import print_table
from feedfast.stages.compare import bytes_per_sample
from feedfast.stages.data import open_train
from feedfast.stages.offline import run_cache
from feedfast.stages.student import run_train
from feedfast.storage.schema import CodecName

log = logging.getLogger("feedfast.bench")

RESULTS = Path(__file__).with_name("results_dense.csv")
BOXES_OF_MASKS = Path(__file__).parents[1] / "tools" / "boxes_of_masks.py"
COLUMNS = (
    "date", "commit", "device", "torch", "task", "images", "size", "epochs", "batch", "lr", "teacher", "student",
    "teacher_epochs", "pretrain", "variant", "source", "views", "codec", "seed", "score", "metrics", "loss",
    "bytes_per_sample", "parameters", "teacher_score", "seconds",
)  # fmt: skip
SETTING = (
    "device",
    "task",
    "images",
    "size",
    "epochs",
    "batch",
    "lr",
    "teacher",
    "student",
    "teacher_epochs",
    "pretrain",
)
STUDENT = ("variant", "source", "views", "codec", "seed")
SCORE = {"segment": "miou", "detect": "ap50"}
NETWORKS = {  # teacher, student
    "segment": ("zoo/deeplabv3plus-resnet50", "zoo/deeplabv3plus-resnet18"),
    "detect": ("zoo/ssd300-resnet50", "zoo/ssd300-resnet18"),
}
# SSD's views without its canvas: at these sizes a CamVid car has few pixels already
NO_CANVAS = [{"op": "expand-crop", "expand_p": 0.0}, {"op": "flip"}, {"op": "photometric-distort"}]
DEFAULTS: dict[str, dict[str, Any]] = {
    "segment": {"size": 160, "lr": 0.05, "methods": ("plain", "ofd", "kd", "cwd"), "augment": "scale-crop-flip"},
    "detect": {"size": 160, "lr": 1e-3, "methods": ("plain", "ofd"), "augment": NO_CANVAS},
}
OPTIMIZER = {"segment": "sgd", "detect": "adamw"}
BATCH = 8
# The authors use 1e-5 next to a cross-entropy that is divided by the batch once more; here it is not.
ALPHA = {"segment": 1e-5 * BATCH, "detect": 1e-5 * BATCH}
BOXED = ("Car", "Pedestrian", "Bicyclist")
# Of a box's object, and of the squares that images are cut into: at 160 pixels SSD's smallest default box has 11, and
# objects of whole images would have 5.
LEAST_PIXELS, TILE = 400, 160
PRETRAIN_SIZE = 128
GROUPS = {"ofd*": "ofd+margin", "stage*": "stage", "final": "final", "logits": "logits"}
TINY_CLASSES = ("Ground", "Square", "Bar")


def words_of(variant: str, task: str) -> dict[str, Any]:
    """Recipe words of a variant: a method, perhaps with its alpha (``ofd-1e-3``) or with a share (``ofd@0.25``)."""
    name, _, alpha = variant.partition("@")[0].partition("-")
    if name == "plain":
        return {"name": "none"}
    words: dict[str, Any] = {"name": name}
    if alpha or name == "ofd":
        words["alpha"] = float(alpha) if alpha else ALPHA[task]
    return words


def taps_of(variants: Sequence[str]) -> list[str]:
    """Groups of taps that some variants read."""
    needs = {need for variant in variants for need in METHODS[words_of(variant, "segment")["name"]].needs}
    return [group for need, group in GROUPS.items() if need in needs]


def write_scenes(folder: Path) -> None:
    """Twelve scenes for training and four to judge by: squares and bars on noise, with masks and names."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classes.txt").write_text("\n".join(TINY_CLASSES) + "\n")
    for split, count in (("train", 12), ("val", 4)):
        for part in ("images", "masks"):
            (folder / split / part).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            image, mask = rng.integers(90, 130, (72, 96, 3)).astype(np.uint8), np.zeros((72, 96), np.uint8)
            for kind, (height, width), color in ((1, (24, 24), (220, 40, 40)), (2, (12, 36), (40, 200, 60))):
                # each in its half, so that neither hides the other
                top, left = int(rng.integers(0, 72 - height)), int(rng.integers(0, 48 - width)) + 48 * (kind - 1)
                window = np.s_[top : top + height, left : left + width]
                image[window], mask[window] = color, kind
            Image.fromarray(image).save(folder / split / "images" / f"{number:02d}.png")
            Image.fromarray(mask).save(folder / split / "masks" / f"{number:02d}.png")


def sources_of(args: argparse.Namespace, task: str) -> tuple[str, str]:
    """What ``data.train`` and ``data.val`` are; boxes are derived from masks where they are wanted."""
    if task == "segment":
        return str(args.data / "train"), str(args.data / "val")
    found = []
    for split in ("train", "val"):
        out = Path(args.out) / "boxes" / f"{split}.json"
        names = TINY_CLASSES[1:] if args.tiny else BOXED
        words = [str(args.data / split), "--classes", str(args.data / "classes.txt"), "--of", *names, "--out", str(out)]
        words += ["--least", str(LEAST_PIXELS), *([] if args.tiny else ["--tiles", str(TILE)])]
        if runpy.run_path(str(BOXES_OF_MASKS))["main"](words):
            raise SystemExit(2)
        found.append(str(out))
    return found[0], found[1]


def tree_of(args: argparse.Namespace, task: str) -> dict[str, Any]:
    """Data, teacher, student and training as every student of a task has them."""
    out, own = Path(args.out) / task, DEFAULTS[task]
    train, val = sources_of(args, task)
    size = args.size or (64 if args.tiny else own["size"])
    teacher, student = ((NETWORKS[task][1],) * 2) if args.tiny else NETWORKS[task]
    teacher, student = args.teacher or teacher, args.student or student
    data = {"train": train, "val": val, "size": size, "augment": own["augment"], "limit": args.limit}
    # a teacher is named by what made it, so that another setting in the same folder has another
    trained = out / f"teacher-{teacher.partition('/')[2]}-{size}-{args.teacher_epochs}"
    return {
        "seed": 0,
        "task": {"name": task},
        "data": {**data, "fraction": args.fraction},
        "cache": {
            "views": args.views,
            "batch": BATCH,
            "codec": args.codec,
            "path": str(out / f"cache-{trained.name}-{args.limit}-{args.fraction:g}-{args.views}-{args.codec}.zarr"),
        },
        "teachers": [
            {
                "name": "teacher",
                "model": teacher,
                "weights": str(trained / "student.pt"),
                "precision": "bf16",
                "taps": taps_of(args.methods or own["methods"]),
            }
        ],
        "student": {"model": student},
        "starts": ({}, {}),  # of teacher and student
        "train": {
            "epochs": args.epochs,
            "batch": BATCH,
            "optimizer": OPTIMIZER[task],
            "lr": args.lr or own["lr"],
            "schedule": "one-cycle",
            "precision": "bf16",
            "eval_every": 0,
            "threads": args.threads,
            "replay": 0,
        },
    }


def finished(recipe: Recipe) -> dict[str, Any]:
    """The result of a run, from its folder if it has ended there."""
    held = Path(recipe.train.out) / "result.json"
    if held.is_file():
        found: dict[str, Any] = json.loads(held.read_bytes())
        if found.get(f"val_{SCORE[recipe.task.name]}") is not None:
            return found
    return run_train(recipe)


def pretrained(args: argparse.Namespace, model: str) -> dict[str, str]:
    """Student words for a detector: the backbone of a DeepLabV3+ of its ResNet, trained on the masks for a while."""
    if not args.pretrain:
        return {}
    network = f"zoo/deeplabv3plus-{model.rpartition('-')[2]}"
    out = Path(args.out) / "backbones" / f"{network.partition('/')[2]}-{args.pretrain}"
    tree, train = tree_of(args, "segment"), {"source": "none", "epochs": args.pretrain, "out": str(out)}
    data = {**tree["data"], "size": PRETRAIN_SIZE, "limit": 0, "fraction": 1.0}
    sections = {"task": tree["task"], "data": data, "cache": {"views": 0}, "student": {"model": network}}
    finished(parse_recipe({"seed": 2, **sections, "train": {**tree["train"], "lr": 0.05, **train}}))
    return {"backbone": str(out / "student.pt"), "prefix": "backbone."}


def train_teacher(args: argparse.Namespace, tree: dict[str, Any]) -> float:
    """The teacher, on all images; its score."""
    (teacher,) = tree["teachers"]
    words = {"source": "none", "epochs": args.teacher_epochs, "out": str(Path(teacher["weights"]).parent)}
    recipe = parse_recipe(
        {
            "seed": 1,
            "task": tree["task"],
            "data": {**tree["data"], "limit": 0, "fraction": 1.0},
            "cache": {"views": 0},
            "student": {"model": teacher["model"], **tree["starts"][0]},
            "train": {**tree["train"], **words},
        }
    )
    score: float = finished(recipe)[f"val_{SCORE[recipe.task.name]}"]
    return score


def recipe_of(tree: dict[str, Any], variant: str, source: str, seed: int, out: Path) -> Recipe:
    """One student: a variant from ``none``, ``cache``, ``live`` (the cached views) or ``fresh`` (a new one per epoch).

    A plain student has no teacher either way; from ``fresh`` it sees new views, too.
    """
    words = words_of(variant, tree["task"]["name"])
    plain = words["name"] == "none"
    share, teachers = variant.partition("@")[2], tree["teachers"]
    if share:  # stored next to the whole maps, as if by another teacher
        teachers = [{**own, "name": f"{own['name']}-{share}", "taps": [f"ofd+margin@{share}"]} for own in teachers]
    tree = {**tree, "teachers": teachers, "student": {**tree["student"], **tree["starts"][1]}}
    sections = {
        **{key: value for key, value in tree.items() if key != "starts"},
        "method": words,
        "teachers": [] if plain else tree["teachers"],
    }
    if plain or source == "fresh":
        sections["cache"] = {"views": 0 if source == "fresh" else tree["cache"]["views"], "batch": BATCH}
    folder = out / f"{variant}-{source}-{tree['cache']['views']}-{tree['cache']['codec']}-{tree['train']['epochs']}"
    runs = "none" if plain else {"fresh": "live"}.get(source, source)
    train = {"source": runs, "seed": seed, "out": str(folder / str(seed))}
    return parse_recipe({**sections, "train": {**tree["train"], **train}})


def run_students(args: argparse.Namespace, task: str) -> None:
    """Teacher, cache, then every variant from every source at every seed, seed by seed: whole seeds come first."""
    tree = tree_of(args, task)
    if task == "detect":
        models = tree["teachers"][0]["model"], tree["student"]["model"]
        tree["starts"] = tuple(pretrained(args, model) for model in models)
    teacher_score = train_teacher(args, tree)
    variants = args.methods or DEFAULTS[task]["methods"]
    taught = [name for name in variants if words_of(name, task)["name"] != "none"]
    alike = {name.partition("@")[2]: name for name in reversed(taught)}  # share → the first variant of it
    for name in alike.values() if "cache" in args.sources else ():
        run_cache(recipe_of(tree, name, "cache", 1, Path(args.out) / task))
    images = len(open_train(recipe_of(tree, "plain", "none", 1, Path(args.out) / task)))
    setting = {
        "device": paired.device_name(),
        "task": task,
        "images": images,
        "size": tree["data"]["size"],
        "epochs": args.epochs,
        "batch": BATCH,
        "lr": tree["train"]["lr"],
        "teacher": tree["teachers"][0]["model"],
        "student": tree["student"]["model"],
        "teacher_epochs": args.teacher_epochs,
        "pretrain": args.pretrain if task == "detect" else 0,
    }
    held = paired.settings_of(args.results, SETTING, STUDENT).get(tuple(str(setting[key]) for key in SETTING), [])
    done = {tuple(row[key] for key in STUDENT) for row in held}
    alone = ["none", "fresh"] if "fresh" in args.sources else ["none"]
    jobs = [(name, source) for name in variants for source in (args.sources if name in taught else alone)]
    for seed in range(1, args.seeds + 1):
        for variant, source in jobs:
            views = 0 if source == "fresh" else args.views
            student = {"variant": variant, "source": source, "views": views, "codec": args.codec, "seed": seed}
            if tuple(str(student[key]) for key in STUDENT) in done or time.monotonic() > args.until:
                continue
            log.info("bench: %s: %s from %s, seed %d", task, variant, source, seed)
            recipe = recipe_of(tree, variant, source, seed, Path(args.out) / task)
            result = finished(recipe)
            row = {
                **environment(),
                **setting,
                **student,
                "score": result[f"val_{SCORE[task]}"],
                "metrics": json.dumps(result.get("val_metrics")),
                "loss": result["final_loss"],
                "bytes_per_sample": bytes_per_sample(recipe),
                "parameters": result["parameters"],
                "teacher_score": teacher_score,
                "seconds": result["seconds"],
            }
            record(row, COLUMNS, args.results)


def overfit(args: argparse.Namespace) -> dict[str, Any]:
    """A detector from a random start, trained and judged on the first photographs of few and large objects."""
    tree = json.loads(args.overfit.read_text())
    boxes: dict[int, list[list[float]]] = {image["id"]: [] for image in tree["images"]}
    for own in tree["annotations"]:
        boxes[own["image_id"]].append(own["bbox"])
    large = [
        image
        for image in tree["images"]
        if 1 <= len(boxes[image["id"]]) <= 4
        and min(w * h for _, _, w, h in boxes[image["id"]]) > 0.05 * image["width"] * image["height"]
    ][:6]
    kept = {image["id"] for image in large}
    annotations = [a for a in tree["annotations"] if a["image_id"] in kept]
    folder = Path(args.out) / "overfit"
    folder.mkdir(parents=True, exist_ok=True)
    few, link = folder / "few.json", folder / "few"
    few.write_text(json.dumps({**tree, "images": large, "annotations": annotations}))
    if not link.exists():
        link.symlink_to((args.overfit.parent / args.overfit.stem).resolve())
    result = finished(
        parse_recipe(
            {
                "task": {"name": "detect"},
                "data": {"train": str(few), "val": str(few), "size": 128, "augment": [{"op": "flip"}]},
                "cache": {"views": 0},
                "student": {"model": NETWORKS["detect"][1]},
                "train": {
                    "source": "none", "optimizer": "adamw", "lr": 1e-3, "epochs": 150, "batch": len(large),
                    "schedule": "one-cycle", "precision": "bf16", "eval_every": 0, "threads": args.threads,
                    "out": str(folder / "run"),
                },
            }
        )
    )  # fmt: skip
    return {"images": len(large), "boxes": len(annotations), **result["val_metrics"]}


def over_plain(rows: list[Row]) -> list[dict[str, Any]]:
    """Every variant and source: mean, deviation, paired difference to the plain student of the seed and views."""
    key = ("variant", "source", "views", "codec")
    return paired.summarize(
        rows, key, value="score", pair=("views", "seed"), baseline=lambda row: row["variant"] == "plain"
    )


def cached_over_live(rows: list[Row]) -> list[dict[str, Any]]:
    """Cached students against those of live teachers, the same variant, views and seed."""
    both = [row for row in rows if row["source"] in ("cache", "live")]
    pair = ("variant", "views", "codec", "seed")
    table = paired.summarize(
        both, ("variant", "source", "views", "codec"), value="score", pair=pair, over="over_live",
        baseline=lambda row: row["source"] == "live",
    )  # fmt: skip
    return [line for line in table if line["source"] == "cache" and not math.isnan(line["over_live"])]


def show(title: str, table: list[dict[str, Any]], over: str, words: str) -> None:
    """A table for people, in percent."""
    lines = [
        {
            **{name: line[name] for name in ("variant", "source", "views", "seeds")},
            "score": f"{line['mean']:.2%} ± {line['deviation']:.2%}",
            words: f"{100 * line[over]:+.2f} ± {100 * line['half_interval']:.2f}",
            "bytes per sample": f"{line['bytes_per_sample']:,.0f}" if line["bytes_per_sample"] else "",
        }
        for line in table
    ]
    print_table(title, lines)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What may be asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, nargs="?", default=Path("data/camvid"), help="train/, val/, classes.txt")
    parser.add_argument("--task", nargs="*", default=list(SCORE), choices=list(SCORE))
    parser.add_argument("--tiny", action="store_true", help="a few scenes and small inputs: does it run?")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", default="runs/dense")
    parser.add_argument("--size", type=int, default=0, help="pixels; 0 = 160")
    parser.add_argument("--limit", type=int, default=0, help="the students' images: the first so many; 0 = all")
    parser.add_argument("--fraction", type=float, default=1.0, help="the students' images: this share of them")
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--codec", default="u8", choices=get_args(CodecName))
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--teacher-epochs", type=int, default=48)
    parser.add_argument("--pretrain", type=int, default=6, help="epochs of segmentation that a detector's backbone has")
    parser.add_argument("--lr", type=float, default=0.0, help="0 = 0.05 for masks (SGD), 1e-3 for boxes (AdamW)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--methods",
        nargs="*",
        help="plain, a method, ofd-ALPHA or ofd@SHARE; default: plain, ofd and, of masks, kd, cwd",
    )
    parser.add_argument("--sources", nargs="*", default=["cache", "live"], choices=["cache", "live", "fresh"])
    parser.add_argument("--teacher", default="", help="a model; default: ResNet-50 of the family")
    parser.add_argument("--student", default="", help="a model; default: ResNet-18 of the family")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no student after so long")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--overfit", type=Path, help="a COCO JSON, with its images in a folder of its name")
    parser.add_argument("--summary", action="store_true")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """See the module."""
    args = arguments(argv)
    configure_logging()
    args.until = time.monotonic() + args.minutes * 60
    if args.tiny:
        args.data, args.pretrain = Path(args.out) / "scenes", 0
        write_scenes(args.data)
    document: dict[str, Any] = {"settings": []}
    if args.overfit:
        document["overfit"] = overfit(args)
    for task in [] if args.summary or args.overfit else args.task:
        run_students(args, task)
    for setting, rows in paired.settings_of(args.results, SETTING, STUDENT).items():
        found: dict[str, Any] = dict(zip(SETTING, setting, strict=True))
        found["teacher_score"] = float(rows[-1]["teacher_score"])
        found["students"] = over_plain(rows)
        found["cached_over_live"] = cached_over_live(rows)
        words = f"{found['task']}, {found['images']} images, {found['size']} px, {found['epochs']} epochs"
        title = f"{words}, {found['student']} of {found['teacher']} ({found['teacher_score']:.2%}), {found['device']}"
        show(title, found["students"], "over_plain", "over plain (95 %)")
        show(f"cached over live: {words}", found["cached_over_live"], "over_live", "over live (95 %)")
        document["settings"].append(found)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
