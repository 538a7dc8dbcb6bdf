"""Whether two results are the same to the last bit."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor


def same(one: Any, other: Any, skip: Collection[str] = ("seconds",)) -> bool:
    """Compare nested containers bit for bit, all but entries of some names: durations."""
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        keys = [key for key in one if key not in skip]
        return one.keys() == other.keys() and all(same(one[k], other[k], skip) for k in keys)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other
