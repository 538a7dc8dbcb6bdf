"""Pathfinder: exact on Gaussians, all modes of several, and a guide like any other."""

import copy
import gc
import math
import pickle
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from benchmarks.tasks.posteriors import EFFECTS, ERRORS, labels, square
from pyro_recursive import AmortizedGuide, Stratified_ELBO, fit, log_marginal, pathfinder
from pyro_recursive.evaluation import importance_weights, posterior_draws
from pyro_recursive.guides.gaussian_families import LowRank
from pyro_recursive.guides.log_density import LogDensity
from pyro_recursive.guides.pathfinder import mixture
from pyro_recursive.guides.pathfinder.gaussians import (
    BestOfPaths,
    Gaussians,
    find_gaussians,
    random_starts,
)
from pyro_recursive.guides.pathfinder.lbfgs import minimise


def gaussian(size: int, condition: float) -> tuple[Tensor, Tensor, Any]:
    """Return mean and covariance of a Gaussian, and a model whose posterior it is; log Z is 0."""
    basis = torch.linalg.qr(torch.randn(size, size)).Q
    scales = torch.logspace(0, math.log10(condition) / 2, size) / condition**0.25
    covariance = basis @ torch.diag(scales.square()) @ basis.mT
    covariance = (covariance + covariance.mT) / 2
    mean = torch.randn(size)

    def model() -> None:
        pyro.sample("z", dist.MultivariateNormal(mean, covariance))

    return mean, covariance, model


@pytest.mark.parametrize(("size", "condition"), [(3, 1e6), (20, 1e6), (1, 1.0)])
def test_a_gaussian_is_found_exactly(size: int, condition: float) -> None:
    mean, covariance, model = gaussian(size, condition)
    guide = pathfinder(model, paths=3)
    loc, scale_tril = guide.gaussian
    scale = covariance.diagonal().sqrt()
    assert ((loc - mean) / scale).abs().max() < 1e-6
    ratio = (scale_tril @ scale_tril.mT - covariance) / scale / scale[:, None]
    assert ratio.abs().max() < 1e-6
    assert guide.report.elbo == pytest.approx(0.0, abs=1e-6)
    assert guide.report.standard_error < 1e-6 and guide.report.pareto_k < 0.1
    assert guide.report.num_paths == (3,)


def test_pairs_of_a_path_are_enough_where_memory_is() -> None:
    _, _, model = gaussian(5, 100.0)
    density = LogDensity(model)
    density.hessian = _no_second_derivatives  # type: ignore[method-assign]
    found = find_gaussians(density, 4, memory=6)
    assert not bool(found.is_newton.any()) and found.elbo.min() > -0.2
    assert found.elbo.max() > -0.02


def _no_second_derivatives(u: Tensor) -> Any:
    raise RuntimeError("no second derivatives")


def rosenbrock(u: Tensor) -> tuple[Tensor, Tensor]:
    leaf = u.detach().requires_grad_()
    value = (1 - leaf[:, 0]) ** 2 + 100 * (leaf[:, 1] - leaf[:, 0] ** 2) ** 2
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


def test_paths_of_a_batch_are_those_of_single_runs() -> None:
    starts = torch.tensor([[-1.2, 1.0], [2.0, -1.0], [0.0, 3.0], [1.0, 1.0]])
    batch = minimise(rosenbrock, starts)
    for i in range(len(starts)):
        single, count = minimise(rosenbrock, starts[i : i + 1]), int(batch.moved[:, i].sum()) + 1
        assert int(single.moved.sum()) + 1 == count
        for name in ("points", "gradients", "diagonal"):
            one, other = getattr(batch, name)[:count, i], getattr(single, name)[:count, 0]
            torch.testing.assert_close(one, other)
    torch.testing.assert_close(batch.points[-1], torch.ones(4, 2), atol=1e-4, rtol=0.0)


def test_a_value_that_is_not_finite_shortens_the_step() -> None:
    def objective(u: Tensor) -> tuple[Tensor, Tensor]:  # minimum 1 at 1
        value = torch.where(u[:, 0] > 0, u[:, 0] - u[:, 0].log(), math.nan)
        return value, 1 - 1 / u

    found = minimise(objective, torch.tensor([[0.01], [30.0], [-1.0]]))
    torch.testing.assert_close(found.points[-1, :2], torch.ones(2, 1), atol=1e-3, rtol=0.0)
    assert found.moved.sum(0)[2] == 0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_two_modes_have_half_of_the_mass_each(seed: int) -> None:
    """Whatever the split of the paths."""
    problem = square()
    torch.manual_seed(seed)
    guide = pathfinder(problem.model, paths=8)
    assert guide.report.weights == pytest.approx((0.5, 0.5), abs=0.03)
    assert sum(guide.report.num_paths) <= 8
    weights = importance_weights(problem.model, guide, num_particles=20_000)
    assert problem.log_evidence - weights.log_weights.mean() < 0.013
    assert weights.pareto_k < 0.7


@pytest.mark.parametrize("seed", [0, 1])
def test_modes_have_their_masses_and_scales(seed: int) -> None:
    """However many paths find each of two Gaussians with masses of 0.8 and 0.2."""
    torch.manual_seed(seed)
    means, scales = torch.tensor([[-2.0, 0.0], [2.0, 1.0]]), torch.tensor([[0.5, 0.3], [0.2, 0.6]])
    shares = torch.tensor([0.8, 0.2]).log()

    def model() -> None:
        z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (2,)))
        terms = dist.Normal(means, scales).log_prob(z[..., None, :]).sum(-1)
        pyro.factor("mixture", (terms + shares).logsumexp(-1))

    guide = pathfinder(model, paths=16)
    assert guide.report.weights == pytest.approx((0.8, 0.2), abs=0.02)
    assert guide.report.elbo == pytest.approx(0.0, abs=0.01)
    params = torch.stack([component.free_global.detach() for component in guide.components])
    torch.testing.assert_close(params[:, :2], means, atol=0.01, rtol=0.0)
    torch.testing.assert_close(params[:, 2:4].exp(), scales, atol=0.01, rtol=0.0)


@pytest.mark.slow
def test_all_labels_are_found() -> None:
    problem = labels()
    guide = pathfinder(problem.model, paths=32)
    assert len(guide.components) == 6
    assert guide.report.weights == pytest.approx([1 / 6] * 6, abs=0.02)
    weights = importance_weights(problem.model, guide, num_particles=20_000)
    assert problem.log_evidence - weights.log_weights.mean() < 0.06


def centred_schools() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, torch.tensor(ERRORS)), obs=torch.tensor(EFFECTS))


def test_a_funnel_is_left_soon_and_told_by_k_hat() -> None:
    guide = pathfinder(centred_schools)
    assert guide.report.pareto_k > 0.7
    assert guide.report.num_gradients < 1400


X = torch.linspace(-2.0, 2.0, 30, dtype=torch.float64)
Y = 1.5 + 0.7 * X + 0.4 * torch.sin(12 * X)


def regression(x: Tensor, y: Tensor) -> None:
    """Flat priors, and a scale."""
    beta = pyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), (2,)))
    sigma = pyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(beta[..., 0] + beta[..., 1] * x, sigma), obs=y)


def test_the_result_is_a_guide_for_losses_and_evaluations() -> None:
    guide = pathfinder(regression, X, Y)
    assert "k-hat=" in repr(guide) and "of 8 paths" in repr(guide)
    evidence = log_marginal(regression, guide, X, Y, num_particles=4000)
    exact = evidence_of_regression()
    assert evidence.item() == pytest.approx(exact, abs=0.02)
    assert guide.report.elbo == pytest.approx(exact, abs=0.15)
    draws = posterior_draws(regression, guide, X, Y, num_draws=2000)
    assert draws["beta"].mean(0)[0].item() == pytest.approx(Y.mean().item(), abs=0.02)
    for again in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        assert again.report == guide.report
    svi = SVI(regression, guide, pyro.optim.Adam({"lr": 0.001}), Stratified_ELBO(64))
    assert svi.step(X, Y) == pytest.approx(-exact, abs=0.5)
    history = fit(regression, guide, (X, Y), loss=Trace_ELBO(), epochs=3, progress=False)
    assert len(history.loss) == 3


def test_a_later_guide_keeps_its_result() -> None:
    """Also where Pyro's store has parameters of an earlier one, of the same name."""

    def model(x: Tensor) -> None:
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 9.0)), 0.1), obs=x)

    for x in torch.tensor([2.0, -5.0]):
        guide = pathfinder(model, x, paths=2)
        expected = guide.gaussian
        draws = posterior_draws(model, guide, x, num_draws=4)["z"]
        assert ((draws - x).abs() < 1).all()
        torch.testing.assert_close(guide.gaussian, expected)
        guide.set_gaussians(Gaussians(expected[0][None] + 1, expected[1][None]), torch.zeros(1))
        draws = posterior_draws(model, guide, x, num_draws=4)["z"]
        assert ((draws - x - 1).abs() < 1).all()
        del guide
        gc.collect()


def test_guides_of_several_models_can_be_called_beside_each_other() -> None:
    def model(x: Tensor) -> None:
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 9.0)), 0.1), obs=x)

    data = torch.tensor([2.0, -5.0])
    guides = [pathfinder(model, x, paths=2) for x in data]
    assert [guide.name for guide in guides] == ["PathfinderGuide", "PathfinderGuide_2"]
    for x, guide in zip(data, guides, strict=True):
        draws = posterior_draws(model, guide, x, num_draws=4)["z"]
        assert ((draws - x).abs() < 1).all()


def evidence_of_regression() -> float:
    """By the closed form of flat coefficients and a sum over a grid of log sigma."""
    design = torch.stack([torch.ones_like(X), X], -1)
    rest = Y - design @ torch.linalg.lstsq(design, Y[:, None]).solution[:, 0]
    log_sigma = torch.linspace(-4.0, 3.0, 20_001)
    sigma, free = log_sigma.exp(), len(X) - 2
    given = -0.5 * rest.square().sum() / sigma**2 - free * (log_sigma + 0.5 * math.log(2 * math.pi))
    given = given - 0.5 * torch.logdet(design.mT @ design)
    return (given + log_sigma).logsumexp(0).item() + math.log(7.0 / 20_000)


def test_single_precision_finds_the_same() -> None:
    torch.set_default_dtype(torch.float32)
    x, y = X.float(), Y.float()
    guide = pathfinder(regression, x, y)
    assert guide.component(0).free_global.dtype == torch.float32
    assert guide.report.elbo == pytest.approx(evidence_of_regression(), abs=0.15)


@pytest.mark.parametrize("family", ["diagonal", LowRank(2)])
def test_other_families_have_the_member_closest_to_each_path(family: Any) -> None:
    guide = pathfinder(regression, X, Y, family=family, paths=4)
    weights = importance_weights(regression, guide, X, Y, num_particles=4000)
    values = weights.log_weights
    error = 6 * math.hypot(values.std().item() / 4000**0.5, guide.report.standard_error)
    assert guide.report.elbo == pytest.approx(values.mean().item(), abs=error)
    assert guide.component(0).family.num_parameters(3) == len(guide.component(0).free_global)
    assert guide(X, Y)["sigma"] > 0


def test_a_density_without_a_maximum_is_refused() -> None:
    def model() -> None:
        pyro.sample("z", dist.ImproperUniform(constraints.real, (), ()))

    with pytest.raises(ValueError, match="None of 2 paths has a Gaussian"):
        pathfinder(model, paths=2)
    with pytest.raises(ValueError, match="paths must be an integer >= 1"):
        pathfinder(model, paths=0)


def test_guides_start_where_paths_end() -> None:
    guide = AmortizedGuide(regression, init_loc_fn="pathfinder")
    guide.prepare(X, Y)
    beta = guide.median(X, Y)["beta"]
    torch.testing.assert_close(beta[..., 0].squeeze(), Y.mean(), atol=0.02, rtol=0.0)


def cut(limit: float) -> None:
    """A standard normal with the density 0 beyond a limit."""
    z = pyro.sample("z", dist.ImproperUniform(constraints.real, (), ()))
    pyro.factor("f", torch.where(z.abs() < limit, -0.5 * z.square(), -math.inf))


def test_gaussians_with_draws_of_density_0_are_not_found() -> None:
    with pytest.raises(ValueError, match="None of 3 paths has a Gaussian with a finite ELBO"):
        pathfinder(cut, 0.7, paths=3)


def test_one_draw_of_density_0_makes_the_elbo_minus_infinity(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mixture, "DRAWS", 200_000)
    report = pathfinder(cut, 4.0, paths=2).report  # one draw of 16,000 is beyond
    assert report.elbo == -math.inf and report.standard_error == math.inf
    assert report.pareto_k < 0.7


def test_starts_without_a_density_do_not_end_the_other_paths() -> None:
    starts = torch.tensor([[-1.2, 1.0], [2.0, -1.0], *[[math.nan, 0.0]] * 6])
    found = minimise(rosenbrock, starts)
    torch.testing.assert_close(found.points[-1, :2], torch.ones(2, 2), atol=1e-4, rtol=0.0)


def test_paths_that_end_soon_leave_others_some_iterations() -> None:
    starts = torch.tensor([[-1.2, 1.0], *[[1.0, 1.0]] * 7])  # seven at the minimum
    found = minimise(rosenbrock, starts)
    torch.testing.assert_close(found.points[-1, 0], torch.ones(2), atol=1e-4, rtol=0.0)


def test_a_start_in_a_flat_tail_is_left() -> None:
    def objective(u: Tensor) -> tuple[Tensor, Tensor]:
        leaf = u.detach().requires_grad_()
        value = -100 * (-leaf.square().sum(-1) / 2).exp()
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]

    start = torch.tensor([[5.0, 0.0]])  # with a gradient of 0.002
    found = minimise(objective, start)
    torch.testing.assert_close(found.points[-1, 0], torch.zeros(2), atol=1e-4, rtol=0.0)


def test_starts_without_a_density_are_told() -> None:
    def impossible() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", -math.inf + 0 * z)

    with pytest.raises(ValueError, match="not finite at any of 4 starts between -2 and 2"):
        pathfinder(impossible, paths=4)

    errors: list[bool] = []

    def failing() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if errors:
            raise ValueError("the rows of my table differ")
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    density = LogDensity(failing)
    errors.append(True)
    with pytest.raises(ValueError, match=r"raised at each of 4 starts.*rows of my table") as caught:
        find_gaussians(density, 4)
    assert "rows of my table" in str(caught.value.__cause__)


def test_only_starts_that_fail_are_evaluated_again() -> None:
    """From the same random numbers as if all were."""
    seen: list[Tensor] = []

    class Density:
        start, num_values, num_errors = torch.ones(2), 1, 0

        def __call__(self, u: Tensor) -> Tensor:
            seen.append(u.clone())
            return torch.where(u[:, 0] > 0.8, 0.0, math.nan)

    density: Any = Density()
    torch.manual_seed(0)
    found = random_starts(density, 8)
    assert bool((found[:, 0] > 0.8).all())
    assert all(bool((points[:, 0] <= 0.8).any()) for points in seen[:-1])
    torch.manual_seed(0)
    expected = 2 * (2 * torch.rand(8, 2) - 1)
    for attempt, points in enumerate(seen):
        if attempt:
            near = 1 + 2 * (1.01 - attempt / 100) * (2 * torch.rand(8, 2) - 1)
            wrong = expected[:, :1] <= 0.8
            assert len(points) == int(wrong.sum())
            expected = torch.where(wrong, near, expected)
    torch.testing.assert_close(found, expected)


def test_the_best_single_member_has_the_highest_elbo_of_members() -> None:
    """A correlated mode of more mass loses to an uncorrelated one where members are diagonal."""
    one, rho = torch.eye(2), 0.995
    other = torch.tensor([[1.0, rho], [rho, 1.0]])
    means = torch.tensor([[-30.0, 0.0], [30.0, 0.0]])

    def model() -> None:
        z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (2,)))
        terms = dist.MultivariateNormal(means, torch.stack([one, other])).log_prob(z[..., None, :])
        pyro.factor("mixture", (terms + torch.tensor([0.4, 0.6]).log()).logsumexp(-1))

    density = LogDensity(model)
    u = torch.cat([means[:1].expand(2, -1), means[1:].expand(2, -1)])
    scale_tril = torch.linalg.cholesky(torch.stack([one, one, other, other]))
    found = BestOfPaths(
        Gaussians(u, scale_tril), torch.tensor([0.4, 0.4, 0.6, 0.6]).log(), torch.ones(4) > 0
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture, "find_gaussians", lambda density, paths: found)
        patch.setattr(mixture, "LEAST_WEIGHT", 0.99)  # so that a single one is returned
        patch.setattr(mixture, "_weights", lambda *_: torch.tensor([1.0, 0.0]))
        guide = pathfinder(model, family="diagonal", paths=4)
    assert guide.component(0).free_global[0].item() == pytest.approx(-30.0)
    assert density.size == 2 and guide.report.elbo == pytest.approx(math.log(0.4), abs=0.05)
