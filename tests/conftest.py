"""What every test shares beyond doctests: float64, and one thread, as tensors are small."""

from collections.abc import Iterator

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
