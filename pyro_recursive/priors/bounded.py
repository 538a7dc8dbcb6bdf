"""Learned inputs that stay in the range of the data."""

import torch
from torch import Tensor

__all__ = ["bounded", "freed"]

_MARGIN = 0.01  # of the bounds' width: inputs at the very bounds would not learn


def freed(inputs: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    """Return the numbers that `bounded` maps to given inputs.

    Inputs that are within 1% of a bound are moved to 1% from it; those out of bounds raise
    ValueError. Without bounds, the inputs themselves.
    """
    if bounds is None:
        return inputs.clone()
    low, high = bounds
    if not low < high:
        raise ValueError(f"bounds must be (low, high) with low < high, got {(low, high)}")
    if inputs.min() < low or inputs.max() > high:
        raise ValueError(
            f"pseudo_inputs go from {inputs.min():g} to {inputs.max():g}, out of their bounds "
            f"{(low, high)}"
        )
    return ((inputs - low) / (high - low)).clamp(_MARGIN, 1 - _MARGIN).logit()


def bounded(raw: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    """Return the inputs of free numbers, by a sigmoid between the bounds, if there are some."""
    if bounds is None:
        return raw
    low, high = bounds
    return low + (high - low) * torch.sigmoid(raw)
