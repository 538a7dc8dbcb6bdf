"""Supports that are circles, that move with data and latents, or that have no bijection."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, autoguide
from pyro.infer.reparam import ProjectedNormalReparam
from torch import Tensor, nn
from torch.distributions import biject_to

from pyro_recursive import (
    IWAE_ELBO,
    MIWAE_ELBO,
    AmortizedGuide,
    FlowGuide,
    MixtureGuide,
    RecursiveMixture_ELBO,
    RecursiveMixtureGuide,
    Schedule,
    SemiAmortizedGuide,
    gaps,
    log_marginal,
)
from pyro_recursive.evaluation.search import Search
from pyro_recursive.tracing import transforms
from pyro_recursive.tracing.sites import JOINT

ANGLES = torch.tensor([3.0, -3.0, 2.9], dtype=torch.float64)
FIRST = torch.tensor([10.0, 11.0, 9.0, 12.0], dtype=torch.float64)
X = torch.tensor([0.3, 1.2, -0.5, 2.2], dtype=torch.float64)


# Models of one or two latents, each with a grid over its support: values and volumes, by integrals.

Grid = tuple[dict[str, Tensor], Tensor]


def line(size: float, n: int) -> tuple[Tensor, float]:
    return torch.linspace(-size, size, n), 2 * size / (n - 1)


def circle(x: Tensor) -> None:
    a = pyro.sample("a", dist.VonMises(0.3, 0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.VonMises(a, 4.0), obs=x)


def circle_grid(x: Tensor) -> Grid:
    u, step = line(30.0, 3000)
    return {"a": math.pi * torch.tanh(u / 2)}, 2 * math.pi * u.sigmoid() * (-u).sigmoid() * step


def degrees(x: Tensor) -> None:
    turn = dist.transforms.AffineTransform(20.0, 180 / math.pi)
    a = pyro.sample("a", dist.TransformedDistribution(dist.VonMises(0.3, 0.5), [turn]))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.VonMises(a * math.pi / 180, 4.0), obs=x)


def degrees_grid(x: Tensor) -> Grid:
    values, volume = circle_grid(x)
    return {"a": 20.0 + values["a"] * 180 / math.pi}, volume * 180 / math.pi


def torus(x: Tensor) -> None:
    a = pyro.sample("a", dist.SineBivariateVonMises(0.0, 1.0, 1.0, 2.0, correlation=0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(a.sin().sum(-1), 1.0), obs=x)


def torus_grid(x: Tensor) -> Grid:
    u, step = line(20.0, 120)
    a, volume = math.pi * torch.tanh(u / 2), 2 * math.pi * u.sigmoid() * (-u).sigmoid() * step
    pairs = torch.cartesian_prod(a, a)
    return {"a": pairs}, torch.outer(volume, volume).flatten()


def by_data(x: Tensor) -> None:
    z = pyro.sample("z", dist.Uniform(x.min() - 1.0, x.max() + 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def by_data_grid(x: Tensor) -> Grid:
    (u, step), low, width = line(30.0, 3000), x.min() - 1.0, x.max() - x.min() + 2.0
    return {"z": low + width * u.sigmoid()}, width * u.sigmoid() * (-u).sigmoid() * step


def by_latent(x: Tensor) -> None:
    a = pyro.sample("a", dist.Gamma(2.0, 1.0))
    b = pyro.sample("b", dist.Uniform(0.0, a))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)


def by_latent_grid(x: Tensor) -> Grid:
    (u, step), (v, other) = line(9.0, 200), line(16.0, 300)
    a, v = u.exp().repeat_interleave(300), v.repeat(200)
    return {"a": a, "b": a * v.sigmoid()}, a * step * a * v.sigmoid() * (-v).sigmoid() * other


def above(x: Tensor) -> None:
    a = pyro.sample("a", dist.Uniform(0.0, 1.0))
    b = pyro.sample("b", dist.Pareto(1.0 + a, 4.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(a - b, 1.0), obs=x)


def above_grid(x: Tensor) -> Grid:
    (u, step), (v, other) = line(16.0, 200), line(16.0, 300)
    a, over = u.sigmoid().repeat_interleave(300), v.repeat(200).exp()
    return {"a": a, "b": 1.0 + a + over}, a * (1 - a) * step * over * other


CIRCLES = (circle, degrees, torus)
MODELS: dict[Callable, tuple[Callable[[Tensor], Grid], Tensor]] = {
    circle: (circle_grid, ANGLES),
    degrees: (degrees_grid, ANGLES),
    torus: (torus_grid, ANGLES),
    by_data: (by_data_grid, X),
    by_latent: (by_latent_grid, X),
    above: (above_grid, X),
}


def replayed(program: Callable, values: dict[str, Tensor], x: Tensor) -> Tensor:
    """Return a program's log-density at ``[G, *event]`` values of its latents, ``[G]``."""
    nodes = {name: value.unsqueeze(1) for name, value in values.items()}
    count = len(next(iter(values.values())))
    with pyro.plate("grid", count, dim=-2):
        trace = poutine.trace(program).get_trace(x)
        for name, value in nodes.items():
            trace.nodes[name]["value"] = value
        again = poutine.trace(poutine.replay(program, trace=trace)).get_trace(x)
        again.compute_log_prob()
    found = [again.nodes[name]["log_prob"] for name in values]
    found += [
        n["log_prob"] for n in again.nodes.values() if n.get("is_observed") and n["name"] == "x"
    ]
    return torch.stack([each.reshape(count, -1).sum(-1) for each in found]).sum(0).detach()


def exact(model: Callable, x: Tensor) -> float:
    values, volume = MODELS[model][0](x)
    return (replayed(model, values, x) + volume.log()).logsumexp(0).item()


def components(model: Callable) -> list[AmortizedGuide]:
    return [AmortizedGuide(model, init_scale=1.5) for _ in range(2)]


GUIDES: dict[str, Callable[[Callable], Any]] = {
    "gaussian": lambda model: AmortizedGuide(model, init_scale=1.5),
    "full": lambda model: AmortizedGuide(model, family="full", init_scale=1.5),
    "flow": lambda model: FlowGuide(model, transforms=2, hidden=(8,), init_scale=1.5),
    "mixture": lambda model: MixtureGuide(model, components(model)),
    "recursive": lambda model: RecursiveMixtureGuide(
        model, components(model), schedule=Schedule(first=1, propose=1, refine=1, joint=1)
    ),
    "autonormal": lambda model: MixtureGuide(
        model, [autoguide.AutoNormal(model, init_scale=s) for s in (1.0, 2.0)]
    ),
    "autodiagonal": lambda model: MixtureGuide(
        model, [autoguide.AutoDiagonalNormal(model, init_scale=s) for s in (1.0, 2.0)]
    ),
}


def trained(model: Callable, guide: str, x: Tensor, first: Tensor, **options: Any) -> Any:
    """Prepare a guide on other data, and take steps that would find a mode elsewhere."""
    made = GUIDES[guide](model)
    made.prepare(first)
    if guide == "recursive":
        loss: Any = RecursiveMixture_ELBO(4, **options)
    else:
        estimator = "vimco" if isinstance(made, MixtureGuide) else "dreg"
        loss = IWAE_ELBO(4, estimator=estimator, **options)
    svi = SVI(model, made, pyro.optim.Adam({"lr": 0.05}), loss)
    for _ in range(5):
        svi.step(x)
    return made


@torch.no_grad()
def check_guide(model: Callable, guide: Callable, x: Tensor) -> None:
    """The density sums to one, the draws have its moments, and the bound is below log p."""
    values, volume = MODELS[model][0](x)
    share = replayed(guide, values, x).exp() * volume
    assert share.sum().item() == pytest.approx(1.0, abs=2e-3)
    with pyro.plate("draws", 20_000, dim=-2):
        trace = poutine.trace(guide).get_trace(x)
    for name, value in values.items():
        drawn = trace.nodes[name]["value"].flatten(0, 1)
        for moment in (torch.sin, torch.cos):
            difference = moment(drawn).mean(0) - (share @ moment(value))
            assert (difference.abs() < 4.5 * moment(drawn).std(0) / 20_000**0.5 + 2e-3).all()
    log_p = exact(model, x)
    assert -MIWAE_ELBO(2000, 1).loss(model, guide, x) < log_p + 0.05
    assert -MIWAE_ELBO(300, 8).loss(model, guide, x) < log_p + 0.05
    found = log_marginal(model, guide, x, num_particles=20_000, diagnostics=True)
    assert found.log_marginal.item() < log_p + 4 * found.standard_error
    if model not in CIRCLES:  # of two modes, one at each end, a Gaussian may have one
        assert abs(found.log_marginal.item() - log_p) < 4 * found.standard_error + 0.1


QUICK = {"gaussian", "mixture"}
IN_TURN = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in GUIDES]


@pytest.mark.quick(3)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("guide", IN_TURN)
def test_densities_and_draws(guide: str, model: Callable) -> None:
    """On circles, and where the bounds are those of the call or of another latent."""
    if model is degrees and "auto" in guide:
        pytest.skip("starts at 20 degrees, which are not the coordinates of the mixture")
    x = MODELS[model][1]
    check_guide(model, trained(model, guide, x, FIRST if x is X else x), x)


@pytest.mark.quick("gaussian-circle")
@pytest.mark.parametrize("model", [circle, by_data, by_latent])
@pytest.mark.parametrize("guide", ["gaussian", "mixture"])
def test_looped_particles(guide: str, model: Callable) -> None:
    x = MODELS[model][1]
    made = trained(model, guide, x, FIRST if x is X else x, vectorize_particles=False)
    check_guide(model, made, x)
    options: dict[str, Any] = {"num_particles": 300, "diagnostics": True}
    found = log_marginal(model, made, x, vectorize_particles=False, **options)
    assert found.log_marginal.item() < exact(model, x) + 5 * found.standard_error


def rows(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.VonMises(0.3, 0.5))
        pyro.sample("x", dist.VonMises(z, 2.0), obs=x)


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", ["encoder", "table", "refined"])
def test_angles_in_rows(kind: str) -> None:
    """Each row has its own circle: with an encoder, a table, refined; and in `gaps`."""
    encoder = nn.Linear(1, 2)
    options: dict[str, Any] = {"inputs": lambda x: x[:, None]}
    guide: Any = AmortizedGuide(rows, encoder, **options)
    if kind == "table":
        guide = AmortizedGuide(rows, plate="data", init_scale=2.0)
    if kind == "refined":
        guide = SemiAmortizedGuide(rows, guide, steps=2)
    x = torch.tensor([1.0, -0.5])
    z = torch.arange(500)[:, None] * (2 * math.pi / 500)
    log_p = dist.VonMises(0.3, 0.5).log_prob(z) + dist.VonMises(z, 2.0).log_prob(x)
    exact = log_p.logsumexp(0) + math.log(2 * math.pi / 500)
    found = log_marginal(rows, guide, x, num_particles=20_000, diagnostics=True)
    assert ((found.log_marginal - exact).abs() < 4 * found.standard_error).all()
    measured = gaps(rows, guide, x, num_particles=4000, search=Search(steps=50))
    assert ((measured.log_marginal - exact).abs() < 4 * measured.log_marginal_error + 1e-3).all()


def over_the_line(x: Tensor) -> None:
    pyro.sample("a", dist.Normal(0.0, 9.0))


def computed(x: Tensor) -> None:
    u = pyro.sample("u", dist.Normal(0.0, 9.0), infer={"is_auxiliary": True})
    pyro.sample("a", dist.Delta(u))


LINES: dict[str, Callable[[Callable], Callable]] = {
    "normal": lambda model: over_the_line,
    "delta": lambda model: computed,
    "AutoNormal": autoguide.AutoNormal,
    "AutoDiagonalNormal": autoguide.AutoDiagonalNormal,
    "AutoMultivariateNormal": autoguide.AutoMultivariateNormal,
}


@pytest.mark.parametrize("guide", LINES)
def test_densities_of_angles_over_the_line_are_refused(guide: str) -> None:
    """They count each angle many times: the bound would exceed log p."""
    for loss in (IWAE_ELBO(4), IWAE_ELBO(1), IWAE_ELBO(4, vectorize_particles=False)):
        with pytest.raises(ValueError, match="Site 'a' is an angle, and the guide's density"):
            loss.loss(circle, LINES[guide](circle), ANGLES)
    with pytest.raises(ValueError, match="Site 'a' is an angle, and the guide's density"):
        log_marginal(circle, LINES[guide](circle), ANGLES)


def test_components_over_the_line_are_refused() -> None:
    guide = MixtureGuide(circle, [over_the_line, over_the_line], plate=None)
    with pytest.raises(ValueError, match="Site 'a' is an angle"):
        IWAE_ELBO(4, estimator="vimco").loss(circle, guide, ANGLES)


def von_mises(x: Tensor) -> None:
    pyro.sample("a", dist.VonMises(3.0, 2.0))


def uniform(x: Tensor) -> None:
    pyro.sample("a", dist.Uniform(-math.pi, math.pi))


@pytest.mark.parametrize("guide", [von_mises, uniform])
def test_guides_over_one_period(guide: Callable) -> None:
    check_guide(circle, guide, ANGLES)


def test_points_on_a_circle() -> None:
    """A point estimate has no density that could be counted twice."""
    guide = autoguide.AutoDelta(circle)
    value = -IWAE_ELBO(8).loss(circle, guide, ANGLES)
    a = guide.median(ANGLES)["a"]
    data = dist.VonMises(a, 4.0).log_prob(ANGLES).sum()
    expected = dist.VonMises(0.3, 0.5).log_prob(a) + data
    assert value == pytest.approx(expected.item())


# Supports without a bijection.


def sphere(x: Tensor) -> None:
    z = pyro.sample("z", dist.ProjectedNormal(torch.tensor([1.0, 0.5, -0.2])))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z[..., 0] - z[..., 2], 1.0), obs=x)


@pytest.mark.quick(3)
@pytest.mark.parametrize("guide", [name for name in GUIDES if name != "autonormal"])
def test_spheres_by_the_remedy_in_the_message(guide: str) -> None:
    with pytest.raises(NotImplementedError, match=r"Latent site 'z'.*ProjectedNormalReparam\(\)"):
        GUIDES[guide](sphere).prepare(ANGLES)
    model = poutine.reparam(sphere, {"z": ProjectedNormalReparam()})
    made = GUIDES[guide](model)
    made.prepare(ANGLES)
    # Quadrature over the angles of the direction is the prior's own: by draws of it.
    z = dist.ProjectedNormal(torch.tensor([1.0, 0.5, -0.2])).sample((400_000,))
    log_p = dist.Normal((z[:, 0] - z[:, 2])[:, None], 1.0).log_prob(ANGLES).sum(-1)
    exact = (log_p.logsumexp(0) - math.log(len(z))).item()
    error = (log_p.exp().std() / log_p.exp().mean() / len(z) ** 0.5).item()
    found = log_marginal(model, made, ANGLES, num_particles=20_000, diagnostics=True)
    tolerance = 4 * (found.standard_error.item() ** 2 + error**2) ** 0.5
    assert abs(found.log_marginal.item() - exact) < tolerance


def covariance(x: Tensor) -> None:
    pyro.sample("c", dist.Wishart(torch.tensor(9.0), torch.eye(2)))


@pytest.mark.filterwarnings("ignore:Singular sample")
def test_no_bijection() -> None:
    with pytest.raises(NotImplementedError, match=r"Latent site 'c'.*pyro\.deterministic"):
        AmortizedGuide(covariance).prepare(ANGLES)


# Supports that move.


def own_bounds(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Uniform(x - 2.0, x + 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.quick("encoder")
@pytest.mark.parametrize("kind", ["encoder", "table", "refined", "flow"])
def test_bounds_of_their_own_in_each_row(kind: str) -> None:
    options: dict[str, Any] = {"inputs": lambda x: x[:, None]}
    guide: Any = AmortizedGuide(own_bounds, nn.Linear(1, 2), **options)
    if kind == "table":
        guide = AmortizedGuide(own_bounds, plate="data", init_scale=1.5)
    if kind == "refined":
        guide = SemiAmortizedGuide(own_bounds, guide, steps=2)
    if kind == "flow":
        options |= {"transforms": 2, "hidden": (4,), "init_scale": 1.5}
        guide = FlowGuide(own_bounds, encoder=nn.Linear(1, 4), **options)
    guide.prepare(FIRST)
    cdf = dist.Normal(0.0, 1.0).cdf(torch.tensor([1.0, -2.0]))
    exact = torch.log((cdf[0] - cdf[1]) / 3).expand(4)
    found = log_marginal(own_bounds, guide, X, num_particles=20_000, diagnostics=True)
    assert ((found.log_marginal - exact).abs() < 4 * found.standard_error).all()
    measured = gaps(own_bounds, guide, X, num_particles=4000, search=Search(steps=50))
    assert ((measured.log_marginal - exact).abs() < 4 * measured.log_marginal_error + 1e-3).all()


def test_quantiles_where_supports_move() -> None:
    guide = AmortizedGuide(by_data, init_scale=1.0)
    guide.prepare(FIRST)
    middle = guide.median(X)["z"]
    u = guide.quantiles([0.5], FIRST)["z"]
    low, width = X.min() - 1.0, X.max() - X.min() + 2.0
    share = (u - (FIRST.min() - 1.0)) / (FIRST.max() - FIRST.min() + 2.0)
    torch.testing.assert_close(middle, low + width * share.squeeze(0))
    with pytest.raises(NotImplementedError, match="bounds of latent site 'b' depend on other"):
        AmortizedGuide(by_latent).median(X)


def late_bounds(x: Tensor) -> None:
    """A support outside the plate that depends on latents inside it."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(2.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    pyro.sample("top", dist.Uniform(0.0, z.max(-1, keepdim=True).values))


def test_bounds_that_come_too_late_are_refused() -> None:
    """The block of the rows is drawn after the global one; a joint guide has both at once."""
    guide = AmortizedGuide(late_bounds, plate="data")
    with pytest.raises(NotImplementedError, match="'top' depend on 'z'"):
        guide.prepare(X)
    AmortizedGuide(late_bounds).prepare(X)


def test_sites_that_are_missing_in_a_call() -> None:
    def model(x: Tensor) -> None:
        if x.min() > 0:
            pyro.sample("z", dist.Uniform(0.0, x.max()))

    guide = AmortizedGuide(model)
    guide(FIRST)
    with pytest.raises(ValueError, match="'z' is not in this call of the model"):
        guide(X)


def test_fixed_supports_cost_no_run_of_the_model() -> None:
    runs = []

    def model(x: Tensor) -> None:
        runs.append(1)
        z = pyro.sample("z", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AmortizedGuide(model)
    guide(X)
    count = len(runs)
    guide(X)
    assert len(runs) == count


# Nothing is inverted where the vector that was drawn is known.


def cholesky(x: Tensor) -> None:
    factor = pyro.sample("factor", dist.LKJCholesky(10, 1.5))
    with pyro.plate("data", len(x)):
        loc = (factor @ torch.linspace(-1.0, 1.0, 10).to(x)).sum(-1)
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def sparse(x: Tensor) -> None:
    shares = pyro.sample("shares", dist.Dirichlet(torch.full((10,), 0.2).to(x)))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(10 * shares[..., 0], 1.0), obs=x)


@pytest.mark.parametrize(
    ("guide", "estimator"),
    [
        *itertools.product(("full", "flow"), ("dreg", "stl", "rws-dreg")),
        *itertools.product(("mixture", "autodiagonal"), ("rws", "dreg+vimco")),
    ],
)
def test_no_inverse(guide: str, estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = GUIDES[guide](cholesky)
    IWAE_ELBO(4).loss(cholesky, made, X)  # the first call compares runs on given values

    def refuse(*args: Any) -> None:
        raise AssertionError("inverted")

    for transform in (transforms.CorrCholesky, transforms.CorrCholesky.__base__):
        monkeypatch.setattr(transform, "_inverse", refuse)
    for vectorize in (True, False):
        loss = IWAE_ELBO(4, estimator=estimator, vectorize_particles=vectorize)
        loss.loss_and_grads(cholesky, made, X)


@pytest.mark.parametrize("scale", [0.5, 1.5])
@pytest.mark.parametrize("model", [cholesky, sparse])
def test_dreg_in_single_precision(model: Callable, scale: float) -> None:
    """The gradient is that of the formula in float64, at the same draws."""
    torch.set_default_dtype(torch.float32)
    x, loss = X.float(), IWAE_ELBO(8, estimator="dreg")
    guide = AmortizedGuide(model)
    guide.prepare(x)
    size = guide.groups[0].size
    guide.restart(guide.groups[0], torch.zeros(size), scale)
    pyro.set_rng_seed(3)
    loss.loss_and_grads(model, guide, x)
    (found,) = [parameter.grad for parameter in guide.parameters()]
    pyro.set_rng_seed(3)
    with pyro.plate("particles", 8, dim=-2):
        trace = poutine.trace(guide).get_trace(x)
    (site,) = [site for site in trace.nodes.values() if JOINT in site.get("infer", ())]

    torch.set_default_dtype(torch.float64)
    u = site["infer"][JOINT].vector.detach().double().reshape(8, size).requires_grad_()
    bijection: Any = biject_to(poutine.trace(model).get_trace(X).nodes[site["name"]]["fn"].support)
    z = bijection(u)
    on_values = [poutine.condition(model, {site["name"]: each}) for each in z]
    log_p = torch.stack([poutine.trace(each).get_trace(X).log_prob_sum() for each in on_values])
    log_q = dist.Normal(0.0, scale).log_prob(u).sum(-1)
    log_weights = log_p + bijection.log_abs_det_jacobian(u, z) - log_q
    (log_weights.detach().softmax(0).square() * log_weights).sum().backward()
    assert u.grad is not None
    expected = -torch.cat([u.grad.sum(0), (u.grad * u).sum(0)])
    assert found is not None
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("guide", ["gaussian", "mixture"])
@pytest.mark.parametrize("model", [cholesky, sparse])
def test_training_in_single_precision(model: Callable, guide: str) -> None:
    torch.set_default_dtype(torch.float32)
    x = X.float()
    made = GUIDES[guide](model)
    estimator = "dreg" if guide == "gaussian" else "dreg+vimco"
    svi = SVI(model, made, pyro.optim.Adam({"lr": 0.03}), IWAE_ELBO(8, estimator=estimator))
    losses = [svi.step(x) for _ in range(300)]
    assert all(map(math.isfinite, losses))
    assert sum(losses[-50:]) < sum(losses[:50])


def test_bounds_by_a_latent_of_another_guide_are_refused() -> None:
    """In a list of guides, a part does not see what the others draw."""
    guide = autoguide.AutoGuideList(by_latent)
    guide.append(autoguide.AutoNormal(poutine.block(by_latent, expose=["a"])))
    guide.append(AmortizedGuide(poutine.block(by_latent, hide=["a"])))
    with pytest.raises(NotImplementedError, match="bounds of latent site 'b' depend on latents"):
        guide(X)


def test_lists_of_guides_where_supports_move() -> None:
    """Bounds by data, or by latents of the same part."""
    guide = autoguide.AutoGuideList(by_data)
    guide.append(AmortizedGuide(by_data, init_scale=1.5))
    guide(FIRST)
    check_guide(by_data, guide, X)
