"""A model and a guide with the arguments of one call, and how to run them again on given values."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from pyro_recursive.tracing.sites import Site, check_latent, sites

__all__ = ["Program", "rows_needed", "without"]


@dataclass(frozen=True)
class Program:
    """A model, a guide, and the arguments of this call."""

    model: Callable
    guide: Callable
    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def run_guide(self, replayed: poutine.Trace | None = None) -> poutine.Trace:
        """Trace the guide, with the values of another trace where there is one."""
        handled = self.guide if replayed is None else _Substitute(replayed)(self.guide)
        with rows_needed(self.args, self.kwargs):
            trace = poutine.trace(handled).get_trace(*self.args, **self.kwargs)
        if isinstance(poutine.unwrap(self.guide), Messenger):
            # A guide messenger runs the model too, and what the model observes is not the guide's.
            trace = without(trace, lambda site: site["is_observed"])
        return trace

    def run_model(self, guide: poutine.Trace) -> poutine.Trace:
        """Trace the model on the guide's values."""
        model = _KeepMinibatch()(self.model) if _draws_minibatch(guide) else self.model
        replayed = poutine.replay(model, trace=guide)
        with rows_needed(self.args, self.kwargs):
            try:
                return poutine.trace(replayed).get_trace(*self.args, **self.kwargs)
            except RuntimeError:
                check_latent(guide)  # of a latent that the guide observes Pyro says less
                raise


@contextmanager
def rows_needed(args: tuple, kwargs: dict[str, Any]) -> Iterator[None]:
    """Name the argument without rows where a plate of size 0 is what a run fails at."""
    try:
        yield
    except ZeroDivisionError as error:  # Pyro's, without a name
        named = {**{f"argument {n}": each for n, each in enumerate(args)}, **kwargs}
        empty = [
            f"{name} has shape {list(value.shape)}"
            for name, value in named.items()
            if isinstance(value, torch.Tensor) and not value.numel()
        ]
        if not empty:
            raise
        raise ValueError(
            f"A plate cannot be empty, and {', '.join(empty)}. Leave out batches without rows."
        ) from error


def without(trace: poutine.Trace, unwanted: Callable[[Site], bool]) -> poutine.Trace:
    """Copy a trace, leaving out some of its sites."""
    copy = trace.copy()
    for site in list(sites(trace)):
        if unwanted(site):
            copy.remove_node(site["name"])
    return copy


class _Substitute(Messenger):
    """Gives sites the values of a trace, as `poutine.replay` does.

    Unlike it, leaves `infer` alone: guide messengers keep the prior of their own run there.
    """

    def __init__(self, trace: poutine.Trace) -> None:
        super().__init__()
        self.trace = trace

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.trace.nodes and not msg["is_observed"]:
            msg["value"], msg["done"] = self.trace.nodes[msg["name"]]["value"], True


class _KeepMinibatch(Messenger):
    """Raises where the guide's draw of a minibatch would replace the one that the model was given.

    The innermost handler of the model: it sees an explicit ``subsample`` before `replay` does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.given: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["value"] is not None:
            self.given[msg["name"]] = msg["value"]

    def _pyro_post_sample(self, msg: Any) -> None:
        given = self.given.pop(msg["name"], None)
        if given is None or given is msg["value"] or _equal(given, msg["value"]):
            return
        raise ValueError(
            f"The model was given a minibatch for plate '{msg['name']}', the guide drew another; "
            "its data would belong to other latents. Give the guide the same subsample; to an "
            "autoguide, with create_plates."
        )


def _draws_minibatch(trace: poutine.Trace) -> bool:
    """Whether a trace has a plate with fewer entries than its full size."""
    return any(
        len(site["value"]) < site["fn"].size
        for site in trace.nodes.values()
        if site["type"] == "sample" and site_is_subsample(site)
    )


def _equal(given: Any, replayed: torch.Tensor) -> bool:
    given = torch.as_tensor(given, device=replayed.device)
    return given.shape == replayed.shape and bool((given == replayed).all())
