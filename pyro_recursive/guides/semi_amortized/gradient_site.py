"""A gradient that a guide adds to whatever loss it is used with."""

from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

__all__ = ["GradientSite"]


class GradientSite(TorchDistribution):
    """A site with density 1 and the gradient of minus a term: a loss that adds -log q climbs it."""

    arg_constraints: ClassVar[dict] = {}
    support = constraints.real
    has_rsample = True

    def __init__(self, term: Tensor) -> None:
        self.term = term
        super().__init__(term.shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "GradientSite":
        """Expand the term."""
        return GradientSite(self.term.expand(batch_shape))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Return zeros: the value means nothing."""
        return self.term.new_zeros(torch.Size(sample_shape) + self.batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return zeros, with a gradient."""
        return self.term.detach() - self.term
