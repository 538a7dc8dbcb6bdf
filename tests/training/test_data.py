"""Minibatches of tensors and DataLoaders."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from pyro_recursive.training.data import Minibatches
from tests.oracles.bitwise import same


@pytest.mark.parametrize(
    ("batch_size", "sizes"), [(5, [5, 5]), (12, [12]), (20, [12]), (4, [4] * 3)]
)
def test_even_minibatches(batch_size: int, sizes: list[int]) -> None:
    batches = Minibatches(torch.randn(12, 2), batch_size, shuffle=False).again()
    assert [len(x) for (x,) in batches] == sizes
    assert batches.count == len(sizes)
    assert batches.generators


def test_validation_rows() -> None:
    x, y = torch.arange(10.0), torch.arange(10)
    held_out = Minibatches((x, y), 3, shuffle=False)
    first = held_out.choose(4)
    assert same(first, held_out.choose(4))
    assert torch.equal(first[0].long(), first[1])
    assert len(set(first[1].tolist())) == 4
    assert same(held_out.choose(99), (x, y))
    batches = Minibatches(DataLoader(TensorDataset(x, y), 3))
    assert same(batches.choose(4), (x[:4], y[:4]))
    assert same(batches.choose(99), (x, y))
