"""Gaussians where a mixture has too little mass, by importance weights of its draws; pure torch."""

import math

import torch
from torch import Tensor

from pyro_recursive.bounds.pareto import psis

ROUNDS = 10  # of EM
SHARE = 0.1  # of a new component, at first
SCALE = 0.5  # of a new component, in standard deviations of the mixture, at first


def missing_gaussians(
    u: Tensor, log_p: Tensor, log_q: Tensor, count: int
) -> tuple[Tensor, Tensor] | None:
    """Return Gaussians that lower ``KL(p || (1 - e) Q + e N)``, ``[C, D]`` and ``[C, D, D]``.

    Each starts at one of the draws ``u`` of Q, ``[S, D]``, by chance in proportion to how far its
    weight ``p / Q``, Pareto-smoothed, exceeds the mean; then some rounds of EM over location,
    Cholesky factor and share e, with Q fixed. With few draws in a Gaussian its covariance is
    between theirs and a part of that of Q. None where no weight exceeds the mean by 10 %, or where
    there are no more draws than coordinates.
    """
    size, total = u.shape[-1], len(u)
    weights = psis(log_p - log_q).log_weights.exp().to(u)
    excess = (total * weights - 1.1).clamp(min=0.0)
    count = min(count, int((excess > 0).sum()))
    if count == 0 or total <= size:
        return None
    loc = u[torch.multinomial(excess, count)]
    centred = u - u.mean(0)
    part = SCALE**2 * centred.mT @ centred / total
    part.diagonal().mul_(1 + 10 * torch.finfo(u.dtype).eps)
    covariance, share = part.expand(count, -1, -1), torch.full_like(loc[:, 0], SHARE)
    for _ in range(ROUNDS):
        factor = torch.linalg.cholesky(covariance)
        noise = torch.linalg.solve_triangular(factor, (u - loc[:, None]).mT, upper=False)
        log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1, keepdim=True)
        log_c = -0.5 * noise.square().sum(-2) - log_det - size / 2 * math.log(2 * math.pi)
        own = weights * torch.sigmoid(torch.logit(share)[:, None] + log_c - log_q)  # [C, S]
        mass = own.sum(-1)
        relative = own / mass[:, None]
        loc = relative @ u
        centred = u - loc[:, None]
        covariance = torch.einsum("cs,csi,csj->cij", relative, centred, centred)
        few = (size + 1) / (1 / relative.square().sum(-1) + size + 1)
        covariance = torch.lerp(covariance, part, few[:, None, None])
        share = mass.clamp(0.01, 0.9)
    return loc, torch.linalg.cholesky(covariance)
