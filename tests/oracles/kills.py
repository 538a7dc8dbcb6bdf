"""Processes that are killed by SIGKILL, and started again where they were."""

import multiprocessing
import signal
from collections.abc import Callable
from typing import Any


def count_kills(live: Callable[..., None], args: tuple[Any, ...], times: list[float]) -> int:
    """Call a function in forked children, killed after each of some seconds, the last one never.

    Return the number of kills before a child came to its end.
    """
    kills = 0
    for seconds in [*times, None]:
        child = multiprocessing.get_context("fork").Process(target=live, args=args)
        child.start()
        child.join(seconds)
        child.kill()
        child.join()
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL, f"{args} failed when it was resumed"
        kills += 1
    return kills
