"""Gaussians from the points of paths, and the best of each path by its ELBO.

`Pathfinder: Parallel quasi-Newton variational inference` (Zhang et al., arXiv 2108.03782).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_recursive.guides.log_density import LogDensity
from pyro_recursive.guides.pathfinder.lbfgs import MEMORY, Paths, minimise

RADIUS = 2.0  # of the cube of starts, in unconstrained space
ATTEMPTS = 100  # to find a start with a finite density
DRAWS = 24  # for the ELBO of each point of each path, in pairs of opposites
BEST, DRAWS_OF_BEST = 3, 200  # the best points of a path are compared once more
LARGEST = 200  # length of vectors with a matrix of second derivatives
CHUNK = 2**22  # numbers in the factors of Gaussians that are evaluated at once


@dataclass(frozen=True)
class Gaussians:
    """I Gaussians ``N(loc, L L')`` over vectors: ``[I, D]`` and ``[I, D, D]``."""

    loc: Tensor
    scale_tril: Tensor

    @property
    def log_det(self) -> Tensor:
        """The logarithms of the determinants of the covariances, ``[I]``."""
        return 2 * self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def draw(self, noise: Tensor) -> Tensor:
        """Return draws of each from standard normals ``[n, I, D]``."""
        return self.loc + torch.einsum("iab,nib->nia", self.scale_tril, noise)

    def log_prob(self, u: Tensor) -> Tensor:
        """Return the log-density of each at points ``[n, D]``, ``[n, I]``."""
        centred = (u - self.loc[:, None]).mT  # [I, D, n]
        noise = torch.linalg.solve_triangular(self.scale_tril, centred, upper=False)
        return log_normal(noise.square().sum(-2), self.log_det[:, None], u.shape[-1]).T

    def divergence(self) -> Tensor:
        """Return ``KL(i, j) + KL(j, i)`` of all pairs in nats, ``[I, I]``."""
        size = self.loc.shape[-1]
        identity = torch.eye(size, dtype=self.loc.dtype, device=self.loc.device)
        inverse = torch.linalg.solve_triangular(self.scale_tril, identity, upper=False)
        covariance, precision = self.scale_tril @ self.scale_tril.mT, inverse.mT @ inverse
        trace = torch.einsum("iab,jab->ij", covariance, precision)
        distance = self.loc[:, None] - self.loc
        squared = torch.einsum("ija,iab,ijb->ij", distance, precision, distance)
        return (trace + trace.T + squared + squared.T) / 2 - size

    def __getitem__(self, rows: Tensor | slice) -> "Gaussians":
        return Gaussians(self.loc[rows], self.scale_tril[rows])


class BestOfPaths(NamedTuple):
    """The best Gaussian of each of I paths, and its ELBO in nats, ``[I]``.

    ``is_newton`` are those at the end of a path with the exact second derivatives there.
    """

    gaussians: Gaussians
    elbo: Tensor
    is_newton: Tensor


@dataclass(frozen=True)
class _Factored:
    """B Gaussians with covariances ``diag(scale) (I + Q (C C' - I) Q') diag(scale)``."""

    loc: Tensor  # [B, D]
    scale: Tensor  # [B, D]
    q: Tensor  # [B, D, r], orthonormal columns
    factor: Tensor  # [B, r, r], C

    @property
    def log_det(self) -> Tensor:
        diagonal = self.factor.diagonal(dim1=-2, dim2=-1)
        return 2 * (self.scale.log().sum(-1) + diagonal.log().sum(-1))

    def draw(self, noise: Tensor) -> Tensor:
        """Return a draw of each from the same standard normals ``[n, D]``, ``[n, B, D]``."""
        within = torch.einsum("bdr,nd->nbr", self.q, noise)
        change = torch.einsum("brs,nbs->nbr", self.factor, within) - within
        moved = noise[:, None] + torch.einsum("bdr,nbr->nbd", self.q, change)
        return self.loc + self.scale * moved

    def scale_tril(self) -> Tensor:
        """Return Cholesky factors, ``[B, D, D]``."""
        size = self.factor.shape[-1]
        identity = torch.eye(size, dtype=self.loc.dtype, device=self.loc.device)
        root = self.q @ (self.factor - identity) @ self.q.mT
        root.diagonal(dim1=-2, dim2=-1).add_(1.0)
        upper = torch.linalg.qr((self.scale[..., None] * root).mT).R
        signs = upper.diagonal(dim1=-2, dim2=-1).sign()
        return (signs[..., None] * upper).mT


def log_normal(squared: Tensor, log_det: Tensor, size: int) -> Tensor:
    """Return a Gaussian's log-density from its noise, squared and summed."""
    return -0.5 * (squared + log_det + size * math.log(2 * math.pi))


def find_gaussians(density: LogDensity, num_paths: int, memory: int = MEMORY) -> BestOfPaths:
    """Return the Gaussian with the highest ELBO of each path that has one.

    Candidates are the Gaussians at all points of a path by its pairs, and up to D = 200 that of the
    exact second derivatives at its end. The first are compared by 24 draws, many points in a call
    of the density; the best three of each path (one where D > 200) and the last by 200 more.

    Raises:
        ValueError: no start has a finite density, or no path a Gaussian of a finite ELBO.
    """
    paths = minimise(_Negative(density), random_starts(density, num_paths), memory=memory)
    candidates = _best_points(density, paths)
    if density.size <= LARGEST:
        candidates.append(_newton(density, paths))
    loc, scale_tril, has_covariance = (torch.cat(each) for each in zip(*candidates, strict=True))
    every, has_covariance = Gaussians(loc, scale_tril), has_covariance.reshape(-1, num_paths)
    elbo = elbos(density, every).reshape(has_covariance.shape)
    elbo, best = torch.where(has_covariance, elbo, -math.inf).max(0)
    numbers = torch.arange(num_paths, device=best.device)[elbo.isfinite()]
    if not len(numbers):
        raise ValueError(
            f"None of {num_paths} paths has a Gaussian with a finite ELBO. The density may have no "
            "maximum: check improper priors, or give proper ones."
        )
    elbo, best = elbo[numbers], best[numbers]
    is_newton = (best == len(has_covariance) - 1) & (density.size <= LARGEST)
    return BestOfPaths(every[best * num_paths + numbers], elbo, is_newton)


class _Negative:
    """Minus the log-density and its gradient."""

    def __init__(self, density: LogDensity) -> None:
        self.density = density

    def __call__(self, points: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = self.density.gradient(points)
        return torch.where(value.isfinite(), -value, math.inf), -grad


@torch.no_grad()
def random_starts(density: LogDensity, num_paths: int) -> Tensor:
    """Return uniform points of a cube in float64, near the density's own start where they fail.

    Raises:
        ValueError: the density is finite at none of them.
    """
    start = density.start.reshape(-1).double()
    noise = 2 * torch.rand(num_paths, len(start), dtype=start.dtype, device=start.device) - 1
    found = RADIUS * noise
    wrong = ~density(found).isfinite()
    for attempt in range(ATTEMPTS):
        if not bool(wrong.any()):
            break
        radius = RADIUS * (1 - attempt / ATTEMPTS)
        near = start + radius * (2 * torch.rand_like(found) - 1)
        again = wrong.nonzero().squeeze(-1)
        found[again] = near[again]
        wrong[again] = ~density(found[again]).isfinite()
    if not bool(wrong.all()):
        return found
    if density.num_errors == density.num_values:
        error = density.error_at(found[0])
        raise ValueError(
            f"The model raised at each of {num_paths} starts; the error at the first was: {error}"
        ) from error
    raise ValueError(
        f"The density is not finite at any of {num_paths} starts between -{RADIUS:g} and "
        f"{RADIUS:g} in unconstrained space, nor at {ATTEMPTS} others for each. Look at the "
        "priors, or train a guide that starts at init_loc_fn= values where it is finite."
    )


Candidates = tuple[Tensor, Tensor, Tensor]  # locations, Cholesky factors, and which are covariances


@torch.no_grad()
def _best_points(density: LogDensity, paths: Paths) -> list[Candidates]:
    """Return the Gaussians at the best points of each path; all have the same noise."""
    pairs = _pairs(paths)
    where = (paths.moved & (pairs >= 0).any(-1)).nonzero()
    like = paths.points
    noise = _pairs_of_noise(DRAWS, density.size, like)
    elbo = torch.full_like(paths.values, -math.inf)
    width = density.size * (2 * paths.memory + DRAWS)
    for part in where.split(max(1, CHUNK // width)) if len(where) else ():
        gaussians, has_covariance = _gaussians_at(paths, pairs, *part.unbind(-1))
        each = _elbo(density, gaussians.draw(noise), noise[:, None], gaussians.log_det)
        elbo[tuple(part.unbind(-1))] = torch.where(has_covariance, each, -math.inf)
    count = min(BEST, len(elbo)) if density.size <= LARGEST else 1
    values, steps = elbo.topk(count, dim=0)
    found = []
    for of_path, iterations in zip(values, steps, strict=True):
        number = torch.arange(len(of_path), device=of_path.device)
        gaussians, _ = _gaussians_at(paths, pairs, iterations, number)
        found.append((gaussians.loc, gaussians.scale_tril(), of_path.isfinite()))
    return found


def _pairs(paths: Paths) -> Tensor:
    """Return the iterations of the last pairs at each point, ``[L + 1, I, J]``, -1 for none."""
    count = paths.kept.cumsum(0)
    table = torch.full_like(count, -1, dtype=torch.long)
    iterations, number = paths.kept.nonzero(as_tuple=True)
    table[count[iterations, number] - 1, number] = iterations
    back = torch.arange(paths.memory - 1, -1, -1, device=count.device)
    place = count[..., None] - 1 - back
    columns = torch.arange(count.shape[1], device=count.device)[:, None]
    return torch.where(place >= 0, table[place.clamp(min=0), columns], -1)


def _gaussians_at(
    paths: Paths, pairs: Tensor, iterations: Tensor, number: Tensor
) -> tuple[_Factored, Tensor]:
    """Return the Gaussians at B points of paths, and which of them have a covariance.

    Sigma = diag(a) + V M V',   V = [diag(a) Z, S],   mu = u - Sigma g
    """
    own = pairs[iterations, number]  # [B, J]
    is_pair, last, column = own >= 0, own.clamp(min=1), number[:, None]
    s, z = (
        torch.where(is_pair[..., None], each[last, column] - each[last - 1, column], 0.0)
        for each in (paths.points, paths.gradients)
    )  # [B, J, D]
    a, g = paths.diagonal[iterations, number], paths.gradients[iterations, number]
    products = s @ z.mT
    upper = products.triu() + torch.diag_embed((~is_pair).to(products))
    identity = torch.eye(own.shape[-1], dtype=s.dtype, device=s.device).expand_as(upper)
    inverse = torch.linalg.solve_triangular(upper, identity, upper=True)
    middle = torch.diag_embed(products.diagonal(dim1=-2, dim2=-1)) + (z * a[:, None]) @ z.mT
    corner = inverse.mT @ middle @ inverse
    m = torch.cat(
        [
            torch.cat([torch.zeros_like(inverse), -inverse], -1),
            torch.cat([-inverse.mT, corner], -1),
        ],
        -2,
    )
    v = torch.cat([z * a[:, None], s], 1).mT  # [B, D, 2 J]
    moved = a * g + (v @ (m @ (v.mT @ g[..., None]))).squeeze(-1)
    scale = a.sqrt()
    scaled = v / scale[..., None]
    has_covariance = scaled.isfinite().flatten(1).all(-1) & m.isfinite().flatten(1).all(-1)
    scaled = torch.where(has_covariance[:, None, None], scaled, 0.0)
    m = torch.where(has_covariance[:, None, None], m, 0.0)
    q, r = torch.linalg.qr(scaled)
    inner = r @ m @ r.mT
    inner = (inner + inner.mT) / 2
    inner.diagonal(dim1=-2, dim2=-1).add_(1.0)
    factor, info = torch.linalg.cholesky_ex(inner)
    has_covariance &= info == 0
    unit = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    factor = torch.where(has_covariance[:, None, None], factor, unit)
    loc = torch.where(has_covariance[:, None], paths.points[iterations, number] - moved, 0.0)
    return _Factored(loc, scale, q, factor), has_covariance


def _newton(density: LogDensity, paths: Paths) -> Candidates:
    """Return ``N(u - H^-1 g, H^-1)`` at the ends of the paths, H the exact second derivatives."""
    u = paths.points[-1]
    identity = torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)
    try:
        _, grad, matrix = density.hessian(u)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # an operation without second derivatives
        none = torch.zeros(len(u), dtype=torch.bool, device=u.device)
        return u, identity.expand(len(u), -1, -1), none
    unit = (-matrix.diagonal(dim1=-2, dim2=-1)).rsqrt()
    correlations = -matrix * unit[..., None] * unit[..., None, :]
    inverse, has_covariance = _inverse(correlations)
    factor, info = torch.linalg.cholesky_ex(inverse)
    has_covariance = has_covariance & (info == 0) & grad.isfinite().all(-1)
    factor = torch.where(has_covariance[:, None, None], unit[..., None] * factor, identity)
    step = (factor @ (factor.mT @ grad[..., None])).squeeze(-1)
    return torch.where(has_covariance[:, None], u + step, 0.0), factor, has_covariance


def _inverse(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return inverses, the identity where a matrix is not positive definite, and where it is."""
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    is_finite = matrix.isfinite().flatten(1).all(-1)[:, None, None]
    factor, info = torch.linalg.cholesky_ex(torch.where(is_finite, matrix, identity))
    is_positive = is_finite & (info == 0)[:, None, None]
    inverse = torch.cholesky_inverse(torch.where(is_positive, factor, identity))
    return inverse, is_positive[:, 0, 0]


@torch.no_grad()
def elbos(density: LogDensity, gaussians: Gaussians) -> Tensor:
    """Return ELBOs of Gaussians by 200 draws, all with the same noise."""
    noise = _pairs_of_noise(DRAWS_OF_BEST, density.size, gaussians.loc)[:, None]
    drawn = gaussians.draw(noise.expand(-1, len(gaussians.loc), -1))
    return _elbo(density, drawn, noise, gaussians.log_det)


def _pairs_of_noise(count: int, size: int, like: Tensor) -> Tensor:
    """Return standard normals and their opposites, ``[count, size]``.

    With the covariance I where there are enough of them, so that they have exact means of quadratic
    functions; else with the variances.
    """
    half = torch.randn(count // 2, size, dtype=like.dtype, device=like.device)
    covariance = half.mT @ half / len(half)
    if len(half) < 2 * size:
        covariance = torch.diag_embed(covariance.diagonal())
    factor = torch.linalg.cholesky(covariance)
    half = torch.linalg.solve_triangular(factor, half.mT, upper=False).mT
    return torch.cat([half, -half])


def _elbo(density: Callable[[Tensor], Tensor], u: Tensor, noise: Tensor, log_det: Tensor) -> Tensor:
    """Return means of ``log p - log q`` over draws ``[n, B, D]``, -inf if one is not finite."""
    log_q = log_normal(noise.square().sum(-1), log_det, u.shape[-1])
    return or_minus_inf((density(u) - log_q).mean(0))


def or_minus_inf(values: Tensor) -> Tensor:
    """Return values, -inf where they are not finite."""
    return torch.where(values.isfinite(), values, -math.inf)
