"""Whether the loss of a part of a batch is an estimate of the whole batch's: two runs compared.

It is where all that depends on the rows is in plates that count for the whole batch: those as large
as the batch, and those that know the size of the data. What is outside of them must not notice
which rows there are, nor how many.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_recursive.tracing.sites import Site, plates_of, sites, subsample_scale, subsample_sites

__all__ = ["Comparison", "Traces", "full_size_of"]

Key = tuple[str, str]  # "guide" or "model", and a site's name


class Traces(NamedTuple):
    """A run of guide and model."""

    guide: poutine.Trace
    model: poutine.Trace

    def sites(self) -> dict[Key, Site]:
        """Return the sites of both that have a density."""
        return {
            (kind, site["name"]): site
            for kind, trace in zip(self._fields, self, strict=True)
            for site in sites(trace)
        }


@dataclass(frozen=True)
class Comparison:
    """A batch of so many rows beside a part of it, which has fewer, or more."""

    whole: Traces
    part: Traces
    rows: int
    part_rows: int

    @cached_property
    def row_plates(self) -> frozenset[str]:
        """The plates that are as large as the batch."""
        return frozenset(
            name
            for name, one, two in self._frames()
            if full_size_of(one) == self.rows and full_size_of(two) == self.part_rows
        )

    @cached_property
    def counted(self) -> frozenset[str]:
        """The plates in which a part counts for the whole batch."""
        known = (
            name
            for name, one, two in self._frames()
            if full_size_of(one) == full_size_of(two) and one.size != two.size
        )
        return self.row_plates.union(known)

    def check_sites(self) -> None:
        """Raise where a site differs in plates, shape or scale as no share may."""
        for one, two in self._pairs:
            self._check_plates(one, two)
            self._check_shape(one, two)
            self._check_scale(one, two)

    def common_values(self) -> poutine.Trace:
        """Return the whole batch's minibatches of other plates and the latents outside the rows."""
        chosen = poutine.Trace()
        drawn = subsample_sites(*self.part).nodes
        for name, site in subsample_sites(*self.whole).nodes.items():
            if name in drawn and _is_minibatch(site) and _sizes(site) == _sizes(drawn[name]):
                chosen.add_node(name, **site)
        for site in sites(*self.whole):
            if not site["is_observed"] and self._is_outside(site) and site["name"] not in chosen:
                chosen.add_node(site["name"], **site)
        return chosen

    def densities(self, part: Traces) -> tuple[dict[Key, float], dict[Key, float]]:
        """Return the log-densities outside the rows, of the whole batch and a part, in nats.

        Those of the guide's latents may depend on the rows: they are amortised.
        """
        return self._densities(self.whole), self._densities(part)

    def check_densities(self, whole: dict[Key, float], part: dict[Key, float]) -> None:
        """Raise where a log-density outside the rows depends on them."""
        for kind, name in [*whole, *(key for key in part if key not in whole)]:
            one, two = whole.get((kind, name)), part.get((kind, name))
            if one is None or two is None or not _same(one, two):
                found, other = (_nats(each) for each in (one, two))
                raise ValueError(
                    f"Several processes share a batch, and {kind} site '{name}', in no plate of "
                    f"the rows, depends on them: it has {found} with {self.rows} rows, and "
                    f"{other} with {self.part_rows}, given the same latents. Such a density has no "
                    "shares. Put one term for each row into a pyro.plate of the rows; or train in "
                    "one process."
                )

    def _densities(self, traces: Traces) -> dict[Key, float]:
        with torch.no_grad(), pyro.validation_enabled(False):
            for kind, trace in traces._asdict().items():
                trace.compute_log_prob(lambda _, site, kind=kind: self._is_common(kind, site))
        return {
            key: float(site["log_prob_sum"])
            for key, site in traces.sites().items()
            if self._is_common(key[0], site)
        }

    @cached_property
    def _pairs(self) -> list[tuple[Site, Site]]:
        others = self.part.sites()
        return [(site, others[key]) for key, site in self.whole.sites().items() if key in others]

    def _frames(self) -> list[tuple[str, Any, Any]]:
        """Return the plates that a site has in both runs."""
        return [
            (name, frame, plates_of(two)[name])
            for one, two in self._pairs
            for name, frame in plates_of(one).items()
            if name in plates_of(two)
        ]

    def _is_outside(self, site: Site) -> bool:
        return not self.counted & plates_of(site).keys()

    def _is_common(self, kind: str, site: Site) -> bool:
        """Whether a site's density must not depend on the rows."""
        if site["infer"].get("_deterministic") or not self._is_outside(site):
            return False
        return kind == "model" or site["is_observed"]

    def _check_plates(self, whole: Site, part: Site) -> None:
        """Raise where a plate is the rows at another site, and keeps its size at this one."""
        before, after = plates_of(whole), plates_of(part)
        for name in sorted(self.row_plates & before.keys() & after.keys()):
            if full_size_of(before[name]) == full_size_of(after[name]):
                raise ValueError(
                    f"Several processes share a batch, and plate '{name}' of site "
                    f"'{whole['name']}' keeps its {full_size_of(before[name])} rows for another "
                    "batch. Use an AmortizedGuide instead of parameters for each row of a batch, "
                    "or the same plate in model and guide."
                )

    def _check_shape(self, whole: Site, part: Site) -> None:
        """Raise where a value changes with the rows, and is in no plate of them."""
        if whole["value"].shape != part["value"].shape and self._is_outside(whole):
            raise ValueError(
                f"Several processes share a batch, and the value of site '{whole['name']}' changes "
                f"from {tuple(whole['value'].shape)} to {tuple(part['value'].shape)} for another, "
                "in no plate of the rows: the density of a part is no share of the whole. Put it "
                "into a pyro.plate with as many entries as the batch has rows."
            )

    def _check_scale(self, whole: Site, part: Site) -> None:
        """Raise where the user's scale is a function of the rows."""
        one, other = (_own_scale(site) for site in (whole, part))
        if one is not None and other is not None and not math.isclose(one, other, rel_tol=1e-6):
            raise ValueError(
                f"Several processes share a batch, and site '{whole['name']}' has a scale of its "
                f"own that depends on the rows: {one:g}, and {other:g} for another batch. Let the "
                "plate scale it, pyro.plate(name, N, subsample=x), or make the scale a constant."
            )


def full_size_of(frame: Any) -> int:
    """Return how many entries a plate has with those that a minibatch leaves out."""
    return frame.size if frame.full_size is None else frame.full_size


def _own_scale(site: Site) -> float | None:
    """Return a site's scale without that of its plates; None where it differs between rows."""
    scale = site["scale"] / math.prod(map(subsample_scale, plates_of(site).values()))
    if isinstance(scale, Tensor):
        return scale.item() if scale.numel() == 1 else None
    return float(scale)


def _is_minibatch(site: Site) -> bool:
    """Whether a subsample site has fewer entries than its plate."""
    return len(site["value"]) < site["fn"].size


def _sizes(site: Site) -> tuple[int, int]:
    return len(site["value"]), site["fn"].size


def _same(one: float, two: float) -> bool:
    # The same computation on the same values: what differs is the order of sums on accelerators.
    return math.isclose(one, two, rel_tol=1e-5, abs_tol=1e-6) or (one != one and two != two)


def _nats(density: float | None) -> str:
    return "no such site" if density is None else f"a log-density of {density:g} nats"
