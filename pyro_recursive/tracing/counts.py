"""What a number of samples, steps, epochs or rows must be: a whole number, and not too small."""

import numbers
from typing import Any

__all__ = ["check_at_least", "check_integers", "is_count"]


def is_count(value: Any) -> bool:
    """Return whether a value is an integer, also of NumPy; True and False are answers, not counts.

    >>> is_count(3), is_count(3.0), is_count(True)
    (True, False, False)
    """
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_at_least(least: int, **given: Any) -> None:
    """Raise where a number is given (None is not) and no integer of at least ``least``.

    :raises ValueError: naming the argument, and what was got

    >>> check_at_least(1, num_particles=2.0)
    Traceback (most recent call last):
    ValueError: num_particles must be an integer >= 1, got 2.0.
    """
    for name, number in given.items():
        if number is not None and (not is_count(number) or number < least):
            raise ValueError(f"{name} must be an integer >= {least}, got {number!r}.")


def check_integers(**given: Any) -> None:
    """Raise where a number is given and no integer.

    :raises ValueError: naming the argument, and what was got
    """
    for name, number in given.items():
        if number is not None and not is_count(number):
            raise ValueError(f"{name} must be an integer, got {number!r}.")
