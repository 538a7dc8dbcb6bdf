"""What every test shares beyond doctests: float64, one thread, and which of its cells are quick."""

import gc
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def double_precision(reproducible: None) -> Iterator[None]:
    """Run each test in float64."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


def pytest_collection_finish() -> None:
    """Keep what was imported and collected out of every later collection of garbage."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Mark the cells of a test slow that `quick` does not name, or that cover no new value."""
    for item in items:
        quick = item.get_closest_marker("quick")
        if quick and item.callspec.id not in quick.args:
            item.add_marker("slow")
    for _, group in groupby(items, lambda item: item.nodeid.partition("[")[0]):
        cells = {
            item: values(item)
            for item in group
            if hasattr(item, "callspec") and not item.get_closest_marker("slow")
        }
        for item in cells.keys() - covering(cells):
            item.add_marker("slow")


def values(item: Any) -> frozenset[tuple[str, int]]:
    """Return a cell's parameters: each one's name, and which of its objects the value is."""
    return frozenset((name, id(value)) for name, value in item.callspec.params.items())


def covering(cells: dict[Any, frozenset]) -> set[Any]:
    """Choose cells in which each value of each parameter occurs, about as often as the others.

    Each time, a cell with most values that no chosen one has; of these one whose values have been
    chosen least.
    """
    missing, uses, chosen = set().union(*cells.values()), Counter[Any](), set[Any]()
    while missing:
        best = max(
            cells, key=lambda cell: (len(cells[cell] & missing), -sum(uses[v] for v in cells[cell]))
        )
        missing -= cells[best]
        uses.update(cells[best])
        chosen.add(best)
    return chosen
