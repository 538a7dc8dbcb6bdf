"""The densities of all pairs of B vectors and J distributions, by products of matrices.

Broadcasting would take memory for ``J * B * D`` entries, for vectors of length D.
"""

import math
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
import torch.distributions as td
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions.utils import probs_to_logits

_FEW = 16  # entries of an event below which broadcasting is as fast


def normal_pairs(x: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """Return log-densities of diagonal normals in nats, ``[*b, D]`` and ``[J, D]`` to ``[*b, J]``.

    The squares are multiplied out, in float64: float32 would lose up to 0.2 nats where scales are a
    hundredth of locations and D = 50.
    """
    z, loc, scale = x.double(), loc.double(), scale.double()
    precision = scale**-2
    scaled = loc * precision
    square = z**2 @ precision.mT - 2 * (z @ scaled.mT) + (loc * scaled).sum(-1)
    constant = scale.log().sum(-1) + 0.5 * math.log(2 * math.pi) * loc.shape[-1]
    return (-0.5 * square - constant).to(x.dtype)


def bernoulli_pairs(x: Tensor, logits: Tensor) -> Tensor:
    """Return log-probabilities of binary vectors, ``[*b, D]`` and ``[J, D]`` to ``[*b, J]``."""
    return x @ logits.mT - torch.nn.functional.softplus(logits).sum(-1)


# By exact type, as a subclass may have another density.
_KINDS = (td.Bernoulli, dist.Bernoulli, td.Normal, dist.Normal)


def pairwise(fn: Any, dim: int) -> Any:
    """Return a distribution with the same density, by products of matrices where that is faster.

    ``dim`` is that of the data's plate, along which the parameters may be the same.
    """
    if not isinstance(fn, td.Independent) or type(fn.base_dist) not in _KINDS:
        return fn
    enough = fn.event_shape.numel() >= _FEW
    all_there = len(fn.event_shape) == fn.reinterpreted_batch_ndims
    return PairwiseLikelihood(fn, dim) if enough and all_there else fn


class PairwiseLikelihood(TorchDistribution):
    """An `Independent` whose parameters may be the same for all entries of a plate."""

    arg_constraints: ClassVar[dict] = {}

    def __init__(self, fn: Any, dim: int) -> None:
        self.fn, self.dim = fn, dim
        super().__init__(fn.batch_shape, fn.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self.fn.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> "PairwiseLikelihood":
        return PairwiseLikelihood(self.fn.expand(batch_shape), self.dim)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.fn.sample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        possible = value.device.type != "mps" and self._has_rows(value)  # which has no float64
        parameters = self._decoded() if possible else None
        if parameters is None:
            return self.fn.log_prob(value)
        base = self.fn.base_dist
        if base._validate_args and not bool(self.fn.support.check(value).all()):
            raise ValueError(
                f"A value is outside of the support {self.fn.support} of {type(base).__name__}."
            )
        rows = value.reshape(self.batch_shape[self.dim], -1).to(parameters[0])
        others = parameters[0].shape[:-1]
        flat = [parameter.reshape(-1, rows.shape[-1]) for parameter in parameters]
        if isinstance(base, td.Normal):
            table = normal_pairs(rows, *flat)
        elif "probs" in vars(base):
            table = bernoulli_pairs(rows, probs_to_logits(flat[0], is_binary=True))
        else:
            table = bernoulli_pairs(rows, *flat)
        return table.mT.reshape(*others, len(rows)).movedim(-1, self.dim)

    def _has_rows(self, value: Tensor) -> bool:
        """Whether the value has one row for each entry of the plate, and no other batch dims."""
        batch = value.shape[: value.dim() - len(self.event_shape)]
        if len(batch) < -self.dim or len(self.batch_shape) < -self.dim:
            return False
        return 1 < batch.numel() == batch[self.dim] == self.batch_shape[self.dim]

    def _decoded(self) -> list[Tensor] | None:
        """Return the parameters ``[*others, D]``, None where they differ between the entries."""
        base, events = self.fn.base_dist, len(self.event_shape)
        bernoulli = "probs" if "probs" in vars(base) else "logits"
        names = ("loc", "scale") if isinstance(base, td.Normal) else (bernoulli,)
        parameters = [getattr(base, name) for name in names]
        if any(parameter.stride(self.dim - events) != 0 for parameter in parameters):
            return None
        return [_without(parameter, self.dim - events).flatten(-events) for parameter in parameters]


def _without(parameter: Tensor, dim: int) -> Tensor:
    """Return a parameter without a dim along which it was expanded.

    The derivative of a selection would be of the expanded size; that of what was expanded is not.
    There is no public way back from a view to its base.
    """
    one, base = parameter.select(dim, 0), parameter._base
    if base is None or base.numel() != one.numel() or base.data_ptr() != one.data_ptr():
        return one
    return base.reshape(one.shape) if base.is_contiguous() and one.is_contiguous() else one
