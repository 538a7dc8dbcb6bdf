"""Evaluation of guides that enumerate latents: exact where the rest of the guide is exact."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate
from torch import Tensor

from pyro_recursive import log_marginal
from pyro_recursive.evaluation import importance_weights, posterior_draws
from tests.models.row import data, normal

PRIOR, LOCS = [0.2, 0.5, 0.3], [-1.0, 0.3, 1.2]
SCALE = (0.9**2 + 0.7**2) ** 0.5  # of data given a label
LABELS, SUPPORTED = torch.tensor([1, 0, 0, 2]), torch.tensor([False, True, False, False])


def model(x: Tensor, masked: bool = False, off: float = 0.0) -> None:
    with pyro.plate("data", len(x)):
        observed: dict[str, Any] = {"obs": LABELS, "obs_mask": SUPPORTED} if masked else {}
        y = pyro.sample("y", dist.Categorical(torch.tensor(PRIOR)), **observed)
        z = normal("z", torch.tensor(LOCS)[y], 0.9)
        normal("x", z, 0.7, obs=x)


def guide(x: Tensor, masked: bool = False, off: float = 0.0) -> None:
    """The exact posterior of z, and any distribution of y."""
    with pyro.plate("data", len(x)):
        logits = x.unsqueeze(-1) * torch.tensor([0.3, -0.5, 0.1])
        fn = dist.Categorical(logits=logits).mask(~SUPPORTED if masked else True)
        y = pyro.sample("y_unobserved" if masked else "y", fn)
        y = torch.where(SUPPORTED, LABELS, y) if masked else y
        gain = 0.9**2 / (0.9**2 + 0.7**2)
        loc = torch.tensor(LOCS)[y]
        normal("z", loc + gain * (x - loc) + off, gain**0.5 * 0.7)


def evidence_of_values(x: Tensor) -> Tensor:
    """Return log p(x, y) for each y on the right."""
    log_p = dist.Normal(torch.tensor(LOCS), SCALE).log_prob(x.unsqueeze(-1))
    return log_p + torch.tensor(PRIOR).log()


def evidence(x: Tensor, masked: bool = False) -> Tensor:
    each = evidence_of_values(x)
    whole = each.logsumexp(-1)
    if not masked:
        return whole
    return torch.where(SUPPORTED, each.gather(-1, LABELS.unsqueeze(-1)).squeeze(-1), whole)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_the_sum_is_exact(masked: bool, vectorize: bool) -> None:
    """Each weight is log p(x), whatever the guide's distribution of y."""
    programs, exact = (model, config_enumerate(guide)), evidence(data(), masked)
    options: dict[str, Any] = {"num_particles": 30, "vectorize_particles": vectorize}
    found = log_marginal(*programs, data(), masked, **options)
    torch.testing.assert_close(found, exact)
    weights = importance_weights(*programs, data(), masked, chunk_size=20, **options)
    torch.testing.assert_close(weights.log_weights, exact.expand(30, 4))
    assert weights.plates == ("data",)


def test_an_inexact_guide() -> None:
    """Draws sample what is enumerated in weights."""
    args: Any = model, config_enumerate(guide), data(), False, 0.1
    found = log_marginal(*args, num_particles=20_000, diagnostics=True)
    assert ((found.log_marginal - evidence(data())).abs() < 4.5 * found.standard_error).all()
    assert (importance_weights(*args).pareto_k < 0.5).all()
    draws = posterior_draws(*args, num_draws=20_000)
    weights = draws.log_weights.softmax(0)
    for c, exact in enumerate(evidence_of_values(data()).softmax(-1).T):
        found = (weights * (draws["y"] == c)).sum(0)
        torch.testing.assert_close(found, exact, rtol=0, atol=0.02)


@pytest.mark.slow
def test_compiled_passes() -> None:
    args: Any = model, config_enumerate(guide), data(), False, 0.1
    found = []
    for compile in (False, True):
        pyro.set_rng_seed(0)
        found.append(log_marginal(*args, num_particles=200, chunk_size=50, compile=compile))
    torch.testing.assert_close(*found)


def test_values_inside_of_the_weights_are_sampled() -> None:
    """Each row has a weight, and each of its words a value of its own."""
    x = torch.stack([data(), data() + 0.5, 1 - data()], -1)

    def model(x: Tensor) -> None:
        with pyro.plate("data", 4, dim=-2):
            normal("z", 0.0, 1.0)
            with pyro.plate("words", 3, dim=-1):
                y = pyro.sample("y", dist.Categorical(torch.tensor(PRIOR)))
                normal("x", torch.tensor(LOCS)[y], SCALE, obs=x)

    @config_enumerate
    def posterior(x: Tensor) -> None:
        with pyro.plate("data", 4, dim=-2):
            normal("z", 0.0, 1.0)
            with pyro.plate("words", 3, dim=-1):
                pyro.sample("y", dist.Categorical(logits=evidence_of_values(x)))

    found = log_marginal(model, posterior, x, num_particles=20)
    torch.testing.assert_close(found, evidence(x).sum(-1))
    assert (importance_weights(model, posterior, x).ess > 999).all()
