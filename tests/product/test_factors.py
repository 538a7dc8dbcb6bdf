"""`pyro.factor` in a guide: a Jacobian, or log q of values that the guide draws by hand."""

import itertools
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from pyro.infer import Trace_ELBO
from torch import Tensor

from pyro_recursive import IWAE_ELBO, MIWAE_ELBO, MultiSampleELBO, bounds, log_marginal
from pyro_recursive.bounds.estimators import ESTIMATORS
from tests.models.row import positive, real

UNBIASED = ("pathwise", "dreg", "score", "vimco", "dreg+score", "dreg+vimco")
SCORED = ("score", "vimco", "dreg+score", "dreg+vimco")
DATUM, PRIOR, NOISE = 1.7, 1.3, 0.6
NAMES = ("a", "s", "b", "c")


def log_joint(z: Tensor, k: Tensor, j: Tensor) -> Tensor:
    """z ~ N(k - 2 j / 5, PRIOR), x ~ N(z, NOISE), k and j from coins."""
    x, loc = torch.tensor(DATUM), k - 0.4 * j
    coins = dist.Bernoulli(0.35).log_prob(k) + dist.Bernoulli(0.6).log_prob(j)
    return coins + dist.Normal(loc, PRIOR).log_prob(z) + dist.Normal(z, NOISE).log_prob(x)


def continuous() -> None:
    z = pyro.sample("z", dist.Normal(0.0, PRIOR))
    pyro.sample("x", dist.Normal(z, NOISE), obs=torch.tensor(DATUM))


def shifted(has_rsample: bool | None = True) -> None:
    """z = a + s u, written as a change of variables."""
    u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
    a, s = real("a", 0.4), positive("s", 0.8)
    pyro.factor("jacobian", -s.log(), has_rsample=has_rsample)
    pyro.sample("z", dist.Delta(a + s * u))


def mixed() -> None:
    k = pyro.sample("k", dist.Bernoulli(0.35))
    j = pyro.sample("j", dist.Bernoulli(0.6))
    z = pyro.sample("z", dist.Normal(k - 0.4 * j, PRIOR))
    pyro.sample("x", dist.Normal(z, NOISE), obs=torch.tensor(DATUM))


def mixed_guide() -> None:
    """k is drawn by hand, j at a site, and z is computed from a normal."""
    coin = dist.Bernoulli(logits=real("b", 0.3))
    k = coin.sample()
    pyro.factor("k_density", coin.log_prob(k), has_rsample=False)
    pyro.sample("k", dist.Delta(k))
    pyro.sample("j", dist.Bernoulli(logits=real("c", -0.5)))
    u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
    a, s = real("a", 0.4), positive("s", 0.8)
    pyro.factor("jacobian", -s.log(), has_rsample=True)
    pyro.sample("z", dist.Delta(a + 0.5 * k + s * u))


def exact_gradient(discrete: bool, size: int = 24) -> Tensor:
    """Return the gradient of minus IWAE's bound with K = 2, summed over coins and quadrature."""
    a, log_s, b, c = leaves = [torch.tensor(v, requires_grad=True) for v in (0.4, 0.0, 0.3, -0.5)]
    s = (log_s + torch.tensor(0.8).log()).exp()
    nodes, weights = map(torch.as_tensor, hermegauss(size))
    weights = (weights / weights.sum()).log()
    terms = []
    for k, j in itertools.product((0.0, 1.0), repeat=2) if discrete else [(0.0, 0.0)]:
        k, j = torch.tensor(k), torch.tensor(j)
        z = a + 0.5 * k + s * nodes
        coins = dist.Bernoulli(logits=b).log_prob(k) + dist.Bernoulli(logits=c).log_prob(j)
        log_q = dist.Normal(0.0, 1.0).log_prob(nodes) - s.log()
        log_p = log_joint(z, k, j)
        if not discrete:
            log_p = dist.Normal(0.0, PRIOR).log_prob(z)
            log_p = log_p + dist.Normal(z, NOISE).log_prob(torch.tensor(DATUM))
            coins = torch.zeros(())
        terms.append((weights + coins, log_p - coins - log_q))
    mass, log_w = (torch.cat(torch.broadcast_tensors(*each)) for each in zip(*terms, strict=True))
    pair = torch.logaddexp(log_w[:, None], log_w) - torch.tensor(2.0).log()
    bound = ((mass[:, None] + mass).exp() * pair).sum()
    grads = torch.autograd.grad(-bound, leaves, allow_unused=True, materialize_grads=True)
    return torch.stack(grads)[: 4 if discrete else 2]


def assert_unbiased(
    loss: Any, model: Any, guide: Any, expected: Tensor, calls: int = 30, precision: float = 0.02
) -> None:
    draws = []
    loss.loss(model, guide)
    for _ in range(calls):
        leaves = [pyro.param(name).unconstrained() for name in NAMES[: len(expected)]]
        for leaf in leaves:
            leaf.grad = None
        loss.loss_and_grads(model, guide)
        draws.append(torch.stack([leaf.grad for leaf in leaves]))
    found = torch.stack(draws)
    error = found.std(0) / calls**0.5
    assert (error < 0.1 * expected.abs() + precision).all()
    assert ((found.mean(0) - expected).abs() < 4.5 * error + 1e-9).all(), (found.mean(0), expected)


@pytest.mark.parametrize("estimator", UNBIASED)
def test_jacobian(estimator: str) -> None:
    loss = MIWAE_ELBO(400, 2, estimator=estimator)
    assert_unbiased(loss, continuous, shifted, exact_gradient(discrete=False))


@pytest.mark.slow
@pytest.mark.parametrize("estimator", SCORED)
def test_draws_by_hand_beside_sites_of_every_kind(estimator: str) -> None:
    loss = MIWAE_ELBO(20, 2, estimator=estimator, vectorize_particles=False)
    assert_unbiased(loss, mixed, mixed_guide, exact_gradient(discrete=True), precision=0.2)


def test_one_value_for_all_samples_is_refused() -> None:
    """Drawn by hand, it would be its own baseline; here it is a Jacobian."""
    for estimator in SCORED:
        loss = IWAE_ELBO(4, estimator=estimator)
        with pytest.raises(ValueError, match=r"'jacobian' .* one value.*for a Jacobian"):
            loss.loss_and_grads(continuous, partial(shifted, has_rsample=False))


def test_a_factor_of_no_kind_is_refused() -> None:
    """As by Pyro's losses, which cannot know either."""
    guide = partial(shifted, has_rsample=None)
    for estimator in ESTIMATORS:
        loss = MultiSampleELBO(bounds.iwae, num_particles=3, estimator=estimator)
        for call in (loss.loss, loss.loss_and_grads):
            with pytest.raises(ValueError, match=r"factor 'jacobian' needs has_rsample: True"):
                call(continuous, guide)
    with pytest.raises(ValueError, match="needs has_rsample"):
        log_marginal(continuous, guide)
    with pytest.raises(ValueError, match="missing specification of has_rsample"):
        Trace_ELBO().loss(continuous, guide)


def test_pathwise_estimators_name_the_factor() -> None:
    for estimator in ("pathwise", "stl", "dreg"):
        loss = IWAE_ELBO(3, estimator=estimator, vectorize_particles=False)
        with pytest.raises(NotImplementedError, match=r"'k_density' has has_rsample=False.*vimco"):
            loss.loss_and_grads(mixed, mixed_guide)
