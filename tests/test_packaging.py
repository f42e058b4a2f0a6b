"""What is installed: dependencies are what is imported; wheel, sdist and image hold what they need, and no more."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from sklearn.datasets import load_digits as sklearn_digits

import feedfast
from feedfast.data.dali import EXTRAS
from feedfast.stages.demo import load_digits

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FOLDERS = {ROOT / "feedfast": "feedfast", ROOT / "kernels" / "feedfast_kernels": "feedfast_kernels"}
JUNK = (
    "runs/x/student.pt",
    ".gpu/result",
    "build/lib/y.py",
    "feedfast/data/__pycache__/z.cpython-311.pyc",
    "venv/a.py",
)


# ---- what is declared, and what is imported


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in requirements}


CORE = names(PROJECT["dependencies"])
OFFERED = {extra: names(lines) for extra, lines in PROJECT["optional-dependencies"].items()}
USED = set().union(*(held for extra, held in OFFERED.items() if extra not in ("dev", "bench")))


FOR_USERS = {"zarr"}  # how people open a cache; 0.3 MB
# what is used where it is: Triton comes with torch's wheels that have CUDA, IPython is what a notebook runs in
WHERE_THERE = {"triton", "ipython"}


def third_party(folder: Path) -> Iterator[tuple[str, str, bool]]:
    """File, package, and whether it is imported as soon as the file is, of every import of other people's modules."""
    known = metadata.packages_distributions()
    ours = {"feedfast", "feedfast_kernels", "__future__"}
    for path in sorted(folder.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        later = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        later += [
            node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        ]
        late = {id(inner) for outer in later for inner in ast.walk(outer)}
        for node in ast.walk(tree):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for top in {module.partition(".")[0] for module in modules} - set(sys.stdlib_module_names) - ours:
                yield (
                    path.relative_to(ROOT).as_posix(),
                    canonicalize_name(known.get(top, [top])[0]),
                    id(node) not in late,
                )


def imported() -> list[tuple[str, str, bool]]:
    return [entry for folder in FOLDERS for entry in third_party(folder)]


def test_what_is_imported_is_declared() -> None:
    """At once: a dependency. In a function, or in a module that is itself imported on demand: also one of an extra."""
    on_demand = ("feedfast/integrations/", "kernels/feedfast_kernels/gpu/")
    found = [(file, name, at_once and not file.startswith(on_demand)) for file, name, at_once in imported()]
    assert len(found) > 100
    assert [(file, name) for file, name, at_once in found if at_once and name not in CORE] == []
    assert [(file, name) for file, name, _ in found if name not in CORE | USED | WHERE_THERE] == []


def test_what_is_declared_is_imported() -> None:
    """What nothing imports is downloaded for nothing."""
    assert CORE - {name for _, name, _ in imported()} == FOR_USERS


def test_the_kernels_need_torch_and_triton_alone() -> None:
    """And Triton on a GPU only; torch can be installed without NumPy, too."""
    at_once = {(name, "/gpu/" in file) for file, name, at_once in third_party(ROOT / "kernels") if at_once}
    assert at_once == {("torch", False), ("torch", True), ("triton", True)}


def test_extras_choose_dali_by_cuda() -> None:
    for major, package in EXTRAS.items():
        assert OFFERED[f"cuda{major}"] == {package}
    assert not CORE & set(EXTRAS.values()), "both install the same modules: none can be everybody's"
    (own,) = [Requirement(line) for line in PROJECT["optional-dependencies"]["dev"] if line.startswith("feedfast[")]
    everything = {extra for extra in OFFERED if extra != "dev"} - {"cuda12"}
    assert own.extras == everything, "what tests need of an extra is what its users get"


def test_extras_that_are_named_are_offered() -> None:
    """In messages and pages: a wrong one would install nothing, with a warning that scrolls by."""
    texts = [
        *(ROOT / "feedfast").rglob("*.py"),
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        ROOT / "pyproject.toml",
    ]
    named = {
        extra.strip()
        for path in texts
        for found in re.findall(r"(?:feedfast|'\.)\[([\w, -]+)\]", path.read_text(encoding="utf-8"))
        for extra in found.split(",")
    }
    assert {"cuda13", "cuda12", "ray", "dev"} <= named
    assert named - OFFERED.keys() == set()


def test_installation_is_described() -> None:
    """docs/install.md: each dependency and each extra has a row."""
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \|", page, re.MULTILINE)
    named = {canonicalize_name(name) for row in rows for name in re.findall(r"`([\w.-]+)`", row)}
    assert CORE - named == set()
    assert OFFERED.keys() - {"dev"} - named == set()


def test_versions_of_python_are_said_once() -> None:
    offered = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)]
    assert PROJECT["requires-python"] == f">={offered[0]}"
    assert f"Python {offered[0]} " in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"Python {offered[0]} to {offered[-1]}" in (ROOT / "docs" / "install.md").read_text(encoding="utf-8")


def test_the_digits_are_scikit_learns() -> None:
    images, labels = load_digits()
    theirs = sklearn_digits()
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, theirs.images)
    np.testing.assert_array_equal(labels, theirs.target)


# ---- the image: README's own line


def dockerfile() -> list[tuple[str, str]]:
    """Instructions, continued lines joined."""
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(word, " ".join(rest.split())) for word, rest in lines]


def test_the_image_is_built_by_readmes_line() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    lines = [re.findall(r"^.*&& feedfast demo$", page.read_text(encoding="utf-8"), re.MULTILINE) for page in pages]
    (line,) = {found for page in lines for found in page}
    (command,) = [part.strip() for part in line.split("&&") if "pip install" in part]
    steps = dockerfile()
    assert steps[0][0] == "FROM"
    assert ("RUN", command) in steps
    users = [rest for word, rest in steps if word == "USER"]
    assert users
    assert not users[-1].startswith(("root", "0"))


def copied() -> list[str]:
    return [name for word, rest in dockerfile() if word == "COPY" for name in rest.split()[:-1]]


def test_the_image_sees_what_it_copies_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {line.removeprefix("!") for line in rules if line.startswith("!")} == set(copied())


# ---- wheel and sdist


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree as a fresh clone has it, with what work in it leaves behind."""
    folder = tmp_path_factory.mktemp("source") / "feedfast"
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", *(name.rstrip("/") for name in ignored)))
    for name in JUNK:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("junk")
    return folder


def build(source: Path, out: Path, *kinds: str) -> list[Path]:
    command = [sys.executable, "-m", "build", "--no-isolation", *kinds, "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Deprecat" not in done.stdout + done.stderr
    return sorted(out.iterdir())


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel, made from the sdist, and the sdist."""
    wheel, sdist = build(source, tmp_path_factory.mktemp("built"))
    return wheel, sdist


def files_of(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_packages(built: tuple[Path, Path]) -> None:
    wanted = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for folder, package in FOLDERS.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"feedfast/py.typed", "feedfast_kernels/py.typed", "feedfast/digits/digits.npz"} < wanted
    assert files_of(built[0]) == wanted


@pytest.mark.slow
def test_the_wheel_says_what_it_is(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as archive:
        (folder,) = {name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        about = metadata.PathDistribution(zipfile.Path(archive, f"{folder}/"))
        said = about.metadata
        assert said["Version"] == feedfast.__version__
        assert said["Requires-Python"] == PROJECT["requires-python"]
        assert set(said.get_all("Provides-Extra") or ()) == OFFERED.keys()
        assert said.get_all("Classifier") == PROJECT["classifiers"]
        assert said.get_all("License-File") == ["LICENSE", "feedfast/digits/README.md"]
        assert [(point.name, point.value) for point in about.entry_points] == [("feedfast", "feedfast.cli:main")]


@pytest.mark.slow
def test_the_sdist_is_the_repository(built: tuple[Path, Path]) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no git repository to compare with")
    listed = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    tracked = set(subprocess.run(listed, capture_output=True, text=True, check=True).stdout.splitlines())
    with tarfile.open(built[1]) as archive:
        held = {member.name.partition("/")[2] for member in archive if member.isfile()}
    made = {name for name in held if name in ("PKG-INFO", "setup.cfg") or name.startswith("feedfast.egg-info/")}
    assert held - made == {name for name in tracked if (ROOT / name).is_file()}, "see MANIFEST.in"


@pytest.mark.slow
def test_what_the_image_copies_is_enough(built: tuple[Path, Path], source: Path, tmp_path: Path) -> None:
    context = tmp_path / "src"
    context.mkdir()
    for name in copied():
        place = source / name
        (shutil.copytree if place.is_dir() else shutil.copy)(place, context / name)
    (wheel,) = build(context, tmp_path / "dist", "--wheel")
    assert files_of(wheel) == files_of(built[0])


# ---- installed, away from the repository


def clean() -> dict[str, str]:
    """An environment that does not lead back to the repository."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


@pytest.fixture(scope="module")
def python(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a virtual environment that holds the wheel, and lends its dependencies from this one."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=120)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--no-deps"]
    subprocess.run([*pip, "--no-index", "--quiet", str(built[0])], check=True, timeout=120, env=clean())
    (there,) = folder.glob("lib/python*/site-packages")
    here = metadata.distribution("torch").locate_file("")
    (there / "lent.pth").write_text(str(here))  # behind its own packages, and without following .pth files
    return folder / "bin" / "python"


def run(python: Path, folder: Path, *arguments: str) -> str:
    """stdout of a process that sees nothing of the repository."""
    command = [str(python.parent / arguments[0]), *arguments[1:]]
    env = {**clean(), "OMP_NUM_THREADS": "1"}  # tests share the cores, and threads that wait for one another spin
    done = subprocess.run(command, capture_output=True, text=True, timeout=850, cwd=folder, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_installed_command_shows_the_product(python: Path, tmp_path: Path) -> None:
    """README's first command."""
    document = json.loads(run(python, tmp_path, "feedfast", "demo", "--out", "demo").splitlines()[-1])
    accuracy = {row["method"]: row["accuracy"] for row in document["students"]}
    assert document["verified"] is True
    assert accuracy["none"] < min(accuracy["kd"], accuracy["ofd"])
    assert (tmp_path / "demo" / "report.html").is_file()


@pytest.mark.slow
def test_the_installed_kernels_are_usable_alone(python: Path, tmp_path: Path) -> None:
    """On a processor, with nothing but torch."""
    core = sorted(name.replace("-", "_") for name in CORE - {"torch"})
    others = [*core, "PIL", "triton", "nvidia.dali", "feedfast"]
    script = f"import sys; sys.modules.update(dict.fromkeys({others}))\n"
    script += """
import torch, feedfast_kernels as kernels
x = torch.linspace(-9, 9, 2 * 3 * 16).view(2, 3, 4, 4)
codes, saturated = kernels.encode(x, torch.full((3,), -8.0), torch.full((3,), 0.05), codec="u8")
print(kernels.__file__, int(saturated), float(kernels.partial_l2(x, x + 1, margin_C=torch.full((3,), -1.0))))
"""
    place, saturated, loss = run(python, tmp_path, "python", "-c", script).split()
    assert Path(place).is_relative_to(python.parents[1])
    values = np.linspace(-9, 9, 2 * 3 * 16, dtype=np.float32)
    rounded = np.round((values + 8) / np.float32(0.05))
    assert int(saturated) == np.count_nonzero((rounded < 0) | (rounded > 254))
    assert float(loss) > 0


@pytest.mark.slow
def test_the_installed_command_reads_without_dali(python: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['nvidia.dali'] = None; from feedfast.cli import main; main()"
    recipes = json.loads(run(python, tmp_path, "python", "-c", code, "recipes").splitlines()[-1])
    assert len(recipes["recipes"]) == len(list((ROOT / "feedfast" / "recipes").glob("*.toml")))
