"""The index of a code as a site that Pyro can enumerate."""

from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution, constraints
from pyro.ops.indexing import Vindex
from torch import Tensor

__all__ = ["CodeIndex"]


class CodeIndex(TorchDistribution):
    """A choice among K with log-weights ``logits`` ``[*batch, K]`` that need not sum to one.

    Its log-density is the log-weight itself: enumerated and summed, K slots give an estimate of a
    sum over many more codes, whose weights say what each stands for. Drawn, they are chosen in
    proportion to their weights.
    """

    arg_constraints: ClassVar[dict] = {}
    has_enumerate_support = True

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        super().__init__(logits.shape[:-1], validate_args=False)

    @property
    def support(self) -> Any:
        """0 to K - 1."""
        return constraints.integer_interval(0, self.logits.shape[-1] - 1)

    @property
    def probs(self) -> Tensor:
        """The normalised weights, ``[*batch, K]``."""
        return self.logits.softmax(-1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "CodeIndex":
        """Return the same choice for a larger batch."""
        return CodeIndex(self.logits.expand(*batch_shape, -1))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw in proportion to the weights."""
        shape = (*sample_shape, *self.batch_shape)
        probs = self.probs.expand(*shape, -1).reshape(-1, self.logits.shape[-1])
        return torch.multinomial(probs, 1).reshape(shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-weight of a slot."""
        return Vindex(self.logits)[..., value]

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return all slots, ``[K, *batch]``, or ``[K, 1, ...]``."""
        slots = torch.arange(self.logits.shape[-1], device=self.logits.device)
        slots = slots.reshape(-1, *[1] * len(self.batch_shape))
        return slots.expand(-1, *self.batch_shape) if expand else slots
