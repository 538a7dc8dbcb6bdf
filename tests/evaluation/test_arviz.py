"""ArviZ objects of guides and chains; leave-one-out against its exact value."""

import dataclasses
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from pyro_recursive import AmortizedGuide, MAPAGuide
from pyro_recursive.evaluation import leave_one_out, posterior_draws, psis
from pyro_recursive.evaluation.arviz import loo, mcmc_to_arviz, to_arviz
from pyro_recursive.evaluation.leave_one_out import OLD, az, has_group
from tests.models import ROWS, SCALED, Row, exact_groups, joint_evidence, mask, normal
from tests.models.small import (
    in_rows,
    normal_global,
    normal_loop,
    normal_rows,
    prior_of,
    vector_rows,
)
from tests.oracles.arviz_objects import Chains, pointwise

QUICK = {"obs_mask", "factor", "no_latents", "nested", "sequential"}


def posterior_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return location and scale of the posterior of `normal_global`."""
    precision = len(x) + 1 / 4
    return x.sum() / precision, torch.tensor(precision**-0.5)


def shifted_guide(shift: float, width: float) -> Callable:
    """A guide that is off by so many of the posterior's scales."""

    def guide(x: Tensor) -> None:
        loc, scale = posterior_of(x)
        pyro.sample("z", dist.Normal(loc + shift * scale, width * scale))

    return guide


def exact_loo(x: Tensor) -> Tensor:
    """Return log p(x_i | the others) of `normal_global`, each from the posterior without it."""
    rows = []
    for i in range(len(x)):
        loc, scale = posterior_of(torch.cat([x[:i], x[i + 1 :]]))
        rows.append(dist.Normal(loc, (1 + scale**2).sqrt()).log_prob(x[i]))
    return torch.stack(rows)


def local_guide(x: Tensor) -> None:
    """Off by half a scale, and too wide."""
    with pyro.plate("data", len(x)):
        normal("z", x / 2 + 0.35, 0.85)


X = torch.tensor([1.2, -0.3, 0.8, 2.1, 0.4, -1.0, 1.7, 0.9], dtype=torch.float64)


def repeated(estimate: Callable[[], Tensor], times: int = 32) -> tuple[Tensor, Tensor]:
    found = torch.stack([estimate() for _ in range(times)])
    return found.mean(0), found.std(0) / times**0.5


# --- Leave-one-out

slow = partial(pytest.param, marks=pytest.mark.slow)


def loo_of(model: Callable, guide: Callable, x: Tensor, var_name: str | None = None) -> Any:
    options = {"num_draws": 2000, "posterior_predictive": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # k-hat, where chance has it
        return loo(to_arviz(model, guide, x, **options), var_name)


def with_p_loo(result: Any) -> Tensor:
    return torch.cat([pointwise(result), torch.tensor([float(result["p_loo"])])])


@pytest.mark.parametrize(("shift", "width"), [(1.0, 1.0), slow(-0.7, 1.1), slow(0.2, 1.5)])
def test_loo_knows_that_the_guide_is_off(shift: float, width: float) -> None:
    """Within standard errors of the exact value, where ArviZ's own is many of them away.

    p_loo is the sum of log p(x_i | x) - log p(x_i | x_-i), of the posterior, not the guide.
    """
    guide, exact = shifted_guide(shift, width), exact_loo(X)
    loc, scale = posterior_of(X)
    whole = dist.Normal(loc, (1 + scale**2).sqrt()).log_prob(X)
    exact = torch.cat([exact, (whole - exact).sum()[None]])
    mean, error = repeated(lambda: with_p_loo(loo_of(normal_global, guide, X)))
    assert ((mean - exact).abs() < 4.5 * error + 0.01).all()  # the ratio's bias is of order 1 / S
    assert error.max() < 0.04
    data = to_arviz(normal_global, guide, X, num_draws=4000)
    difference = (with_p_loo(az.loo(data, pointwise=True)) - exact).abs()
    assert (difference > 6 * error + 0.03)[:-1].any()
    assert difference[-1] > 0.3 or width < 1.5


def of_groups() -> tuple[Callable, Callable, Tensor, Tensor]:
    """The weight of a group is that of all of its items; one item is left out."""

    def guide(x: Tensor) -> None:
        with pyro.plate("group", x.shape[0], dim=-2):
            loc = x.sum(-1, keepdim=True) / (x.shape[1] + 1)
            pyro.sample("z", dist.Normal(loc + 0.3, 0.6))

    x = X.reshape(2, 4)
    others = torch.stack([x[:, [j for j in range(4) if j != i]] for i in range(4)], 1)
    return exact_groups, guide, x, joint_evidence(x)[:, None] - joint_evidence(others)


def of_masked() -> tuple[Callable, Callable, Tensor, Tensor]:
    x, seen, guide = X[:4], mask(), shifted_guide(0.5, 1.1)

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)), poutine.mask(mask=seen):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return model, lambda x: guide(x[seen]), x, exact_loo(x[seen])


def of_rows() -> tuple[Callable, Callable, Tensor, Tensor]:
    """Where a latent is in the row of its datum, the evidence is left."""
    return normal_rows, local_guide, X, dist.Normal(0.0, 2**0.5).log_prob(X)


def of_loop() -> tuple[Callable, Callable, Tensor, Tensor]:
    """The weights of other iterations are multiplied on, and change nothing in expectation."""

    def guide(x: Tensor) -> None:
        for i in pyro.plate("data", 2):
            normal(f"z{i}", x[i] / 2 + 0.3, 0.8)

    assert pointwise(loo_of(normal_loop, guide, X[:2])).shape == (2,)
    return normal_loop, guide, X[:2], dist.Normal(0.0, 2**0.5).log_prob(X[1])


@pytest.mark.parametrize("case", [of_rows, *map(slow, [of_groups, of_masked, of_loop])])
def test_loo_is_exact(case: Callable) -> None:
    """Up to its standard error and a bias of order 1 / S."""
    model, guide, x, exact = case()
    name = "x1" if case is of_loop else None
    mean, error = repeated(lambda: pointwise(loo_of(model, guide, x, name)))
    assert mean.shape == exact.shape
    # The weights of the hand-made guides have long tails, and so has the mean's error.
    assert ((mean - exact).abs() < 6 * error + 0.003).all()
    assert case is of_masked or error.max() < 0.04


# Rows of several sites: times of events, Exponential(rate), some of them censored.

TIMES, CENSORED = X.abs() + 0.1, torch.tensor([0, 0, 1, 0, 1, 1, 0, 0], dtype=torch.bool)


def survival(times: Tensor) -> None:
    """Sites of two plates: each is a part of the rows."""
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("events", int((~CENSORED).sum())):
        pyro.sample("time", dist.Exponential(rate), obs=times[~CENSORED])
    with pyro.plate("censored", int(CENSORED.sum())):
        pyro.factor("survived", -rate * times[CENSORED])
    pyro.factor("prior", -0.5 * rate)


def survival_in_one_plate(times: Tensor) -> None:
    """Sites of one plate, with masks: together they make the rows."""
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.5))
    with pyro.plate("data", len(times)):
        with poutine.mask(mask=~CENSORED):
            pyro.sample("time", dist.Exponential(rate), obs=times)
        with poutine.mask(mask=CENSORED):
            pyro.factor("survived", -rate * times)


def survival_guide(times: Tensor) -> None:
    """The posterior is Gamma(2 + events, 1.5 + sum of the times): this is a little wider."""
    count, total = (~CENSORED).sum(), times.sum()
    pyro.sample("rate", dist.Gamma(0.9 * (2.0 + count), 0.9 * (1.5 + total)))


def exact_survival() -> Tensor:
    """Return log p(row | the others): of an event, or of no event before its time."""
    shape = 2.0 + (~CENSORED).sum() - (~CENSORED).double()
    rate = 1.5 + TIMES.sum() - TIMES
    survived = shape * (rate / (rate + TIMES)).log()
    return torch.where(CENSORED, survived, survived + (shape / (rate + TIMES)).log())


@pytest.mark.slow
@pytest.mark.parametrize("model", [survival, slow(survival_in_one_plate)])
def test_all_sites_of_a_row_are_scored(model: Callable) -> None:
    """Each row once, whether its sites are in one plate or in two; not a factor of the prior."""
    mean, error = repeated(lambda: pointwise(loo_of(model, survival_guide, TIMES)))
    exact = exact_survival()
    if model is survival:
        exact = torch.cat([exact[~CENSORED], exact[CENSORED]])
    assert ((mean - exact).abs() < 4.5 * error + 0.003).all() and error.max() < 0.02
    single = pointwise(loo_of(model, survival_guide, TIMES, "time"))
    assert single.shape == (5,)


@pytest.mark.slow
def test_sites_that_share_a_plate_are_one_row() -> None:
    """Two plates inside a row, of one site each; and iterations of a loop."""

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x), dim=-1):
            with pyro.plate("copy", 2, dim=-2):
                pyro.sample("x", dist.Normal(z, 1.0), obs=torch.stack([x, -x]))
            pyro.sample("y", dist.Normal(z, 0.5), obs=x + 0.3)

    def loop(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 2.0))
        for i in pyro.plate("data", len(x)):
            for j in range(2):
                pyro.sample(f"x{i}{j}", dist.Normal(z, 1.0), obs=x[i] * (1 - 2 * j))
            pyro.sample(f"y{i}", dist.Normal(z, 0.5), obs=x[i] + 0.3)

    x, sizes = X[:4], torch.tensor([1.0, 1.0, 0.25])
    rows = torch.stack([x, -x, x + 0.3], -1)
    every, exact = torch.arange(4), []
    for i in range(4):
        precision = 0.25 + 3 * (1 / sizes).sum()
        loc = (rows[every != i] / sizes).sum() / precision
        covariance = sizes.diag() + 1 / precision
        exact.append(dist.MultivariateNormal(loc.expand(3), covariance).log_prob(rows[i]))
    precision = 0.25 + 4 * (1 / sizes).sum()

    def guide(x: Tensor) -> None:
        pyro.sample("z", dist.Normal((rows / sizes).sum() / precision, 1.2 * precision**-0.5))

    for program in (model, loop):
        mean, error = repeated(lambda: pointwise(loo_of(program, guide, x)), 16)  # noqa: B023
        assert ((mean - torch.stack(exact)).abs() < 4.5 * error + 0.02).all()


def test_sites_without_a_plate_in_common_need_a_choice() -> None:
    log_lik = xr.Dataset(
        {
            "x": (("chain", "draw", "a", "b"), np.zeros((1, 30, 2, 3))),
            "y": (("chain", "draw", "a"), np.zeros((1, 30, 2))),
            "z": (("chain", "draw", "b"), np.zeros((1, 30, 3))),
        }
    )
    data = az.InferenceData(log_likelihood=log_lik) if OLD else {"log_likelihood": log_lik}
    with pytest.raises(ValueError, match=r"\['x', 'y', 'z'\] have no plate in common: choose one"):
        loo(data)
    assert pointwise(loo(data, "y")).shape == (2,)


@pytest.mark.parametrize("width", [0.75, 0.45])
def test_a_joint_weight_has_one_k(width: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all rows share it, one warning tells its k-hat, and no row has a smaller one.

    It is smoothed once, not for each row.
    """

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(20), 1.0).to_event(1))
        with pyro.plate("data", 20):
            pyro.sample("x", dist.Normal((z * torch.eye(20)).sum(-1), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(x / 2, width).to_event(1))

    x = torch.linspace(-1.0, 1.0, 20)
    data = to_arviz(model, guide, x, num_draws=1000)
    joint = psis(torch.from_numpy(data["sample_stats"]["log_weight"].values[0])).pareto_k
    shapes: list[torch.Size] = []

    def noted(log_weights: Tensor, **options: Any) -> Any:
        shapes.append(log_weights.shape)
        return psis(log_weights, **options)

    monkeypatch.setattr(leave_one_out, "psis", noted)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = loo(data)
    assert shapes == [(1000, 20), (1000, 1)]
    assert (np.asarray(found["pareto_k"]) >= float(joint)).all()
    messages = [str(each.message) for each in caught if each.category is UserWarning]
    if width == 0.45:
        assert (
            len(messages) == 1 and f"joint weight of all data has k-hat {joint:.2f}" in messages[0]
        )
    assert all("joint" not in message for message in messages) or joint > 0.66


def test_nothing_of_a_stand_in_stays_in_the_result_of_arviz_1(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """ArviZ's own function makes the object; fields that are not ours are None."""
    arrays = ("elpd_i", "pareto_k", "p_loo_i", "n_eff_i", "log_weights", "log_jacobian")
    numbers = ("elpd", "se", "p", "n_samples", "n_data_points", "warning", "good_k")
    names = (*arrays, *numbers, "influence_pareto_k", "scale", "kind", "approx_posterior")
    result = dataclasses.make_dataclass("ELPDDataLOO", names)
    stand_in = {**dict.fromkeys(names, 0), "kind": "loo", "influence_pareto_k": np.zeros(2)}
    stand_in |= dict.fromkeys(arrays, xr.DataArray(np.full(2, 7.0)))
    monkeypatch.setattr(leave_one_out, "OLD", False)
    monkeypatch.setattr(az, "loo", lambda *args, **options: result(**stand_in))
    data = to_arviz(normal_global, shifted_guide(0.2, 1.2), X, num_draws=500)
    found = loo(data)
    assert found.log_jacobian is None and found.influence_pareto_k is None
    assert found.kind == "loo" and found.approx_posterior and found.n_data_points == 8
    assert found.elpd == pytest.approx(float(found.elpd_i.sum()))
    assert found.p == pytest.approx(float(found.p_loo_i.sum()))
    weights, log_lik = found.log_weights, data["log_likelihood"]["x"]
    assert weights.dims == log_lik.dims
    total = np.log(np.exp(weights + log_lik).sum(["chain", "draw"]))
    np.testing.assert_allclose(total, found.elpd_i)
    np.testing.assert_allclose(1 / (np.exp(2 * weights)).sum(["chain", "draw"]), found.n_eff_i)


def test_loo_of_an_exact_guide_is_that_of_arviz() -> None:
    data = to_arviz(normal_global, shifted_guide(0.0, 1.0), X, num_draws=2000)
    ours, theirs = loo(data), az.loo(data, pointwise=True)
    torch.testing.assert_close(pointwise(ours), pointwise(theirs), rtol=0, atol=1e-6)
    assert float(ours["p_loo"]) == pytest.approx(float(theirs["p_loo"]), abs=1e-6)
    assert float(ours["se"]) == pytest.approx(float(theirs["se"]), abs=1e-6)
    np.testing.assert_allclose(ours["pareto_k"], theirs["pareto_k"], atol=1e-6)
    assert str(ours) == str(theirs)


@pytest.mark.parametrize("scale", [0.1, torch.tensor(10.0)])
def test_scaled_models_have_no_loo(scale: Any) -> None:
    programs = [poutine.scale(f, scale) for f in (normal_rows, local_guide)]
    with pytest.raises(ValueError, match=r"without poutine.scale, at z, x"):
        loo(to_arviz(*programs, X, num_draws=30))
    with pytest.raises(ValueError, match=r"no weights.*Guide site 'z' has a scale"):
        loo(to_arviz(normal_rows, programs[1], X, num_draws=30))
    mcmc = Chains({"z": torch.randn(2, 5)})
    with pytest.raises(ValueError, match="without poutine"):
        loo(mcmc_to_arviz(mcmc, poutine.scale(normal_global, scale), X))


def test_a_hopeless_guide_warns() -> None:
    data = to_arviz(normal_global, shifted_guide(8.0, 0.1), X)
    with pytest.warns(UserWarning, match=r"joint weight of all data has k-hat .*, above 0\.67"):
        assert loo(data)["warning"]
    narrow = in_rows(lambda x: normal("z", x / 2 + 3.0, 0.05))
    with pytest.warns(UserWarning, match=r"above 0\.67 for [78] of 8 data.*guide is far from"):
        assert loo(to_arviz(normal_rows, narrow, X))["warning"]


def test_loo_of_what_has_none() -> None:
    data = to_arviz(normal_global, shifted_guide(0.0, 1.0), X, log_likelihood=False)
    with pytest.raises(ValueError, match="needs the group log_likelihood"):
        loo(data)

    def hard_edge(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Uniform(z - 1, z + 1, validate_args=False), obs=x)

    with pytest.raises(ValueError, match=r"'x' is not finite, at \[0, 1"):
        loo(to_arviz(hard_edge, shifted_guide(0.0, 1.0), X))
    rows = X[:, None]

    points = MAPAGuide(vector_rows, nn.Linear(1, 1), rows)
    with pytest.raises(ValueError, match=r"no weights.*without a density"):
        loo(to_arviz(vector_rows, points, rows, num_draws=30))


# --- Guides and chains compared


def test_chains_have_the_shape_of_guides() -> None:
    """Draws in their order, gaps of dims closed; then both compared."""

    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Gamma(3.0, 3.0))
            pyro.deterministic("twice", 2 * z)
            pyro.sample("x", dist.Normal(w.sum(-1) + z, 1.0), obs=x[:, None])

    x = X[:3]
    samples = {"w": torch.randn(2, 5, 2), "z": torch.rand(2, 5, 3, 1)}
    mcmc = Chains(samples, {"chain 0": [1, 3], "chain 1": [4]})
    options = {"prior_predictive": True, "chunk_size": 3, "dims": {"w": ["side"]}}
    data = mcmc_to_arviz(mcmc, model, x, **options)
    posterior = data["posterior"]
    assert dict(posterior["w"].sizes) == {"chain": 2, "draw": 5, "side": 2}
    assert posterior["z"].dims == ("chain", "draw", "data")
    np.testing.assert_array_equal(posterior["w"], samples["w"])
    np.testing.assert_array_equal(posterior["z"], samples["z"][..., 0])
    np.testing.assert_allclose(posterior["twice"], 2 * posterior["z"])
    loc = samples["w"].sum(-1, keepdim=True) + samples["z"][..., 0]
    np.testing.assert_allclose(data["log_likelihood"]["x"], dist.Normal(loc, 1.0).log_prob(x))
    diverging = data["sample_stats"]["diverging"].values
    assert [tuple(place) for place in np.argwhere(diverging)] == [(0, 1), (0, 3), (1, 4)]
    mine = to_arviz(model, AutoNormal(model, init_scale=0.3), x, num_draws=5, **options)
    for group in ("posterior", "log_likelihood", "observed_data", "prior", "posterior_predictive"):
        for name, array in mine[group].data_vars.items():
            assert array.dims == data[group][name].dims
            sizes = {**array.sizes, "chain": 2} if "chain" in array.dims else array.sizes
            assert sizes == data[group][name].sizes
    assert not has_group(mcmc_to_arviz(Chains(samples), model, x), "sample_stats")
    with pytest.raises(ValueError, match=r"no draws of latent site 'z'"):
        mcmc_to_arviz(Chains({"w": samples["w"]}), model, x)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:k-hat is above")  # by chance, with 400 draws of a chain
@pytest.mark.filterwarnings("ignore:num_chains=2 is more than")
def test_guides_are_compared_with_chains() -> None:
    """The efficiency of chains comes from ArviZ, as in its own LOO."""
    options = {"warmup_steps": 100, "num_chains": 2, "disable_progbar": True}
    mcmc = MCMC(NUTS(normal_global), num_samples=200, **options)
    mcmc.run(X)
    data = mcmc_to_arviz(mcmc, normal_global, X)
    assert dict(data["log_likelihood"]["x"].sizes) == {"chain": 2, "draw": 200, "data": 8}
    found = {"nuts": loo(data), "arviz": az.loo(data, pointwise=True)}
    np.testing.assert_allclose(pointwise(found["nuts"]), pointwise(found["arviz"]))
    for name, program in (("off", shifted_guide(0.8, 1.2)), ("exact", shifted_guide(0.0, 1.0))):
        found[name] = loo(to_arviz(normal_global, program, X))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what ArviZ 0.23 asks of pandas
        table = az.compare(found)
    assert set(table.index) == {"off", "exact", "nuts", "arviz"}
    assert float(abs(table["elpd_loo"] - float(exact_loo(X).sum())).max()) < 0.15


# --- The object


GROUPS = {"posterior_predictive", "log_likelihood", "observed_data", "sample_stats"}


@pytest.mark.parametrize(
    "row",
    [pytest.param(r, id=r.name, marks=() if r.name in QUICK else pytest.mark.slow) for r in ROWS],
)
def test_any_model(row: Row) -> None:
    model, guide = row.build()
    guide(*row.args())
    data = to_arviz(model, guide, *row.args(), num_draws=6, prior_predictive=True)
    without_values = {"posterior_predictive", "observed_data"} if row.name == "factor" else set()
    assert all(has_group(data, group) for group in GROUPS - without_values)
    assert has_group(data, "posterior") == (row.name != "no_latents")
    weight = data["sample_stats"]["log_weight"]
    assert weight.dims == ("chain", "draw", *(() if row.name in SCALED else row.shared))
    assert bool(weight.isnull().all()) == bool(weight.isnull().any()) == (row.name in SCALED)
    for name, array in data["log_likelihood"].data_vars.items():
        assert array.sizes["draw"] == 6
        if row.name != "factor":
            observed = data["observed_data"][name]
            assert array.dims[2:] == observed.dims[: array.ndim - 2]
            assert data["posterior_predictive"][name].dims[2:] == observed.dims
            assert data["prior_predictive"][name].dims[2:] == observed.dims


def test_values_dims_and_coordinates() -> None:
    x = torch.randn(4, 2)
    guide = AmortizedGuide(vector_rows, nn.Linear(2, 4))
    names = {"data": list("abcd"), "side": ["left", "right"]}
    pyro.set_rng_seed(1)
    data = to_arviz(vector_rows, guide, x, num_draws=9, coords=names, dims={"z": ["side"]})
    pyro.set_rng_seed(1)
    draws = posterior_draws(vector_rows, guide, x, num_draws=9)
    posterior = data["posterior"]["z"]
    assert posterior.dims == ("chain", "draw", "data", "side")
    right = posterior.sel(data="b", side="right").values[0]
    np.testing.assert_array_equal(right, draws["z"][:, 1, 1].detach())
    assert list(data["sample_stats"]["log_weight"]["data"].values) == list("abcd")
    np.testing.assert_array_equal(data["observed_data"]["x"].values, x)
    assert data["observed_data"]["x"].dims == ("data", "x_dim_0")
    stats = data["sample_stats"]
    np.testing.assert_allclose(stats["log_p"] - stats["log_q"], stats["log_weight"])
    for names in (["data", "side"], ["data"]):
        with pytest.raises(ValueError, match=r"'z' has 1 event dims; its names are \['data', '"):
            to_arviz(vector_rows, guide, x, num_draws=3, dims={"z": names})


def test_an_explicit_subsample_is_no_index_where_it_has_data() -> None:
    def coordinates(value: Tensor, **options: Any) -> list:
        def model(x: Tensor) -> None:
            with pyro.plate("data", 50, subsample=value):
                z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        data = to_arviz(model, prior_of(model), torch.zeros(4), num_draws=3, **options)
        return list(data["posterior"]["data"].values)

    index = torch.tensor([2, 0, 1, 6])
    for data in (index / 2, torch.randn(4, 2), index + 48, -index, index.clamp_max(1)):
        assert coordinates(data) == [0, 1, 2, 3]
    names = [f"n{number}" for number in range(50)]
    assert coordinates(index) == [2, 0, 1, 6]
    assert coordinates(index, coords={"data": names[:4]}) == names[:4]
    assert coordinates(index, coords={"data": names}) == ["n2", "n0", "n1", "n6"]


@pytest.mark.parametrize("labelled", [True, False])
def test_one_minibatch_of_global_latents(labelled: bool) -> None:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 2.0))
        with pyro.plate("data", 50, subsample_size=4) as index:
            pyro.deterministic("number", 1.0 * index)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    x = torch.arange(50.0)
    options: dict[str, Any] = {"num_draws": 8, "chunk_size": 3, "prior_predictive": True}
    names = [f"n{number}" for number in range(50)] if labelled else list(range(50))
    options["coords"] = {"data": names} if labelled else None
    data = to_arviz(model, lambda x: shifted_guide(0.0, 1.0)(x[:5]), x, **options)
    index = data["observed_data"]["x"].values
    np.testing.assert_array_equal(data["posterior"]["number"].values[0, 3], index)
    z = torch.tensor(data["posterior"]["z"].values[..., None])
    expected = dist.Normal(z, 1.0).log_prob(torch.tensor(index))
    np.testing.assert_allclose(data["log_likelihood"]["x"], expected, rtol=1e-5)
    for group in ("observed_data", "posterior", "prior_predictive"):
        assert list(data[group]["data"].values) == [names[int(number)] for number in index]
    with pytest.raises(ValueError, match=r"Plate 'data' is subsampled \(4 of 50\).*full data"):
        loo(data)


@pytest.mark.parametrize("options", [{"coords": {"side": [1]}}, {"dims": {"z": ["side"]}}])
def test_names_that_name_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"name \['side'\]; the dims are \['chain', 'd"):
        to_arviz(normal_global, shifted_guide(0.0, 1.0), X, num_draws=3, **options)


def test_resampled_draws_have_no_weights_left() -> None:
    guide = shifted_guide(0.8, 1.4)
    data = to_arviz(normal_global, guide, X, num_draws=4000, num_proposals=40_000, resample="psis")
    assert "log_weight" not in data["sample_stats"] and "log_p" in data["sample_stats"]
    assert float(abs(loo(data)["elpd_loo"] - exact_loo(X).sum())) < 0.1


def test_groups_can_be_left_out_and_objects_are_saved(tmp_path: Path) -> None:
    options = {"posterior_predictive": False, "log_likelihood": False, "num_draws": 3}
    data = to_arviz(normal_global, shifted_guide(0.0, 1.0), X, **options)
    for group in ("posterior_predictive", "log_likelihood", "prior", "prior_predictive"):
        assert not has_group(data, group)
    data.to_netcdf(str(tmp_path / "draws.nc"))
    again = az.from_netcdf(str(tmp_path / "draws.nc"))
    for group, name in (("posterior", "z"), ("sample_stats", "log_weight"), ("observed_data", "x")):
        np.testing.assert_array_equal(again[group][name], data[group][name])
