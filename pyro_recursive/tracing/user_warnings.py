"""Warnings that point at the line of the user's program."""

import os
import sys
import warnings
from pathlib import Path

import pyro
import torch


def folder_of(file: str | Path | None) -> str:
    """Return the folder of a file, with a separator at its end."""
    return f"{Path(str(file)).parent}{os.sep}"


_INSIDE = tuple(map(folder_of, (Path(__file__).parent, pyro.__file__, torch.__file__)))


def warn_user(message: str) -> None:
    """Warn at the innermost line outside of this package, Pyro and torch."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
