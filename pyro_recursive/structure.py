"""What one run tells about a program, so that plates need not be declared to the losses."""

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from pyro import poutine

from pyro_recursive.program import Program
from pyro_recursive.sites import Site, batch_shapes, check_batch_shape, nesting_of, sites

__all__ = ["Structure", "structure_of"]


@dataclass(frozen=True)
class Structure:
    """What one run tells about a program: its plate nesting and the plates of each sample site."""

    max_plate_nesting: int
    model: dict[str, Site]
    guide: dict[str, Site]


# By model, then guide, both held weakly: no loss remembers the first model that it saw.
_structures: WeakKeyDictionary[Any, WeakKeyDictionary[Any, dict[Any, Structure]]] = (
    WeakKeyDictionary()
)


def structure_of(program: Program, *, fresh: bool = False) -> Structure:
    """Return the structure of a program, from memory where this pair was seen before."""
    (model, model_method), (guide, guide_method) = map(_identity, (program.model, program.guide))
    try:
        known = _structures.setdefault(model, WeakKeyDictionary()).setdefault(guide, {})
    except TypeError:  # unhashable or without weak references: look again each time
        return _discover(program)
    methods = (model_method, guide_method)
    if fresh or methods not in known:
        known[methods] = _discover(program)
    return known[methods]


def _identity(function: Any) -> tuple[Any, Any]:
    """Return what lives as long as the function: bound methods are made anew at each access."""
    return getattr(function, "__self__", function), getattr(function, "__func__", None)


def _discover(program: Program) -> Structure:
    """Run guide and model once, outside any particle plate, leaving the random state alone."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices), poutine.block():
        guide = program.run_guide()
        model = program.run_model(guide)
    # Later a dim of size M * K could pass for the particle plate.
    for trace in (model, guide):
        for site in sites(trace):
            check_batch_shape(site, *batch_shapes(site))
    return structure_in(model, guide)


def structure_in(model: poutine.Trace, guide: poutine.Trace) -> Structure:
    """Return the structure that the traces of one run show."""
    return Structure(
        max_plate_nesting=nesting_of(model, guide),
        model={site["name"]: _outline(site) for site in sites(model)},
        guide={site["name"]: _outline(site) for site in sites(guide)},
    )


def _outline(site: Site) -> Site:
    """Keep what describes a site, not its tensors."""
    return {key: site[key] for key in ("name", "is_observed", "cond_indep_stack")}
