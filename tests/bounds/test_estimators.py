"""Each row of coefficients against quadrature and enumeration: mean and spread, no Monte Carlo.

The tables hold the mean of the estimator in (m, s) for the conjugate model of `quadrature`, and for
K = 3 its standard deviation per draw. Expectations are sums over a tensor grid, so that a wrong
coefficient cannot hide in noise.
"""

import itertools

import pytest
import torch

from pyro_recursive import bounds
from pyro_recursive.bounds import Bound
from pyro_recursive.bounds.estimators import ESTIMATORS, Coefficients
from tests.oracles.quadrature import Grid, conjugate, log_normal, normal_grid

IWAE, ELBO = bounds.iwae, bounds.elbo
CIWAE, RENYI = bounds.ciwae(0.3), bounds.renyi(0.5)

# bound, estimator, handling, mean (m, s), standard deviation per draw (m, s)
AT_THREE = [
    (IWAE, "pathwise", "path", (0.25931090, -0.01864180), (1.00089, 1.15382)),
    (IWAE, "dreg", "path", (0.25931090, -0.01864180), (0.18825, 0.18460)),
    (IWAE, "score", "score", (0.25931090, -0.01864180), (3.90024, 5.26895)),
    (IWAE, "vimco", "score", (0.25931090, -0.01864180), (0.69719, 0.89315)),
    (IWAE, "dreg+score", "score", (0.25931090, -0.01864180), (3.90024, 5.26895)),
    (IWAE, "dreg+vimco", "score", (0.25931090, -0.01864180), (0.69719, 0.89315)),
    (IWAE, "dreg+vimco", "path", (0.25931090, -0.01864180), (0.18825, 0.18460)),
    (IWAE, "stl", "path", (0.71652639, -0.17836596), (0.38306, 0.42910)),
    (IWAE, "rws", "score", (0.45721549, -0.15972417), (0.61783, 0.91249)),
    (IWAE, "rws", "path", (0.45721549, -0.15972417), (0.61783, 0.91249)),
    (IWAE, "rws-dreg", "path", (0.45721549, -0.15972417), (0.21439, 0.26600)),
    (CIWAE, "pathwise", "path", (0.48151763, -0.21971592), (0.96718, 1.16180)),
    (CIWAE, "dreg", "path", (0.48151763, -0.21971592), (0.23955, 0.32158)),
    (CIWAE, "vimco", "score", (0.48151763, -0.21971592), None),
    (CIWAE, "score", "score", (0.48151763, -0.21971592), None),
    (RENYI, "pathwise", "path", (0.54574155, -0.20890031), (0.96808, 1.13265)),
    (RENYI, "dreg", "path", (0.54574155, -0.20890031), (0.25680, 0.32486)),
    (RENYI, "vimco", "score", (0.54574155, -0.20890031), None),
    (RENYI, "score", "score", (0.54574155, -0.20890031), None),
    (ELBO, "pathwise", "path", (1.0, -0.68888889), (1.03923, 1.57903)),
    (ELBO, "stl", "path", (1.0, -0.68888889), (0.39773, 0.80605)),
    (ELBO, "dreg", "path", (1.0, -0.68888889), (0.39773, 0.80605)),
    (ELBO, "vimco", "score", (1.0, -0.68888889), None),
    (bounds.jackknife, "pathwise", "path", (-0.08597255, 0.13651005), None),
    (bounds.jackknife, "dreg", "path", (-0.08597255, 0.13651005), None),
]
AT_TWO = [
    (IWAE, "pathwise", "path", (0.43195263, -0.09621772)),
    (IWAE, "dreg", "path", (0.43195263, -0.09621772)),
    (IWAE, "score", "score", (0.43195263, -0.09621772)),
    (IWAE, "vimco", "score", (0.43195263, -0.09621772)),
    (IWAE, "stl", "path", (0.78259915, -0.26726049)),
    (IWAE, "rws", "path", (0.35064653, -0.17104278)),
    (CIWAE, "dreg", "path", (0.60236684, -0.27401907)),
    (RENYI, "dreg", "path", (0.64497166, -0.27894755)),
    (bounds.jackknife, "dreg", "path", (-0.13609474, 0.49645346)),
]
MODEL = [  # bound, K, d/dmu
    (IWAE, 3, 0.27034455),
    (CIWAE, 3, 0.15924118),
    (ELBO, 3, -0.1),
    (bounds.jackknife, 3, 0.44298628),
    (IWAE, 2, 0.18402369),
    (CIWAE, 2, 0.09881658),
    (bounds.jackknife, 2, 0.46804737),
]


def names(rows: list) -> list[str]:
    return [f"{type(row[0]).__name__}{i}-{row[1]}-{row[2]}" for i, row in enumerate(rows)]


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


@pytest.mark.parametrize("row", AT_THREE, ids=names(AT_THREE))
def test_three_samples(row: tuple) -> None:
    bound, name, handling, mean, spread = row
    grid = normal_grid(3)
    draws = gradient(ESTIMATORS[name](bound, conjugate(grid.eps).log_weights), grid, handling)
    expectation = (draws * grid.weight).sum(-1)
    assert expectation.tolist() == pytest.approx(mean, abs=2e-7)
    if spread is not None:
        variance = (draws**2 * grid.weight).sum(-1) - expectation**2
        assert variance.sqrt().tolist() == pytest.approx(spread, abs=2e-5)


@pytest.mark.parametrize("row", AT_TWO, ids=names(AT_TWO))
def test_two_samples(row: tuple) -> None:
    bound, name, handling, mean = row
    grid = normal_grid(2, nodes=64)
    draws = gradient(ESTIMATORS[name](bound, conjugate(grid.eps).log_weights), grid, handling)
    assert (draws * grid.weight).sum(-1).tolist() == pytest.approx(mean, abs=2e-7)


@pytest.mark.parametrize(("bound", "size", "expected"), MODEL)
def test_model_gradient(bound: Bound, size: int, expected: float) -> None:
    grid = normal_grid(size, nodes=64 if size == 2 else 48)
    model = conjugate(grid.eps)
    draws = (bound.derivatives(model.log_weights).first * model.d_model).sum((0, 1))
    assert (draws * grid.weight).sum().item() == pytest.approx(expected, abs=2e-7)


@pytest.mark.parametrize("name", ["pathwise", "dreg", "vimco"])
def test_estimates_are_averaged(name: str) -> None:
    """M = 2 estimates of K = 1 sample: a softmax over the wrong axis shows here."""
    grid = normal_grid(2, nodes=64)
    lw = conjugate(grid.eps).log_weights.movedim(1, 0)  # [2, 1, points]
    if name == "vimco":
        grid3 = normal_grid(3)
        three = conjugate(grid3.eps).log_weights
        twice = torch.cat([three, three])
        single, double = (ESTIMATORS[name](IWAE, v).score for v in (three, twice))
        assert single is not None and double is not None
        torch.testing.assert_close(double, torch.cat([single, single]) / 2)
        return
    table = ESTIMATORS[name](IWAE, lw)
    swapped = table._replace(
        path=None if table.path is None else table.path.movedim(0, 1),
        density=None if table.density is None else table.density.movedim(0, 1),
    )
    draws = gradient(swapped, grid, "path")
    assert (draws * grid.weight).sum(-1).tolist() == pytest.approx((1.0, -0.68888889), abs=2e-7)


def test_rows_follow_from_the_bound() -> None:
    """DReG is the first minus the second derivative; the score is the signal minus the first."""
    lw = 2 * torch.randn(2, 3, 5)
    for bound in (IWAE, CIWAE, RENYI, bounds.jackknife):
        first, second = bound.derivatives(lw)
        torch.testing.assert_close(ESTIMATORS["dreg"](bound, lw).path, first - second)
        score = ESTIMATORS["score"](bound, lw).score
        torch.testing.assert_close(score, bound.estimate(lw).unsqueeze(1) / 2 - first)


# Discrete: z ~ Bern(.3), x = .4 | z ~ N(2z - 1, 1), q = Bern(sigmoid(.7)), K = 4; all 2^4 outcomes.
DISCRETE = [  # bound, estimator, value, mean in the logit, standard deviation
    (IWAE, "score", -1.60407317, -0.05080123, 1.76172),
    (IWAE, "vimco", -1.60407317, -0.05080123, 0.21618),
    (RENYI, "score", -1.62814344, -0.10934283, None),
    (RENYI, "vimco", -1.62814344, -0.10934283, None),
]


@pytest.mark.parametrize("row", DISCRETE, ids=["iwae", "iwae-vimco", "renyi", "renyi-vimco"])
def test_discrete_enumeration(row: tuple) -> None:
    bound, name, value, mean, spread = row
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
    """With constant weights DReG's path coefficient is 1 / K^2, and VIMCO's signal is zero."""
    lw = torch.full((1, 4, 2), -3.0)
    torch.testing.assert_close(ESTIMATORS["dreg"](IWAE, lw).path, torch.full_like(lw, 1 / 16))
    torch.testing.assert_close(ESTIMATORS["vimco"](IWAE, lw).score, torch.full_like(lw, -1 / 4))
