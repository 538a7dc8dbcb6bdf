"""Draws inside `torch.vmap`: distributed and differentiated as outside of it, anew for each."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import ExpTransform

from pyro_recursive.tracing.batched_samplers import OwnDraws

TOTAL = 1200
SMALL, LARGE = 0.3, 1.2
Z = 4.5  # standard errors


def logits(a: Tensor) -> Tensor:
    return torch.stack([a, -a, 0 * a])


MAKE: dict[str, Callable[[Tensor], Any]] = {
    "normal": lambda a: dist.Normal(torch.zeros(2) + a, 1 + a).to_event(1),
    "log normal": lambda a: dist.LogNormal(a, 0.3),
    "exponential": lambda a: dist.Exponential(1 + a),
    "gamma": lambda a: dist.Gamma(1 + a, 2.0),
    "inverse gamma": lambda a: dist.InverseGamma(3 + a, 1.0),
    "chi2": lambda a: dist.Chi2(1 + a),
    "student": lambda a: dist.StudentT(5.0, a, 1 + a),
    "laplace": lambda a: dist.Laplace(a, 1.0),
    "gumbel": lambda a: dist.Gumbel(a, 1.0),
    "cauchy": lambda a: dist.Cauchy(a, 1.0),
    "half normal": lambda a: dist.HalfNormal(1 + a),
    "half cauchy": lambda a: dist.HalfCauchy(1 + a),
    "uniform": lambda a: dist.Uniform(a, 2 + 2 * a),
    "pareto": lambda a: dist.Pareto(1.0, 3 + a),
    "weibull": lambda a: dist.Weibull(1.0, 1 + a),
    "kumaraswamy": lambda a: dist.Kumaraswamy(1 + a, 2.0),
    "multivariate": lambda a: dist.MultivariateNormal(
        torch.zeros(2) + a, scale_tril=torch.eye(2) + a * torch.ones(2, 2).tril()
    ),
    "low rank": lambda a: dist.LowRankMultivariateNormal(
        torch.zeros(2) + a, torch.ones(2, 1) * a, torch.ones(2)
    ),
    "transformed": lambda a: dist.TransformedDistribution(dist.Normal(a, 0.3), [ExpTransform()]),
    "mixture": lambda a: dist.MixtureSameFamily(
        dist.Categorical(logits=logits(a)), dist.Normal(logits(a), 0.5)
    ),
    "continuous bernoulli": lambda a: dist.ContinuousBernoulli(a / 2),
    "bernoulli": lambda a: dist.Bernoulli(a / 2).mask(False),
    "categorical": lambda a: dist.Categorical(logits=logits(a)),
    "one hot": lambda a: dist.OneHotCategorical(logits=logits(a)),
    "binomial": lambda a: dist.Binomial(5, a / 2),
    "poisson": lambda a: dist.Poisson(1 + a),
    "geometric": lambda a: dist.Geometric(a / 2),
    "negative binomial": lambda a: dist.NegativeBinomial(3.0, a / 2),
    "zero inflated": lambda a: dist.ZeroInflatedPoisson(1 + a, gate=a / 2),
    "multinomial": lambda a: dist.Multinomial(5, logits=logits(a)),
    "relaxed one hot": lambda a: dist.RelaxedOneHotCategorical(torch.tensor(0.5), logits=logits(a)),
    "relaxed bernoulli": lambda a: dist.RelaxedBernoulli(torch.tensor(0.5), a / 2),
    "beta": lambda a: dist.Beta(1 + a, torch.ones(2)).to_event(1),
    "dirichlet": lambda a: dist.Dirichlet(1 + logits(a).abs()),
    "lkj": lambda a: dist.LKJCholesky(3, 1 + a),
    "beta binomial": lambda a: dist.BetaBinomial(1 + a, 2.0, 5),
    "dirichlet multinomial": lambda a: dist.DirichletMultinomial(1 + logits(a).abs(), 5),
    "von mises": lambda a: dist.VonMises(a, 1 + a),
    "projected normal": lambda a: dist.ProjectedNormal(logits(a)),
    "stable": lambda a: dist.Stable(1.5, 0.2, 1 + a, a),
}

DISCRETE = {"bernoulli", "categorical", "one hot", "binomial", "poisson", "geometric"}
DISCRETE |= {"negative binomial", "zero inflated", "multinomial", "beta binomial", "mixture"}
NO_MEAN = {"cauchy", "half cauchy", "lkj", "transformed", "projected normal", "stable"}
NO_MEAN |= {"relaxed one hot", "relaxed bernoulli"}
NO_DERIVATIVE = DISCRETE | NO_MEAN | {"dirichlet multinomial", "von mises"}


def draw(make: Callable[[Tensor], Any], a: Tensor) -> Tensor:
    """Return a draw for each particle; a scalar is shared by all."""

    def one(index: Tensor, a: Tensor) -> Tensor:
        with OwnDraws(index):
            return pyro.sample("x", make(a))

    in_dims = (0, 0 if a.dim() else None)
    with pyro.validation_enabled(False):
        return torch.vmap(one, in_dims, randomness="different")(torch.arange(TOTAL), a)


@pytest.mark.quick(20)
@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("name", MAKE)
def test_draws_are_distributed_as_outside(name: str, is_shared: bool) -> None:
    """Means, squares, and products of neighbours."""
    make = MAKE[name]
    own = torch.tensor([SMALL, LARGE]).repeat_interleave(TOTAL // 2)
    found = draw(make, torch.tensor(SMALL) if is_shared else own)
    for rows, value in zip(found.chunk(2), (SMALL, SMALL if is_shared else LARGE), strict=True):
        expected = make(torch.tensor(value)).sample((len(rows),))
        assert rows.shape == expected.shape and rows.dtype == expected.dtype
        one, other = (each.double().tanh() for each in (rows, expected))
        for x, y in ((one, other), (one.square(), other.square())):
            error = ((x.var(0) + y.var(0)) / len(x)).sqrt()
            assert ((x.mean(0) - y.mean(0)).abs() <= Z * error + 1e-9).all()
        centered = one - one.mean(0)
        product = (centered[1:] * centered[:-1]).mean(0)
        assert (product.abs() <= Z * one.var(0) / len(one) ** 0.5 + 1e-9).all()


@pytest.mark.parametrize("name", sorted(MAKE.keys() - NO_DERIVATIVE))
def test_draws_have_derivatives(name: str) -> None:
    """Their mean is that of the distribution's mean."""
    value = torch.tensor(SMALL, requires_grad=True)
    (expected,) = torch.autograd.grad(MAKE[name](value).mean.sum(), value)
    a = torch.full((TOTAL,), SMALL, requires_grad=True)
    (found,) = torch.autograd.grad(draw(MAKE[name], a).sum(), a)
    error = found.std() / TOTAL**0.5
    assert (found.mean() - expected).abs() <= Z * error + 1e-9
