"""Where a network is asked for: an instance, whose parameters are found; no class, no function."""

from typing import Any

from torch import nn

__all__ = ["check_instance", "check_module"]


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
