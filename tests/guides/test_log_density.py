"""The packed log-density beside Pyro's potential, torch's transforms and sums written by hand."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor
from torch.distributions import biject_to

from pyro_recursive.guides.log_density import LogDensity
from pyro_recursive.guides.starts import StartSearch
from tests.models import enumerated

X = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=torch.float64)


def points(density: LogDensity, count: int = 5) -> Tensor:
    return torch.randn(count, density.size)


def potential(model: Callable, *args: Any) -> Callable[[dict[str, Tensor]], Tensor]:
    """Return minus Pyro's potential energy, of unconstrained values by name."""
    _, energy, _, _ = initialize_model(model, args)
    return lambda values: -energy(values)


def potentials(density: LogDensity, of_pyro: Callable, u: Tensor) -> Tensor:
    return torch.stack([of_pyro(density.values(each)) for each in u])


PRIORS: dict[str, Callable[[], Any]] = {
    "real": lambda: dist.Normal(1.0, 2.0),
    "positive": lambda: dist.Gamma(2.0, 3.0),
    "greater": lambda: dist.Pareto(1.5, 2.0),
    "unit interval": lambda: dist.Beta(2.0, 5.0),
    "interval": lambda: dist.Uniform(torch.tensor([-1.0, 2.0]), 3.0).to_event(1),
    "simplex": lambda: dist.Dirichlet(torch.tensor([0.5, 2.0, 3.0, 1.0])),
    "corr_cholesky": lambda: dist.LKJCholesky(4, 2.0),
    "vector": lambda: dist.MultivariateNormal(torch.ones(2), torch.eye(2) + torch.ones(2, 2)),
    "batch": lambda: dist.HalfCauchy(torch.ones(2, 3)).to_event(2),
}
FLAT = {
    "ordered": (constraints.ordered_vector, (3,)),
    "positive ordered": (constraints.positive_ordered_vector, (3,)),
    "positive": (constraints.positive, ()),
    "interval": (constraints.interval(-2.0, 5.0), ()),
    "simplex": (constraints.simplex, (4,)),
    "corr_cholesky": (constraints.corr_cholesky, (3, 3)),
    "corr_matrix": (constraints.corr_matrix, (3, 3)),
    "softplus": (constraints.softplus_positive, ()),
    "less": (constraints.less_than(2.0), ()),
}


@pytest.mark.parametrize("name", PRIORS)
def test_proper_priors_have_the_density_of_pyros_potential(name: str) -> None:
    def model() -> None:
        pyro.sample("z", PRIORS[name]())

    density = LogDensity(model)
    u = points(density)
    torch.testing.assert_close(
        density(u), potentials(density, potential(model), u), atol=1e-10, rtol=1e-10
    )


@pytest.mark.parametrize("name", FLAT)
def test_flat_priors_have_the_jacobian_of_torch_alone(name: str) -> None:
    support, shape = FLAT[name]
    density = LogDensity(lambda: pyro.sample("z", dist.ImproperUniform(support, (), shape)))
    u, transform = points(density), biject_to(support)
    shaped = torch.stack([density.values(each)["z"] for each in u])
    expected = transform.log_abs_det_jacobian(shaped, transform(shaped))
    torch.testing.assert_close(density(u), expected.reshape(5), atol=1e-10, rtol=1e-10)


def nested(x: Tensor) -> None:
    scale = pyro.sample("scale", dist.HalfNormal(2.0))
    with pyro.plate("groups", 2, dim=-2):
        loc = pyro.sample("loc", dist.Normal(0.0, scale))
        with pyro.plate("items", 3, dim=-1):
            share = pyro.sample("share", dist.Beta(2.0, 2.0))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("data", len(x), dim=-1), poutine.scale(scale=0.5):
        mean = loc.mean((-2, -1), keepdim=True).squeeze(-2) + (share.sum(-2) * weights).sum(
            -1, keepdim=True
        )
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def test_plates_gradients_and_second_derivatives_are_those_of_the_potential() -> None:
    density = LogDensity(nested, (X,))
    assert density.is_vectorized and density.size == 1 + 2 + 6 + 2
    of_pyro, u = potential(nested, X), points(density)
    expected = potentials(density, of_pyro, u)
    torch.testing.assert_close(density(u), expected, atol=1e-10, rtol=1e-10)
    value, grad, matrix = density.hessian(u)
    torch.testing.assert_close((value, grad), density.gradient(u))

    def single(each: Tensor) -> Tensor:
        return of_pyro(density.values(each))

    for i, each in enumerate(u[:2]):
        derivative = torch.autograd.functional.jacobian(single, each)
        torch.testing.assert_close(grad[i], derivative, atol=1e-9, rtol=1e-9)
        second = torch.autograd.functional.hessian(single, each)
        torch.testing.assert_close(matrix[i], second, atol=1e-9, rtol=1e-9)
    assert (density.num_values, density.num_gradients, density.num_hessians) == (5, 5, 5)


def test_supports_are_read_in_each_pass() -> None:
    """The second bound is a function of the first latent, both are flat."""

    def model() -> None:
        a = pyro.sample("a", dist.Uniform(0.0, 1.0))
        limits = constraints.interval(torch.zeros(()), 1 - a)
        b = pyro.sample("b", dist.ImproperUniform(limits, (), ()))
        pyro.sample("x", dist.Normal(a + b, 0.1), obs=torch.tensor(0.7))

    density = LogDensity(model)
    u = points(density)
    a = u[:, 0].sigmoid()
    b = (1 - a) * u[:, 1].sigmoid()
    volume = (a * (1 - a)).log() + (b * (1 - b / (1 - a))).log()
    expected = volume + dist.Normal(a + b, 0.1).log_prob(torch.tensor(0.7))
    torch.testing.assert_close(density(u), expected, atol=1e-10, rtol=1e-10)


def test_enumerated_latents_are_summed_out() -> None:
    one, other = LogDensity(enumerated.gmm, (X,)), LogDensity(enumerated.gmm_collapsed, (X,))
    u = points(one)
    torch.testing.assert_close(one(u), other(u), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(one.gradient(u), other.gradient(u), atol=1e-10, rtol=1e-10)


def test_masked_entries_are_constant_where_no_density_depends_on_them() -> None:
    def model() -> None:
        with pyro.plate("data", 2), poutine.mask(mask=torch.tensor([True, False])):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(2))

    density = LogDensity(model)
    u = points(density)
    z = u[:, 0].exp()
    expected = dist.Normal(0.0, 1.0).log_prob(u[:, 0]) + dist.Normal(z, 1.0).log_prob(torch.ones(5))
    torch.testing.assert_close(density(u), expected, atol=1e-10, rtol=1e-10)


def written_for_one_point(x: Tensor) -> None:
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(b[0] + b[1] * torch.arange(4.0), 1.0).to_event(1), obs=x)


def branching(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    scale = 1.0 if z.item() > 0 else 2.0
    pyro.sample("x", dist.Normal(z, scale).expand([4]).to_event(1), obs=x)


def test_models_of_one_point_run_under_vmap_or_in_a_loop() -> None:
    density = LogDensity(written_for_one_point, (X,))
    of_pyro, u = potential(written_for_one_point, X), points(density)
    assert density.is_vectorized
    torch.testing.assert_close(density(u), potentials(density, of_pyro, u))
    single = torch.autograd.functional.hessian(lambda e: of_pyro(density.values(e)), u[0])
    torch.testing.assert_close(density.hessian(u)[2][0], single)
    density = LogDensity(branching, (X,))
    of_pyro, u = potential(branching, X), points(density)
    with pytest.warns(UserWarning, match="for each point by itself") as caught:
        found = density(u)
    torch.testing.assert_close(found, potentials(density, of_pyro, u))
    density(u)
    assert len(caught) == 1


def test_points_at_which_the_model_fails_have_no_density() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        factor = torch.linalg.cholesky(torch.diag_embed(1 + z))
        pyro.sample("x", dist.Normal(factor[..., 0, 0], 1.0), obs=torch.tensor(1.0))

    density = LogDensity(model, trace=StartSearch(model, (), {}).trace)
    u = torch.tensor([[0.0, 0.1], [-3.0, 0.1], [0.2, 0.0], [-2.0, 0.0]])
    value, grad = density.gradient(u)
    assert value.isfinite().tolist() == [True, False, True, False]
    assert value[1] == -math.inf and bool(grad[::2].isfinite().all())
    torch.testing.assert_close(density(u[::2]), value[::2])
    assert density.num_errors == 2 and density.error_at(u[0]) is None
    assert isinstance(density.error_at(u[1]), torch.linalg.LinAlgError)


class Square(torch.autograd.Function):
    """Without a rule for `torch.vmap` in its second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return Doubled.apply(x) * grad


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.from_numpy(2 * grad.numpy())


@pytest.mark.parametrize("is_batched", [True, False])
def test_second_derivatives_are_the_same_in_one_pass_and_in_many(is_batched: bool) -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(7), 1.0).to_event(1))
        squares = z.square() if is_batched else Square.apply(z)
        pyro.factor("f", -squares.sum(-1).square() / 4)

    density = LogDensity(model)
    u = points(density, 3)
    squared = u.square().sum(-1)[:, None, None]
    expected = -(1 + squared) * torch.eye(7) - 2 * u[..., None] * u[..., None, :]
    for chunk in (density.chunk, 7, 1):  # all rows at once, two, one
        density.chunk = chunk
        torch.testing.assert_close(density.hessian(u)[2], expected)
    torch.testing.assert_close(density.hessian(u[0])[2], expected[0])


def test_points_keep_their_dtype_where_the_model_has_another() -> None:
    def model() -> None:
        pyro.sample("z", dist.Gamma(torch.tensor(2.0, dtype=torch.float32), 1.0))

    density = LogDensity(model)
    value, grad = density.gradient(torch.zeros(2, 1, dtype=torch.float64))
    assert density.start.dtype == torch.float32
    assert value.dtype == grad.dtype == torch.float64
    torch.testing.assert_close(value, torch.full((2,), -1.0))


def test_what_has_no_density_is_refused() -> None:
    def subsampled() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4, subsample_size=2) as index:
            pyro.sample("x", dist.Normal(z, 1.0), obs=X[index])

    with pytest.raises(ValueError, match="Plate 'data' is subsampled"):
        LogDensity(subsampled)
    with pytest.raises(NotImplementedError, match="'z' is discrete"):
        LogDensity(lambda: pyro.sample("z", dist.Poisson(1.0)))
    with pytest.raises(ValueError, match="no continuous latent"):
        LogDensity(lambda: None)
