"""Signal-to-noise ratios of gradients: closed forms, and nothing left behind."""

import math
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, ReweightedWakeSleep, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, AutoNormalMessenger
from torch import Tensor

from pyro_recursive import (
    CIWAE_ELBO,
    IWAE_ELBO,
    MIWAE_ELBO,
    RecursiveMixture_ELBO,
    RecursiveMixtureGuide,
)
from pyro_recursive.evaluation.snr import (
    gradient_snr,
    gradient_snr_sweep,
    log_slope,
    signal_to_noise,
)
from pyro_recursive.guides.mixture.schedule import Schedule
from tests.models.small import normal, square_global

MU, A, SCALE, X = 0.5, 0.9, 0.8, 2.1
COPIES = 100  # of one coordinate: many draws of it in each gradient


def model(x: Tensor) -> None:
    mu = pyro.param("mu", torch.full((COPIES,), MU))
    with pyro.plate("copies", COPIES):
        normal("x", normal("z", mu), obs=x.expand(COPIES))


def guide(x: Tensor) -> None:
    a = pyro.param("a", torch.full((COPIES,), A))
    with pyro.plate("copies", COPIES):
        normal("z", a, SCALE)


# --- Draws of a gradient


@pytest.mark.parametrize(
    ("dim", "together", "ratio"),
    [(1, False, 2.0), (40, False, 0.3), (40, True, 0.3), (40, True, 2.0)],
)
def test_ratio_is_unbiased_and_its_error_is_honest(dim: int, together: bool, ratio: float) -> None:
    scale, repeats = torch.logspace(-3, 2, dim), 100
    noise = torch.randn(repeats, 60, 1 if together else dim)
    found = [signal_to_noise(scale * (each + ratio).expand(60, dim)) for each in noise]
    if ratio == 2.0:  # clamped at 0 nowhere, hence unbiased
        squared = torch.stack([f.by_coordinate.square().mean() for f in found])
        assert abs(squared.mean() - ratio**2) < 4 * squared.std() / repeats**0.5
    ratios = torch.stack([f.ratio for f in found])
    errors = torch.stack([f.error for f in found])
    assert 0.7 < errors.median() / ratios.std() < 1.4  # the latter is known to 7%


@pytest.mark.parametrize("dim", [1, 100])
def test_no_signal_is_not_detected(dim: int) -> None:
    found = [signal_to_noise(torch.randn(50, dim)) for _ in range(100)]
    assert sum(bool(f.detected) for f in found) <= 6
    seen = [signal_to_noise(torch.randn(50, dim) + 1.0) for _ in range(30)]
    assert sum(bool(f.detected) for f in seen) >= 27


def test_coordinates_without_noise() -> None:
    draws = torch.randn(100, 4) + 2
    draws[:, 1], draws[:, 2] = 0.0, 3.0
    found, rest = signal_to_noise(draws), signal_to_noise(draws[:, [0, 3]])
    assert found.by_coordinate[1].isnan() and found.by_coordinate[2].isinf()
    assert found.ratio == rest.ratio
    torch.testing.assert_close(found.error, rest.error)
    assert signal_to_noise(draws[:, 1:3]).ratio.isinf()
    assert signal_to_noise(draws[:, 1:2]).ratio.isnan()
    assert not signal_to_noise(draws[:, 1:2]).detected


def test_slope_is_weighted_least_squares() -> None:
    sizes = torch.tensor([1.0, 2.0, 4.0, 8.0])
    slopes = []
    for _ in range(300):
        errors = torch.tensor([0.001, 0.02, 0.05, 0.1])
        ratios = 2 * sizes**0.5 * (1 + errors * torch.randn(4))
        slope, error = log_slope(sizes, ratios, errors * ratios)
        slopes.append(slope)
    found = torch.tensor(slopes)
    assert abs(found.mean() - 0.5) < 4 * found.std() / 300**0.5
    assert 0.85 < error / found.std() < 1.15
    assert math.isnan(log_slope(sizes[:1], ratios[:1], ratios[:1])[0])


# --- Models


@pytest.mark.parametrize(
    "loss", [Trace_ELBO(), IWAE_ELBO(1), RenyiELBO(num_particles=1, alpha=0.0), MIWAE_ELBO(4, 1)]
)
def test_closed_form(loss: Any) -> None:
    """The gradients of one pathwise sample are mu - z and 2 z - mu - x."""
    exact = {"model": abs(MU - A) / SCALE, "guide": abs(2 * A - MU - X) / (2 * SCALE)}
    gain = 2.0 if isinstance(loss, MIWAE_ELBO) else 1.0
    found = gradient_snr(model, guide, loss, torch.tensor(X), num_draws=20)
    for group, ratio in exact.items():
        assert abs(found[group].ratio - gain * ratio) < 4 * found[group].error
        assert found[group].error < 0.1 * gain  # so that the line above can fail


def test_nothing_is_left_behind() -> None:
    x = torch.tensor(X)
    Trace_ELBO().loss_and_grads(model, guide, x)
    parameters = [pyro.param(name).unconstrained() for name in ("mu", "a")]
    before = [(p, p.grad, p.clone(), p.grad.clone()) for p in parameters if p.grad is not None]
    state = torch.get_rng_state()
    first = gradient_snr(model, guide, Trace_ELBO(), x, num_draws=20)
    assert torch.equal(torch.get_rng_state(), state)
    again = gradient_snr(model, guide, Trace_ELBO(), x, num_draws=20)
    other = gradient_snr(model, guide, Trace_ELBO(), x, num_draws=20, seed=1)
    assert first["guide"].ratio == again["guide"].ratio != other["guide"].ratio

    def broken(x: Tensor) -> None:
        model(x)
        if torch.is_grad_enabled():
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        gradient_snr(broken, guide, Trace_ELBO(), x)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(before) == 2
    for parameter, grad, value, number in before:
        assert parameter.grad is grad
        assert torch.equal(grad, number) and torch.equal(parameter, value)


quartic = partial(square_global, torch.tensor(4.0))


def test_stages_of_a_recursive_mixture_stand_still() -> None:
    schedule = Schedule(first=2, propose=2, refine=2)
    mixture = RecursiveMixtureGuide(quartic, 2, schedule=schedule, paths=0)
    loss = RecursiveMixture_ELBO(2)
    refused = 0
    for _ in range(7):
        progress = mixture.progress.clone()
        values = [p.detach().clone() for p in mixture.parameters()]
        try:
            gradient_snr(quartic, mixture, loss, num_draws=10)
        except ValueError as error:
            assert "RecursiveMixture_ELBO" in str(error)
            refused += 1
        assert torch.equal(mixture.progress, progress)
        assert all(torch.equal(*pair) for pair in zip(values, mixture.parameters(), strict=False))
        loss.loss_and_grads(quartic, mixture)
    assert refused >= 2 and len(mixture.trials) == 1


def test_a_minibatch_that_the_model_draws_is_noise() -> None:
    def batches(x: Tensor) -> None:
        mu = pyro.param("mu", torch.tensor(MU))
        with pyro.plate("data", len(x), subsample_size=1) as index:
            normal("x", mu, obs=x[index])

    x = torch.tensor([-1.0, 0.0, 5.0, 6.0])
    found = gradient_snr(batches, lambda x: None, Trace_ELBO(), x, num_draws=60)["model"]
    ratio = (x - MU).mean() / (x - MU).std(correction=0)
    assert abs(found.ratio - ratio) < 4 * found.error < 1.0


# --- Groups


def test_groups_of_programs_and_loss() -> None:
    def sharing(x: Tensor) -> None:
        guide(x)
        pyro.param("mu", torch.tensor(MU))

    x = torch.tensor(X)
    measured = partial(gradient_snr, num_draws=10)
    assert sorted(measured(model, sharing, Trace_ELBO(), x)) == ["guide", "shared"]
    learned = CIWAE_ELBO(4, beta=0.5, learn_beta=True)
    assert sorted(measured(model, guide, learned, x)) == ["guide", "loss", "model"]
    messenger = AutoNormalMessenger(model)
    assert sorted(measured(model, messenger, Trace_ELBO(), x)) == ["guide", "model"]
    assert sorted(measured(model, guide, ReweightedWakeSleep(3), x)) == ["guide", "model"]


def test_groups_of_the_user() -> None:
    x = torch.tensor(X)
    measured = partial(gradient_snr, model, AutoNormal(model), Trace_ELBO(), x, num_draws=10)
    wanted = ["AutoNormal.locs", "AutoNormal.scales"]
    assert sorted(measured(groups=wanted)) == wanted
    one = measured(groups=["AutoNormal"])
    assert sorted(one) == ["AutoNormal"] and len(one["AutoNormal"].by_coordinate) == 2 * COPIES
    with pytest.raises(ValueError, match=r"groups \['net', 'Auto'\]: Pyro has \['AutoNormal"):
        measured(groups=["net", "Auto"])
    with pytest.raises(ValueError, match="No parameter in one of the groups"):
        gradient_snr(lambda x: normal("z", 0.0), lambda x: normal("z", 0.0), Trace_ELBO(), x)
    with pytest.raises(ValueError, match=">= 10, got 9"):
        measured(num_draws=9)


# --- Sweeps


def test_sweep_has_the_law_of_the_mean() -> None:
    sizes = {"num_estimates": (1, 4, 16), "num_particles": (1,), "num_draws": 10}
    found = gradient_snr_sweep(model, guide, MIWAE_ELBO, torch.tensor(X), **sizes)
    assert found.ratio["guide"].shape == (3, 1)
    for group in ("guide", "model"):
        slope, error = found.slope(group, over="M")
        assert abs(slope - 0.5) < 4 * error < 0.6


@pytest.mark.slow
def test_laws_of_tighter_bounds_and_of_dreg() -> None:
    """Rainforth et al.: in the limit, K ** 0.5 for the model and K ** -0.5 for the guide."""
    copies, dim, points = 100, 4, 8
    x = torch.randn(dim) + math.sqrt(2) * torch.randn(points, dim)
    mean = x.mean(0)

    def linear(x: Tensor) -> None:
        mu = pyro.param("mu", lambda: (mean + 0.1).repeat(copies, 1, 1))
        with pyro.plate("copies", copies, dim=-2), pyro.plate("data", points, dim=-1):
            z = pyro.sample("z", dist.Normal(mu, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x.expand(copies, points, dim))

    def encoder(x: Tensor) -> None:
        b = pyro.param("b", lambda: (mean / 2 - 0.3).repeat(copies, 1, 1))
        with pyro.plate("copies", copies, dim=-2), pyro.plate("data", points, dim=-1):
            pyro.sample("z", dist.Normal(x / 2 + b, math.sqrt(2 / 3)).to_event(1))

    sweep = partial(gradient_snr_sweep, linear, encoder, num_draws=30)
    sizes = (8, 32, 128)
    pathwise = sweep(MIWAE_ELBO, x, num_particles=sizes)
    slope, error = pathwise.slope("guide")
    assert abs(slope + 0.5) < 0.05 + 3 * error < 0.2
    growing = [part[1:] for part in pathwise.line("model")]  # at K = 8 not yet in its limit
    assert 0.3 < log_slope(*growing)[0] < 0.55
    dreg = sweep(partial(MIWAE_ELBO, estimator="dreg"), x, num_particles=sizes)
    assert dreg.slope("guide")[0] > 0.3
