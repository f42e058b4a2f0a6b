"""Write docs/recipe.md, methods.md and recipes.md from what they describe: `python tools/make_docs.py`.

The tables hold what pydantic knows (keys, types, ranges, defaults) and each field's own description, so that nothing
about a key is said twice. tests/cli/test_docs.py compares the files with what this makes.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from feedfast.data.augment import OPERATIONS, PRESETS
from feedfast.methods import METHODS, tasks_of
from feedfast.methods.base import LOGITS, expected_words
from feedfast.recipe import Cache, Chain, Data, MethodEntry, Recipe, Student, Task, Teacher, Train, packaged_recipes
from feedfast.tap_entry import TapEntry

DOCS = Path(__file__).parents[1] / "docs"
COMMAND = "python tools/make_docs.py"
SECTIONS: dict[str, type[BaseModel]] = {
    "Top level": Recipe, "[data]": Data, "[task]": Task, "[cache]": Cache, "[[teachers]]": Teacher,
    "An entry of teachers.N.taps": TapEntry, "[student]": Student, "[method] or [[method]]": MethodEntry,
    "[train]": Train, "[chain]": Chain,
}  # fmt: skip
EXAMPLE = """\
seed = 0
[data]
train = "cifar-100-binary/train.bin"     # a folder of class folders, CIFAR, MNIST, an .npz (docs/data.md)
val = "cifar-100-binary/test.bin"
[cache]
path = "runs/c100.zarr"
views = 4                                # augmentation seeds, used in turn
[[teachers]]
name = "a"
model = "zoo/wrn-16-2"                   # zoo/… · torchvision/… · timm/… · package.module:factory
weights = "runs/teacher-1/student.pt"
taps = ["final", "ofd+margin"]           # default: what the method needs
[student]
model = "zoo/wrn-16-1"
[method]
name = "pfeed"
[train]
epochs = 30
"""
TYPES = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false", "object": "table"}


def pages() -> dict[str, str]:
    """File name in docs/ -> its text."""
    return {
        "recipe.md": recipe_page(),
        "methods.md": methods_page(),
        "recipes.md": recipes_page(),
        "augmentations.md": augmentations_page(),
    }


def recipe_page() -> str:
    parts = [
        "# Recipe",
        f"Made by `{COMMAND}` from `feedfast/recipe.py`; edit the descriptions there.",
        "A recipe is one TOML file that `feedfast plan`, `cache` and `train` read; [recipes.md](recipes.md) lists "
        "complete ones, one per setting of the papers. `key=value` arguments override any dotted key: "
        "`train.epochs=5`, `teachers.0.weights=runs/a/student.pt`, `method.name=kd`. "
        "Paths are relative to the current directory. An unknown key is refused.",
        f"```toml\n{EXAMPLE}```",
    ]
    for title, section in SECTIONS.items():
        parts += [f"## {title}", inspect.cleandoc(section.__doc__ or "").split("\n")[0]]
        if section is MethodEntry:
            parts.append("Options and their defaults: [methods.md](methods.md).")
        parts.append(table(("key", "type", "range", "default", "meaning"), recipe_rows(section)))
    return "\n\n".join(parts) + "\n"


def recipe_rows(section: type[BaseModel]) -> Iterator[Sequence[str]]:
    schema = section.model_json_schema()
    for key, entry in schema["properties"].items():
        target = str(entry.get("$ref") or entry.get("items", {}).get("$ref") or entry.get("allOf"))
        if key == "taps":
            kind, limits, default = "list of: text or table", "", literal(entry["default"])
        elif "$defs" in target or key == "method":
            kind, limits, default = "section", "", "required" if key in schema.get("required", ()) else "see below"
        else:
            kind, limits = describe(entry)
            default = "required" if key in schema.get("required", ()) else literal(entry["default"])
        yield f"`{key}`", kind, limits, default, entry.get("description", "")


def describe(entry: Mapping[str, Any]) -> tuple[str, str]:
    """Type and range of a JSON schema's entry, in words."""
    if "anyOf" in entry:
        kinds = [describe(option) for option in entry["anyOf"] if option.get("type") != "null"]
        return " or ".join(kind for kind, _ in kinds), ", ".join(limits for _, limits in kinds if limits)
    if "enum" in entry:
        return "one of", ", ".join(literal(value) for value in entry["enum"])
    if entry["type"] == "array":
        kinds = entry.get("prefixItems") or [entry["items"]]
        kind, limits = describe(kinds[0])
        return f"{len(kinds)} of: {kind}" if "prefixItems" in entry else f"list of: {kind}", limits
    words = {"minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}", "exclusiveMaximum": "< {}"}
    limits = [text.format(number(entry[key])) for key, text in words.items() if key in entry]
    if "pattern" in entry:
        limits.append(f"`{entry['pattern']}`")
    return TYPES[entry["type"]], ", ".join(limits)


def methods_page() -> str:
    parts = [
        "# Methods",
        f"Made by `{COMMAND}` from the classes in `feedfast/methods`, as `feedfast methods [NAME]` prints it.",
        "A recipe has one `[method]` table, or several `[[method]]` tables that are trained together, each with "
        "`name`, `weight` (1 by default) and its options. Targets it needs are taps of every teacher and of the "
        "student ([concepts.md](concepts.md)); a teacher without `taps` in the recipe is tapped for just these. "
        "Serves: the values of `task.name` that it can be used with by its defaults; logits of segmentation networks "
        "are compared place by place, on the coarser of two grids.",
        'Some positions: a tap stored with a share (`"ofd+margin@0.25"`) holds that share of each map\'s positions, '
        "and the student's map is gathered there before its adapters, so that adapters, loss and bytes shrink alike. "
        "Sums are multiplied with H * W / P: the loss is unbiased, but for batch norms of adapters, whose statistics "
        "are those of the positions. `at` and `cwd` normalize by what they see and come out about 1 / P too small.",
    ]
    for name, method in METHODS.items():
        doc = inspect.cleandoc(method.__doc__ or "").split("\n")[0]
        needs = ", ".join(f"`{need}`" for need in method.needs) or "no teacher"
        tasks = ", ".join(f"`{task}`" for task in tasks_of(method))
        about = f"Paper: {method.paper}.  \nNeeds: {needs}.  \nServes: {tasks}."
        if set(method.needs) - {LOGITS}:
            about += f"  \nSome positions: {'yes' if method.samples else f'no, it {method.whole}'}."
        parts += [f"## {name}", doc, about]
        rows = [
            (f"`{key}`", expected_words(field), literal(field.default), field.description or "")
            for key, field in method.Options.model_fields.items()
        ]
        parts.append(table(("option", "expected", "default", "meaning"), rows) if rows else "No options.")
    return "\n\n".join(parts) + "\n"


def augmentations_page() -> str:
    parts = [
        "# Augmentations",
        f"Made by `{COMMAND}` from `feedfast/data/augment.py` and `operations.py`.",
        "`data.augment` is a name or a list of tables, in the order in which they run: at most one crop, at most one "
        "flip, operations on pixels, then mixing. Everything is drawn from (seed, view, sample) alone and stored with "
        "the cache, so teachers and students see the same bytes whatever the batch size, order, rank or restart.",
        "```toml\n[data]\naugment = [\n"
        '  { op = "resized-crop", scale = [0.2, 1.0] },\n'
        '  { op = "flip" },\n'
        '  { op = "rand-augment", magnitude = 9 },\n'
        '  { op = "random-erasing", p = 0.25 },\n'
        '  { op = "mixup", alpha = 0.8, p = 0.5 },\n'
        '  { op = "cutmix", p = 0.5 },\n]\n```',
        "`none`, `pad-crop-flip` and `resized-crop-flip` are as in [recipe.md](recipe.md); `scale-crop-flip` and "
        "`expand-crop-flip` are `scale-crop` and `expand-crop` with their defaults and `data.flip`. A mixed image has "
        "two labels: `batch.annotations` then holds `first`, `second` and the first one's `weight`, and the loss of "
        "labels counts each for its share; `dkd`, `camkd` and `crd` need exactly one label and refuse. The partner is "
        "a row of the same view, by a second permutation of all samples, and the teachers see the mixed image.",
        "Distributions are torchvision's; so are pixels, up to rounding (a byte may differ by 1 or 2, nearest "
        "neighbors on an edge between two), but for these: hue turns in YIQ instead of HSV (photographs differ by 6 "
        "of 255 on average at 18 degrees, 9 at 36), equalize is OpenCV's (3 of 255 on average), and a sharpened "
        "image's outermost pixels are sharpened too. A GPU decodes and resamples with other rounding "
        "(`bench/bench_backends.py` lists by how much, operation by operation), so a cache "
        "names the backend its pixels are from.",
        "Boxes and masks follow crop and flip, exactly: boxes as one affine function, masks pixel by pixel, of each "
        "the source pixel that its center lies in, 255 outside the image. `scale-crop` is for masks, `expand-crop` for "
        "boxes; both cut what they show of the image in whole source pixels, resize it, and fill the rest afterwards, "
        "so that the image's edges lie on whole pixels of the output. Of boxes those stay of which a quarter is "
        "visible, under `expand-crop` those whose center is. Operations that move pixels (`affine`, `rotate`, "
        "`rand-augment`, `trivial-augment`, `auto-augment`) and mixing are refused for data with boxes or masks. "
        "Evaluation shows the whole image: masks' in a square on the longer side, boxes' squashed to the square.",
        "## Presets",
        table(("name", "operations", "from"), preset_rows()),
    ]
    for name, kind in OPERATIONS.items():
        rows = [
            (
                f"`{key}`",
                "a list of tables" if key == "windows" else expected_words(field),
                literal(field.default),
                field.description or "",
            )
            for key, field in kind.model_fields.items()
            if key != "op"
        ]
        doc = inspect.cleandoc(kind.__doc__ or "").replace("\n\n", " ").replace("\n", " ")
        parts += [f"## {name}", doc, table(("option", "expected", "default", "meaning"), rows)]
    return "\n\n".join(parts) + "\n"


def preset_rows() -> Iterator[Sequence[str]]:
    for name, preset in PRESETS.items():
        listed = []
        for entry in preset.tables:
            words = entry.model_dump(exclude_defaults=True)
            shown = " ".join(
                f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}" for key, value in words.items()
            )
            listed.append(f"{type(entry).model_fields['op'].default} {shown}".strip())
        yield f"`{name}`", "; ".join(listed), preset.note


FAMILIES = {
    "ofd": "OFD", "pfeed": "FEED, parallel", "sfeed": "FEED, sequential", "ft": "Factor Transfer", "ekd": "EKD-style",
    "lp": "LP", "kd": "Pruned ResNet-50 from two teachers", "plain": "Its control", "repdistiller": "RepDistiller",
    "camvid": "Segmentation on CPUs", "teacher": "Teachers that the others point to",
}  # fmt: skip


def recipes_page() -> str:
    titles = packaged_recipes()
    parts = [
        "# Packaged recipes",
        f"Made by `{COMMAND}` from `feedfast/recipes/*.toml`, as `feedfast recipes` lists them: one per setting of the "
        "papers.",
        "```sh\nfeedfast recipes NAME --out NAME.toml                # copied, never over a file\n"
        "feedfast methods --recipe NAME.toml                  # bytes per sample that each method would store\n"
        "feedfast cache NAME.toml data.train=my/train.bin     # paths in it are placeholders\n```",
        "Each file begins with what it is and the commands that run it. At each value it says where the value is from: "
        "the paper, the authors' code, or chosen here because neither says it; and where a detail of theirs cannot be "
        "expressed. A recipe of several teachers names the runs they come from. The "
        "examples in [recipes](recipes) are those of [results.md](results.md).",
    ]
    for family, heading in FAMILIES.items():
        rows = [(f"`{name}`", title) for name, title in titles.items() if name.partition("-")[0] == family]
        parts += [f"## {heading}", table(("recipe", "what it is"), rows)]
    return "\n\n".join(parts) + "\n"


def table(head: Sequence[str], rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def literal(value: Any) -> str:
    """A value as TOML writes it; None is a key that is left out."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, str):
        return f'`"{value}"`'
    if isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
        return ", ".join(f"`{{ {fields(entry)} }}`" for entry in value)
    return f"`{list(value)}`" if isinstance(value, (list, tuple)) else f"`{value}`"


def fields(entry: BaseModel) -> str:
    """Of a table what is not its default."""
    shown = entry.model_dump(mode="json", exclude_unset=True)
    return ", ".join(f"{key} = {literal(value).strip('`')}" for key, value in shown.items())


def number(value: float) -> str:
    return "2^63" if value == 2**63 else f"{value:g}"


def main() -> int:
    for name, text in pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")
        print(f"wrote docs/{name}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
