"""Each row of coefficients against quadrature and enumeration: mean and spread, no Monte Carlo.

Expectations are sums over a tensor grid, so that a wrong coefficient cannot hide in noise.
"""

import itertools

import pytest
import torch

from pyro_recursive import bounds
from pyro_recursive.bounds import Bound
from pyro_recursive.bounds.estimators import ESTIMATORS, Coefficients
from tests.oracles.quadrature import Grid, conjugate, log_normal, normal_grid

IWAE, ELBO, JACKKNIFE = bounds.iwae, bounds.elbo, bounds.jackknife
CIWAE, RENYI = bounds.ciwae(0.3), bounds.renyi(0.5)
IWAE_3, STL_3, RWS_3, CIWAE_3, RENYI_3, ELBO_3, JACKKNIFE_3 = (
    (0.25931090, -0.01864180),
    (0.71652639, -0.17836596),
    (0.45721549, -0.15972417),
    (0.48151763, -0.21971592),
    (0.54574155, -0.20890031),
    (1.0, -0.68888889),
    (-0.08597255, 0.13651005),
)
IWAE_2 = (0.43195263, -0.09621772)

# bound, K, estimator, handling, mean in (m, s), standard deviation per draw
ROWS = [
    (IWAE, 3, "pathwise", "path", IWAE_3, (1.00089, 1.15382)),
    (IWAE, 3, "dreg", "path", IWAE_3, (0.18825, 0.18460)),
    (IWAE, 3, "score", "score", IWAE_3, (1.91545, 2.46602)),
    (IWAE, 3, "vimco", "score", IWAE_3, (0.35726, 0.55655)),
    (IWAE, 3, "dreg+score", "score", IWAE_3, (1.91545, 2.46602)),
    (IWAE, 3, "dreg+vimco", "score", IWAE_3, (0.35726, 0.55655)),
    (IWAE, 3, "dreg+vimco", "path", IWAE_3, (0.18825, 0.18460)),
    (IWAE, 3, "stl", "path", STL_3, (0.38306, 0.42910)),
    (IWAE, 3, "rws", "score", RWS_3, (0.61783, 0.91249)),
    (IWAE, 3, "rws", "path", RWS_3, (0.61783, 0.91249)),
    (IWAE, 3, "rws-dreg", "path", RWS_3, (0.21439, 0.26600)),
    (CIWAE, 3, "pathwise", "path", CIWAE_3, (0.96718, 1.16180)),
    (CIWAE, 3, "dreg", "path", CIWAE_3, (0.23955, 0.32158)),
    (CIWAE, 3, "vimco", "score", CIWAE_3, None),
    (CIWAE, 3, "score", "score", CIWAE_3, None),
    (RENYI, 3, "pathwise", "path", RENYI_3, (0.96808, 1.13265)),
    (RENYI, 3, "dreg", "path", RENYI_3, (0.25680, 0.32486)),
    (RENYI, 3, "vimco", "score", RENYI_3, None),
    (RENYI, 3, "score", "score", RENYI_3, None),
    (ELBO, 3, "pathwise", "path", ELBO_3, (1.03923, 1.57903)),
    (ELBO, 3, "stl", "path", ELBO_3, (0.39773, 0.80605)),
    (ELBO, 3, "dreg", "path", ELBO_3, (0.39773, 0.80605)),
    (ELBO, 3, "vimco", "score", ELBO_3, None),
    (JACKKNIFE, 3, "pathwise", "path", JACKKNIFE_3, None),
    (JACKKNIFE, 3, "dreg", "path", JACKKNIFE_3, None),
    (IWAE, 2, "pathwise", "path", IWAE_2, None),
    (IWAE, 2, "dreg", "path", IWAE_2, None),
    (IWAE, 2, "score", "score", IWAE_2, None),
    (IWAE, 2, "vimco", "score", IWAE_2, None),
    (IWAE, 2, "stl", "path", (0.78259915, -0.26726049), None),
    (IWAE, 2, "rws", "path", (0.35064653, -0.17104278), None),
    (CIWAE, 2, "dreg", "path", (0.60236684, -0.27401907), None),
    (RENYI, 2, "dreg", "path", (0.64497166, -0.27894755), None),
    (JACKKNIFE, 2, "dreg", "path", (-0.13609474, 0.49645346), None),
]
MODEL = [  # bound, K, d/dmu
    (IWAE, 3, 0.27034455),
    (CIWAE, 3, 0.15924118),
    (ELBO, 3, -0.1),
    (JACKKNIFE, 3, 0.44298628),
    (IWAE, 2, 0.18402369),
    (CIWAE, 2, 0.09881658),
    (JACKKNIFE, 2, 0.46804737),
]


def grid_of(size: int) -> Grid:
    return normal_grid(size, nodes=64 if size == 2 else 48)


def gradient(table: Coefficients, grid: Grid, handling: str) -> torch.Tensor:
    """Return the estimator at every grid point: ``[parameters, points]``."""
    model = conjugate(grid.eps)
    if handling == "score":
        assert table.score is not None
        return (table.score * model.d_density).sum((1, 2))
    total = torch.zeros_like(model.d_value)
    if table.path is not None:
        total = total + table.path * model.path * model.d_value
    if table.density is not None:
        total = total + table.density * model.d_density
    return total.sum((1, 2))


@pytest.mark.quick(10)
@pytest.mark.parametrize(("bound", "size", "name", "handling", "mean", "spread"), ROWS)
def test_mean_and_spread(
    bound: Bound, size: int, name: str, handling: str, mean: tuple, spread: tuple | None
) -> None:
    grid = grid_of(size)
    draws = gradient(ESTIMATORS[name](bound, conjugate(grid.eps).log_weights), grid, handling)
    expectation = (draws * grid.weight).sum(-1)
    assert expectation.tolist() == pytest.approx(mean, abs=2e-7)
    if spread is not None:
        variance = (draws**2 * grid.weight).sum(-1) - expectation**2
        assert variance.sqrt().tolist() == pytest.approx(spread, abs=2e-5)


@pytest.mark.parametrize(("bound", "size", "expected"), MODEL)
def test_model_gradient(bound: Bound, size: int, expected: float) -> None:
    grid = grid_of(size)
    model = conjugate(grid.eps)
    draws = (bound.derivatives(model.log_weights).first * model.d_model).sum((0, 1))
    assert (draws * grid.weight).sum().item() == pytest.approx(expected, abs=2e-7)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimates_are_averaged(name: str) -> None:
    """A softmax over the wrong axis shows here: M estimates have the coefficients of one over M."""
    lw = 2 * torch.randn(3, 4, 5)
    whole = ESTIMATORS[name](IWAE, lw)
    each = [ESTIMATORS[name](IWAE, one[None]) for one in lw]
    for field in ("path", "density", "score"):
        if getattr(whole, field) is not None:
            apart = torch.cat([getattr(table, field) for table in each])
            torch.testing.assert_close(getattr(whole, field), apart / 3)


def test_rows_follow_from_the_bound() -> None:
    """DReG is the first minus the second derivative; the score is the signal minus the first."""
    lw = 2 * torch.randn(2, 3, 5)
    for bound in (IWAE, CIWAE, RENYI, JACKKNIFE):
        first, second = bound.derivatives(lw)
        torch.testing.assert_close(ESTIMATORS["dreg"](bound, lw).path, first - second)
        score = ESTIMATORS["score"](bound, lw).score
        without = bound.replaced(lw, torch.zeros_like(lw))
        signal = (bound.estimate(lw).unsqueeze(1) - without) / 2
        torch.testing.assert_close(score, signal + 1 / 6 - first)


# Discrete: z ~ Bern(.3), x = .4 | z ~ N(2z - 1, 1), q = Bern(sigmoid(.7)), K = 4; all 2^4 outcomes.
DISCRETE = [  # bound, estimator, value, mean in the logit, standard deviation
    (IWAE, "score", -1.60407317, -0.05080123, 0.66699),
    (IWAE, "vimco", -1.60407317, -0.05080123, 0.02802),
    (RENYI, "score", -1.62814344, -0.10934283, None),
    (RENYI, "vimco", -1.62814344, -0.10934283, None),
]


@pytest.mark.parametrize(("bound", "name", "value", "mean", "spread"), DISCRETE)
def test_discrete_enumeration(
    bound: Bound, name: str, value: float, mean: float, spread: float | None
) -> None:
    z = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4))).T[None]
    prior, guide = torch.tensor(0.3), torch.sigmoid(torch.tensor(0.7))
    log_q = torch.where(z == 1, guide.log(), (1 - guide).log())
    log_p = torch.where(z == 1, prior.log(), (1 - prior).log()) + log_normal(0.4, 2 * z - 1, 1.0)
    weight = log_q.sum((0, 1)).exp()
    score = ESTIMATORS[name](bound, log_p - log_q).score
    assert score is not None
    draws = (score * (z - guide)).sum((0, 1))
    assert (bound(log_p - log_q) * weight).sum().item() == pytest.approx(value, abs=1e-8)
    assert (draws * weight).sum().item() == pytest.approx(mean, abs=1e-8)
    if spread is not None:
        variance = (draws**2 * weight).sum() - mean**2
        assert variance.sqrt().item() == pytest.approx(spread, abs=1e-5)


def test_vimco_survives_dead_samples() -> None:
    lw = torch.randn(2, 3, 4)
    lw[0, :2, 0] = -torch.inf
    score = ESTIMATORS["vimco"](IWAE, lw).score
    assert score is not None and score.isfinite().all()


def test_exact_posterior_has_equal_weights() -> None:
    """With constant weights DReG's path coefficient is 1 / K^2, and VIMCO has no noise."""
    lw = torch.full((1, 4, 2), -3.0)
    torch.testing.assert_close(ESTIMATORS["dreg"](IWAE, lw).path, torch.full_like(lw, 1 / 16))
    torch.testing.assert_close(ESTIMATORS["vimco"](IWAE, lw).score, torch.zeros_like(lw))


@pytest.mark.parametrize("name", ["score", "vimco"])
@pytest.mark.parametrize(
    "bound",
    [ELBO, IWAE, CIWAE, RENYI, JACKKNIFE, bounds.Pooled(IWAE), bounds.Pooled(CIWAE)],
    ids=str,
)
def test_discrete_estimates(bound: Bound, name: str) -> None:
    """M = 2, K = 3: the mean over all outcomes is the derivative of the expectation."""
    z = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6))).T.reshape(2, 3, -1)
    logit = torch.tensor(0.4, requires_grad=True)
    log_q = z * logit - torch.nn.functional.softplus(logit)
    lw = torch.tensor(0.8) * z + log_normal(0.4, 2 * z - 1, 0.7) - log_q
    weight = log_q.sum((0, 1)).exp()
    (exact,) = torch.autograd.grad((bound(lw) * weight).sum(), logit)
    score = ESTIMATORS[name](bound, lw.detach()).score
    assert score is not None
    mean = (score * (z - logit.sigmoid())).sum((0, 1)) @ weight
    assert mean.item() == pytest.approx(exact.item(), abs=1e-12)
