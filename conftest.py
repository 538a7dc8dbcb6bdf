"""What every test and every doctest shares: a fixed seed and an empty parameter store."""

from collections.abc import Iterator

import pyro
import pytest


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    """Run each test from one seed, with an empty parameter store."""
    pyro.set_rng_seed(20)
    pyro.clear_param_store()
    yield
