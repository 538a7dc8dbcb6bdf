"""NUTS on the packed density: supports, matrices, starts from guides, and counts of gradients."""

import multiprocessing
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor
from torch.distributions import constraints

from pyro_recursive import (
    AmortizedGuide,
    FlowGuide,
    MixtureGuide,
    RecursiveMixtureGuide,
    nuts_start,
    pathfinder,
)
from pyro_recursive.evaluation import posterior_draws
from pyro_recursive.guides.log_density import LogDensity
from pyro_recursive.training.nuts import PackedNUTS, packed, weighted_covariance
from pyro_recursive.training.potential import Potential

LOC = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
FACTOR = torch.tensor([[2.0, 0, 0], [1.5, 0.3, 0], [-1.0, 0.2, 0.7]], dtype=torch.float64)
COVARIANCE = FACTOR @ FACTOR.mT


def correlated() -> None:
    """A Gaussian over sites that are named in unsorted order, one with a flat prior."""
    z = pyro.sample("z", dist.ImproperUniform(constraints.real, (), ()))
    with pyro.plate("two", 2):
        a = pyro.sample("a", dist.Normal(0.0, 1.0).mask(False))
    shape = torch.broadcast_shapes(z.shape, a.shape[:-1])
    u = torch.cat([z.expand(shape)[..., None], a.expand(*shape, 2)], -1)
    pyro.factor("density", dist.MultivariateNormal(LOC, scale_tril=FACTOR).log_prob(u))


def bounded() -> None:
    """``beta`` is below 1 - alpha, and both are uniform: the mean of alpha is 1/3."""
    alpha = pyro.sample("alpha", dist.ImproperUniform(constraints.unit_interval, (), ()))
    support = constraints.interval(torch.zeros(()), 1 - alpha)
    pyro.sample("beta", dist.ImproperUniform(support, (), ()))


def run(num_samples: int, *args: Any, **start: Any) -> MCMC:
    mcmc = MCMC(num_samples=num_samples, disable_progbar=True, **start)
    mcmc.run(*args)
    return mcmc


@pytest.mark.parametrize("count", [10, pytest.param(300, marks=pytest.mark.slow)])
def test_the_kernel_uses_the_given_matrix_in_every_step(count: int) -> None:
    start = nuts_start(pathfinder(correlated, paths=2), correlated)
    assert start["warmup_steps"] == 50
    matrix, scale = start["kernel"].start_matrix, COVARIANCE.diagonal().sqrt()
    assert ((matrix - COVARIANCE) / scale / scale[:, None]).abs().max() < 0.08
    seen: list[Tensor] = []

    def hook(kernel: PackedNUTS, params: Any, stage: str, i: int) -> None:
        seen.append(kernel.inverse_mass_matrix.clone())

    start["warmup_steps"] = min(count, 50)
    mcmc = run(count, **start, hook_fn=hook)
    assert len(seen) == count + start["warmup_steps"]
    assert all(torch.equal(each, matrix) for each in seen)
    assert len(seen) < mcmc.diagnostics()["gradients"]["chain 0"] < 40 * len(seen)
    draws = mcmc.get_samples()
    u = torch.cat([draws["z"][:, None], draws["a"]], -1)
    white = torch.linalg.solve_triangular(FACTOR, (u - LOC).mT, upper=False)
    assert white.mean(-1).abs().max() < 4 / count**0.5
    assert white.square().mean(-1).sub(1).abs().max() < 6 / count**0.5


def test_one_latent_has_a_matrix_too() -> None:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.HalfCauchy(10.0))
        pyro.sample("x", dist.Normal(z, 0.1), obs=x)

    x = torch.tensor(50.0)
    start = nuts_start(pathfinder(model, x, paths=2), model, x)
    assert start["kernel"].start_matrix.shape == (1, 1)
    z = run(10, x, **{**start, "warmup_steps": 5}).get_samples()["z"]
    assert z.mean() == pytest.approx(50.0, abs=0.2) and 0.01 < z.std() < 0.4


@pytest.mark.parametrize("count", [10, pytest.param(400, marks=pytest.mark.slow)])
def test_supports_are_read_at_each_point(count: int) -> None:
    guide = AmortizedGuide(bounded, family="full", init_scale=1.0)
    guide.prepare()
    start = nuts_start(guide, bounded)
    if count == 10:
        start["warmup_steps"] = 20
    draws = run(count, **start).get_samples()
    assert bool((draws["alpha"] + draws["beta"] < 1).all())
    for name in ("alpha", "beta"):
        assert draws[name].mean() == pytest.approx(1 / 3, abs=1.2 / count**0.5)


def test_a_guide_that_is_far_away_leaves_the_matrix_to_warm_up() -> None:
    guide = AmortizedGuide(correlated, init_scale=0.01)
    guide.prepare()
    start = nuts_start(guide, correlated)
    assert start["warmup_steps"] == 500 and start["kernel"].options["adapt_mass_matrix"]
    seen = []
    hook = lambda kernel, *rest: seen.append(kernel.inverse_mass_matrix.clone())  # noqa: E731
    run(5, **{**start, "warmup_steps": 20}, hook_fn=hook)
    assert not torch.equal(seen[0], seen[-1])


@pytest.mark.filterwarnings("ignore:num_chains=3")
def test_chains_start_at_draws_of_their_own() -> None:
    start = nuts_start(pathfinder(correlated, paths=2), correlated, num_chains=3)
    assert start["initial_params"]["z"].shape == (3,)
    assert start["initial_params"]["a"].shape == (3, 2)
    assert len(start["initial_params"]["z"].unique()) == 3
    mcmc = run(4, **{**start, "warmup_steps": 2})
    samples = mcmc.get_samples(group_by_chain=True)
    assert samples["z"].shape == (3, 4) and samples["a"].shape == (3, 4, 2)
    assert set(mcmc.diagnostics()["gradients"]) == {"chain 0", "chain 1", "chain 2"}


def test_more_chains_than_draws_are_refused() -> None:
    with pytest.raises(ValueError, match=r"3 draws .* each of 4 chains needs one\. Give more"):
        nuts_start(pathfinder(correlated, paths=2), correlated, num_chains=4, num_draws=3)


def test_chains_in_processes_have_starts_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """`MCMC` gives all starts to one kernel, and names processes by the numbers of chains."""
    kernel = PackedNUTS(bounded)
    for point in (0.2, 0.7):
        kernel.initial_params = {"alpha": torch.tensor(point).logit(), "beta": torch.zeros(())}
    for name, alpha in {"0": 0.2, "1": 0.7, "MainProcess": 0.7}.items():
        monkeypatch.setattr(multiprocessing.current_process(), "_name", name)
        kernel.setup(1)
        assert kernel.initial_params["alpha"].item() == pytest.approx(alpha)


@pytest.mark.slow
def test_without_a_guide_chains_start_at_random_and_adapt() -> None:
    mcmc = run(200, kernel=PackedNUTS(correlated, full_mass=True), warmup_steps=150)
    draws = mcmc.get_samples()
    assert ((draws["a"].mean(0) - LOC[1:]) / COVARIANCE.diagonal()[1:].sqrt()).abs().max() < 0.35
    counts = mcmc.diagnostics()
    assert counts["warm-up gradients"]["chain 0"] < counts["gradients"]["chain 0"]


def plates(x: Tensor) -> None:
    """Supports of many kinds, inside and outside of plates."""
    share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
    low = pyro.sample("low", dist.Uniform(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Uniform(low, 2.0))
        pyro.sample("x", dist.Normal(z + share[..., :1], 0.3), obs=x)


X = torch.tensor([0.9, 1.4], dtype=torch.float64)
GUIDES: dict[str, Callable] = {
    "Gaussian": AmortizedGuide,
    "rows": partial(AmortizedGuide, plate="data"),
    "mixture": lambda model: MixtureGuide(model, 2),
    "recursive mixture": lambda model: RecursiveMixtureGuide(model, 2),
    "flow": partial(FlowGuide, hidden=(8,)),
    "pathfinder": lambda model: pathfinder(model, X, paths=2),
    "AutoNormal": AutoNormal,
}


@pytest.mark.quick("mixture", "AutoNormal")
@pytest.mark.parametrize("kind", GUIDES)
def test_draws_of_any_guide_are_packed(kind: str) -> None:
    guide = GUIDES[kind](plates)
    density = LogDensity(plates, (X,))
    draws = posterior_draws(plates, guide, X, num_draws=30)
    u = packed(density, draws)
    assert u.shape == (30, 5)
    for row in (0, 17):
        for name, value in density.values_at(u[row]).items():
            torch.testing.assert_close(value, draws[name][row])
    start = nuts_start(guide, plates, X, num_draws=100)
    point = density.block.flatten(start["initial_params"]).reshape(-1)
    assert bool(density(point).isfinite())


def test_an_autoguide_of_pyro_starts_chains() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AutoMultivariateNormal(model)
    guide(X)
    start = {**nuts_start(guide, model, X), "warmup_steps": 2}
    samples = run(4, X, **start).get_samples()
    assert samples["z"].shape == (4, 2) and bool((samples["z"] > 0).all())


def test_enumerated_latents_are_summed_out() -> None:
    x = torch.tensor([-2.0, -1.5, 1.8, 2.1])

    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            sign = pyro.sample("sign", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(loc * (2 * sign - 1), 0.5), obs=x)

    start = nuts_start(pathfinder(model, x, paths=2), model, x)
    samples = run(10, x, **{**start, "warmup_steps": 10}).get_samples()
    assert set(samples) == {"loc"}
    assert samples["loc"].mean() == pytest.approx(x.abs().mean().item(), abs=0.4)


@pytest.mark.parametrize(
    "model", [correlated, bounded, partial(plates, X)], ids=["flat", "bounds", "plates"]
)
def test_a_graph_has_the_density_and_the_gradient_of_runs(model: Callable) -> None:
    density = LogDensity(model)
    potential = Potential(density, torch.zeros(density.size))
    assert potential.is_traced
    for u in torch.randn(3, density.size):
        leaf = u.clone().requires_grad_()
        value = potential(leaf)
        (grad,) = torch.autograd.grad(3 * value, leaf)
        expected, gradient = density.gradient(u)
        torch.testing.assert_close(value.detach(), -expected)
        torch.testing.assert_close(grad, -3 * gradient)
    assert potential.num_gradients == 3


@pytest.mark.filterwarnings("ignore:The model runs for each point")
def test_a_model_that_looks_at_its_latents_has_no_graph() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("step", -z if z > 0 else 2 * z)

    density = LogDensity(model)
    potential = Potential(density, torch.ones(1))
    assert not potential.is_traced
    for point in (-1.0, 1.0):
        u = torch.full((1,), point)
        torch.testing.assert_close(potential(u), -density(u))


def test_where_the_model_fails_the_potential_is_infinite() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 0.1))
        matrix = torch.eye(2) + z[..., None, None] * torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        pyro.factor("density", torch.linalg.cholesky(matrix).diagonal(dim1=-2, dim2=-1).sum(-1))

    potential = Potential(LogDensity(model), torch.zeros(1))
    assert potential(torch.tensor([2.0])).item() == torch.inf
    assert potential(torch.tensor([0.3])).item() < torch.inf


def test_the_covariance_is_that_of_weights_and_shrinks_to_its_diagonal() -> None:
    u, weights = torch.randn(500, 3) @ FACTOR.mT, torch.rand(500)
    weights = weights / weights.sum()
    mean = weights @ u
    expected = (weights[:, None] * (u - mean)).mT @ (u - mean) / (1 - weights.square().sum())
    found, ess = weighted_covariance(u, weights), 1 / weights.square().sum()
    torch.testing.assert_close(found.diagonal(), expected.diagonal())
    torch.testing.assert_close(found[0, 1], expected[0, 1] * ess / (ess + 5))
    few = weighted_covariance(torch.randn(2, 3), torch.full((2,), 0.5))
    torch.linalg.cholesky(few)
