"""Families of Gaussians: covariances by loops, units, former states, and families of a user."""

import copy
from collections import OrderedDict
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_recursive import AmortizedGuide, MixtureGuide, SemiAmortizedGuide
from pyro_recursive.guides.gaussian_families import (
    Diagonal,
    Family,
    Full,
    LowRank,
    family_of,
)

KINDS = {"full": family_of("full"), "low rank": LowRank(2)}


def covariance(kind: str, parameters: Tensor, size: int, is_scaled: bool) -> Tensor:
    """Return the covariance entry by entry; factors in units of the scales, or not."""
    scales = parameters[size : 2 * size].exp()
    rest, factor = iter(parameters[2 * size :]), torch.zeros(size, max(size, 2))
    for row in range(size):
        for column in range(row if kind == "full" else 2):
            factor[row, column] = next(rest) * (scales[row] if is_scaled else 1.0)
        if kind == "full":
            factor[row, row] = scales[row]
    found = factor @ factor.mT
    return found if kind == "full" else found + scales.square().diag()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_covariances(kind: str, size: int) -> None:
    family = KINDS[kind]
    parameters = torch.randn(3, family.num_parameters(size))
    normal = family(parameters, size)
    for row, own in zip(normal.covariance_matrix, parameters, strict=True):
        torch.testing.assert_close(row, covariance(kind, own, size, True))
    noise = torch.eye(family.noise_dim(size))[:, None].expand(-1, 3, -1)
    slopes = family.draw(parameters, size, noise) - parameters[:, :size]  # [n, 3, D]
    torch.testing.assert_close(
        torch.einsum("nbi,nbj->bij", slopes, slopes), normal.covariance_matrix
    )


def scaled(units: Tensor) -> Any:
    """A correlated target, in other units."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(3), units).to_event(1)) / units
        pyro.sample("x", dist.Normal(z[..., 0] * z[..., 1] + z[..., 2], 0.3), obs=torch.tensor(0.7))

    return model


@pytest.mark.parametrize("kind", KINDS)
def test_factors_have_no_unit(kind: str) -> None:
    """In other units of a latent, with its start, gradients of the factor are the same."""
    found = []
    for units in (torch.ones(3), torch.tensor([1e3, 1.0, 1e-2])):
        guide = AmortizedGuide(scaled(units), family=KINDS[kind], name=f"of {units[0]}")
        guide.prepare()
        pyro.set_rng_seed(1)
        start = guide.family.initial(torch.tensor([0.3, -0.2, 0.5]), 0.1)
        start[:3] *= units
        start[3:6] += units.log()
        start[6:] += 0.3 * torch.randn(len(start) - 6)
        parameter = guide.free_global_unconstrained
        parameter.data.copy_(start)
        pyro.set_rng_seed(2)
        pyro.infer.Trace_ELBO(8, vectorize_particles=True).differentiable_loss(
            scaled(units), guide
        ).backward()
        found.append(parameter.grad[6:])
    torch.testing.assert_close(*found)
    assert found[0].abs().min() > 1e-3


# --- Members near a Gaussian


def gaussian(size: int) -> tuple[Tensor, Tensor]:
    root = torch.randn(size, 2 * size)
    return torch.randn(size), torch.linalg.cholesky(root @ root.mT / size)


def kl(member: Any, loc: Tensor, scale_tril: Tensor) -> Tensor:
    own = torch.distributions.MultivariateNormal(member.mean, covariance_of(member))
    other = torch.distributions.MultivariateNormal(loc, scale_tril=scale_tril)
    return torch.distributions.kl_divergence(own, other)


def covariance_of(member: Any) -> Tensor:
    found = getattr(member, "covariance_matrix", None)
    return member.variance.diag_embed() if found is None else found


def test_the_diagonal_member_has_the_least_divergence() -> None:
    loc, factor = gaussian(4)
    params = Diagonal().from_gaussian(loc, factor)
    precision = torch.cholesky_inverse(factor)
    least = kl(Diagonal()(params, 4), loc, factor)
    log_det = 2 * factor.diagonal().log().sum()
    torch.testing.assert_close(least, 0.5 * (log_det + precision.diagonal().log().sum()))
    for _ in range(1000):
        near = params + 0.1 * torch.randn_like(params)
        assert kl(Diagonal()(near, 4), loc, factor) >= least


def test_full_members_are_the_gaussian_and_ranks_come_closer_to_it() -> None:
    loc, factor = gaussian(5)
    full = Full()(Full().from_gaussian(loc, factor), 5)
    torch.testing.assert_close(full.covariance_matrix, factor @ factor.mT)
    torch.testing.assert_close(full.mean, loc)
    families = [Diagonal(), *(LowRank(rank) for rank in (1, 2, 4))]
    found = [kl(family(family.from_gaussian(loc, factor), 5), loc, factor) for family in families]
    assert found == sorted(found, reverse=True)
    # One factor and unit scales, in any units: of rank 1.
    one = torch.tensor([[2.0], [1.0], [-1.0]])
    units = torch.diag(torch.tensor([1e3, 1.0, 1e-2]))
    exact = torch.linalg.cholesky(units @ (torch.eye(3) + one @ one.mT) @ units)
    batch = LowRank(5).from_gaussian(loc[:3].expand(2, -1), exact.expand(2, -1, -1))
    assert batch.shape == (2, 21)  # more factors than dims
    of_rank = LowRank(1)(LowRank(1).from_gaussian(loc[:3], exact), 3)
    variance = LowRank(5)(batch[0], 3).variance
    torch.testing.assert_close(variance, of_rank.variance, atol=0.0, rtol=1e-3)


def test_low_rank_members_are_gaussians_of_their_rank() -> None:
    """Scales are not those of each coordinate given all others."""
    pair = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    loadings = torch.randn(12, 2)
    factors = torch.diag(0.5 + torch.rand(12)) + loadings @ loadings.mT
    for family, covariance in ((LowRank(1), pair), (LowRank(2), factors)):
        loc, factor = torch.zeros(len(covariance)), torch.linalg.cholesky(covariance)
        member = family(family.from_gaussian(loc, factor), len(covariance))
        assert kl(member, loc, factor) < 1e-3
    member = LowRank(1)(LowRank(1).from_gaussian(torch.zeros(2), torch.linalg.cholesky(pair)), 2)
    torch.testing.assert_close(member.covariance_matrix, pair)


def test_low_rank_members_have_the_least_divergence() -> None:
    loc, factor = gaussian(4)
    family = LowRank(1)
    params = family.from_gaussian(loc, factor)
    least = kl(family(params, 4), loc, factor)
    for _ in range(1000):
        near = params + 0.1 * torch.randn_like(params)
        assert kl(family(near, 4), loc, factor) >= least


# --- Densities of low rank


def factors_of(kind: str, size: int) -> Tensor:
    """Return factors of any scale, among them columns that are zero, equal or nearly so."""
    b = torch.randn(size, 3)
    if kind == "equal":
        return 3e3 * b[:, :1].expand(-1, 3)
    if kind == "nearly equal":
        return 3e3 * b[:, :1] + b
    return b * {"zero": torch.zeros(3), "mixed": torch.tensor([3e3, 1.0, 0.0])}[kind]


@pytest.mark.parametrize("kind", ["zero", "mixed", "equal", "nearly equal"])
def test_low_rank_densities_keep_their_digits(kind: str) -> None:
    """In float32 the squared ratio of scales has more digits than there are."""
    size, family = 6, LowRank(3)
    loc, log_scale, b = torch.randn(size), torch.randn(size), factors_of(kind, size)
    params = torch.cat([loc, log_scale, b.flatten()]).requires_grad_()
    root = torch.cat([torch.eye(size), b], 1) * log_scale.exp()[:, None]
    factor = torch.linalg.qr(root.mT).R.mT  # digits are lost to its product with itself
    exact = dist.MultivariateNormal(loc, scale_tril=factor * factor.diagonal().sign())
    u = exact.sample((100,))
    normal = family(params, size)
    torch.testing.assert_close(normal.log_prob(u), exact.log_prob(u))
    torch.testing.assert_close(normal.entropy(), exact.entropy())
    torch.testing.assert_close(normal.scale_tril, exact.scale_tril)
    single = family(params.float(), size).log_prob(u.float())
    torch.testing.assert_close(single.double(), exact.log_prob(u), atol=0.02, rtol=0.0)
    # All derivatives, of the first and second order, also of factors of less than full rank.
    few = torch.cat([loc, log_scale, b.clamp(-3.0, 3.0).flatten()]).requires_grad_()

    def by_covariance(params: Tensor) -> Tensor:
        scale, own = params[size : 2 * size].exp(), params[2 * size :].reshape(size, 3)
        covariance = scale[:, None] * (torch.eye(size) + own @ own.mT) * scale
        return dist.MultivariateNormal(params[:size], covariance).log_prob(loc + 1)

    found = []
    for density in (lambda p: family(p, size).log_prob(loc + 1), by_covariance):
        (grad,) = torch.autograd.grad(density(few), few, create_graph=True)
        found.append(torch.stack([grad, *torch.autograd.grad((grad * u[0, 0]).sin().sum(), few)]))
    torch.testing.assert_close(*found)


def test_divergences_of_low_rank_are_those_of_the_normals() -> None:
    params = torch.randn(2, 5, LowRank(2).num_parameters(4))
    p, q = (LowRank(2)(own, 4) for own in params)
    exact = (dist.MultivariateNormal(of.mean, of.covariance_matrix) for of in (p, q))
    kl_divergence = torch.distributions.kl_divergence
    torch.testing.assert_close(kl_divergence(p, q), kl_divergence(*exact))


# --- States of before


def model(x: Tensor) -> None:
    a = pyro.sample("a", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(a, 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def former(state: Any, **changes: Tensor) -> Any:
    """Return a state as it was written before factors were in units of the scales."""
    old: Any = OrderedDict(state)
    old.update(changes)
    old._metadata = copy.deepcopy(state._metadata)
    for metadata in old._metadata.values():
        metadata["version"] = 1
    return old


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_mixture", [False, True])
def test_former_states_are_converted(kind: str, is_mixture: bool, tmp_path: Any) -> None:
    x, prefix = torch.randn(4, 3), "components.1." if is_mixture else ""
    guide: Any = AmortizedGuide(model, family=KINDS[kind], plate="data")
    if is_mixture:
        guide = MixtureGuide(model, 2, family=KINDS[kind], plate="data")
    guide.prepare(x)
    own = guide.components[1] if is_mixture else guide
    raw = {
        name: torch.randn_like(getattr(own, name))
        for name in ("free_global_unconstrained", "free_local_unconstrained")
    }
    state = former(guide.state_dict(), **{prefix + name: value for name, value in raw.items()})
    torch.save(state, tmp_path / "guide.pt")
    guide.load_state_dict(torch.load(tmp_path / "guide.pt", weights_only=True))
    for name, value in raw.items():
        normal = own.family(getattr(own, name).detach(), 3)
        rows = value.reshape(-1, value.shape[-1])
        found = normal.covariance_matrix.reshape(-1, 3, 3)
        expected = torch.stack([covariance(kind, row, 3, False) for row in rows])
        torch.testing.assert_close(found, expected)
    # The present state is loaded as it is, also where its metadata were lost.
    for present in (guide.state_dict(), dict(guide.state_dict())):
        before = own.free_global.detach().clone()
        guide.load_state_dict(present)
        assert torch.equal(own.free_global, before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_former_encoder_is_refused_and_its_output_converted(kind: str) -> None:
    family, x = KINDS[kind], torch.randn(4, 3)
    encoder = nn.Linear(3, family.num_parameters(3))
    guide = AmortizedGuide(model, encoder, family=family)
    guide.prepare(x)
    with pytest.raises(RuntimeError, match=r"apply family.from_unscaled\(output, size\)"):
        guide.load_state_dict(former(guide.state_dict()))
    outputs = encoder(x).detach()
    normal = family(family.from_unscaled(outputs, 3), 3)
    for row, own in zip(normal.covariance_matrix, outputs, strict=True):
        torch.testing.assert_close(row, covariance(kind, own, 3, False))


# --- Families of a user


class Shared(Family):
    """Normals with one scale for all dims, D + 1 numbers; or a fixed one, D numbers."""

    def __init__(self, learnt: bool) -> None:
        self.learnt = learnt

    def num_parameters(self, size: int) -> int:
        return size + self.learnt

    def _split(self, parameters: Tensor, size: int) -> tuple[Tensor, Tensor]:
        loc, log_scale = parameters[..., :size], parameters[..., size:]
        return loc, log_scale.exp() if self.learnt else torch.full_like(loc[..., :1], 0.5**0.5)

    def __call__(self, parameters: Tensor, size: int) -> Any:
        return dist.Normal(*self._split(parameters, size)).to_event(1)

    def draw(self, parameters: Tensor, size: int, noise: Tensor) -> Tensor:
        loc, scale = self._split(parameters, size)
        return loc + scale * noise

    def initial(self, loc: Tensor, scale: float | Tensor) -> Tensor:
        log_scale = torch.as_tensor(scale).to(loc).log().expand(*loc.shape[:-1], int(self.learnt))
        return torch.cat([loc, log_scale], -1)


def rows_alone(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


@pytest.mark.quick(1)
@pytest.mark.parametrize("learnt", [True, False])
@pytest.mark.parametrize("free", [True, False])
def test_a_family_with_few_numbers_is_refined_to_the_posterior(learnt: bool, free: bool) -> None:
    x, family = torch.randn(5, 3), Shared(learnt)
    base = AmortizedGuide(
        rows_alone,
        None if free else nn.Linear(3, family.num_parameters(3)),
        family=family,
        plate="data",
    )
    guide = SemiAmortizedGuide(rows_alone, base)
    found = guide.refine(x, steps=300)
    evidence = dist.Normal(0.0, 2**0.5).log_prob(x).sum(-1)  # the posterior is N(x / 2, 1 / 2)
    torch.testing.assert_close(found.elbo, evidence, atol=1e-3, rtol=0.0)
    torch.testing.assert_close(found.params[:, :3], x / 2, atol=0.01, rtol=0.0)
