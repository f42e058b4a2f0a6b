"""Write the pages of PAGES in docs/ from what they describe: `python tools/make_docs.py`.

The tables hold what pydantic and typer know (keys, types, ranges, defaults) and each one's own description, so that
nothing about a key or an option is said twice. tests/cli/test_docs.py compares the files with what this makes.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer
from pydantic import BaseModel
from typer.models import ArgumentInfo, CommandInfo, OptionInfo

import feedfast
import feedfast_kernels
from feedfast import documents
from feedfast.cli import app
from feedfast.data.augment import OPERATIONS, PRESETS
from feedfast.methods import METHODS, tasks_of
from feedfast.methods.base import LOGITS, Method, expected_words
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
        "commands.md": commands_page(),
        "reference.md": reference_page(),
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
    rows = [
        (f"[`{name}`](#{name})", ", ".join(f"`{need}`" for need in method.needs) or "nothing", about_method(method))
        for name, method in METHODS.items()
    ]
    parts += [table(("method", "reads", "what it does"), rows)]
    for name, method in METHODS.items():
        doc = about_method(method)
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


def about_method(method: type[Method]) -> str:
    return inspect.cleandoc(method.__doc__ or "").split("\n")[0]


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
            shown = " ".join(f"{key}={short(value)}" for key, value in words.items())
            listed.append(f"{type(entry).model_fields['op'].default} {shown}".strip())
        yield f"`{name}`", "; ".join(listed), preset.note


def short(value: Any) -> str:
    """A value of a preset, numbers to three digits."""
    if isinstance(value, (tuple, list)):
        return f"({', '.join(short(entry) for entry in value)})"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


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
        "examples in [docs/recipes](./recipes) are those of [results.md](results.md).",
    ]
    for family, heading in FAMILIES.items():
        rows = [(f"`{name}`", title) for name, title in titles.items() if name.partition("-")[0] == family]
        parts += [f"## {heading}", table(("recipe", "what it is"), rows)]
    return "\n\n".join(parts) + "\n"


EVERY_COMMAND = """\
* **Resuming.** Every run can be killed and continued with the same command, to the same bytes and weights. `cache`,
  `train`, `chain`, `factors`, `sweep`, `copy` and `demo` continue what they find; the others start again.
* **Output.** Progress and messages go to stderr (`-v` for more, `-q` for less, before or after the command:
  `feedfast -q cache ...`). On stdout stands one JSON document and nothing else, so a
  command can be piped: `feedfast train recipe.toml | jq .val_accuracy`.
* **Exit codes.** 0: done. 1: the job or the check failed. 2: the request was wrong (a bad recipe, a missing path).
  130: ended by Ctrl-C, 143: by SIGTERM, likewise 128 + the number of SIGHUP and SIGUSR1; the step or shard under way is
  finished first.
* **Overrides.** `key=value` sets any dotted key of the recipe: `train.epochs=5`, `method.name=kd`,
  `teachers.0.weights=runs/a/student.pt`.
* **Records.** Runs, caches and pages say how they were made: command, recipe, git commit, versions, machine, times."""


def commands_page() -> str:
    parts = [
        "# Commands",
        f"Made by `{COMMAND}` from `feedfast/cli.py`. `feedfast --help` lists the commands, "
        "`feedfast COMMAND --help` says what is written here.",
        EVERY_COMMAND,
    ]
    for name, command in all_commands(app):
        callback = command.callback
        about, examples = about_and_examples(f"{inspect.getdoc(callback)}\n\n{command.epilog or ''}")
        shown, rows = ["feedfast", *name.split()], []
        for key, parameter in inspect.signature(callback, eval_str=True).parameters.items():
            rows.append(parameter_row(key, parameter))
            if not rows[-1][0].startswith("`-"):
                shown.append(rows[-1][0].strip("`"))
        parts += [f"## feedfast {name}", about, f"```text\n{' '.join([*shown, '[OPTIONS]'])}\n```"]
        parts += [table(("argument or option", "value", "default", "meaning"), rows)] if rows else ["No options."]
        parts += ["```sh\n" + "\n".join(examples) + "\n```"] if examples else []
    return "\n\n".join(parts) + "\n"


def all_commands(group: typer.Typer, before: str = "") -> Iterator[tuple[str, CommandInfo]]:
    """Name as it is typed, and what typer was told, of every command, those of sub-groups too, as --help lists them."""
    for command in group.registered_commands:
        assert command.callback is not None
        if not command.hidden:
            yield before + (command.name or command.callback.__name__.replace("_", "-")), command
    for inner in group.registered_groups:
        assert inner.typer_instance is not None
        yield from all_commands(inner.typer_instance, f"{before}{inner.name} ")


def about_and_examples(text: str) -> tuple[str, list[str]]:
    """A docstring without its examples, one line per paragraph; and the commands after "Example:"."""
    about, examples = [], []
    for paragraph in text.replace("\b", "").split("\n\n"):
        first, *_ = paragraph.strip().split(":", 1)
        if first in ("Example", "Examples"):
            lines = paragraph.strip().partition(":")[2].strip().splitlines()
            examples += [line.strip() for line in lines if line.strip()]
        elif paragraph.strip():
            about.append(" ".join(paragraph.split()))
    return "\n\n".join(about), examples


def parameter_row(key: str, parameter: inspect.Parameter) -> tuple[str, str, str, str]:
    """Of an argument or option: what is typed, the kind of value, the default and the help."""
    kind, info = get_args(parameter.annotation)[:2]
    assert isinstance(info, (ArgumentInfo, OptionInfo))
    kinds = [entry for entry in get_args(kind) if entry is not type(None)] if type(None) in get_args(kind) else [kind]
    several = get_origin(kinds[0]) is list
    kind = get_args(kinds[0])[0] if several else kinds[0]
    required = parameter.default is inspect.Parameter.empty
    if isinstance(info, ArgumentInfo):
        metavar = info.metavar or key.upper()
        shown, value = f"`{metavar if required or '[' in metavar else f'[{metavar}]'}`", ""
    else:
        # in an Annotated, typer keeps the first name where a default would stand
        names = [name for name in (info.default, *(info.param_decls or ())) if isinstance(name, str)]
        dashed = key.replace("_", "-")
        switch = kind is bool or info.count
        names = names or ([f"--{dashed}", f"--no-{dashed}"] if kind is bool else [f"--{dashed}"])
        shown = ", ".join(f"`{name}`" for name in names)
        value = "" if switch else f"`{info.metavar}`" if info.metavar else value_words(kind, info)
    value += ", may be repeated" if several and value else ""
    default = parameter.default
    given = default is not None and bool(value)
    written = "required" if required else f"`{default}`" if given else ""
    return shown, value, written, (info.help or "").replace("<", "&lt;")


def value_words(kind: Any, info: OptionInfo) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(f"`{choice}`" for choice in get_args(kind))
    words = {int: "whole number", float: "number", Path: "path", str: "text"}[kind]
    limits = (("≥", info.min), ("≤", info.max))
    return ", ".join([words, *(f"{sign} {limit:g}" for sign, limit in limits if limit is not None)])


OBJECTS = (
    "feedfast.stages.open_cache.OpenedCache",
    "feedfast.data.batch.Batch",
    "feedfast.stages.distill.Distiller",
)  # what open_cache, its streams and distiller return


def reference_page() -> str:
    public = {name: getattr(feedfast, name) for name in feedfast.__all__ if not name.startswith("_")}
    losses = {name: getattr(feedfast_kernels, name) for name in feedfast_kernels.__all__}
    errors = {name for name, thing in public.items() if inspect.isclass(thing) and issubclass(thing, Exception)}
    given = {f"{thing.__module__}.{thing.__qualname__}" for thing in public.values() if inspect.isclass(thing)}
    parts = [
        "# Python reference",
        f"Made by `{COMMAND}` from `feedfast.__all__` and `feedfast_kernels.__all__`. Methods and their options: "
        "[methods.md](methods.md). Keys of a recipe: [recipe.md](recipe.md).",
        "## Functions",
        directives("feedfast", [name for name, thing in public.items() if inspect.isroutine(thing)]),
        "## Objects",
        directives(
            "feedfast", [name for name, thing in public.items() if inspect.isclass(thing) and name not in errors]
        ),
        directives("", [name for name in OBJECTS if name not in given]),
        "## Documents",
        "What the functions return: the JSON document of the command of the same name, with its keys as attributes.",
        directives("feedfast.documents", [name for name in documents.__all__ if name[0].isupper()]),
        "### Parts of documents",
        directives("", sorted({f"{part.__module__}.{part.__qualname__}" for part in parts_of_documents()})),
        "## Errors",
        directives("feedfast", sorted(errors)),
        "## Losses and codes",
        "`feedfast_kernels` needs torch alone, and Triton on an NVIDIA GPU; [more about it](../kernels/README.md).",
        directives("feedfast_kernels", list(losses)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def parts_of_documents() -> set[type]:
    """The dataclasses that documents are made of, apart from the documents themselves."""
    found: set[type] = set()
    waiting: list[Any] = [getattr(documents, name) for name in documents.__all__ if name[0].isupper()]
    while waiting:
        kind = waiting.pop()
        waiting += get_args(kind)
        if is_dataclass(kind) and isinstance(kind, type) and kind not in found:
            found.add(kind)
            waiting += get_type_hints(kind).values()
    return {kind for kind in found if not issubclass(kind, documents.Document)}


def directives(module: str, names: Sequence[str]) -> str:
    """Blocks that Sphinx fills with signature and docstring."""
    lines = []
    for name in names:
        path = f"{module}.{name}".lstrip(".")
        home, _, last = path.rpartition(".")
        thing = getattr(import_module(home), last)
        if not inspect.isclass(thing) and not callable(thing):
            lines += [f".. autodata:: {path}", ""]
        elif not inspect.isclass(thing):
            lines += [f".. autofunction:: {path}", ""]
        elif issubclass(thing, BaseModel) or (is_dataclass(thing) and (not module or "Document" in last[1:])):
            lines += [f".. autoclass:: {path}()", ""]  # keys are in recipe.md, or the docstring; nobody makes one
        else:
            lines += [f".. autoclass:: {path}", "   :members:", ""]
    return "```{eval-rst}\n" + "\n".join(lines).rstrip() + "\n```" if lines else ""


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
