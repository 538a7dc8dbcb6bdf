"""Docs, README and CONTRIBUTING: all public names, links that lead somewhere, blocks that run."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if path.parent.name != "repository")
REFERENCE = "\n".join(path.read_text() for path in sorted((DOCS / "api").glob("*.rst")))


def syntax(module: str) -> ast.Module:
    """Return a module's syntax tree, without importing it: some imports take seconds."""
    path = DOCS.parent.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text())


def names_of(module: str) -> list[str]:
    """Return a module's ``__all__``."""
    for node in syntax(module).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


def members_of(module: str) -> list[str]:
    """Return the names that a module exports, or without ``__all__`` what it defines in public."""
    definitions = (ast.ClassDef, ast.FunctionDef)
    defined = [node.name for node in syntax(module).body if isinstance(node, definitions)]
    return names_of(module) or [name for name in defined if not name.startswith("_")]


FACES = ["pyro_recursive"] + [
    f"pyro_recursive.{face}" for face in ("datasets", "mapa", "evaluation", "training")
]
PUBLIC = [(face, name) for face in FACES for name in names_of(face)]


def documented() -> set[str]:
    """Return all names of the reference, and those of the modules that are in it whole."""
    single = r"^\.\. auto(?:class|function|data):: (?:\S+\.)?(\w+)$"
    found = set(re.findall(single, REFERENCE, re.MULTILINE))
    whole = r"^\.\. automodule:: (\S+)\n(   :\S+:.*)?"
    for module, option in re.findall(whole, REFERENCE, re.MULTILINE):
        named = re.match(r"   :members: ?(.*)", option)
        if named and named[1]:
            found |= set(named[1].split(", "))
        elif named:
            found |= set(members_of(module))
        found.add(module.rsplit(".", 1)[-1])
    return found


def test_the_reference_has_every_public_name() -> None:
    assert {name for _, name in PUBLIC} <= documented()


def test_the_decision_guide_has_every_method() -> None:
    text = (DOCS / "choosing.md").read_text()
    names = {name for face, name in PUBLIC if face == "pyro_recursive"}
    assert not [name for name in names - {"MultiSampleELBO", "Schedule"} if name not in text]


def test_every_page_is_reached() -> None:
    trees = "\n".join(
        block
        for page in [*PAGES, *DOCS.rglob("*.rst")]
        for block in re.findall(r"```{toctree}\n(.*?)```", page.read_text(), re.DOTALL)
    )
    listed = {line.rsplit("/", 1)[-1] for line in trees.splitlines()}
    pages = {path.stem for path in [*PAGES, *(DOCS / "api").glob("*.rst")]}
    assert pages - {"index"} <= listed


def python_blocks(page: Path) -> str:
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return "\n".join(blocks)


SHOWN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [*SHOWN, *filter(python_blocks, PAGES)], ids=lambda page: page.stem
)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # some of them write files
    exec(python_blocks(page), {"__name__": "docs"})


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 100


@pytest.mark.parametrize("page", [*SHOWN, ROOT / "benchmarks/README.md"], ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose)
    local = [link for link in links if "://" not in link]
    assert not [link for link in local if not (page.parent / link).exists()]
