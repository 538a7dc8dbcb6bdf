"""Whether somebody watches."""

import sys


def stderr_is_watched() -> bool:
    """Whether errors go to a terminal or a notebook, so that progress may be shown there."""
    # A notebook's stream is no terminal, but shows bars. There may be no stream, or any object.
    is_terminal = getattr(sys.stderr, "isatty", bool)()
    return is_terminal or type(sys.stderr).__module__.startswith("ipykernel")
