"""Whitened coordinates: the same losses in other units, exact densities, kept with a guide."""

import copy
import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from pyro_recursive import (
    AmortizedGuide,
    CompiledSVI,
    FlowGuide,
    MixtureGuide,
    RecursiveMixture_ELBO,
    RecursiveMixtureGuide,
    Schedule,
    SemiAmortizedGuide,
    Stratified_ELBO,
    pathfinder,
)
from pyro_recursive.evaluation import posterior_draws
from pyro_recursive.guides.gaussian_families import Diagonal, Family, LowRank

D = 3
SHIFT, FACTOR = torch.tensor([0.4, -1.0, 2.0]), torch.eye(3) + 0.3 * torch.ones(3, 3).tril(-1)
SHIFT, FACTOR = SHIFT.double(), FACTOR.double() * torch.tensor([[0.5], [2.0], [3.0]])
PAIR = SHIFT, FACTOR


class Own(Family):
    """A user's family: normals, with logarithms of scales that are squared."""

    def num_parameters(self, size: int) -> int:
        return 2 * size

    def __call__(self, parameters: Tensor, size: int) -> Any:
        loc, root = parameters.split(size, -1)
        return dist.Normal(loc, root.square().exp()).to_event(1)


SCHEDULE = Schedule(first=6, propose=4, refine=4, joint=4, draws=64)
GUIDES: dict[str, Callable] = {
    "diagonal": AmortizedGuide,
    "full": partial(AmortizedGuide, family="full"),
    "low rank": partial(AmortizedGuide, family=LowRank(1)),
    "own": partial(AmortizedGuide, family=Own()),
    "flow": partial(FlowGuide, transforms=2, hidden=(8,)),
    "mixture": partial(MixtureGuide, components=2, family="full"),
    "recursive": partial(
        RecursiveMixtureGuide, paths=0, components=2, family="full", schedule=SCHEDULE
    ),
}


def made(kind: str, model: Callable, **options: Any) -> Any:
    """Build a guide whose parameters are not those of the start."""
    guide = GUIDES[kind](model, **options)
    guide.prepare()
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return guide


@torch.no_grad()
def density(guide: Any, values: dict[str, Tensor]) -> Tensor:
    """Return log q of values, each with n rows, as losses have it."""
    pyro.clear_param_store()
    with pyro.plate("points", len(next(iter(values.values())))):
        trace = poutine.trace(poutine.condition(guide, values)).get_trace()
    trace.compute_log_prob(lambda name, site: name in values)
    return sum(trace.nodes[name]["log_prob"] for name in values)


def loss_for(kind: str) -> Any:
    losses = {"mixture": Stratified_ELBO(2), "recursive": RecursiveMixture_ELBO(2)}
    return losses.get(kind, Trace_ELBO(2, vectorize_particles=True))


def banana(factor: Tensor, shift: Tensor) -> Callable:
    """Return a model over u = factor x + shift, whose posterior of x is no Gaussian."""

    def model() -> None:
        prior = dist.MultivariateNormal(shift, scale_tril=2 * factor)
        u = pyro.sample("u", prior)
        centred = (u - shift).unsqueeze(-1)
        x = torch.linalg.solve_triangular(factor, centred, upper=False).squeeze(-1)
        pyro.factor("data", -((x[..., 1] - x[..., 0] ** 2) ** 2) - (x[..., 2] - 1) ** 2)

    return model


def losses_of(kind: str, model: Callable, whiten: Any, svi: Any = SVI, steps: int = 20) -> Tensor:
    pyro.clear_param_store()
    pyro.set_rng_seed(4)
    guide = GUIDES[kind](model, whiten=whiten)
    svi = svi(model, guide, pyro.optim.Adam({"lr": 0.05}), loss_for(kind))
    return torch.tensor([svi.step() for _ in range(steps)])


@pytest.mark.filterwarnings("ignore:.*have no part in the mixture")
@pytest.mark.parametrize("kind", GUIDES)
def test_other_units_of_the_latents_change_no_loss(kind: str) -> None:
    """In u' = A u + b, with the buffers A loc + b and A L."""
    a = torch.tensor([[50.0, 0.0, 0.0], [-3.0, 0.2, 0.0], [7.0, 0.1, 1e-3]])
    b, one, zero = torch.tensor([3.0, -200.0, 0.1]), torch.eye(D), torch.zeros(D)
    plain = losses_of(kind, banana(one, zero), PAIR)
    moved = losses_of(kind, banana(a, b), (a @ SHIFT + b, a @ FACTOR))
    torch.testing.assert_close(moved, plain, rtol=1e-6, atol=1e-6)
    assert len(set(plain.tolist())) > 10
    if kind in ("diagonal", "full"):  # without whitening they do
        unwhitened = losses_of(kind, banana(a, b), False)
        assert (unwhitened - plain).abs().max() > 1.0


def gaussian(condition: float) -> tuple[Tensor, Tensor, Callable]:
    """Return mean and covariance of a Gaussian posterior, and its model, with log Z = 1.5."""
    basis = torch.linalg.qr(torch.randn(D, D)).Q
    covariance = basis @ torch.diag(torch.logspace(0, math.log10(condition), D)) @ basis.mT
    covariance = (covariance + covariance.mT) / 2
    mean = 10 * torch.randn(D)

    def model() -> None:
        pyro.sample("z", dist.MultivariateNormal(mean, covariance))
        pyro.factor("evidence", torch.tensor(1.5))

    return mean, covariance, model


@pytest.mark.parametrize("kind", ["diagonal", "full", "own", "flow", "recursive"])
def test_a_gaussian_posterior_is_the_start(kind: str) -> None:
    """Of condition 1e6: each single log-weight is log Z; `MixtureGuide` starts apart."""
    mean, covariance, model = gaussian(1e6)
    guide = GUIDES[kind](model, whiten=True)
    for _ in range(5):
        assert Trace_ELBO().loss(model, guide) == pytest.approx(-1.5, abs=1e-6)
    found = guide.whitening.scale_tril @ guide.whitening.scale_tril.mT
    scale = covariance.diagonal().sqrt()
    torch.testing.assert_close(found / scale / scale[:, None], covariance / scale / scale[:, None])
    torch.testing.assert_close(guide.whitening.loc, mean)


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_a_first_call_may_be_for_many_particles(context: Any) -> None:
    _, _, model = gaussian(1e6)
    guide = AmortizedGuide(model, whiten=True)
    loss = Trace_ELBO(100, vectorize_particles=True, max_plate_nesting=2)
    with context():
        assert loss.loss(model, guide) == pytest.approx(-1.5, abs=1e-6)


def test_the_gaussian_of_paths_whitens() -> None:
    _, _, model = gaussian(1e6)
    guide = AmortizedGuide(model, whiten=pathfinder(model, paths=2).gaussian)
    assert Trace_ELBO().loss(model, guide) == pytest.approx(-1.5, abs=1e-6)


def test_components_start_in_posterior_standard_deviations() -> None:
    _, _, model = gaussian(1e6)
    guide = MixtureGuide(model, 4, family="full", whiten=True)
    guide.prepare()
    locs = torch.stack([c.free_global[:D] for c in guide.components]).detach()
    expected = D ** (-1 / 3) * torch.tensor([2 / 3, 2 / 3, 4 / 3, 4 / 3])
    torch.testing.assert_close(locs.abs(), expected[:, None].expand(-1, D), rtol=1e-4, atol=0)
    assert all(not c.free_global[D:].any() for c in guide.components)


# --- Densities


def constrained() -> None:
    """A positive latent and one of the unit interval, whose bound depends on the first."""
    a = pyro.sample("a", dist.Gamma(2.0, 1.0))
    pyro.sample("b", dist.Uniform(0.0, a))


CORRELATED = torch.tensor([0.3, -0.4]), torch.tensor([[0.5, 0.0], [0.6, 0.4]])
CORRELATED = tuple(each.double() for each in CORRELATED)


@pytest.mark.parametrize("kind", GUIDES)
def test_densities_integrate_to_one(kind: str) -> None:
    """By quadrature over unconstrained values, with their Jacobians."""
    guide = made(kind, constrained, whiten=CORRELATED)
    edge = torch.linspace(-8.0, 9.0, 341)
    u = torch.cartesian_prod(edge, edge)
    a = u[:, 0].exp()
    b = a * u[:, 1].sigmoid()
    log_q = density(guide, {"a": a, "b": b})
    volume = a.log() + (a * u[:, 1].sigmoid() * (-u[:, 1]).sigmoid()).log()
    found = (log_q + volume).exp().sum() * (edge[1] - edge[0]) ** 2
    assert found.item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("kind", ["diagonal", "full", "low rank", "own"])
def test_gaussians_are_the_transformed_ones(kind: str) -> None:
    model = banana(torch.eye(D), torch.zeros(D))
    guide = made(kind, model, whiten=PAIR)
    inner = guide.posterior(guide.groups[0], guide.new_call((), {}))
    root = FACTOR @ (inner.stddev.diag_embed() if kind in ("diagonal", "own") else inner.scale_tril)
    normal = dist.MultivariateNormal(SHIFT + FACTOR @ inner.mean, root @ root.mT)
    for u in 3 * torch.randn(4, D):
        found = density(guide, {"u": u[None]})
        torch.testing.assert_close(found, normal.log_prob(u)[None])
    quantiles = guide.quantiles(
        [0.1, 0.5],
    )["u"]
    assert torch.equal(guide.median()["u"], quantiles[1])
    torch.testing.assert_close(quantiles[1], normal.mean)
    marginals = dist.Normal(normal.mean, normal.covariance_matrix.diagonal().sqrt())
    torch.testing.assert_close(quantiles[0], marginals.icdf(torch.tensor(0.1)))
    draws = posterior_draws(model, guide, num_draws=4000)["u"]
    error = (draws.mean(0) - normal.mean) / normal.covariance_matrix.diagonal().sqrt()
    assert error.abs().max() < 4.5 / 4000**0.5


@pytest.mark.parametrize("kind", ["full", "mixture"])
def test_gaussians_of_unconstrained_values_can_be_set(kind: str) -> None:
    guide = made(kind, banana(torch.eye(D), torch.zeros(D)), whiten=PAIR)
    component = guide.component(0) if kind == "mixture" else guide
    root = torch.linalg.cholesky(torch.eye(D) + 0.5)
    component.set_gaussian(guide.groups[0], torch.arange(3.0), root)
    loc, scale = component.marginals(guide.groups[0], guide.new_call((), {}))
    torch.testing.assert_close(loc, torch.arange(3.0))
    torch.testing.assert_close(scale, torch.full((D,), 1.5**0.5))


# --- Saving


@pytest.mark.parametrize("kind", GUIDES)
def test_a_state_has_the_coordinates(kind: str) -> None:
    model = banana(torch.eye(D), torch.zeros(D))
    guide = made(kind, model, whiten=PAIR)
    other = GUIDES[kind](model, whiten=(torch.zeros(D), torch.eye(D)))
    other.prepare()
    other.load_state_dict(guide.state_dict())
    assert {"whitening.loc", "whitening.scale_tril"} < guide.state_dict().keys()
    pickled = pickle.loads(pickle.dumps(guide))
    pickled.attach(model)
    u = {"u": torch.tensor([[0.1, 0.5, -0.3]])}
    expected = density(guide, u)
    for each in (other, pickled, copy.deepcopy(guide)):
        assert torch.equal(density(each, u), expected)
    with torch.no_grad():  # a copy's coordinates are its own
        each.whitening.loc.add_(1.0)
        assert not torch.equal(density(each, u), expected)
        assert torch.equal(density(guide, u), expected)


def test_dtypes_follow() -> None:
    def model() -> None:
        pyro.sample("u", dist.Normal(torch.zeros(D, dtype=torch.float32), 1.0).to_event(1))

    guide = AmortizedGuide(model, family="full", whiten=True)
    assert guide()["u"].dtype == torch.float32
    assert guide.double()()["u"].dtype == torch.float64
    assert guide.whitening.loc.dtype == torch.float64


def test_a_store_without_coordinates_is_refused() -> None:
    _, _, model = gaussian(10.0)
    first = AmortizedGuide(model, whiten=True)
    first()
    saved = pyro.get_param_store().get_state()
    del first
    pyro.get_param_store().set_state(saved)
    other = AmortizedGuide(model, whiten=True)
    with pytest.raises(ValueError, match=r"without its whitened coordinates. Load"):
        other()
    other.prepare()
    with pytest.raises(ValueError, match=r"without its whitened coordinates. Load"):
        other()
    pyro.clear_param_store()
    other()
    other()


@pytest.mark.slow
def test_compiled_steps_are_those_of_svi() -> None:
    """The state that is loaded halfway has other coordinates."""
    model = banana(torch.eye(D), torch.zeros(D))
    found = []
    for make in (SVI, partial(CompiledSVI, engine="graph", strict=True)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = AmortizedGuide(model, family="full", whiten=PAIR)
        svi = make(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
        losses = [svi.step() for _ in range(5)]
        state = {name: value.clone() for name, value in guide.state_dict().items()}
        state["whitening.loc"] += 0.7
        guide.load_state_dict(state)
        found.append(torch.tensor(losses + [svi.step() for _ in range(5)]))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


# --- What is refused


def rows(x: Tensor, subsample_size: int | None = None) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=subsample_size):
        z = pyro.sample("z", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[: subsample_size or len(x)])


def given(x: Tensor | None = None) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("b", dist.Normal(a, 1.0), obs=x)


def masked(flags: Tensor) -> None:
    with pyro.plate("rows", len(flags)), poutine.mask(mask=flags):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def column(x: Tensor) -> Tensor:
    return x.expand(-1, 2)


def by_hand(x: Tensor) -> None:
    pyro.sample("a", dist.Normal(0.0, 1.0))


X = torch.tensor([0.2, -1.0], dtype=torch.float64)
REFUSED: dict[str, tuple[Callable, tuple, str]] = {
    "encoder": (
        lambda: AmortizedGuide(rows, column, inputs=lambda x: x[:, None], whiten=True),
        (X,),
        "one joint distribution of all latents",
    ),
    "plate": (lambda: AmortizedGuide(rows, plate="data", whiten=True), (X,), "Leave out plate="),
    "mixture of rows": (
        lambda: MixtureGuide(rows, 2, plate="data", whiten=True),
        (X,),
        "Leave out plate=",
    ),
    "component": (
        lambda: MixtureGuide(rows, [AmortizedGuide(rows, whiten=True), AmortizedGuide(rows)]),
        (X,),
        r"AmortizedGuide is part of another guide and has whiten=. Give that to the mixture",
    ),
    "refined": (
        lambda: SemiAmortizedGuide(rows, AmortizedGuide(rows, plate="data", whiten=True)),
        (X,),
        "is part of another guide",
    ),
    "subsampled": (
        lambda: AmortizedGuide(given_rows, whiten=True),
        (X,),
        "Give the model all",
    ),
    "size": (
        lambda: AmortizedGuide(rows, whiten=PAIR),
        (X[:1],),
        "have 2 c",
    ),
    "factor": (lambda: AmortizedGuide(rows, whiten=(X, X.outer(X))), (X[:1],), "Cholesky factor"),
    "scales": (lambda: AmortizedGuide(rows, whiten=(X, X + 9)), (X[:1],), "Cholesky factor"),
    "hand": (
        lambda: MixtureGuide(given, [by_hand, by_hand], whiten=True),
        (),
        "needs AmortizedGuide or FlowGuide",
    ),
    "another word": (
        lambda: partial(AmortizedGuide, given, whiten="pathfinder"),
        (),
        "must be True, False or",
    ),
}


def given_rows(x: Tensor) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=1) as index:
        pyro.sample("x", dist.Normal(a, 1.0), obs=x[index])


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_whitened_is_refused(name: str) -> None:
    make, args, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        make()(*args)


def test_calls_with_other_latents_are_refused() -> None:
    guide = AmortizedGuide(given, whiten=True)
    guide()
    with pytest.raises(NotImplementedError, match="whitened coordinates mix all latents"):
        guide(torch.tensor(1.0))
    guide = AmortizedGuide(masked, whiten=(X, torch.eye(2)), name="masked")
    with pytest.raises(NotImplementedError, match=r"\['z'\] are masked in parts"):
        guide(torch.tensor([True, False]))


def test_a_start_of_the_user_is_kept() -> None:
    model = banana(torch.eye(D), torch.zeros(D))
    start = {"u": torch.tensor([1.0, 0.0, 2.0])}
    guide = AmortizedGuide(model, init_loc_fn=start, whiten=PAIR)
    guide.prepare()
    torch.testing.assert_close(guide.median()["u"], start["u"])
    assert isinstance(guide.family, Diagonal) and not guide.free_global[D:].any()


def test_a_data_plate_may_be_subsampled_where_the_gaussian_is_given() -> None:
    whiten = torch.tensor([2.0]), torch.tensor([[0.1]])
    guide = AmortizedGuide(given_rows, whiten=tuple(each.double() for each in whiten))
    assert guide(X)["a"].item() == pytest.approx(2.0, abs=0.6)
