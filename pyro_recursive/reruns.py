"""What a guide keeps from its first run for its second, where a loss runs it twice in one step."""

from typing import Any

from pyro.poutine.runtime import effectful

__all__ = ["kept"]


@effectful(type="kept")
def kept() -> dict[Any, Any] | None:
    """Return a place for what need not be computed twice; None where the guide runs once.

    Both runs have the same random state, the second is given the values of the first. Only for what
    does not depend on these.
    """
    return None
