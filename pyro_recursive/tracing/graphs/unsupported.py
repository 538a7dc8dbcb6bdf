"""What a graph cannot hold, and where the program was that wanted it."""

import traceback
from typing import Any

from pyro.poutine.messenger import Messenger

# Frames that say nothing about where a program is.
SKIPPED = ("/torch/", "/pyro/poutine/", "/contextlib.py", __file__.rpartition("/")[0])


class Unsupported(NotImplementedError):
    """Says why a run cannot be compiled."""


class LastSite(Messenger):
    """Knows the site that a program has reached."""

    name: str | None = None

    def _pyro_sample(self, msg: Any) -> None:
        self.name = msg["name"]


def reason(error: Exception, site: str | None) -> str:
    """Say in one line what was raised and where."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not any(part in frame.filename for part in SKIPPED)
    ]
    text = " ".join(str(error).split())[:120]
    where = f" at site '{site}'" if site else ""
    line = f" ({frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{where}{line}: {text}"
