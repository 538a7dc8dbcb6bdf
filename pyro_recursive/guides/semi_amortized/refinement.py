"""Refinement: T steps of an update from the numbers that an encoder found for each row."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.distributions import kl_divergence
from torch.utils.checkpoint import checkpoint

from pyro_recursive.guides.row_families import GaussianRows, RowFamily
from pyro_recursive.guides.semi_amortized.row_elbo import LocalBound
from pyro_recursive.guides.semi_amortized.updates import Update

__all__ = ["Trajectory", "divergence", "refine"]


@dataclass(frozen=True)
class Trajectory:
    """The way of the rows: ``visited`` has each step's numbers and gradient, ``[*batch, P]``."""

    visited: list[tuple[Tensor, Tensor]]
    numbers: Tensor


def refine(
    target: LocalBound,
    update: Update,
    numbers: Tensor,
    noise: Tensor,
    features: Tensor | None = None,
    twice: bool = False,
    recompute: bool = False,
) -> Trajectory:
    """Take a step of ``update`` for each entry of ``noise``, ``[T, S, J, *batch, n]``.

    Gradients are constants; with ``twice`` they have a graph, so that the steps can be
    differentiated, and with ``recompute`` each step's graph is built anew in the backward pass.
    """
    step = partial(_step, target, update, features, twice)
    if twice and recompute:
        step = partial(checkpoint, step, use_reentrant=False)
    state, visited = None, []
    for each in noise:
        following, state, gradient = step(numbers, state, each)
        visited.append((numbers, gradient))
        numbers = following
    return Trajectory(visited, numbers)


def _step(
    target: LocalBound,
    update: Update,
    features: Tensor | None,
    twice: bool,
    numbers: Tensor,
    state: Any,
    noise: Tensor,
) -> tuple[Tensor, Any, Tensor]:
    gradient = target.gradient(numbers, noise, create_graph=twice)
    following, state = update(numbers, gradient, state, target.family.blocks, features)
    return following, state, gradient


def divergence(family: RowFamily, first: Tensor, second: Tensor, noise: Tensor) -> Tensor:
    """Return ``KL(q(first) || q(second))`` of each row in nats, ``[*batch, P]`` to ``[*batch]``.

    In closed form for Gaussians, else from draws of ``first``, ``[S, J, *batch, n]``.
    """
    if isinstance(family, GaussianRows):
        return kl_divergence(family.distribution(first), family.distribution(second))
    u, log_first = family.scored_draw(first, noise)
    gap = log_first - family.log_prob(second, u)
    return (family.log_weights(first).exp() * gap).sum(1).mean(0)
