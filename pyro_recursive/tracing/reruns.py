"""What a guide is told about its runs: that there will be another one, that nobody trains it."""

from typing import Any

from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import effectful

__all__ = ["DryRun", "RunCache", "is_dry_run", "run_cache"]


@effectful(type="kept")
def run_cache() -> dict[Any, Any] | None:
    """Return a place for what need not be computed twice; None where the guide runs once.

    Both runs have the same random state, the second is given the values of the first. Only for what
    does not depend on these.
    """
    return None


class RunCache(Messenger):
    """Gives guides the place that `run_cache` returns, with what is in it already."""

    def __init__(self, content: dict[Any, Any] | None = None) -> None:
        super().__init__()
        self.content = {} if content is None else content

    def _pyro_kept(self, msg: Any) -> None:
        msg["value"], msg["done"] = self.content, True


@effectful(type="look")
def is_dry_run() -> bool:
    """Return whether this run only shows what the guide is made of: nothing should come of it."""
    return False


class DryRun(Messenger):
    """Tells guides that somebody is only looking."""

    def _pyro_look(self, msg: Any) -> None:
        msg["value"], msg["done"] = True, True
