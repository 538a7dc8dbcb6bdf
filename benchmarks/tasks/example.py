"""What the examples are made of: a model, its guides, its data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Example:
    """A model with guides by name, all with new parameters, and the arguments of its calls."""

    model: Callable
    guides: Mapping[str, Callable[[], Any]]
    args: tuple = ()
    rate: float = 0.02  # of ClippedAdam
    enumerated: bool = False  # whether a latent is summed out, as TraceEnum_ELBO does
