"""The error for programs that cannot be compiled, and its source location."""

import contextlib
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger

from pyro_recursive.tracing.user_warnings import folder_of

# Frames that say nothing about where a program is.
SKIPPED = (
    *map(folder_of, (torch.__file__, poutine.__file__, __file__)),
    str(contextlib.__file__),
)


class Unsupported(NotImplementedError):
    """Says why a run cannot be compiled."""


class LastSite(Messenger):
    """Records the name of the last sample site."""

    name: str | None = None

    def _pyro_sample(self, msg: Any) -> None:
        self.name = msg["name"]


@contextlib.contextmanager
def as_unsupported(site: LastSite | None = None, of: str = "") -> Iterator[None]:
    """Raise Unsupported for any error of the block: says what was raised, at which site and line.

    ``of`` is what the message begins with.
    """
    try:
        yield
    except Unsupported:
        raise
    except Exception as error:
        raise Unsupported(of + _reason(error, site and site.name)) from error


def _reason(error: Exception, site: str | None) -> str:
    """Say in one line what was raised and where."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(SKIPPED)
    ]
    text = " ".join(str(error).split())[:120]
    where = f" at site '{site}'" if site else ""
    line = f" ({frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{where}{line}: {text}"
