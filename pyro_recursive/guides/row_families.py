"""What distributions a row may have, as functions of the numbers that an encoder finds for it.

An encoder's output can be improved for one row at a time, and its distance from the best member of
the family measured, without knowing what kind of guide it belongs to.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_recursive.guides.gaussian_families import Family
from pyro_recursive.guides.mixture_distributions import ListMixture, StackedMixture

__all__ = ["START", "GaussianRows", "MixtureRows", "RowFamily"]

START = 0.3  # the scale that a search starts from: a wide normal over two modes may stay there


class RowFamily(ABC):
    """Distributions over vectors ``[D]`` of a row, each given by P ``numbers``.

    A draw is a smooth function of standard normal noise; a mixture draws once from each of its J
    parts, others have one part.
    """

    @property
    @abstractmethod
    def blocks(self) -> tuple[int, ...]:
        """How many numbers of each kind there are, P in all: locations, log-scales and so on."""

    @property
    @abstractmethod
    def noise_dim(self) -> int:
        """How many standard normals make a draw."""

    @property
    def parts(self) -> int:
        """J."""
        return 1

    @abstractmethod
    def draw(self, numbers: Tensor, noise: Tensor) -> Tensor:
        """Draw from each part: ``[*batch, P]``, ``[S, J, *batch, n]`` to ``[S, J, *batch, D]``."""

    @abstractmethod
    def log_prob(self, numbers: Tensor, u: Tensor) -> Tensor:
        """Return ``log q``: ``[*batch, P]`` and ``[*s, *batch, D]`` to ``[*s, *batch]``."""

    def scored_draw(self, numbers: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return a draw and its log-density: both functions of numbers and noise."""
        u = self.draw(numbers, noise)
        return u, self.log_prob(numbers, u)

    def log_weights(self, numbers: Tensor) -> Tensor:
        """Return the logarithms of the parts' weights, ``[J, *batch]``."""
        return numbers.new_zeros(1, *numbers.shape[:-1])

    @abstractmethod
    def distribution(self, numbers: Tensor) -> Any:
        """Return the distribution, batch ``[*batch]`` and event ``[D]``."""

    def start(self, loc: Tensor) -> Tensor:
        """Return numbers to begin a search with, ``[*batch, D]`` to ``[*batch, P]``.

        Those of a normal of scale `START` around a place, of several for mixtures.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define start().")


@dataclass(frozen=True)
class GaussianRows(RowFamily):
    """Gaussians of one family over vectors of length ``size``."""

    family: Family
    size: int

    @property
    def blocks(self) -> tuple[int, ...]:
        """Locations, logarithms of scales, and the rest, if any."""
        rest = self.family.num_parameters(self.size) - 2 * self.size
        return (self.size, self.size, rest) if rest else (self.size, self.size)

    @property
    def noise_dim(self) -> int:
        """What the family needs."""
        return self.family.noise_dim(self.size)

    def draw(self, numbers: Tensor, noise: Tensor) -> Tensor:
        """Move and scale the noise."""
        return self.family.draw(numbers, self.size, noise)

    def log_prob(self, numbers: Tensor, u: Tensor) -> Tensor:
        """Return the Gaussian log-density; what is not finite shows in its row alone."""
        with pyro.validation_enabled(False):  # whose looks at the device cost, in each step
            return self.family(numbers, self.size).log_prob(u)

    def distribution(self, numbers: Tensor) -> Any:
        """Return the Gaussian."""
        return self.family(numbers, self.size)

    def start(self, loc: Tensor) -> Tensor:
        """Return the numbers of a normal around a place."""
        return self.family.initial(loc, START)


@dataclass(frozen=True)
class MixtureRows(RowFamily):
    """Mixtures: the numbers of all parts, and then the logits of their weights."""

    members: tuple[RowFamily, ...]

    @property
    def blocks(self) -> tuple[int, ...]:
        """Those of all parts, and the logits."""
        return (*(n for member in self.members for n in member.blocks), len(self.members))

    @property
    def noise_dim(self) -> int:
        """What the neediest part needs."""
        return max(member.noise_dim for member in self.members)

    @property
    def parts(self) -> int:
        """The number of components."""
        return len(self.members)

    def draw(self, numbers: Tensor, noise: Tensor) -> Tensor:
        """Draw from each part with noise of its own."""
        pairs = zip(self.members, self._split(numbers), strict=True)
        drawn = [
            member.draw(own, noise[:, j : j + 1, ..., : member.noise_dim])
            for j, (member, own) in enumerate(pairs)
        ]
        return torch.cat(drawn, 1)

    def log_prob(self, numbers: Tensor, u: Tensor) -> Tensor:
        """Return the log-density of the whole mixture."""
        pairs = zip(self.members, self._split(numbers), strict=True)
        table = torch.stack([member.log_prob(own, u) for member, own in pairs], -1)
        return (table + self._logits(numbers).log_softmax(-1)).logsumexp(-1)

    def log_weights(self, numbers: Tensor) -> Tensor:
        """Return the logarithms of the weights, ``[J, *batch]``."""
        return self._logits(numbers).log_softmax(-1).movedim(-1, 0)

    def distribution(self, numbers: Tensor) -> Any:
        """Return the mixture, evaluated at once where all parts are of one family."""
        log_weights, own = self._logits(numbers).log_softmax(-1), self._split(numbers)
        first = self.members[0]
        if isinstance(first, GaussianRows) and len(set(self.members)) == 1:
            return StackedMixture(log_weights, torch.stack(list(own)), first.family, first.size)
        pairs = zip(self.members, own, strict=True)
        return ListMixture(log_weights, [member.distribution(each) for member, each in pairs])

    def start(self, loc: Tensor) -> Tensor:
        """Return equal weights, and parts in pairs on opposite sides of a place: alike they stay.

        Pairs have random corners of a cube of their own size, 1 on average.
        """
        pairs = (len(self.members) + 1) // 2
        sizes = torch.arange(1, pairs + 1).to(loc) * (2 / (pairs + 1))
        corners = torch.randint(2, (pairs, *loc.shape), device=loc.device).to(loc) * 2 - 1
        steps = sizes.view(-1, *[1] * loc.dim()) * corners
        places = torch.stack([loc + steps, loc - steps], 1).flatten(0, 1)
        found = [each.start(place) for each, place in zip(self.members, places, strict=False)]
        return torch.cat([*found, loc.new_zeros(*loc.shape[:-1], len(self.members))], -1)

    def _logits(self, numbers: Tensor) -> Tensor:
        return numbers[..., -len(self.members) :]

    def _split(self, numbers: Tensor) -> Sequence[Tensor]:
        sizes = [sum(member.blocks) for member in self.members]
        return numbers.split([*sizes, len(self.members)], -1)[:-1]
