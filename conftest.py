"""Every test and doctest starts from a fixed seed and an empty parameter store.

The environment variable ``PYRO_RECURSIVE_SEED_SHIFT`` shifts all seeds of torch by an integer, to
see whether a statistical test holds for other draws.
"""

import os
from collections.abc import Iterator

import pyro
import pytest
import torch

SHIFT = int(os.environ.get("PYRO_RECURSIVE_SEED_SHIFT", "0"))


@pytest.fixture(autouse=True)
def reproducible(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run each test from one seed, with an empty parameter store."""
    if SHIFT:
        seed = torch.manual_seed
        monkeypatch.setattr(torch, "manual_seed", lambda number: seed(int(number) + 10**6 * SHIFT))
    pyro.set_rng_seed(20)
    pyro.clear_param_store()
    yield
