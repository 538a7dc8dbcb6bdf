"""A posterior with draws to compare with, and how far other draws are away from these."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from scipy.stats import wasserstein_distance
from torch import Tensor

Values = dict[str, Tensor]
Model = Callable[[], None]
DIRECTIONS = 50  # of the sliced distance


@dataclass(frozen=True)
class Scores:
    """How far draws are away, with parameters in units of the reference's standard deviations.

    ``mean`` and ``sd`` are ``|mean error| / sd`` and ``|log ratio of sds|``, the largest of all
    parameters and the median, ``wasserstein`` the largest 1-Wasserstein distance of a parameter,
    ``sliced`` the mean of that distance over random directions in the space of all parameters.
    """

    mean: tuple[float, float]
    sd: tuple[float, float]
    wasserstein: float
    sliced: float

    @property
    def error(self) -> float:
        """The largest of all errors of means and standard deviations."""
        return max(self.mean[0], self.sd[0])


@dataclass(frozen=True)
class Posterior:
    """A model, reference draws ``[S, *shape]`` by parameter, and the parameters of its latents.

    ``parameters`` maps draws of the latents to those of the reference's parameters.
    ``log_evidence`` is known by quadrature, or None; ``mode_of`` tells in which of ``modes`` modes
    of equal mass each draw of the latents lies.
    """

    name: str
    model: Model
    reference: Values
    parameters: Callable[[Values], Values]
    log_evidence: float | None = None
    modes: int = 1
    mode_of: Callable[[Values], Tensor] | None = None

    def errors(self, draws: Values) -> tuple[float, float]:
        """Return the largest errors of means and of standard deviations, as in `Scores`."""
        found = self.scores(draws, directions=0)
        return found.mean[0], found.sd[0]

    def scores(
        self, draws: Values, log_weights: Tensor | None = None, directions: int = DIRECTIONS
    ) -> Scores:
        """Compare draws ``[S, *shape]`` of the latents, or weighted ones, with the reference."""
        return self._scores(self._standardised(self.parameters(draws)), log_weights, directions)

    def covered(self, draws: Values) -> int:
        """Return how many modes have at least a tenth of their share of the draws."""
        if self.mode_of is None:
            return 1
        share = torch.bincount(self.mode_of(draws), minlength=self.modes) / len(self.mode_of(draws))
        return int((share >= 0.1 / self.modes).sum())

    @cached_property
    def floor(self) -> float:
        """The sliced distance between the two halves of the reference draws."""
        first, second = self._standardised(self.reference).chunk(2)
        return _sliced(first, second, None, DIRECTIONS)

    def _scores(self, own: Tensor, log_weights: Tensor | None, directions: int) -> Scores:
        reference = self._standardised(self.reference)
        weights = None if log_weights is None else log_weights.double().softmax(0)
        w = weights if weights is not None else own.new_full(own.shape[:1], 1 / len(own))
        mean = w @ own
        means = mean.abs()
        sds = (w @ (own - mean).square()).sqrt().log().abs()
        return Scores(
            (means.max().item(), means.median().item()),
            (sds.max().item(), sds.median().item()),
            max(_distances(own, reference, weights)) if directions else 0.0,
            _sliced(own, reference, weights, directions) if directions else 0.0,
        )

    def _standardised(self, values: Values) -> Tensor:
        """Return parameters as ``[S, P]``, minus the reference's means, over its deviations."""
        parts = []
        for name, reference in self.reference.items():
            own = values[name].double().reshape(-1, *reference.shape[1:])
            scale = reference.std(0, correction=0)
            parts.append(((own - reference.mean(0)) / scale).reshape(len(own), -1))
        return torch.cat(parts, -1)


def _distances(one: Tensor, other: Tensor, weights: Tensor | None) -> list[float]:
    """Return the 1-Wasserstein distance of each column."""
    w = None if weights is None else weights.numpy()
    columns = zip(one.T.numpy(), other.T.numpy(), strict=True)
    return [float(wasserstein_distance(mine, theirs, w)) for mine, theirs in columns]


def _sliced(one: Tensor, other: Tensor, weights: Tensor | None, directions: int) -> float:
    generator = torch.Generator().manual_seed(0)
    shape = one.shape[-1], directions
    along = torch.randn(*shape, generator=generator, dtype=torch.float64)
    along = along / along.norm(dim=0)
    found = _distances(one @ along, other @ along, weights)
    return sum(found) / len(found)
