"""Jensen-Shannon divergences of mixtures: quadrature, limits, and guides of every kind."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import Tensor, nn

from pyro_recursive import AmortizedGuide, MixtureGuide, RecursiveMixtureGuide
from pyro_recursive.evaluation.diversity import Diversity, jensen_shannon, mixture_diversity
from tests.models.guides import of
from tests.models.small import in_rows, normal
from tests.models.small import square_global as square


def of_normals(loc: Tensor, scale: Tensor, weights: Tensor, draws: int) -> Diversity:
    """Estimate for normals ``[*batch, M]``."""
    parts = dist.Normal(loc, scale)
    z = parts.sample((draws,)).movedim(-1, 0)  # [M, S, *batch]
    return jensen_shannon(parts.log_prob(z.unsqueeze(-1)), weights.log())


def by_quadrature(loc: Tensor, scale: Tensor, weights: Tensor) -> Tensor:
    """Return the divergence of a mixture of normals ``[M]``."""
    z = torch.linspace(-30, 30, 6001)
    log_q = dist.Normal(loc, scale).log_prob(z.unsqueeze(-1))
    mixture = (log_q + weights.log()).logsumexp(-1, keepdim=True)
    return (weights * torch.trapezoid(log_q.exp() * (log_q - mixture), z, dim=0)).sum()


# --- Draws


def test_quadrature() -> None:
    loc = torch.tensor([[0.0, 1.0, -2.0], [0.0, 3.0, 3.5]])
    scale = torch.tensor([[1.0, 0.5, 2.0], [0.5, 1.0, 1.0]])
    weights = torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]])
    found = of_normals(loc, scale, weights, 20_000)
    half = torch.tensor([0.5, 0.5])
    for row in range(2):
        exact = by_quadrature(loc[row], scale[row], weights[row])
        assert abs(found.divergence[row] - exact) < 4 * found.error[row] < 0.02
        for i, j in [(0, 1), (0, 2), (1, 2)]:
            pair = [i, j]
            exact = by_quadrature(loc[row, pair], scale[row, pair], half)
            assert abs(found.pairwise[row, i, j] - exact) < 0.02
    assert torch.equal(found.pairwise, found.pairwise.mT)
    torch.testing.assert_close(found.entropy, -(weights * weights.log()).sum(-1))


def test_standard_error_is_honest() -> None:
    loc, weights = torch.tensor([0.0, 1.5]), torch.tensor([0.3, 0.7])
    found = [of_normals(loc, torch.ones(2), weights, 50) for _ in range(200)]
    spread = torch.stack([f.divergence for f in found]).std()
    assert 0.85 < torch.stack([f.error for f in found]).mean() / spread < 1.18


def test_limits() -> None:
    weights = torch.tensor([0.2, 0.5, 0.3])
    same = of_normals(torch.zeros(3), torch.ones(3), weights, 50)
    assert same.divergence.abs() < 1e-12 and same.pairwise.abs().max() < 1e-12
    apart = of_normals(torch.tensor([-100.0, 0.0, 100.0]), torch.ones(3), weights, 50)
    torch.testing.assert_close(apart.divergence, apart.entropy)
    pairs = math.log(2) * (1 - torch.eye(3))
    torch.testing.assert_close(apart.pairwise, pairs)
    # The estimate is never above its bound, however few the draws.
    for _ in range(50):
        few = of_normals(torch.randn(3), torch.rand(3) + 0.1, weights, 2)
        assert few.divergence <= few.entropy and few.pairwise.max() <= math.log(2)


def test_a_component_without_weight_is_left_out() -> None:
    loc, scale = torch.tensor([0.0, 1.0, 50.0]), torch.ones(3)
    found = of_normals(loc, scale, torch.tensor([0.5, 0.5, 0.0]), 5000)
    exact = by_quadrature(loc[:2], scale[:2], torch.tensor([0.5, 0.5]))
    assert abs(found.divergence - exact) < 4 * found.error
    assert found.entropy == pytest.approx(math.log(2))
    assert found.pairwise[0, 2] == pytest.approx(math.log(2))


def test_what_has_no_divergence() -> None:
    for table, weights in (((2, 5, 3), (3,)), ((3, 5, 4, 3), (3,))):
        with pytest.raises(ValueError, match=r"must be \[M, S"):
            jensen_shannon(torch.zeros(table), torch.zeros(weights))
    degenerate = torch.zeros(2, 3, 2)
    degenerate[0, 0, 0] = math.inf
    with pytest.raises(ValueError, match="no finite log-density"):
        jensen_shannon(degenerate, torch.zeros(2))


# --- Guides


@in_rows
def rows(x: Tensor) -> None:
    z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    normal("x", z + w.sum(-1), obs=x[:, 0])


def test_amortized_rows_meet_their_own_densities() -> None:
    x = torch.randn(4, 1)
    guide = MixtureGuide(rows, [AmortizedGuide(rows, nn.Linear(1, 6)) for _ in range(3)])
    for number, component in enumerate(guide.components):
        with torch.no_grad():
            component.encoder.bias.add_(torch.tensor([number, 0, 0, 0.3, 0, 0]))
    state = torch.get_rng_state()
    found = mixture_diversity(guide, x, num_draws=3000)
    assert found.divergence.shape == (4,) and found.pairwise.shape == (4, 3, 3)
    # The other way round: draws by the guide itself, whose component a site tells.
    torch.set_rng_state(state)
    with pyro.poutine.block(), torch.no_grad(), pyro.plate("draws", 8000, dim=-2):
        trace = pyro.poutine.trace(guide).get_trace(x)
    latents, call = guide.groups[0], guide.new_call((x,), {})
    with pyro.poutine.block(), torch.no_grad():
        mixture = guide.posterior(latents, call)
        u = latents.pack({name: trace.nodes[name]["value"] for name in ("z", "w")})
        table = mixture.table(u)
        chosen = trace.nodes["MixtureGuide_component"]["value"]
        excess = table.gather(-1, chosen.unsqueeze(-1)).squeeze(-1) - mixture.log_prob(u)
    difference = (found.divergence - excess.mean(0)).abs()
    error = (found.error.square() + excess.var(0) / 8000).sqrt()
    assert bool((difference < 4 * error).all()) and bool((error < 0.05).all())
    weights = guide.component_weights(x)
    torch.testing.assert_close(found.entropy, -(weights * weights.log()).sum(-1).detach())


def handwritten(x: Tensor) -> None:
    normal("z", pyro.param("m", torch.tensor(5.0)))


def test_components_of_all_kinds_whole_and_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [AmortizedGuide(square), AutoMultivariateNormal(square), handwritten]
    guide = MixtureGuide(square, parts)
    whole = mixture_diversity(guide, torch.tensor(4.0), num_draws=4000)
    assert whole.divergence.shape == () and 0 < whole.divergence <= whole.entropy
    assert whole.entropy.item() == pytest.approx(math.log(3))
    assert 1 < whole.effective_components <= 3
    monkeypatch.setattr("pyro_recursive.evaluation.diversity.CHUNK_ROWS", 900)
    parts = mixture_diversity(guide, torch.tensor(4.0), num_draws=4000)
    error = (whole.error.square() + parts.error.square()).sqrt()
    assert 0 < abs(whole.divergence - parts.divergence) < 4 * error


def test_a_recursive_mixture_has_its_members_alone() -> None:
    guide = RecursiveMixtureGuide(square, 3)
    found = mixture_diversity(guide, torch.tensor(4.0), num_draws=10)
    assert found.pairwise.shape == (1, 1) and found.divergence == 0 == found.entropy
    guide.progress[3:] = torch.tensor([1, 1, 0])
    assert mixture_diversity(guide, torch.tensor(4.0)).pairwise.shape == (2, 2)


def test_global_and_local_mixtures() -> None:
    s, guide = of("hierarchy", "mixture_encoders")
    assert mixture_diversity(guide, *s.args).divergence.shape == (4,)


@pytest.mark.parametrize("guide", [AmortizedGuide(square), handwritten])
def test_other_guides(guide: Any) -> None:
    with pytest.raises(TypeError, match=r"Got \w+: needs a MixtureGuide or"):
        mixture_diversity(guide, torch.ones(()))
    with pytest.raises(ValueError, match="num_draws must be an integer >= 2"):
        mixture_diversity(guide, torch.ones(()), num_draws=1)
