"""Evaluation of guides that enumerate latents: exact where the rest of the guide is exact."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from torch import Tensor

from pyro_recursive import log_marginal
from pyro_recursive.evaluation import importance_weights, posterior_draws
from pyro_recursive.evaluation.evidence import log_weights, results_in_chunks
from pyro_recursive.tracing.program import Program
from tests.models.enumerated_guides import PROGRAMS
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


def check_frequencies(y: Tensor, exact: Tensor, inflation: float = 1.0) -> None:
    """Compare draws ``[S, rows]`` with probabilities ``[rows, C]``."""
    found = torch.nn.functional.one_hot(y, exact.shape[-1]).to(exact).mean(0)
    error = (inflation * exact * (1 - exact) / len(y)).sqrt()
    assert ((found - exact).abs() < 4.5 * error + 1e-12).all()


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_resampled_draws_are_exact(masked: bool, vectorize: bool) -> None:
    """Where the guide of z is the posterior given y: whatever the guide's distribution of y."""
    x, name = data(), "y_unobserved" if masked else "y"
    sizes = (4000, 8000) if vectorize else (100, 200)
    options: dict[str, Any] = dict(zip(("num_draws", "num_proposals"), sizes, strict=True))
    args: Any = model, config_enumerate(guide), x, masked
    draws = posterior_draws(*args, resample="psis", vectorize_particles=vectorize, **options)
    torch.testing.assert_close(draws.log_weights, evidence(x, masked).expand(sizes[0], 4))
    log_y = evidence_of_values(x).log_softmax(-1)
    y, rows = draws[name], ~SUPPORTED if masked else SUPPORTED | True
    check_frequencies(y[:, rows], log_y.exp()[rows], 1.5)  # half of the proposals more than once
    y = torch.where(SUPPORTED, LABELS, y) if masked else y
    loc, gain = torch.tensor(LOCS)[y], 0.9**2 / SCALE**2
    noise = (draws["z"] - loc - gain * (x - loc)) / (gain**0.5 * 0.7)
    assert noise.mean().abs() < 4.5 * (1.5 / noise.numel()) ** 0.5
    assert (noise.std() - 1).abs() < 4.5 * (0.75 / noise.numel()) ** 0.5
    joint = dist.Normal(loc, 0.9).log_prob(draws["z"]) + dist.Normal(draws["z"], 0.7).log_prob(x)
    torch.testing.assert_close(draws.log_p, joint + torch.tensor(PRIOR).log()[y])


def test_draws_have_the_weights_of_the_evidence() -> None:
    """And the guide's own draws, which are not resampled, those of pairs."""
    args: Any = model, config_enumerate(guide), data(), False, 0.1
    pyro.set_rng_seed(0)
    program = Program(*args[:2], args[2:])
    ((weights, _),) = results_in_chunks(program, 400, log_weights, 400, by_value=True)
    pyro.set_rng_seed(0)
    options: dict[str, Any] = {"num_draws": 50, "num_proposals": 400, "chunk_size": 400}
    draws = posterior_draws(*args, resample="psis", **options)
    nearest = (draws.log_weights.unsqueeze(1) - weights).abs().amin(1)
    assert nearest.max() < 1e-12
    own = posterior_draws(*args, num_draws=4000)
    q = (data().unsqueeze(-1) * torch.tensor([0.3, -0.5, 0.1])).softmax(-1)
    check_frequencies(own["y"], q)
    error = (own.log_weights.exp().var(0) / 4000).sqrt()
    found = own.log_weights.exp().mean(0)
    assert ((found - evidence(data()).exp()).abs() < 4.5 * error).all()


ALONE = [name for name in PROGRAMS if name not in ("both", "scaled", "minibatch")]


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("resample", [None, "psis"])
@pytest.mark.filterwarnings("ignore:Plate 'data' encloses latent site")
def test_densities_are_those_of_the_draws(name: str, resample: str | None) -> None:
    """Latents of all sites are one draw, whatever plates they are in."""
    model, guide = PROGRAMS[name]
    pyro.clear_param_store()
    draws = posterior_draws(model, guide, data(), num_draws=7, resample=resample)
    values = {n: each.with_batch_dims() for n, each in draws.of_kind("latent").items()}
    for s in range(7):
        given = {n: each[s] for n, each in values.items()}
        trace = poutine.trace(poutine.condition(model, given)).get_trace(data())
        found, _ = draws.log_densities
        torch.testing.assert_close(found[s].sum(), trace.log_prob_sum())


def test_latents_of_the_model_are_drawn_last() -> None:
    pyro.clear_param_store()
    draws = posterior_draws(*PROGRAMS["both"], data(), num_draws=7, resample="psis")
    assert draws.summed == {"k"} and draws["k"].shape == draws["y"].shape == (7, 4)


def test_values_alone() -> None:
    """Each weight is the evidence; a value without any weight is never drawn."""
    log_p = evidence_of_values(data()).log_softmax(-1)
    log_p[:, 0] = -torch.inf

    def model() -> None:
        with pyro.plate("data", 4):
            y = pyro.sample("y", dist.Categorical(torch.ones(3)))
            pyro.factor("x", log_p[torch.arange(4), y])

    def guide() -> None:
        with pyro.plate("data", 4):
            pyro.sample("y", dist.Categorical(torch.tensor([0.8, 0.1, 0.1])))

    args: Any = model, config_enumerate(guide)
    draws = posterior_draws(*args, num_draws=4000, resample="psis")
    expected = (log_p.logsumexp(-1) - torch.tensor(3.0).log()).expand(4000, 4)
    torch.testing.assert_close(draws.log_weights, expected)
    check_frequencies(draws["y"], log_p.softmax(-1), 1.1)


@pytest.mark.slow
def test_compiled_passes() -> None:
    args: Any = model, config_enumerate(guide), data(), False, 0.1
    found = []
    for compile in (False, True):
        pyro.set_rng_seed(0)
        found.append(log_marginal(*args, num_particles=200, chunk_size=50, compile=compile))
    torch.testing.assert_close(*found)


@pytest.mark.slow
def test_compiled_draws() -> None:
    args: Any = model, config_enumerate(guide), data(), False, 0.1
    found = []
    for compile in (False, True):
        pyro.set_rng_seed(0)
        sizes = {"num_draws": 50, "num_proposals": 200, "chunk_size": 50}
        draws = posterior_draws(*args, resample="psis", compile=compile, **sizes)
        found.append([draws["y"], draws["z"], *draws.log_densities])
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
