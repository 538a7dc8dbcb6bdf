"""Kernels: densities of x_n after seeing x_i, by sums, quadrature and the prior's own integral."""

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_recursive.mapa.kernel_base import InnerProductKernel, Kernel, of_perplexity
from pyro_recursive.mapa.kernels import (
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    Distance,
    Exponential,
    Gamma,
    Gaussian,
    Poisson,
    StudentT,
    kernel_for,
)

pytestmark = pytest.mark.slow  # integrals of densities

BITS = torch.tensor(list(itertools.product([0, 1], repeat=3))).double()


def grid(low: float, high: float, number: int) -> Tensor:
    return torch.linspace(low, high, number, dtype=torch.float64)


LINE = grid(-60, 60, 200_001)[:, None]
UNIT = grid(0, 1, 20_001)[:, None]
LOGS = grid(-30, 60, 200_001)[:, None]  # of positive data


def name_of(value: Any) -> str:
    return re.sub(" at 0x[0-9a-f]+", "", repr(value)) if isinstance(value, Kernel) else ""


def manhattan(query: Tensor, reference: Tensor) -> Tensor:
    return torch.cdist(query, reference, p=1)


# As densities of x_n: each row is a kernel, some x_i, all x_n, and their weights (logarithms).

SUMS: dict[str, tuple[Kernel, Tensor, Tensor]] = {
    "bits": (Bernoulli(), BITS, BITS),
    "bits near-hard": (Bernoulli(softening=1e-3), BITS, BITS),
    "bits after grey": (Bernoulli(concentration=1.0), torch.rand(5, 3), BITS),
    "categories": (
        Categorical(3, 0.7),
        torch.tensor([[0, 1], [2, 2]]),
        torch.cartesian_prod(torch.arange(3), torch.arange(3)),
    ),
    "one-hot": (Categorical(4, one_hot=True), torch.eye(4)[[2, 0]], torch.eye(4)),
    "counts": (Poisson(), torch.tensor([[0.0], [3], [40]]), torch.arange(4000.0)[:, None]),
    "counts, prior": (Poisson(2.0, 0.5), torch.tensor([[7]]), torch.arange(2000)[:, None]),
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_to_one(name: str) -> None:
    kernel, reference, values = SUMS[name]
    total = kernel(values, reference).logsumexp(0)
    torch.testing.assert_close(total, torch.zeros(len(reference)), rtol=0, atol=1e-9)


POSITIVE = torch.tensor([[0.1], [4.0]])
INTEGRALS: list[tuple[Kernel, Tensor, Tensor]] = [
    (Gaussian(0.7), torch.tensor([[-1.0], [2.0]]), LINE),
    (Gaussian(bandwidth=2.0), torch.tensor([[3.0]]), LINE),
    (StudentT(9.0, 0.5), torch.tensor([[1.0]]), LINE),
    (ContinuousBernoulli(0.05), torch.tensor([[0.0], [0.3], [0.4999], [0.5], [1.0]]), UNIT),
    (Gamma(2.5), POSITIVE, LOGS.exp()),
    (Gamma(0.5, 1.0, 2.0), POSITIVE, LOGS.exp()),
    (Exponential(), POSITIVE, LOGS.exp()),
    (Exponential(0.5, 3.0), POSITIVE, LOGS.exp()),
]


@pytest.mark.parametrize(("kernel", "reference", "values"), INTEGRALS, ids=name_of)
def test_integrates_to_one(kernel: Kernel, reference: Tensor, values: Tensor) -> None:
    density = kernel(values, reference).exp()
    if reference is POSITIVE:
        total = torch.trapezoid(density * values, LOGS, dim=0)
    else:
        total = torch.trapezoid(density, values, dim=0)
    torch.testing.assert_close(total, torch.ones(len(reference)), rtol=0, atol=1e-6)


# The general rule: the integral of p(x_n | parameter) over the parameter's posterior after x_i.


def beta_grid(c: float) -> tuple[Tensor, Tensor]:
    logits = grid(-60, 60, 40_001)
    p, log_volume = logits.sigmoid(), logits.sigmoid().log() + (-logits).sigmoid().log()
    return p, dist.Beta(c, c).log_prob(p.clamp(1e-300, 1 - 1e-16)) + log_volume


def gamma_grid(shape: float, rate: float) -> tuple[Tensor, Tensor]:
    logs = grid(-40, 8, 40_001)
    return logs.exp(), shape * logs - rate * logs.exp()  # the improper one included


FLAT = (grid(-20, 20, 40_001), torch.zeros(40_001))
RULES: dict[str, tuple[Kernel, Callable[[Tensor], Any], tuple[Tensor, Tensor], list[float]]] = {
    "Gaussian": (Gaussian(0.5), lambda p: dist.Normal(p, 0.5), FLAT, [0, 1.3, -2]),
    "Bernoulli, Jeffreys": (Bernoulli(), dist.Bernoulli, beta_grid(0.5), [0, 1]),
    "Bernoulli, softened": (Bernoulli(softening=0.25), dist.Bernoulli, beta_grid(0.5), [0, 1]),
    "Bernoulli, flat": (Bernoulli(concentration=1.0), dist.Bernoulli, beta_grid(1.0), [0, 1]),
    "Categorical": (Categorical(2, 0.8), dist.Bernoulli, beta_grid(0.8), [0, 1]),
    "Poisson": (Poisson(), dist.Poisson, gamma_grid(0.5, 0.0), [0, 1, 7, 30]),
    "Poisson, prior": (Poisson(2.0, 0.3), dist.Poisson, gamma_grid(2.0, 0.3), [0, 1, 7]),
    "Exponential": (Exponential(1.5, 0.7), dist.Exponential, gamma_grid(1.5, 0.7), [0, 0.4, 9]),
    "Gamma": (Gamma(3.0), lambda p: dist.Gamma(3.0, p), gamma_grid(0.0, 0.0), [0.1, 0.4, 9]),
}


@pytest.mark.parametrize("name", RULES)
def test_is_the_posterior_predictive(name: str) -> None:
    kernel, likelihood, (parameters, log_prior), values = RULES[name]
    x = torch.tensor(values, dtype=torch.float64)
    log_p = likelihood(parameters).log_prob(x[:, None])  # [data, grid]
    posterior = (log_p + log_prior).log_softmax(-1)
    expected = (log_p[:, None] + posterior).logsumexp(-1)
    torch.testing.assert_close(kernel(x[:, None], x[:, None]), expected, rtol=1e-5, atol=1e-5)


def test_student_t_is_the_posterior_predictive() -> None:
    """The flat mean integrates to N(x_i, 2 sigma ** 2), the variance on a grid; two dimensions."""
    degrees, scale, x = 4.0, 0.6, torch.randn(3, 2)
    logs = grid(-12, 12, 20_001)
    prior = dist.InverseGamma(degrees / 2, degrees * scale**2 / 2).log_prob(logs.exp()) + logs
    sigma = (0.5 * logs).exp()[:, None, None, None]
    normal = dist.Normal(x, math.sqrt(2) * sigma).to_event(1).log_prob(x[:, None])
    expected = torch.trapezoid((normal + prior[:, None, None]).exp(), logs, dim=0).log()
    torch.testing.assert_close(StudentT(degrees, scale)(x, x), expected, rtol=1e-6, atol=1e-6)


# Forms that are known in other ways.


def test_bernoulli_of_grey_values_is_a_mean_over_bits() -> None:
    grey, x = torch.rand(2, 3), torch.rand(4, 3)
    kernel = Bernoulli()
    of_bits = dist.Bernoulli(grey[:, None]).to_event(1).log_prob(BITS).exp()  # [2, 8]
    torch.testing.assert_close(kernel(grey, x), of_bits @ kernel(BITS, x))


def test_continuous_bernoulli_has_the_mean_of_its_reference() -> None:
    margin = 0.02
    reference = torch.cat([torch.linspace(0, 1, 101), 0.5 + torch.tensor([1e-9, -1e-5, 1e-3])])
    density = ContinuousBernoulli(margin)(UNIT, reference[:, None]).exp()
    means = torch.trapezoid(UNIT * density, UNIT, dim=0)
    expected = reference.clamp(margin, 1 - margin)
    torch.testing.assert_close(means, expected, rtol=0, atol=1e-6)


def test_one_hot_data_are_categories() -> None:
    x = torch.randint(5, (6, 4))
    one_hot = torch.nn.functional.one_hot(x, 5)
    expected = Categorical(5, 0.3)(x, x)
    for data in (one_hot, one_hot.bool(), one_hot.float()):
        torch.testing.assert_close(Categorical(5, 0.3, one_hot=True)(data, data), expected)


def test_gaussian_with_scales_of_its_own_dimensions() -> None:
    scales, x = (0.5, 1.0, 3.0, 0.2), torch.randn(5, 2, 2)
    noise = dist.Normal(x, math.sqrt(2) * torch.tensor(scales).view(2, 2)).to_event(2)
    torch.testing.assert_close(Gaussian(scales)(x, x), noise.log_prob(x[:, None]))


def test_gaussian_far_from_zero() -> None:
    """Squared lengths of 1e14 would leave two digits of the differences."""
    x = 1e7 + torch.randn(6, 3)
    expected = dist.Normal(x, math.sqrt(2)).to_event(1).log_prob(x[:, None])
    torch.testing.assert_close(Gaussian(1.0)(x, x), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("kernel", "make"),
    [
        (Gaussian(0.3), lambda n: torch.randn(n, 2, 3)),
        (Gaussian(perplexity=3.0), lambda n: torch.randn(n, 2, 3)),
        (StudentT(2.0, 0.3), lambda n: torch.randn(n, 2, 3)),
        (Bernoulli(), lambda n: torch.rand(n, 2, 3)),
        (ContinuousBernoulli(), lambda n: torch.rand(n, 2, 3)),
    ],
    ids=name_of,
)
def test_inner_products(kernel: InnerProductKernel, make: Callable[[int], Tensor]) -> None:
    """What the protocol says, with the origin anywhere."""
    query, reference = make(5), make(7)
    origin = torch.randn(6)
    q, a = kernel.query_features(query, origin)
    r, b = kernel.reference_features(reference, origin)
    scores = kernel.rescaled(q @ r.T + a[:, None] + b, 6)
    torch.testing.assert_close(scores, kernel(query, reference))


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bool, torch.int64])
def test_data_of_other_dtypes(dtype: torch.dtype) -> None:
    bits = torch.randint(2, (5, 3))
    for kernel in (Bernoulli(), Gaussian(0.5), Poisson(), Categorical(2), ContinuousBernoulli()):
        found = kernel(bits.to(dtype), bits.to(dtype))
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, kernel(bits.double(), bits.double()))


# Perplexity.


def perplexities(rows: Tensor) -> Tensor:
    return torch.special.entr(rows.softmax(-1)).sum(-1).exp()


@pytest.mark.parametrize("unit", [1e-12, 1.0, 1e9])
def test_perplexity_is_reached_in_any_unit(unit: float) -> None:
    x = torch.randn(200, 3) * unit
    rows = Gaussian(perplexity=12.0)(x, x)
    torch.testing.assert_close(perplexities(rows), torch.full((200,), 12.0), rtol=1e-9, atol=0)
    by_distance = Distance(torch.cdist, perplexity=12.0)(x, x)
    torch.testing.assert_close(by_distance.softmax(-1), rows.softmax(-1), rtol=1e-6, atol=1e-9)


def test_perplexity_of_rows_that_cannot_reach_it() -> None:
    equal = of_perplexity(torch.zeros(1, 9), 4.0)
    torch.testing.assert_close(equal, torch.zeros(1, 9))
    duplicates = torch.tensor([[0.0] * 6 + [-1.0] * 3])
    torch.testing.assert_close(perplexities(of_perplexity(duplicates, 4.0)), torch.tensor([6.0]))
    lost = of_perplexity(torch.tensor([[0.0, -1.0, -2.0, -math.inf]]), 2.0)
    torch.testing.assert_close(perplexities(lost), torch.tensor([2.0]))
    isolated = of_perplexity(torch.tensor([[0.0, -1e9, -1.1e9, -1e300]]), 2.0)
    torch.testing.assert_close(perplexities(isolated), torch.tensor([2.0]), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="9 is not between 1 and k = 9"):
        of_perplexity(torch.zeros(1, 9), 9.0)


def test_distance() -> None:
    x = torch.randn(6, 3)
    expected = -0.5 * (manhattan(x, x) / 0.4) ** 2
    torch.testing.assert_close(Distance(manhattan, bandwidth=0.4)(x, x), expected)
    assert Distance(manhattan, bandwidth=0.4).cache_key is None


# The choice by a likelihood.

ROWS = torch.zeros(20, 3)
CHOICES: list[tuple[Any, Tensor, Kernel]] = [
    (dist.Normal(ROWS, 0.5).to_event(1), ROWS, Gaussian(0.5)),
    (dist.Normal(ROWS, 0.5).to_event(1).mask(True), ROWS, Gaussian(0.5)),
    (dist.Normal(torch.zeros(3), 0.5).expand([20, 3]).to_event(1), ROWS, Gaussian(0.5)),
    (
        dist.Normal(ROWS, torch.tensor([1.0, 2.0, 3.0])).to_event(1),
        ROWS,
        Gaussian((1.0, 2.0, 3.0)),
    ),
    (dist.Normal(ROWS, torch.rand(20, 3)).to_event(1), ROWS, Gaussian(perplexity=20 / 3)),
    (
        dist.Normal(ROWS, torch.tensor(0.5, requires_grad=True)).to_event(1),
        torch.zeros(500, 3),
        Gaussian(perplexity=30.0),
    ),
    (dist.Bernoulli(logits=ROWS).to_event(1), ROWS, Bernoulli()),
    (dist.ContinuousBernoulli(logits=ROWS).to_event(1), ROWS, ContinuousBernoulli()),
    (dist.Poisson(1 + ROWS).to_event(1), ROWS, Poisson()),
    (dist.Exponential(1 + ROWS).to_event(1), ROWS, Exponential()),
    (dist.Gamma(2.0, 1 + ROWS).to_event(1), ROWS, Gamma(2.0)),
    (dist.Categorical(logits=torch.zeros(20, 3, 7)).to_event(1), ROWS, Categorical(7)),
    (
        dist.OneHotCategorical(logits=torch.zeros(20, 3, 7)).to_event(1),
        ROWS,
        Categorical(7, one_hot=True),
    ),
]


@pytest.mark.parametrize(("fn", "value", "expected"), CHOICES, ids=lambda v: repr(v)[:40])
def test_kernel_for(fn: Any, value: Tensor, expected: Kernel) -> None:
    assert kernel_for(fn, value) == expected


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (dist.Laplace(ROWS, 1.0), "for Laplace: give kernel="),
        (dist.LogNormal(ROWS, 1.0), "for LogNormal"),
        (dist.Gamma(1 + torch.rand(20, 3), 1.0), "learned or differs"),
    ],
)
def test_no_kernel_for(fn: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernel_for(fn, ROWS)


# Errors.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gaussian(), "Give one of scale, bandwidth and perplexity"),
        (lambda: Gaussian(0.0), "must be positive"),
        (lambda: StudentT(0.0, 1.0), "degrees must be positive"),
        (lambda: Distance(torch.cdist), "either bandwidth or perplexity"),
        (lambda: Bernoulli(0.5, 0.25), "not both"),
        (lambda: Bernoulli(softening=0.5), "below 1/2"),
        (lambda: ContinuousBernoulli(0.5), "between 0 and 1/2"),
        (lambda: Categorical(2, 0.0), "concentration must be positive"),
        (lambda: Poisson(1.0, -1.0), "rate must be finite and not negative"),
        (lambda: Gamma(1.0, -1.0), "shape must be finite and not negative"),
    ],
)
def test_wrong_numbers(make: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("kernel", "data", "message"),
    [
        (Gaussian(1.0), torch.tensor([[math.nan]]), "needs finite data"),
        (Gaussian(1.0), torch.tensor([[-math.inf]]), "needs finite data"),
        (Gaussian(perplexity=1.0), torch.ones(3, 1), "1 is not between 1"),
        (Bernoulli(), torch.tensor([[0.0, 255.0]]), r"data in \[0, 1\], got 0, 255"),
        (ContinuousBernoulli(), torch.tensor([[-0.1]]), r"in \[0, 1\]"),
        (Categorical(3), torch.tensor([[3]]), r"in \[0, 2\]"),
        (Categorical(3), torch.tensor([[0.5]]), "whole numbers"),
        (Categorical(3, one_hot=True), torch.eye(4), r"\[R, \*x, C\] with one 1"),
        (Categorical(3, one_hot=True), torch.ones(2, 3), "one 1 in each vector"),
        (Poisson(), torch.tensor([[-1.0]]), r"in \[0, inf\]"),
        (Poisson(), torch.tensor([[1.5]]), "whole numbers"),
        (Gamma(2.0, 1.0, 1.0), torch.tensor([[0.0]]), "above 0"),
        (Exponential(), torch.tensor([[0.0]]), "above 0"),
        (
            Distance(lambda q, r: -torch.cdist(q, r), 1.0),
            torch.randn(3, 1),
            "none of them negative",
        ),
    ],
    ids=name_of,
)
def test_wrong_data(kernel: Kernel, data: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernel(data, data)


def test_wrong_pairs() -> None:
    with pytest.raises(ValueError, match=r"shape \[3\] a row, and references \[1\]"):
        Poisson()(torch.ones(4, 3), torch.ones(4, 1))


def test_exponential_data_may_be_zero_where_the_prior_allows() -> None:
    zero = torch.zeros(1, 1)
    torch.testing.assert_close(Exponential(1.0, 1.0)(zero, zero).exp(), zero + 2)
