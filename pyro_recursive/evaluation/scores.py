"""Bounds of several candidate distributions for each row, all from the same noise."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_recursive.evaluation.evidence import WeightSums
from pyro_recursive.evaluation.search import Noise
from pyro_recursive.guides.semi_amortized.row_elbo import LocalBound

__all__ = ["Moments", "Scores"]

CHANCE = 3  # how many standard errors may be chance


class Moments:
    """The mean of independent terms that come in chunks, ``[s, *any]``, and its standard error."""

    def __init__(self) -> None:
        self.count, self.first, self.second = 0, torch.zeros(()), torch.zeros(())

    def add(self, terms: Tensor) -> None:
        """Take a chunk."""
        self.count += len(terms)
        self.first = self.first.to(terms) + terms.sum(0)
        self.second = self.second.to(terms) + terms.square().sum(0)

    @property
    def mean(self) -> Tensor:
        """The mean, ``[*any]``."""
        return self.first / self.count

    @property
    def error(self) -> Tensor:
        """The standard error of the mean, ``[*any]``."""
        variance = (self.second / self.count - self.mean.square()).clamp_min(0)
        return (variance / max(1, self.count - 1)).sqrt()


class _Drawn(NamedTuple):
    """Draws of a candidate: ``[S, J, *batch, D]``, ``[S, J, *batch]`` twice, ``[J, *batch]``."""

    u: Tensor
    log_p: Tensor
    log_q: Tensor
    log_shares: Tensor

    @property
    def elbo(self) -> Tensor:
        """The ELBO's estimate from each draw of all parts, ``[S, *batch]``."""
        return (self.log_shares.exp() * (self.log_p - self.log_q)).sum(1)


class Scores:
    """Bounds of C candidates ``[C, *batch, P]``, all from the same noise.

    ``elbo`` are their ELBOs, and ``gain`` how much larger than that of the first, ``[C, *batch]``.
    """

    def __init__(self, target: LocalBound, candidates: Tensor, noise: Noise) -> None:
        self.target, self.candidates, self.noise = target, candidates, noise
        self.elbo, self.gain, self.weights = Moments(), Moments(), WeightSums()

    def draw(self, total: int, size: int, evidence: bool = False) -> "Scores":
        """Take ``total`` draws, ``size`` at once; those of q and q* for the evidence too."""
        parts = self.target.family.parts
        count, chunk = math.ceil(total / parts), max(1, size // parts)
        for begin in range(0, count, chunk):
            noise = self.noise(self.target, self.candidates[0], min(chunk, count - begin))
            drawn = [self._drawn(numbers, noise) for numbers in self.candidates]
            elbos = torch.stack([each.elbo for each in drawn], 1)
            self.elbo.add(elbos)
            self.gain.add(elbos - elbos[:, :1])
            if evidence:
                self.weights.add(self._log_weights(drawn))
        return self

    def _drawn(self, numbers: Tensor, noise: Tensor) -> _Drawn:
        family = self.target.family
        u, log_q = family.scored_draw(numbers, noise)
        log_p = self.target.log_joint(u)
        return _Drawn(u, log_p.double(), log_q.double(), family.log_weights(numbers).double())

    def _log_weights(self, drawn: Sequence[_Drawn]) -> Tensor:
        """Return log-weights for draws from q and q* in equal parts, ``[S, *batch]``."""
        terms = []
        for own, numbers in zip(drawn[:2], self.candidates[:2].flip(0), strict=True):
            other = self.target.family.log_prob(numbers, own.u).double()
            mixed = torch.logaddexp(own.log_q, other) - math.log(2)
            terms.append((own.log_p - mixed + own.log_shares).logsumexp(1))
        # The two are of the same noise, and a draw has one of each part: one term of the mean.
        return torch.logaddexp(*terms) - math.log(2)

    def best(self) -> Tensor:
        """Return the best candidate of each row: the first, if others are so by chance at most."""
        gain, error = self.gain.mean, self.gain.error
        gain = torch.where((gain > CHANCE * error) | gain.isposinf(), gain, 0.0)
        most, index = gain.max(0)
        index = torch.where(most > 0, index, 0)
        return self.candidates.take_along_dim(index[None, ..., None], 0)[0]
