"""What lies downstream of sites that are not reparameterised, for each entry of their plates.

A site in plates P decides only about sites that are in P, too, if the entries of P are independent
given all else. Its score is multiplied by their part of the log-weight, summed over all plates but
P: the terms of other entries would be noise.
"""

import itertools
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_recursive.bounds.bound import Bound, double, sum_of_others
from pyro_recursive.bounds.estimators import Estimator, Share
from pyro_recursive.tracing.densities import Densities, Terms
from pyro_recursive.tracing.handlers import ComponentIndex
from pyro_recursive.tracing.plates import PlateLayout
from pyro_recursive.tracing.sites import Site, independent_plates_of

SIGNS = {"model": 1, "density": -1, "score": -1, "jacobian": -1}


@dataclass(frozen=True)
class ScoreGroup:
    """The log-density of all score-handled sites in the same plates, ``[M, K, *plates]``.

    ``score`` and ``rest`` are as in `Densities`; ``layout`` has at least the plates of ``shared``,
    the layout of the log-weights. ``is_choice``: the sites choose a component, whose probability is
    in the mixture's density as well.
    """

    shared: PlateLayout
    layout: PlateLayout
    score: Tensor
    rest: Tensor | None
    is_choice: bool
    terms: Terms | None = None  # None where the plates are those of the log-weights

    def spread(self, tensor: Tensor) -> Tensor:
        """Insert dims of size 1: from the plates of the log-weights to those of the sites."""
        if self.terms is None:
            return tensor
        missing = [frame.name not in self.shared.names for frame in self.layout.plates]
        return tensor[(slice(None), slice(None), *(None if no else slice(None) for no in missing))]

    @torch.no_grad()
    def signal(self, estimator: Estimator, bound: Bound, log_weights: Tensor) -> Tensor:
        """Return what the score is multiplied by, ``[M, K, *plates]``.

        In double precision: the log-weight of many data is large beside what one entry changes.
        """
        assert estimator.signal is not None
        share = self._share(double(log_weights))
        return estimator.signal(bound, share).to(log_weights)

    def _share(self, log_weights: Tensor) -> Share:
        if self.terms is None:
            return Share(log_weights, log_weights, torch.zeros_like(log_weights))
        inside = self._total(self.layout, is_inside=True)
        outside = self._total(self.shared, is_inside=False)
        cost = inside.expand(self.layout.whole_shape)
        others = tuple(
            dim
            for dim, frame in enumerate(self.layout.plates, start=2)
            if frame.name not in self.shared.names
        )
        outside = self.spread(outside.expand_as(log_weights))
        rest = outside + sum_of_others(cost, others)
        return Share(outside + cost.sum(others, keepdim=True), cost, rest)

    def _total(self, layout: PlateLayout, *, is_inside: bool) -> Tensor:
        """Return log p - log q of the sites inside all plates of the group, or of the others."""
        assert self.terms is not None
        total = double(self.score.new_zeros(()))
        for group, sign in SIGNS.items():
            chosen = [
                [(site, each.detach()) for site, each in run if self._encloses(site) is is_inside]
                for run in self.terms[group]
            ]
            if any(chosen):
                found = layout.gather(chosen)
                assert found is not None
                total = total + sign * double(found)
        return total

    def _encloses(self, site: Site) -> bool:
        return self.layout.names <= independent_plates_of(site).keys()


def score_groups(dens: Densities, independent: Container[str]) -> list[ScoreGroup]:
    """Return the score-handled sites by those of their plates whose entries are independent.

    ``independent`` names such plates; those of the log-weights count as well.
    """
    if dens.score is None or dens.terms is None:
        return []
    shared, terms = dens.layout, dens.terms

    def plates(site: Site) -> dict[str, Any]:
        return {
            name: frame
            for name, frame in independent_plates_of(site).items()
            if name in shared.names or (name in independent and name not in dens.coupled)
        }

    def kind(site: Site) -> tuple[frozenset[str], bool]:
        return frozenset(plates(site)), isinstance(site["fn"], ComponentIndex)

    kinds = {kind(site): site for site, _ in itertools.chain.from_iterable(terms["score"])}
    if len(kinds) == 1:
        ((names, is_choice),) = kinds
        if names == shared.names:
            return [ScoreGroup(shared, shared, dens.score, dens.score_rest, is_choice)]
    groups = []
    for key, example in kinds.items():
        names, is_choice = key
        layout = shared.within(plates(example).values())
        score, rest = (
            layout.gather([[term for term in run if kind(term[0]) == key] for run in terms[group]])
            for group in ("score", "score_rest")
        )
        assert score is not None
        split = None if names == shared.names else terms
        groups.append(ScoreGroup(shared, layout, score, rest, is_choice, split))
    return groups
