"""Classical models whose priors are wide, sparse or constrained, for guides of global latents."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch

AT_BATS = 45
HITS = (18, 17, 16, 15, 14, 14, 13, 12, 11, 11, 10, 10, 10, 10, 10, 9, 8, 7)
GROUPS, EACH = 12, 6
COUNTS = (17.0, 9.0, 3.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def baseball() -> None:
    """Batting averages of 18 players, partially pooled (Efron and Morris 1975)."""
    hits = torch.tensor(HITS).to(torch.get_default_dtype())
    m = pyro.sample("m", dist.Uniform(0.0, 1.0))
    kappa = pyro.sample("kappa", dist.Pareto(1.0, 1.5))
    with pyro.plate("players", len(hits)):
        phi = pyro.sample("phi", dist.Beta(m * kappa, (1 - m) * kappa))
        pyro.sample("hits", dist.Binomial(AT_BATS, phi), obs=hits)


def random_effects() -> None:
    """Groups of measurements with means of their own around a common one."""
    generator = torch.Generator().manual_seed(0)
    effects = 8.0 + 2.0 * torch.randn(GROUPS, generator=generator)
    y = effects + torch.randn(EACH, GROUPS, generator=generator)
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    tau, sigma = (pyro.sample(name, dist.HalfCauchy(5.0)) for name in ("tau", "sigma"))
    with pyro.plate("groups", GROUPS, dim=-1):
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        with pyro.plate("measurements", EACH, dim=-2):
            pyro.sample("y", dist.Normal(mu + tau * effect, sigma), obs=y)


def sparse_dirichlet() -> None:
    """Shares of ten kinds, most of which are almost zero."""
    shares = pyro.sample("shares", dist.Dirichlet(torch.full((len(COUNTS),), 0.05)))
    pyro.sample(
        "counts", dist.Multinomial(30, shares, validate_args=False), obs=torch.tensor(COUNTS)
    )


def wide_prior() -> None:
    """A linear regression whose coefficients have standard deviations of 1,000."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 3, generator=generator)
    y = x @ torch.tensor([1.0, -2.0, 0.5]) + 3.0 + torch.randn(40, generator=generator)
    with pyro.plate("coefficients", 4):
        slopes = pyro.sample("slopes", dist.Normal(0.0, 1000.0))
    loc = slopes[..., :1] + (slopes[..., None, 1:] * x).sum(-1)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def correlations() -> None:
    """A prior of ten correlated variables, near to independence."""
    pyro.sample("factor", dist.LKJCholesky(10, 100.0))


def random_walk() -> None:
    """Eight steps of a random walk with noisy measurements."""
    x = torch.tensor([0.4, 1.1, 1.9, 2.2, 1.7, 2.9, 3.6, 3.4])
    z = torch.zeros(())
    for t in range(len(x)):
        z = pyro.sample(f"z{t}", dist.Normal(z, 0.5))
        pyro.sample(f"x{t}", dist.Normal(z, 0.5), obs=x[t])


def horseshoe() -> None:
    """A sparse linear regression: two of ten coefficients are not zero."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(30, 10, generator=generator)
    y = 2.0 * x[:, 0] - 1.5 * x[:, 3] + 0.7 * torch.randn(30, generator=generator)
    tau = pyro.sample("tau", dist.HalfCauchy(0.5))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
    with pyro.plate("coefficients", 10):
        width = pyro.sample("width", dist.HalfCauchy(1.0))
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    loc = ((slope * width * tau)[..., None, :] * x).sum(-1)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, sigma), obs=y)


MODELS: dict[str, Callable[..., Any]] = {
    "baseball": baseball,
    "random effects": random_effects,
    "sparse Dirichlet": sparse_dirichlet,
    "wide prior": wide_prior,
    "correlations": correlations,
    "random walk": random_walk,
    "horseshoe": horseshoe,
}
