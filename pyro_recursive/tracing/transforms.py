"""Bijections from the real line: torch's, made right in float32, and the circle.

Torch has ``log |dz / du|`` and the inverse of simplices and correlation matrices from differences
of numbers close to 1, which are infinite or NaN a few units from the origin; here they are computed
from their input in logarithms. Values that are rounded stay off the bounds of intervals.
"""

import math
from typing import Any

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints, transforms
from torch.distributions.utils import tril_matrix_to_vec, vec_to_tril_matrix

PERIOD = 2 * math.pi


class CircleTransform(Transform):
    """From the real line to the angles of one period: ``pi tanh(u / 2)``.

    The inverse takes any angle, modulo 2 pi.
    """

    domain = constraints.real
    codomain = constraints.interval(-math.pi, math.pi)
    bijective, sign = True, 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CircleTransform)

    __hash__ = Transform.__hash__

    def _call(self, x: Tensor) -> Tensor:
        return math.pi * torch.tanh(x / 2)

    def _inverse(self, y: Tensor) -> Tensor:
        inside = torch.remainder(y + math.pi, PERIOD) / PERIOD
        return torch.logit(inside, torch.finfo(y.dtype).eps)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return math.log(PERIOD) + F.logsigmoid(x) + F.logsigmoid(-x)


class StickBreaking(transforms.StickBreakingTransform):
    """``y_k = s(x_k) prod_(j < k) s(-x_j)`` with s the logistic function: shares of the rest."""

    def _call(self, x: Tensor) -> Tensor:
        x = x - self._offset(x)
        rest = F.logsigmoid(-x).cumsum(-1)
        log_y = F.pad(F.logsigmoid(x), [0, 1]) + F.pad(rest, [1, 0])
        info = torch.finfo(x.dtype)
        return log_y.exp().clamp(info.tiny, 1 - info.eps)

    def _inverse(self, y: Tensor) -> Tensor:
        y = y.clamp_min(torch.finfo(y.dtype).tiny)
        rest = y.flip(-1).cumsum(-1).flip(-1)[..., 1:]
        x = y[..., :-1].log() - rest.log()
        return x + self._offset(x)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        x = x - self._offset(x)
        lengths = torch.arange(x.shape[-1], 0, -1, dtype=x.dtype, device=x.device)
        return (F.logsigmoid(x) + lengths * F.logsigmoid(-x)).sum(-1)

    def _offset(self, x: Tensor) -> Tensor:
        return torch.arange(x.shape[-1], 0, -1, dtype=x.dtype, device=x.device).log()


class CorrCholesky(transforms.CorrCholeskyTransform):
    """``L_ij = tanh(x_ij) prod_(k < j) sech(x_ik)`` below the diagonal."""

    def _call(self, x: Tensor) -> Tensor:
        tanh = vec_to_tril_matrix(x.tanh(), diag=-1)
        before = vec_to_tril_matrix(_log_sech(x), diag=-1).cumsum(-1).roll(1, -1)
        before[..., 0] = 0
        identity = torch.eye(tanh.shape[-1], dtype=x.dtype, device=x.device)
        return (tanh + identity) * before.exp().clamp_min(torch.finfo(x.dtype).tiny)

    def _inverse(self, y: Tensor) -> Tensor:
        after = y.square().flip(-1).cumsum(-1).flip(-1).roll(-1, -1)
        after = tril_matrix_to_vec(after, diag=-1).clamp_min(torch.finfo(y.dtype).tiny)
        return torch.asinh(tril_matrix_to_vec(y, diag=-1) / after.sqrt())

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor, intermediates: Any = None) -> Tensor:
        size = y.shape[-1]
        row, column = torch.tril_indices(size, size, -1, device=x.device)
        return ((row - column + 1) * _log_sech(x)).sum(-1)


def _log_sech(x: Tensor) -> Tensor:
    return math.log(2.0) - x.abs() - F.softplus(-2 * x.abs())


class Bounded(transforms.ComposeTransform):
    """A bijection onto an interval or half-line whose values stay off the bounds when rounded.

    In finite precision ``a + (b - a) s(x)`` reaches b, where the density of ``Uniform(a, b)`` is 0.
    """

    def __init__(self, transform: Transform, support: Any) -> None:
        super().__init__([transform])
        self.lower: Any = getattr(support, "lower_bound", None)
        self.upper: Any = getattr(support, "upper_bound", None)

    def __call__(self, x: Tensor) -> Tensor:
        """Return values next to a bound in place of those on it or beyond; derivatives stay."""
        y = super().__call__(x)
        inside = y.detach()
        if self.lower is not None:
            inside = inside.max(_next(self.lower, inside, math.inf))
        if self.upper is not None:
            inside = inside.min(_next(self.upper, inside, -math.inf))
        return y + (inside - y.detach()).nan_to_num(0.0)  # an overflow stays one


def _next(bound: Tensor | float, like: Tensor, end: float) -> Tensor:
    """Return the number after a bound on the way to ``end``."""
    start = bound.detach().to(like) if isinstance(bound, Tensor) else like.new_full((), bound)
    return start.nextafter(torch.full_like(start, end))


def bijection(support: Any) -> Transform:
    """Return `biject_to` of a support with the transforms of this module in place of torch's."""
    match support:
        case constraints.independent():
            base = bijection(support.base_constraint)
            return transforms.IndependentTransform(base, support.reinterpreted_batch_ndims)
        case constraints.cat():
            parts = [bijection(part) for part in support.cseq]
            return transforms.CatTransform(parts, support.dim, support.lengths)
        case constraints.stack():
            return transforms.StackTransform(
                [bijection(part) for part in support.cseq], support.dim
            )
        case constraints.simplex:
            return StickBreaking()
        case constraints.corr_cholesky:
            return CorrCholesky()
        case dist.constraints.corr_matrix:
            return transforms.ComposeTransform([CorrCholesky(), *biject_to(support).parts[1:]])
    if hasattr(support, "lower_bound") or hasattr(support, "upper_bound"):
        return Bounded(biject_to(support), support)
    return biject_to(support)
