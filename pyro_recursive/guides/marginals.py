"""Log-densities of packed vectors over some of their entries, the others integrated out.

A guide's density has to leave out what the model masks. ``keep`` is ``[*batch, D]``, True for the
entries whose density counts.
"""

import math
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent, LowRankMultivariateNormal, MultivariateNormal

from pyro_recursive.guides.low_rank_normal import LowRankNormal

# The log-scale of a normal whose log-density is 0 at its mean.
LOG_NEUTRAL = -0.5 * math.log(2 * math.pi)


def log_density(distribution: Any, u: Tensor, keep: Tensor | None) -> Tensor:
    """Return the log-density of the entries of ``u`` to keep, None for all: ``[*batch]``."""
    return distribution.log_prob(u) if keep is None else kept_log_density(distribution, u, keep)


@singledispatch
def kept_log_density(distribution: Any, u: Tensor, keep: Tensor) -> Tensor:
    """Return the log-density of the entries to keep; here of all or none in each row."""
    whole = keep[..., 0]
    if bool((keep != keep[..., :1]).any()):
        raise NotImplementedError(
            f"Some latents of a row are masked or given, and {type(distribution).__name__} has no "
            "density of the others alone. Use AmortizedGuide or MixtureGuide."
        )
    return torch.where(whole, distribution.log_prob(u), 0.0)


@kept_log_density.register
def _independent(distribution: Independent, u: Tensor, keep: Tensor) -> Tensor:
    base = distribution.base_dist
    if base.event_shape or distribution.reinterpreted_batch_ndims != 1:
        return kept_log_density.dispatch(object)(distribution, u, keep)
    return torch.where(keep, base.log_prob(u), 0.0).sum(-1)


@kept_log_density.register
def _low_rank(distribution: LowRankNormal, u: Tensor, keep: Tensor) -> Tensor:
    """Replace the entries left out by independent normals with a log-density of 0."""
    loc = torch.where(keep, distribution.loc, u)
    log_scale = torch.where(keep, distribution.log_scale, LOG_NEUTRAL)
    factor = torch.where(keep.unsqueeze(-1), distribution.factor, 0.0)
    return LowRankNormal(loc, log_scale, factor, validate_args=False).log_prob(u)


@kept_log_density.register
def _low_rank_of_pyro(distribution: LowRankMultivariateNormal, u: Tensor, keep: Tensor) -> Tensor:
    """Do the same, with the factor in units of the scales."""
    log_scale = 0.5 * distribution.cov_diag.log()
    factor = distribution.cov_factor * (-log_scale).exp().unsqueeze(-1)
    return _low_rank(LowRankNormal(distribution.loc, log_scale, factor), u, keep)


@kept_log_density.register
def _full(distribution: MultivariateNormal, u: Tensor, keep: Tensor) -> Tensor:
    """Do the same; the Cholesky factor R' of the rows that stay comes from a QR decomposition."""
    rows = torch.where(keep.unsqueeze(-1), distribution.scale_tril, 0.0)
    neutral = torch.diag_embed(torch.where(keep, 0.0, math.exp(LOG_NEUTRAL)).to(rows))
    neutral = neutral.expand(rows.shape)
    upper = torch.linalg.qr(torch.cat([rows, neutral], -1).mT).R
    difference = torch.where(keep, u - distribution.loc, 0.0).unsqueeze(-1)
    shape = torch.broadcast_shapes(upper.shape[:-2], difference.shape[:-2])
    lower = upper.mT.expand(*shape, *upper.shape[-2:])
    solved = torch.linalg.solve_triangular(lower, difference.expand(*shape, -1, 1), upper=False)
    log_scale = upper.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
    constant = 0.5 * u.shape[-1] * math.log(2 * math.pi)
    return -0.5 * solved.square().sum((-2, -1)) - log_scale - constant
