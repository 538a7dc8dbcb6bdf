"""The losses on Pyro models against numbers that are known exactly, from quadrature.

A data plate of many copies of one datum gives as many independent draws of value and gradient in
one call. Statistical checks allow 4.5 standard errors.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch.distributions import AffineTransform, ExpTransform, SigmoidTransform

from pyro_recursive import (
    CIWAE_ELBO,
    IWAE_ELBO,
    MIWAE_ELBO,
    PIWAE_ELBO,
    MultiSampleELBO,
    bounds,
    log_marginal,
)
from tests.models.small import conjugate_guide, conjugate_model
from tests.oracles.quadrature import LOC, MU, SCALE, X, log_normal, normal_grid

COPIES, CALLS, SIGMAS = 1000, 30, 4.5


def draws(
    loss: MultiSampleELBO, model: Callable, guide: Callable, names: tuple[str, ...]
) -> torch.Tensor:
    """Return ``[calls, 1 + parameters]``: the bound and its gradient, averaged over the copies."""
    rows = []
    for _ in range(CALLS):
        value = loss.differentiable_loss(model, guide)
        parameters = [pyro.param(name).unconstrained() for name in names]
        gradients = torch.autograd.grad(value, parameters)
        rows.append(torch.stack([value.detach(), *gradients]) / -COPIES)
    return torch.stack(rows)


def assert_means(rows: torch.Tensor, expected: tuple[float, ...]) -> None:
    error = rows.std(0) / len(rows) ** 0.5
    z = (rows.mean(0) - torch.tensor(expected)) / error
    assert (z.abs() < SIGMAS).all(), f"z = {z.tolist()}, means {rows.mean(0).tolist()}"


def scored_guide() -> None:
    """The same guide as if the normal had no reparameterisation."""
    loc = pyro.param("m", lambda: torch.tensor(LOC))
    scale = pyro.param("s", lambda: torch.tensor(SCALE))
    with pyro.plate("data", COPIES):
        pyro.sample("z", dist.Normal(loc, scale).has_rsample_(False))


IWAE_3 = (-1.49784037, 0.27034455, 0.25931090, -0.01864180)
IWAE_2 = (-1.54700029, 0.18402369, 0.43195263, -0.09621772)
IWAE_4 = (-1.47677549, 0.30875384)  # value and d/dmu
STL_3 = (*IWAE_3[:2], 0.71652639, -0.17836596)
RWS_3 = (*IWAE_3[:2], 0.45721549, -0.15972417)
CIWAE_3 = (-1.57177797, 0.15924118, 0.48151763, -0.21971592)
CIWAE_2 = (-1.60618992, 0.09881658, 0.60236684, -0.27401907)
ELBO = (-1.7442990490, -0.1, 1.0, -0.68888889)
PATHS = ("pathwise", "dreg", "stl")
JACKKNIFE_3 = (-1.39952052, 0.44298628, -0.08597255, 0.13651005)

PATHWISE_ROWS = [
    *((IWAE_ELBO(3, estimator=e), IWAE_3) for e in ("pathwise", "dreg", "vimco", "dreg+vimco")),
    (IWAE_ELBO(3, estimator="stl"), STL_3),
    *((IWAE_ELBO(3, estimator=e), RWS_3) for e in ("rws", "rws-dreg")),
    (MIWAE_ELBO(2, 3), IWAE_3),
    (MIWAE_ELBO(2, 3, estimator="dreg"), IWAE_3),
    (MIWAE_ELBO(3, 2, estimator="dreg"), IWAE_2),
    (MIWAE_ELBO(3, 1, estimator="dreg"), ELBO),
    *((CIWAE_ELBO(3, beta=0.3, estimator=e), CIWAE_3) for e in ("pathwise", "dreg")),
    (CIWAE_ELBO(2, beta=0.3, estimator="dreg"), CIWAE_2),
    (CIWAE_ELBO(3, beta=1.0), ELBO),
    (CIWAE_ELBO(3, beta=0.0, estimator="dreg"), IWAE_3),
    *((MultiSampleELBO(bounds.elbo, num_particles=3, estimator=e), ELBO) for e in ("stl", "dreg")),
    (MultiSampleELBO(bounds.jackknife, num_particles=3, estimator="dreg"), JACKKNIFE_3),
    # M = 1, K = 3 pools nothing; M = 3, K = 1 gives the model IWAE-3 and the guide the ELBO.
    (PIWAE_ELBO(1, 3, estimator="dreg"), IWAE_3),
    *((PIWAE_ELBO(3, 1, estimator=e), (*IWAE_3[:2], *ELBO[2:])) for e in PATHS),
    *((PIWAE_ELBO(2, 2, estimator=e), (*IWAE_4, *IWAE_2[2:])) for e in PATHS[:2]),
    (PIWAE_ELBO(2, 2, estimator="stl"), (*IWAE_4, 0.78259915, -0.26726049)),
]
SCORE_ROWS = [
    *((IWAE_ELBO(3, estimator=e), IWAE_3) for e in ("score", "vimco", "dreg+vimco")),
    (IWAE_ELBO(3, estimator="rws"), RWS_3),
    (MIWAE_ELBO(2, 3, estimator="vimco"), IWAE_3),
    (MIWAE_ELBO(3, 2, estimator="vimco"), IWAE_2),
    (CIWAE_ELBO(3, beta=0.3, estimator="vimco"), CIWAE_3),
    (MultiSampleELBO(bounds.elbo, num_particles=3, estimator="vimco"), ELBO),
]
GUIDES = {"reparameterised": conjugate_guide, "scored": scored_guide}
TABLE = [("reparameterised", *row) for row in PATHWISE_ROWS]
TABLE += [("scored", *row) for row in SCORE_ROWS]


@pytest.mark.quick(12)
@pytest.mark.parametrize(("guide", "loss", "expected"), TABLE, ids=repr)
def test_value_and_gradients(guide: str, loss: MultiSampleELBO, expected: tuple) -> None:
    assert_means(draws(loss, conjugate_model, GUIDES[guide], ("mu", "m", "s")), expected)


HIERARCHICAL = (0.130673, 0.118794, -0.006541, 0.178344, 0.152293, -0.098400)
HIERARCHICAL_START = {"a": 0.4, "b": 0.1, "s1": 0.8, "c": 0.3, "d": -0.1, "s2": 0.9}


def hierarchical_model() -> None:
    with pyro.plate("data", COPIES):
        z2 = pyro.sample("z2", dist.Normal(0.0, 1.0).expand([COPIES]))
        z1 = pyro.sample("z1", dist.Normal(0.8 * z2, 1.0))
        pyro.sample("x", dist.Normal(z1, 1.0), obs=torch.full((COPIES,), X))


def parameters(start: dict[str, float]) -> dict[str, torch.Tensor]:
    return {name: pyro.param(name, torch.tensor(value)) for name, value in start.items()}


def hierarchical_guide() -> None:
    p = parameters(HIERARCHICAL_START)
    with pyro.plate("data", COPIES):
        z1 = pyro.sample("z1", dist.Normal(p["a"] * X + p["b"], p["s1"]))
        pyro.sample("z2", dist.Normal(p["c"] * z1 + p["d"], p["s2"]))


@pytest.mark.parametrize("estimator", ["pathwise", "dreg"])
@pytest.mark.parametrize("vectorize", [True, False])
def test_hierarchical_guide(estimator: str, vectorize: bool) -> None:
    """Detaching distribution parameters would lose that q(z2 | z1) moves with z1."""
    loss = IWAE_ELBO(2, estimator=estimator, vectorize_particles=vectorize)
    rows = draws(loss, hierarchical_model, hierarchical_guide, tuple(HIERARCHICAL_START))
    assert_means(rows[:, 1:], HIERARCHICAL)


MIXED = (-1.93415992, 0.0446001, 0.0597829, -0.1669519, 0.0351693)
MIXED_START = {"m": 0.3, "s": 0.8, "c": 0.7, "d": -0.2}


def mixed_model() -> None:
    with pyro.plate("data", COPIES):
        z1 = pyro.sample("z1", dist.Normal(0.0, 1.0).expand([COPIES]))
        z2 = pyro.sample("z2", dist.Bernoulli(0.35).expand([COPIES]))
        pyro.sample("x", dist.Normal(z1 + 2 * z2 - 1, 1.0), obs=torch.full((COPIES,), 0.9))


def mixed_guide() -> None:
    p = parameters(MIXED_START)
    with pyro.plate("data", COPIES):
        z1 = pyro.sample("z1", dist.Normal(p["m"], p["s"]).expand([COPIES]))
        pyro.sample("z2", dist.Bernoulli(logits=p["c"] * z1 + p["d"]))


@pytest.mark.parametrize("estimator", ["score", "vimco", "dreg+score", "dreg+vimco"])
def test_mixed_guide(estimator: str) -> None:
    """A discrete site below a reparameterised one adds a term to the path of the latter."""
    loss = IWAE_ELBO(3, estimator=estimator)
    assert_means(draws(loss, mixed_model, mixed_guide, tuple(MIXED_START)), MIXED)


def trained(value: float) -> torch.Tensor:
    return torch.tensor(value, requires_grad=True)


ONE = torch.tensor(1.0)
SUPPORTS: list[tuple[Callable[[], Any], bool]] = [
    (lambda: dist.Uniform(-ONE, trained(2.0)), True),
    (lambda: dist.Pareto(trained(0.5), ONE), True),
    (lambda: dist.AffineBeta(ONE, ONE, trained(0.0), ONE), True),
    (lambda: moved(dist.Exponential(ONE), AffineTransform(trained(0.1), 1.0)), True),
    (
        lambda: moved(dist.Exponential(ONE), ExpTransform(), AffineTransform(0.0, trained(1.0))),
        True,
    ),
    (lambda: moved(dist.Exponential(trained(1.0)), AffineTransform(0.0, trained(2.0))), False),
    (lambda: moved(dist.Normal(ONE, trained(1.0)), ExpTransform()), False),
    (
        lambda: moved(dist.Normal(ONE, ONE), ExpTransform(), AffineTransform(trained(0.1), 1.0)),
        False,
    ),
    (
        lambda: moved(
            dist.Uniform(0 * ONE, ONE), SigmoidTransform().inv, AffineTransform(trained(0.1), 1.0)
        ),
        False,
    ),
    (lambda: dist.Weibull(trained(1.0), trained(2.0)), False),
    (lambda: dist.Gumbel(trained(1.0), trained(2.0)), False),
    (lambda: dist.Kumaraswamy(trained(1.0), trained(2.0)), False),
]


def moved(base: Any, *transforms: Any) -> Any:
    return dist.TransformedDistribution(base, list(transforms))


@pytest.mark.parametrize(("make", "moves"), SUPPORTS)
@pytest.mark.parametrize("estimator", ["dreg", "stl"])
def test_the_support_may_not_move_where_scores_are_dropped(
    make: Callable, moves: bool, estimator: str
) -> None:
    """The mean of the score is zero only where the density is zero at the bounds, or they stay."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(0.3))

    def guide() -> None:
        pyro.sample("z", make().expand([4]).to_event(1))

    match = "'z' has a support whose bounds depend on parameters"
    with pytest.raises(ValueError, match=match) if moves else nullcontext():
        IWAE_ELBO(3, estimator=estimator).loss_and_grads(model, guide)
    IWAE_ELBO(3).loss_and_grads(model, guide)


TEMPERED = [
    *((bounds.elbo, estimator, True) for estimator in ("stl", "dreg")),
    *((bounds.iwae, estimator, True) for estimator in ("pathwise", "dreg")),
    (bounds.iwae, "vimco", False),
]


@pytest.mark.parametrize(("bound", "estimator", "has_rsample"), TEMPERED)
def test_a_trained_scale(bound: bounds.Bound, estimator: str, has_rsample: bool) -> None:
    """Prior and guide to a power that is learned: the derivative is none of the guide's density."""

    def scale() -> torch.Tensor:
        return pyro.param("temperature", lambda: torch.tensor(0.6))

    def model() -> None:
        with pyro.plate("data", COPIES):
            with poutine.scale(scale=scale()):
                z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([COPIES]))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.full((COPIES,), X))

    def guide() -> None:
        with pyro.plate("data", COPIES), poutine.scale(scale=scale()):
            q = dist.Normal(pyro.param("m", lambda: torch.tensor(LOC)), SCALE)
            pyro.sample("z", q.expand([COPIES]).has_rsample_(has_rsample))

    rows = draws(
        MultiSampleELBO(bound, num_particles=3, estimator=estimator),
        model,
        guide,
        ("temperature", "m"),
    )
    leaves = [torch.tensor(value, requires_grad=True) for value in (0.6, LOC)]
    eps, weight = normal_grid(3, 24)
    z = leaves[1] + SCALE * eps
    tempered = leaves[0] * (log_normal(z, 0.0, 1.0) - log_normal(z, leaves[1], SCALE))
    value = (weight * bound((tempered + log_normal(X, z, 1.0))[None])).sum()
    expected = [each.item() for each in (value, *torch.autograd.grad(value, leaves))]
    assert_means(rows, tuple(expected))


def test_piwae_refuses_shared_parameters() -> None:
    def guide() -> None:
        mu = pyro.param("mu", lambda: torch.tensor(MU))
        with pyro.plate("data", COPIES):
            pyro.sample("z", dist.Normal(mu, 1.0).expand([COPIES]))

    for loss in (PIWAE_ELBO(2, 3), IWAE_ELBO(3, estimator="rws")):
        with pytest.raises(ValueError, match=r"Parameter 'mu' belongs to model and guide"):
            loss.loss_and_grads(conjugate_model, guide)
    MIWAE_ELBO(2, 3, estimator="dreg").loss_and_grads(conjugate_model, guide)


@pytest.mark.parametrize("loss", [PIWAE_ELBO(3, 2, estimator="dreg"), PIWAE_ELBO(8, 8)])
def test_piwae_in_float32_with_far_apart_estimates(loss: PIWAE_ELBO) -> None:
    """Estimates hundreds of nats apart: a model weight of zero with a guide weight that is not."""
    torch.set_default_dtype(torch.float32)

    def model() -> None:
        loc = pyro.param("loc", lambda: torch.zeros(20))
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.05).to_event(1), obs=torch.ones(4, 20))

    def guide() -> None:
        shift = pyro.param("shift", lambda: torch.zeros(20))
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(shift, 1.0).to_event(1).expand([4]))

    loss.loss_and_grads(model, guide)
    for name in ("loc", "shift"):
        gradient = pyro.param(name).unconstrained().grad
        assert gradient is not None and gradient.isfinite().all() and gradient.abs().sum() > 0


@pytest.mark.parametrize("estimator", ["score", "vimco", "dreg+vimco", "pathwise", "dreg", "rws"])
def test_an_impossible_datum_leaves_the_parameters_finite(estimator: str) -> None:
    def model() -> None:
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]))
            pyro.factor("possible", torch.tensor([0.0, -torch.inf]) + 0 * z)

    def guide() -> None:
        loc = pyro.param("loc", lambda: torch.tensor(0.5))
        with pyro.plate("data", 2):
            z = dist.Normal(loc, 1.0).expand([2])
            scored = estimator in ("score", "vimco")
            pyro.sample("z", z.has_rsample_(False) if scored else z)

    match = r"The bound is -inf at plate indices \[\[1\]\]"
    with pytest.warns(UserWarning, match=match) as caught:
        value = IWAE_ELBO(3, estimator=estimator).loss_and_grads(model, guide)
    assert caught[0].filename == __file__
    gradient = pyro.param("loc").unconstrained().grad
    assert value == torch.inf and gradient is not None and gradient.isfinite()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IWAE_ELBO(3, estimator="reinforce"), r"estimator must be one of .*'reinforce'"),
        (lambda: MultiSampleELBO(bounds.jackknife).loss(conjugate_model, conjugate_guide), ">= 2"),
        (lambda: MIWAE_ELBO(1.5, 2), r"num_estimates must be an integer >= 1, got 1\.5"),
        (lambda: IWAE_ELBO(1, estimator="vimco"), "needs num_particles >= 2, got 1"),
        (lambda: CIWAE_ELBO(4, beta=1.5), r"beta must lie in \[0, 1\], got 1.5"),
        (lambda: IWAE_ELBO(4, global_latents="none"), "global_latents must be one of"),
        (lambda: PIWAE_ELBO(4, 2, global_latents="elbo"), "not PIWAE"),
    ],
)
def test_wrong_options(make: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("estimator", ["pathwise", "dreg", "stl", "score", "vimco", "rws"])
def test_half_precision(dtype: torch.dtype, estimator: str) -> None:
    """At the exact posterior every draw gives log p(x), and some estimators have no noise."""
    x = torch.tensor([0.3, -1.0, 2.0])

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        loc = pyro.param("loc", lambda: x / 2)
        with pyro.plate("data", 3):
            q = dist.Normal(loc, x.new_full((3,), 0.5**0.5))
            pyro.sample("z", q.has_rsample_(estimator not in ("score", "vimco")))

    exact = -dist.Normal(0.0, 2**0.5).log_prob(x).sum().item()
    value = IWAE_ELBO(8, estimator=estimator).loss_and_grads(model, guide, x.to(dtype))
    assert value == pytest.approx(exact, rel=0.01)
    gradient = pyro.param("loc").unconstrained().grad
    assert gradient is not None and gradient.dtype == dtype
    assert gradient.isfinite().all()
    if estimator in ("dreg", "stl"):
        assert gradient.abs().max() < 0.05


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Pyro's own import
def test_variational_gaussian_processes_have_no_multi_sample_bound(sparse: bool) -> None:
    """Their "log p" would be above the exact one; an ELBO, and exact Gaussian processes, run."""
    from pyro.contrib import gp

    x = torch.linspace(0.0, 1.0, 5)
    y, kernel, noise = torch.sin(6 * x), gp.kernels.RBF(1), torch.tensor(0.1)
    likelihood = gp.likelihoods.Gaussian(noise)
    if sparse:
        process = gp.models.VariationalSparseGP(
            x, y, kernel, x[::2].clone(), likelihood, whiten=True
        )
    else:
        process = gp.models.VariationalGP(x, y, kernel, likelihood, whiten=True)

    def model() -> None:
        process.model()

    for program in (process.model, model):
        with pytest.raises(NotImplementedError, match="expectation over the guide"):
            IWAE_ELBO(4).loss(program, process.guide)
        with pytest.raises(NotImplementedError, match="expectation over the guide"):
            log_marginal(program, process.guide, num_particles=4)
    elbo = MIWAE_ELBO(4, 1).loss(process.model, process.guide)
    assert elbo == pytest.approx(Trace_ELBO().loss(process.model, process.guide))
    exact = gp.models.GPRegression(x, y, gp.kernels.RBF(1), noise=noise)
    covariance = exact.kernel(x).detach() + (0.1 + exact.jitter) * torch.eye(5)
    expected = dist.MultivariateNormal(torch.zeros(5), covariance).log_prob(y).item()
    assert -IWAE_ELBO(4).loss(exact.model, exact.guide) == pytest.approx(expected, rel=1e-6)
