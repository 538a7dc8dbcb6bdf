"""Warnings that point at the line of the user's program."""

import os
import sys
import warnings
from pathlib import Path

import pyro
import torch

_PACKAGE = Path(__file__).parents[1]
_INSIDE = tuple(
    f"{folder}{os.sep}"
    for folder in (_PACKAGE, *(Path(str(each.__file__)).parent for each in (pyro, torch)))
)


def warn_user(message: str) -> None:
    """Warn at the innermost line outside of this package, Pyro and torch."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
