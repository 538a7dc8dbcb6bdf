"""What Pyro 1.9.2 gets wrong: each test shows the defect in Pyro's class, then ours right.

A test that fails in its first half tells that Pyro has repaired the defect.
"""

import itertools
import math
import warnings
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import ELBO, RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_recursive import IWAE_ELBO, MultiSampleELBO, bounds, log_marginal

MINIBATCH = torch.tensor([1.1, -0.4, 0.7, 2.0])
# Quadrature, K = 2: value, d/dmu, d/dA, d/db, d/ds for the full data.
FULL_DATA = (-6.212221, 1.034015, 0.112175, 0.131971, -0.901293)
SCALE_INSIDE = (-6.089291, 1.104516, -0.007677, -0.009031, 0.064905)
LOG_EVIDENCE = -6.107048


def renyi(particles: int, vectorized: bool = True, alpha: float = 0.0) -> RenyiELBO:
    return RenyiELBO(
        alpha=alpha,
        num_particles=particles,
        vectorize_particles=vectorized,
        max_plate_nesting=1,
    )


def bound_and_gradient(
    loss: ELBO, model: Callable, guide: Callable, names: tuple[str, ...], *args: Tensor
) -> Tensor:
    """Return ``[1 + parameters]`` of one call, in ascent form."""
    pyro.clear_param_store()
    value = loss.loss_and_grads(model, guide, *args)
    gradients = [pyro.param(name).unconstrained().grad for name in names]
    zero = torch.zeros(())
    return -torch.stack([torch.as_tensor(value), *(zero if g is None else g for g in gradients)])


def subsampled(indices: list[int], copies: int = 4000) -> tuple[Callable, Callable]:
    """Return the conjugate model on a minibatch, `copies` times over for independent draws."""
    batch = torch.tensor(indices)
    x = MINIBATCH[batch].repeat(copies, 1)

    def model() -> None:
        mu = pyro.param("mu", lambda: torch.tensor(0.3))
        with pyro.plate("copies", copies, dim=-2), pyro.plate("data", 4, subsample=batch, dim=-1):
            z = pyro.sample("z", dist.Normal(mu, 1.0).expand([copies, len(batch)]))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide() -> None:
        A, b, s = (pyro.param(n, lambda v=v: torch.tensor(v)) for n, v in
                   (("A", 0.5), ("b", 0.1), ("s", 0.9)))  # fmt: skip
        with pyro.plate("copies", copies, dim=-2), pyro.plate("data", 4, subsample=batch, dim=-1):
            pyro.sample("z", dist.Normal(A * x + b, s))

    return model, guide


def over_all_minibatches(make_loss: Callable[[], ELBO], calls: int = 12) -> tuple[Tensor, Tensor]:
    """Return mean and standard error over all six minibatches of two, per copy."""
    names, copies = ("mu", "A", "b", "s"), 4000
    batches = [list(pair) for pair in itertools.combinations(range(4), 2)]
    rows = torch.stack([
        torch.stack([
            bound_and_gradient(make_loss(), *subsampled(pair, copies), names) / copies
            for pair in batches
        ]).mean(0)
        for _ in range(calls)
    ])  # fmt: skip
    return rows.mean(0), rows.std(0) / calls**0.5


def test_scale_inside_the_logarithm() -> None:
    """Under subsampling Pyro's value exceeds log p(x) and the guide's gradient has another sign."""
    mean, error = over_all_minibatches(
        lambda: RenyiELBO(alpha=0, num_particles=2, vectorize_particles=True, max_plate_nesting=2)
    )
    assert ((mean - torch.tensor(SCALE_INSIDE)).abs() < 6 * error).all()  # of 12 calls
    assert mean[0] > LOG_EVIDENCE + 3 * error[0]
    assert all(
        inside * full < 0 for inside, full in zip(SCALE_INSIDE[2:], FULL_DATA[2:], strict=True)
    )
    assert mean[4] > 4.5 * error[4]  # where that of the full data is -0.9

    mean, error = over_all_minibatches(lambda: IWAE_ELBO(2, estimator="dreg"))
    assert ((mean - torch.tensor(FULL_DATA)).abs() < 6 * error).all()


def random_minibatch() -> tuple[Callable, Callable, list[set[int]]]:
    """Return a model and guide of 100 conjugate data, ten at a time; and what was drawn."""
    x, seen = torch.linspace(-2, 2, 100), []

    def model() -> None:
        with pyro.plate("data", 100, subsample_size=10) as batch:
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([10]))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[batch])

    def guide() -> None:
        with pyro.plate("data", 100, subsample_size=10) as batch:
            seen.append(set(batch.tolist()))
            pyro.sample("z", dist.Normal(x[batch] / 2, math.sqrt(0.5)))

    return model, guide, seen


def test_one_minibatch_for_all_particles() -> None:
    """Looped, Pyro draws a minibatch per particle, so that weights compare different data."""
    model, guide, seen = random_minibatch()
    renyi(5, vectorized=False).loss(model, guide)
    assert len(set(map(frozenset, seen))) == 5

    for vectorize in (True, False):
        seen.clear()
        loss = IWAE_ELBO(5, vectorize_particles=vectorize, max_plate_nesting=1)
        loss.loss(model, guide)  # the structure is looked up here
        seen.clear()
        value = loss.loss(model, guide)
        assert len(set(map(frozenset, seen))) == 1
        # The guide is the exact posterior: ten times the minibatch's log p(x), whatever the draw.
        chosen = torch.linspace(-2, 2, 100)[sorted(seen[0])]
        assert -value == pytest.approx(10 * dist.Normal(0.0, 2**0.5).log_prob(chosen).sum().item())


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
        rows = [bound_and_gradient(loss, model, guide, ("logit",))[1] for _ in range(900)]
        return torch.stack(rows)

    assert (gradients(renyi(4)) == 0).all()
    ours = gradients(IWAE_ELBO(4, estimator="vimco"))
    assert abs(ours.mean() + 0.05080123) < 4.5 * ours.std() / 900**0.5
    assert ours.mean() < -4.5 * ours.std() / 900**0.5  # and not zero
    with pytest.raises(NotImplementedError, match="vimco"):
        gradients(IWAE_ELBO(4))


def test_differentiable_loss() -> None:
    model, guide, _ = random_minibatch()
    with pytest.raises(AttributeError):
        renyi(4)(model, guide)()
    assert IWAE_ELBO(4)(model, guide)().shape == ()


def test_one_loss_serves_models_of_different_nesting() -> None:
    """Pyro's ELBO keeps the plate nesting of the first model that it saw."""

    def flat() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def nested() -> None:
        with pyro.plate("outer", 3, dim=-2), pyro.plate("inner", 4, dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0).expand([3, 4]))

    stock = RenyiELBO(alpha=0, num_particles=3, vectorize_particles=True)
    stock.loss(flat, flat)
    with pytest.raises(ValueError, match="collide"):
        stock.loss(nested, nested)
    ours = IWAE_ELBO(3)
    before = dict(vars(ours))
    assert ours.loss(flat, flat) == 0 and ours.loss(nested, nested) == 0 == ours.loss(flat, flat)
    assert vars(ours) == before


def test_guide_only_site_outside_the_plate() -> None:
    """Pyro counts an auxiliary site outside the data plate once per datum."""

    def model() -> None:
        with pyro.plate("data", 50):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([50]))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(50))

    def guide() -> None:
        # The density of the auxiliary variable integrates out: -log q = 2 exactly, once.
        flat = dist.Uniform(0.0, math.exp(2.0))
        pyro.sample("extra", flat, infer={"is_auxiliary": True})
        with pyro.plate("data", 50):
            pyro.sample("z", dist.Normal(0.0, math.sqrt(0.5)).expand([50]))

    exact = 50 * dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(0.0)).item() + 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the weights are joint
        assert -Trace_ELBO().loss(model, guide) == pytest.approx(exact)
        assert -renyi(5).loss(model, guide) == pytest.approx(exact + 49 * 2)
        assert -IWAE_ELBO(5).loss(model, guide) == pytest.approx(exact)


def global_and_local(subsample: Tensor | None) -> tuple[Callable, Callable]:
    size = 50 if subsample is None else len(subsample)

    def model() -> None:
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 50, subsample=subsample):
            z = pyro.sample("z", dist.Normal(shift, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(size))

    def guide() -> None:
        pyro.sample("shift", dist.Normal(0.0, 0.2))
        with pyro.plate("data", 50, subsample=subsample):
            pyro.sample("z", dist.Normal(0.3, 1.0).expand([size]))

    return model, guide


def test_one_global_latent_costs_every_datum_its_weights() -> None:
    """Pyro falls back to one weight per data set in silence; we say so, and offer the others."""
    model, guide = global_and_local(None)
    with pytest.warns(UserWarning, match=r"'data' encloses latent site 'z' but not 'shift'"):
        joint = IWAE_ELBO(50).loss(model, guide)
    local = IWAE_ELBO(50, global_latents="elbo").loss(model, guide)
    elbo = Trace_ELBO(50, vectorize_particles=True).loss(model, guide)
    assert local < joint < elbo


def test_global_latent_under_subsampling() -> None:
    """Pyro returns a number that is no bound; we raise, with site, plate and remedy."""
    model, guide = global_and_local(torch.arange(5))
    assert isinstance(renyi(10).loss(model, guide), float)
    message = r"Plate 'data' is subsampled \(5 of 50\).*site 'shift'.*global_latents='elbo'"
    for call in (IWAE_ELBO(10).loss, IWAE_ELBO(10).loss_and_grads):
        with pytest.raises(ValueError, match=message):
            call(model, guide)
    assert isinstance(IWAE_ELBO(10, global_latents="elbo").loss(model, guide), float)
    # One sample is the ELBO, which is linear in the data.
    pyro.set_rng_seed(1)
    one = IWAE_ELBO(1).loss(model, guide)
    pyro.set_rng_seed(1)
    assert one == pytest.approx(Trace_ELBO().loss(model, guide))


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
    """Torch's own error says nothing of the cause; the note does."""

    def program() -> None:
        if pyro.sample("z", dist.Normal(0.0, 1.0)) > 0:
            pyro.sample("more", dist.Normal(0.0, 1.0))

    with pytest.raises(RuntimeError) as caught:
        IWAE_ELBO(3).loss(program, program)
    assert "vectorize_particles=False" in "".join(caught.value.__notes__)
    assert IWAE_ELBO(3, vectorize_particles=False).loss(program, program) == 0


def mixing_model() -> None:
    b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    pyro.sample("y", dist.Normal(b.sum(), 1.0), obs=torch.tensor(1.0))


def mixing_guide() -> None:
    pyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))


def test_a_model_that_mixes_the_samples() -> None:
    """A sum over all dims is right for one sample, and wrong in silence for many in one pass."""
    exact = dist.Normal(0.0, 3**0.5).log_prob(torch.tensor(1.0))
    elbo = Trace_ELBO(100, vectorize_particles=True)
    wrong = [elbo.loss(mixing_model, mixing_guide) for _ in range(200)]
    assert sum(wrong) / 200 > 50  # about 100, and 2.4 for samples one by one
    for call in (IWAE_ELBO(3).loss, IWAE_ELBO(3).loss_and_grads, log_marginal):
        with pytest.raises(ValueError, match=r"value of 'b' in another.*z\.sum\(-1\)"):
            call(mixing_model, mixing_guide)
    looped = log_marginal(mixing_model, mixing_guide, num_particles=1000, vectorize_particles=False)
    assert looped.item() == pytest.approx(exact.item(), abs=0.15)


def test_a_mask_that_the_guide_does_not_have() -> None:
    """Pyro keeps log q of what `obs_mask` leaves out: the wider the guide, the better its value."""
    observed = torch.tensor([True, False])

    def model() -> None:
        with pyro.plate("data", 2):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.zeros(2), obs_mask=observed)

    def guide(masked: bool) -> Callable[[], None]:
        def sample() -> None:
            with pyro.plate("data", 2), poutine.mask(mask=~observed if masked else True):
                pyro.sample("x_unobserved", dist.Normal(0.0, 1e9).expand([2]))

        return sample

    assert Trace_ELBO().loss(model, AutoNormal(model, init_scale=1e-9)) > 10
    with pytest.raises(ValueError, match=r"'x_unobserved' is masked and the guide's is not"):
        IWAE_ELBO(3).loss(model, AutoNormal(model))
    with pytest.raises(ValueError, match=r"poutine\.mask"):
        IWAE_ELBO(3).loss(model, guide(False))
    assert isinstance(IWAE_ELBO(3).loss(model, guide(True)), float)


def test_agrees_with_pyro_where_pyro_is_right() -> None:
    """Full batch, one plate, reparameterised guide: equal value and gradient under one seed."""
    model, guide = subsampled([0, 1, 2, 3], copies=1)
    for alpha in (0.0, 0.5):
        rows = []
        for loss in (
            RenyiELBO(alpha=alpha, num_particles=7, vectorize_particles=True, max_plate_nesting=2),
            MultiSampleELBO(bounds.renyi(alpha), num_particles=7, max_plate_nesting=2),
        ):
            IWAE_ELBO(2).loss(model, guide)  # both have seen the program
            pyro.set_rng_seed(5)
            rows.append(bound_and_gradient(loss, model, guide, ("mu", "A", "b", "s")))
        torch.testing.assert_close(*rows)
