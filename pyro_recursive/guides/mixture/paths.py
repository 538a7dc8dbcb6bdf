"""Components of a growing mixture from the paths of an optimiser, where its model is fixed."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_recursive.bounds.pareto import psis
from pyro_recursive.guides.amortized import AmortizedGuide
from pyro_recursive.guides.log_density import LogDensity
from pyro_recursive.guides.mixture.guide import MixtureGuide
from pyro_recursive.guides.pathfinder.mixture import (
    PathMixture,
    mixture_of_paths,
    paths_for,
)
from pyro_recursive.guides.starts import StartSearch
from pyro_recursive.tracing.isolation import isolated
from pyro_recursive.tracing.param_store import unconstrained
from pyro_recursive.tracing.user_warnings import warn_user

LEAST_PATHS = 8
RELIABLE = 0.5  # k-hat
NOTHING_LEFT = 0.005  # nats between the ELBO and log p(x)

logger = logging.getLogger(__name__)


def obstacle(guide: MixtureGuide) -> str:
    """Return why components cannot start from paths; nothing where they can."""
    components, (first, *_) = guide.components, guide.components
    for component in components:
        if not isinstance(component, AmortizedGuide) or component.by_row:
            return "a component is no Gaussian with parameters of its own"
        if component.family != first.family:
            return "the components are of several families"
    if any(part.init_loc_fn is not None for part in (guide, *components)):
        return "init_loc_fn= says where they start"
    if not guide.weights.learn:
        return "learn_weights=False keeps the weights"
    if len(guide.groups) > 1 or any(latents.rows for latents in guide.groups):
        return "rows have Gaussians of their own"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "each process has data of its own"
    return ""


def gaussians_from_paths(
    guide: MixtureGuide, paths: int | None, args: tuple, kwargs: dict[str, Any]
) -> PathMixture | None:
    """Return at most as many Gaussians as a guide has components; None where there are none.

    By default there are paths for as many modes as components.

    Raises:
        ValueError: ``paths`` are given, and components cannot start from paths.
    """
    density = obstacle(guide) or _density(guide, args, kwargs)
    if isinstance(density, LogDensity) and paths is None and not density.is_vectorized:
        density = "the model runs for each point by itself"
    if isinstance(density, str):
        if paths is not None:
            raise ValueError(f"Components cannot start from {paths} paths: {density}.")
        logger.info("Components do not start from paths: %s.", density)
        return None
    count = len(guide.components)
    paths = paths or max(LEAST_PATHS, paths_for(count))
    try:
        family, whitening = guide.component(0).family, guide.groups[0].whitening
        found = mixture_of_paths(density, paths, family, count, whitening)
    except ValueError as error:
        warn_user(f"{guide.name} grows from its start, as paths have found nothing: {error}")
        return None
    logger.info("Components from paths: %s", found.report)
    return found


def _density(guide: MixtureGuide, args: tuple, kwargs: dict[str, Any]) -> LogDensity | str:
    """Return the log-density of a guide's model, or why it is not one function."""
    model, trace = guide.served_model(), _trace(guide, args, kwargs)
    if learned := _learned(trace):
        return f"the model has parameter '{learned[0]}'"
    try:
        density = LogDensity(model, args, kwargs, trace)
    except (ValueError, NotImplementedError) as error:
        return str(error).removesuffix(".")
    names = [[slot.name for slot in block.slots] for block in (density.block, guide.groups[0])]
    return density if names[0] == names[1] else "the guide leaves out latents of the model"


def learned_params(guide: MixtureGuide, args: tuple, kwargs: dict[str, Any]) -> list[str]:
    """Return the names of the model's parameters that learn."""
    return _learned(_trace(guide, args, kwargs))


def _trace(guide: MixtureGuide, args: tuple, kwargs: dict[str, Any]) -> poutine.Trace:
    with isolated():
        return StartSearch(guide.served_model(), args, kwargs).trace


def _learned(trace: poutine.Trace) -> list[str]:
    params = [site for site in trace.nodes.values() if site["type"] == "param"]
    return [site["name"] for site in params if unconstrained(site["value"]).requires_grad]


def is_complete(log_ratios: Tensor, num_paths: Sequence[int], least: float) -> bool:
    """Whether hardly anything is left to gain, and no more modes are to be expected.

    The first by ``log p - log q`` of draws, ``[S]``, as weights that k-hat calls reliable; the
    other where no Gaussian was found by one path alone (``num_paths`` of each): their share of the
    paths estimates that of paths which would find others (Good and Turing).
    """
    gap = log_ratios.logsumexp(0) - math.log(len(log_ratios)) - log_ratios.mean()
    is_close = bool(gap < max(least, NOTHING_LEFT)) and min(num_paths) > 1
    return is_close and bool(psis(log_ratios).pareto_k < RELIABLE)
