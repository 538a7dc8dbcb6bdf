"""The mathematics of growing a mixture, against integrals on a fine grid and by brute force."""

import math

import pytest
import torch
from torch import Tensor

from pyro_recursive.bounds.mixture_objectives import (
    OBJECTIVES,
    Clamped,
    Gain,
    Relbo,
    Skew,
    best_gain,
    corrective_weights,
    gain,
    line_search,
    log_mixture,
    log_others,
    stick_breaking,
)
from tests.oracles.quadrature import log_normal, minimise

GRID = torch.arange(-12.0, 12.0, 0.01, dtype=torch.float64)


def log_target(z: Tensor) -> Tensor:
    """Two modes, not normalised."""
    parts = log_normal(z, -1.2, 0.6) + math.log(0.7), log_normal(z, 1.2, 0.8) + math.log(0.3)
    return torch.logaddexp(*parts) + 0.4


def densities(places: Tensor, z: Tensor) -> Tensor:
    """Return the table ``[*z, J]`` of normals ``(loc, log scale)``."""
    return torch.stack([log_normal(z, loc, s.exp()) for loc, s in places], -1)


def integral(log_density: Tensor, values: Tensor) -> Tensor:
    return (log_density.exp() * values).sum() * 0.01


def elbo(log_density: Tensor) -> Tensor:
    return integral(log_density, log_target(GRID) - log_density)


def kl(one: Tensor, other: Tensor) -> Tensor:
    return integral(one, one - other)


def sample(places: Tensor, count: int) -> Tensor:
    """Return equally likely quantiles of each component, ``[S, J]``."""
    levels = (torch.arange(count) + 0.5) / count
    eps = torch.special.ndtri(levels)
    return places[:, 0] + places[:, 1].exp() * eps[:, None]


def random_places(count: int, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(count, 2) * torch.tensor([1.5, 0.4])


# --- Identities


@pytest.mark.parametrize("seed", range(4))
def test_objectives_are_a_bound_and_a_divergence(seed: int) -> None:
    """What a component climbs, on the whole grid: ``E_q[log p - log R]``."""
    table = densities(random_places(3, seed), GRID)
    log_weights = torch.randn(3).log_softmax(-1)
    m = seed % 3
    q = table[:, m]
    rest = [j for j in range(3) if j != m]
    others = torch.logsumexp(table[:, rest] + log_weights[rest].log_softmax(-1), -1)
    torch.testing.assert_close(log_others(table, log_weights, m), others)
    whole = torch.logsumexp(table + log_weights, -1)
    skewed = torch.logaddexp(others + math.log(0.8), q + math.log(0.2))
    entropy = -integral(q, q)
    expected = {
        OBJECTIVES["elbo"]: elbo(q),
        OBJECTIVES["exact"]: elbo(q) + kl(q, whole),
        Skew(0.2): elbo(q) + kl(q, skewed),
        Relbo(0.3): elbo(q) + kl(q, others) + 0.3 * entropy,
        Clamped(1e6, strength=0.4): elbo(q) + 0.4 * kl(q, others),
    }
    for objective, value in expected.items():
        reference = objective(table, log_weights, m, [])
        found = integral(q, log_target(GRID) - reference)
        torch.testing.assert_close(found, value, atol=1e-8, rtol=0, msg=str(objective))
    assert kl(q, skewed) <= -math.log(0.2)


def test_clamped_is_decided_row_by_row_from_the_components_own_draws() -> None:
    """Rows: beside the mixture, and far away; the third draw comes from another component."""
    places = torch.tensor([[0.0, 0.0], [0.5, 0.0]])
    z = torch.tensor([[0.4, 5.0], [0.6, 6.0], [9.0, 0.3]])  # [draws, rows]
    table = densities(places, z)
    log_weights = torch.tensor([0.7, 0.3]).log()
    clamp = Clamped(1.0, strength=0.5)
    found = clamp(table, log_weights, 1, [0, 1])
    ratio = table[..., 1] - table[..., 0]
    assert (ratio[:2].mean(0) < 1).tolist() == [True, False]
    near = table[..., 1] - 0.5 * ratio
    far = table[..., 1] - 0.5 * 1.0
    torch.testing.assert_close(found, torch.stack([near[:, 0], far[:, 1]], -1))


# --- Weights


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_stick_breaking_is_the_recursion(shape: tuple[int, ...]) -> None:
    logits = 3 * torch.randn(*shape, 3)
    expected = torch.ones(*shape, 1)
    for share in torch.sigmoid(logits).split(1, -1):
        expected = torch.cat([(1 - share) * expected, share], -1)
    torch.testing.assert_close(stick_breaking(logits).exp(), expected)
    torch.testing.assert_close(stick_breaking(logits).logsumexp(-1), torch.zeros(shape))


def test_stick_breaking_of_extreme_shares() -> None:
    """One or all of the mixture: no weight is NaN, and the gradients are finite."""
    logits = torch.tensor([-800.0, 800.0, 0.0], requires_grad=True)
    found = stick_breaking(logits)
    assert found.isfinite().all()
    assert found.detach().exp().tolist() == pytest.approx([0.0, 0.0, 0.5, 0.5])
    found.sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    assert stick_breaking(torch.zeros(0)).tolist() == [0.0]


PLACES = torch.tensor([[-1.0, -0.4], [0.9, -0.2], [3.0, 0.0], [0.1, 0.3]], dtype=torch.float64)


def fixed(count: int, draws: int = 400) -> tuple[Tensor, Tensor]:
    """Return log p ``[S, J]`` and the table ``[S, J, J]`` at quantiles of the components."""
    z = sample(PLACES[:count], draws)
    return log_target(z), densities(PLACES[:count], z)


def bound_of(log_p: Tensor, table: Tensor, log_weights: Tensor) -> Tensor:
    terms = (log_p - log_mixture(table, log_weights)).mean(0)
    return (log_weights.exp() * terms).sum(-1)


def best_bound(log_p: Tensor, table: Tensor, size: int) -> float:
    """Maximise over the simplex by an optimiser of another kind."""
    bound = lambda logits: -bound_of(log_p, table, logits.log_softmax(-1))  # noqa: E731
    return -minimise(bound, [torch.zeros(size)])[0]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_corrective_weights_are_optimal(count: int) -> None:
    log_p, table = fixed(count)
    start = torch.zeros(count).log_softmax(-1)
    found = corrective_weights(log_p, table, start, tolerance=1e-6, max_steps=20_000)
    best = best_bound(log_p, table, count)
    reached = bound_of(log_p, table, found)
    # A finite sample's slopes are those of its bound up to the sample's own error.
    assert best - 1e-5 <= reached <= best
    torch.testing.assert_close(found.logsumexp(-1), torch.zeros(()))


@pytest.mark.parametrize("m", [0, 1])
def test_line_search_of_two_is_fully_corrective(m: int) -> None:
    log_p, table = fixed(2)
    start = torch.tensor([0.9, 0.1]).log()
    corrective = corrective_weights(log_p, table, start, tolerance=1e-10, max_steps=20_000)
    found = line_search(log_p, table, start, m)
    torch.testing.assert_close(found, corrective, atol=1e-5, rtol=0)


def test_line_search_moves_one_share_only() -> None:
    log_p, table = fixed(4)
    start = torch.tensor([0.4, 0.2, 0.1, 0.3]).log()
    found = line_search(log_p, table, start, 3)
    torch.testing.assert_close(found[:3].log_softmax(-1), start[:3].log_softmax(-1))
    rest = torch.cat([start[:3].log_softmax(-1), torch.tensor([-torch.inf])])
    last = torch.tensor([-torch.inf] * 3 + [0.0])
    candidates = torch.linspace(0.001, 0.999, 999)
    mixed = [torch.logaddexp(rest + (1 - e).log(), last + e.log()) for e in candidates]
    values = torch.stack([bound_of(log_p, table, weights) for weights in mixed])
    assert found[3].exp().item() == pytest.approx(candidates[values.argmax()].item(), abs=1e-3)
    assert bound_of(log_p, table, found) >= values.max() - 1e-5


@pytest.mark.parametrize(("worth", "share"), [(50.0, 1.0), (-50.0, 0.0)])
def test_line_search_reaches_the_ends(worth: float, share: float) -> None:
    log_p, table = fixed(2)
    log_p = log_p + torch.tensor([0.0, worth])
    found = line_search(log_p, table, torch.tensor([0.5, 0.5]).log(), 1)
    assert found[1].exp().item() == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize("worth", [50.0, -50.0])
def test_line_search_in_single_precision_has_finite_ends(worth: float) -> None:
    log_p, table = fixed(3)
    log_p = log_p + torch.tensor([0.0, 0.0, worth])
    found = line_search(
        log_p.float(), table.float(), torch.tensor([0.7, 0.2, 0.1]).float().log(), 2
    )
    assert found.isfinite().all()
    assert found[2].exp().item() == pytest.approx(float(worth > 0), abs=1e-6)
    torch.testing.assert_close(found[:2].softmax(-1), torch.tensor([7 / 9, 2 / 9]).to(found))


EXACT = 1.4e6  # with eighths, exact in single precision


def test_weights_in_single_precision_do_not_depend_on_a_constant() -> None:
    log_p, table = fixed(3)
    log_p, table = (8 * log_p).round() / 8, table.float()
    start = torch.tensor([0.5, 0.3, 0.2]).float().log()
    found = corrective_weights((log_p - EXACT).float(), table, start)
    expected = corrective_weights(log_p, table.double(), start.double())
    torch.testing.assert_close(found.exp(), expected.exp().to(found), atol=1e-5, rtol=0)
    found = line_search((log_p - EXACT).float(), table, start, 2)
    expected = line_search(log_p, table.double(), start.double(), 2)
    torch.testing.assert_close(found.exp(), expected.exp().to(found), atol=1e-5, rtol=0)


def test_a_component_outside_of_the_support_gets_no_weight() -> None:
    log_p, table = fixed(3)
    expected = corrective_weights(log_p[:, 1:], table[:, 1:, 1:], torch.zeros(2).log_softmax(-1))
    log_p[3, 0] = -torch.inf
    found = corrective_weights(log_p, table, torch.zeros(3).log_softmax(-1))
    torch.testing.assert_close(
        found.exp(), torch.cat([torch.zeros(1), expected.exp()]), atol=5e-3, rtol=0
    )


# --- Gains


def gain_at(places: Tensor, log_weights: Tensor, z: Tensor, scale: float = 1.0) -> Gain:
    table = densities(places, z)
    return gain(
        log_target(z),
        log_mixture(table, log_weights),
        log_others(table, log_weights, len(places) - 1),
        table[..., -1],
        log_weights,
        scale,
    )


@pytest.mark.parametrize("count", [2, 3])
def test_gain_is_the_difference_of_two_bounds(count: int) -> None:
    places, log_weights = PLACES[:count], torch.tensor([0.5, 0.3, 0.2])[:count].log()
    log_weights = log_weights.log_softmax(-1)
    table = densities(places, GRID)
    before = elbo(log_others(table, log_weights, count - 1))
    exact = elbo(log_mixture(table, log_weights)) - before
    ceiling = torch.nn.functional.softplus(elbo(table[:, -1]) - before)
    z = places[:, 0] + places[:, 1].exp() * torch.randn(4000, count)
    found = gain_at(places, log_weights, z)
    assert abs(found.mean - exact) < 4.5 * found.standard_error
    assert 0 < found.standard_error < 0.05
    assert found.ceiling == pytest.approx(ceiling.item(), abs=0.1)
    tripled = gain_at(places, log_weights, z, 3.0)
    assert [3 * number for number in found] == pytest.approx(list(tripled))


@pytest.mark.parametrize("seed", range(4))
def test_a_gain_in_single_precision_does_not_depend_on_a_constant(seed: int) -> None:
    """Components of an exact posterior gain nothing, however large the evidence of the data."""
    torch.manual_seed(seed)
    log_q = ((8 * torch.randn(2000, 3)).round() / 8).float()
    log_weights = torch.randn(3).log_softmax(-1).float()
    found = gain(log_q - EXACT, log_q, log_q, log_q, log_weights)
    assert found.mean == pytest.approx(0.0, abs=1e-7)
    assert found.standard_error < 1e-7


def test_standard_error_of_the_gain_is_its_spread() -> None:
    places, log_weights = PLACES[:3], torch.tensor([0.5, 0.3, 0.2]).log()
    z = places[:, 0] + places[:, 1].exp() * torch.randn(300, 200, 3)
    found = [gain_at(places, log_weights, each) for each in z]
    spread = torch.tensor([each.mean for each in found]).std()
    mean_error = torch.tensor([each.standard_error for each in found]).mean()
    assert spread.item() == pytest.approx(mean_error.item(), rel=0.15)


def test_rows_of_a_sample_count_in_the_standard_error_of_a_gain() -> None:
    """Other rows would have gained something else: their spread, by many samples of rows."""
    shift = 1.5 * torch.randn(400, 1, 1, 20)  # samples of 20 rows
    z = torch.tensor([-1.0, 1.0])[:, None] + torch.randn(400, 64, 2, 20)
    first, second = (log_normal(z, loc, 1.0) for loc in (-1.0, 1.0))
    log_p = torch.logaddexp(first, second + shift)
    log_q = torch.logaddexp(first, second) - math.log(2)
    log_weights = torch.full((20, 2), -math.log(2))

    def gains(is_sample: bool) -> Tensor:
        parts = zip(log_p, log_q, first, second, strict=True)
        found = [gain(*part, log_weights, 3.0, is_sample)[:2] for part in parts]
        return torch.tensor(found)

    spread = gains(True)[:, 0].std()
    assert gains(True)[:, 1].mean().item() == pytest.approx(spread.item(), rel=0.15)
    assert gains(False)[:, 1].mean() < 0.6 * spread
    one = [part[0, ..., :1] for part in (log_p, log_q, first, second)]  # no sample of rows
    assert gain(*one, log_weights[:1], 3.0, True) == gain(*one, log_weights[:1], 3.0, False)


def test_a_clear_gain() -> None:
    log_weights = torch.tensor([0.6, 0.4]).log()

    def found(places: Tensor) -> Gain:
        z = places[:, 0] + places[:, 1].exp() * torch.randn(500, 2)
        return gain_at(places, log_weights, z)

    near, far = found(PLACES[:2]), found(torch.tensor([[-1.0, -0.4], [9.0, 0.0]]))
    assert near.is_clear(2.0) and not near.is_clear(1e9)
    assert near.is_clear(2.0, near.mean / 2) and not near.is_clear(2.0, 2 * near.mean)
    assert far.mean < 0 and not far.is_clear(2.0) and far.ceiling < 1e-3
    draws = PLACES[:1, 0] + torch.randn(50, 1).expand(50, 2)
    same = gain_at(PLACES[[0, 0]], log_weights, draws)  # two copies of one component
    assert abs(same.mean) < 1e-14 and same.standard_error < 1e-14


def test_draws_of_density_0_leave_the_choice_to_the_others() -> None:
    """They cost every candidate the same, infinitely much; a candidate's own exclude it."""
    own, draws = torch.randn(8, 1), torch.randn(5, 6, 1)
    log_p, at_draws = torch.zeros(9, 1), torch.randn(5, 6, 1)
    log_p[8], at_draws[4] = -torch.inf, 10.0
    at_draws[4, 0] = -torch.inf
    at_own, candidates = torch.randn(5, 9, 1), torch.randn(5, 6, 1)
    mixture = torch.cat([own, torch.zeros(1, 1)])
    bound, found = best_gain((log_p, at_draws), (mixture, draws), (at_own, candidates))
    other_bound, others = best_gain(
        (log_p[:8], at_draws[:4]), (own, draws[:4]), (at_own[:4, :8], candidates[:4])
    )
    assert found.equal(others)
    torch.testing.assert_close(bound, other_bound)


def test_best_gain_is_the_best_candidate_by_integrals() -> None:
    """For each of some rows, whose mixtures differ; places, and scales from spikes to deserts."""
    candidates = torch.stack([4 * torch.randn(40), torch.linspace(-3, 1.5, 40)], -1)
    starts = torch.tensor([[-1.2, -0.5], [1.2, -0.3], [0.0, 0.0], [-0.5, 1.0]])
    rows = range(len(starts))
    noise = sample(torch.zeros(1, 2), 200)  # [S, 1]
    own = starts[:, 0] + starts[:, 1].exp() * noise  # [T, rows]
    draws = (candidates[:, 0] + candidates[:, 1].exp() * noise).T  # [C, S]

    def log_q(z: Tensor) -> Tensor:
        return torch.stack([densities(starts[r : r + 1], z[..., r])[..., 0] for r in rows], -1)

    wide = draws.unsqueeze(-1).expand(-1, -1, len(starts))
    at_draws = torch.stack([densities(candidates[c : c + 1], wide[c])[..., 0] for c in range(40)])
    values, found = best_gain(
        (log_target(own), log_target(wide)),
        (log_q(own), log_q(wide)),
        (densities(candidates, own).movedim(-1, 0), at_draws),
    )
    shares = torch.tensor([0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7])
    table = densities(candidates, GRID)
    for row in rows:
        start = densities(starts[row : row + 1], GRID)
        mixed = torch.logaddexp(
            start.unsqueeze(-1) + torch.log1p(-shares), table.unsqueeze(-1) + shares.log()
        )
        terms = mixed.exp() * (log_target(GRID)[:, None, None] - mixed)
        bounds = (terms.sum(0) * 0.01).amax(-1)
        assert bounds[found[row]] > bounds.max() - 0.01
        assert values[row].item() == pytest.approx(bounds[found[row]].item(), abs=0.15)
        assert bounds.max() > bounds.median() + 0.1
