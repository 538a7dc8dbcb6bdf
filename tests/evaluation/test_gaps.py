"""Gaps of inference: closed forms on conjugate models, quadrature elsewhere.

Where the posterior is in the family, no draw has any noise; statistical checks allow 4.5 standard
errors.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyro_recursive import (
    AmortizedGuide,
    FlowGuide,
    MixtureGuide,
    RecursiveMixtureGuide,
    SemiAmortizedGuide,
    gaps,
    log_marginal,
)
from pyro_recursive.evaluation.gaps import Gaps
from pyro_recursive.evaluation.search import Search
from pyro_recursive.guides.gaussian_families import LowRank
from pyro_recursive.guides.semi_amortized.updates import GradientUpdate
from tests.models import local
from tests.models.small import in_rows, normal, normal_global, normal_rows, poisson_rows
from tests.oracles.quadrature import log_normal

SIGMAS = 4.5
QUICK = Search(draws=5, steps=80, window=16, patience=2, lr=0.3)
NONE = Search(draws=1, steps=1, window=1)

X = torch.tensor([[-2.0], [0.3], [1.0], [3.0]], dtype=torch.float64)
VARIANCE = 0.2  # of the posterior of `conjugate`, whose locations are 0.8 x
LOC = 0.8 * X[:, 0]
LOST = (LOC - 0.5) ** 2 / (2 * VARIANCE)  # by the encoder `off_by`
conjugate = partial(normal_rows, noise=0.5)


def constant(*params: float, features: int = 1) -> nn.Linear:
    """Return an encoder with the same parameters for all rows."""
    layer = nn.Linear(features, len(params))
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.tensor(params))
    return layer


def off_by(loc: float = 0.5) -> nn.Linear:
    """Return an encoder of `conjugate` with the right variance and one location for all rows."""
    return constant(loc, 0.5 * math.log(VARIANCE))


def evidence() -> Tensor:
    return dist.Normal(0.0, 1.25**0.5).log_prob(X[:, 0])


def close(found: Tensor, expected: Tensor | float, error: Tensor | float = 0.0) -> None:
    """Check all entries: to 4.5 standard errors, and what a search may miss."""
    distance = (found - torch.as_tensor(expected)).abs()
    assert (distance <= SIGMAS * torch.as_tensor(error) + 2e-3).all(), (found, expected, error)


# --- Gaussians


def test_exact_encoder_has_no_gap() -> None:
    encoder = off_by(0.0)
    with torch.no_grad():
        encoder.weight.copy_(torch.tensor([[0.8], [0.0]]))
    guide = AmortizedGuide(conjugate, encoder, family="full")
    search = Search(draws=2, steps=30, window=10, patience=2)
    found = gaps(conjugate, guide, X, num_particles=500, search=search)
    torch.testing.assert_close(found.log_marginal, evidence(), atol=1e-9, rtol=0)
    for gap in (found.amortization, found.approximation, found.inference):
        assert gap.abs().max() < 1e-6
    assert found.start is None and found.closed is None
    assert found.ess.allclose(torch.tensor(500.0))


def test_constant_encoder_loses_by_amortization_alone() -> None:
    """With the exact variance v, each row loses ``(mu_i - mu)^2 / 2 v``."""
    found = gaps(conjugate, AmortizedGuide(conjugate, off_by()), X, search=QUICK)
    close(found.amortization, LOST, found.amortization_error)
    close(found.approximation, 0.0, found.log_marginal_error)
    assert torch.allclose(found.inference, found.amortization + found.approximation)
    assert (found.amortization_error > 0).all() and found.best_error.max() < 1e-2
    joined = Gaps.join([found, found])
    assert joined.start is None and torch.equal(joined.amortization[4:], found.amortization)
    told = joined.summary()["elbo"]
    assert told["50%"] == pytest.approx(joined.elbo.quantile(0.5).item())
    assert told["standard error"] == pytest.approx(joined.elbo.std().item() / 8**0.5)


RHO = 0.8
COVARIANCE = torch.tensor([[0.25, RHO], [RHO, 4.0]], dtype=torch.float64)  # of scales 1 / 2 and 2


@in_rows
def correlated(x: Tensor) -> None:
    """Have the posterior ``N(x, covariance)``, and log p(x) = 0."""
    prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    z = pyro.sample("z", prior)
    posterior = dist.MultivariateNormal(x, COVARIANCE)
    pyro.factor("f", posterior.log_prob(z) - prior.log_prob(z))


@pytest.mark.slow
def test_diagonal_gaussian_on_a_correlated_posterior() -> None:
    """The best has the posterior's conditional variances: ``-log(1 - rho^2) / 2`` is missing."""
    x = torch.tensor([[0.0, 0.0], [1.0, -1.0]])
    encoder = constant(0.2, 0.1, -1.0, 0.3, features=2)
    guide = AmortizedGuide(correlated, encoder)
    search = Search(draws=20, steps=120, window=20, patience=3, lr=0.2)
    found = gaps(correlated, guide, x, search=search)
    posterior = torch.distributions.MultivariateNormal(x, COVARIANCE)
    scales = torch.tensor([-1.0, 0.3]).exp()
    own = torch.distributions.MultivariateNormal(torch.tensor([0.2, 0.1]), scales.square().diag())
    close(-found.elbo, kl_divergence(own, posterior), found.elbo_error)
    missing = -0.5 * math.log(1 - RHO**2)
    close(-found.best, missing, found.best_error)
    expected = kl_divergence(own, posterior) - missing
    close(found.amortization, expected, found.amortization_error)
    close(found.log_marginal, 0.0, 2 * found.log_marginal_error)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "size"), [("full", 5), (LowRank(1), 6)])
def test_wider_families_have_no_approximation_gap(family: Any, size: int) -> None:
    x = torch.randn(4, 2)
    encoder = constant(*[0.1] * size, features=2)
    guide = AmortizedGuide(correlated, encoder, family=family)
    found = gaps(correlated, guide, x, search=Search(patience=8))
    close(found.approximation, 0.0, found.log_marginal_error)
    close(found.best, 0.0, found.best_error)
    assert (found.amortization > 0.5).all()


def test_positive_latents() -> None:
    """Over the logarithm of a Gamma(a, b), the best normal has variance 1 / a."""
    x = torch.tensor([[0.0], [4.0]])
    a, b = 2.0 + x[:, 0], torch.tensor(2.0)
    missing = torch.lgamma(a) - a * a.log() + a + 0.5 - 0.5 * torch.log(2 * torch.pi * math.e / a)
    exact = torch.lgamma(a) - torch.lgamma(x[:, 0] + 1) - a * b.log()
    search = Search(draws=20, steps=100, window=20, patience=3, lr=0.1)
    guide = AmortizedGuide(poisson_rows, constant(0.0, -1.0))
    found = gaps(poisson_rows, guide, x, search=search)
    close(found.log_marginal, exact, found.log_marginal_error)
    close(found.best, exact - missing, found.best_error)
    assert (found.amortization > 0).all()


# --- Mixtures


@in_rows
def bimodal(x: Tensor) -> None:
    """Have the posterior of equal normals at -x and x of scale 1/2, and log p(x) = 0."""
    z = normal("z", 0.0, 3.0)
    pyro.factor("f", log_bimodal(z, x[:, 0]) - log_normal(z, 0.0, 3.0))


def log_bimodal(z: Tensor, x: Tensor) -> Tensor:
    return torch.logaddexp(log_normal(z, -x, 0.5), log_normal(z, x, 0.5)) - math.log(2)


def kl_to_bimodal(log_density: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the divergence of a density over z, by quadrature."""
    z = torch.linspace(-12, 12, 4001)
    log_q = log_density(z)
    return (log_q.exp() * (log_q - log_bimodal(z, x))).sum(-1) * (z[1] - z[0])


MODES = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
BIMODAL = Search(draws=20, steps=600, window=30, patience=5, lr=0.1)


@pytest.mark.slow
def test_one_gaussian_on_two_modes() -> None:
    """By quadrature: of the best normal, and for far modes log 2."""
    # From the middle a wide normal over both modes, a worse optimum, is as near.
    guide = AmortizedGuide(bimodal, constant(1.0, -0.7))
    found = gaps(bimodal, guide, MODES, search=BIMODAL)
    locs, scales = torch.linspace(0, 2.5, 101), torch.linspace(0.3, 2.5, 111)
    for row, x in enumerate(MODES[:, 0]):
        missing = kl_to_bimodal(lambda z: log_normal(z, locs[:, None, None], scales[:, None]), x)
        assert missing.min() == pytest.approx(0.6931 if row else 0.2265, abs=1e-3)
        close(-found.best[row], missing.min(), found.best_error[row])


@pytest.mark.slow
@pytest.mark.parametrize("recursive", [False, True])
def test_two_gaussians_on_two_modes(recursive: bool) -> None:
    """A recursive mixture of one member is that member, until it has two."""
    encoders = [constant(place, -1.0) for place in (0.4, 0.6)]
    parts = [AmortizedGuide(bimodal, encoder) for encoder in encoders]
    kind = RecursiveMixtureGuide if recursive else MixtureGuide
    guide = kind(bimodal, parts)
    if recursive:
        guide.prepare(MODES)
        one = gaps(bimodal, guide, MODES, search=BIMODAL)
        close(-one.best, torch.tensor([0.2265, 0.6931]), one.best_error + 1e-3)
        guide.progress[4] = 1
    found = gaps(bimodal, guide, MODES, search=BIMODAL)
    close(found.best, 0.0, found.best_error)
    close(found.log_marginal, 0.0, found.log_marginal_error)
    assert (found.amortization > 0.3).all()


# --- Flows


def test_flow_on_a_gaussian() -> None:
    """A flow that starts as a Gaussian finds a posterior that is one."""
    encoder = constant(0.0, 0.0)
    guide = FlowGuide(conjugate, "coupling", encoder=encoder, transforms=1, hidden=(4,))
    guide.prepare(X)
    with torch.no_grad():  # the head of an affine map is all that differs from the identity
        guide.flow_local.bias.copy_(torch.tensor([0.5, 0.5 * math.log(VARIANCE)]))
    found = gaps(conjugate, guide, X[:2], search=QUICK, num_particles=2000)
    close(found.amortization, LOST[:2], found.amortization_error)
    close(found.approximation, 0.0, found.log_marginal_error)


# --- Refinement


def test_refinement_closes_its_share() -> None:
    """T steps over a posterior of variance v leave ``(1 - rate / v)^2T`` of a place's gap."""
    rate, steps = 0.05, 2
    update = GradientUpdate(rate, momentum=0.0, clip=math.inf)
    # With many draws the scales hardly move: they are right, and their noise is a mean's.
    inner = AmortizedGuide(conjugate, off_by())
    guide = SemiAmortizedGuide(conjugate, inner, steps=steps, update=update, draws=4000)
    found = gaps(conjugate, guide, X, search=QUICK)
    assert found.start is not None and found.closed is not None
    assert (found.start < found.elbo).all() and (found.elbo < found.best).all()
    left = (1 - rate / VARIANCE) ** steps
    close(found.best - found.start, LOST, found.amortization_error / left)
    share = 1 - left**2
    assert found.closed.sub(share).abs().max() < 0.03
    assert found.summary()["closed"]["mean"] == pytest.approx(share, abs=0.02)
    assert "closed" in str(found)


# --- Any model


def test_global_latents_are_one_datum() -> None:
    data = torch.tensor([0.5, 1.0, 3.0])
    model = partial(normal_global, data, prior=1.0)
    guide = AmortizedGuide(model, init_scale=0.5)
    guide.prepare()
    with torch.no_grad():
        guide.free_global[..., 0] = 0.2
    found = gaps(model, guide, search=QUICK)
    assert found.elbo.shape == ()
    close(found.amortization, (data.sum() / 4 - 0.2) ** 2 / (2 * 0.25), found.amortization_error)
    joint = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 1)
    close(found.log_marginal, joint.log_prob(data), found.log_marginal_error)
    assert "amortization" in str(found) and math.isnan(found.summary()["elbo"]["standard error"])


def test_rows_of_a_minibatch() -> None:
    """Every run has the minibatch that was drawn first, and no row knows how many there are."""
    x = torch.linspace(-3, 3, 12)
    model = partial(local, subsample_size=5)  # z ~ N(0.3, 1), of unit noise
    guide = AmortizedGuide(model, plate="data")
    guide.prepare(x)
    with torch.no_grad():
        guide.free_local.copy_(torch.tensor([2.0, 0.5 * math.log(0.5)]))
    found = gaps(model, guide, x, search=QUICK)
    assert found.elbo.shape == (5,)
    gap = ((0.3 + x) / 2 - 2.0) ** 2  # 0.12 to 11.2, far from each other
    rows = (found.amortization[:, None] - gap).abs().argmin(1)
    assert len(set(rows.tolist())) == 5
    close(found.amortization, gap[rows], found.amortization_error)
    exact = dist.Normal(0.3, 2**0.5).log_prob(x[rows])
    close(found.log_marginal, exact, found.log_marginal_error)


def test_two_plates_of_rows_and_one_inside() -> None:
    x = torch.tensor([[[0.0, 1.0], [2.0, 2.0], [-1.0, 0.0]], [[1.0, 1.0], [0.5, -3.0], [0.0, 4.0]]])

    def model(x: Tensor) -> None:
        with pyro.plate("a", 2, dim=-3), pyro.plate("b", 3, dim=-2):
            z = normal("z", 0.0)
            with pyro.plate("features", 2, dim=-1):
                normal("x", normal("w", 0.0), obs=x)
            normal("y", z, obs=x.mean(-1, keepdim=True))

    scale = -0.5 * math.log(2)
    encoder = constant(0.0, 0.0, 0.0, scale, scale, scale, features=2)
    found = gaps(model, AmortizedGuide(model, encoder), x, search=QUICK)
    gap = (x / 2).square().sum(-1) + (x.mean(-1) / 2).square()
    close(found.amortization, gap, found.amortization_error)
    marginal = dist.Normal(0.0, 2**0.5)
    exact = marginal.log_prob(x).sum(-1) + marginal.log_prob(x.mean(-1))
    assert found.log_marginal.shape == (2, 3)
    close(found.log_marginal, exact, found.log_marginal_error)


def test_scales_and_masks_of_the_user() -> None:
    """A weight of 4 on the likelihood is a scale of 1/4, up to a constant; the mask hides a row."""

    @in_rows
    def model(x: Tensor) -> None:
        z = normal("z", 0.0)
        with poutine.scale(scale=4.0), poutine.mask(mask=x[:, 0] > -1):
            normal("x", z, obs=x[:, 0])

    found = gaps(model, AmortizedGuide(model, off_by()), X, search=QUICK)
    constant_of_four = 4 * math.log(2 * torch.pi) / -2 + math.log(2 * torch.pi / 4) / 2
    exact = evidence() + constant_of_four
    exact[0] = 0
    close(found.log_marginal, exact, found.log_marginal_error)
    close(found.amortization[1:], LOST[1:], found.amortization_error[1:])


def test_bounds_of_a_mixture_with_unequal_weights() -> None:
    parts = [AmortizedGuide(bimodal, constant(place, -0.5)) for place in (-1.0, 0.5)]
    guide = MixtureGuide(bimodal, parts, weights=constant(0.0, 1.5))
    found = gaps(bimodal, guide, MODES, search=NONE)
    log_weights = torch.tensor([0.0, 8 * math.tanh(1.5 / 8)]).log_softmax(0)

    def log_density(z: Tensor) -> Tensor:
        each = [log_normal(z, place, math.exp(-0.5)) for place in (-1.0, 0.5)]
        return (torch.stack(each, -1) + log_weights).logsumexp(-1)

    missing = kl_to_bimodal(log_density, MODES)
    close(-found.elbo, missing, found.elbo_error)
    close(found.log_marginal[0], 0.0, found.log_marginal_error[0])


@pytest.mark.slow
def test_evidence_of_a_guide_that_misses_a_mode() -> None:
    """Draws from q alone miss half of p(x), with a perfect effective sample size."""
    parts = [AmortizedGuide(bimodal, constant(3.0, math.log(0.5))) for _ in range(2)]
    guide = MixtureGuide(bimodal, parts)
    x = torch.tensor([[3.0]])
    search = Search(draws=10, steps=400, window=25, patience=4, lr=0.2)
    found = gaps(bimodal, guide, x, search=search)
    assert log_marginal(bimodal, guide, x) == pytest.approx(-math.log(2), abs=1e-3)
    close(found.log_marginal, 0.0, 2 * found.log_marginal_error)
    close(found.amortization, math.log(2), found.best_error)


def test_a_guide_without_a_bound() -> None:
    """An encoder whose draws are impossible has no ELBO; its row has one to find."""

    @in_rows
    def model(x: Tensor) -> None:
        pyro.factor("inside", torch.where(normal("z", 0.0).abs() < 8, 0.0, -torch.inf))

    guide = AmortizedGuide(model, constant(9.0, 0.0), plate="data")
    found = gaps(model, guide, X[:1], search=replace(QUICK, draws=100, steps=200, patience=4))
    assert found.elbo.isneginf() and found.amortization.isposinf()
    close(found.best, 0.0)
    close(found.log_marginal, 0.0, found.log_marginal_error)


@pytest.mark.parametrize("refined", [False, True])
def test_nothing_is_left_behind(refined: bool) -> None:
    decoder = nn.Linear(1, 1)

    @in_rows
    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        normal("x", decoder(normal("z", 0.0)[..., None])[..., 0], 0.5, obs=x[:, 0])

    layers = nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)
    guide: Any = AmortizedGuide(model, nn.Sequential(*layers))
    if refined:
        guide = SemiAmortizedGuide(model, guide, steps=2)
    guide(X)
    decoder.weight.grad = torch.ones(1, 1)
    modules = nn.ModuleList([guide, decoder]).train()
    before = copy.deepcopy(modules.state_dict())
    found = [gaps(model, guide, X, search=NONE, num_particles=50) for _ in range(2)]
    torch.rand(1)
    found.append(gaps(model, guide, X, search=NONE, num_particles=50))
    assert all(torch.equal(kept, modules.state_dict()[name]) for name, kept in before.items())
    assert guide.training and decoder.training
    assert all(parameter.grad is None for parameter in guide.parameters())
    assert decoder.weight.grad.item() == 1 and decoder.bias.grad is None
    assert torch.equal(found[0].elbo, found[1].elbo)  # the random state is the same again
    assert not torch.equal(found[0].elbo, found[2].elbo)


# --- Errors


def both(x: Tensor) -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        normal("x", normal("z", 0.0, scale), obs=x[:, 0])


def tied(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = normal("z", 0.0)
        normal("x", z, obs=x[:, 0])
    pyro.factor("together", -(z.sum(-1, keepdim=True) ** 2))


by_hand = in_rows(lambda x: normal("z", 0.0))
mixing = in_rows(lambda x: normal("x", normal("z", 0.0).mean(0), obs=x[:, 0]))


@in_rows
def masked(x: Tensor) -> None:
    with poutine.mask(mask=x[:, 0] > 0):
        z = normal("z", 0.0)
    normal("x", z, obs=x[:, 0])


def amortized(model: Callable, **options: Any) -> Callable:
    return lambda: AmortizedGuide(model, off_by(), **options)


def mixture_by_hand() -> MixtureGuide:
    return MixtureGuide(conjugate, [by_hand, by_hand])


ERRORS: list[tuple[Callable, Callable, type[Exception], str]] = [
    (conjugate, lambda: by_hand, TypeError, "needs a guide like AmortizedGuide"),
    (conjugate, mixture_by_hand, TypeError, "AmortizedGuide or FlowGuide"),
    (both, amortized(both), ValueError, r"share the latents \['scale'\]"),
    (tied, amortized(tied, plate="data"), ValueError, "latents of other rows"),
    (mixing, amortized(mixing), ValueError, "in another"),
]


@pytest.mark.parametrize(("model", "guide", "error", "text"), ERRORS)
def test_what_is_refused(model: Callable, guide: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        gaps(model, guide(), X, search=NONE)


def test_a_site_outside_the_rows_that_does_not_know_them() -> None:
    """It counts in equal parts."""

    def model(x: Tensor) -> None:
        conjugate(x)
        pyro.factor("penalty", torch.tensor(-8.0))

    guide = AmortizedGuide(model, off_by(), plate="data")
    found = gaps(model, guide, X, search=NONE, num_particles=2000)
    close(found.elbo, evidence() - 2 - LOST, found.elbo_error)


@pytest.mark.parametrize("rows", [2, 26])
def test_rows_of_a_chain_are_refused(rows: int) -> None:
    @in_rows
    def chain(x: Tensor) -> None:
        z = normal("z", 0.0)
        normal("x", z + z.roll(1, -1), obs=x[:, 0])

    x = torch.randn(rows, 1, dtype=torch.float32)
    guide = AmortizedGuide(chain, nn.Linear(1, 2, dtype=torch.float32))
    with pytest.raises(ValueError, match="latents of other rows"):
        gaps(chain, guide, x, num_particles=10, search=Search(draws=2, steps=2))
