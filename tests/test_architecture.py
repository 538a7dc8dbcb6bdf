"""The folder is the architecture: who may import whom, what is public, what is documented."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_recursive
from pyro_recursive import evaluation

PACKAGE = Path(pyro_recursive.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
LEAVES = {"evaluation", "training"}  # nothing but the package face imports these
LOSSES = {"elbo", "stratified", "recursive_elbo", "focus", "proposals", "mapa_elbo"}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own(path: Path) -> set[str]:
    return {name for name in imports_of(path) if name.startswith("pyro_recursive.")}


@pytest.mark.parametrize("name", ["bounds", "estimators", "recursion"])
def test_pure_torch(name: str) -> None:
    allowed = {"math", "abc", "dataclasses", "typing", "collections", "torch", "pyro_recursive"}
    assert {module.split(".")[0] for module in imports_of(PACKAGE / f"{name}.py")} <= allowed


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_leaves_are_imported_by_the_face_alone(path: Path) -> None:
    place = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if place in LEAVES | {"__init__"}:
        return
    assert not {name for name in own(path) if name.split(".")[1] in LEAVES}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_guides_and_losses_do_not_know_each_other(path: Path) -> None:
    place = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if place == "guides":
        assert not {name for name in own(path) if name.split(".")[1] in LOSSES}
    if place in LOSSES:
        assert not {name for name in own(path) if name.startswith("pyro_recursive.guides")}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_functions_import_optional_packages_alone(path: Path) -> None:
    optional = {"sklearn", "pooch", "PIL", "matplotlib", "zuko", "faiss"}
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Import):
                    assert {alias.name.split(".")[0] for alias in node.names} <= optional
                elif isinstance(node, ast.ImportFrom):
                    assert (node.module or "").split(".")[0] in optional


def test_no_cycles() -> None:
    graph = {
        module_of(path): {name for name in own(path) if (PACKAGE.parent / _file(name)).exists()}
        for path in FILES
    }
    visiting: set[str] = set()
    done: set[str] = set()

    def visit(module: str) -> None:
        assert module not in visiting, f"{module} imports itself through others"
        if module in done or module not in graph:
            return
        visiting.add(module)
        for other in graph[module]:
            visit(other)
        visiting.discard(module)
        done.add(module)

    for module in graph:
        visit(module)


def _file(module: str) -> str:
    return module.replace(".", "/") + ".py"


def test_no_rooms_for_leftovers() -> None:
    assert not {path.stem for path in FILES} & {"utils", "helpers", "misc", "common"}


@pytest.mark.parametrize("name", pyro_recursive.__all__)
def test_public_names_are_documented_with_an_example(name: str) -> None:
    doc = getattr(pyro_recursive, name).__doc__
    assert doc and ">>>" in doc


@pytest.mark.parametrize("name", [name for name in evaluation.__all__ if name[0].islower()])
def test_diagnostics_are_documented_with_an_example(name: str) -> None:
    doc = getattr(evaluation, name).__doc__
    assert doc and (">>>" in doc or name.startswith("plot_"))


def test_importing_the_package_does_not_import_arviz_or_an_extra() -> None:
    slow = ("arviz", "matplotlib", "sklearn", "zuko", "faiss")
    command = f"import sys, pyro_recursive; print([m for m in {slow} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", command], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_public_names() -> None:
    expected = (
        "MultiSampleELBO IWAE_ELBO MIWAE_ELBO PIWAE_ELBO CIWAE_ELBO log_marginal fit "
        "AmortizedGuide MixtureGuide RecursiveMixtureGuide FlowGuide RecursiveMixture_ELBO "
        "SemiAmortizedGuide MAPAGuide MAPA_ELBO"
    )
    assert set(expected.split()) <= set(pyro_recursive.__all__)
