"""The progress bar of `fit`: where somebody watches it."""

import sys

from tqdm import tqdm

__all__ = ["progress_bar", "show_losses"]


def progress_bar(total: int | None, done: int, wanted: bool) -> tqdm:
    """Return a bar over steps; without a terminal or notebook, in a log file say, it is silent."""
    return tqdm(total=total, initial=done, unit="step", disable=not (wanted and _is_watched()))


def show_losses(bar: tqdm, **values: float | None) -> None:
    """Show the last epoch's losses, in nats."""
    bar.set_postfix({name: f"{v:.2f}" for name, v in values.items() if v is not None})


def _is_watched() -> bool:
    """Whether errors, to which bars are written, go to a terminal or to a notebook."""
    # A notebook's stream says that it is no terminal, and yet shows bars.
    is_terminal = getattr(sys.stderr, "isatty", bool)()  # there may be no stream, or any object
    return is_terminal or type(sys.stderr).__module__.startswith("ipykernel")
