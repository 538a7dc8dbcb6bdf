"""Mixture guides and their stratified losses: values, densities and gradients by quadrature.

Where draws are pinned to nodes, equality is to rounding; statistical checks allow 4.5 standard
errors.
"""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn
from torch.distributions import biject_to

from pyro_recursive import (
    IWAE_ELBO,
    MISELBO,
    SIWAE_ELBO,
    AmortizedGuide,
    MixtureGuide,
    MultiSampleELBO,
    Stratified_ELBO,
    bounds,
)
from pyro_recursive.guides.gaussian_families import LowRank
from pyro_recursive.guides.mixture.parallel import run_together, same_architecture
from tests.oracles.mixtures import (
    ALIKE,
    LOGITS,
    PLACES,
    THETA,
    UNLIKE,
    Derivatives,
    derivatives,
    expectation,
    grid,
    log_component,
    log_joint,
    log_q,
    mixture_elbo,
    pinned,
    setting,
)
from tests.oracles.quadrature import log_normal

SIGMAS = 4.5
LOG_WEIGHTS = LOGITS.log_softmax(-1)


def assert_same(found: Derivatives, expected: Derivatives, tolerance: float = 1e-6) -> None:
    for name, one, other in zip(Derivatives._fields, found, expected, strict=True):
        assert one is not None and other is not None, name
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance, msg=name)


def softmax_elbo(theta: Tensor, places: Tensor, logits: Tensor) -> Tensor:
    return mixture_elbo(theta, places, logits.log_softmax(-1))


def selbo(log_ratio: Tensor, log_weights: Tensor) -> Tensor:
    return (log_weights.exp()[:, None] * log_ratio.mean(0)).sum(0)


def siwae(log_ratio: Tensor, log_weights: Tensor) -> Tensor:
    return (log_ratio + log_weights[:, None]).logsumexp((0, 1)) - math.log(len(log_ratio))


def miselbo(log_ratio: Tensor, log_weights: Tensor) -> Tensor:
    means = log_ratio.logsumexp(0) - math.log(len(log_ratio))
    return (log_weights.exp()[:, None] * means).sum(0)


def at_nodes(bound: Callable, eps: Tensor, *inputs: Tensor) -> Tensor:
    """Return a bound at each node for noise ``eps``, ``[T, M, nodes]``."""
    theta, places, logits = inputs
    log_weights = logits.log_softmax(-1)
    z = places[:, :1] + places[:, 1:].exp() * eps
    return bound(log_joint(z, theta) - log_q(z, places, log_weights), log_weights)


# The loss; its bound; [T, M] numbers of independent noises; the order of the draws in the loss.
BOUNDS = {
    "SELBO": (lambda e: Stratified_ELBO(1, estimator=e), selbo, [[0, 0]], [0, 0]),
    "SELBO-2": (lambda e: Stratified_ELBO(2, estimator=e), selbo, [[0, 1], [1, 0]], [0, 1, 1, 0]),
    "SIWAE": (lambda e: SIWAE_ELBO(1, estimator=e), siwae, [[0, 1]], [0, 1]),
    "SIWAE-2": (lambda e: SIWAE_ELBO(2, estimator=e), siwae, [[0, 1], [1, 0]], [0, 1, 1, 0]),
    "MISELBO": (lambda e: MISELBO(1, estimator=e), miselbo, [[0, 0]], [0, 0]),
    "MISELBO-2": (lambda e: MISELBO(2, estimator=e), miselbo, [[0, 0], [1, 1]], [0, 1, 0, 1]),
}
ROWS = [(name, "pathwise") for name in BOUNDS] + [("SELBO", "stl"), ("MISELBO", "stl")]


@pytest.mark.parametrize("families", [ALIKE, UNLIKE], ids=["alike", "unlike"])
@pytest.mark.parametrize(("name", "estimator"), ROWS)
def test_value_and_gradients(name: str, estimator: str, families: tuple[str, str]) -> None:
    """Gaussians of one family are evaluated at once, others one by one: the numbers are the same.

    The estimator "stl" leaves out what is zero on average only.
    """
    loss, bound, columns, order = BOUNDS[name]
    eps, weight = grid(1 + max(order))
    noises = eps[torch.tensor(columns)]
    expected = derivatives(lambda *inputs: (weight * at_nodes(bound, noises, *inputs)).sum())
    s = setting(len(weight), families=families)
    assert_same(s.gradients(loss(estimator), eps[order], weight), expected)
    with pinned(eps[order]):
        value = loss(estimator).loss(s.model, s.guide)
    at_each = at_nodes(bound, noises, THETA, PLACES, LOGITS)
    assert -value == pytest.approx(at_each.sum().item(), rel=1e-10)


def test_stratified_elbo_is_the_elbo_of_the_mixture() -> None:
    eps, weight = grid(1)
    expected = derivatives(softmax_elbo)
    for estimator in ("pathwise", "stl"):
        loss = Stratified_ELBO(1, estimator=estimator)
        assert_same(setting(len(weight)).gradients(loss, eps[0], weight), expected)
    nodes = at_nodes(selbo, eps[torch.tensor([[0, 0]])], THETA, PLACES, LOGITS)
    exact = mixture_elbo(THETA, PLACES, LOG_WEIGHTS)
    torch.testing.assert_close((weight * nodes).sum(), exact, atol=1e-8, rtol=0)


def test_stl_has_no_noise_where_the_mixture_is_exact() -> None:
    def model() -> None:
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.full((5,), 1.0))

    guide = MixtureGuide(model, 2, plate="data")
    guide.prepare()
    posterior = torch.tensor([0.5, -0.5 * math.log(2)]).expand(5, 2)
    with torch.no_grad():
        for m in range(2):
            guide.component(m).free_local.copy_(posterior)
    sizes = []
    for estimator in ("stl", "pathwise"):
        value = Stratified_ELBO(1, estimator=estimator).differentiable_loss(model, guide)
        places = [guide.component(m).free_local for m in range(2)]
        sizes.append(max(g.abs().max() for g in torch.autograd.grad(value, places)))
    assert sizes[0] < 1e-14 < 0.1 < sizes[1]


@pytest.mark.parametrize("estimator", ["pathwise", "stl"])
@pytest.mark.parametrize(
    "loss", [Stratified_ELBO, SIWAE_ELBO, MISELBO], ids=["selbo", "siwae", "miselbo"]
)
def test_looped_equals_vectorised(loss: type, estimator: str) -> None:
    if loss is SIWAE_ELBO and estimator == "stl":
        return
    count = 3 if loss is not MISELBO else 1
    noise = torch.randn(2 * count, 5)
    s = setting(5)
    results = []
    for vectorize in (True, False):
        chosen = loss(count, estimator=estimator, vectorize_particles=vectorize)
        chosen.loss(s.model, s.guide)  # has a look at the plates
        runs = iter([noise] if vectorize else noise)  # looped particles ask one by one

        def standard(shape: Any, dtype: Any, device: Any, runs: Any = runs) -> Tensor:
            return next(runs).unsqueeze(-1).reshape(shape)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.distributions.normal, "_standard_normal", standard)
            value = chosen.differentiable_loss(s.model, s.guide)
        results.append((value.detach(), *torch.autograd.grad(value, s.parameters())))
    torch.testing.assert_close(results[0], results[1], atol=1e-12, rtol=1e-10)


# --- What the bounds are worth


def gaussians(seed: int) -> tuple[Tensor, Tensor]:
    """Return three random normals and the logarithms of random weights."""
    torch.manual_seed(seed)
    return torch.randn(3, 2) * torch.tensor([1.5, 0.4]), torch.randn(3).log_softmax(-1)


@pytest.mark.parametrize("seed", range(4))
def test_the_bound_exceeds_those_of_the_components_by_their_divergence(seed: int) -> None:
    places, log_weights = gaussians(seed)

    def alone(place: Tensor) -> Tensor:
        return expectation(place, lambda z: log_joint(z, THETA) - log_component(z, place))

    whole = mixture_elbo(THETA, places, log_weights)
    single = torch.stack([alone(place) for place in places])
    divergence = whole - (log_weights.exp() * single).sum()
    entropy = -(log_weights.exp() * log_weights).sum()
    assert 0 <= divergence <= entropy
    assert whole <= single.logsumexp(0)
    by_definition = torch.stack(
        [
            expectation(q, lambda z, q=q: log_component(z, q) - log_q(z, places, log_weights))
            for q in places
        ]
    )
    expected = (log_weights.exp() * by_definition).sum()
    torch.testing.assert_close(divergence, expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize(
    ("apart", "expected"), [(0.0, 0.0), (1.0, None), (40.0, math.log(2))], ids=["0", "1", "40"]
)
def test_diversity_of_two_components(apart: float, expected: float | None) -> None:
    """MISELBO(1) less the components' ELBOs: nothing for copies, log 2 for strangers."""
    eps, weight = grid(1)
    s = setting(len(weight))
    with torch.no_grad():
        s.guide.component(0).free_local.copy_(torch.tensor([-apart / 2, 0.0]))
        s.guide.component(1).free_local.copy_(torch.tensor([apart / 2, 0.0]))
        s.logits().zero_()
    # A scale for each row on model and guide weighs the rows.
    model, guide = (poutine.scale(program, scale=weight) for program in (s.model, s.guide))
    with pinned(eps[0]):
        whole = -MISELBO(1).loss(model, guide)
    singles = []
    for m in range(2):
        component = s.guide.component(m)
        with pinned(eps[0]):
            scaled = poutine.scale(component, scale=weight)
            loss = MultiSampleELBO(bounds.elbo)
            singles.append(-loss.loss(model, scaled))
    found = whole - sum(singles) / 2
    if expected is None:
        assert 0.05 < found < math.log(2) - 0.05
    else:
        assert found == pytest.approx(expected, abs=1e-9)


def test_tighter_bounds_are_ordered() -> None:
    eps, weight = grid(2)
    inputs = (THETA, PLACES, LOGITS)
    values = [
        (weight * at_nodes(bound, eps[torch.tensor(columns)], *inputs)).sum()
        for bound, columns in ((selbo, [[0, 0]]), (miselbo, [[0, 0], [1, 1]]), (siwae, [[0, 1]]))
    ]
    evidence = log_joint(torch.arange(-9, 9, 0.01), THETA).logsumexp(0) + math.log(0.01)
    assert values[0] < values[1] < evidence
    assert values[0] < values[2] < evidence


@pytest.mark.slow
def test_unbiased_for_a_mixture_density_of_torch() -> None:
    """Pyro's own mixture of diagonal normals, on a grid in two dimensions."""
    locs, scales = torch.randn(3, 2), torch.rand(3, 2) + 0.4
    logits = torch.randn(3)

    def log_target(z: Tensor) -> Tensor:
        banana = torch.stack([z[..., 0], z[..., 1] - 0.5 * z[..., 0] ** 2], -1)
        return log_normal(banana, 0.3, 1.2).sum(-1)

    points = torch.arange(-8, 8, 0.05)
    plane = torch.stack(torch.meshgrid(points, points, indexing="ij"), -1)
    density = dist.MixtureOfDiagNormals(locs, scales, logits).log_prob(plane)
    exact = (density.exp() * (log_target(plane) - density)).sum() * 0.05**2
    rows = 4000

    def model() -> None:
        with pyro.plate("data", rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1).expand([rows]))
            pyro.factor("f", log_target(z) - dist.Normal(torch.zeros(2), 1.0).log_prob(z).sum(-1))

    guide = MixtureGuide(model, 3, plate="data")
    guide.prepare()
    with torch.no_grad():
        for m in range(3):
            place = torch.cat([locs[m], scales[m].log()])
            guide.component(m).free_local.copy_(place.expand(rows, 4))
        guide.weights.local.copy_((8 * torch.atanh(logits / 8)).expand(rows, 3))
    for loss in (Stratified_ELBO(1), Stratified_ELBO(4), MISELBO(1), Trace_ELBO()):
        values = -torch.tensor([loss.loss(model, guide) for _ in range(25)]) / rows
        z = (values.mean() - exact) / (values.std() / len(values) ** 0.5)
        assert abs(z) < SIGMAS, type(loss).__name__


# --- Gradients of ordinary losses


def drawn_gradients(loss: Any, rows: int) -> tuple[Tensor, Tensor]:
    """Return each row's gradients, of the second component and of the logits."""
    s = setting(rows)
    loss.loss_and_grads(s.model, s.guide)
    return -s.guide.component(1).free_local.grad, -s.logits().grad


def assert_unbiased(rows: Tensor, expected: Tensor) -> None:
    z = (rows.mean(0) - expected) / (rows.std(0) / len(rows) ** 0.5)
    assert (z.abs() < SIGMAS).all(), f"z = {z.tolist()}"


def iwae_2(theta: Tensor, places: Tensor, logits: Tensor) -> Tensor:
    """IWAE-2 of the mixture: a sum over the components of both samples."""
    eps, weight = grid(2)
    log_weights = logits.log_softmax(-1)
    total = torch.zeros(())
    for i in range(2):
        for j in range(2):
            pair = places[[i, j]]
            z = pair[:, :1] + pair[:, 1:].exp() * eps
            ratio = log_joint(z, theta) - log_q(z, places, log_weights)
            share = (log_weights[i] + log_weights[j]).exp()
            total = total + share * (weight * (ratio.logsumexp(0) - math.log(2))).sum()
    return total


@pytest.mark.parametrize("estimator", ["vimco", "dreg+vimco"])
def test_importance_weighted_gradients_of_components_and_weights(estimator: str) -> None:
    expected = derivatives(iwae_2)
    second, logits = drawn_gradients(IWAE_ELBO(2, estimator=estimator), 40_000)
    assert_unbiased(second, expected.second)
    # In a row the softmax makes the two gradients opposite.
    assert_unbiased(logits[:, :1], expected.logits[:1])


@pytest.mark.parametrize(
    "loss",
    [
        Trace_ELBO(),
        TraceGraph_ELBO(),
        MultiSampleELBO(bounds.elbo, estimator="score"),
        MultiSampleELBO(bounds.elbo, estimator="vimco", num_particles=2),
        Stratified_ELBO(1),
    ],
    ids=lambda loss: type(loss).__name__ + getattr(getattr(loss, "estimator", None), "name", ""),
)
def test_gradients_of_the_elbo(loss: Any) -> None:
    expected = derivatives(softmax_elbo)
    second, logits = drawn_gradients(loss, 40_000)
    assert_unbiased(second, expected.second)
    assert_unbiased(logits[:, :1], expected.logits[:1])


def test_strata_have_less_noise_than_a_score_function() -> None:
    """Two model runs each."""
    vimco = MultiSampleELBO(bounds.elbo, estimator="vimco", num_particles=2)
    losses = (vimco, Stratified_ELBO(1))
    noise = [drawn_gradients(loss, 20_000)[1][:, 0].std() for loss in losses]
    assert noise[1] < 0.7 * noise[0]


# --- Copies


def test_copies_never_separate_and_different_components_do() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 3.0))
        pyro.sample("x", dist.Normal(z**2, 1.0), obs=torch.tensor(4.0))

    for copies in (True, False):
        pyro.clear_param_store()
        guide = MixtureGuide(model, 2)
        guide.prepare()
        places = [guide.component(m).free_global for m in range(2)]
        if copies:
            places[1].data.copy_(places[0].data)
        loss = Stratified_ELBO(4)
        noise = torch.randn(4, 1).repeat_interleave(2, 0)  # the strata share their noise
        with pinned(noise):
            loss.loss_and_grads(model, guide)
        first, second = (place.grad for place in places)
        assert torch.equal(first, second) == copies
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), loss)
        for place in places:
            place.grad = None
        for _ in range(20 if copies else 150):
            with pinned(torch.randn(4, 1).repeat_interleave(2, 0)):
                svi.step()
        distance = (places[0] - places[1]).detach().abs().max()
        assert distance == 0 if copies else distance > 3


def test_the_relative_direction_of_a_copied_pair_has_no_gradient() -> None:
    """For any weights: the pair's gradients are in the ratio of the weights, on average."""
    eps, weight = grid(1)
    s = setting(len(weight))
    with torch.no_grad():
        s.guide.component(1).free_local.copy_(s.guide.component(0).free_local)
    found = s.gradients(Stratified_ELBO(1), eps[0], weight)
    shares = LOG_WEIGHTS.exp()
    torch.testing.assert_close(found.first / shares[0], found.second / shares[1])
    torch.testing.assert_close(found.logits, torch.zeros(2), atol=1e-8, rtol=0)


# --- The guide's density


def test_the_density_is_that_of_all_components_at_any_replayed_value() -> None:
    """Scored through the one component that was drawn, two far modes would cost 15 nats more."""
    points = torch.arange(-7, 7, 0.01)

    def model() -> None:
        with pyro.plate("data", len(points)):
            pyro.sample("z", dist.Normal(0.0, 3.0).expand([len(points)]))

    guide = MixtureGuide(model, 2, plate="data")
    guide.prepare()
    with torch.no_grad():
        for m, loc in enumerate((-2.0, 2.0)):
            place = torch.tensor([loc, math.log(0.5)]).expand(len(points), 2)
            guide.component(m).free_local.copy_(place)
    values = {"z": points}
    trace = poutine.trace(poutine.condition(guide, data=values)).get_trace()
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


def flat(values: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return sites as one unconstrained vector, and the logarithm of its volume by theirs."""
    parts, volume = [], torch.zeros(())
    for name, support in SUPPORTS.items():
        transform = biject_to(support)
        u = transform.inv(values[name])
        parts.append(u.reshape(-1))
        volume = volume + transform.log_abs_det_jacobian(u, values[name]).sum()
    return torch.cat(parts), volume


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


def hand_density(seed: int, values: dict[str, Tensor]) -> Tensor:
    rate = values["rate"]
    return (
        dist.Gamma(2.0 + seed, 1.5).log_prob(rate)
        + dist.Normal(0.1 * seed, rate).log_prob(values["effect"]).sum()
        + dist.Beta(1.5, 2.0 + seed).log_prob(values["share"]).sum()
        + dist.Dirichlet(torch.tensor([1.0, 2.0, 1.0 + seed])).log_prob(values["simplex"])
        + dist.LKJCholesky(3, 1.0 + seed).log_prob(values["corr"])
    )


def auto_normal_density(guide: AutoNormal, values: dict[str, Tensor]) -> Tensor:
    total = torch.zeros(())
    for name, support in SUPPORTS.items():
        transform = biject_to(support)
        u = transform.inv(values[name])
        loc, scale = getattr(guide.locs, name), getattr(guide.scales, name)
        total = total + dist.Normal(loc, scale).log_prob(u).sum()
        total = total - transform.log_abs_det_jacobian(u, values[name]).sum()
    return total


def packed_density(guide: Any, values: dict[str, Tensor]) -> Tensor:
    u, volume = flat(values)
    if isinstance(guide, AutoMultivariateNormal):
        factor = guide.scale[..., None] * guide.scale_tril
        normal = dist.MultivariateNormal(guide.loc, scale_tril=factor)
    else:
        normal = guide.family(guide.free_global, len(u))
    return normal.log_prob(u) - volume


def make_components(name: str) -> list[Any]:
    if name == "by hand":
        return [by_hand_guide(0), by_hand_guide(1)]
    families = {"diagonal": "diagonal", "full": "full", "low rank": LowRank(2)}
    kinds: dict[str, Callable] = {
        "normal": lambda: AutoNormal(several_sites),
        "multivariate": lambda: AutoMultivariateNormal(several_sites),
        **{k: lambda f=f: AmortizedGuide(several_sites, family=f) for k, f in families.items()},
    }
    return [kinds[part]() for part in name.split(", ")]


COMPONENTS = [
    "diagonal, diagonal, diagonal",
    "full, full",
    "low rank, low rank",
    "normal, normal",
    "multivariate, multivariate",
    "multivariate, full, diagonal, low rank",
    "by hand",
]


@pytest.mark.parametrize("name", COMPONENTS)
def test_joint_density_of_several_constrained_sites(name: str) -> None:
    components = make_components(name)
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
        densities = []
        for number, component in enumerate(components):
            if name == "by hand":
                densities.append(hand_density(number, values))
            elif isinstance(component, AutoNormal):
                densities.append(auto_normal_density(component, values))
            else:
                densities.append(packed_density(component, values))
        expected = (torch.stack(densities) + logits.log_softmax(-1)).logsumexp(0)
        # The inverse of a correlation matrix's transform has rounding errors of 1e-9.
        tolerance = 1e-10 if name == "by hand" else 1e-8
        assert trace.log_prob_sum().item() == pytest.approx(expected.item(), abs=tolerance)
    assert all(
        torch.equal(draws[-1].nodes[name]["value"], foreign.nodes[name]["value"])
        for name in SUPPORTS
    )


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


# --- Weights


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
    with torch.no_grad():
        for m in range(2):
            place = torch.stack([modes[m], torch.tensor(0.6).log()])
            guide.component(m).free_local.copy_(place.expand(2, 2))
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


# --- Running it


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("name", ["diagonal, diagonal, diagonal", "normal, normal", "by hand"])
def test_predictive(name: str, parallel: bool) -> None:
    guide = MixtureGuide(several_sites, make_components(name))
    found = Predictive(several_sites, guide=guide, num_samples=7, parallel=parallel)()
    shapes = {name: tuple(found[name].squeeze().shape) for name in SUPPORTS}
    assert shapes == {
        "simplex": (7, 3),
        "rate": (7,),
        "share": (7, 2),
        "effect": (7, 3, 2),
        "corr": (7, 3, 3),
    }


class Encoder(nn.Sequential):
    def __init__(self, width: int = 8, dropout: float = 0.0) -> None:
        hidden: list[nn.Module] = [nn.Linear(2, width), nn.Tanh()]
        super().__init__(*hidden, *([nn.Dropout(dropout)] if dropout else []), nn.Linear(width, 2))


@pytest.mark.parametrize("held", [(False, False, False), (True, False, True)])
def test_encoders_run_together_as_one_by_one(held: tuple[bool, ...]) -> None:
    encoders, x = [Encoder() for _ in range(3)], torch.randn(6, 2)
    outputs = run_together(encoders, held, x)
    torch.testing.assert_close(outputs, torch.stack([encoder(x) for encoder in encoders]))
    outputs.square().sum().backward()
    for encoder, is_held in zip(encoders, held, strict=True):
        found = [parameter.grad for parameter in encoder.parameters()]
        expected = torch.autograd.grad(encoder(x).square().sum(), list(encoder.parameters()))
        for one, other in zip(found, expected, strict=True):
            assert (one is None) == is_held
            if one is not None:
                torch.testing.assert_close(one, other)


def test_encoders_run_together_with_dropout_of_their_own() -> None:
    encoders, x = [Encoder(dropout=0.5) for _ in range(2)], torch.ones(3, 2)
    encoders[1].load_state_dict(encoders[0].state_dict())
    outputs = run_together(encoders, (False, False), x)
    assert not torch.equal(outputs[0], outputs[1])
    for encoder in encoders:
        encoder.eval()
    outputs = run_together(encoders, (False, False), x)
    torch.testing.assert_close(outputs[0], outputs[1])


def test_same_architecture() -> None:
    def layers(width: int = 3, dropout: float = 0.0) -> nn.Module:
        return nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Dropout(dropout))

    assert same_architecture([layers(), layers()])
    assert same_architecture([layers(dropout=0.5), layers(dropout=0.5)])
    assert not same_architecture([layers(), layers(9)])
    assert not same_architecture([layers(), layers(dropout=0.5)])
    assert not same_architecture([layers(), layers().eval()])
    assert not same_architecture([Encoder(), Encoder()])  # they may differ in what they do not say
    norm = [nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)) for _ in range(2)]
    assert not same_architecture(norm)
    assert not same_architecture([nn.Linear(2, 2), nn.Linear(2, 2, bias=False)])


def test_a_trunk_runs_once_and_trains() -> None:
    calls = []

    class Trunk(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            return super().forward(x)

    x = torch.randn(6, 2)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    trunk = Trunk(2, 2)
    components = [AmortizedGuide(model, Encoder()) for _ in range(3)]
    guide = MixtureGuide(model, components, trunk=trunk)
    guide.prepare(x)
    Stratified_ELBO(2).loss(model, guide, x)
    calls.clear()
    guide(x)
    assert calls == [6]
    Stratified_ELBO(2).loss_and_grads(model, guide, x)
    assert trunk.weight.grad.abs().sum() > 0


# --- Errors


def test_what_stratified_losses_and_mixtures_refuse() -> None:
    s = setting(2)
    with pytest.raises(TypeError, match="needs a mixture guide"):
        Stratified_ELBO(2).loss(s.model, AutoNormal(s.model))
    with pytest.raises(ValueError, match=r"in \('pathwise',\), got 'stl'"):
        MISELBO(2, estimator="stl")
    with pytest.raises(ValueError, match=r"in \('pathwise',\), got 'stl'"):
        SIWAE_ELBO(1, estimator="stl")
    with pytest.raises(ValueError, match="at least one component"):
        MixtureGuide(s.model, [])
    with pytest.raises(ValueError, match="cannot be a component of a mixture"):
        MixtureGuide(s.model, [MixtureGuide(s.model, 2)])

    def lacking() -> None:
        pyro.sample("rate", dist.Gamma(2.0, 1.0))

    with pytest.raises(ValueError, match="does not sample"):
        MixtureGuide(several_sites, [lacking, lacking])()
