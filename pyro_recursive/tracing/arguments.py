"""Checks of arguments that would otherwise fail late, or do something else in silence."""

import numbers
from typing import Any

from torch import nn


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


def check_module(name: str, value: Any) -> None:
    """Raise where an argument is given (None is not) and no torch module.

    The parameters of anything else would not be found, nor trained.

    :raises TypeError: naming the argument, what was got, and the remedy

    >>> check_module("encoder", nn.Linear)
    Traceback (most recent call last):
    TypeError: encoder must be a torch module, got the class Linear: make an instance, Linear(...).
    """
    check_instance(name, value, "torch module")
    if value is None or isinstance(value, nn.Module):
        return
    got, remedy = f"a {type(value).__name__}", ""
    if callable(value):
        got = f"the function {value.__name__}" if hasattr(value, "__name__") else got
        remedy = ": call it in the forward() of a module that holds its parameters"
    raise TypeError(f"{name} must be a torch module, got {got}{remedy}.")


def check_instance(name: str, value: Any, what: str = "module or function") -> None:
    """Raise where an argument is a class: called with data, it would make an instance of them.

    :raises TypeError: naming the argument and the class
    """
    if isinstance(value, type):
        raise TypeError(
            f"{name} must be a {what}, got the class {value.__name__}: make an instance, "
            f"{value.__name__}(...)."
        )
