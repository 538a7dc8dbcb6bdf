"""Predictions of new rows: exact predictive densities, for guides of any kind."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import autoguide
from torch import Tensor, nn

from pyro_recursive import AmortizedGuide, FlowGuide, MixtureGuide, SemiAmortizedGuide
from pyro_recursive.evaluation import Prediction, posterior_draws, predict, predictive_draws
from tests.models.small import prior_of

Model = Callable[..., None]
NEW = torch.tensor([0.4, -1.1, 1.9, 0.2, 0.7], dtype=torch.float64)
Y = torch.tensor([0.9, -0.6, 2.9, -1.2, 0.3], dtype=torch.float64)
TRAINING = torch.linspace(-1.0, 1.5, 7, dtype=torch.float64)
SEEN = torch.tensor([True, False, True, True, False])
LOC, SCALE = 0.7, 0.4  # of the guides' global latent
S = 4000


def check(found: Prediction, exact: Tensor) -> None:
    """Within standard errors, which are small; rows share the draws of global latents."""
    assert found.log_p is not None and found.log_p.shape == exact.shape
    assert ((found.log_p - exact).abs() < 4.5 * found.standard_error + 1e-9).all()
    assert found.standard_error.max() < 0.2 and found.ess.max() <= len(found.draws)


def check_moments(drawn: Tensor, mean: Tensor, variance: Any) -> None:
    variance = torch.as_tensor(variance).expand_as(mean)
    assert ((drawn.mean(0) - mean).abs() < 4.5 * (variance / len(drawn)).sqrt()).all()
    assert ((drawn.var(0) / variance - 1).abs() < 4.5 * (2 / len(drawn)) ** 0.5).all()


# --- Regression: one global latent


def regression(x: Tensor, y: Tensor | None = None) -> None:
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(slope * x, 0.5), obs=y)


def slope_guide(x: Tensor, y: Tensor | None = None) -> None:
    pyro.sample("slope", dist.Normal(LOC, SCALE))


def fixed(guide: Any) -> Any:
    """Return an autoguide of Pyro's after its first call, on the training data."""
    guide(TRAINING, TRAINING)
    return guide


def auto(kind: Callable, model: Model, **options: Any) -> Any:
    return fixed(kind(model, init_loc_fn=autoguide.init_to_value(values=options), init_scale=SCALE))


REGRESSIONS: dict[str, Callable[[], Any]] = {
    "by_hand": lambda: slope_guide,
    "auto": lambda: auto(autoguide.AutoNormal, regression, slope=torch.tensor(LOC)),
    "joint": lambda: auto(autoguide.AutoMultivariateNormal, regression, slope=torch.tensor(LOC)),
    "draws": lambda: posterior_draws(regression, slope_guide, TRAINING, TRAINING, num_draws=S),
}


def one_by_one(kind: str) -> Any:
    return pytest.param(kind, False, marks=() if kind == "by_hand" else pytest.mark.slow)


@pytest.mark.parametrize(
    ("kind", "vectorize"),
    [*((kind, True) for kind in REGRESSIONS), *map(one_by_one, list(REGRESSIONS)[:-1])],
)
def test_regression(kind: str, vectorize: bool) -> None:
    """y ~ N(loc x, x^2 scale^2 + 0.25), with its data and without, as arguments and by name."""
    guide, variance = REGRESSIONS[kind](), (SCALE * NEW) ** 2 + 0.25
    size = S if vectorize else 200
    run = partial(predict, regression, guide, num_draws=size, vectorize_particles=vectorize)
    for found in (run(NEW), run(NEW, None), run(x=NEW), run(NEW, Y), run(x=NEW, y=Y)):
        assert found["y"].shape == (size, 5) and set(found.draws.sites) == {"y"}
        check_moments(found["y"], LOC * NEW, variance)
    assert run(NEW).log_p is None and "mean log_p" in str(found)
    check(found, dist.Normal(LOC * NEW, variance.sqrt()).log_prob(Y))
    assert found.plates == ("data",)


def test_predictive_draws_without_data() -> None:
    draws = posterior_draws(regression, slope_guide, TRAINING, TRAINING, num_draws=S)
    new = predictive_draws(regression, draws, NEW)
    assert set(new.sites) == {"y"}
    check_moments(new["y"], LOC * NEW, (SCALE * NEW) ** 2 + 0.25)


@pytest.mark.parametrize("size", [400, pytest.param(S, marks=pytest.mark.slow)])
def test_a_model_written_for_one_sample(size: int) -> None:
    """A product of matrices does not run under one more plate; a mask and a scale are around it."""
    inputs, loc = torch.stack([NEW, Y, NEW * Y], -1), torch.tensor([0.3, -0.2, 0.1])

    def model(x: Tensor, y: Tensor | None = None) -> None:
        b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)), poutine.mask(mask=SEEN), poutine.scale(scale=3.0):
            pyro.sample("y", dist.Normal(x @ b, 0.5), obs=y)

    def guide(x: Tensor, y: Tensor | None = None) -> None:
        pyro.sample("b", dist.Normal(loc, SCALE).to_event(1))

    variance = SCALE**2 * inputs.square().sum(-1) + 0.25
    exact = dist.Normal(inputs @ loc, variance.sqrt()).log_prob(Y).where(SEEN, 0.0)
    found = predict(model, guide, inputs, Y, num_draws=size)
    check(found, exact)
    check_moments(found["y"], inputs @ loc, variance)


# --- Hierarchies: one latent a row, below a global one


def hierarchy(x: Tensor, y: Tensor | None = None) -> None:
    g = pyro.sample("g", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(g, 1.5))
        pyro.sample("y", dist.Normal(z + x, 0.3), obs=y)


def encoded(x: Tensor, y: Tensor | None = None) -> None:
    """Local latents that are off, by an encoder of the data where there are any."""
    pyro.sample("g", dist.Normal(LOC, SCALE))
    with pyro.plate("data", len(x)):
        loc = 0.1 * x if y is None else 0.2 + 0.8 * (y - x)
        pyro.sample("z", dist.Normal(loc, 0.6))


def upwards(x: Tensor, y: Tensor) -> None:
    """The global latent after the local ones, and dependent on them in the guide."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.5 * (y - x), 0.8))
    spread = (z - 0.5 * (y - x)).sum(-1) / len(x) ** 0.5  # N(0, 0.8)
    pyro.sample("g", dist.Normal(LOC + 0.25 * spread, (SCALE**2 - 0.2**2) ** 0.5))


def amortized(make: Callable = lambda guide: guide, **options: Any) -> Any:
    inputs = lambda x, y=None: torch.stack([x, x if y is None else y], -1)  # noqa: E731
    guide = AmortizedGuide(hierarchy, nn.Linear(2, 2), inputs=inputs, **options)
    guide.prepare(TRAINING, TRAINING)
    set_global(guide)
    return make(guide)


def set_global(guide: Any) -> None:
    with torch.no_grad():
        guide.free_global.copy_(torch.tensor([LOC, torch.tensor(SCALE).log()]))


def table_of_rows() -> Any:
    guide = AmortizedGuide(hierarchy, plate="data")
    guide.prepare(NEW, Y)  # as many rows as the new ones, which they are not
    set_global(guide)
    return guide


HIERARCHIES: dict[str, Callable[[], Any]] = {
    "by_hand": lambda: encoded,
    "upwards": lambda: upwards,
    "auto": lambda: auto(autoguide.AutoNormal, hierarchy, g=torch.tensor(LOC)),
    "auto_joint": lambda: auto(autoguide.AutoDiagonalNormal, hierarchy, g=torch.tensor(LOC)),
    "amortized": amortized,
    "refined": lambda: SemiAmortizedGuide(hierarchy, amortized(), steps=2),
    "table": table_of_rows,
    "draws": lambda: posterior_draws(hierarchy, encoded, TRAINING, TRAINING, num_draws=S),
}
VARIANCE = SCALE**2 + 1.5**2 + 0.3**2


@pytest.mark.parametrize("kind", HIERARCHIES)
def test_hierarchy(kind: str) -> None:
    """y ~ N(loc + x, VARIANCE): local latents are new ones, whatever the guide has for them."""
    guide, exact = HIERARCHIES[kind](), dist.Normal(LOC + NEW, VARIANCE**0.5).log_prob(Y)
    found = predict(hierarchy, guide, NEW, Y, num_draws=S, chunk_size=1500)
    check_moments(found["y"], LOC + NEW, VARIANCE)
    check(found, exact)
    if kind in ("by_hand", "amortized"):  # the guide's draws, too
        prior = predict(hierarchy, posterior_draws(hierarchy, guide, NEW, Y, num_draws=S), NEW, Y)
        assert found.standard_error.mean() < 0.9 * prior.standard_error.mean()
    if kind not in ("upwards", "draws", "refined"):
        check_moments(predict(hierarchy, guide, NEW, num_draws=S)["y"], LOC + NEW, VARIANCE)


@pytest.mark.slow
def test_hierarchy_one_by_one() -> None:
    exact = dist.Normal(LOC + NEW, VARIANCE**0.5).log_prob(Y)
    check(predict(hierarchy, encoded, NEW, Y, num_draws=400, vectorize_particles=False), exact)


def test_a_guide_that_cannot_run_on_new_rows() -> None:
    """One joint distribution of all training rows has one of the global latents: it can."""

    def guide(x: Tensor, y: Tensor) -> None:
        pyro.sample("g", dist.Normal(LOC + 0 * (y - TRAINING).sum(), SCALE))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(y - TRAINING, 0.1))

    joint = AmortizedGuide(hierarchy)
    joint.prepare(TRAINING, TRAINING)
    joint.restart(joint.groups[0], torch.full((8,), LOC), SCALE)
    exact = dist.Normal(LOC + NEW, VARIANCE**0.5).log_prob(Y)
    with pytest.raises((RuntimeError, ValueError)) as caught:
        predict(hierarchy, guide, NEW, Y)
    assert "pass posterior_draws(model, guide, *training_data)" in caught.value.__notes__[-1]
    check(predict(hierarchy, joint, NEW, Y, num_draws=S), exact)
    for program in (guide, joint):
        draws = posterior_draws(hierarchy, program, TRAINING, TRAINING, num_draws=S)
        check(predict(hierarchy, draws, NEW, Y), exact)


# --- Rows of several sites, masks, scales, loops


def two_sites(x: Tensor, y: Tensor | None = None) -> None:
    """Two data and a factor, of one latent a row."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)
        pyro.sample("y", dist.Normal(z, 0.8), obs=y)
        pyro.factor("also", dist.Normal(z, 2.0).log_prob(torch.tensor(0.3)))


def joint_normal(scales: list[float], data: list[Tensor]) -> Tensor:
    """Return log p of data with independent noise around one z ~ N(0, 1)."""
    covariance = torch.ones(len(scales), len(scales)) + torch.tensor(scales).square().diag()
    return dist.MultivariateNormal(torch.zeros(len(scales)), covariance).log_prob(
        torch.stack(torch.broadcast_tensors(*data), -1)
    )


def two_sites_guide(x: Tensor, y: Tensor | None = None) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.6 * x, 0.5))


def test_all_data_of_a_row_make_one_score() -> None:
    exact = joint_normal([0.5, 0.8, 2.0], [NEW, Y, torch.tensor(0.3)])
    check(predict(two_sites, two_sites_guide, NEW, Y, num_draws=S), exact)
    check(predict(two_sites, prior_of(two_sites), NEW, Y, num_draws=S), exact)


def exact_local(x: Tensor, y: Tensor | None = None) -> None:
    """p(z | x, the factor), for y that is missing."""
    precision = 1 + 4 + 1 / 4
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal((4 * x + 0.3 / 4) / precision, precision**-0.5))


def test_missing_data_are_drawn_given_the_others() -> None:
    found = predict(two_sites, exact_local, NEW, num_draws=S)
    assert set(found.draws.sites) == {"y"}
    precision = 1 + 4 + 1 / 4
    check_moments(found["y"], (4 * NEW + 0.3 / 4) / precision, 1 / precision + 0.64)
    check(found, joint_normal([0.5, 2.0], [NEW, torch.tensor(0.3)]))
    with pytest.raises(
        ValueError, match=r"\['y'\] .* given \['also', 'x'\].*distribution of \['z'"
    ):
        predict(two_sites, fixed(autoguide.AutoNormal(two_sites)), NEW)


def test_masks_leave_out_and_scales_do_not_count() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=0.1):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 0.5), obs=x)
            with poutine.mask(mask=SEEN):
                pyro.sample("y", dist.Normal(z, 0.8), obs=y)

    both = joint_normal([0.5, 0.8], [NEW, Y])
    exact = torch.where(SEEN, both, joint_normal([0.5], [NEW]))
    found = predict(model, two_sites_guide, NEW, Y.where(SEEN, 1e6), num_draws=S)
    check(found, exact)
    assert (found["y"].abs() < 10).all()


def test_masked_latents_and_a_factor_of_the_prior() -> None:
    """A row without data has density 1; a penalty on a global latent is no datum."""

    def model(x: Tensor, y: Tensor | None = None) -> None:
        g = pyro.sample("g", dist.Normal(0.0, 1.0))
        pyro.factor("penalty", -(g**2))
        with pyro.plate("data", len(x)), poutine.mask(mask=SEEN):
            z = pyro.sample("z", dist.Normal(g, 1.5))
            pyro.sample("y", dist.Normal(z + x, 0.3), obs=y)

    def guide(x: Tensor, y: Tensor | None = None) -> None:
        pyro.sample("g", dist.Normal(LOC, SCALE))
        with pyro.plate("data", len(x)), poutine.mask(mask=SEEN):
            pyro.sample("z", dist.Normal(0.1 * x if y is None else y - x, 0.6))

    exact = dist.Normal(LOC + NEW, VARIANCE**0.5).log_prob(Y).where(SEEN, 0.0)
    check(predict(model, guide, NEW, Y, num_draws=S), exact)
    check_moments(predict(model, guide, NEW, num_draws=S)["y"], LOC + NEW, VARIANCE)


def test_loops_and_data_without_a_plate() -> None:
    def loop(x: Tensor, y: Tensor) -> None:
        for i in pyro.plate("data", len(x)):
            z = pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))
            pyro.sample(f"y{i}", dist.Normal(z, 0.8), obs=y[i])

    found = predict(loop, prior_of(loop), NEW, Y, num_draws=S)
    check(found, joint_normal([0.8], [Y]))

    def whole(y: Tensor | None = None) -> None:
        g = pyro.sample("g", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(g[..., None] * torch.ones(3), 0.8).to_event(1), obs=y)

    found = predict(whole, prior_of(whole), Y[:3], num_draws=S)
    check(found, joint_normal([0.8] * 3, list(Y[:3])))
    guide = lambda: pyro.sample("g", dist.Normal(LOC, SCALE))  # noqa: E731
    found = predict(whole, guide, num_draws=S)
    check_moments(found["y"], torch.full((3,), LOC), SCALE**2 + 0.64)


def groups(y: Tensor) -> None:
    g = pyro.sample("g", dist.Normal(0.0, 1.0))
    with pyro.plate("group", y.shape[0], dim=-2):
        b = pyro.sample("b", dist.Normal(g, 0.7))
        with pyro.plate("item", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(b, 0.5), obs=y)


def groups_guide(y: Tensor) -> None:
    pyro.sample("g", dist.Normal(LOC, SCALE))
    with pyro.plate("group", 2, dim=-2):
        pyro.sample("b", dist.Normal(torch.tensor([[0.3], [0.9]]), 0.2))


def test_plates_of_new_groups_and_of_new_items() -> None:
    y = torch.stack([Y[:3], NEW[:3]])
    with pytest.raises(ValueError, match=r"'b' is in plates \['group'\].*Pass plate='group' if"):
        predict(groups, groups_guide, y)
    found = predict(groups, groups_guide, y, plate="group", num_draws=S)
    covariance = SCALE**2 + 0.49 + 0.25 * torch.eye(3)
    check(found, dist.MultivariateNormal(torch.full((3,), LOC), covariance).log_prob(y))
    assert found.plates == ("group",)
    found = predict(groups, groups_guide, y, plate="item", num_draws=S)
    loc = torch.tensor([[0.3], [0.9]])
    check(found, dist.Normal(loc, (0.04 + 0.25) ** 0.5).log_prob(y))
    check_moments(found["y"], loc.expand(2, 3), 0.29)
    with pytest.raises(ValueError, match=r"No data are in plate 'b', only in \['group', 'item'\]"):
        predict(groups, groups_guide, y, plate="b")


# --- Other guides; refusals


def local_only(x: Tensor, y: Tensor | None = None) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 0.8), obs=y)


def encoded_rows(make: Callable, width: int) -> Any:
    inputs = lambda x, y=None: x[:, None]  # noqa: E731
    return make(local_only, encoder=nn.Linear(1, width), inputs=inputs)


def mixture_of_encoders() -> Any:
    return MixtureGuide(local_only, [encoded_rows(AmortizedGuide, 2) for _ in range(2)])


OTHERS: dict[str, Callable[[], Any]] = {
    "mixture": mixture_of_encoders,
    "flow": lambda: encoded_rows(FlowGuide, 3),
    "messenger": lambda: autoguide.AutoNormalMessenger(local_only),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_guides(kind: str) -> None:
    guide = OTHERS[kind]()
    guide(NEW, Y)
    check(predict(local_only, guide, NEW, Y, num_draws=S), joint_normal([0.8], [Y]))


def test_auxiliary_draws_of_the_guide() -> None:
    """The guide's density of z is that given the auxiliary draw, whose own density cancels."""

    def guide(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 0.01), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(y / 1.64 + a, 0.6))

    check(predict(local_only, guide, NEW, Y, num_draws=S), joint_normal([0.8], [Y]))


def test_rows_that_depend_on_the_latents_of_others() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z + z.roll(1, -1), 1.0), obs=y)

    def guide(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(y / 2, 0.4))

    exact = dist.Normal(0.0, 3**0.5).log_prob(Y)
    check(predict(model, guide, NEW, Y, num_draws=S), exact)


@pytest.mark.parametrize("enumerated", [False, True])
def test_discrete_latents_of_a_row(enumerated: bool) -> None:
    """A choice between two means, by a guide that is off, or summed over in training."""
    infer = {"enumerate": "parallel"} if enumerated else {}

    def model(x: Tensor, y: Tensor | None = None) -> None:
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.3), infer=infer)
            pyro.sample("y", dist.Normal(2 * k + shift, 0.8), obs=y)

    def guide(x: Tensor, y: Tensor | None = None) -> None:
        pyro.sample("shift", dist.Normal(0.2, 0.6))
        with pyro.plate("data", len(x)):
            if not enumerated:
                pyro.sample("k", dist.Bernoulli(0.6))

    scale = (0.6**2 + 0.8**2) ** 0.5
    means = dist.Normal(torch.tensor([0.2, 2.2]), scale).log_prob(Y[:, None]).exp()
    found = predict(model, guide, NEW, Y, num_draws=S)
    check(found, (means @ torch.tensor([0.7, 0.3])).log())
    for drawn in (found["y"], predict(model, guide, NEW, num_draws=S)["y"]):
        check_moments(drawn, torch.full((5,), 0.8), scale**2 + 4 * 0.21)


def test_what_has_no_prediction() -> None:
    def outside(x: Tensor, y: Tensor) -> None:
        regression(x, y)
        pyro.sample("also", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))

    with pytest.raises(
        ValueError, match=r"share no plate, \{'y': \['data'\], 'also': \[\]\}: pass"
    ):
        predict(outside, slope_guide, NEW, Y)
    check(
        predict(outside, slope_guide, NEW, Y, plate="data", num_draws=S),
        dist.Normal(LOC * NEW, ((SCALE * NEW) ** 2 + 0.25).sqrt()).log_prob(Y),
    )
    with pytest.raises(ValueError, match=r"no draws of \['slope'\], outside plates \['data'\]"):
        predict(regression, lambda x, y: None, NEW, Y)
    with pytest.raises(ValueError, match="Nothing to predict"):
        predict(slope_guide, slope_guide, NEW)
    with pytest.raises(ValueError, match="num_draws must be an integer >= 1"):
        predict(regression, slope_guide, NEW, num_draws=0)
