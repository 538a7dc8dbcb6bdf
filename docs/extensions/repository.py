"""Pages that the repository has already, copied at each build, with links that work on the site.

The tutorials, the benchmarks with their pictures and numbers, how to contribute, and the changelog.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from sphinx.application import Sphinx
from sphinx.util.logging import getLogger

DOCS = Path(__file__).parent.parent
ROOT = DOCS.parent
COPIES = DOCS / "repository"
RESULTS = "benchmarks/results"

# What links to these files lead to on the site, from the folder of the copies.
PAGES = {
    "README.md": "../index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
    RESULTS: "results.md",
}
LOG = getLogger(__name__)
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^()\s]+)\)")


def copy_all(app: Sphinx, config: object) -> None:
    """Bring the folder of copies up to date."""
    COPIES.mkdir(exist_ok=True)
    pages = {f"tutorials/{path.name}": path.name for path in tutorials()}
    pages |= {f"{RESULTS}/{path.name}": f"#results-{path.name}" for path in result_folders()}
    pages |= {f"docs/{place}": f"../{place}" for place in own_pages()} | PAGES
    for place in ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"):
        write(pages[place], with_links((ROOT / place).read_text(), place, pages))
    for path in tutorials():
        write(path.name, notebook_with_links(path, pages))
    write("results.md", "\n".join(result_lines()))


def tutorials() -> list[Path]:
    """Return the notebooks in their order."""
    return sorted((ROOT / "tutorials").glob("*.ipynb"))


def own_pages() -> list[str]:
    """Return the pages that are written for the site."""
    found = (path.relative_to(DOCS) for path in DOCS.rglob("*.md"))
    return [str(path) for path in found if path.parts[0] not in (COPIES.name, "_build")]


def result_folders() -> list[Path]:
    """Return the folders of results that are kept."""
    return sorted(path for path in (ROOT / RESULTS).iterdir() if any(path.glob("*.json")))


def with_links(text: str, place: str, pages: dict[str, str]) -> str:
    """Return a page whose links lead to pages of the site; warn of one that leads to none."""

    def replaced(match: re.Match[str]) -> str:
        parts: list[str] = []
        for part in (PurePosixPath(place).parent / match[1]).parts:
            parts = parts[:-1] if part == ".." else [*parts, part]
        target = "/".join(parts)
        if target not in pages:
            LOG.warning("%s links to %s, which is no page of the site", place, match[1])
            return match[0]
        return f"]({pages[target]})"

    outside_code = re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(
        part if part.startswith("```") else LINK.sub(replaced, part) for part in outside_code
    )


def notebook_with_links(path: Path, pages: dict[str, str]) -> str:
    """Return a notebook, the links in its words replaced."""
    notebook = json.loads(path.read_text())
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = with_links("".join(cell["source"]), f"tutorials/{path.name}", pages)
    return json.dumps(notebook)


def result_lines() -> Iterator[str]:
    """Yield a page of all pictures and numbers."""
    yield "# Pictures and numbers of the benchmarks\n"
    yield "What the tables of the [benchmarks](benchmarks.md) were made from.\n"
    for folder in result_folders():
        place = f"../../{RESULTS}/{folder.name}"
        yield f"(results-{folder.name})=\n## {folder.name}\n"
        for picture in sorted(folder.glob("*.png")):
            yield f"![{folder.name}: {picture.stem}]({place}/{picture.name})\n"
        names = sorted(path.name for path in folder.glob("*.json"))
        files = (f"{{download}}`{name} <{place}/{name}>`" for name in names)
        yield f"Numbers: {', '.join(files)}\n"


def write(name: str, text: str) -> None:
    """Write a copy, if it is another one: Sphinx reads again what is newer."""
    path = COPIES / name
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def setup(app: Sphinx) -> dict[str, bool]:
    """Copy before any page is read."""
    app.connect("config-inited", copy_all)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
