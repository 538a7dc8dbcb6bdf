"""Indices out of range raise IndexError before an operation does."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pyro_recursive.tracing.index_bounds import IndexBounds

INDEXING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "index": lambda b, i: b[i],
    "mask and index": lambda b, i: torch.stack([b, b])[torch.tensor([True, False]), i],
    "second dim": lambda b, i: b.expand(2, 5)[:, i],
    "index_select": lambda b, i: b.index_select(-1, i),
    "gather": lambda b, i: b.gather(-1, i),
    "take": lambda b, i: b.take(i),
    "embedding": lambda b, i: nn.functional.embedding(i, b[:, None]),
    "index_put": lambda b, i: b.index_put((i,), b[0]),
}


@pytest.mark.parametrize("name", INDEXING)
def test_indices_out_of_range_raise_before_the_operation(name: str) -> None:
    """On a GPU they would raise nothing, and all later calls would fail."""
    of = INDEXING[name]
    b, right = torch.randn(5), torch.tensor([0, 4, 2])
    with IndexBounds():
        found = of(b, right)
        of(b, right[:0] if name != "mask and index" else right)
    assert torch.equal(found, of(b, right))
    for wrong in (5, -6):
        message = f"index {wrong} is out of bounds for a dimension of size 5"
        with IndexBounds(), pytest.raises(IndexError, match=message):
            of(b, torch.tensor([0, wrong, 2]))
