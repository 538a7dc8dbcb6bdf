"""Draws of guides and models: single runs of the model for each, conjugate posteriors, refusals."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyro_recursive import MAPAGuide
from pyro_recursive.evaluation import (
    Draws,
    importance_weights,
    log_likelihoods,
    posterior_draws,
    predictive_draws,
    prior_draws,
    psis,
)
from pyro_recursive.evaluation.model_runs import _fits_plate
from pyro_recursive.evaluation.predictions import resampled_index
from pyro_recursive.mapa import EncodedCodes
from pyro_recursive.tracing.handlers import SubstituteByName
from pyro_recursive.tracing.sites import is_delta, sites, subsample_scale
from tests import models
from tests.models import ROWS, SCALED, Row
from tests.models.autoencoder import Curve
from tests.models.guides import KIND, kinds, of
from tests.models.small import in_rows, normal, normal_global, normal_loop, normal_rows, prior_of

QUICK = {
    "no_plate", "far_dim", "explicit_subsample", "obs_mask", "events", "deterministic", "factor",
    "no_latents", "grid_reversed", "sequential_subsample", "vectorized_of_sequential", "hierarchy",
    "unequal_scales", "auto_gaussian", "reparam",
}  # fmt: skip
OVER_ROWS = pytest.mark.parametrize(
    "row",
    [pytest.param(r, id=r.name, marks=() if r.name in QUICK else pytest.mark.slow) for r in ROWS],
)


def made(row: Row) -> tuple[Callable, Callable, tuple]:
    model, guide = row.build()
    args = row.args()
    guide(*args)
    return model, guide, args


# --- Any model: each draw against a single run of the model on its values


def single_run(model: Callable, args: tuple, draws: Draws, number: int) -> poutine.Trace:
    """Run the model on the values of one draw, which are found by their names."""
    values = {name: site["value"] for name, site in draws.minibatch.nodes.items()}
    for name, drawn in draws.of_kind("latent").items():
        dims = {frame.dim: frame.size for frame in drawn.frames}
        batch = [dims.get(dim, 1) for dim in range(min(dims, default=0), 0)]
        values[name] = drawn.value[number].reshape((*batch, *drawn.event_shape))
    with SubstituteByName(values):
        trace = poutine.trace(model).get_trace(*args)
    trace.compute_log_prob()
    return trace


def check_draw(model: Callable, args: tuple, draws: Draws, number: int) -> None:
    trace = single_run(model, args, draws, number)
    total = torch.zeros(())
    for site in sites(trace):
        shared = [frame for frame in site["cond_indep_stack"] if frame.name in draws.plates]
        scale = math.prod(subsample_scale(frame) for frame in shared)
        total = total + site["log_prob"].sum().detach() / scale
    if draws.log_p is not None:
        torch.testing.assert_close(total, draws.log_p[number].sum())
    for name, drawn in draws.of_kind("computed").items():
        expected = trace.nodes[name]["value"]
        torch.testing.assert_close(drawn.value[number], expected.reshape(drawn.value[0].shape))


def check_likelihood(model: Callable, args: tuple, draws: Draws, found: Draws, number: int) -> None:
    trace = single_run(model, args, draws, number)
    seen = [site for site in sites(trace) if site["is_observed"] and not is_delta(site)]
    assert {site["name"] for site in seen} == set(found.sites)
    for site in seen:
        drawn = found.sites[site["name"]]
        missing = drawn.value[number].isnan()
        if site["mask"] is not None and site["mask"] is not False:
            assert missing.any() == (not torch.as_tensor(site["mask"]).all())
        shape = torch.broadcast_shapes(site["fn"].batch_shape, site["log_prob"].shape)
        expected = site["fn"].log_prob(site["value"]).expand(shape).reshape(missing.shape)
        torch.testing.assert_close(drawn.value[number][~missing], expected[~missing])


@OVER_ROWS
@pytest.mark.parametrize("how", ["one pass", "one by one", "psis"])
def test_each_draw_is_a_run_of_the_model(row: Row, how: str) -> None:
    """Log p of each draw, resampled or not, and what is computed from it, is the model's."""
    model, guide, args = made(row)
    options: dict[str, Any] = {"num_draws": 7, "chunk_size": 5}
    if how == "psis":
        options |= {"resample": how, "num_proposals": 30}
        if row.name in SCALED:
            with pytest.raises(ValueError, match=r"has a scale\. Take it off"):
                posterior_draws(model, guide, *args, **options)
            return
    pyro.set_rng_seed(4)
    draws = posterior_draws(model, guide, *args, vectorize_particles=how != "one by one", **options)
    assert len(draws) == 7 and draws.plates == row.shared
    assert (draws.log_p is None) == (row.name in SCALED)
    if draws.log_p is not None:
        assert draws.log_p.shape == draws.log_q.shape == (7, *row.plates)
    for number in (0, 6):
        check_draw(model, args, draws, number)
    if how == "one pass":
        found = log_likelihoods(model, draws, *args, chunk_size=3)
        check_likelihood(model, args, draws, found, 4)
        if row.name in SCALED:
            with pytest.raises(ValueError, match=r"no log p.*has a scale"):
                draws.log_weights  # noqa: B018
        else:
            pyro.set_rng_seed(4)
            weigh = importance_weights.__wrapped__  # with the noise of the present random state
            weights = weigh(model, guide, *args, num_particles=7, chunk_size=5)
            torch.testing.assert_close(draws.log_weights, weights.log_weights)


@OVER_ROWS
@pytest.mark.parametrize("vectorize", [True, False])
def test_simulated_data_have_the_shape_of_the_data(row: Row, vectorize: bool) -> None:
    model, guide, args = made(row)
    options = {"vectorize_particles": vectorize, "chunk_size": 3}
    draws = posterior_draws(model, guide, *args, num_draws=5)
    new = predictive_draws(model, draws, *args, **options)
    prior = prior_draws(model, *args, num_draws=5, minibatch=draws.minibatch, **options)
    expected = set(log_likelihoods(model, draws, *args).sites) - {"likelihood"}
    assert set(new.sites) == set(prior.of_kind("observed")) == expected
    for name, drawn in (new.sites | draws.sites).items():
        assert prior[name].shape == drawn.value.shape
        assert prior.sites[name].plates == drawn.plates
    for name in new.sites:
        assert (new[name][0] != new[name][4]).all()
        assert (prior[name][0] != prior[name][4]).all()


# --- Conjugate models


wide_guide = in_rows(lambda x: normal("z", 0.2 + 0 * x, 1.3))


def scaled_data(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.scale(scale=torch.tensor(3.0)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_resampled_draws_are_those_of_the_posterior() -> None:
    """Weights of each datum, of all data for a global latent, of a likelihood to the power 3."""
    x = torch.tensor([1.5, -0.5, 0.0])
    options = {"num_draws": 4000, "num_proposals": 60_000, "resample": "psis"}
    for model, guide, mean, variance in (
        (normal_rows, wide_guide, x / 2, torch.tensor(0.5)),
        (normal_global, prior_of(normal_global), x.sum() / 3.25, torch.tensor(1 / 3.25)),
        (scaled_data, wide_guide, 0.75 * x, torch.tensor(0.25)),
    ):
        z = posterior_draws(model, guide, x, **options)["z"]
        error = (variance / 4000) ** 0.5
        assert ((z.mean(0) - mean).abs() < 4.5 * error).all()
        assert ((z.var(0) - variance).abs() < 4.5 * variance * (2 / 4000) ** 0.5).all()


def test_rows_choose_on_their_own() -> None:
    draws = posterior_draws(normal_rows, wide_guide, torch.zeros(400), num_draws=50)
    index = resampled_index(draws.log_weights, 1000, draws.plates)
    assert index.shape == (1000, 400)
    agree = (index[:, 0] == index[:, 1]).double().mean()
    assert agree < 0.1  # 1 in 50 by chance
    shares = torch.stack([(index == number).double().mean(0) for number in range(50)])
    expected = psis(draws.log_weights).log_weights.exp()
    z = (shares - expected) / (expected * (1 - expected) / 1000).sqrt()
    z = z[expected > 0.005]  # five draws or more: the square of a rare one has a long tail
    assert abs(z.pow(2).mean() - 1) < 6 * (2 / len(z)) ** 0.5 and len(z) > 5000


def test_proposals_without_weight_are_refused() -> None:
    guide = in_rows(lambda x: normal("z", torch.tensor([0.5, -50.0]), 0.1))
    model = in_rows(lambda x: pyro.sample("z", dist.Uniform(0.0, 1.0, validate_args=False)))
    with pytest.raises(ValueError, match=r"None of 50 draws.*at \(1,\) of plates \['data'\]"):
        posterior_draws(model, guide, torch.zeros(2), num_draws=5, resample="psis")


def test_predictive_distribution() -> None:
    """x' ~ N(m, v + 1) in each case; data of another size for a global latent."""
    x = torch.tensor([1.5, -0.5, 0.0])
    exact = partial(posterior_draws, normal_global, num_draws=20_000)
    draws = exact(lambda x: pyro.sample("z", dist.Normal(x.sum() / 3.25, 3.25**-0.5)), x)
    for data in (x, torch.zeros(7)):
        new = predictive_draws(normal_global, draws, data)["x"]
        assert new.shape == (20_000, len(data))
        variance = 1 + 1 / 3.25
        assert ((new.mean(0) - x.sum() / 3.25).abs() < 4.5 * (variance / 20_000) ** 0.5).all()
        assert ((new.var(0) / variance - 1).abs() < 4.5 * (2 / 20_000) ** 0.5).all()
        both = torch.corrcoef(torch.stack([new[:, 0], draws["z"]]))[0, 1]
        assert abs(both - (1 / 3.25 / variance) ** 0.5) < 0.02  # to each draw its own data


def test_prior_predictive_distribution() -> None:
    draws = prior_draws(normal_global, torch.zeros(2), num_draws=20_000)
    joint = torch.cat([draws["z"][:, None], draws["x"]], 1)
    exact = torch.full((3, 3), 4.0)
    exact[1, 1] = exact[2, 2] = 5.0
    assert ((torch.cov(joint.T) - exact).abs() < 4.5 * 5 * (2 / 20_000) ** 0.5).all()


def test_data_further_down_see_what_was_drawn() -> None:
    """The returned value is the drawn one, `poutine.uncondition`'s rule; factors stay."""

    def model(x: Tensor, y: Tensor) -> None:
        loc = pyro.deterministic("loc", pyro.sample("z", dist.Normal(0.0, 1.0)) * torch.ones(2))
        with pyro.plate("data", len(x)):
            first = pyro.sample("x", dist.Normal(100.0 + loc, 1.0), obs=x)
            pyro.factor("penalty", -(loc**2))
            pyro.sample("y", dist.Normal(first, 1e-3), obs=y)

    args = (torch.zeros(2), torch.zeros(2))
    draws = posterior_draws(model, prior_of(model), *args, num_draws=10)
    assert draws["loc"].shape == (10, 2)
    new = predictive_draws(model, draws, *args)
    assert set(new.sites) == {"x", "y"}
    assert (new["x"] > 90).all() and ((new["y"] - new["x"]).abs() < 0.01).all()
    assert set(log_likelihoods(model, draws, *args).sites) == {"x", "y", "penalty"}


def test_masked_data() -> None:
    """Nan where a datum is masked, by either way; a mask inside an event leaves out a part."""
    seen = models.mask()

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=seen):
                pyro.sample("a", dist.Normal(z, 1.0), obs=x)
            with poutine.scale(scale=7.0):
                pyro.sample("b", dist.Normal(z, 1.0).mask(seen), obs=x)
            parts = dist.Normal(z[..., None], torch.ones(2)).mask(torch.tensor([True, False]))
            pyro.sample("c", parts.to_event(1), obs=torch.stack([x, x], -1))

    x = models.data()
    draws = posterior_draws(model, prior_of(model), x, num_draws=3)
    found = log_likelihoods(model, draws, x)
    expected = dist.Normal(draws["z"][:, None], 1.0).log_prob(x)
    torch.testing.assert_close(found["c"], expected)
    expected[:, ~seen] = math.nan
    for name in ("a", "b"):
        torch.testing.assert_close(found[name], expected, equal_nan=True)


@pytest.mark.parametrize("vectorize", [True, False])
def test_computed_values_of_any_shape(vectorize: bool) -> None:
    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.deterministic("norm", w.norm(dim=-1))
        pyro.deterministic("outer", w[..., None] * w[..., None, :])
        pyro.deterministic("constant", torch.arange(6.0).reshape(2, 3))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.deterministic("row", torch.stack([z, 2 * z], -1))
            pyro.deterministic("told", torch.stack([z, 2 * z], -1), event_dim=1)
            pyro.deterministic("whole", z.sum(-1))
            pyro.deterministic("pair", torch.stack([z.sum(-1), z.mean(-1)], -1))
            pyro.deterministic("fixed", torch.ones(len(x), 2))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    # As many draws as data, and as event entries: sizes do not tell the dims apart.
    for count in (3, 4):
        options = {"num_draws": count, "vectorize_particles": vectorize}
        draws = posterior_draws(model, prior_of(model), torch.zeros(4), **options)
        w, z = draws["w"], draws["z"]
        torch.testing.assert_close(draws["norm"], w.norm(dim=-1))
        torch.testing.assert_close(draws["outer"], w[:, :, None] * w[:, None, :])
        assert draws["constant"].shape == (count, 2, 3)
        for name in ("row", "told"):
            torch.testing.assert_close(draws[name], torch.stack([z, 2 * z], -1))
            assert draws.sites[name].plates == ("data",)
        torch.testing.assert_close(draws["whole"], z.sum(-1))
        torch.testing.assert_close(draws["pair"], torch.stack([z.sum(-1), z.mean(-1)], -1))
        assert draws.sites["pair"].plates == ()
        assert draws["fixed"].shape == (count, 4, 2)


def test_sequential_plates_choose_their_own_cell() -> None:
    """Two columns of a loop, one with a guide that is right: its draws stay, the other's move."""

    def guide(x: Tensor) -> None:
        for i in pyro.plate("data", 2):
            pyro.sample(f"z{i}", dist.Normal(x[i] / 2 + i, 0.5**0.5))

    x = torch.tensor([0.4, -1.0])
    options = {"num_draws": 2000, "num_proposals": 40_000, "resample": "psis"}
    draws = posterior_draws(normal_loop, guide, x, **options)
    for i in range(2):
        assert abs(draws[f"z{i}"].mean() - x[i] / 2) < 0.08


# --- This package's guides


@kinds("table", "mixture_encoders", "flow_encoder", "gaussian")
def test_guides_of_this_package(kind: str) -> None:
    s, guide = of("events", kind)
    draws = posterior_draws(s.model, guide, *s.args, num_draws=40, resample="psis")
    assert draws.plates == (() if KIND[kind].rows == "joint" else ("data",))
    check_draw(s.model, s.args, draws, 3)


def test_codes_with_a_density_and_without() -> None:
    curve = Curve()
    model, x = curve.model, curve.x
    guide = MAPAGuide(model, EncodedCodes(curve.encoder, x, scale=0.4), x)
    draws = posterior_draws(model, guide, x, num_draws=40, resample="psis")
    assert draws["z"].shape == (40, 9, 2) and draws.plates == ("data",)
    check_draw(model, (x,), draws, 3)
    draws = posterior_draws(model, curve.guide(), x, num_draws=30, chunk_size=20)
    assert draws["z"].shape == (30, 9, 2) and draws.log_p is None
    with pytest.raises(ValueError, match="without a density"):
        posterior_draws(model, curve.guide(), x, num_draws=30, resample="psis")


# --- Scales of the user's own


def test_scales_are_told_apart_from_those_of_subsamples() -> None:
    x = torch.zeros(7)
    draws = posterior_draws(scaled_data, wide_guide, x, num_draws=3)
    assert log_likelihoods(scaled_data, draws, x).scaled == ("x",)
    prior = poutine.scale(normal_rows, 0.2)
    assert log_likelihoods(prior, draws, x).scaled == ("z", "x")
    for count in range(1, 8):  # 7 / 3, say, is no number of floats
        model = partial(models.local, subsample_size=count)
        draws = posterior_draws(model, prior_of(model), x, num_draws=3)
        assert draws.log_p is not None
        assert log_likelihoods(model, draws, x).scaled == ()


# --- Subsampled data of global latents


def subsampled_mean(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 2.0))
    with pyro.plate("data", 50, subsample_size=4) as index:
        pyro.deterministic("mean", z + 100 * index)
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


def test_draws_need_no_full_data() -> None:
    x = torch.arange(50.0)
    drawn = partial(posterior_draws, subsampled_mean, lambda x: normal("z", 0.5, 0.8), x)
    draws = drawn(num_draws=6, chunk_size=4)
    assert draws["z"].shape == (6,) and draws.log_p is None and draws.plates == ()
    index = draws.whole_minibatch.nodes["data"]["value"]
    torch.testing.assert_close(draws["mean"], draws["z"][:, None] + 100 * index)
    for number in range(6):  # one minibatch in all chunks of another call, too
        found = log_likelihoods(subsampled_mean, draws.of_this_call(), x, chunk_size=2)["x"]
        expected = dist.Normal(draws["z"][number], 1.0).log_prob(x[index])
        torch.testing.assert_close(found[number], expected)
    other = log_likelihoods(subsampled_mean, draws, x, chunk_size=2)["x"]
    roots = (-2 * (other + math.log(2 * math.pi) / 2)).sqrt()  # |x - z|
    torch.testing.assert_close(roots + draws["z"][:, None], (roots + draws["z"][:, None]).round())
    assert ((roots + draws["z"][:, None]).std(0) < 1e-6).all()
    with pytest.raises(ValueError, match=r"no log p.*Plate 'data' is subsampled \(4 of 50\)"):
        draws.log_weights  # noqa: B018
    with pytest.raises(ValueError, match=r"not enclose site 'z'.*Pass the full data"):
        drawn(resample="psis")


# --- Refusals


def test_draws_of_other_data_are_refused() -> None:
    draws = posterior_draws(normal_rows, wide_guide, torch.zeros(3), num_draws=5)
    with pytest.raises(ValueError, match=r"'z' was drawn in plate 'data' of 3 entries, not 4"):
        predictive_draws(normal_rows, draws, torch.zeros(4))
    with pytest.raises(ValueError, match=r"no draws of \['z'\]"):
        log_likelihoods(normal_rows, Draws({}, 5), torch.zeros(3))
    with pytest.raises(ValueError, match="no log p"):
        predictive_draws(normal_rows, draws, torch.zeros(3)).log_weights  # noqa: B018

    def outside(x: Tensor) -> None:
        z = normal("z", 0.0)
        with pyro.plate("data", len(x)):
            normal("x", z, obs=x)

    with pytest.raises(ValueError, match="3 entries, and the model has it outside of that plate"):
        predictive_draws(outside, draws, torch.zeros(3))


def test_a_loop_over_draws_warns() -> None:
    """That of a model which branches on a value: it may take long."""

    def model(x: Tensor) -> None:
        z = normal("z", 0.0)
        with pyro.plate("data", len(x)):
            normal("x", z if z > 0 else 2 * z, obs=x)

    draws = prior_draws(model, torch.zeros(2), num_draws=6, vectorize_particles=False)
    with pytest.warns(UserWarning, match=r"Draws run one by one \(6 runs of the model\)"):
        log_likelihoods(model, draws, torch.zeros(2), chunk_size=4)


@in_rows
def mixing(x: Tensor) -> None:
    z = normal("z", 0.0)
    normal("x", z + z.sum(0), obs=x)


def test_computed_values_that_mix_samples() -> None:
    """They have no density that could tell; the rest of the model fits one more plate."""

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.deterministic("share", z.softmax(0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    for draws in (
        prior_draws(model, torch.zeros(2), num_draws=9),
        posterior_draws(model, prior_of(model), torch.zeros(2), num_draws=9),
    ):
        torch.testing.assert_close(draws["share"], draws["z"].softmax(-1))


@pytest.mark.parametrize("vectorize", [True, False])
def test_models_that_mix_samples(vectorize: bool) -> None:
    """A sum over the rows from the left would be one over the samples, under one more plate."""
    options = {"num_draws": 200, "vectorize_particles": vectorize}
    draws = posterior_draws(mixing, wide_guide, torch.zeros(2), **options)
    found = log_likelihoods(mixing, draws, torch.zeros(2))["x"]
    expected = dist.Normal(draws["z"] + draws["z"].sum(1, keepdim=True), 1.0).log_prob(0.0 * found)
    torch.testing.assert_close(found, expected)
    new = predictive_draws(mixing, draws, torch.zeros(2))["x"]
    prior = prior_draws(mixing, torch.zeros(2), **options)
    for drawn, z in ((new, draws["z"]), (prior["x"], prior["z"])):
        noise = drawn - z - z.sum(1, keepdim=True)
        assert abs(noise.var() - 1) < 4.5 * (2 / noise.numel()) ** 0.5


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("chunk_size", [1, 2, None])
def test_sites_that_come_and_go(first: int, chunk_size: int | None) -> None:
    """Whether the first run has the site or not."""
    runs = itertools.count(first)

    def model(x: Tensor) -> None:
        pyro.sample("k", dist.Bernoulli(0.5))
        if next(runs) % 2:
            pyro.deterministic("sometimes", x)

    options = {"num_draws": 5, "vectorize_particles": False, "chunk_size": chunk_size}
    with pytest.raises(ValueError, match="'sometimes' is in some runs"):
        posterior_draws(model, prior_of(model), torch.zeros(1), **options)


def test_minibatches_stay_together() -> None:
    """Latents, likelihoods and new data of one minibatch, which is drawn anew each time."""
    x = torch.arange(100.0)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=3) as index:
            z = pyro.sample("z", dist.Normal(x[index], 1e-3))
            pyro.sample("x", dist.Normal(z, 1e-3), obs=x[index])

    draws = posterior_draws(model, prior_of(model), x, num_draws=20, chunk_size=6)
    index = draws.minibatch.nodes["data"]["value"]
    assert ((draws["z"] - index).abs() < 0.1).all()
    assert (log_likelihoods(model, draws, x, chunk_size=7)["x"] > 0).all()
    assert ((predictive_draws(model, draws, x, chunk_size=7)["x"] - index).abs() < 0.1).all()
    assert (prior_draws(model, x, num_draws=5, chunk_size=2)["z"].std(0) < 0.1).all()


@pytest.mark.parametrize("draws_data", [True, False])
def test_how_samples_of_a_model_run_is_found_once(draws_data: bool) -> None:
    runs = []

    def model(x: Tensor) -> None:
        runs.append(1)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    args = (torch.zeros(3),)
    first = _fits_plate(model, args, {}, draws_data)
    count = len(runs)
    assert first and count and _fits_plate(model, args, {}, draws_data) and len(runs) == count
