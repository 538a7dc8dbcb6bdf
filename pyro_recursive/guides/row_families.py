"""The distributions that a row may have, as functions of its variational parameters."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_recursive.guides.gaussian_families import Family
from pyro_recursive.guides.marginals import log_density
from pyro_recursive.guides.mixture_distributions import ListMixture, StackedMixture
from pyro_recursive.guides.starts import component_steps

START = 0.3  # the scale that a search starts from: a wide normal over two modes may stay there


class RowFamily(ABC):
    """Distributions over vectors ``[D]`` of a row, each given by P parameters ``params``.

    A draw is a smooth function of ``noise_dim`` standard normals, n. A mixture draws once from each
    of its J ``parts``; others have one part. ``blocks`` are the numbers of parameters of each kind,
    P in all: locations, logarithms of scales, ...
    """

    blocks: tuple[int, ...]
    noise_dim: int
    parts: int = 1

    @abstractmethod
    def draw(self, params: Tensor, noise: Tensor) -> Tensor:
        """Draw from each part: ``[*batch, P]``, ``[S, J, *batch, n]`` to ``[S, J, *batch, D]``."""

    @abstractmethod
    def log_prob(self, params: Tensor, u: Tensor, keep: Tensor | None = None) -> Tensor:
        """Return ``log q``: ``[*batch, P]`` and ``[*s, *batch, D]`` to ``[*s, *batch]``.

        With ``keep``, ``[*batch, D]``, of the entries that it flags.
        """

    def scored_draw(
        self, params: Tensor, noise: Tensor, keep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return a draw and its log-density, both functions of parameters and noise."""
        u = self.draw(params, noise)
        return u, self.log_prob(params, u, keep)

    def log_weights(self, params: Tensor) -> Tensor:
        """Return the logarithms of the parts' weights, ``[J, *batch]``."""
        return params.new_zeros(1, *params.shape[:-1])

    @abstractmethod
    def distribution(self, params: Tensor) -> Any:
        """Return the distribution, batch ``[*batch]`` and event ``[D]``."""

    def start(self, loc: Tensor) -> Tensor:
        """Return where a search starts: normals of scale `START` around ``[*batch, D]``."""
        raise NotImplementedError(f"{type(self).__name__} does not define start().")


class GaussianRows(RowFamily):
    """Gaussians of one family over vectors of length ``size``."""

    def __init__(self, family: Family, size: int) -> None:
        self.family, self.size = family, size
        count = family.num_parameters(size)  # a user's family may have fewer than 2 D
        parts = (min(count, size), min(count - size, size), count - 2 * size)
        self.blocks = tuple(part for part in parts if part > 0)
        self.noise_dim = family.noise_dim(size)

    def draw(self, params: Tensor, noise: Tensor) -> Tensor:
        """Move and scale the noise."""
        return self.family.draw(params, self.size, noise)

    def log_prob(self, params: Tensor, u: Tensor, keep: Tensor | None = None) -> Tensor:
        """Return the Gaussian log-density; rows that are not finite leave the others alone."""
        with pyro.validation_enabled(False):  # it waits for the device, in each step
            return log_density(self.family(params, self.size), u, keep)

    def distribution(self, params: Tensor) -> Any:
        """Return the Gaussian."""
        return self.family(params, self.size)

    def start(self, loc: Tensor) -> Tensor:
        """Return the parameters of a normal around a point."""
        return self.family.initial(loc, START)


class MixtureRows(RowFamily):
    """Mixtures: the parameters of all parts, then the logits of their weights."""

    def __init__(self, members: Sequence[RowFamily]) -> None:
        self.members, self.parts = tuple(members), len(members)
        self.blocks = (*(n for member in members for n in member.blocks), len(members))
        self.noise_dim = max(member.noise_dim for member in members)

    def draw(self, params: Tensor, noise: Tensor) -> Tensor:
        """Draw from each part with noise of its own."""
        pairs = zip(self.members, self._split(params), strict=True)
        drawn = [
            member.draw(own, noise[:, j : j + 1, ..., : member.noise_dim])
            for j, (member, own) in enumerate(pairs)
        ]
        return torch.cat(drawn, 1)

    def log_prob(self, params: Tensor, u: Tensor, keep: Tensor | None = None) -> Tensor:
        """Return the log-density of the whole mixture."""
        pairs = zip(self.members, self._split(params), strict=True)
        table = torch.stack([member.log_prob(own, u, keep) for member, own in pairs], -1)
        return (table + self._logits(params).log_softmax(-1)).logsumexp(-1)

    def log_weights(self, params: Tensor) -> Tensor:
        """Return the logarithms of the weights, ``[J, *batch]``."""
        return self._logits(params).log_softmax(-1).movedim(-1, 0)

    def distribution(self, params: Tensor) -> Any:
        """Return the mixture, evaluated at once where all parts are of one family."""
        log_weights, own = self._logits(params).log_softmax(-1), self._split(params)
        gaussian = [member for member in self.members if isinstance(member, GaussianRows)]
        if len(gaussian) == self.parts and len({member.family for member in gaussian}) == 1:
            (family, size), parameters = (gaussian[0].family, gaussian[0].size), torch.stack(own)
            return StackedMixture(log_weights, parameters, family, size)
        pairs = zip(self.members, own, strict=True)
        return ListMixture(log_weights, [member.distribution(each) for member, each in pairs])

    def start(self, loc: Tensor) -> Tensor:
        """Return equal weights, and parts some way from a point."""
        locs = loc + component_steps(len(self.members), loc)
        starts = [each.start(own) for each, own in zip(self.members, locs, strict=True)]
        return torch.cat([*starts, loc.new_zeros(*loc.shape[:-1], len(self.members))], -1)

    def _logits(self, params: Tensor) -> Tensor:
        return params[..., -self.parts :]

    def _split(self, params: Tensor) -> list[Tensor]:
        sizes = [sum(member.blocks) for member in self.members]
        return list(params.split([*sizes, self.parts], -1)[:-1])
