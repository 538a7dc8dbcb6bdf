"""Families of distributions over an unconstrained vector: parameters in, a distribution out."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Independent

from pyro_recursive.guides.low_rank_normal import LowRankNormal

ROUNDS = 20  # of scales and factors of the low-rank member closest to a Gaussian
LEAST_SHARE = 1e-6  # of a coordinate's conditional variance that its own variance keeps


class Family(ABC):
    """A family of Gaussians over vectors of any length D, given by a vector of parameters.

    The first D are locations, the next D logarithms of scales.
    """

    @abstractmethod
    def num_parameters(self, size: int) -> int:
        """Return the number of parameters of a member over vectors of length ``size``."""

    @abstractmethod
    def __call__(self, parameters: Tensor, size: int) -> dist.TorchDistribution:
        """Return the member: ``[*batch, num_parameters]`` to batch ``[*batch]``, event ``[D]``."""

    def noise_dim(self, size: int) -> int:
        """Return the number of standard normals of a draw."""
        return size

    def draw(self, parameters: Tensor, size: int, noise: Tensor) -> Tensor:
        """Return draws from noise: ``[*batch, P]`` and ``[..., *batch, n]`` to ``[..., D]``."""
        raise NotImplementedError(f"{type(self).__name__} does not define draw().")

    def initial(self, loc: Tensor, scale: float | Tensor) -> Tensor:
        """Return the parameters of ``N(loc, scale ** 2 I)``, ``[*batch, D]`` to ``[*batch, P]``."""
        log_scale = torch.as_tensor(scale).to(loc).log().expand_as(loc)
        rest = self.num_parameters(loc.shape[-1]) - 2 * loc.shape[-1]
        return torch.cat([loc, log_scale, loc.new_zeros(*loc.shape[:-1], rest)], -1)

    def from_gaussian(self, loc: Tensor, scale_tril: Tensor) -> Tensor:
        """Return the parameters of a member close to ``N(loc, L L')``, ``[*batch, P]``.

        The one with the least KL(member || N) where the family has a closed form for it; ``loc`` is
        ``[*batch, D]``, the Cholesky factor L ``[*batch, D, D]``.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define from_gaussian().")

    def from_unscaled(self, parameters: Tensor, size: int) -> Tensor:
        """Return parameters from those whose factors were not in units of the scales.

        States of version 1, and encoders trained with it, have such factors.
        """
        return parameters


@dataclass(frozen=True)
class Diagonal(Family):
    """Independent normals: D locations, D logarithms of scales."""

    def num_parameters(self, size: int) -> int:
        """Return 2 D."""
        return 2 * size

    def __call__(self, parameters: Tensor, size: int) -> dist.TorchDistribution:
        """Return the normals with their dims as event."""
        loc, log_scale = parameters.split(size, -1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)

    def from_gaussian(self, loc: Tensor, scale_tril: Tensor) -> Tensor:
        """Return the normals with the variances of each coordinate given all others."""
        return torch.cat([loc, _conditional_scale(scale_tril).log()], -1)

    def draw(self, parameters: Tensor, size: int, noise: Tensor) -> Tensor:
        """Return ``loc + scale * noise``."""
        loc, log_scale = parameters.split(size, -1)
        return loc + log_scale.exp() * noise


@dataclass(frozen=True)
class LowRank(Family):
    """Covariance ``diag(scale) (I + B B') diag(scale)``, with B of ``rank`` columns.

    D locations, D logarithms of scales, and B row by row, without a unit as the logarithms are.
    """

    rank: int

    def num_parameters(self, size: int) -> int:
        """Return (2 + rank) D."""
        return (2 + self.rank) * size

    def initial(self, loc: Tensor, scale: float | Tensor) -> Tensor:
        """Return parameters of about ``N(loc, scale ** 2 I)``; zero factors have no gradient."""
        factors = 0.1 * torch.randn(*loc.shape, self.rank).to(loc)
        return torch.cat([Diagonal().initial(loc, scale), factors.flatten(-2)], -1)

    def from_gaussian(self, loc: Tensor, scale_tril: Tensor) -> Tensor:
        """Return the member with the least KL(member || N), to the precision of a few rounds.

        Given the scales, the best B are the eigenvectors of the covariance in their units with
        variances most above 1. Given ``F = diag(scale) B``, the squared scales are brought closer
        to the optimum, where coordinates given all others have the variances that N has.
        """
        conditional = _conditional_scale(scale_tril)
        size, rank = loc.shape[-1], min(self.rank, loc.shape[-1])
        scale = conditional
        for last in (False,) * ROUNDS + (True,):
            root = scale_tril / scale.unsqueeze(-1)
            variances, vectors = torch.linalg.eigh(root @ root.mT)
            vectors = vectors[..., size - rank :]
            excess = (variances[..., None, size - rank :] - 1).clamp(min=0.0)
            if not last:  # the share is that of a coordinate's precision without the factors
                share = 1 - (vectors.square() * excess / (1 + excess)).sum(-1)
                scale = conditional * share.clamp(min=LEAST_SHARE).sqrt()
        factors = loc.new_zeros(*loc.shape, self.rank)
        factors[..., :rank] = vectors * excess.sqrt()
        return torch.cat([loc, scale.log(), factors.flatten(-2)], -1)

    def from_unscaled(self, parameters: Tensor, size: int) -> Tensor:
        """Divide the rows of F by the scales, to ``F = diag(scale) B``."""
        loc, log_scale, factor = parameters.split([size, size, self.rank * size], -1)
        rows = factor.unflatten(-1, (size, self.rank)) / log_scale.exp().unsqueeze(-1)
        return torch.cat([loc, log_scale, rows.flatten(-2)], -1)

    def __call__(self, parameters: Tensor, size: int) -> dist.TorchDistribution:
        """Return the low-rank normal."""
        return LowRankNormal(*self._split(parameters, size))

    def noise_dim(self, size: int) -> int:
        """Return D + rank."""
        return size + self.rank

    def draw(self, parameters: Tensor, size: int, noise: Tensor) -> Tensor:
        """Return ``loc + scale * (noise + B noise')``, with noise of its own for the columns."""
        loc, log_scale, factor = self._split(parameters, size)
        along = (factor @ noise[..., size:, None]).squeeze(-1)
        return loc + log_scale.exp() * (noise[..., :size] + along)

    def _split(self, parameters: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return locations, logarithms of scales, and B."""
        loc, log_scale, factor = parameters.split([size, size, self.rank * size], -1)
        return loc, log_scale, factor.unflatten(-1, (size, self.rank))


@dataclass(frozen=True)
class Full(Family):
    """Any covariance, by its Cholesky factor ``L = diag(scale) U`` with a unit diagonal of U.

    D locations, D logarithms of scales, and the entries of U below the diagonal, row by row. They
    have no unit, so that a step of an optimiser moves them alike at all scales of the posterior.
    """

    def num_parameters(self, size: int) -> int:
        """Return D + D (D + 1) / 2."""
        return size + size * (size + 1) // 2

    def __call__(self, parameters: Tensor, size: int) -> dist.TorchDistribution:
        """Return the normal with that Cholesky factor."""
        loc, factor = self._split(parameters, size)
        return dist.MultivariateNormal(loc, scale_tril=factor)

    def draw(self, parameters: Tensor, size: int, noise: Tensor) -> Tensor:
        """Return ``loc + L noise``."""
        loc, factor = self._split(parameters, size)
        return loc + (factor @ noise.unsqueeze(-1)).squeeze(-1)

    def _split(self, parameters: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Return locations and ``L``."""
        loc, log_scale, below = parameters.split([size, size, size * (size - 1) // 2], -1)
        rows, columns = torch.tril_indices(size, size, -1, device=parameters.device)
        factor = torch.diag_embed(torch.ones_like(log_scale))
        factor[..., rows, columns] = below
        return loc, log_scale.exp().unsqueeze(-1) * factor

    def from_gaussian(self, loc: Tensor, scale_tril: Tensor) -> Tensor:
        """Return the parameters of this Gaussian."""
        scale, size = scale_tril.diagonal(dim1=-2, dim2=-1), loc.shape[-1]
        rows, columns = torch.tril_indices(size, size, -1, device=loc.device)
        below = scale_tril[..., rows, columns] / scale[..., rows]
        return torch.cat([loc, scale.log(), below], -1)

    def from_unscaled(self, parameters: Tensor, size: int) -> Tensor:
        """Divide the rows of L by its diagonal."""
        loc, log_scale, below = parameters.split([size, size, size * (size - 1) // 2], -1)
        rows, _ = torch.tril_indices(size, size, -1, device=parameters.device)
        return torch.cat([loc, log_scale, below / log_scale[..., rows].exp()], -1)


def scale_tril_of(gaussian: Any) -> Tensor:
    """Return the Cholesky factor of a Gaussian's covariance, ``[*batch, D, D]``."""
    if isinstance(gaussian, Independent):
        return gaussian.stddev.diag_embed()
    return gaussian.scale_tril


def _conditional_scale(scale_tril: Tensor) -> Tensor:
    """Return the scale of each coordinate given all others, ``[*batch, D]``."""
    size = scale_tril.shape[-1]
    identity = torch.eye(size, dtype=scale_tril.dtype, device=scale_tril.device)
    inverse = torch.linalg.solve_triangular(scale_tril, identity, upper=False)
    return inverse.square().sum(-2).rsqrt()


FamilyName = Literal["diagonal", "full"]
FAMILIES = {"diagonal": Diagonal(), "full": Full()}


def family_of(family: FamilyName | Family) -> Family:
    """Return a family by name, or the one given; raise ValueError for an unknown name."""
    if isinstance(family, Family):
        return family
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {sorted(FAMILIES)} or LowRank(2), got {family!r}.")
    return FAMILIES[family]
