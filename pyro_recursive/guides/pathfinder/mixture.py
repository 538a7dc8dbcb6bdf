"""A mixture of the Gaussians of several paths: duplicates merged, weights by importance weights."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_recursive.bounds.pareto import psis
from pyro_recursive.guides.gaussian_families import Family, Full, scale_tril_of
from pyro_recursive.guides.log_density import LogDensity
from pyro_recursive.guides.pathfinder.gaussians import (
    Gaussians,
    elbos,
    find_gaussians,
    or_minus_inf,
)
from pyro_recursive.guides.whitening import Whitening

SAME = 1.0  # nats of KL in both directions, below which two Gaussians are one
EM_DRAWS, EM_STEPS = 1000, 20  # draws of each component, for the weights
LEAST_WEIGHT = 0.01
DRAWS = 4000  # for ELBO and k-hat at the end


@dataclass(frozen=True)
class PathReport:
    """What paths have found, and what it cost.

    ``elbo`` in nats, with its ``standard_error``, and ``pareto_k`` are of the mixture, by 4000
    draws. ``num_paths`` are the paths whose Gaussian is that of each component, of ``paths`` in
    all. The other paths have no Gaussian with a finite ELBO, or one with a weight below 0.01 or
    that the single best Gaussian replaced. ``num_newton`` of the components come from exact second
    derivatives. Of the model's log-density there were ``num_gradients`` gradients,
    ``num_hessians`` matrices of second derivatives (D more backward passes each), and
    ``num_values`` values without a gradient. The ELBO is -inf, and its error inf, where a draw has
    the density 0.
    """

    elbo: float
    standard_error: float
    pareto_k: float
    weights: tuple[float, ...]
    num_paths: tuple[int, ...]
    paths: int
    num_newton: int
    num_gradients: int
    num_hessians: int
    num_values: int


class PathMixture(NamedTuple):
    """A mixture of J Gaussians, its log-weights ``[J]``, and what is known about it.

    ``log_ratios``, ``[4000]`` in nats, are ``log p - log q`` of its draws.
    """

    gaussians: Gaussians
    log_weights: Tensor
    log_ratios: Tensor
    report: PathReport


def paths_for(modes: int) -> int:
    """Return how many paths find all modes, if of one size, with probability 0.87 or more."""
    return math.ceil(modes * (math.log(modes) + 2))


def mixture_of_paths(
    density: LogDensity,
    paths: int,
    family: Family,
    most: int | None = None,
    whitening: Whitening | None = None,
) -> PathMixture:
    """Return members of a family from paths, ``most`` at most, those with the largest weights.

    The family is one in whitened coordinates, if there are any. A single one is returned where it
    has the higher ELBO. Errors are those of `find_gaussians`.
    """
    found = find_gaussians(density, paths)
    every = _members(family, found.gaussians, whitening)
    of_paths = found.elbo if isinstance(family, Full) else elbos(density, every)
    order = of_paths.argsort(descending=True)
    every = every[order]
    first, counts = _merged(every)
    distinct, is_newton = every[first], found.is_newton[order][first]
    log_weights = distinct.loc.new_zeros(1)
    ratios = _log_ratios(density, distinct[:1], log_weights)
    chosen = torch.zeros(1, dtype=torch.long, device=first.device)
    if len(first) > 1 and most != 1:
        weights = _weights(density, distinct)
        largest = weights.topk(min(most or len(weights), len(weights))).indices
        large = largest[weights[largest] >= LEAST_WEIGHT].sort().values
        log_of_large = weights[large].log().log_softmax(0)
        of_large = _log_ratios(density, distinct[large], log_of_large)
        if bool(of_large.mean() > ratios.mean()):
            chosen, log_weights, ratios = large, log_of_large, of_large
    elbo, error = ratios.mean().item(), ratios.std().item() / len(ratios) ** 0.5
    report = PathReport(
        elbo=elbo,
        standard_error=error if math.isfinite(elbo) else math.inf,
        pareto_k=psis(ratios).pareto_k.item(),
        weights=tuple(log_weights.exp().tolist()),
        num_paths=tuple(counts[chosen].tolist()),
        paths=paths,
        num_newton=int(is_newton[chosen].sum()),
        num_gradients=density.num_gradients,
        num_hessians=density.num_hessians,
        num_values=density.num_values,
    )
    return PathMixture(distinct[chosen], log_weights, ratios, report)


def _members(family: Family, gaussians: Gaussians, whitening: Whitening | None) -> Gaussians:
    """Return the members of a family that take the place of Gaussians."""
    loc, scale_tril = gaussians.loc, gaussians.scale_tril
    if whitening is not None:
        loc, scale_tril = whitening.whitened_gaussian(loc, scale_tril)
    member = family(family.from_gaussian(loc, scale_tril), loc.shape[-1])
    loc, scale_tril = member.mean, scale_tril_of(member)
    if whitening is not None:
        loc, scale_tril = whitening.gaussian(loc, scale_tril)
    return Gaussians(loc, scale_tril)


def _merged(gaussians: Gaussians) -> tuple[Tensor, Tensor]:
    """Return the first of each set of equal Gaussians, and how many these are."""
    is_same = (gaussians.divergence() < SAME).tolist()
    counts: dict[int, int] = {}
    for i, row in enumerate(is_same):
        kept = next((j for j in counts if row[j]), i)
        counts[kept] = counts.get(kept, 0) + 1
    device = gaussians.loc.device
    return torch.tensor([*counts], device=device), torch.tensor([*counts.values()], device=device)


@torch.no_grad()
def _weights(density: LogDensity, gaussians: Gaussians) -> Tensor:
    """Return the weights of a mixture of these Gaussians with the least KL(p || q), by EM.

    On draws of all, with their smoothed importance weights against the mixture of equal weights.
    """
    count, size = gaussians.loc.shape
    like = gaussians.loc
    noise = torch.randn(EM_DRAWS, count, size, dtype=like.dtype, device=like.device)
    u = gaussians.draw(noise).flatten(0, 1)
    table = gaussians.log_prob(u)
    log_w = or_minus_inf(density(u)) - table.logsumexp(-1) + math.log(count)
    w = psis(log_w).log_weights.exp().to(u)
    weights = torch.full_like(gaussians.loc[:, 0], 1 / count)
    for _ in range(EM_STEPS):
        weights = (w[:, None] * (table + weights.log()).softmax(-1)).sum(0)
    return weights


@torch.no_grad()
def _log_ratios(density: LogDensity, gaussians: Gaussians, log_weights: Tensor) -> Tensor:
    """Return ``log p - log q`` of draws of a mixture, ``[DRAWS]``."""
    size, like = gaussians.loc.shape[-1], gaussians.loc
    number = torch.multinomial(log_weights.exp(), DRAWS, replacement=True).sort().values
    noise = torch.randn(DRAWS, size, dtype=like.dtype, device=like.device)
    counts = torch.bincount(number, minlength=len(log_weights)).tolist()
    parts = zip(gaussians.loc, gaussians.scale_tril, noise.split(counts), strict=True)
    u = torch.cat([loc + own @ factor.T for loc, factor, own in parts])
    return or_minus_inf(density(u)) - (gaussians.log_prob(u) + log_weights).logsumexp(-1)
