"""Normal approximations along the paths of an optimiser, as a mixture guide without training."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_recursive.evaluation.importance import psis
from pyro_recursive.guides.amortized import AmortizedGuide
from pyro_recursive.guides.gaussian_families import (
    Family,
    FamilyName,
    Full,
    family_of,
    scale_tril_of,
)
from pyro_recursive.guides.log_density import LogDensity
from pyro_recursive.guides.mixture import MixtureGuide
from pyro_recursive.guides.pathfinder.gaussians import (
    Gaussians,
    elbos,
    find_gaussians,
    or_minus_inf,
)
from pyro_recursive.guides.starts import StartSearch
from pyro_recursive.tracing.arguments import check_at_least

SAME = 1.0  # nats of KL in both directions, below which two Gaussians are one
EM_DRAWS, EM_STEPS = 1000, 20  # draws of each component, for the weights
LEAST_WEIGHT = 0.01
DRAWS = 4000  # for ELBO and k-hat at the end


@dataclass(frozen=True)
class PathReport:
    """What `pathfinder` found, and what it cost.

    ``elbo`` in nats, with its ``standard_error``, and ``pareto_k`` are of the guide, by 4000 draws.
    ``num_paths`` are the paths whose Gaussian is that of each component, of ``paths`` in all. The
    other paths have no Gaussian with a finite ELBO, or one with a weight below 0.01 or that the
    single best Gaussian replaced. ``num_newton`` of the components come from exact second
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


class PathfinderGuide(MixtureGuide):
    """The mixture of Gaussians that `pathfinder` returns: any loss may train it further.

    ``report`` says what was found; it stays as it is when the guide is trained.
    """

    report: PathReport | None = None

    @property
    def gaussian(self) -> tuple[Tensor, Tensor]:
        """The first component, that of the best path: for ``whiten=`` of another guide.

        Location ``[D]`` and Cholesky factor of the covariance, ``[D, D]``, unconstrained.
        """
        (latents,), first = self.groups, self.component(0)
        posterior = first.family(first.free_global.detach(), latents.size)
        return posterior.mean, scale_tril_of(posterior)

    def extra_repr(self) -> str:
        """Return how many paths found each component, ELBO, k-hat and the number of gradients."""
        r = self.report
        if r is None:
            return ""
        pairs = zip(r.weights, r.num_paths, strict=True)
        parts = ", ".join(f"{weight:.2f} by {count} of {r.paths} paths" for weight, count in pairs)
        return (
            f"components: {parts}; k-hat={r.pareto_k:.2f}, "
            f"ELBO={r.elbo:.2f}±{r.standard_error:.2f}, gradients={r.num_gradients}"
        )


def pathfinder(
    model: Callable,
    *args: Any,
    paths: int = 8,
    family: FamilyName | Family = "full",
    name: str | None = None,
    **kwargs: Any,
) -> PathfinderGuide:
    """Return a mixture of Gaussians that L-BFGS finds on its way to the modes, without training.

    From each of several starts the optimiser's own estimates of the curvature give a Gaussian at
    each point of its path, and exact second derivatives one at the end. The one with the highest
    ELBO is the answer of a path. Equal answers are merged; weights follow from importance weights
    of draws against the whole mixture, and a single Gaussian is returned where it has the higher
    ELBO. All paths run at once. ``print`` shows how many found each component, and k-hat: above 0.7
    the guide is a start for training, not an approximation to trust.

    Args:
        model: with continuous latents; flat priors and enumerated latents are allowed.
        args, kwargs: the model's arguments: all data, not a minibatch.
        paths: how many. Of M modes of one size, about M (log M + 2) paths find all
            with probability 0.87 or more.
        family: of the Gaussians: ``"full"``, ``"diagonal"``, or a
            `pyro_recursive.guides.gaussian_families.Family` such as ``LowRank(2)``.
        name: as in `AmortizedGuide`.

    Raises:
        ValueError: a plate is subsampled, no start has a finite density, or no path a Gaussian with
            a finite ELBO.
        NotImplementedError: a latent has no unconstrained coordinates.

    `Pathfinder: Parallel quasi-Newton variational inference` (Zhang et al., arXiv 2108.03782).

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     z = pyro.sample("z", dist.Normal(0.0, 3.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(z**2, 0.5), obs=x)
    >>> guide = pathfinder(model, torch.tensor([3.9, 4.2]))
    >>> len(guide.components), guide.report.pareto_k < 0.7
    (2, True)
    """
    check_at_least(1, paths=paths)
    family = family_of(family)
    density = LogDensity(model, args, kwargs, StartSearch(model, args, kwargs).trace)
    found = find_gaussians(density, paths)
    every = _members(family, found.gaussians)
    of_paths = found.elbo if isinstance(family, Full) else elbos(density, every)
    order = of_paths.argsort(descending=True)
    every = every[order]
    first, counts = _merged(every)
    distinct, is_newton = every[first], found.is_newton[order][first]
    log_weights = distinct.loc.new_zeros(1)
    elbo = _log_ratios(density, distinct[:1], log_weights)
    chosen = torch.zeros(1, dtype=torch.long, device=first.device)
    if len(first) > 1:
        weights = _weights(density, distinct)
        large = (weights >= LEAST_WEIGHT).nonzero().squeeze(-1)
        log_of_large = weights[large].log().log_softmax(0)
        ratios = _log_ratios(density, distinct[large], log_of_large)
        if bool(ratios.mean() > elbo.mean()):
            chosen, log_weights, elbo = large, log_of_large, ratios
    guide = _guide(model, args, kwargs, density, family, distinct[chosen], log_weights, name)
    mean, error = elbo.mean().item(), elbo.std().item() / DRAWS**0.5
    guide.report = PathReport(
        elbo=mean,
        standard_error=error if math.isfinite(mean) else math.inf,
        pareto_k=psis(elbo).pareto_k.item(),
        weights=tuple(log_weights.exp().tolist()),
        num_paths=tuple(counts[chosen].tolist()),
        paths=paths,
        num_newton=int(is_newton[chosen].sum()),
        num_gradients=density.num_gradients,
        num_hessians=density.num_hessians,
        num_values=density.num_values,
    )
    return guide


def _members(family: Family, gaussians: Gaussians) -> Gaussians:
    """Return the members of a family that take the place of Gaussians."""
    size = gaussians.loc.shape[-1]
    member = family(family.from_gaussian(gaussians.loc, gaussians.scale_tril), size)
    return Gaussians(member.mean, scale_tril_of(member))


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


def _guide(
    model: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    density: LogDensity,
    family: Family,
    gaussians: Gaussians,
    log_weights: Tensor,
    name: str | None,
) -> PathfinderGuide:
    """Return the mixture as a guide that starts at its first component."""
    at = density.values(gaussians.loc[0])
    slots = {slot.name: slot for slot in density.block.slots}

    def init_loc_fn(site: Any) -> Tensor:
        return slots[site["name"]].of(site["fn"]).transform(at[site["name"]])

    components = [AmortizedGuide(model, family=family) for _ in log_weights]
    guide = PathfinderGuide(model, components, init_loc_fn=init_loc_fn, name=name)
    guide.prepare(*args, **kwargs)
    (latents,) = guide.groups
    for component, loc, scale_tril in zip(
        components, gaussians.loc, gaussians.scale_tril, strict=True
    ):
        component.set_gaussian(latents, loc, scale_tril)
    guide.weights.set_shared(log_weights)
    guide.init_loc_fn = None  # which a pickle could not hold
    return guide
