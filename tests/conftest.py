"""What every test shares: float64, a fixed seed and an empty parameter store."""

from collections.abc import Iterator

import pyro
import pytest
import torch


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    """Run each test in float64, from one seed, with an empty parameter store."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(20)
    pyro.clear_param_store()
    yield
    torch.set_default_dtype(default)
