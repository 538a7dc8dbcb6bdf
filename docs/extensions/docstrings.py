"""How this package's docstrings are read: what single backticks and indented formulas mean."""

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.domains.python import PythonDomain
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxRole
from sphinx.util.nodes import make_refnode

# Lines which an indented paragraph belongs to.
OWNERS = ("- ", "* ", ":", ">>>", "...", "..")

PARTS = ("attribute", "method", "property", "module")


class Backticks(SphinxRole):
    """A link for a name of this package, emphasis for words: the title of a paper."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Return the node; which names there are is known after all pages have been read."""
        if " " in self.text:
            return [nodes.emphasis(self.rawtext, self.text)], []
        context = {key: self.env.ref_context.get(key) for key in ("py:module", "py:class")}
        options = {"refdomain": "py", "reftype": "obj", "reftarget": self.text, **context}
        text = nodes.literal(self.rawtext, self.text)
        return [pending_xref(self.rawtext, text, refdoc=self.env.docname, **options)], []


def find(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, text: nodes.TextElement
) -> nodes.reference | None:
    """Link a name without its module, where one documented name alone ends in it."""
    if node.get("refdomain") != "py":
        return None
    domain = env.domains["py"]
    assert isinstance(domain, PythonDomain)
    found = {
        name: entry
        for name, entry in domain.objects.items()
        if f".{name}".endswith(f".{node['reftarget']}") and not entry.aliased
    }
    if len(found) > 1:  # a function rather than its module, or a field of what it returns
        found = {name: entry for name, entry in found.items() if entry.objtype not in PARTS}
    if len(found) != 1:
        return None
    ((name, entry),) = found.items()
    place = (app.builder, node["refdoc"], entry.docname, entry.node_id)
    return make_refnode(*place, text, title=name)


def keep_formulas(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Show indented lines after a paragraph as they stand: they are formulas, no quotations."""
    if what in ("attribute", "property"):
        lines.insert(0, "")  # or Napoleon takes what is before a colon for a type
    for number in range(len(lines) - 1, 1, -1):
        first, blank, last = lines[number], lines[number - 1], lines[number - 2]
        if first.startswith("    ") and not blank.strip() and begins_formula(lines, last, number):
            lines[number - 1 : number] = ["", "::", ""]


def begins_formula(lines: list[str], last: str, number: int) -> bool:
    """Tell whether what precedes an indented line is a paragraph of its own."""
    if not last.strip() or last.startswith(" ") or last.endswith("::"):
        return False
    start = number - 2
    while start > 0 and lines[start - 1].strip():
        start -= 1
    return not lines[start].startswith(OWNERS)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register all of it; formulas come before Napoleon's sections."""
    app.add_role("name", Backticks())
    app.connect("missing-reference", find)
    app.connect("autodoc-process-docstring", keep_formulas, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
