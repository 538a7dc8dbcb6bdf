"""Checks of arguments that would otherwise fail late, or do something else in silence."""

import numbers
from typing import Any

from torch import nn


def is_count(value: Any) -> bool:
    """Return whether a value is an integer, of Python or NumPy, and no bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_at_least(least: int, **counts: Any) -> None:
    """Raise ValueError where an argument (None aside) is no integer of at least ``least``.

    >>> check_at_least(1, num_particles=2.0)
    Traceback (most recent call last):
    ValueError: num_particles must be an integer >= 1, got 2.0.
    """
    for name, count in counts.items():
        if count is not None and (not is_count(count) or count < least):
            raise ValueError(f"{name} must be an integer >= {least}, got {count!r}.")


def check_instance(name: str, value: Any) -> None:
    """Raise TypeError where an argument is a class: called with data, it would be constructed."""
    if isinstance(value, type):
        raise TypeError(f"{name} must be an instance, got the class {value.__name__}.")


def check_module(name: str, value: Any) -> None:
    """Raise TypeError where an argument (None aside) is no module: it would not be trained."""
    check_instance(name, value)
    if value is not None and not isinstance(value, nn.Module):
        got = getattr(value, "__name__", type(value).__name__)
        raise TypeError(
            f"{name} must be a torch module, got {got}. Call a function in the forward() of a "
            "module with its parameters."
        )
