"""Classical models with awkward posteriors, and what is known about them by quadrature."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

CLUSTERS = 3
POINTS_PER_CLUSTER = 8
EFFECTS = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
ERRORS = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)
CHUNK = 100_000  # points of a grid evaluated at once
Draws = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """A model with what is known about its posterior.

    ``mode_of`` tells in which of ``modes`` each draw lies; ``view`` gives what is drawn, one or two
    coordinates, and ``reference`` the log-density of those over a grid (up to a constant). ``draw``
    gives so many draws from the posterior on the grid.
    """

    title: str
    model: Callable[[], None]
    components: int
    modes: int
    log_evidence: float
    mode_of: Callable[[Draws], Tensor]
    view: Callable[[Draws], Tensor]
    axes: tuple[tuple[str, float, float], ...]
    reference: Tensor
    draw: Callable[[int], Draws] | None = None  # by quadrature


def labels() -> Problem:
    """The means of three clusters, which no prior tells apart."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([-3.0, 0.0, 3.0]).repeat(POINTS_PER_CLUSTER)
    noise = torch.randn(len(centres), generator=generator, dtype=torch.float32)
    x = centres + noise.to(centres)

    def model() -> None:
        means = pyro.sample("means", dist.Normal(torch.zeros(CLUSTERS), 5.0).to_event(1))
        with pyro.plate("data", len(x)):
            clusters = dist.Categorical(logits=torch.zeros(CLUSTERS))
            pyro.sample("x", dist.MixtureSameFamily(clusters, dist.Normal(means, 1.0)), obs=x)

    orders = {order: i for i, order in enumerate(permutations(range(CLUSTERS)))}

    def mode_of(draws: Draws) -> Tensor:
        return torch.tensor([orders[tuple(o)] for o in draws["means"].argsort(-1).tolist()])

    axis = torch.linspace(-9, 9, 110)
    grid = torch.cartesian_prod(*[axis] * CLUSTERS)
    log_p = log_joint(model, {"means": grid}).reshape([len(axis)] * CLUSTERS)
    step = (axis[1] - axis[0]).item()
    return Problem(
        title="label switching: means of 3 clusters",
        model=model,
        components=math.factorial(CLUSTERS),
        modes=math.factorial(CLUSTERS),
        log_evidence=log_p.logsumexp((0, 1, 2)).item() + CLUSTERS * math.log(step),
        mode_of=mode_of,
        view=lambda draws: draws["means"][:, :2],
        axes=(("mean 1", -9.0, 9.0), ("mean 2", -9.0, 9.0)),
        reference=log_p.logsumexp(2),
        draw=lambda count: {"means": _on_grid(grid, log_p, step, count)},
    )


def square() -> Problem:
    """A square has two roots."""
    x = torch.tensor([4.5, 3.2, 4.3])

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z**2, 1.0), obs=x)

    axis = torch.linspace(-4, 4, 2001)
    log_p = log_joint(model, {"z": axis})
    return Problem(
        title="x ~ N(z², 1)",
        model=model,
        components=3,
        modes=2,
        log_evidence=log_p.logsumexp(0).item() + math.log((axis[1] - axis[0]).item()),
        mode_of=lambda draws: (draws["z"] > 0).long(),
        view=lambda draws: draws["z"][:, None],
        axes=(("z", -4.0, 4.0),),
        reference=log_p,
        draw=lambda count: {"z": _on_grid(axis, log_p, (axis[1] - axis[0]).item(), count)},
    )


def schools() -> Problem:
    """The eight schools of Rubin (1981), with effects in units of tau."""
    effects, errors = torch.tensor(EFFECTS), torch.tensor(ERRORS)

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", len(effects)):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * theta, errors), obs=effects)

    log_tau, mu = torch.linspace(-9, 8, 1701), torch.linspace(-25, 30, 551)
    tau = log_tau.exp()[:, None, None]
    given = dist.Normal(mu[:, None], (errors.square() + tau.square()).sqrt())  # without theta
    log_p = given.log_prob(effects).sum(-1) + dist.Normal(0.0, 5.0).log_prob(mu)
    log_p = log_p + (dist.HalfCauchy(5.0).log_prob(log_tau.exp()) + log_tau)[:, None]
    cell = (mu[1] - mu[0]).item() * (log_tau[1] - log_tau[0]).item()
    return Problem(
        title="eight schools, not centred",
        model=model,
        components=4,
        modes=1,
        log_evidence=log_p.logsumexp((0, 1)).item() + math.log(cell),
        mode_of=lambda draws: torch.zeros(len(draws["mu"]), dtype=torch.long),
        view=lambda draws: torch.stack([draws["tau"].log(), draws["mu"]], -1),
        axes=(("log tau", -9.0, 8.0), ("mu", -25.0, 30.0)),
        reference=log_p,
    )


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "labels": labels,
    "square": square,
    "schools": schools,
}


def _on_grid(grid: Tensor, log_p: Tensor, step: float, count: int) -> Tensor:
    """Return draws ``[count, *shape]`` from cells around the points ``[G, *shape]`` of a grid."""
    generator = torch.Generator().manual_seed(0)
    weights = log_p.flatten().softmax(0)
    at = grid[torch.multinomial(weights, count, replacement=True, generator=generator)]
    return at + step * (torch.rand(at.shape, generator=generator) - 0.5)


@torch.no_grad()
def log_joint(model: Callable[[], None], points: Draws) -> Tensor:
    """Return log p(x, z) at points ``[count, *event]`` of each site, ``[count]``."""
    parts = []
    (name, values), *_ = points.items()
    for chunk in values.split(CHUNK):
        at = poutine.condition(model, {name: chunk[:, None]})
        with pyro.plate("points", len(chunk), dim=-2):
            trace = poutine.trace(at).get_trace()
        trace = prune_subsample_sites(trace)
        trace.compute_log_prob()
        terms = [s["log_prob"] for s in trace.nodes.values() if s["type"] == "sample"]
        parts.append(sum(term.expand(len(chunk), -1).sum(-1) for term in terms))
    return torch.cat(parts)
