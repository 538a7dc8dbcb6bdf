"""Flow guides: densities by quadrature and change of variables, gradients by exact identities."""

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from pyro_recursive import IWAE_ELBO, MIWAE_ELBO
from pyro_recursive.guides.amortized import AmortizedGuide
from pyro_recursive.guides.flow.guide import FlowGuide
from pyro_recursive.guides.flow.zuko_adapter import (
    FLOWS,
    AffineFlow,
    ZukoDistribution,
    build_flow,
    check_flow,
)

KINDS = list(FLOWS)
CONTEXT = 3


@pytest.fixture
def zuko() -> Any:
    """Import zuko as the package does: by itself it turns all distributions' validation off."""
    check_flow("coupling")
    return importlib.import_module("zuko")


def shake(module: nn.Module, scale: float = 0.15) -> None:
    """Move a flow away from the identity that it starts as."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))


def affine_flow(kind: str | Callable, size: int, context: int = 0) -> AffineFlow:
    flow = build_flow(kind, size, context, 3, (12,))
    module = AffineFlow(flow, context, torch.linspace(-1.0, 1.0, size), 0.8)
    shake(module)
    return module


def flow_over(kind: str | Callable, size: int) -> ZukoDistribution:
    return affine_flow(kind, size)(None, torch.Size())


def rows_of_flows(kind: str, size: int = 3, rows: int = 4) -> ZukoDistribution:
    context = torch.randn(rows, CONTEXT)
    return affine_flow(kind, size, CONTEXT)(context, torch.Size([rows]))


# --- the distribution


@pytest.mark.quick(2)
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_density_integrates_to_one(kind: str, size: int) -> None:
    flow = flow_over(kind, size)
    draws = flow.sample((2000,))
    centre, reach = draws.mean(0), 8 * draws.std(0)
    nodes = torch.linspace(-1, 1, 401)
    grid = torch.stack(torch.meshgrid(*[nodes] * size, indexing="ij"), -1).flatten(0, -2)
    volume = (reach * (nodes[1] - nodes[0])).prod()
    points = centre + reach * grid
    with torch.no_grad():
        mass = flow.log_prob(points).exp() * volume
    assert abs(mass.sum() - 1) < (2e-2 if kind == "spline" else 5e-4)  # splines have kinks
    mean = (mass[:, None] * points).sum(0)
    error = (mean - draws.mean(0)) / (draws.std(0) / 2000**0.5)
    assert error.abs().max() < 4  # the same distribution as is drawn from


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 3])
def test_log_prob_is_the_change_of_variables(kind: str, size: int) -> None:
    flow = flow_over(kind, size)
    pyro.set_rng_seed(3)
    noise = torch.randn(size)
    pyro.set_rng_seed(3)
    drawn = flow.rsample()
    jacobian = torch.autograd.functional.jacobian(flow.flow.transform.inv, noise)
    expected = dist.Normal(0, 1).log_prob(noise).sum() - torch.linalg.slogdet(jacobian)[1]
    assert torch.allclose(drawn, flow.flow.transform.inv(noise))
    assert torch.allclose(flow.log_prob(drawn), expected, atol=1e-9)
    assert torch.allclose(flow.log_prob(drawn.clone()), expected, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_own_draws_are_scored_as_foreign_values_are(kind: str) -> None:
    flow = rows_of_flows(kind)
    drawn = flow.expand([6, 4]).rsample()
    own, foreign = flow.log_prob(drawn), flow.log_prob(drawn.clone())
    assert own.shape == foreign.shape == (6, 4)
    assert (own - foreign).abs().max() < 1e-8
    assert own is flow.log_prob(drawn)  # kept, though another instance drew it
    noise = flow.flow.transform(drawn)
    assert (flow.flow.transform.inv(noise) - drawn).abs().max() < 1e-8
    single = torch.zeros(3)  # broadcasts to the batch
    assert torch.allclose(flow.log_prob(single), flow.log_prob(single.expand(4, 3)))


@pytest.mark.parametrize("kind", KINDS)
def test_total_derivative_is_the_sum_of_the_partial_ones(kind: str) -> None:
    module = affine_flow(kind, 3, CONTEXT)
    context = torch.randn(4, CONTEXT)
    flow, parameters = module(context, torch.Size([4])), list(module.parameters())
    drawn = flow.rsample((2,))
    total = torch.autograd.grad(flow.log_prob(drawn).sum(), parameters, retain_graph=True)
    stand_in = drawn.detach().requires_grad_()
    density = flow.log_prob(stand_in).sum()
    partials = torch.autograd.grad(density, [stand_in, *parameters], retain_graph=True)
    assert partials[0].abs().min() > 0
    path = torch.autograd.grad(drawn, parameters, partials[0])
    for whole, by_density, by_path in zip(total, partials[1:], path, strict=True):
        assert torch.allclose(whole, by_density + by_path, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_derivative_by_the_value_is_that_of_finite_differences(kind: str) -> None:
    flow = rows_of_flows(kind)
    value = flow.sample().requires_grad_()
    torch.autograd.gradcheck(lambda v: flow.log_prob(v), value)


def test_built_without_gradients_it_stays_frozen() -> None:
    module, context = affine_flow("coupling", 3, CONTEXT), torch.randn(4, CONTEXT)
    free = module(context, torch.Size([4]))
    with torch.no_grad():
        frozen = module(context, torch.Size([4]))
    value = free.sample().requires_grad_()
    own, other = frozen.log_prob(value), free.log_prob(value)
    assert torch.equal(own, other)
    (by_value,) = torch.autograd.grad(other.sum(), value, retain_graph=True)
    own.sum().backward()
    assert torch.equal(value.grad, by_value)
    assert all(parameter.grad is None for parameter in module.parameters())
    drawn = frozen.rsample()
    assert not drawn.requires_grad
    frozen.log_prob(drawn.requires_grad_()).sum().backward()  # its own draw, made a variable
    assert drawn.grad.abs().min() > 0
    free.log_prob(free.sample()).sum().backward()  # a draw without gradients, scored with them
    assert module.bias.grad.abs().min() > 0
    shake(module)  # the tensors are shared: training moves the frozen one as well
    assert torch.allclose(frozen.flow.transform(value), frozen.flow.transform(value.clone()))


def test_any_other_flow_of_zuko(zuko: Any) -> None:
    flow = flow_over(zuko.flows.SOSPF, 2)
    drawn = flow.rsample()
    assert (flow.log_prob(drawn) - flow.log_prob(drawn.clone())).abs() < 1e-4


# --- the guide


def mixed_model(x: Tensor, batch: int | None = None) -> None:
    """Two local sites, one of them positive, and a global one: rate and offset by row, scale."""
    scale = pyro.sample("scale", dist.Gamma(x.new_tensor(3.0), x.new_tensor(3.0)))
    with pyro.plate("data", len(x), subsample_size=batch) as rows:
        rate = pyro.sample("rate", dist.Gamma(2 * torch.ones_like(x[rows, 0]), 1.0))
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x[rows, :2]), 1.0).to_event(1))
        loc = rate[..., None] + z.prod(-1, keepdim=True)
        pyro.sample("x", dist.Normal(loc, scale[..., None]).to_event(1), obs=x[rows, :1])


def mixed_data(rows: int = 6) -> Tensor:
    return torch.linspace(0.2, 3.0, rows)[:, None] * torch.tensor([1.0, -0.5])


def mixed_guide(kind: str = "coupling", **options: Any) -> FlowGuide:
    encoder = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 5))
    return FlowGuide(mixed_model, kind, encoder=encoder, transforms=2, hidden=(8,), **options)


@pytest.mark.quick(2)
@pytest.mark.parametrize("estimator", ["pathwise", "stl", "dreg"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_moves_every_parameter(kind: str, estimator: str) -> None:
    guide, x = mixed_guide(kind), mixed_data()
    guide.prepare(x)
    before = {name: p.detach().clone() for name, p in guide.named_parameters()}
    loss = MIWAE_ELBO(1, 3, estimator=estimator)
    svi = SVI(mixed_model, guide, pyro.optim.Adam({"lr": 0.01}), loss)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*share one joint weight")
        for _ in range(3):  # first layers have no gradient while the last ones are zero
            svi.step(x)
    moved = {name for name, p in guide.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(before) and len(moved) > 10
    stored = {name.replace("$$$", ".") for name in pyro.get_param_store()}
    assert stored == {f"FlowGuide.{name}" for name in before}


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_as_the_gaussian_of_its_head(kind: str) -> None:
    def model() -> None:
        pyro.sample("z", dist.Normal(torch.tensor([50.0, -3.0]), 1.0).to_event(1))

    guide = FlowGuide(model, kind, init_scale=0.2)
    guide.prepare()
    loc, log_scale = guide.flow_global.bias.chunk(2)
    assert (loc - torch.tensor([50.0, -3.0])).abs().max() < 4
    value = loc + torch.randn(5, 2)
    expected = dist.Normal(loc, 0.2).to_event(1).log_prob(value)
    assert torch.allclose(log_scale.exp(), torch.tensor(0.2))
    assert torch.allclose(guide.flow_global(None, torch.Size()).log_prob(value), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("estimator", ["stl", "dreg"])
def test_gradient_is_that_of_the_formula(kind: str, estimator: str) -> None:
    """The loss's gradient against ``c_k d log w_k / dz dz / dphi`` with the same noise."""

    def local_model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.prod(-1), 0.5), obs=x[:, 0])

    x, particles = mixed_data(3), 4
    guide = FlowGuide(local_model, kind, encoder=nn.Linear(2, 4), transforms=2, hidden=(8,))
    guide.prepare(x)
    shake(guide)
    parameters = list(guide.parameters())
    pyro.set_rng_seed(7)
    IWAE_ELBO(particles, estimator=estimator).loss_and_grads(local_model, guide, x)
    found = [parameter.grad.clone() for parameter in parameters]

    pyro.set_rng_seed(7)
    latents, call = guide.groups[0], guide.new_call((x,), {})
    drawn = guide.posterior(latents, call).expand([particles, 3]).rsample()
    stand_in = drawn.detach().requires_grad_()
    log_p = dist.Normal(0, 1).log_prob(stand_in).sum(-1)
    log_p = log_p + dist.Normal(stand_in.prod(-1), 0.5).log_prob(x[:, 0])
    log_w = log_p - guide.posterior(latents, call).log_prob(stand_in)
    weight = log_w.softmax(0).detach()
    factor = weight**2 if estimator == "dreg" else weight
    (by_value,) = torch.autograd.grad((factor * log_w).sum(), stand_in)
    expected = torch.autograd.grad(drawn, parameters, -by_value)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-9)


def test_subsampled_rows_get_their_own_contexts() -> None:
    x, guide = mixed_data(), mixed_guide()
    guide.prepare(x, 3)
    shake(guide)
    trace = poutine.trace(guide).get_trace(x, 3)
    trace.compute_log_prob()
    rows, rate, z = (trace.nodes[name] for name in ("data", "rate", "z"))
    assert z["value"].shape == (3, 2)
    u = guide.groups[1].pack({"rate": rate["value"], "z": z["value"]})
    flow = guide.flow_local(guide.encoder(x)[rows["value"]], torch.Size([3]))
    expected = flow.log_prob(u) - rate["value"].log()
    assert torch.allclose(rate["log_prob"] + z["log_prob"], 2 * expected)  # the plate's scale


# --- what a flow is for


def banana(z: Tensor) -> Tensor:
    """Return log p(z, x) of a banana, ``[..., 2]`` to ``[...]``."""
    return dist.Normal(0, 1).log_prob(z).sum(-1) + dist.Normal(
        z[..., 1] + z[..., 0] ** 2, 0.3
    ).log_prob(torch.tensor(1.0))


def banana_model() -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z[..., 1] + z[..., 0] ** 2, 0.3), obs=torch.tensor(1.0))


def divergence(guide: AmortizedGuide | FlowGuide) -> float:
    """Return KL(q || p) after training, in nats, by quadrature."""
    loss = Trace_ELBO(16, max_plate_nesting=0, vectorize_particles=True)
    optim = pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.997})
    svi = SVI(banana_model, guide, optim, loss)
    for _ in range(800):
        svi.step()
    nodes = torch.linspace(-6, 6, 301)
    grid = torch.stack(torch.meshgrid(nodes, nodes, indexing="ij"), -1).flatten(0, 1)
    cell = (nodes[1] - nodes[0]) ** 2
    log_p = banana(grid)
    log_p = log_p - (log_p.exp() * cell).sum().log()
    with torch.no_grad():
        log_q = guide.posterior(guide.groups[0], guide.new_call((), {})).log_prob(grid)
    assert abs((log_q.exp() * cell).sum() - 1) < 1e-2
    return float((log_q.exp() * (log_q - log_p) * cell).sum())


@pytest.fixture(scope="module")
def gaussian_divergence() -> Iterator[float]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(20)
    pyro.clear_param_store()  # of the test before: this runs ahead of what each test does
    yield divergence(AmortizedGuide(banana_model, family="full"))
    torch.set_default_dtype(default)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_banana_is_closer_than_to_any_gaussian(kind: str, gaussian_divergence: float) -> None:
    guide = FlowGuide(banana_model, kind, hidden=(32,), init_scale=1.0)
    assert divergence(guide) < 0.3 * gaussian_divergence


# --- what is refused


def test_refusals(zuko: Any) -> None:
    x = mixed_data()
    with pytest.raises(ValueError, match=r"flow must be one of \('coupling', 'spline'"):
        FlowGuide(mixed_model, "planar")
    with pytest.raises(ValueError, match=r"each row of plate 'data' needs an encoder="):
        FlowGuide(mixed_model, plate="data")
    for inexact in (zuko.flows.GF, zuko.flows.CNF):
        with pytest.raises(NotImplementedError, match="inverted only to about 1e-4"):
            FlowGuide(mixed_model, inexact)(x)
    with pytest.raises(ValueError, match="Gaussian base"):
        FlowGuide(mixed_model, zuko.flows.NCSF)(x)
    with pytest.raises(TypeError, match="returned Identity; it must return a zuko"):
        FlowGuide(mixed_model, lambda size, context: nn.Identity())(x)
    with pytest.raises(ValueError, match=r"shape \(3,\); .*need \(6, 'context'\): select inputs="):
        FlowGuide(mixed_model, encoder=nn.Flatten(0), inputs=lambda x: x[:3, 0], name="b")(x)


def test_without_zuko(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zuko", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro_recursive\[flows\]'"):
        FlowGuide(mixed_model)


def test_importing_zuko_leaves_the_validation_of_distributions_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "zuko"]:
        monkeypatch.delitem(sys.modules, name)
    FlowGuide(mixed_model)
    assert "zuko" in sys.modules
    with pytest.raises(ValueError, match="constraint"):
        dist.Normal(0.0, -torch.ones(1))
