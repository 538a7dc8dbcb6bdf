"""What one run tells about a program, so that plates need not be declared to the losses."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import pyro
import torch
from pyro import poutine

from pyro_recursive.tracing.program import Program
from pyro_recursive.tracing.random_state import set_torch_state, torch_state
from pyro_recursive.tracing.reruns import DryRun
from pyro_recursive.tracing.sites import (
    PARTICLE_PLATE,
    Site,
    batch_shapes,
    check_batch_shape,
    check_sizes,
    log_prob_of,
    nesting_of,
    sites,
)

__all__ = ["Structure", "outline", "structure_in", "structure_of"]


@dataclass(frozen=True)
class Structure:
    """What one run tells about a program: its plate nesting and the plates of each sample site.

    ``mixing`` names a latent whose particles would be mixed in one pass; see `_mixed_site`.
    """

    max_plate_nesting: int
    model: dict[str, Site]
    guide: dict[str, Site]
    mixing: str | None = None


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
    key = (model_method, guide_method, _broadcasting(program.args), _broadcasting(program.kwargs))
    if fresh or key not in known:
        known[key] = _discover(program)
    return known[key]


def _broadcasting(arguments: Any) -> Any:
    """Return what decides how tensors broadcast: for each dim whether it is empty, 1, or longer.

    Data of another form than those that a structure was found with may fit by chance alone.
    """
    if isinstance(arguments, torch.Tensor):
        return tuple(min(size, 2) for size in arguments.shape)
    if isinstance(arguments, tuple):
        return tuple(map(_broadcasting, arguments))
    if isinstance(arguments, list):  # of any length
        return frozenset(map(_broadcasting, arguments))
    if isinstance(arguments, dict):
        return frozenset((name, _broadcasting(value)) for name, value in arguments.items())
    return None


def _identity(function: Any) -> tuple[Any, Any]:
    """Return what lives as long as the function: bound methods are made anew at each access."""
    return getattr(function, "__self__", function), getattr(function, "__func__", None)


def _discover(program: Program) -> Structure:
    """Run guide and model once, outside any particle plate, leaving the random state alone."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices), poutine.block(), DryRun():
        guide = program.run_guide()
        model = program.run_model(guide)
        check_sizes(model, guide)
        # Later a dim of size M * K could pass for the particle plate.
        for site in sites(model, guide):
            check_batch_shape(site, *batch_shapes(site))
        found = structure_in(model, guide)
        return replace(found, mixing=_mixed_site(program, found.max_plate_nesting))


@torch.enable_grad()
def _mixed_site(program: Program, max_plate_nesting: int) -> str | None:
    """Return a latent of which one particle's value moves another particle's density, if any.

    A program that sums over a dim from the left, say, runs under a particle plate without an error
    and mixes the particles. Two of them show it, for every site with a derivative.
    """
    dim = -max_plate_nesting - 1
    try:
        with pyro.plate(PARTICLE_PLATE, 2, dim=dim):
            sampled = program.run_guide()
            leaves = _cut_to_leaves(sampled)
            runs = (program.run_guide(sampled), program.run_model(sampled))
        densities = [log_prob_of(site, site["fn"]) for site in sites(*runs)]
        first = [lp.select(dim, 0).sum() for lp in densities if lp.dim() >= -dim]
        moving = [lp for lp in first if lp.requires_grad]
        if not moving or not leaves:
            return None
        values = [site["value"] for site in leaves]
        derivatives = torch.autograd.grad(moving, values, allow_unused=True)
    except Exception:  # what cannot run in one pass says so itself, when it is run
        return None
    for site, derivative in zip(leaves, derivatives, strict=True):
        place = dim - site["fn"].event_dim
        if derivative is None or derivative.dim() < -place:
            continue
        if derivative.select(place, 1).nan_to_num(0.0).any():
            return site["name"]
    return None


def _cut_to_leaves(trace: poutine.Trace) -> list[Site]:
    """Make the latent values of a trace leaves, in place; return the sites that have one."""
    leaves = []
    for site in sites(trace):
        if not site["is_observed"]:
            site["value"] = site["value"].detach().clone()
            if site["value"].is_floating_point():
                site["value"].requires_grad_()
                leaves.append(site)
    return leaves


def outline(
    model: Callable, args: tuple, kwargs: dict[str, Any], *, grad: bool = False
) -> poutine.Trace:
    """Run a model once, leaving no trace elsewhere, and the random state alone."""
    state = torch_state()
    with poutine.block(), torch.set_grad_enabled(grad):
        trace = poutine.trace(model).get_trace(*args, **kwargs)
    set_torch_state(state)
    return trace


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
