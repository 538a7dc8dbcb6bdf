"""Finds where a NaN or an infinity first arises: the sample site, parameter or data tensor."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

__all__ = ["FirstNonFiniteSite", "NonFiniteError", "message_of", "non_finite", "non_finite_data"]


class NonFiniteError(FloatingPointError):
    """The loss or its gradient is NaN or infinite; the message says where that first appears."""


class FirstNonFiniteSite(Messenger):
    """Notes the first sample site at which something is NaN or infinite.

    A log-density of -inf is legal for some of many samples: it is blamed if nothing else is.
    """

    def __init__(self) -> None:
        """Start with nothing found."""
        super().__init__()
        self._certain: str | None = None
        self._suspect: str | None = None
        self._replayed: set[str] = set()

    @property
    def first(self) -> str | None:
        """Where and what it is, None for nowhere."""
        return self._certain or self._suspect

    def _pyro_sample(self, msg: Any) -> None:
        # As the outermost handler it comes last here: what is done by now was replayed.
        replayed = msg["done"] or msg["is_observed"]
        (self._replayed.add if replayed else self._replayed.discard)(msg["name"])

    def _pyro_post_sample(self, msg: Any) -> None:
        if self._certain is None and not site_is_subsample(msg):
            fault = _fault(msg)
            program = "model" if msg["name"] in self._replayed else "guide"
            place = f"{program} site '{msg['name']}', its {fault}"
            if fault and fault.endswith("-inf"):
                self._suspect = self._suspect or place
            elif fault:
                self._certain = place


def _fault(site: Any) -> str | None:
    """Say what is not finite at a site; what a mask hides does not count."""
    mask = site["mask"]
    if mask is None or mask is True:
        for name, parameter in _distribution_tensors(site["fn"]):
            if parameter.isnan().any():
                return f"distribution parameter '{name}' is NaN"
        if not torch.isfinite(site["value"]).all():
            return "value is NaN or infinite" + " (data)" * site["is_observed"]
    if mask is False:
        return None
    density = torch.as_tensor(site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"]))
    if isinstance(mask, Tensor):
        density = torch.where(mask, density, 0.0)
    return None if torch.isfinite(density).all() else f"log_prob is {_worst(density)}"


def _distribution_tensors(fn: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that a distribution, or what it wraps, holds."""
    for name, value in vars(fn).items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, torch.distributions.Distribution):
            yield from _distribution_tensors(value)


def _worst(values: Tensor) -> str:
    if values.isnan().any():
        return "NaN"
    return "-inf" if (values < 0).logical_and(values.isinf()).any() else "inf"


def non_finite(kind: str, tensors: Mapping[str, Any]) -> list[str]:
    """Name the tensors that are not finite."""
    return [
        f"{kind} '{name}'"
        for name, tensor in tensors.items()
        if isinstance(tensor, Tensor) and not torch.isfinite(tensor).all()
    ]


def non_finite_data(batch: Sequence[Any]) -> list[str]:
    """Name the tensors of a batch that are not finite, by their place."""
    return non_finite("data tensor", {str(number): column for number, column in enumerate(batch)})


def message_of(places: Sequence[str], step: str) -> str:
    """Say in which step something is not finite, where, and what to do about it."""
    return (
        f"The loss or its gradient is not finite in {step}. "
        f"First NaN or infinity: {'; '.join(places) or 'only the sum overflows'}. "
        "Clean or mask the data if the cause is there; else lower the learning rate, set "
        "clip_norm, or keep scales away from 0. With check_every=1 no parameter has changed in "
        "this step; without, the cause may lie some steps back."
    )
