"""Which cells of a test with parameters are in the quick loop."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import quick


@dataclass(eq=False)
class Cell:
    """What the hook asks of pytest's items."""

    name: str
    marker: Any

    @property
    def callspec(self) -> Any:
        return SimpleNamespace(id=self.name)

    def get_closest_marker(self, name: str) -> Any:
        return self.marker


def chosen(*wanted: Any) -> set[str]:
    marker = pytest.mark.quick(*wanted).mark if wanted else None
    cells: dict[Any, frozenset] = {Cell(n, marker): frozenset({("letter", n)}) for n in "abcdef"}
    return {cell.name for cell in quick("a test", cells)}


def test_cells_are_named_or_counted() -> None:
    assert chosen() == set("abcdef")
    assert chosen("b", "d") == {"b", "d"}
    assert len(chosen(3)) == 3
    with pytest.raises(pytest.UsageError, match=r"a test: marker quick names no cell by \['x'\]"):
        chosen("b", "x")
