"""A check of counts, which would otherwise fail late, or do something else in silence."""

import numbers
from typing import Any


def check_at_least(least: int, **counts: Any) -> None:
    """Raise ValueError where an argument (None aside) is no integer of at least ``least``.

    >>> check_at_least(1, num_particles=2.0)
    Traceback (most recent call last):
    ValueError: num_particles must be an integer >= 1, got 2.0.
    """
    for name, count in counts.items():
        is_count = isinstance(count, numbers.Integral) and not isinstance(count, bool)
        if count is not None and (not is_count or count < least):
            raise ValueError(f"{name} must be an integer >= {least}, got {count!r}.")
