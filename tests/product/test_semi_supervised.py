"""Sites that are observed in some calls only, as labels are: exact in any order of calls."""

import itertools
import math
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
from pyro_recursive.evaluation import gaps, importance_weights, posterior_draws
from pyro_recursive.guides.gaussian_families import LowRank
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


@pytest.mark.quick(3)
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


def column(x: Tensor, y: Tensor | None = None) -> Tensor:
    return x[:, None]


AMORTIZED: dict[str, Callable[[], AmortizedGuide]] = {
    "joint": lambda: AmortizedGuide(model),
    "joint_full": lambda: AmortizedGuide(model, family="full"),
    "table_low_rank": lambda: AmortizedGuide(model, plate="data", family=LowRank(1)),
    "encoder": lambda: AmortizedGuide(model, nn.Linear(1, 4), inputs=column),
    "encoder_full": lambda: AmortizedGuide(model, nn.Linear(1, 5), family="full", inputs=column),
}


def covariance(posterior: Any) -> Tensor:
    if isinstance(posterior, dist.Independent):
        return posterior.variance.diag_embed()
    return posterior.covariance_matrix


@pytest.mark.parametrize("kind", AMORTIZED)
def test_an_amortized_guide_samples_what_is_latent(kind: str) -> None:
    """Draws and densities of z are those of the Gaussian's marginal, under any loss."""
    guide = AMORTIZED[kind]()
    guide.prepare(X)
    for parameter in guide.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    (latents,) = guide.groups
    with torch.no_grad():
        posterior = guide.posterior(latents, guide.new_call((X, Y), {}))
    part = slice(0, latents.size // 2)  # z comes before y
    exact = dist.MultivariateNormal(
        posterior.mean[..., part], covariance(posterior)[..., part, part]
    )
    for args in ((X, Y), (X,), (X, Y)):
        draws = posterior_draws(model, guide, *args, num_draws=4000)
        assert set(draws.sites) == ({"z"} if len(args) == 2 else {"y", "z"})
        if len(args) == 2:
            z = draws["z"] if latents.size > 2 else draws["z"][..., None]
            torch.testing.assert_close(draws.log_q, exact.log_prob(z))
            deviation = (draws["z"] - exact.mean.reshape(4)) / exact.variance.sqrt().reshape(4)
            assert deviation.mean(0).abs().max() < 4.5 / 4000**0.5
            assert (deviation.var(0) - 1).abs().max() < 4.5 * (2 / 4000) ** 0.5
        values = []
        for loss in (Trace_ELBO(), IWAE_ELBO(1)):
            pyro.set_rng_seed(2)
            values.append(loss.loss(model, guide, *args))
        assert values[0] == pytest.approx(values[1])


def test_a_guide_whose_latents_are_all_observed() -> None:
    def labels(x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)
            pyro.sample("x", dist.Normal(y, 1.0), obs=x)

    guide = AmortizedGuide(labels, nn.Linear(1, 2), inputs=column)
    guide.prepare(X)
    exact = (dist.Normal(0.0, 1.0).log_prob(Y) + dist.Normal(Y, 1.0).log_prob(X)).sum()
    assert -IWAE_ELBO(3).loss(labels, guide, X, Y) == pytest.approx(exact.item())


OTHERS: dict[str, Callable[[], Any]] = {
    "mixture": lambda: MixtureGuide(model, 2),
    "flow": lambda: FlowGuide(model),
    "refined": lambda: SemiAmortizedGuide(model, AMORTIZED["encoder"]()),
}


@pytest.mark.filterwarnings("ignore:Found non-auxiliary vars in guide")
@pytest.mark.parametrize("kind", OTHERS)
def test_guides_without_marginals_refuse(kind: str) -> None:
    """`pyro.infer.Trace_ELBO` would count the entropy of what is observed."""
    guide = OTHERS[kind]()
    guide(X)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"\['y'\] are observed or absent in this call, and"):
            Trace_ELBO().loss(model, guide, X, Y)
    guide(X, None)


def test_labels_in_the_first_call() -> None:
    """A guide that has no distribution of the labels is refused by losses, by name."""
    guide = AmortizedGuide(model, nn.Linear(1, 2), inputs=column)
    guide(X, Y)
    with pytest.raises(ValueError, match="Model site 'y' is latent and the guide does not sample"):
        IWAE_ELBO(3).loss(model, guide, X)
    pyro.clear_param_store()
    guide = AMORTIZED["encoder"]()
    guide.prepare(X)
    with pytest.raises(ValueError, match=r"\['y'\] of the guide are observed"):
        gaps(model, guide, X, Y)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_a_model_that_fails_once_is_looked_at_again(error: type[Exception]) -> None:
    """The labels are found as given in the next call of this form."""
    failures: list[Exception] = []

    def failing(x: Tensor, y: Tensor | None = None) -> None:
        if failures:
            raise failures[0]
        model(x, y)

    guide = AmortizedGuide(failing, nn.Linear(1, 4), inputs=column)
    guide(X)
    failures.append(error("no"))
    with pytest.raises(error):
        IWAE_ELBO(3).loss(failing, guide, X, Y)
    failures.clear()
    assert "y" not in guide(X, Y)
    assert math.isfinite(IWAE_ELBO(3).loss(failing, guide, X, Y))
