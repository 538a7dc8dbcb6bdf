"""Simulation-based calibration: exact posteriors pass, and each fault is found for what it is."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.infer.reparam import LocScaleReparam
from torch import Tensor

from pyro_recursive.evaluation.ranks import (
    Calibration,
    ecdf_band,
    ecdf_difference,
    ranks_of,
    uniformity,
)
from pyro_recursive.evaluation.sbc import calibration, calibration_by_fits, simulate
from tests.models import local as local_model
from tests.models.small import in_rows, normal, normal_rows

HALF = 0.5**0.5  # the scale of a posterior of one observation with unit variance


@in_rows
def posterior(x: Tensor, shift: float = 0.0, width: float = 1.0) -> None:
    """Of `normal_rows`, with two faults."""
    normal("z", x / 2 + shift, width * HALF)


@in_rows
def two_sites(x: Tensor, y: Tensor) -> None:
    z = normal("z", 0.0)
    normal("x", z, obs=x)
    normal("y", z + 5, obs=y)


def hierarchy(x: Tensor) -> None:
    loc = normal("loc", 0.0)
    with pyro.plate("data", len(x)):
        normal("x", normal("z", loc), obs=x)


def exact_hierarchy(x: Tensor, width: float = 1.0) -> None:
    variance = 1 / (1 + len(x) / 2)
    loc = normal("loc", variance * x.sum(-1) / 2, width * variance**0.5)
    with pyro.plate("data", len(x)):
        normal("z", (loc + x) / 2, HALF)


def value(found: Any, name: str) -> Tensor:
    return found.trace.nodes[name]["value"]


# --- Ranks


@pytest.mark.parametrize(("count", "num_draws"), [(30, 7), (30, 1), (200, 127), (1000, 10)])
def test_uniform_ranks_are_rejected_as_often_as_said(count: int, num_draws: int) -> None:
    dims = 4000
    found = uniformity(torch.randint(num_draws + 1, (count, dims)), num_draws)
    for level in (0.05, 0.01):
        error = math.sqrt(level / dims)
        assert abs((found < level).double().mean() - level) < 0.3 * level + 4 * error


@pytest.mark.parametrize(
    ("draw", "is_uniform"),
    [
        (lambda u: u.square(), False),
        (lambda u: u.sqrt(), False),
        (lambda u: 0.5 + 0.8 * (u - 0.5), False),
        (lambda u: dist.Beta(0.7, 0.7).sample(u.shape), False),
        (lambda u: dist.Beta(1.4, 1.4).sample(u.shape), False),
        (lambda u: (1 - u).where((u > 0.7) & (u < 0.9), u), False),
        (lambda u: torch.where(u < 0.3, u + 0.3, torch.where(u < 0.6, u - 0.3, u)), True),
        (lambda u: u.where((u - 0.5).abs() < 0.499, 0.2), True),
    ],
    ids=["high", "low", "middle", "narrow", "wide", "skewed", "permuted", "rounded"],
)
def test_faults_are_found(draw: Callable[[Tensor], Tensor], is_uniform: bool) -> None:
    ranks = (draw(torch.rand(500, 1)) * 128).long()
    assert Calibration({"z": ranks}, 127).is_calibrated(1e-3) == is_uniform


def test_p_values_are_adjusted_for_their_number() -> None:
    good, bad = torch.randint(100, (300, 3)), torch.randint(40, (300, 1))
    found = Calibration({"a": good, "b": torch.cat([good[:, :1], bad], 1)}, 99)
    assert not found.is_calibrated()
    assert torch.equal(found.adjusted["a"], (5 * found.p_values["a"]).clamp_max(1))
    assert found.adjusted["b"][0] > 1e-3 > found.adjusted["b"][1]
    assert str(found).splitlines()[1].startswith("b: smallest adjusted p-value")


def test_ties_are_broken_at_random() -> None:
    truth = torch.poisson(torch.full((4000, 1), 0.7))
    ranks = ranks_of(truth, torch.poisson(torch.full((15, 4000, 1), 0.7)))
    assert uniformity(ranks, 15) > 1e-3
    assert (ranks_of(truth, torch.full((5, 4000, 1), -1.0)) == 5).all()


@pytest.mark.parametrize(("count", "num_draws"), [(50, 20), (400, 63)])
def test_the_band_holds_what_it_says(count: int, num_draws: int) -> None:
    lower, upper = ecdf_band(count, num_draws, 0.9)
    difference = ecdf_difference(torch.randint(num_draws + 1, (count, 4000)), num_draws)[1]
    inside = (difference >= lower.unsqueeze(1) - 1e-12) & (difference <= upper.unsqueeze(1) + 1e-12)
    share = inside.all(0).double().mean()
    assert 0.88 < share < 0.94  # counts are whole: a little above
    state = torch.get_rng_state()
    assert torch.equal(ecdf_band(count, num_draws, 0.9)[0], lower)
    assert torch.equal(torch.get_rng_state(), state)


def test_difference_by_hand() -> None:
    at, difference = ecdf_difference(torch.tensor([[0], [0], [3], [2]]), 4)
    torch.testing.assert_close(at, torch.tensor([0.2, 0.4, 0.6, 0.8]))
    expected = torch.tensor([0.5, 0.5, 0.75, 1.0]) - at
    torch.testing.assert_close(difference[:, 0], expected)


# --- Rows


@pytest.mark.parametrize("fault", [{}, {"width": 0.6}, {"width": 1.6}, {"shift": 0.3}])
def test_conjugate_rows(fault: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of draws."""
    monkeypatch.setattr("pyro_recursive.evaluation.posterior_tables.DRAWN_ROWS", 3000)
    guide = partial(posterior, **fault)
    found = calibration(normal_rows, guide, torch.zeros(400), num_draws=63)
    assert found.ranks["z"].shape == (400, 1) and found.ranks["z"].max() <= 63
    assert found.is_calibrated(1e-3) == (not fault)


def test_inner_plates_events_covariates_and_keywords() -> None:
    def model(covariate: Tensor, y: Tensor, x: Tensor | None = None) -> None:
        with pyro.plate("rows", len(covariate), dim=-2):
            v = pyro.sample("v", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with pyro.plate("inner", 3, dim=-1):
                normal("x", normal("w", covariate.unsqueeze(-1)), obs=x)
            pyro.sample("y", dist.Normal(v, 1.0).to_event(1), obs=y.unsqueeze(-2))

    def guide(covariate: Tensor, y: Tensor, x: Tensor, wrong: float = 0.0) -> None:
        with pyro.plate("rows", len(covariate), dim=-2):
            loc = y.unsqueeze(-2) / 2 + torch.tensor([0.0, wrong])
            pyro.sample("v", dist.Normal(loc, HALF).to_event(1))
            with pyro.plate("inner", 3, dim=-1):
                normal("w", (covariate.unsqueeze(-1) + x) / 2, HALF)

    covariate, y, x = 10 * torch.randn(300), torch.zeros(300, 2), torch.zeros(300, 3)
    wrong = partial(guide, wrong=1.0)
    found = calibration(model, guide, covariate, y, x=x, num_draws=31)
    assert found.ranks["v"].shape == (300, 2) and found.ranks["w"].shape == (300, 3)
    assert found.is_calibrated(1e-3)
    found = calibration(model, wrong, covariate, y, x=x, num_draws=31)
    assert (found.adjusted["v"] < 1e-3).tolist() == [False, True]
    assert bool((found.adjusted["w"] > 1e-3).all())
    only = calibration(model, wrong, covariate, y, x=x, names=["w"])
    assert list(only.ranks) == ["w"] and only.is_calibrated(1e-3)


def test_discrete_latents() -> None:
    @in_rows
    def model(x: Tensor) -> None:
        normal("x", 2 * pyro.sample("k", dist.Bernoulli(0.3)), obs=x)

    @in_rows
    def guide(x: Tensor, prior: float = 0.3) -> None:
        odds = math.log(prior / (1 - prior)) + 2 * x - 2
        pyro.sample("k", dist.Bernoulli(logits=odds))

    x = torch.zeros(600)
    assert calibration(model, guide, x, num_draws=31).is_calibrated(1e-3)
    assert not calibration(model, partial(guide, prior=0.6), x, num_draws=31).is_calibrated()


# --- Whole data sets


@pytest.mark.parametrize(("width", "vectorize"), [(1.0, True), (0.4, True), (1.0, False)])
def test_global_and_local_latents(vectorize: bool, width: float) -> None:
    sizes = {"num_datasets": 50, "num_draws": 63} if vectorize else {"num_draws": 4}
    options = {"num_datasets": 20, **sizes, "vectorize_particles": vectorize}
    guide = partial(exact_hierarchy, width=width)
    found = calibration_by_fits(hierarchy, lambda x: guide, torch.zeros(3), **options)
    assert found.ranks["loc"].shape[1:] == (1,) and found.ranks["z"].shape[1:] == (3,)
    assert bool((found.adjusted["loc"] > 1e-3).all()) == (width == 1.0)


def test_fits_start_afresh_and_leave_nothing() -> None:
    def model(x: Tensor) -> None:
        normal("x", normal("z", pyro.param("mu", torch.tensor(0.0))), obs=x)

    starts: list[float] = []
    data: list[float] = []

    def fit(x: Tensor) -> AutoNormal:
        pyro.set_rng_seed(0)  # must not make all data sets the same
        starts.append(pyro.param("mu").item())
        data.append(x.item())
        guide = AutoNormal(model, init_scale=0.5)
        SVI(model, guide, pyro.optim.SGD({"lr": 0.1}), Trace_ELBO()).step(x)
        assert len(pyro.get_param_store()) == 3
        return guide

    x = torch.tensor(0.0)
    simulate(model, (x,), {})
    parameter = pyro.param("mu").unconstrained()
    found = calibration_by_fits(model, fit, x, num_datasets=20, num_draws=15)
    assert found.ranks["z"].shape == (20, 1)
    assert starts == [0.0] * 20 and len(set(data)) == 20
    assert list(pyro.get_param_store()) == ["mu"]
    assert pyro.param("mu").unconstrained() is parameter and parameter == 0.0
    assert parameter.grad is None


# --- Where the data go


def test_data_by_identity_or_in_another_shape_and_dtype() -> None:
    found = simulate(two_sites, (torch.zeros(4),), {"y": torch.zeros(4)})
    assert torch.equal(found.args[0], value(found, "x"))
    assert torch.equal(found.kwargs["y"], value(found, "y"))

    def model(counts: Tensor) -> None:
        with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Poisson(rate), obs=counts.reshape(2, 3).double())

    found = simulate(model, (torch.arange(6),), {})
    assert found.args[0].dtype == torch.long and found.args[0].shape == (6,)
    assert torch.equal(found.args[0].double(), value(found, "x").flatten())


def transposed(x: Tensor) -> None:
    with pyro.plate("a", 3, dim=-2), pyro.plate("b", 3, dim=-1):
        normal("x", normal("z", 0.0), obs=x.T)


def other_sites(x: Tensor) -> None:
    normal_rows(x)
    if bool((x == 0).all()):
        normal("more", 0.0)


@in_rows
def masked(x: Tensor) -> None:
    with poutine.mask(mask=torch.arange(len(x)) > 0):
        z = normal("z", 0.0)
    normal("x", z, obs=x)


X = torch.zeros(3)


minibatch = partial(local_model, subsample_size=2)
autoregression = in_rows(lambda x: normal("x", normal("z", 0.0) + x.mean(), obs=x))
data_dependent_prior = in_rows(lambda x: normal("x", normal("z", x), obs=x))
AMBIGUOUS: dict[str, tuple[Callable, tuple]] = {
    "'f' is a pyro.factor": (lambda x: (normal_rows(x), pyro.factor("f", x.sum())), (X,)),
    "observes nothing": (lambda x: None, (X,)),
    "distribution of site 'x' depends on": (autoregression, (X,)),
    "distribution of site 'z' depends on": (data_dependent_prior, (X,)),
    "'x' does not observe the simulation": (transposed, (torch.zeros(3, 3),)),
    r"data of site 'x' are in arguments \[\]": (minibatch, (torch.arange(5.0),)),
    "Site 'more' is not there for all": (other_sites, (X,)),
    r"in arguments \[0, 1\]": (lambda x, y: normal_rows(x + 0), (X, torch.zeros(3))),
    r"'y' are in arguments \[0\], not in one of their own": (lambda x: two_sites(x, x), (X,)),
}


@pytest.mark.parametrize("message", AMBIGUOUS)
def test_data_without_a_clear_place(message: str) -> None:
    model, args = AMBIGUOUS[message]
    with pytest.raises(ValueError, match=message):
        simulate(model, args, {})


def test_computed_and_reparameterised_sites() -> None:
    """They stay what they are computed from, and are no latents of their own."""

    @in_rows
    def model(x: Tensor) -> None:
        with poutine.reparam(config={"z": LocScaleReparam(0.0)}):
            z = normal("z", 1.0, 2.0)
        pair = pyro.deterministic("pair", torch.stack([z, 2 * z], -1), event_dim=1)
        normal("x", pyro.deterministic("double", pair[..., 1]), obs=x)

    @in_rows
    def guide(x: Tensor, width: float = 1.0) -> None:  # z ~ N(1, 2), x ~ N(2 z, 1), z = 1 + 2 e
        variance = 1 / (1 / 4 + 4)
        loc = variance * (2 * x + 1 / 4)
        normal("z_decentered", (loc - 1) / 2, width * variance**0.5 / 2)

    x = torch.zeros(1000)
    found = simulate(model, (x,), {})
    torch.testing.assert_close(value(found, "z"), 1 + 2 * value(found, "z_decentered"))
    assert value(found, "double").shape == (1000,)
    assert calibration(model, guide, x, num_draws=31).is_calibrated(1e-3)
    narrow = calibration(model, partial(guide, width=0.6), x, num_draws=31)
    assert set(narrow.ranks) == {"z_decentered"} and not narrow.is_calibrated()
    by_fits = calibration_by_fits(model, lambda x: guide, x[:5], num_datasets=20)
    assert set(by_fits.ranks) == {"z_decentered"} and by_fits.is_calibrated(1e-3)


def test_a_column_of_an_argument() -> None:
    model = in_rows(lambda x: normal("y", normal("z", 0.0) + x[:, 0], obs=x[:, 2]))
    exact = in_rows(lambda x: normal("z", (x[:, 2] - x[:, 0]) / 2, HALF))

    def replace(simulated: dict[str, Tensor], args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return (torch.cat([args[0][:, :2], simulated["y"][:, None]], 1),), kwargs

    found = calibration(model, exact, torch.randn(400, 3), num_draws=31, replace=replace)
    assert found.is_calibrated(1e-3)


def wrong_column(simulated: dict[str, Tensor], args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return (simulated["y"],), {"y": simulated["x"]}


local = in_rows(lambda x: normal("z", x / 2))
by_fits = partial(calibration_by_fits, hierarchy, lambda x: local)
to_other = "calibration_by_fits, which simulates whole data sets"
WRONG: list[tuple[Callable[[Tensor], Any], str]] = [
    (lambda x: uniformity(torch.full((20, 1), 10), 9), "are 0 to 9, got 10 to 10"),
    (lambda x: Calibration({}, 9), "no ranks"),
    (lambda x: calibration(normal_rows, lambda x: normal("loc", 0.0), x), to_other),
    (lambda x: calibration(normal_rows, AutoDiagonalNormal(normal_rows), x), to_other),
    (lambda x: calibration(hierarchy, local, x), "'loc' is outside plate 'data'"),
    (
        lambda x: calibration(normal_rows, posterior, x, names=["q"]),
        r"names= has \['q'\]; the latent sites are \['z'\]",
    ),
    (lambda x: by_fits(x, num_datasets=20), "'loc' has shape .* no draws in the guide"),
    (lambda x: calibration(normal_rows, posterior, x[:10]), "needs 20 ranks, got 10"),
    (lambda x: by_fits(x, num_datasets=10), "num_datasets must be an integer >= 20, got 10"),
    (
        lambda x: simulate(two_sites, (x,), {"y": x + 0}, wrong_column),
        "'x' does not observe the simulation",
    ),
    (lambda x: simulate(masked, (x,), {}), "Latent site 'z' is masked"),
]


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_missing_sites_and_rows(call: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises((ValueError, NotImplementedError), match=message):
        call(torch.zeros(30))
