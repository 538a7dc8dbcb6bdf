"""A model run again for S samples: on given latents, with its data or with data that it draws."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from pyro_recursive.evaluation.draws.drawn import SiteDraws
from pyro_recursive.evaluation.evidence import CHUNK_ROWS
from pyro_recursive.tracing.isolation import outline
from pyro_recursive.tracing.plates import Particles
from pyro_recursive.tracing.program import Program
from pyro_recursive.tracing.sites import (
    PARTICLE_PLATE,
    Site,
    is_delta,
    nesting_of,
    plates_of,
    sites,
    subsample_sites,
)

__all__ = [
    "Run",
    "data_of",
    "drawing_data",
    "is_computed",
    "is_factor",
    "runs_of_model",
    "was_observed",
]

# In the infer of a site that a run drew instead of observing it: that it did, and the data.
WAS_OBSERVED, DATA = "was_observed", "obs"


@dataclass(frozen=True)
class Run:
    """Traces of a model: one for all samples, or one for each; and one of a single sample."""

    traces: list[poutine.Trace]
    particles: Particles
    nesting: int
    outline: poutine.Trace = field(default_factory=poutine.Trace)


def runs_of_model(
    program: Program,
    count: int,
    given: Mapping[str, SiteDraws],
    minibatch: poutine.Trace,
    *,
    vectorize: bool = True,
    chunk_size: int | None = None,
) -> Iterator[Run]:
    """Yield runs of a model on given values of some sites, until there are `count` samples.

    All are on one minibatch.

    :param minibatch: subsample sites, for the plates whose minibatch is given
    :raises ValueError: a plate has another size here than in the given values
    """
    single = outline(program.model, program.args, program.kwargs)
    nesting = nesting_of(single)
    _check_plates(single, given)
    minibatch = _completed(minibatch, subsample_sites(single))
    size = chunk_size or _samples_per_chunk(single)
    for start in range(0, count, size):
        number = min(size, count - start)
        if vectorize and number > 1:
            particles = Particles(1, number, dim=-nesting - 1)
            rows = slice(start, start + number)
            values = {name: each.placed(nesting)[rows] for name, each in given.items()}
            with pyro.plate(PARTICLE_PLATE, number, dim=-nesting - 1):
                traces = [program.run_model(_source(values, minibatch))]
        else:
            particles = Particles(1, number)
            traces = []
            for row in range(start, start + number):
                values = {name: each.row(row) for name, each in given.items()}
                traces.append(program.run_model(_source(values, minibatch)))
        yield Run(traces, particles, nesting, single)


def drawing_data(model: Callable) -> Callable:
    """Return a model that draws its data; what it computes, factors and minibatches stay."""
    return _DrawData()(model)


def was_observed(site: Site) -> bool:
    """Whether a site's value was drawn in the place of data."""
    return WAS_OBSERVED in site["infer"]


def data_of(site: Site) -> Any:
    """Return the data in whose place a site's value was drawn."""
    return site["infer"][DATA]


def is_factor(site: Site) -> bool:
    """Whether a site is a `pyro.factor`, which has a density and no value."""
    return isinstance(site["fn"], dist.Unit)


def is_computed(site: Site) -> bool:
    """Whether a site has no randomness, deterministic or reparameterised: an observed Delta."""
    return site["type"] == "sample" and site["is_observed"] and is_delta(site)


class _DrawData(Messenger):
    """Draws the values of observed sites.

    Unlike `poutine.uncondition`, it leaves deterministic sites alone, whose value would get the
    dims of their plates once more, and factors, which have no value.
    """

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] or site_is_subsample(msg) or is_factor(msg) or is_computed(msg):
            return
        msg["infer"] = {**msg["infer"], WAS_OBSERVED: True, DATA: msg["value"]}
        msg["is_observed"], msg["value"], msg["done"] = False, None, False


def _source(values: Mapping[str, Any], minibatch: poutine.Trace) -> poutine.Trace:
    """Return a trace that a model can be replayed on."""
    trace = minibatch.copy()
    for name, value in values.items():
        trace.add_node(
            name, name=name, type="sample", value=value, fn=None, is_observed=False, infer={}
        )
    return trace


def _completed(minibatch: poutine.Trace, other: poutine.Trace) -> poutine.Trace:
    """Return a minibatch with that of other plates; whole ones may change their size."""
    found = minibatch.copy()
    for name, site in other.nodes.items():
        if name not in found.nodes and len(site["value"]) != site["fn"].size:
            found.add_node(name, **site)
    return found


def _check_plates(trace: poutine.Trace, given: Mapping[str, SiteDraws]) -> None:
    for site in sites(trace):
        known = given.get(site["name"])
        for frame in () if known is None else known.frames:
            here = plates_of(site).get(frame.name)
            if here is not None and here.size == frame.size:
                continue
            raise ValueError(
                f"Site '{site['name']}' was drawn in plate '{frame.name}' of {frame.size} entries, "
                f"and this call of the model has {'none' if here is None else here.size}. Draws of "
                "latents in a plate belong to its data: draw them for these."
            )


def _samples_per_chunk(trace: poutine.Trace) -> int:
    rows = [
        math.prod(frame.size for frame in plates_of(site).values() if frame.vectorized)
        for site in sites(trace)
    ]
    return max(1, CHUNK_ROWS // max(rows, default=1))
