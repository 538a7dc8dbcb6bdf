"""Whether a guide with parameters for each row is given the rows that it was given before."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_recursive.tracing.user_warnings import warn_user

COMPARISONS = 3  # of tensors that are not the same object; each waits for the device


@dataclass(frozen=True)
class SeenInputs:
    """The inputs of a guide's first call, None where no more are compared."""

    tensor: Tensor | None
    version: int = 0
    comparisons: int = COMPARISONS

    @classmethod
    def of(cls, inputs: Any) -> "SeenInputs":
        """Return what is compared later."""
        return cls(inputs, _version(inputs)) if isinstance(inputs, Tensor) else cls(None)

    def after(self, inputs: Any, guide: str, plate: str) -> "SeenInputs":
        """Return what is compared later, and warn where the inputs have changed."""
        first = self.tensor
        if first is None or not isinstance(inputs, Tensor):
            return self
        if inputs is first and _version(inputs) == self.version:
            return self
        if inputs.shape[:1] != first.shape[:1]:  # told by the sizes of plates
            return self
        if inputs is not first and _equal(inputs, first):  # a copy
            left = self.comparisons - 1
            return replace(self, comparisons=left) if left else SeenInputs(None)
        warn_user(
            f"{guide} has parameters for each row of plate '{plate}', and its inputs have changed. "
            "For minibatches use fit, MinibatchRows or an encoder; for new data a new guide."
        )
        return SeenInputs(None)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _equal(one: Tensor, other: Tensor) -> bool:
    """Compare values, in the lower of two precisions."""
    if one.shape != other.shape:
        return False
    one = one.to(other.device)
    if one.is_floating_point() and other.is_floating_point():
        dtype = min(one.dtype, other.dtype, key=lambda each: torch.finfo(each).bits)
        one, other = one.to(dtype), other.to(dtype)
    return torch.allclose(one.to(other), other, rtol=0.0, atol=0.0, equal_nan=True)
