"""Which densities are those of angles, and the bijections to supports."""

import math
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import biject_to, constraints, transforms

from pyro_recursive.tracing import supports
from pyro_recursive.tracing.supports import is_circular, is_fixed
from pyro_recursive.tracing.transforms import CircleTransform, bijection

ANGLES = {
    "scalar": lambda: dist.VonMises(0.3, 0.5),
    "concentrated": lambda: dist.VonMises(-2.0, 1e4),
    "uniform": lambda: dist.VonMises(0.0, 1e-300),
    "expanded": lambda: dist.VonMises(0.3, 0.5).expand([4]).to_event(1),
    "masked": lambda: dist.VonMises(torch.zeros(3), 1.0).mask(torch.tensor([True, False, True])),
    "pair": lambda: dist.SineBivariateVonMises(0.0, 1.0, 1.0, 2.0, correlation=0.5),
    "skewed": lambda: dist.SineSkewed(
        dist.VonMises(torch.zeros(2), torch.ones(2)).to_event(1), torch.tensor([0.1, 0.2])
    ),
    "mixture": lambda: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.VonMises(torch.tensor([0.0, 1.0]), 3.0)
    ),
    "degrees": lambda: dist.TransformedDistribution(
        dist.VonMises(0.3, 0.5), [transforms.AffineTransform(10.0, 180 / math.pi)]
    ),
}
LINES = {
    "normal": lambda: dist.Normal(math.pi, 1.0),
    "wide": lambda: dist.Normal(0.0, 1e12),
    "far": lambda: dist.Normal(1e9, 1e-3),
    "heavy": lambda: dist.Cauchy(0.0, 1e9),
    "vector": lambda: dist.MultivariateNormal(torch.zeros(5), torch.eye(5)),
    "flat": lambda: dist.ImproperUniform(constraints.real, (), ()),
    "mixture": lambda: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Normal(torch.tensor([0.0, 1.0]), 3.0)
    ),
    "positive": lambda: dist.LogNormal(0.0, 1.0),
    "interval": lambda: dist.Uniform(-math.pi, math.pi),
    "simplex": lambda: dist.Dirichlet(torch.ones(3)),
}


@pytest.mark.parametrize("name", ANGLES)
def test_angles(name: str) -> None:
    assert is_circular(ANGLES[name]())


@pytest.mark.parametrize("name", LINES)
def test_no_angles(name: str) -> None:
    assert not is_circular(LINES[name]())


@pytest.mark.parametrize("make", [LINES["flat"], LINES["heavy"], ANGLES["scalar"]])
def test_types_are_looked_at_once(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supports, "_circular", {})
    expected = is_circular(make())
    monkeypatch.setattr(supports, "_has_period", None)
    assert is_circular(make()) == expected


def test_types_are_looked_at_until_densities_are_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supports, "_circular", {})
    assert not is_circular(dist.VonMises(math.nan, 1.0, validate_args=False))
    assert is_circular(dist.VonMises(0.0, torch.full((999,), 1e-9).float()).to_event(1))


def test_fixed_supports() -> None:
    """Bounds may come from data or latents; constants of torch do not."""
    for fn in (dist.Gamma(1.0, 1.0), dist.Beta(1.0, 1.0), dist.LogNormal(0.0, 1.0)):
        assert is_fixed(fn, False)
    numbers = constraints.interval(0.0, 2.0)
    for fn in (
        dist.Uniform(0.0, 1.0),
        dist.Pareto(1.0, 1.0),
        dist.ImproperUniform(numbers, (), ()),
    ):
        assert not is_fixed(fn.expand([2]).to_event(1), False)


# The bijections.

TORCH: list[tuple[Any, int]] = [
    (constraints.simplex, 6),
    (constraints.corr_cholesky, 15),
    (constraints.independent(constraints.simplex, 1), 6),
    (dist.constraints.corr_matrix, 15),
    (constraints.stack([constraints.simplex, constraints.real_vector]), 3),
]


@pytest.mark.parametrize(("support", "size"), TORCH[:4])
def test_accurate_bijections_are_those_of_torch(support: Any, size: int) -> None:
    """Values, inverse and volume in float64, near the origin, where torch's are right."""
    theirs: Any = biject_to(support)
    ours: Any = bijection(support)
    u = torch.randn(7, 3, size)
    z = theirs(u)
    torch.testing.assert_close(ours(u), z)
    torch.testing.assert_close(ours.inv(z), u)
    volume = theirs.log_abs_det_jacobian(u, z)
    torch.testing.assert_close(ours.log_abs_det_jacobian(u, z), volume)


@pytest.mark.parametrize(("transform", "size"), [("simplex", 9), ("corr_cholesky", 45)])
@pytest.mark.parametrize("scale", [2.0, 4.0, 8.0])
def test_bijections_in_single_precision(transform: str, size: int, scale: float) -> None:
    """Far from the origin torch's volumes are NaN or off by percents."""
    ours: Any = bijection(getattr(constraints, transform))
    u = scale * torch.randn(2000, size)
    double, single = ours(u), ours(u.float())
    torch.testing.assert_close(single.double(), double, rtol=2e-5, atol=1e-37)
    volumes = [ours.log_abs_det_jacobian(*pair) for pair in ((u, double), (u.float(), single))]
    torch.testing.assert_close(volumes[1].double(), volumes[0], rtol=2e-6, atol=1e-4)


BOUNDED: list[tuple[Any, Any, Any]] = [
    (constraints.interval(1000.0, 1001.0), 1000.0, 1001.0),
    (constraints.interval(0.1, 0.3), 0.1, 0.3),  # 0.1 + (0.3 - 0.1) is not 0.3
    (constraints.half_open_interval(-7.0, 0.0), -7.0, 0.0),
    (constraints.unit_interval, 0.0, 1.0),
    (constraints.greater_than(5.0), 5.0, math.inf),
    (constraints.less_than(-5.0), -math.inf, -5.0),
    (constraints.independent(constraints.interval(3.0, torch.tensor([4.0, 9.0])), 1), 3.0, 9.0),
    (constraints.stack([constraints.interval(3.0, 4.0), constraints.positive], -1), 0.0, math.inf),
    (constraints.simplex, 0.0, 1.0),
]


@pytest.mark.parametrize(("support", "lower", "upper"), BOUNDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounded_values_stay_off_the_bounds(
    support: Any, lower: float, upper: float, dtype: torch.dtype
) -> None:
    ours: Any = bijection(support)
    u = torch.tensor([-120.0, -60.0, -20.0, -3.0, 0.4, 20.0, 40.0, 60.0], dtype=dtype)
    u = torch.stack([u, u.flip(0)], -1)
    z = ours(u)
    assert z.dtype == dtype and bool(support.check(z).all())
    assert bool(((z > lower) & (z < upper)).all())
    theirs: Any = biject_to(support)
    torch.testing.assert_close(z.double(), theirs(u.double()), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(ours.inv(ours(u[3:5])), u[3:5], rtol=2e-2, atol=1e-2)


def test_derivatives_where_values_are_rounded() -> None:
    """Those of ``a + (b - a) s(u)``, in float32 within its accuracy."""
    a, b = torch.tensor(1000.0).float().requires_grad_(), torch.tensor(1001.0).float()
    b.requires_grad_()
    u = torch.tensor([0.5, 12.0, 30.0]).float().requires_grad_()
    ours: Any = bijection(constraints.interval(a, b))
    z = ours(u)
    assert bool((z < b).all()) and z[-1] == torch.nextafter(b, a)
    found = torch.autograd.grad(z.sum(), (u, a, b))
    share = u.detach().double().sigmoid()
    expected = share * (1 - share), (1 - share).sum(), share.sum()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)
    density = dist.Uniform(a, b).log_prob(z) + ours.log_abs_det_jacobian(u, z)
    (slope,) = torch.autograd.grad(density.sum(), u)
    torch.testing.assert_close(slope.double(), 1 - 2 * share, rtol=1e-5, atol=1e-6)


def test_an_overflow_stays_one() -> None:
    u = torch.tensor([200.0, math.nan]).float().requires_grad_()
    z = bijection(constraints.greater_than(3.0))(u)
    assert z[0] == math.inf and bool(z[1].isnan())


def test_circle() -> None:
    """One period, its volume by differentiation, and the same point for all equal angles."""
    circle, u = CircleTransform(), torch.linspace(-6.0, 6.0, 13)
    z = circle(u)
    slope = torch.autograd.functional.jacobian(circle, u).diagonal()
    torch.testing.assert_close(circle.log_abs_det_jacobian(u, z), slope.log())
    for turns in (-3, 0, 2):
        torch.testing.assert_close(circle.inv(z + 2 * math.pi * turns), u)
    assert math.pi - 1e-6 < circle(torch.tensor(40.0)) <= math.pi
