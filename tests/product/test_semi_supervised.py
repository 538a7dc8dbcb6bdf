"""Sites that are observed in some calls only, as labels are: exact in any order of calls."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from pyro_recursive import (
    IWAE_ELBO,
    AmortizedGuide,
    FlowGuide,
    MixtureGuide,
    SemiAmortizedGuide,
    fit,
    log_marginal,
)
from pyro_recursive.evaluation import importance_weights, posterior_draws
from tests.models.losses import LOSSES

X = torch.tensor([0.7, -1.2, 2.0, 0.1], dtype=torch.float64)
Y = torch.tensor([0.2, -0.9, 1.4, 0.8], dtype=torch.float64)
MU, NOISE = 0.2, 0.8


def model(x: Tensor, y: Tensor | None = None) -> None:
    mu = pyro.param("mu", lambda: torch.tensor(MU))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        y = pyro.sample("y", dist.Normal(z, NOISE), obs=y)
        pyro.sample("x", dist.Normal(y + z, 1.0), obs=x)


VARIANCES = torch.tensor([[1.64, 2.64], [2.64, 5.64]], dtype=torch.float64)  # of (y, x)
MEANS = torch.tensor([MU, 2 * MU], dtype=torch.float64)


def guide(x: Tensor, y: Tensor | None = None) -> None:
    """The exact posterior where ``shift`` is 0."""
    shift = pyro.param("shift", lambda: torch.tensor(0.0))
    slope = VARIANCES[0, 1] / VARIANCES[1, 1]
    with pyro.plate("data", len(x)):
        if y is None:
            scale = (VARIANCES[0, 0] - slope * VARIANCES[0, 1]).sqrt()
            loc = MU + slope * (x - 2 * MU)
            y = pyro.sample("y", dist.Normal(loc + shift, scale))
        precision = 2 + NOISE**-2
        loc = (MU + y / NOISE**2 + x - y) / precision
        pyro.sample("z", dist.Normal(loc + shift, precision**-0.5))


def evidence(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Return log p(x, y) or log p(x) of each row."""
    if y is None:
        return dist.Normal(MEANS[1], VARIANCES[1, 1].sqrt()).log_prob(x)
    return dist.MultivariateNormal(MEANS, VARIANCES).log_prob(torch.stack([y, x], -1))


CALLS: dict[str, tuple] = {"labelled": (X, Y), "unlabelled": (X,), "none": (X, None)}
ORDERS = pytest.mark.parametrize("order", list(itertools.permutations(CALLS)), ids="-".join)


@ORDERS
def test_the_evidence_of_each_call(order: tuple[str, ...]) -> None:
    """Every loss at the exact posterior; `log_marginal` and weights for a guide that is off."""
    for make in LOSSES.values():
        for vectorize in (True, False):
            loss = make(2, 3, vectorize_particles=vectorize)
            for call in order:
                exact = evidence(*CALLS[call])
                assert -loss.loss(model, guide, *CALLS[call]) == pytest.approx(exact.sum().item())
    pyro.get_param_store()["shift"] = torch.tensor(0.2)
    for call in order:
        args, exact = CALLS[call], evidence(*CALLS[call])
        found = log_marginal(model, guide, *args, num_particles=20_000, diagnostics=True)
        assert ((found.log_marginal - exact).abs() < 4.5 * found.standard_error).all()
        assert importance_weights(model, guide, *args, num_particles=50).pareto_k.shape == (4,)
        draws = posterior_draws(model, guide, *args, num_draws=5)
        assert set(draws.sites) == ({"z"} if call == "labelled" else {"y", "z"})


@ORDERS
@pytest.mark.parametrize("estimator", ["dreg", "vimco"])
def test_training_takes_the_calls_in_any_order(order: tuple[str, ...], estimator: str) -> None:
    """The gradient of each call is that of a program which has seen no other."""

    def gradients(calls: tuple[str, ...]) -> dict[str, Tensor]:
        pyro.clear_param_store()
        loss, found = IWAE_ELBO(4, estimator=estimator), {}
        for call in calls:
            pyro.set_rng_seed(1)
            value = loss.differentiable_loss(model, guide, *CALLS[call])
            shift = pyro.param("shift").unconstrained()
            found[call] = torch.autograd.grad(value, shift)[0]
        return found

    for call, gradient in gradients(order).items():
        torch.testing.assert_close(gradient, gradients((call,))[call])


def test_fit_takes_batches_with_and_without_labels() -> None:
    batches = [(X, Y), (X,), (X, Y), (X, None)]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    options: dict[str, Any] = {"loss": IWAE_ELBO(3), "epochs": 1, "progress": False}
    history = fit(model, guide, loader, optimizer=partial(torch.optim.SGD, lr=0.0), **options)
    exact = sum(evidence(*args).sum() for args in batches) / len(batches)
    assert -history.loss[0] == pytest.approx(exact.item())


def with_more() -> tuple[Callable, Callable]:
    """Return a model and a guide with one more latent in each row where a flag says so."""

    def model(x: Tensor, more: bool) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 2.0)) if more else 0.0
            pyro.sample("x", dist.Normal(w + z, 1.0), obs=x)

    def guide(x: Tensor, more: bool) -> None:
        pyro.sample("w", dist.Normal(0.3, 1.0))
        with pyro.plate("data", len(x)):
            if more:
                pyro.sample("z", dist.Normal(x / 2, 1.3))

    return model, guide


def test_flags_tell_calls_apart() -> None:
    """The same tensors, and a site that is there or not: known as local in the second call, too."""
    found = []
    for calls in ((False, True), (True,)):
        programs, loss = with_more(), IWAE_ELBO(5, global_latents="elbo")
        for more in calls:
            pyro.set_rng_seed(1)
            value = loss.loss(*programs, X, more)
        found.append(value)
    assert found[0] == pytest.approx(found[1])


def encoder_of(width: int) -> AmortizedGuide:
    inputs = lambda x, y=None: x[:, None]  # noqa: E731
    return AmortizedGuide(model, nn.Linear(1, width), inputs=inputs)


GUIDES: dict[str, Callable] = {
    "free": lambda width: AmortizedGuide(model),
    "encoder": encoder_of,
    "mixture": lambda width: MixtureGuide(model, 2),
    "flow": lambda width: FlowGuide(model),
    "refined": lambda width: SemiAmortizedGuide(model, encoder_of(width)),
}


@pytest.mark.parametrize("kind", GUIDES)
def test_packed_guides_refuse_other_latents(kind: str) -> None:
    """`pyro.infer.Trace_ELBO` would count the entropy of an observed site, or leave out a density.

    The densities of all latents are one: none can be left out.
    """
    late = r"\['y'\] are latent in this call and were not in the guide's first. Call guide.prepare"
    early = r"\['y'\] are observed or absent in this call; \w+ always samples them"
    for first, second, message in (((X, Y), (X,), late), ((X,), (X, Y), early)):
        guide = GUIDES[kind](2 if len(first) == 2 else 4)
        guide(*first)
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                Trace_ELBO().loss(model, guide, *second)
        guide(*first)
        pyro.clear_param_store()
