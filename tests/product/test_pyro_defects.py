"""What Pyro 1.9.2 gets wrong: each test shows the defect in Pyro's class, then ours right.

A test that fails in its first half tells that Pyro has repaired the defect.
"""

import itertools
import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import ELBO, RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_mean
from torch import Tensor

from pyro_recursive import IWAE_ELBO, MultiSampleELBO, bounds, log_marginal
from tests.models import data, hierarchy, hierarchy_guide
from tests.models.small import normal_rows

X = torch.tensor([1.1, -0.4, 0.7, 2.0])
# Quadrature, K = 2: value, d/dmu, d/dA, d/db, d/ds for the full data.
FULL_DATA = (-6.212221, 1.034015, 0.112175, 0.131971, -0.901293)
SCALE_INSIDE = (-6.089291, 1.104516, -0.007677, -0.009031, 0.064905)
LOG_EVIDENCE = -6.107048


def renyi(particles: int, vectorized: bool = True, alpha: float = 0.0, nesting: int = 1) -> ELBO:
    return RenyiELBO(
        alpha=alpha,
        num_particles=particles,
        vectorize_particles=vectorized,
        max_plate_nesting=nesting,
    )


def bound_and_gradient(loss: ELBO, model: Callable, guide: Callable, *names: str) -> Tensor:
    """Return ``[1 + parameters]`` of one call, in ascent form."""
    pyro.clear_param_store()
    value = loss.loss_and_grads(model, guide)
    gradients = [pyro.param(name).unconstrained().grad for name in names]
    zero = torch.zeros(())
    return -torch.stack([torch.as_tensor(value), *(zero if g is None else g for g in gradients)])


def subsampled(indices: tuple[int, ...], copies: int = 4000) -> tuple[Callable, Callable]:
    """Return the conjugate model on a minibatch, `copies` times over for independent draws."""
    batch = torch.tensor(indices)
    x = X[batch].repeat(copies, 1)

    def model() -> None:
        mu = pyro.param("mu", lambda: torch.tensor(0.3))
        with pyro.plate("copies", copies, dim=-2), pyro.plate("data", 4, subsample=batch, dim=-1):
            z = pyro.sample("z", dist.Normal(mu, 1.0).expand([copies, len(batch)]))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide() -> None:
        values = {"A": 0.5, "b": 0.1, "s": 0.9}
        A, b, s = (pyro.param(n, lambda v=v: torch.tensor(v)) for n, v in values.items())
        with pyro.plate("copies", copies, dim=-2), pyro.plate("data", 4, subsample=batch, dim=-1):
            pyro.sample("z", dist.Normal(A * x + b, s))

    return model, guide


def over_all_minibatches(loss: ELBO, calls: int = 12) -> tuple[Tensor, Tensor]:
    """Return mean and standard error over all six minibatches of two, per copy."""
    programs = [subsampled(batch) for batch in itertools.combinations(range(4), 2)]
    rows = torch.stack(
        [
            torch.stack([bound_and_gradient(loss, *each, "mu", "A", "b", "s") for each in programs])
            for _ in range(calls)
        ]
    ).mean(1)
    return rows.mean(0) / 4000, rows.std(0) / calls**0.5 / 4000


@pytest.mark.slow
def test_scale_inside_the_logarithm() -> None:
    """Under subsampling Pyro's value exceeds log p(x) and the guide's gradient has another sign."""
    mean, error = over_all_minibatches(renyi(2, nesting=2))
    assert ((mean - torch.tensor(SCALE_INSIDE)).abs() < 6 * error).all()
    assert mean[0] > LOG_EVIDENCE + 3 * error[0]
    mean, error = over_all_minibatches(IWAE_ELBO(2, estimator="dreg"))
    assert ((mean - torch.tensor(FULL_DATA)).abs() < 6 * error).all()


def test_one_minibatch_for_all_particles() -> None:
    """Looped, Pyro draws a minibatch per particle, so that weights compare different data."""
    seen = []

    def program() -> None:
        with pyro.plate("data", 100, subsample_size=10) as batch:
            seen.append(tuple(batch.tolist()))
            pyro.sample("z", dist.Normal(0.0, 1.0).expand([10]))

    renyi(5, vectorized=False).loss(program, program)
    assert len(set(seen)) == 5
    loss = IWAE_ELBO(5, vectorize_particles=False)
    loss.loss(program, program)  # the structure is looked up here
    seen.clear()
    loss.loss(program, program)
    assert len(set(seen)) == 1


@pytest.mark.slow
def test_gradient_of_sites_that_are_not_reparameterised() -> None:
    """At alpha = 0 Pyro's gradient of a Bernoulli guide is exactly zero, without a word."""

    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(2 * z - 1, 1.0), obs=torch.tensor(0.4))

    def guide() -> None:
        logit = pyro.param("logit", lambda: torch.tensor(0.7))
        pyro.sample("z", dist.Bernoulli(logits=logit))

    def gradients(loss: ELBO) -> Tensor:
        return torch.stack([bound_and_gradient(loss, model, guide, "logit")[1] for _ in range(900)])

    assert (gradients(renyi(4)) == 0).all()
    ours = gradients(IWAE_ELBO(4, estimator="vimco"))
    error = ours.std() / 900**0.5
    assert abs(ours.mean() + 0.05080123) < 4.5 * error and ours.mean() < -4.5 * error  # not zero


def test_differentiable_loss() -> None:
    with pytest.raises(AttributeError):
        renyi(4)(normal_rows, AutoNormal(normal_rows))(X)
    assert IWAE_ELBO(4)(normal_rows, AutoNormal(normal_rows))(X).shape == ()


def test_one_loss_serves_models_of_different_nesting() -> None:
    """Pyro's ELBO keeps the plate nesting of the first model that it saw."""

    def flat() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def nested() -> None:
        with pyro.plate("outer", 3, dim=-2), pyro.plate("inner", 4, dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0).expand([3, 4]))

    stock, ours = RenyiELBO(alpha=0, num_particles=3, vectorize_particles=True), IWAE_ELBO(3)
    stock.loss(flat, flat)
    with pytest.raises(ValueError, match="collide"):
        stock.loss(nested, nested)
    assert ours.loss(flat, flat) == 0 and ours.loss(nested, nested) == 0


@pytest.mark.filterwarnings("ignore:Plate 'data' encloses")
def test_guide_only_site_outside_the_plate() -> None:
    """Pyro counts an auxiliary site outside the data plate once per datum."""

    def guide(x: Tensor) -> None:
        # The density of the auxiliary variable integrates out: -log q = 2 exactly, once.
        flat = dist.Uniform(0.0, math.exp(2.0))
        pyro.sample("extra", flat, infer={"is_auxiliary": True})
        with pyro.plate("data", 50):
            pyro.sample("z", dist.Normal(0.0, math.sqrt(0.5)).expand([50]))

    x = torch.zeros(50)
    exact = dist.Normal(0.0, 2**0.5).log_prob(x).sum().item() + 2
    assert -renyi(5).loss(normal_rows, guide, x) == pytest.approx(exact + 49 * 2)
    assert -IWAE_ELBO(5).loss(normal_rows, guide, x) == pytest.approx(exact)


def test_one_global_latent_costs_every_datum_its_weights() -> None:
    """Pyro falls back to one weight per data set in silence; we say so, and offer the others."""

    def model() -> None:
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 50):
            z = pyro.sample("z", dist.Normal(shift, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(50))

    def guide() -> None:
        pyro.sample("shift", dist.Normal(0.0, 0.2))
        with pyro.plate("data", 50):
            pyro.sample("z", dist.Normal(0.3, 1.0).expand([50]))

    with pytest.warns(UserWarning, match=r"'data' encloses latent site 'z' but not 'shift'"):
        joint = IWAE_ELBO(50).loss(model, guide)
    local = IWAE_ELBO(50, global_latents="elbo").loss(model, guide)
    assert local < joint < Trace_ELBO(50, vectorize_particles=True).loss(model, guide)


def test_global_latent_under_subsampling() -> None:
    """Pyro returns a number that is no bound; we raise, but for one sample, which is the ELBO."""
    options = {"subsample": torch.arange(2)}
    args = (hierarchy, hierarchy_guide, data())
    assert isinstance(renyi(10).loss(*args, **options), float)
    with pytest.raises(ValueError, match=r"Plate 'data' is subsampled \(2 of 4\).*site 'w'"):
        IWAE_ELBO(10).loss(*args, **options)
    values = []
    for loss in (IWAE_ELBO(1), Trace_ELBO()):
        pyro.set_rng_seed(1)
        values.append(loss.loss(*args, **options))
    assert values[0] == pytest.approx(values[1])


def test_a_minibatch_that_the_guide_overrides() -> None:
    """An autoguide draws its own minibatch over the one that the model was given."""
    x, batch = torch.linspace(-2, 2, 50), torch.arange(5)

    def model(batch: Tensor) -> None:
        with pyro.plate("data", 50, subsample=batch):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([5]))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[batch])

    def create_plates(batch: Tensor) -> pyro.plate:
        return pyro.plate("data", 50, subsample=batch)

    careless = AutoNormal(model)
    assert isinstance(Trace_ELBO().loss(model, careless, batch), float)
    for vectorize in (True, False):
        with pytest.raises(ValueError, match=r"minibatch for plate 'data'.*create_plates"):
            IWAE_ELBO(3, vectorize_particles=vectorize).loss(model, careless, batch)
    IWAE_ELBO(3).loss(model, AutoNormal(model, create_plates=create_plates), batch)


def test_a_model_that_cannot_be_vectorised() -> None:
    """Its samples run one by one, and a warning says so once, why, and at what cost."""

    def program() -> None:
        if pyro.sample("z", dist.Normal(0.0, 1.0)) > 0:
            pyro.sample("more", dist.Normal(0.0, 1.0))

    with pytest.warns(UserWarning, match="one by one .3 runs .* guide raises .*data-dependent"):
        assert IWAE_ELBO(3).loss(program, program) == 0
    assert IWAE_ELBO(3).loss(program, program) == 0
    assert IWAE_ELBO(3, vectorize_particles=False).loss(program, program) == 0


@pytest.mark.slow
def test_a_model_that_mixes_the_samples() -> None:
    """A sum over all dims is right for one sample, and wrong in silence for many under a plate."""

    def guide() -> Tensor:
        return pyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))

    def model() -> None:
        pyro.sample("y", dist.Normal(guide().sum(), 1.0), obs=torch.tensor(1.0))

    elbo = Trace_ELBO(100, vectorize_particles=True)
    assert sum(elbo.loss(model, guide) for _ in range(200)) / 200 > 50  # 2.4 for single samples
    exact = dist.Normal(0.0, 3**0.5).log_prob(torch.tensor(1.0)).item()
    for count, options in ((100_000, {}), (1000, {"vectorize_particles": False})):
        found = log_marginal(model, guide, num_particles=count, diagnostics=True, **options)
        assert abs(found.log_marginal.item() - exact) < 4 * found.standard_error.item() < 0.2


def test_a_mask_that_the_guide_does_not_have() -> None:
    """Pyro keeps log q of what `obs_mask` leaves out: the wider the guide, the better its value."""
    observed = torch.tensor([True, False])

    def model() -> None:
        with pyro.plate("data", 2):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.zeros(2), obs_mask=observed)

    def guide() -> None:
        with pyro.plate("data", 2), poutine.mask(mask=~observed):
            pyro.sample("x_unobserved", dist.Normal(0.0, 1e9).expand([2]))

    assert Trace_ELBO().loss(model, AutoNormal(model, init_scale=1e-9)) > 10
    pyro.clear_param_store()
    unmasked = AutoNormal(model, init_loc_fn=init_to_mean, init_scale=1.0)
    expected = -dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.0)).item()
    assert IWAE_ELBO(3).loss(model, unmasked) == pytest.approx(expected)
    IWAE_ELBO(3).loss(model, guide)


def test_agrees_with_pyro_where_pyro_is_right() -> None:
    """Full batch, one plate, reparameterised guide: equal value and gradient under one seed."""
    model, guide = subsampled((0, 1, 2, 3), copies=1)
    for alpha in (0.0, 0.5):
        rows = []
        for loss in (
            renyi(7, alpha=alpha, nesting=2),
            MultiSampleELBO(bounds.renyi(alpha), num_particles=7, max_plate_nesting=2),
        ):
            IWAE_ELBO(2).loss(model, guide)  # both have seen the program
            pyro.set_rng_seed(5)
            rows.append(bound_and_gradient(loss, model, guide, "mu", "A", "b", "s"))
        torch.testing.assert_close(*rows)
