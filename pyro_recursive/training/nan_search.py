"""Finds where a NaN or an infinity first arises: the sample site, parameter or data tensor."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor


class NonFiniteError(FloatingPointError):
    """The loss or its gradient is NaN or infinite; the message names where that first arises."""


class FirstNonFiniteSite(Messenger):
    """Finds the first sample site with a NaN or an infinity; ``first`` names it, None if none has.

    A log-density of -inf is reported only if nothing else is found: a sample may have it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first: str | None = None
        self._replayed: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        # This is the outermost handler and comes last here: a replayed value is there already.
        replayed = msg["done"] or msg["is_observed"]
        (self._replayed.add if replayed else self._replayed.discard)(msg["name"])

    def _pyro_post_sample(self, msg: Any) -> None:
        is_open = self.first is None or self.first.endswith("-inf")
        fault = _fault(msg) if is_open and not site_is_subsample(msg) else None
        if fault and (self.first is None or not fault.endswith("-inf")):
            program = "model" if msg["name"] in self._replayed else "guide"
            self.first = f"{program} site '{msg['name']}', its {fault}"


def _fault(site: Any) -> str | None:
    """Return what is not finite at a site; entries under a mask do not count."""
    mask = site["mask"]
    if mask is False:
        return None
    if mask is None or mask is True:
        for name, parameter in _distribution_tensors(site["fn"]):
            if parameter.isnan().any():
                return f"distribution parameter '{name}' is NaN"
        if not torch.isfinite(site["value"]).all():
            return "value is NaN or infinite" + " (data)" * site["is_observed"]
    density = torch.as_tensor(site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"]))
    if isinstance(mask, Tensor):
        density = torch.where(mask, density, 0.0)
    kinds = {"NaN": density.isnan(), "-inf": density == -torch.inf, "inf": density == torch.inf}
    return next((f"log_prob is {kind}" for kind, where in kinds.items() if where.any()), None)


def _distribution_tensors(fn: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a distribution and of the distributions inside it."""
    for name, value in vars(fn).items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, torch.distributions.Distribution):
            yield from _distribution_tensors(value)


def non_finite(kind: str, tensors: Mapping[Any, Any]) -> list[str]:
    """Return the names of the tensors that are not finite."""
    return [
        f"{kind} '{name}'"
        for name, tensor in tensors.items()
        if isinstance(tensor, Tensor) and not torch.isfinite(tensor).all()
    ]
