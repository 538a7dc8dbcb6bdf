"""`fit_or_sample`: each stage on a posterior that needs it."""

import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.mcmc.util import diagnostics
from torch import Tensor

from pyro_recursive import fit_or_sample, pathfinder
from pyro_recursive.evaluation import posterior_draws
from pyro_recursive.training import automatic, nuts

X = torch.tensor([0.3, -1.2, 0.8, 0.1], dtype=torch.float64)


def scales(x: Tensor) -> None:
    """A scale, which is skewed, and a location."""
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)
    pyro.deterministic("variance", scale**2)


def shorten_warmup(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WARMUP", "LONG_WARMUP"):
        monkeypatch.setattr(nuts, name, 5)


def test_a_gaussian_posterior_takes_no_second_stage() -> None:
    loc, factor = torch.tensor([3.0, -1.0]), torch.tensor([[2.0, 0.0], [1.0, 0.1]])

    def model() -> None:
        pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=factor))

    found = fit_or_sample(model, paths=2)
    assert found.mcmc is None and len(found.stages) == 1 and found["z"].shape == (4000, 2)
    assert found.pareto_k < 0.1 and found.num_gradients < 200
    white = torch.linalg.solve_triangular(factor, (found["z"] - loc).mT, upper=False)
    assert white.mean(-1).abs().max() < 0.09 and (white.var(-1) - 1).abs().max() < 0.12
    table = str(found).splitlines()
    assert table[0].split() == ["stage", "ELBO", "k-hat", "ESS", "gradients", "densities", "s"]
    assert table[1].startswith("Pathfinder") and "4000 draws, weighted" in table[2]


def test_guides_of_all_results_can_be_called_beside_each_other() -> None:
    """Pyro's store is by name, and has the parameters of another guide of that class."""

    def model(x: Tensor) -> None:
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 9.0)), 0.1), obs=x)

    data = torch.tensor([2.0, -5.0, 3.0])
    guides = [pathfinder(model, data[0], paths=1)]
    posterior_draws(model, guides[0], data[0], num_draws=2)
    stored = set(pyro.get_param_store())
    guides += [fit_or_sample(model, x, paths=1, num_draws=4).guide for x in data[1:]]
    assert set(pyro.get_param_store()) == stored
    for x, guide in zip(data, guides, strict=True):
        draws = posterior_draws(model, guide, x, num_draws=4)["z"]
        assert ((draws - x).abs() < 1).all()


def test_keywords_are_those_of_the_model() -> None:
    """Also where functions that are called on the way have some of these names."""
    seen: set[tuple[str, str, int]] = set()

    def model(x: Tensor, family: str = "", name: str = "", chunk_size: int = 0) -> None:
        seen.add((family, name, chunk_size))
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 9.0)), 0.1), obs=x)

    given: dict[str, Any] = {"family": "poisson", "name": "b", "chunk_size": 2}
    found = fit_or_sample(model, X[0], paths=1, num_draws=4, **given)
    nuts.nuts_start(found.guide, model, X[0], num_draws=40, **given)
    assert seen == {("poisson", "b", 2)}


def outside(z: Tensor) -> None:
    """A scale that is negative beyond 3.2."""
    pyro.sample("x", dist.Normal(0.0, torch.where(z > 3.2, -1.0, 1.0)), obs=torch.tensor(0.0))


def indefinite(z: Tensor) -> None:
    """A matrix that has no Cholesky factor beyond 1 / 0.3."""
    corner = 0.3 * z[..., None, None] * torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    factor = torch.linalg.cholesky(torch.eye(2) + corner)
    pyro.factor("f", 0.0 * factor[..., 0, 0])


@pytest.mark.parametrize("failing", [outside, indefinite])
def test_draws_at_which_the_model_fails_have_no_weight(failing: Any) -> None:
    def model() -> None:
        failing(pyro.sample("z", dist.Normal(0.0, 1.0)))

    pyro.set_rng_seed(2)
    found = fit_or_sample(model, paths=2)
    stage = found.stages[0]
    assert found.mcmc is None and stage.elbo == -torch.inf and stage.ess > 9900
    assert 2.5 < found["z"].max() < 1 / 0.3
    assert found["z"].var() == pytest.approx(1.0, abs=0.1)
    start = nuts.nuts_start(found.guide, model)
    assert start["warmup_steps"] == 50
    assert start["kernel"].start_matrix.item() == pytest.approx(1.0, abs=0.1)


@pytest.mark.filterwarnings("ignore:Samples run one by one")
def test_a_run_that_looks_at_the_structure_and_fails_is_repeated_at_another_point() -> None:
    def model() -> None:
        outside(pyro.sample("z", dist.Normal(0.0, 1.0)))

    def guide() -> None:
        pyro.sample("z", dist.Normal(limit, 1.0))  # every second draw fails

    limit = 3.2
    density = nuts.LogDensity(model)
    for seed in range(4):
        pyro.set_rng_seed(seed)
        found = nuts.draws_where_possible(density, lambda: guide(), 3)  # a guide not yet known
        assert not found.are_all and len(found.draws) == 3
        assert found.draws["z"].max() < limit


def test_a_model_that_always_fails_is_told() -> None:
    calls: list[int] = []

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if calls:
            raise ValueError("the rows of my table differ")
        pyro.factor("f", -z)

    guide, density = pathfinder(model, paths=1), nuts.LogDensity(model)
    calls.append(1)
    with pytest.raises(ValueError, match="rows of my table"):
        nuts.draws_where_possible(density, guide, 100)


def test_numbers_that_are_constant_have_no_r_hat() -> None:
    chains = torch.randn(2, 50, 3, 3).tril()
    chains[..., 0, 0] = 1.0

    def worst(**samples: Tensor) -> tuple[float, float]:
        found = {"gradients": {"chain 0": 3}, "divergences": {"chain 0": []}}
        mcmc: Any = SimpleNamespace(
            diagnostics=lambda: found, get_samples=lambda group_by_chain: samples
        )
        stage = automatic._of_chains(mcmc, 0.0)
        return stage.r_hat, stage.ess

    rest = chains[..., [1, 1, 2, 2, 2], [0, 1, 0, 1, 2]]
    assert worst(z=rest + 1, factor=chains) == worst(factor=chains) == worst(factor=rest)
    assert worst(factor=chains) == (
        diagnostics({"z": rest})["z"]["r_hat"].max(),
        diagnostics({"z": rest})["z"]["n_eff"].min(),
    )
    stuck = torch.tensor([0.0, 1.0])[:, None, None].expand(2, 50, 1)
    assert not worst(z=stuck, y=rest)[0] < 10
    assert not worst(z=torch.zeros(2, 50, 1))[0] < 10


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"r_hat": 1.06, "ess": 300.0}, "r-hat 1.06, 0 divergences in 1000 draws"),
        ({"r_hat": 1.0, "ess": 99.0}, "effective sample size of 99:"),
        ({"r_hat": 1.0, "ess": 300.0, "divergences": 1}, ", 1 divergences"),
        ({"r_hat": math.nan, "ess": 300.0}, "r-hat nan"),
        ({"r_hat": 1.05, "ess": 100.0}, None),
    ],
)
def test_draws_of_nuts_that_may_be_wrong_are_told(found: dict[str, Any], said: str | None) -> None:
    stage = automatic.StageReport("NUTS", num_gradients=1, num_values=0, seconds=0.0, **found)
    with nullcontext() if said is None else pytest.warns(UserWarning, match=said):
        automatic._warn_of_chains(stage, 1000)


def test_many_draws_take_more_proposals() -> None:
    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))

    found = fit_or_sample(model, paths=2, num_draws=6000)
    assert found.stages[0].ess == pytest.approx(15_000)
    assert len(found["z"]) == 6000 and len(found["z"].unique()) > 4800


@pytest.mark.filterwarnings("ignore:NUTS has r-hat")
def test_nuts_starts_where_weights_are_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LEAST_DRAWS": 0, "ROUNDS": 1, "PROPOSALS": 300, "LEAST_SHARE": 2}.items():
        monkeypatch.setattr(automatic, name, value)
    shorten_warmup(monkeypatch)
    found = fit_or_sample(scales, X, paths=2, num_draws=10)
    assert [stage.name for stage in found.stages] == ["Pathfinder", "moments 1", "NUTS"]
    assert found["scale"].shape == (10,) and bool((found["scale"] > 0).all())
    assert {*found} == {*found.keys()} == {*dict(found)} == {"loc", "scale", "variance"}
    assert "scale" in found and "x" not in found
    with pytest.raises(KeyError, match="No draws of 'x', only of"):
        found["x"]
    torch.testing.assert_close(found["variance"], found["scale"] ** 2)
    counts = found.mcmc.diagnostics()["gradients"]["chain 0"]
    assert found.stages[-1].num_gradients == counts > 15
    assert found.num_gradients == sum(stage.num_gradients for stage in found.stages)
    assert "10 draws of NUTS: r-hat at most" in str(found)


@pytest.mark.filterwarnings("ignore:NUTS has r-hat")
def test_moments_of_few_draws_are_not_matched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LEAST_DRAWS": 400, "PROPOSALS": 300, "LEAST_SHARE": 2}.items():
        monkeypatch.setattr(automatic, name, value)
    shorten_warmup(monkeypatch)
    found = fit_or_sample(scales, X, paths=2, num_draws=4)
    assert [stage.name for stage in found.stages] == ["Pathfinder", "NUTS"]


def test_one_step_has_the_weighted_moments_of_the_draws() -> None:
    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    guide, u = pathfinder(model, paths=2), torch.randn(400, 2) + 1
    log_weights = torch.rand(400)
    mixture = guide.gaussians, guide.component_weights().detach().log()
    automatic._match_moments(guide, *mixture, u, log_weights)
    after = guide.gaussians
    weights = automatic.psis(log_weights).log_weights.exp()
    torch.testing.assert_close(after.loc[0], weights @ u)
    expected = automatic.weighted_covariance(u, weights)
    torch.testing.assert_close(after.scale_tril[0] @ after.scale_tril[0].mT, expected)


def test_more_paths_follow_where_modes_may_be_missing() -> None:
    """Of five narrow modes five paths find three; k-hat does not tell of the others."""
    modes = torch.linspace(-1.6, 1.6, 5)

    def model() -> None:
        z = pyro.sample("z", dist.Uniform(-4.0, 4.0))
        density = dist.Normal(modes, 0.1).log_prob(z[..., None]).logsumexp(-1)
        pyro.factor("five modes", density)

    pyro.set_rng_seed(1)
    found = fit_or_sample(model, paths=5)
    z = found["z"]
    shares = torch.bincount((z[:, None] - modes).abs().argmin(-1), minlength=5) / len(z)
    assert len(found.guide.components) == 5 and found.guide.report is not None
    assert found.stages[0].num_gradients > found.guide.report.num_gradients
    assert ((shares - 0.2).abs() < 5 * (0.16 / len(z)) ** 0.5).all()


def test_both_of_two_modes_stay() -> None:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z**2, 0.5), obs=x)

    x = torch.tensor([3.9, 4.2])
    guide = pathfinder(model, x)
    draws = posterior_draws(model, guide, x, num_draws=4000)
    mixture = guide.gaussians, guide.component_weights(x).detach().log()
    automatic._match_moments(guide, *mixture, draws["z"][:, None], draws.log_weights)
    after, log_weights = guide.gaussians, guide.component_weights(x).detach().log()
    assert after.loc.abs().sub(2.0).abs().max() < 0.05 and after.loc.sum().abs() < 0.1
    assert log_weights.exp() == pytest.approx([0.5, 0.5], abs=0.05)


def test_moments_of_eight_schools_are_matched_without_gradients() -> None:
    """Pathfinder's own Gaussian has a k-hat above 0.7, or weights that are worth few draws."""
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def model() -> None:
        mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", 8):
            theta = mu + tau * pyro.sample("raw", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    pyro.set_rng_seed(0)
    found = fit_or_sample(model)
    assert found.mcmc is None and found.stages[1].name == "moments 1"
    for stage in found.stages[1:]:
        assert stage.num_gradients == 0 and stage.num_values == automatic.PROPOSALS
    assert found.stages[-1].ess > found.stages[0].ess
    assert found["mu"].mean() == pytest.approx(4.37, abs=0.35)  # long runs of NUTS
    assert found["tau"].mean() == pytest.approx(3.6, abs=0.35)
