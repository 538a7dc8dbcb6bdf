"""Checks of arguments: what is got stands in the message."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from torch import nn

from pyro_recursive.tracing.arguments import check_at_least, check_module, is_count


@pytest.mark.parametrize(
    ("value", "expected"),
    [(3, True), (np.int64(3), True), (3.0, False), (True, False), ("3", False)],
)
def test_counts(value: Any, expected: bool) -> None:
    assert is_count(value) is expected


@pytest.mark.parametrize("value", [0, 1.0, True])
def test_too_few(value: Any) -> None:
    check_at_least(1, num_draws=None, num_particles=1)
    with pytest.raises(ValueError, match=rf"num_draws must be an integer >= 1, got {value}\."):
        check_at_least(1, num_draws=value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (nn.Linear, "an instance, got the class Linear"),
        (len, "a torch module, got len"),
        (3, "int"),
    ],
)
def test_modules(value: Callable, message: str) -> None:
    check_module("encoder", None)
    check_module("encoder", nn.Linear(1, 1))
    with pytest.raises(TypeError, match=f"encoder must be .*{message}"):
        check_module("encoder", value)
