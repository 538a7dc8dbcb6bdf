"""Finds where a NaN or an infinity first arises: the sample site, parameter or data tensor."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor


class NonFiniteError(FloatingPointError):
    """The loss or its gradient is NaN or infinite; the message names where that first arises."""

    @classmethod
    def at(cls, places: Sequence[str], step: str) -> "NonFiniteError":
        """Return the error of a step, with the places that `non_finite` and a site's search found.

        The parameters are unchanged only if each step is checked.
        """
        return cls(
            f"The loss or its gradient is not finite in {step}: "
            f"{'; '.join(places) or 'only the sum overflows'}. "
            "Check the data and scales near 0, lower the learning rate, or set clip_norm; "
            "check_every=1 finds the first such step."
        )


class FirstNonFiniteSite(Messenger):
    """Finds the first sample site with a NaN or an infinity.

    A log-density of -inf is reported only if nothing else is found: a sample may have it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._certain: str | None = None
        self._suspect: str | None = None
        self._replayed: set[str] = set()

    @property
    def first(self) -> str | None:
        """The site and what is not finite there; None if all is finite."""
        return self._certain or self._suspect

    def _pyro_sample(self, msg: Any) -> None:
        # This is the outermost handler and comes last here: a replayed value is there already.
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
    """Return what is not finite at a site; entries under a mask do not count."""
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
    if torch.isfinite(density).all():
        return None
    kinds = {"NaN": density.isnan(), "-inf": density == -torch.inf, "inf": density == torch.inf}
    return f"log_prob is {next(kind for kind, where in kinds.items() if where.any())}"


def _distribution_tensors(fn: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a distribution and of the distributions inside it."""
    for name, value in vars(fn).items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, torch.distributions.Distribution):
            yield from _distribution_tensors(value)


def non_finite(kind: str, tensors: Mapping[str, Any]) -> list[str]:
    """Return the names of the tensors that are not finite."""
    return [
        f"{kind} '{name}'"
        for name, tensor in tensors.items()
        if isinstance(tensor, Tensor) and not torch.isfinite(tensor).all()
    ]


def non_finite_data(batch: Sequence[Any]) -> list[str]:
    """Return the positions of the tensors of a batch that are not finite."""
    return non_finite("data tensor", {str(i): column for i, column in enumerate(batch)})
