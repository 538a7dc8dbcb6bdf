"""Normals of low rank whose densities keep their digits at any ratio of scales."""

import math
from functools import cached_property
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.distributions.kl import register_kl


class LowRankNormal(TorchDistribution):
    """``N(loc, S (I + B B') S)`` with ``S = diag(exp(log_scale))``, over vectors ``[D]``.

    With ``y = (u - loc) / S`` the quadratic form is that of a least-squares problem,
    ``y' (I + B B')^-1 y = min_w |y - B w|^2 + |w|^2``, and ``I + B' B = R' R`` for the factor R of
    the stacked columns ``[B; I]``. These are made orthonormal one by one, as is y (modified
    Gram-Schmidt), so that no digits are lost to products of B with itself. Columns of ``[B; I]``
    are independent for every B, and gradients exist where those of B are not.

    Args:
        loc: ``[*batch, D]``.
        log_scale: ``[*batch, D]``.
        factor: B, ``[*batch, D, rank]``.
    """

    arg_constraints: ClassVar[dict] = {
        "loc": constraints.real_vector,
        "log_scale": constraints.real_vector,
        "factor": constraints.independent(constraints.real, 2),
    }
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self, loc: Tensor, log_scale: Tensor, factor: Tensor, validate_args: bool | None = None
    ) -> None:
        batch = torch.broadcast_shapes(loc.shape[:-1], log_scale.shape[:-1], factor.shape[:-2])
        self.loc = loc.expand(*batch, -1)
        self.log_scale, self.factor = log_scale, factor  # as they are: decomposed once
        super().__init__(batch, loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "LowRankNormal":
        """Return the normal with another batch shape."""
        loc = self.loc.expand(*batch_shape, -1)
        return LowRankNormal(loc, self.log_scale, self.factor, validate_args=False)

    @property
    def scale(self) -> Tensor:
        """The diagonal of S, ``[*batch, D]``."""
        return self.log_scale.exp()

    @property
    def mean(self) -> Tensor:
        """The location."""
        return self.loc

    @property
    def stddev(self) -> Tensor:
        """The scale of each coordinate, ``[*batch, D]``."""
        stddev = self.scale * (1 + self.factor.square().sum(-1)).sqrt()
        return stddev.expand(self.loc.shape)

    @property
    def variance(self) -> Tensor:
        """The variance of each coordinate, ``[*batch, D]``."""
        return self.stddev.square()

    @property
    def covariance_matrix(self) -> Tensor:
        """The covariance, ``[*batch, D, D]``."""
        return self.scale_tril @ self.scale_tril.mT

    @cached_property
    def scale_tril(self) -> Tensor:
        """The Cholesky factor of the covariance, ``[*batch, D, D]``."""
        scale = self.scale
        roots = torch.cat([scale.diag_embed(), scale.unsqueeze(-1) * self.factor], -1)
        upper = torch.linalg.qr(roots.mT).R
        signs = upper.diagonal(dim1=-2, dim2=-1).sgn().unsqueeze(-1)
        size = self.event_shape[0]
        return (signs * upper).mT.expand(*self.batch_shape, size, size)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw ``loc + S (noise + B noise')``, ``[*sample_shape, *batch, D]``."""
        shape = self._extended_shape(sample_shape)
        like: dict[str, Any] = {"dtype": self.loc.dtype, "device": self.loc.device}
        along = torch.randn(*shape[:-1], self.factor.shape[-1], 1, **like)
        noise = torch.randn(shape, **like)
        return self.loc + self.scale * (noise + (self.factor @ along).squeeze(-1))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density, ``[..., D]`` to ``[...]``."""
        if self._validate_args:
            self._validate_sample(value)
        centred = (value - self.loc) * (-self.log_scale).exp()
        log_volume = self.log_scale.sum(-1) + self._log_det
        constant = 0.5 * self.event_shape[0] * math.log(2 * math.pi)
        return -0.5 * self._squared_norm(centred) - log_volume - constant

    def entropy(self) -> Tensor:
        """Return the entropy in nats, ``[*batch]``."""
        constant = 0.5 * self.event_shape[0] * (1 + math.log(2 * math.pi))
        return (self.log_scale.sum(-1) + self._log_det + constant).expand(self.batch_shape)

    @cached_property
    def _columns(self) -> tuple[list[Tensor], Tensor]:
        """The columns of ``[B; I]`` made orthonormal, and ``log |R|``, ``[*batch]``."""
        rank = self.factor.shape[-1]
        identity = torch.eye(rank, dtype=self.factor.dtype, device=self.factor.device)
        rest = torch.cat([self.factor.mT, identity.expand(*self.factor.shape[:-2], -1, -1)], -1)
        columns, log_det = [], self.factor.new_zeros(())
        for _ in range(rank):
            column = rest[..., :1, :]
            length = column.square().sum(-1, keepdim=True).sqrt()
            column = column / length
            rest = rest[..., 1:, :]
            rest = rest - (rest * column).sum(-1, keepdim=True) * column
            columns.append(column.squeeze(-2))
            log_det = log_det + length.log().squeeze((-2, -1))
        return columns, log_det

    @property
    def _log_det(self) -> Tensor:
        """Half of ``log |I + B B'|``, ``[*batch]``."""
        return self._columns[1]

    def _squared_norm(self, y: Tensor) -> Tensor:
        """Return ``y' (I + B B')^-1 y``, ``[..., D]`` to ``[...]``."""
        rest = torch.nn.functional.pad(y, (0, self.factor.shape[-1]))
        for column in self._columns[0]:
            rest = rest - (rest * column).sum(-1, keepdim=True) * column
        return rest.square().sum(-1)


@register_kl(LowRankNormal, LowRankNormal)
def _kl(p: LowRankNormal, q: LowRankNormal) -> Tensor:
    """Return KL(p || q); the trace of ``cov(q)^-1 cov(p)`` column by column of p's root."""
    size, ratio = p.event_shape[0], (p.log_scale - q.log_scale).exp()
    share = sum(column[..., :size].square() for column in q._columns[0])
    trace = (ratio.square() * (1 - share)).sum(-1)
    for column in p.factor.unbind(-1):
        trace = trace + q._squared_norm(ratio * column)
    mean = q._squared_norm((p.loc - q.loc) * (-q.log_scale).exp())
    log_ratio = (q.log_scale - p.log_scale).sum(-1) + q._log_det - p._log_det
    return 0.5 * (trace - size + mean) + log_ratio
