"""ArviZ objects of enumerated models, and leave-one-out against quadrature over all values."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_recursive.evaluation.arviz import loo, mcmc_to_arviz, to_arviz
from pyro_recursive.evaluation.leave_one_out import has_group
from tests.models.enumerated import ENUMERATED, PARALLEL
from tests.models.row import normal
from tests.oracles.arviz_objects import Chains, pointwise

ROW = {row.name: row for row in ENUMERATED}
X = torch.tensor([-2.0, -1.4, 0.3, 1.8, 2.6], dtype=torch.float64)
WEIGHTS, LOCS = torch.tensor([[0.4, 0.6], [-1.5, 2.0]], dtype=torch.float64)


def test_the_groups_of_an_object() -> None:
    row, x = ROW["hmm"], ROW["hmm"].x()
    data = to_arviz(row.model, row.guide, x, num_draws=50, prior_predictive=True)
    names = {"z", "y0", "y1", "y2"}
    assert set(data["posterior"].data_vars) == set(data["prior"].data_vars) == names
    assert dict(data["posterior"]["y1"].sizes) == {"chain": 1, "draw": 50, "data": 2}
    assert set(np.unique(data["posterior"]["y1"])) == {0, 1}
    assert dict(data["log_likelihood"]["x0+x1+x2"].sizes) == {"chain": 1, "draw": 50, "data": 2}
    assert set(data["log_likelihood"].data_vars) == {"x0+x1+x2"}
    assert "factors" not in data["log_likelihood"].attrs
    assert set(data["observed_data"].data_vars) == {"x0", "x1", "x2"}
    assert set(data["posterior_predictive"].data_vars) == {"x0", "x1", "x2"}
    # What the weights are of: log p is summed over the steps.
    stats, loc = data["sample_stats"], torch.from_numpy(data["posterior"]["z"].values[0])
    log_p = torch.from_numpy(stats["log_p"].values[0])
    log_likelihood = torch.from_numpy(data["log_likelihood"]["x0+x1+x2"].values[0])
    torch.testing.assert_close(log_p, log_likelihood + dist.Normal(0.0, 0.7).log_prob(loc))
    with pytest.raises(ValueError, match=r"no log-likelihood of 'x1', only of \['x0\+x1\+x2'\]"):
        loo(data, "x1")


def test_loo_is_that_of_the_sum_by_hand() -> None:
    row, found = ROW["hmm"], []
    for model in (row.model, row.collapsed):
        pyro.set_rng_seed(0)
        groups = {"posterior_predictive": False, "num_draws": 500}
        found.append(pointwise(loo(to_arviz(model, row.guide, row.x(), **groups))))
    torch.testing.assert_close(*found)


# Log p of each datum given the others: a global location, and a choice in each row.


def log_marginals(x: Tensor, loc: Tensor, scale: float) -> Tensor:
    """Return log p(x_i | loc), ``[*loc, rows]``."""
    parts = dist.Normal(loc[..., None, None] + LOCS, scale).log_prob(x.unsqueeze(-1))
    return (WEIGHTS.log() + parts).logsumexp(-1)


def exact_loo(x: Tensor, scale: float) -> Tensor:
    """Return log p(x_i | the others), by quadrature over the location."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(120)
    nodes, log_weights = torch.tensor(nodes), torch.tensor(weights / weights.sum()).log()
    rows = log_marginals(x, nodes, scale)
    total = log_weights + rows.sum(-1)
    return total.logsumexp(0) - (total.unsqueeze(-1) - rows).logsumexp(0)


def shared_choice(x: Tensor) -> None:
    """The choice generates the data: a likelihood with a sum."""
    mu = normal("mu", 0.0, 1.0)
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(WEIGHTS), infer=PARALLEL)
        normal("x", LOCS[y] + mu, 1.0, obs=x)


def mu_guide(x: Tensor) -> None:
    """Off by half a scale, and too wide."""
    normal("mu", 0.1, 0.6)


def local_latents(x: Tensor) -> None:
    """The choice generates a latent of the row, whose prior has the sum."""
    mu = normal("mu", 0.0, 1.0)
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(WEIGHTS), infer=PARALLEL)
        z = normal("z", LOCS[y] + mu, 0.6)
        normal("x", z, 0.8, obs=x)


def both_guides(x: Tensor) -> None:
    mu_guide(x)
    with pyro.plate("data", len(x)):
        normal("z", 0.4 * x, 1.6)


LOO = [
    (shared_choice, mu_guide, X),
    pytest.param(local_latents, both_guides, X[::2], marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("model", "guide", "x"), LOO)
@pytest.mark.filterwarnings("ignore:.*k-hat")
def test_loo_of_a_mixture_is_exact(model: Callable, guide: Callable, x: Tensor) -> None:
    options: dict[str, Any] = {"num_draws": 4000, "posterior_predictive": False}
    runs = [pointwise(loo(to_arviz(model, guide, x, **options))) for _ in range(16)]
    found, error = torch.stack(runs).mean(0), torch.stack(runs).std(0) / 4
    expected = exact_loo(x, 1.0)
    assert ((found - expected).abs() < 4 * error + 0.01).all() and error.max() < 0.05
    no_weights = log_marginals(x, dist.Normal(0.1, 0.6).sample((4000,)), 1.0).logsumexp(0)
    assert (no_weights - math.log(4000) - expected).abs().max() > 0.05


def test_chains_are_given_draws_of_what_they_sum_out() -> None:
    mu = dist.Normal(0.1, 0.4).sample((2, 400))
    data = mcmc_to_arviz(Chains({"mu": mu}), shared_choice, X)
    y = torch.from_numpy(data["posterior"]["y"].values)
    assert y.shape == (2, 400, 5)
    p = WEIGHTS.log() + dist.Normal(LOCS + mu[..., None, None], 1.0).log_prob(X.unsqueeze(-1))
    p = p.softmax(-1)[..., 1]
    error = (p * (1 - p)).mean((0, 1)).sqrt() / 800**0.5
    assert ((y - p).mean((0, 1)).abs() < 4.5 * error).all()
    expected = log_marginals(X, mu, 1.0).numpy()
    np.testing.assert_allclose(data["log_likelihood"]["x"].values, expected)
    assert not has_group(data, "sample_stats")

    def by_hand(x: Tensor) -> None:
        mu = normal("mu", 0.0, 1.0)
        with pyro.plate("data", len(x)):
            parts = dist.Categorical(WEIGHTS), dist.Normal(LOCS + mu.unsqueeze(-1), 1.0)
            pyro.sample("x", dist.MixtureSameFamily(*parts), obs=x)

    # The draws that are added have no part in the efficiency of the chains.
    expected = loo(mcmc_to_arviz(Chains({"mu": mu}), by_hand, X))
    torch.testing.assert_close(pointwise(loo(data)), pointwise(expected))
