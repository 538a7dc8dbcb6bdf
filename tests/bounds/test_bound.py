"""Values and derivatives of the bounds, against quadrature, autograd and exact identities."""

import itertools
import math
import time

import pytest
import torch

from pyro_recursive import bounds
from tests.oracles.quadrature import LOG_EVIDENCE, conjugate, normal_grid

MEMBERS = {
    "elbo": bounds.elbo,
    "iwae": bounds.iwae,
    "miwae": bounds.miwae,
    "piwae": bounds.piwae,
    "pooled": bounds.Pooled(bounds.iwae),
    "ciwae": bounds.ciwae(0.3),
    "ciwae_tensor": bounds.ciwae(torch.tensor(0.3)),
    "renyi": bounds.renyi(0.5),
    "renyi_negative": bounds.renyi(-1.0),
    "jackknife": bounds.jackknife,
}
members = pytest.mark.parametrize("bound", MEMBERS.values(), ids=MEMBERS.keys())

QUADRATURE = [  # (bound, K, expectation)
    ("elbo", 1, -1.7442990490),
    ("iwae", 1, -1.7442990490),
    ("iwae", 2, -1.54700029),
    ("iwae", 3, -1.49784037),
    ("ciwae", 2, -1.60618992),
    ("ciwae", 3, -1.57177797),
    ("renyi", 2, -1.62917088),
    ("renyi", 3, -1.59932066),
    ("jackknife", 2, -1.34970153),
    ("jackknife", 3, -1.39952052),
]


def log_weights(*shape: int) -> torch.Tensor:
    return 3 * torch.randn(*shape)


@pytest.mark.parametrize(("name", "size", "expected"), QUADRATURE)
def test_expectations_against_quadrature(name: str, size: int, expected: float) -> None:
    grid = normal_grid(size, nodes=80 if size == 1 else 64 if size == 2 else 48)
    value = (MEMBERS[name](conjugate(grid.eps).log_weights) * grid.weight).sum()
    assert value.item() == pytest.approx(expected, abs=2e-7)


@pytest.mark.parametrize(("size", "gap"), [(1, 0.31879), (2, 0.24298), (3, 0.21698)])
def test_gap_law(size: int, gap: float) -> None:
    """K times the gap falls to half the chi-square divergence, 0.17655; a wrong 1/K breaks it."""
    grid = normal_grid(size, nodes=64 if size < 3 else 48)
    value = (bounds.iwae(conjugate(grid.eps).log_weights) * grid.weight).sum()
    assert size * (LOG_EVIDENCE - value.item()) == pytest.approx(gap, abs=1e-5)


@members
def test_derivatives_are_slopes(bound: bounds.Bound) -> None:
    """Against central differences, entry by entry, with M != K so that no axis can be swapped."""
    lw, step = log_weights(2, 3, 4), 1e-4
    assert bound(lw).shape == (4,)
    first, second = bound.derivatives(lw)
    for index in range(lw.numel()):
        move = torch.zeros_like(lw)
        move.view(-1)[index] = step
        up, down, here = (bound(lw + sign * move).sum() for sign in (1, -1, 0))
        slope, bend = (up - down) / (2 * step), (up - 2 * here + down) / step**2
        assert first.view(-1)[index].item() == pytest.approx(slope.item(), abs=1e-6)
        assert second.reshape(-1)[index].item() == pytest.approx(bend.item(), abs=1e-5)


@members
@pytest.mark.parametrize("more", [(), (2,)])
def test_replaced(bound: bounds.Bound, more: tuple[int, ...]) -> None:
    """Against one estimate after another; the substitute may be larger than the log-weights."""
    bound = bound.guide
    lw = log_weights(2, 4, 3, *[1] * len(more))
    substitute = log_weights(2, 4, 3, *more)
    expected = torch.empty_like(substitute)
    for m, k in itertools.product(range(2), range(4)):
        changed = lw.expand_as(substitute).clone()
        changed[m, k] = substitute[m, k]
        expected[m, k] = bound.estimate(changed)[0 if isinstance(bound, bounds.Pooled) else m]
    torch.testing.assert_close(bound.replaced(lw, substitute), expected)
    if not isinstance(bound, bounds.Pooled):  # which does not treat its estimates one by one
        torch.testing.assert_close(bounds.Bound.replaced(bound, lw, substitute), expected)


@members
def test_one_sample_is_the_elbo(bound: bounds.Bound) -> None:
    if bound is bounds.jackknife:
        with pytest.raises(ValueError, match="num_particles >= 2"):
            bound(log_weights(1, 1))
        return
    lw = log_weights(1, 1, 7)
    torch.testing.assert_close(bound(lw), lw[0, 0])
    assert bound.is_linear(1, 1)


def test_special_cases() -> None:
    lw, many = log_weights(1, 5, 7), log_weights(3, 5, 7)
    assert bounds.ciwae(1.0).is_linear(1, 3) and not bounds.ciwae(0.5).is_linear(1, 3)
    dead = torch.tensor([[0.0, -math.inf, 1.0]])  # a term of weight zero is no term
    torch.testing.assert_close(bounds.ciwae(0.0)(dead), bounds.iwae(dead))
    torch.testing.assert_close(bounds.ciwae(0.0)(lw), bounds.iwae(lw))
    torch.testing.assert_close(bounds.ciwae(1.0)(lw), bounds.elbo(lw))
    torch.testing.assert_close(bounds.renyi(0.0)(lw), bounds.iwae(lw))
    torch.testing.assert_close(bounds.renyi(1.0)(lw), bounds.elbo(lw))
    torch.testing.assert_close(bounds.renyi(1 - 1e-7)(lw), bounds.elbo(lw), atol=1e-5, rtol=0)
    torch.testing.assert_close(bounds.piwae(lw), bounds.iwae(lw))
    torch.testing.assert_close(bounds.piwae(many), bounds.iwae(many.flatten(0, 1)[None]))
    torch.testing.assert_close(bounds.piwae.guide(many), bounds.miwae(many))
    each = torch.stack([bounds.iwae(many[m : m + 1]) for m in range(3)])
    torch.testing.assert_close(bounds.miwae(many), each.mean(0))


@pytest.mark.parametrize("spread", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("gap", [1e-7, 1e-6, 1e-4, 1e-2, 0.3, 0.9, 1.5])
def test_orders_near_one_in_single_precision(gap: float, spread: float) -> None:
    """Values, gradients and replaced estimates; float64 by an exponential series near order 1."""
    exact = (spread * torch.randn(3, 40, 5) - 200).float().double()
    single = exact.float().requires_grad_()
    bound, tolerance = bounds.renyi(1 - gap), {"atol": 1e-5 * (20 + spread), "rtol": 0.0}
    mean, power = exact.mean(1, keepdim=True), 1 - (1 - gap)
    moment = (power * (exact - mean)).expm1().mean(1)
    expected = (mean.squeeze(1) + moment.log1p() / power).mean(0)
    value = bound(single)
    torch.testing.assert_close(value.double(), expected, **tolerance)
    torch.testing.assert_close(bound(exact), expected, atol=1e-9, rtol=0)
    (slope,) = torch.autograd.grad(value.sum(), single)
    torch.testing.assert_close(slope, bound.derivatives(exact).first.float(), rtol=1e-3, atol=1e-7)
    for one in (exact + 0.1, exact.flip(1)):
        wide = bounds.Bound.replaced(bound, exact, one)
        torch.testing.assert_close(bound.replaced(exact, one), wide, atol=1e-9, rtol=0)
        near = bound.replaced(single.detach(), one.float()).double()
        torch.testing.assert_close(near, wide, **tolerance)


def test_orders_go_to_the_elbo_in_single_precision() -> None:
    """The difference is half the variance times the distance from order 1."""
    lw = (2 * torch.randn(4, 64)).float() - 100
    for gap in (1e-3, 1e-5, 1e-7):
        beyond = bounds.renyi(1 - gap)(lw) - bounds.elbo(lw)
        expected = gap / 2 * lw.double().var(1, correction=0).mean()
        torch.testing.assert_close(beyond.double(), expected, atol=3e-5, rtol=0.02)
    dead = torch.tensor([[0.0, -math.inf, 1.0]]).requires_grad_()
    value = bounds.renyi(0.99)(dead)
    value.backward()
    assert value.item() == pytest.approx(100 * math.log((1 + math.exp(0.01)) / 3), rel=1e-4)
    assert dead.grad is not None and dead.grad[0, 1] == 0 and dead.grad.sum() == pytest.approx(1)
    assert bounds.renyi(0.99)(torch.full((1, 3), -math.inf)) == -math.inf


def test_order_per_draw() -> None:
    """ELBO <= CIWAE <= IWAE for every draw, and Renyi falls with its order (Jensen)."""
    lw = log_weights(2, 5, 50)
    elbo, mixed, iwae = bounds.elbo(lw), bounds.ciwae(0.3)(lw), bounds.iwae(lw)
    assert (elbo <= mixed).all() and (mixed <= iwae).all()
    values = torch.stack([bounds.renyi(order)(lw) for order in (-1.0, 0.0, 0.3, 0.9, 1.0)])
    assert (values.diff(dim=0) <= 1e-12).all()


@members
def test_constant_weights_give_the_constant(bound: bounds.Bound) -> None:
    lw = torch.full((2, 3, 4), -800.0)
    torch.testing.assert_close(bound(lw), lw[0, 0])


@pytest.mark.parametrize("name", ["iwae", "piwae", "renyi", "jackknife"])
def test_dead_samples(name: str) -> None:
    bound = MEMBERS[name]
    lw = log_weights(2, 3, 4)
    lw[0, 1, 2] = -math.inf
    assert bound(lw).isfinite().all()
    first, second = bound.derivatives(lw)
    assert first[0, 1, 2] == 0 and second[0, 1, 2] == 0
    assert first.isfinite().all()
    lw[:, :, 2] = -math.inf
    assert bound(lw)[2] == -math.inf
    assert bound.derivatives(lw).first.isfinite().all()


@pytest.mark.parametrize(("order", "expected"), [(2.0, [0.0, 1.0]), (0.0, [1.0, 0.0])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_weights_that_are_far_apart(
    order: float, expected: list[float], dtype: torch.dtype
) -> None:
    lw = torch.tensor([[0.0, -800.0]], dtype=dtype, requires_grad=True)
    (slope,) = torch.autograd.grad(bounds.renyi(order)(lw), lw)
    torch.testing.assert_close(slope, torch.tensor([expected], dtype=dtype))


def test_large_weights_do_not_overflow() -> None:
    lw = torch.tensor([[900.0, 100.0, -900.0]])
    assert bounds.iwae(lw).item() == pytest.approx(900 - math.log(3))
    assert bounds.iwae.replaced(lw, lw - 50).isfinite().all()


def test_the_jackknife_of_dead_samples() -> None:
    """A leave-one-out value of -inf has no part; without any sample alive the value is -inf."""
    dead = -math.inf
    lw = torch.tensor([[0.0, dead], [dead, dead], [1.0, dead], [0.5, 0.5]])
    expected = [-2 * math.log(2), dead, 1 - 2 * math.log(2), 0.5]
    assert bounds.jackknife.estimate(lw).tolist() == pytest.approx(expected)
    whole = torch.tensor([0.3, -0.4]).logsumexp(0).item()
    mean = (whole - 0.4 + 0.3) / 3 - math.log(2)  # without each of three, one of them dead
    value = bounds.jackknife(torch.tensor([[0.3, dead, -0.4]])).item()
    assert value == pytest.approx(3 * (whole - math.log(3)) - 2 * mean)
    for each in bounds.jackknife.derivatives(lw):
        assert each.isfinite().all() and not each[lw.isneginf()].any()


def test_derivatives_of_the_jackknife_beside_a_dead_sample() -> None:
    """A dead sample among four is a constant: the others' derivatives are those of three."""
    lw = log_weights(2, 4, 3)
    lw[0, 1, 2] = -math.inf
    first, second = bounds.jackknife.derivatives(lw)
    step = 1e-4
    for k in (0, 2, 3):
        move = torch.zeros_like(lw)
        move[0, k, 2] = step
        up, down, here = (bounds.jackknife(lw + sign * move).sum() for sign in (1, -1, 0))
        slope, bend = (up - down) / (2 * step), (up - 2 * here + down) / step**2
        assert first[0, k, 2].item() == pytest.approx(slope.item(), abs=1e-6)
        assert second[0, k, 2].item() == pytest.approx(bend.item(), abs=1e-5)


def test_the_cost_of_the_jackknife() -> None:
    """Linear in K: 100,000 samples have no table of pairs, which would have 10^10 entries."""
    lw = log_weights(1, 100_000)
    begin = time.perf_counter()
    first, second = bounds.jackknife.derivatives(lw)
    value = bounds.jackknife(lw)
    assert time.perf_counter() - begin < 1
    assert value.isfinite() and first.sum().item() == pytest.approx(1) and second.isfinite().all()


@pytest.mark.parametrize("beta", [-0.1, 1.1, math.nan])
def test_beta_outside_the_unit_interval_raises(beta: float) -> None:
    with pytest.raises(ValueError, match=r"beta must lie in \[0, 1\]"):
        bounds.ciwae(beta)
