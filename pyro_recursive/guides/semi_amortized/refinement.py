"""The refinement loop: steps of an update on the rows' parameters, and distances between them."""

from functools import partial
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributions import kl_divergence
from torch.utils.checkpoint import checkpoint

from pyro_recursive.guides.row_families import GaussianRows, RowFamily
from pyro_recursive.guides.semi_amortized.row_elbo import LocalBound
from pyro_recursive.guides.semi_amortized.updates import Update


class Trajectory(NamedTuple):
    """The rows' parameters before and after each step, T + 1 times ``[*batch, P]``.

    ``gradients`` are those of the T steps; ``encoder_term`` is the encoder's objective beside the
    bound, ``[*batch]``, if it has one.
    """

    points: list[Tensor]
    gradients: list[Tensor]
    encoder_term: Tensor | None = None

    @property
    def params(self) -> Tensor:
        """The refined parameters, ``[*batch, P]``."""
        return self.points[-1]


def refine(
    target: LocalBound,
    update: Update,
    params: Tensor,
    noise: Tensor,
    features: Tensor | None = None,
    twice: bool = False,
    recompute: bool = False,
) -> Trajectory:
    """Take a step of ``update`` for each entry of ``noise``, ``[T, S, J, *batch, n]``.

    Gradients are constants. With ``twice`` they have a graph, so that the steps can be
    differentiated; with ``recompute`` each step's graph is built again in the backward pass.
    """

    def step(params: Tensor, state: Any, noise: Tensor) -> tuple[Tensor, Any, Tensor]:
        gradient = target.gradient(params, noise, create_graph=twice)
        return *update(params, gradient, state, target.family.blocks, features), gradient

    take = partial(checkpoint, step, use_reentrant=False) if twice and recompute else step
    points, gradients, state = [params], [], None
    for each in noise:
        params, state, gradient = take(params, state, each)
        points.append(params)
        gradients.append(gradient)
    return Trajectory(points, gradients)


def divergence(family: RowFamily, first: Tensor, second: Tensor, noise: Tensor) -> Tensor:
    """Return ``KL(q(first) || q(second))`` of each row in nats, ``[*batch, P]`` to ``[*batch]``.

    In closed form for Gaussians, else from draws of ``first``, ``[S, J, *batch, n]``.
    """
    if isinstance(family, GaussianRows):
        return kl_divergence(family.distribution(first), family.distribution(second))
    u, log_first = family.scored_draw(first, noise)
    gap = log_first - family.log_prob(second, u)
    return (family.log_weights(first).exp() * gap).sum(1).mean(0)
