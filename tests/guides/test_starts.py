"""Where guides start: known points of priors, finite densities, components apart, encoders."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, initialization
from torch import Tensor, nn

from pyro_recursive import (
    IWAE_ELBO,
    MAPA_ELBO,
    AmortizedGuide,
    FlowGuide,
    MAPAGuide,
    MixtureGuide,
    RecursiveMixture_ELBO,
    RecursiveMixtureGuide,
    Schedule,
    SemiAmortizedGuide,
    gaps,
    log_marginal,
)
from pyro_recursive.evaluation import mixture_diversity, posterior_draws
from pyro_recursive.evaluation.model_runs import _fits_plate
from pyro_recursive.evaluation.search import Search
from pyro_recursive.guides.gaussian_families import Diagonal, Full, LowRank
from tests.models import small


def start_of(model: Callable, *args: Any, **options: Any) -> Tensor:
    """Return the locations that a guide of free Gaussians starts from."""
    guide = AmortizedGuide(model, **options)
    guide.prepare(*args)
    params = guide.free_global.detach()
    torch.testing.assert_close(params[len(params) // 2 :].exp(), 0.1 + 0 * params[::2])
    return params[: len(params) // 2]


# --- The default

IDENTITY = [0.0] * 3
CENTERS: dict[str, tuple[Callable[[], Any], list[float]]] = {
    "normal": (lambda: dist.Normal(3.0, 2.0), [3.0]),
    "normal batch": (lambda: dist.Normal(torch.tensor([1.0, -5.0]), 1e3).to_event(1), [1.0, -5.0]),
    "cauchy": (lambda: dist.Cauchy(-4.0, 2.0), [-4.0]),
    "student without a mean": (lambda: dist.StudentT(1.0, 7.0, 2.0), [7.0]),
    "multivariate": (
        lambda: dist.MultivariateNormal(torch.tensor([2.0, 1.0]), torch.eye(2)),
        [2.0, 1.0],
    ),
    # The mean, e^50, is five standard deviations away.
    "log-normal": (lambda: dist.LogNormal(1.0, 10.0), [1.0]),
    "half-cauchy": (lambda: dist.HalfCauchy(5.0), [math.log(5.0)]),
    "pareto without a mean": (lambda: dist.Pareto(1.0, 0.5), [math.log(4.0 - 1.0)]),
    "gamma": (lambda: dist.Gamma(2.0, 0.5), [math.log(4.0)]),
    "sparse gamma": (lambda: dist.Gamma(0.001, 0.001), [0.0]),
    "inverse gamma without a mean": (lambda: dist.InverseGamma(0.01, 0.01), [0.0]),
    "beta": (lambda: dist.Beta(2.0, 6.0), [-math.log(3.0)]),
    "uniform": (lambda: dist.Uniform(-1.0, 3.0), [0.0]),
    "sparse dirichlet": (lambda: dist.Dirichlet(torch.full((4,), 0.01)), IDENTITY),
    "correlations": (lambda: dist.LKJCholesky(3, 0.5), IDENTITY),
    "flat": (lambda: dist.ImproperUniform(constraints.real, (), (2,)), [0.0, 0.0]),
    "flat positive": (
        lambda: dist.ImproperUniform(constraints.positive, (3,), ()).to_event(1),
        IDENTITY,
    ),
    "flat simplex": (lambda: dist.ImproperUniform(constraints.simplex, (), (4,)), IDENTITY),
}


@pytest.mark.parametrize("name", CENTERS)
def test_the_default_is_a_point_of_the_prior_without_a_draw(name: str) -> None:
    prior, expected = CENTERS[name]
    before = torch.get_rng_state()
    found = start_of(lambda: pyro.sample("z", prior()))
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=1e-6)
    assert torch.equal(torch.get_rng_state(), before)


def test_later_sites_see_the_start_of_earlier_ones() -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Gamma(6.0, 2.0))
        b = pyro.sample("b", dist.Normal(10.0 * a, 1.0))
        pyro.sample("c", dist.LogNormal(b, a))

    torch.testing.assert_close(start_of(model), torch.tensor([math.log(3.0), 30.0, 30.0]))


# --- A user's function


def several() -> None:
    pyro.sample("loc", dist.Normal(2.0, 3.0))
    scale = pyro.sample("scale", dist.Gamma(3.0, 1.5))
    with pyro.plate("two", 2):
        pyro.sample("share", dist.Beta(1.0, 3.0))
    pyro.sample("simplex", dist.Dirichlet(torch.tensor([1.0, 2.0, 5.0])))
    pyro.sample("x", dist.Normal(0.0, scale), obs=torch.tensor(1.0))


VALUES = {"loc": torch.tensor(-1.0), "share": torch.tensor([0.2, 0.9])}
FUNCTIONS = {
    "value": initialization.init_to_value(values=VALUES, fallback=initialization.init_to_mean),
    "mean": initialization.init_to_mean,
    "feasible": initialization.init_to_feasible,
    "median": initialization.init_to_median(num_samples=3),
    "sample": initialization.init_to_sample,
    "uniform": initialization.init_to_uniform(radius=0.5),
    "own": lambda site: site["fn"].mean * 1.01 if site["name"] == "loc" else site["fn"].mean,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_pyro_mean_what_they_mean_there(name: str) -> None:
    pyro.set_rng_seed(3)
    theirs = AutoDiagonalNormal(several, init_loc_fn=FUNCTIONS[name])
    theirs._setup_prototype()
    pyro.set_rng_seed(3)
    found = start_of(several, init_loc_fn=FUNCTIONS[name])
    torch.testing.assert_close(found, theirs.loc.detach())


# --- Names of strategies, and values by name


def awkward() -> None:
    """Priors that cannot be drawn from, have no mean, or a bound that is another latent."""
    pyro.sample("flat", dist.ImproperUniform(constraints.real, (), (2,)))
    pyro.sample("flat_positive", dist.ImproperUniform(constraints.positive, (), ()))
    a = pyro.sample("a", dist.Uniform(0.0, 1.0))
    limits = constraints.interval(torch.zeros(()), 1 - a)
    pyro.sample("b", dist.ImproperUniform(limits, (), ()))
    scale = pyro.sample("scale", dist.HalfCauchy(5.0))
    pyro.sample("factor", dist.LKJCholesky(3, 2.0))
    pyro.sample("sparse", dist.Dirichlet(torch.full((4,), 0.05)))
    pyro.sample("x", dist.Normal(0.0, scale), obs=torch.tensor(1.0))


@pytest.mark.parametrize("name", ["feasible", "mean", "median", "sample", "uniform"])
def test_names_of_strategies_serve_all_priors(name: str) -> None:
    found = start_of(awkward, init_loc_fn=name)
    assert bool(found.isfinite().all())
    if name == "feasible":
        torch.testing.assert_close(found, torch.zeros(12))


def test_names_and_values_mean_what_they_mean_in_pyro() -> None:
    for name in ("mean", "median", "sample"):
        pyro.set_rng_seed(3)
        theirs = start_of(several, init_loc_fn=getattr(initialization, f"init_to_{name}"))
        pyro.set_rng_seed(3)
        torch.testing.assert_close(start_of(several, init_loc_fn=name, name=name), theirs)
    found = start_of(several, init_loc_fn=VALUES, name="values")
    torch.testing.assert_close(found[:1], torch.tensor([-1.0]))
    torch.testing.assert_close(found[2:4], torch.tensor([0.2, 0.9]).logit())
    with pytest.raises(ValueError, match="init_loc_fn must be a function"):
        AmortizedGuide(several, init_loc_fn="average")


@pytest.mark.parametrize("kind", [AmortizedGuide, MixtureGuide, FlowGuide])
def test_pathfinder_starts_near_the_posterior(kind: Any) -> None:
    """Its mode is far out in the tail of the prior."""
    options = {"components": 2} if kind is MixtureGuide else {}

    def model() -> None:
        rate = pyro.sample("rate", dist.Gamma(1.0, 1e-4))
        pyro.sample("x", dist.Poisson(rate), obs=torch.tensor(1000.0))

    guide = kind(model, init_loc_fn="pathfinder", **options)
    guide.prepare()
    draws = posterior_draws(model, guide, num_draws=100)["rate"]
    assert draws.log().mean().item() == pytest.approx(math.log(1000.0), abs=0.3)


def test_generated_values_are_new_in_each_guide() -> None:
    def generate() -> Any:
        return initialization.init_to_value(
            values={"loc": torch.randn(())}, fallback=initialization.init_to_mean
        )

    init = initialization.init_to_generated(generate=generate)
    one, other = (start_of(several, init_loc_fn=init, name=name) for name in "ab")
    assert one[0] != other[0] and torch.equal(one[1:], other[1:])


def test_what_a_function_cannot_give_is_the_default() -> None:
    def model() -> None:
        pyro.sample("flat", dist.ImproperUniform(constraints.interval(0.0, 4.0), (), ()))
        pyro.sample("scale", dist.HalfCauchy(3.0))  # Pyro's mean is infinite

    for init in (initialization.init_to_mean, initialization.init_to_median(num_samples=5)):
        found = start_of(model, init_loc_fn=init, name=f"{init}")
        assert found[0] == 0.0 and found[1].isfinite()
    torch.testing.assert_close(
        start_of(model, init_loc_fn=initialization.init_to_mean), torch.tensor([0, math.log(3.0)])
    )


def test_a_value_of_another_shape_is_refused() -> None:
    init = initialization.init_to_value(values={"share": torch.ones(3) / 3})
    with pytest.raises(RuntimeError, match=r"shape \(3,\) at site 'share', which needs \(2,\)"):
        start_of(several, init_loc_fn=init)
    same = initialization.init_to_value(values={"share": torch.tensor(0.5)})
    assert start_of(several, init_loc_fn=same)[2:4].eq(0).all()


BOUNDARY: dict[str, tuple[Callable[[], Any], list[float]]] = {
    "zero": (lambda: dist.Beta(2.0, 6.0), [0.0]),
    "one": (lambda: dist.Beta(2.0, 6.0), [1.0]),
    "beyond": (lambda: dist.Beta(2.0, 6.0), [1.2]),
    "upper": (lambda: dist.Uniform(-1.0, 3.0), [3.0]),
    "negative": (lambda: dist.Gamma(2.0, 0.5), [-1.0]),
    "lower": (lambda: dist.Pareto(2.0, 1.0), [2.0]),
    "simplex": (lambda: dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])), [0.0, 0.4, 0.6]),
    "one of two": (lambda: dist.Beta(torch.ones(2), 2.0).to_event(1), [0.5, 1.0]),
}


@pytest.mark.parametrize("name", BOUNDARY)
def test_a_value_on_the_boundary_is_named_and_replaced(name: str) -> None:
    prior, value = BOUNDARY[name]
    init = initialization.init_to_value(values={"p": torch.tensor(value).squeeze(0)})

    def model() -> None:
        pyro.sample("p", prior())

    with pytest.warns(UserWarning, match=r"init_loc_fn puts site 'p' on a bound .* give values"):
        found = start_of(model, init_loc_fn=init)
    torch.testing.assert_close(found, start_of(model, name="default"))


# --- A finite density


def test_a_density_that_is_zero_at_the_center_has_another_start() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("outside", torch.where((z > 0.02).all(-1), 0.0, -math.inf))

    assert (start_of(model) > 0.02).all()


def test_a_gradient_that_is_not_finite_at_the_center_has_another_start() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("norm", z.square().sum(-1).sqrt())  # with the derivative 0 / 0

    found = start_of(model)
    assert 0 < found.abs().max() < 0.5


def test_a_scale_that_is_zero_at_the_center_has_another_start() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(0.0, z), obs=torch.tensor(1.0))

    assert start_of(model) > 0


def test_a_matrix_that_is_not_positive_definite_at_the_center_has_another_start() -> None:
    def model() -> None:
        z = 1 + pyro.sample("z", dist.Normal(0.0, 1.0))
        factor = torch.linalg.cholesky(torch.stack([1 + 0 * z, z, z, 1 + 0 * z]).view(2, 2))
        normal = dist.MultivariateNormal(torch.zeros(2), scale_tril=factor)
        pyro.sample("x", normal, obs=torch.ones(2))

    assert -2 < start_of(model) < 0
    guide = MixtureGuide(model, 4)
    guide.prepare()
    assert all(-2 < component.free_global[0] < 0 for component in guide.components)


def test_an_overflow_at_the_center_has_another_start() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(900.0, 900.0))
        pyro.sample("x", dist.Poisson(z.exp()), obs=torch.tensor(3.0))

    assert start_of(model) < 10


def test_no_start_names_the_first_site_without_a_density() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("w", dist.Normal(z, 1.0))
        pyro.factor("wrong", z + math.inf)
        pyro.factor("later", z - math.inf)

    guide = AmortizedGuide(model)
    with pytest.raises(ValueError, match=r"Site 'wrong' has log_prob inf at each of 100 starts"):
        guide()
    assert not guide.groups and not list(guide.parameters())


def test_values_that_are_not_finite_are_named() -> None:
    x = torch.tensor([0.3, math.nan, 1.0])
    with pytest.raises(ValueError, match=r"Site 'x' observes values that are NaN or infinite: 1"):
        AmortizedGuide(small.normal_rows)(x)


# --- Components


def wide(x: Tensor) -> None:
    """Two modes at +- 2 in each row, and a global latent."""
    a = pyro.sample("a", dist.Gamma(2.0, 0.5))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1000.0))
        pyro.sample("x", dist.Normal(z**2, a), obs=x)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_components_start_apart_around_one_point(count: int) -> None:
    guide = MixtureGuide(wide, count, plate="data", init_scale=0.3)
    guide.prepare(torch.full((5,), 4.0))
    for name, center in (("free_global", math.log(4.0)), ("free_local", 0.0)):
        params = torch.stack([getattr(c, name).detach() for c in guide.components])
        loc, log_scale = params.chunk(2, -1)
        torch.testing.assert_close(log_scale.exp(), torch.full_like(loc, 0.3))
        steps = loc - center
        pairs = count // 2
        torch.testing.assert_close(steps[: 2 * pairs : 2], -steps[1 : 2 * pairs : 2])
        sizes = steps.abs().flatten(1)
        assert sizes.min() >= 0.5 and sizes.max() < 1.5
        assert torch.pdist(loc.flatten(1)).min() > 0.6


@pytest.mark.parametrize("size", [1, 8, 27])
def test_components_of_many_latents_start_nearer_in_each(size: int) -> None:
    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(size), 1.0).to_event(1))

    guide = MixtureGuide(model, 2)
    guide.prepare()
    loc = guide.components[0].free_global[:size].detach()
    torch.testing.assert_close(loc.abs(), torch.full((size,), size ** (-1 / 3)))


def test_components_stay_where_their_own_functions_put_them() -> None:
    def at(value: float) -> Any:
        return initialization.init_to_value(values={"z": torch.tensor(value)})

    model = small.normal_global
    parts = [AmortizedGuide(model, init_loc_fn=at(-2.0)), FlowGuide(model, init_loc_fn=at(5.0))]
    guide = MixtureGuide(model, [*parts, AmortizedGuide(model)], init_loc_fn=at(9.0))
    guide.prepare(torch.randn(3))
    assert parts[0].free_global[0] == -2.0 and parts[1].flow_global.bias[0] == 5.0
    assert 0.4 < abs(guide.components[2].free_global[0] - 9.0) < 1.5


def test_components_start_where_the_density_is_finite() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(6), 1.0).to_event(1))
        pyro.factor("inside", torch.where(z.abs().amax(-1) < 0.5, 0.0, -math.inf))

    guide = MixtureGuide(model, 4)
    guide.prepare()
    locs = torch.stack([c.free_global[:6].detach() for c in guide.components])
    assert locs.abs().max() < 0.5 and torch.pdist(locs).min() > 1e-3


def test_the_first_component_of_a_growing_mixture_starts_at_the_center() -> None:
    guide = RecursiveMixtureGuide(several, 3)
    guide.prepare()
    assert torch.equal(guide.components[0].free_global[:6].detach(), start_of(several))
    assert (guide.components[1].free_global[:6] - start_of(several)).abs().min() > 0.4


def test_guides_of_a_guide_take_its_start() -> None:
    init, x = initialization.init_to_value(values={"z": torch.tensor(3.0)}), torch.randn(4)
    base = AmortizedGuide(small.normal_rows, plate="data", init_loc_fn=init)
    SemiAmortizedGuide(small.normal_rows, base).prepare(x)
    assert base.free_local[:, 0].eq(3.0).all()

    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(w * z, 1.0).to_event(1), obs=x)

    at_two = initialization.init_to_value(values={"w": torch.tensor(2.5)})
    guide = MAPAGuide(model, nn.Linear(1, 1), torch.randn(9, 1), init_loc_fn=at_two, init_scale=0.2)
    guide.prepare(torch.randn(4, 1))
    torch.testing.assert_close(guide.rest.free_global, torch.tensor([2.5, 0.2]).log())


# --- Encoders


def counts(x: Tensor) -> None:
    """Rates around 1000, so that the start is log 1000."""
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(50.0, 0.05))
        pyro.sample("x", dist.Poisson(rate), obs=x[:, 0])


class Heads(nn.Module):
    """A trunk with a layer of its own for the locations."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(1, 4), nn.Tanh())
        self.scale, self.loc = nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.trunk(x / 1000)
        return torch.cat([self.loc(hidden), self.scale(hidden)], -1)


class Scaled(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / 1000)


def linear() -> nn.Module:
    return Scaled(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 2))


ENCODERS: dict[str, Callable[[], nn.Module]] = {"linear": linear, "heads": Heads}


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_new_encoder_starts_around_the_start_of_the_prior(kind: str) -> None:
    x, encoder = (1000.0 + 30 * torch.randn(20, 1)).round(), ENCODERS[kind]()
    before, keys = encoder(x).detach(), list(encoder.state_dict())
    guide = AmortizedGuide(counts, encoder)
    guide.prepare(x)
    after = encoder(x).detach()
    torch.testing.assert_close(after[:, 0], before[:, 0] + math.log(1000.0))
    assert torch.equal(after[:, 1], before[:, 1])
    assert list(encoder.state_dict()) == keys and encoder.training
    # Once is enough, for whatever guide.
    MixtureGuide(counts, [AmortizedGuide(counts, encoder)]).prepare(x)
    SemiAmortizedGuide(counts, AmortizedGuide(counts, encoder)).prepare(x[:3])
    assert torch.equal(encoder(x), after)


def poisson_curves(intercept: Any, slope: Any) -> Any:
    return dist.Poisson((intercept + slope * torch.arange(5.0)).exp())


def curves(x: Tensor) -> None:
    """Poisson counts on exponential curves: the rates of wide draws are huge."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.tensor([1.0, 0.3]), 0.5).to_event(1))
        pyro.sample("x", poisson_curves(z[..., :1], z[..., 1:]).to_event(1), obs=x)


class FixedScales(nn.Module):
    """Locations of a linear layer, and log-scales that no layer can move."""

    def __init__(self, log_scale: float) -> None:
        super().__init__()
        self.loc, self.log_scale = nn.Linear(5, 2), log_scale

    def forward(self, x: Tensor) -> Tensor:
        loc = self.loc((x + 0.5).log() / 5)
        return torch.cat([loc, torch.full_like(loc, self.log_scale)], -1)


@pytest.mark.parametrize(("log_scale", "is_moved"), [(0.0, False), (math.log(0.1), True)])
def test_the_move_is_judged_by_draws(log_scale: float, is_moved: bool) -> None:
    """At the start the density is higher, but draws of scale 1 around it have a lower ELBO."""
    x, encoder = poisson_curves(1.0, 0.3).sample((50,)), FixedScales(log_scale)
    before = encoder.loc.bias.detach().clone()
    guide = AmortizedGuide(curves, encoder)
    guide.prepare(x)
    start = torch.tensor([1.0, 0.3]) if is_moved else torch.zeros(2)
    torch.testing.assert_close(encoder.loc.bias.detach(), before + start)


@pytest.mark.parametrize("family", [Diagonal(), Full(), LowRank(1)])
def test_scales_are_halved_where_wide_draws_are_worse_at_the_start(family: Any) -> None:
    x = poisson_curves(1.0, 0.3).sample((50,))
    encoder = Scaled(nn.Linear(5, family.num_parameters(2)))
    guide, before = AmortizedGuide(curves, encoder, family=family), encoder(x).detach()
    guide.prepare(x)
    expected = torch.zeros(family.num_parameters(2))
    expected[:4] = torch.tensor([1.0, 0.3, -math.log(2.0), -math.log(2.0)])
    torch.testing.assert_close(encoder(x).detach(), before + expected)


def trained() -> nn.Module:
    encoder = linear()
    encoder[-1].bias.data = torch.tensor([5.0, -2.0])  # not at the prior's mean
    return encoder


UNMOVED = {
    "trained": (trained, lambda guide: None),
    "frozen": (lambda: linear().requires_grad_(False), lambda guide: None),
    "evaluated": (linear, lambda guide: guide.eval()),
    "without a last layer": (lambda: Scaled(nn.Linear(1, 2), nn.Tanh()), lambda guide: None),
}


@pytest.mark.parametrize("kind", UNMOVED)
def test_encoders_that_stay_as_they_are(kind: str) -> None:
    x = (150.0 + 10 * torch.randn(20, 1)).round()
    encoder, then = UNMOVED[kind][0](), UNMOVED[kind][1]
    before = encoder(x).detach()
    guide = AmortizedGuide(counts, encoder)
    then(guide)
    guide.prepare(x)
    assert torch.equal(encoder(x), before)


def test_a_standard_prior_leaves_an_encoder_as_it_is() -> None:
    x, encoder = 100 * torch.randn(6, 1), nn.Linear(1, 2)
    before = encoder(x).detach()
    AmortizedGuide(small.normal_rows, encoder).prepare(x)
    assert torch.equal(encoder(x), before)


# --- Parameters that Pyro's store has by now


def mapa(x: Tensor) -> tuple[Any, Callable[[Any], Tensor]]:
    model = small.vector_rows
    guide = MAPAGuide(model, nn.Linear(3, 3), torch.randn(9, 3))
    return guide, lambda guide: guide.explain(x).log_q


def refined(x: Tensor) -> tuple[Any, Callable[[Any], Tensor]]:
    base = AmortizedGuide(small.vector_rows, nn.Linear(3, 6))
    guide = SemiAmortizedGuide(small.vector_rows, base, seed=1)
    return guide, lambda guide: guide.refine(x, steps=2).start


def mixture(x: Tensor) -> tuple[Any, Callable[[Any], Tensor]]:
    guide = MixtureGuide(small.vector_rows, 2, plate="data")
    return guide, lambda guide: guide.component_weights(x)


def gap(x: Tensor) -> tuple[Any, Callable[[Any], Tensor]]:
    guide = AmortizedGuide(small.vector_rows, nn.Linear(3, 6))
    options = {"num_particles": 100, "search": Search(steps=1)}
    return guide, lambda guide: gaps(small.vector_rows, guide, x, **options).elbo


def diverse(x: Tensor) -> tuple[Any, Callable[[Any], Tensor]]:
    guide = MixtureGuide(small.vector_rows, 2, plate="data")
    return guide, lambda guide: mixture_diversity(guide, x, num_draws=50).divergence


@pytest.mark.quick(3)
@pytest.mark.parametrize("make", [mapa, refined, mixture, gap, diverse])
def test_methods_use_a_store_that_was_loaded(make: Callable, tmp_path: Any) -> None:
    x = torch.randn(4, 3)
    guide, method = make(x)
    guide(x)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))

    def found() -> Tensor:
        pyro.set_rng_seed(5)
        return method(guide).detach().clone()

    expected = found()
    pyro.get_param_store().save(tmp_path / "store.pt")
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.sub_(0.7)
    assert not torch.allclose(found(), expected)
    pyro.get_param_store().load(tmp_path / "store.pt")
    torch.testing.assert_close(found(), expected)


@pytest.mark.parametrize("calls", [1, 2])
def test_a_store_that_is_loaded_after_a_call_counts(calls: int) -> None:
    guide, x = AmortizedGuide(small.vector_rows, nn.Linear(3, 6)), torch.randn(4, 3)
    for _ in range(calls):
        guide(x)
    store = pyro.get_param_store()
    state = copy.deepcopy(store.get_state())
    with torch.no_grad():
        guide.encoder.weight.add_(7.0)
    store.clear()
    store.set_state(state)
    guide(x)
    (name,) = (key for key in store if key.endswith("weight"))
    assert guide.encoder.weight is store[name] and guide.encoder.weight.abs().max() < 1


# --- Improper priors, with the exact posterior as guide


def flat(x: Tensor) -> None:
    """A flat mean of all rows, and a flat latent in each: their posteriors are normal."""
    real = dist.ImproperUniform(constraints.real, (), ())
    mean = pyro.sample("mean", real)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(mean, 0.5), obs=torch.arange(float(len(x))))
        z = pyro.sample("z", real)
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def exact_flat(x: Tensor) -> tuple[Any, float]:
    """Return the posterior as guide, and log p, where each x integrates to 1."""
    guide = AmortizedGuide(flat, plate="data", init_loc_fn=initialization.init_to_mean)
    guide.prepare(x)
    with torch.no_grad():
        guide.free_global.copy_(torch.tensor([1.5, math.log(0.25)]))
        guide.free_local.copy_(torch.stack([x, 0 * x], -1))
    density = dist.Normal(1.5, 0.5).log_prob(torch.arange(4.0)).sum()
    return guide, float(density) + math.log(0.25 * math.sqrt(2 * math.pi))


@pytest.mark.filterwarnings("ignore:Plate 'data' encloses")
@pytest.mark.parametrize("vectorize", [True, False])
def test_bounds_of_models_with_improper_priors_are_exact(vectorize: bool) -> None:
    x = torch.randn(4)
    guide, expected = exact_flat(x)
    options: dict[str, Any] = {"vectorize_particles": vectorize}
    for loss in (
        Trace_ELBO(5, max_plate_nesting=1, **options),
        IWAE_ELBO(5, **options),
        IWAE_ELBO(5, estimator="dreg", **options),
        IWAE_ELBO(5, global_latents="elbo", **options),
    ):
        assert loss.loss(flat, guide, x) == pytest.approx(-expected, abs=1e-9)
    found = log_marginal(flat, guide, x, num_particles=10)
    assert float(found.sum()) == pytest.approx(expected, abs=1e-9)
    draws = posterior_draws(flat, guide, x, num_draws=4000)
    torch.testing.assert_close(draws["z"].mean(0), x, atol=0.08, rtol=0.0)
    assert draws["mean"].std() == pytest.approx(0.25, rel=0.06)


@pytest.mark.slow
def test_a_growing_mixture_searches_beside_an_improper_prior() -> None:
    """Two modes under a flat prior: the second component finds the one that is missing."""

    def model() -> None:
        z = pyro.sample("z", dist.ImproperUniform(constraints.real, (), ()))
        pyro.sample("x", dist.Normal(z**2, 1.0), obs=torch.tensor(9.0))

    schedule = Schedule(first=100, propose=60, refine=60)
    guide = RecursiveMixtureGuide(model, 2, schedule=schedule)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), RecursiveMixture_ELBO(8))
    for _ in range(guide.num_steps):
        svi.step()
    locs = sorted(c.free_global[0].item() for c in guide.components)
    assert locs == pytest.approx([-3.0, 3.0], abs=0.2) and len(guide.members) == 2


def test_codes_beside_an_improper_prior() -> None:
    def model(x: Tensor) -> None:
        scale = pyro.sample("scale", dist.ImproperUniform(constraints.positive, (), ()))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(scale * z, 1.0).to_event(1), obs=x)

    guide = MAPAGuide(model, nn.Linear(1, 1), torch.randn(9, 1), init_scale=0.3)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), MAPA_ELBO())
    assert math.isfinite(svi.step(torch.randn(4, 1)))
    assert guide(torch.randn(3, 1))["scale"] > 0


@pytest.mark.parametrize("is_mixed", [False, True])
def test_improper_priors_have_a_value_for_each_sample(is_mixed: bool) -> None:
    """So that a sum over all samples in place of the event is found."""

    def model(x: Tensor) -> None:
        b = pyro.sample("b", dist.ImproperUniform(constraints.real, (), (2,)))
        total = b.sum() if is_mixed else b.sum(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(total, 1.0), obs=x)

    assert _fits_plate(model, (torch.randn(3),), {}) != is_mixed


def test_modules_keep_their_modes_and_statistics_in_the_first_call() -> None:
    norms = nn.BatchNorm1d(4), nn.BatchNorm1d(4).eval()
    encoder = nn.Sequential(nn.Linear(1, 4), *norms, nn.Linear(4, 2))
    x, before = torch.rand(8, 1).round(), copy.deepcopy(encoder.state_dict())
    AmortizedGuide(counts, encoder).prepare(x)
    assert [part.training for part in encoder] == [True, True, False, True]
    for norm, name in zip(norms, ("1.running_mean", "2.running_mean"), strict=True):
        assert torch.equal(norm.running_mean, before[name])
    guide = AmortizedGuide(counts, encoder, name="other").eval()
    guide.prepare(x)
    assert not any(part.training for part in guide.modules())
