"""Guides as maps of standard normals, for `NeuTraReparam` of Pyro."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.reparam import NeuTraReparam
from torch import Tensor
from torch.distributions import constraints

from pyro_recursive import AmortizedGuide, FlowGuide, MixtureGuide
from pyro_recursive.guides.gaussian_families import LowRank
from pyro_recursive.guides.starts import init_to_center
from pyro_recursive.training import PackedNUTS

LOC = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
FACTOR = torch.tensor([[2.0, 0, 0], [1.5, 0.3, 0], [-1.0, 0.2, 0.7]], dtype=torch.float64)


def correlated() -> None:
    """A Gaussian over sites that are named in unsorted order."""
    z = pyro.sample("z", dist.ImproperUniform(constraints.real, (), ()))
    with pyro.plate("two", 2):
        a = pyro.sample("a", dist.Normal(0.0, 1.0).mask(False))
    u = torch.cat([torch.as_tensor(z).reshape(1), a])
    pyro.factor("density", dist.MultivariateNormal(LOC, scale_tril=FACTOR).log_prob(u))


def bounded() -> None:
    """``beta`` is below 1 - alpha, and both are uniform."""
    alpha = pyro.sample("alpha", dist.ImproperUniform(constraints.unit_interval, (), ()))
    support = constraints.interval(torch.zeros(()), 1 - alpha)
    pyro.sample("beta", dist.ImproperUniform(support, (), ()))


def latent_site(model: Callable) -> tuple[Any, poutine.Trace]:
    trace = poutine.trace(model).get_trace()
    name = next(name for name in trace.nodes if name.endswith("_shared_latent"))
    return trace.nodes[name], trace


def test_the_density_is_that_of_standard_normals_for_the_exact_guide() -> None:
    guide = AmortizedGuide(correlated, family="full")
    guide.prepare()
    guide.set_gaussian(guide.groups[0], LOC, FACTOR)
    neutra = NeuTraReparam(guide.neutra())
    for _ in range(3):
        site, trace = latent_site(neutra.reparam(correlated))
        expected = dist.Normal(0.0, 1.0).log_prob(site["value"]).sum()
        torch.testing.assert_close(trace.log_prob_sum(), expected)


MAKE: dict[str, Callable] = {
    "diagonal": AmortizedGuide,
    "full": partial(AmortizedGuide, family="full"),
    "low rank": partial(AmortizedGuide, family=LowRank(1)),
    "whitened": partial(AmortizedGuide, family="full", whiten=(LOC, FACTOR)),
    "coupling": partial(FlowGuide, flow="coupling", hidden=(8,)),
    "whitened flow": partial(FlowGuide, hidden=(8,), whiten=(LOC, FACTOR)),
    "spline": partial(FlowGuide, flow="spline", hidden=(8,)),
    "iaf": partial(FlowGuide, flow="iaf", hidden=(8,)),
}


def perturbed(guide: Any, *args: Any) -> Any:
    guide.prepare(*args)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return guide


@pytest.mark.parametrize("kind", MAKE)
def test_the_jacobian_is_that_of_autograd_and_the_density_that_of_the_guide(kind: str) -> None:
    guide = perturbed(MAKE[kind](correlated))
    transform = guide.get_transform()
    x = torch.randn(3)
    y = transform(x)
    jacobian = torch.autograd.functional.jacobian(transform, x)
    expected = torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(transform.log_abs_det_jacobian(x, y), expected)
    torch.testing.assert_close(transform.log_abs_det_jacobian(x, y.clone()), expected)
    torch.testing.assert_close(transform.inv(y), x, atol=1e-5, rtol=0.0)
    trace = poutine.trace(guide).get_trace()
    u = torch.cat([trace.nodes["z"]["value"].reshape(1), trace.nodes["a"]["value"]])
    noise = transform.inv(u)
    log_q = dist.Normal(0.0, 1.0).log_prob(noise).sum() - transform.log_abs_det_jacobian(noise, u)
    torch.testing.assert_close(trace.log_prob_sum(), log_q)


@pytest.mark.parametrize("kind", ["full", "coupling"])
def test_values_have_the_supports_that_the_model_gives_them(kind: str) -> None:
    guide = perturbed(MAKE[kind](bounded, init_scale=1.0))
    adapter = guide.neutra()
    neutra = NeuTraReparam(adapter)
    site, trace = latent_site(neutra.reparam(bounded))
    draws = torch.stack([site["value"], *3 * torch.randn(9, 2)])
    values = adapter.values(draws)
    for name in ("alpha", "beta"):
        torch.testing.assert_close(values[name][0], trace.nodes[name]["value"])
    assert bool((values["alpha"] + values["beta"] < 1).all())
    with pytest.raises(NotImplementedError, match=r"bounds of 'beta'.*values\(\)"):
        neutra.transform_sample(draws)


def rows(x: Tensor) -> None:
    """A plate of latents with bounds that are tensors, and one without."""
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Uniform(torch.zeros(()), torch.tensor(2.0)))
        pyro.sample("x", dist.Normal(z, scale), obs=x)


@pytest.mark.parametrize("shape", [(7,), (7, 1)])
def test_samples_of_pyro_are_mapped_back_in_plates(shape: tuple[int, ...]) -> None:
    x = torch.tensor([0.3, 1.0, 1.5])
    adapter = perturbed(AmortizedGuide(rows, family="full"), x).neutra(x)
    neutra = NeuTraReparam(adapter)
    poutine.trace(neutra.reparam(rows)).get_trace(x)
    draws = torch.randn(7, 4)
    found, expected = neutra.transform_sample(draws.reshape(*shape, 4)), adapter.values(draws)
    assert found["z"].shape == (7, 3) and found["scale"].numel() == 7
    for name, value in expected.items():
        torch.testing.assert_close(found[name].reshape(value.shape), value)


@pytest.mark.filterwarnings("ignore:.*does not commute with initialization")
@pytest.mark.parametrize("kernel", [pytest.param(NUTS, marks=pytest.mark.slow), PackedNUTS])
def test_nuts_runs_on_a_flat_prior_through_a_guide(kernel: Callable) -> None:
    guide = AmortizedGuide(correlated, family="full")
    guide.prepare()
    guide.set_gaussian(guide.groups[0], LOC, FACTOR)
    adapter = guide.neutra()
    options: dict[str, Any] = {"adapt_mass_matrix": False}
    if kernel is NUTS:
        options |= {"init_strategy": init_to_center, "max_plate_nesting": 1}
    model = NeuTraReparam(adapter).reparam(correlated)
    mcmc = MCMC(kernel(model, **options), num_samples=10, warmup_steps=20, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()["z_shared_latent"]
    assert draws.mean(0).abs().max() < 1.5 and 0.2 < draws.square().mean() < 4.0
    values = adapter.values(draws)
    u = torch.cat([values["z"].reshape(-1, 1), values["a"]], -1)
    torch.testing.assert_close(u, LOC + draws @ FACTOR.mT)


def test_guides_without_a_map_are_refused_and_the_remedy_works() -> None:
    mixture = MixtureGuide(correlated, 2, family="full")
    with pytest.raises(NotImplementedError, match=r"heaviest component, component\(0\)"):
        mixture.neutra()
    assert mixture.component(0).neutra().get_transform()(torch.zeros(3)).shape == (3,)
    x = torch.zeros(3)
    with pytest.raises(NotImplementedError, match="each row of plate 'data'"):
        AmortizedGuide(rows, plate="data").neutra(x)

    def angle() -> None:
        pyro.sample("angle", dist.VonMises(0.0, 1.0))

    with pytest.raises(NotImplementedError, match="'angle' is an angle"):
        AmortizedGuide(angle).neutra()
