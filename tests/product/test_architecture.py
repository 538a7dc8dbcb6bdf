"""The folder is the architecture: who may import whom, what is public, what is documented."""

import ast
import importlib
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import pyro_recursive
from pyro_recursive import evaluation

PACKAGE = Path(pyro_recursive.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((PACKAGE.parent / "tests").rglob("*.py"))
INNER = [path for path in FILES if path.parent != PACKAGE]
RANKS = {
    "bounds": 0,
    "tracing": 1,
    "guides": 2,
    "losses": 2,
    "priors": 3,
    "mapa": 4,
    "evaluation": 4,
    "training": 5,
}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


@cache
def imports_of(path: Path) -> set[str]:
    found = set()
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own(path: Path) -> set[str]:
    return {name for name in imports_of(path) if name.startswith("pyro_recursive.")}


def folder_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0]


def test_the_root_has_folders_alone() -> None:
    entries = {path.name for path in PACKAGE.iterdir()} - {"__pycache__"}
    assert entries == {*RANKS, "datasets", "__init__.py", "py.typed"}


def test_bounds_are_pure_torch() -> None:
    allowed = {"math", "abc", "dataclasses", "typing", "collections", "torch", "pyro_recursive"}
    for path in (PACKAGE / "bounds").glob("*.py"):
        assert {module.split(".")[0] for module in imports_of(path)} <= allowed, path


def test_a_folder_imports_lower_ranks_alone() -> None:
    for path in INNER:
        folder = folder_of(path)
        others = {name.split(".")[1] for name in own(path)} - {folder}
        rank = RANKS.get(folder, 0)  # that of datasets, which import nothing of the package
        assert {other for other in others if RANKS.get(other, 9) >= rank} == set(), path


def test_functions_import_optional_packages_alone() -> None:
    optional = {"sklearn", "pooch", "PIL", "matplotlib", "zuko"}
    optional |= {"arviz", "arviz_stats", "torch"}  # they, and torch's compiler, take seconds
    for path in FILES:
        functions = [each for each in nodes_of(path) if isinstance(each, ast.FunctionDef)]
        for node in (each for function in functions for each in ast.walk(function)):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= optional, path
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] in optional, path


def test_no_cycles() -> None:
    modules = set(map(module_of, FILES))
    TopologicalSorter({module_of(path): own(path) & modules for path in FILES}).prepare()


@pytest.mark.slow
def test_no_test_file_imports_another() -> None:
    for path in TESTS:
        modules = {name for name in imports_of(path) if name.startswith("tests.")}
        assert not {name for name in modules if ".test_" in name}, path


def test_files_of_tests_are_of_moderate_length() -> None:
    assert not {path.stem for path in TESTS if len(path.read_text().splitlines()) > 800}


def test_no_file_is_for_leftovers() -> None:
    assert not {path.stem for path in FILES} & {"utils", "helpers", "misc", "common"}


NAMES = [(pyro_recursive, name) for name in pyro_recursive.__all__]
NAMES += [(evaluation, name) for name in evaluation.__all__ if name[0].islower()]


def test_public_names_are_documented_with_an_example() -> None:
    for module, name in NAMES:
        doc = getattr(module, name).__doc__
        assert doc and (">>>" in doc or name.startswith("plot_")), name


BARE = """
import sys
extras = "sklearn", "pooch", "PIL", "matplotlib", "zuko", "arviz"
for name in extras:
    sys.modules[name] = None
import pyro_recursive, pyro_recursive.datasets, pyro_recursive.mapa, pyro_recursive.training
"""


@pytest.mark.slow
def test_the_package_is_imported_without_any_extra() -> None:
    """Nor does it import ArviZ, which takes seconds."""
    command = [sys.executable, "-W", "ignore", "-c", BARE]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("former", "now"),
    [
        ("aggregate", "evaluation.information"),
        ("empirical", "mapa"),
        ("empirical.candidates", "mapa.candidates"),
        ("empirical.kernels", "mapa.kernels"),
        ("estimators", "bounds.estimators"),
        ("guides.families", "guides.gaussian_families"),
        ("guides.packed", "guides.base"),
        ("guides.updates", "guides.semi_amortized.updates"),
        ("recursion", "bounds.mixture_objectives"),
    ],
)
def test_former_modules_stay_importable(former: str, now: str) -> None:
    one, other = (importlib.import_module(f"pyro_recursive.{name}") for name in (former, now))
    assert one is other
    scope: dict[str, object] = {}
    exec(f"import pyro_recursive.{former}; found = pyro_recursive.{former}", scope)
    assert scope["found"] is other
