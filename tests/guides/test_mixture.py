"""Mixture guides: the density of all components, weights, encoders in one pass, refusals."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn
from torch.distributions import biject_to

from pyro_recursive import AmortizedGuide, FlowGuide, MixtureGuide, Stratified_ELBO
from pyro_recursive.guides.gaussian_families import LowRank
from pyro_recursive.tracing.handlers import ComponentAssignment
from tests.models.small import square_rows
from tests.oracles.mixtures import put, setting

rows, X = partial(square_rows, prior=2.0), torch.ones(3, 2, dtype=torch.float64)

# --- The guide's density


def test_the_density_is_that_of_all_components_at_any_replayed_value() -> None:
    """Scored through the one component that was drawn, two far modes would cost 15 nats more."""
    points = torch.arange(-7, 7, 0.01)

    def model() -> None:
        with pyro.plate("data", len(points)):
            pyro.sample("z", dist.Normal(0.0, 3.0).expand([len(points)]))

    guide = MixtureGuide(model, 2, plate="data")
    guide.prepare()
    put(guide, [[loc, math.log(0.5)] for loc in (-2.0, 2.0)])
    trace = poutine.trace(poutine.condition(guide, data={"z": points})).get_trace()
    trace.compute_log_prob()
    log_q_at = trace.nodes["z"]["log_prob"] + trace.nodes["MixtureGuide_component"]["log_prob"]
    mean = (log_q_at.exp() * log_q_at).sum() * 0.01
    assert mean.item() == pytest.approx(-1.4188, abs=1e-4)
    normals = [dist.Normal(loc, 0.5) for loc in (-2.0, 2.0)]
    parts = torch.stack([normal.log_prob(points) for normal in normals])
    through_one = (log_q_at.exp() * parts.mean(0)).sum() * 0.01
    assert through_one.item() == pytest.approx(-16.7258, abs=1e-3)


def several_sites() -> None:
    simplex = pyro.sample("simplex", dist.Dirichlet(torch.ones(3)))
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("inner", 2):
        pyro.sample("share", dist.Beta(2.0, 2.0))
        with pyro.plate("outer", 3, dim=-2):
            pyro.sample("effect", dist.Normal(0.0, rate))
    pyro.sample("corr", dist.LKJCholesky(3, 1.0))
    pyro.factor("f", -simplex[..., 0])


SUPPORTS = {
    "simplex": dist.constraints.simplex,
    "rate": dist.constraints.positive,
    "share": dist.constraints.unit_interval,
    "effect": dist.constraints.real,
    "corr": dist.constraints.corr_cholesky,
}


def by_hand_guide(seed: int) -> Callable:
    def guide() -> None:
        # The sites in another order than the model's, and one that depends on another.
        rate = pyro.sample("rate", dist.Gamma(2.0 + seed, 1.5))
        with pyro.plate("inner", 2):
            with pyro.plate("outer", 3, dim=-2):
                pyro.sample("effect", dist.Normal(0.1 * seed, rate))
            pyro.sample("share", dist.Beta(1.5, 2.0 + seed))
        pyro.sample("simplex", dist.Dirichlet(torch.tensor([1.0, 2.0, 1.0 + seed])))
        pyro.sample("corr", dist.LKJCholesky(3, 1.0 + seed))

    return guide


def density(component: Any, values: dict[str, Tensor]) -> Tensor:
    """Return a component's log-density by hand, from one unconstrained vector."""
    if not isinstance(component, nn.Module):
        alone = poutine.condition(component, data=values)
        return poutine.trace(alone).get_trace().log_prob_sum()
    parts, volume = [], torch.zeros(())
    for name, support in SUPPORTS.items():
        transform = biject_to(support)
        parts.append(transform.inv(values[name]))
        volume = volume + transform.log_abs_det_jacobian(parts[-1], values[name]).sum()
    u = torch.cat([part.reshape(-1) for part in parts])
    if isinstance(component, AutoNormal):
        loc, scale = (
            torch.cat([getattr(own, name).reshape(-1) for name in SUPPORTS])
            for own in (component.locs, component.scales)
        )
        normal = dist.Normal(loc, scale).to_event(1)
    elif isinstance(component, AutoMultivariateNormal):
        factor = component.scale[..., None] * component.scale_tril
        normal = dist.MultivariateNormal(component.loc, scale_tril=factor)
    else:
        normal = component.family(component.free_global, len(u))
    return normal.log_prob(u) - volume


KINDS: dict[str, Callable[[], Any]] = {
    "diagonal": lambda: AmortizedGuide(several_sites),
    "full": lambda: AmortizedGuide(several_sites, family="full"),
    "low rank": lambda: AmortizedGuide(several_sites, family=LowRank(2)),
    "normal": lambda: AutoNormal(several_sites),
    "multivariate": lambda: AutoMultivariateNormal(several_sites),
}
COMPONENTS: dict[str, Callable[[], list[Any]]] = {
    **{kind: lambda make=make: [make(), make()] for kind, make in KINDS.items()},
    "unlike": lambda: [KINDS[kind]() for kind in ("multivariate", "full", "diagonal", "low rank")],
    "by hand": lambda: [by_hand_guide(0), by_hand_guide(1)],
}


@pytest.mark.parametrize("name", COMPONENTS)
def test_joint_density_of_several_constrained_sites(name: str) -> None:
    components = COMPONENTS[name]()
    guide = MixtureGuide(several_sites, components)
    guide()
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    logits = 8 * torch.tanh(guide.weights.overall.detach() / 8)
    draws = [poutine.trace(guide).get_trace() for _ in range(3)]
    foreign = poutine.trace(several_sites).get_trace()
    draws.append(poutine.trace(poutine.replay(guide, trace=foreign)).get_trace())
    for trace in draws:
        values = {name: trace.nodes[name]["value"].detach() for name in SUPPORTS}
        densities = torch.stack([density(component, values) for component in components])
        expected = (densities + logits.log_softmax(-1)).logsumexp(0)
        # The inverse of a correlation matrix's transform has rounding errors of 1e-8.
        tolerance = 1e-10 if name == "by hand" else 1e-7
        assert trace.log_prob_sum().item() == pytest.approx(expected.item(), abs=tolerance)
    assert all(torch.equal(values[name], foreign.nodes[name]["value"]) for name in SUPPORTS)


@pytest.mark.parametrize("subsample", [None, 3])
def test_density_of_each_row(subsample: int | None) -> None:
    """A mixture for each row, one of its latents in a plate of its own too."""
    x = torch.randn(5, 2)

    def model(x: Tensor) -> None:
        with pyro.plate("data", 5, subsample_size=subsample, dim=-2) as rows:
            scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
            with pyro.plate("features", 2, dim=-1):
                loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(loc, scale), obs=x[rows])

    components = [AmortizedGuide(model, nn.Linear(2, 6)) for _ in range(3)]
    guide = MixtureGuide(model, components, plate="data")
    guide.prepare(x)
    with torch.no_grad():
        for parameter in guide.weights.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape))
    trace = poutine.trace(guide).get_trace(x)
    trace.compute_log_prob()
    scale, loc = trace.nodes["scale"]["value"], trace.nodes["loc"]["value"]
    rows = trace.nodes["data"]["value"]
    assert scale.shape == (len(rows), 1) and len(rows) == (subsample or 5)
    u = torch.cat([scale.log(), loc], -1)
    (linear,) = guide.weights.network.parts
    weights = (8 * torch.tanh(linear(x[rows]) / 8)).log_softmax(-1)
    parts = []
    for component in guide.components:
        center, log_scale = component.encoder(x[rows]).split(3, -1)
        normal = dist.Normal(center, log_scale.exp())
        parts.append(normal.log_prob(u).sum(-1) - scale.log().squeeze(-1))
    expected = (torch.stack(parts, -1) + weights).logsumexp(-1)
    nodes = trace.nodes
    found = nodes["scale"]["log_prob"] + nodes["MixtureGuide_component"]["log_prob"]
    found = found.squeeze(-1) + nodes["loc"]["log_prob"].sum(-1)
    minibatch = 5 / len(rows)
    torch.testing.assert_close(found, minibatch * expected, atol=1e-10, rtol=0)


def test_the_density_of_some_members_has_weights_that_sum_to_one() -> None:
    """As a loss asks for it that takes some components of a guide."""
    guide, x = MixtureGuide(rows, 3, plate="data", weights="shared"), torch.ones(4)
    guide.prepare(x)
    guide.weights.local.data.copy_(torch.tensor([0.4, -1.0, 1.2]))
    weights = (8 * torch.tanh(torch.tensor([0.4, 1.2]) / 8)).log_softmax(-1)
    (latents,), call = guide.groups, guide.new_call((x,), {})
    found = guide.log_weights(latents, call, (0, 2)).expand(4, 2)
    torch.testing.assert_close(found, weights.expand(4, 2))
    with ComponentAssignment((1,), members=(0, 2)):
        nodes = poutine.trace(guide).get_trace(x).nodes
    z = nodes["z"]["value"]
    places = torch.stack([guide.component(m).free_local for m in (0, 2)], 1)
    table = dist.Normal(places[..., 0], places[..., 1].exp()).log_prob(z[:, None])
    density = nodes["z"]["fn"].log_prob(z)
    torch.testing.assert_close(density, (table + weights).logsumexp(-1))


# --- Weights


@pytest.mark.quick("shared")
@pytest.mark.parametrize("kind", ["table", "linear", "shared"])
def test_two_data_with_opposite_dominant_modes(kind: str) -> None:
    """Weights of their own are exact; the best shared ones lose 0.5108 nats for each row."""
    x = torch.tensor([[-1.0], [1.0]])
    modes = torch.tensor([-3.0, 3.0])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 4.0))
            masses = 0.5 + 0.4 * x * torch.tensor([-1.0, 1.0])
            parts = dist.Normal(modes, 0.6).log_prob(z[..., None]) + masses.log()
            pyro.factor("f", parts.logsumexp(-1) - dist.Normal(0.0, 4.0).log_prob(z))

    guide = MixtureGuide(model, 2, weights=kind, plate="data")
    guide.prepare(x)
    put(guide, [[mode, math.log(0.6)] for mode in modes])
    adam = torch.optim.Adam(list(guide.weights.parameters()), lr=0.1)
    loss = Stratified_ELBO(4)
    for _ in range(150):
        adam.zero_grad()
        loss.differentiable_loss(model, guide, x).backward()
        adam.step()
    missing = Stratified_ELBO(1000).loss(model, guide, x)
    expected = 2 * 0.5108 if kind == "shared" else 0.0
    assert missing == pytest.approx(expected, abs=0.01)


def test_equal_weights_stay_equal() -> None:
    s = setting(4, learn_weights=True)
    names = {name for name, _ in s.guide.named_parameters()}
    assert any("weights" in name for name in names)
    guide = MixtureGuide(s.model, 2, learn_weights=False, plate="data", name="equal")
    SVI(s.model, guide, pyro.optim.Adam({"lr": 0.1}), Stratified_ELBO(2)).step()
    assert not any("weights" in name for name, _ in guide.named_parameters())
    assert guide.weights.local.eq(0).all()


# --- Refusals


def encoded(n: int = 2, inputs: Any = None) -> AmortizedGuide:
    return AmortizedGuide(rows, nn.Linear(n, 2), inputs=inputs)


def lacking() -> None:
    pyro.sample("rate", dist.Gamma(2.0, 1.0))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "nested": (lambda: MixtureGuide(rows, [MixtureGuide(rows, 2)]), "cannot be a component"),
    "sites": (lambda: MixtureGuide(several_sites, [lacking])(), "lacking does not sample"),
    "inputs": (
        lambda: MixtureGuide(rows, [encoded(), encoded(inputs=lambda x: -x)], weights="shared")(X),
        "A component has inputs= of its own",
    ),
    "plate": (
        lambda: MixtureGuide(rows, [AmortizedGuide(rows, plate="data")])(X),
        "A component has plate='data'",
    ),
    "flow": (
        lambda: MixtureGuide(rows, [FlowGuide(rows)], plate="data")(X),
        "A flow for each row of plate 'data' needs an encoder=",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_remedy(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        make()


def test_components_may_have_the_same_inputs() -> None:
    alike = [encoded(1, lambda x: x[:, :1]) for _ in range(2)]
    assert MixtureGuide(rows, alike, weights="shared")(X)["z"].shape == (3,)


def two_latents(order: str = "ab", rows: int = 1) -> None:
    with pyro.plate("data", rows):
        for name in order:
            pyro.sample(name, dist.Normal(0.0, 1.0))


@pytest.mark.parametrize("kind", ["same", "order", "coordinates", "rows"])
def test_a_component_that_has_run_has_the_mixtures_latents(kind: str) -> None:
    model = two_latents
    component = AmortizedGuide(
        partial(model, order="ba" if kind == "order" else "ab"),
        whiten=(torch.ones(2), torch.eye(2)) if kind == "coordinates" else False,
        name="component",
    )
    component.prepare()
    options = {"plate": "data"} if kind == "rows" else {}
    mixture = MixtureGuide(model, [component, AmortizedGuide(model)], **options)
    if kind == "same":
        assert mixture().keys() == {"a", "b"}
    else:
        with pytest.raises(ValueError, match=r"has run by itself.*new one"):
            mixture()
