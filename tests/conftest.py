"""What every test shares beyond doctests: float64, one thread, and which of its cells are quick."""

import gc
import math
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from typing import Any
from zlib import crc32

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


@pytest.fixture(scope="module", autouse=True)
def short_collections() -> None:
    """Keep what is alive between two modules of tests out of later collections of garbage.

    Imports, collected tests and what torch caches of compiled graphs took a fifth of the time.
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    """Mark the cells of a test slow that the quick loop leaves out."""
    has_all_cells = not any("[" in each for each in config.args)  # none is asked for by its id
    for name, group in groupby(items, lambda item: item.nodeid.partition("[")[0]):
        cells = {
            item: values(item)
            for item in group
            if hasattr(item, "callspec") and not item.get_closest_marker("slow")
        }
        for item in cells.keys() - quick(name, cells, has_all_cells):
            item.add_marker("slow")


def quick(name: str, cells: dict[Any, frozenset], has_all_cells: bool = True) -> set[Any]:
    """Choose the cells that a marker `quick` names, or those that cover each value.

    Of the latter as many as the marker says, from a start that depends on the test: tests over the
    same rows take different ones. A name that is no cell's is an error.
    """
    chosen = covering(cells)
    marker = next((item.get_closest_marker("quick") for item in cells), None)
    if marker is None:
        return chosen
    if isinstance(marker.args[0], str):
        named = {item.callspec.id: item for item in cells if item.callspec.id in marker.args}
        if has_all_cells and (unknown := set(marker.args) - named.keys()):
            raise pytest.UsageError(f"{name}: marker quick names no cell by {sorted(unknown)}.")
        return set(named.values())
    step = math.ceil(len(chosen) / marker.args[0])
    ordered = [item for item in cells if item in chosen]
    return set(ordered[crc32(name.encode()) % step :: step]) if step > 1 else chosen


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
