"""Runs of a model on draws of its latents."""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_recursive.evaluation.draws import (
    Draws,
    Kind,
    SiteDraws,
    frames_of,
    joined,
    of_each,
    stacked,
)
from pyro_recursive.evaluation.evidence import samples_per_chunk
from pyro_recursive.evaluation.passes import Passes
from pyro_recursive.tracing.batched import run_model
from pyro_recursive.tracing.choice import brief, choose
from pyro_recursive.tracing.enumeration import most_values
from pyro_recursive.tracing.handlers import FlatPriors
from pyro_recursive.tracing.isolation import isolated, outline
from pyro_recursive.tracing.plates import Particles, PlateLayout
from pyro_recursive.tracing.program import Program, no_model, structure_of
from pyro_recursive.tracing.sites import (
    PARTICLE_PLATE,
    Site,
    SiteTable,
    is_delta,
    latent_sites,
    nesting_of,
    plates_of,
    sites,
    subsample_sites,
)
from pyro_recursive.tracing.user_warnings import warn_user


class ModelRuns(NamedTuple):
    """Traces of a model for S samples: one trace of all of them, or one of each.

    ``nesting`` is the number of dims of plates; ``single`` a run without a plate of samples.
    """

    traces: Sequence[poutine.Trace]
    samples: int
    nesting: int
    single: poutine.Trace

    @property
    def total(self) -> int:
        return self.samples // len(self.traces)

    @property
    def layout(self) -> PlateLayout:
        """The plates of the runs, of which none is that of rows."""
        in_one_pass = len(self.traces) == 1 and self.samples > 1
        particles = Particles(1, self.samples, -self.nesting - 1 if in_one_pass else None)
        return PlateLayout(particles, self.nesting, ())

    def tables(self) -> list[SiteTable]:
        return [SiteTable(trace, poutine.Trace()) for trace in self.traces]

    def latents(self) -> dict[str, SiteDraws]:
        """Return the draws of latents; those with all values at once have none."""
        return self.each(lambda site: is_latent(site) and "_enumerate_dim" not in site["infer"])

    def computed(self) -> dict[str, SiteDraws]:
        found = (site for trace in self.traces for site in trace.nodes.values())
        names = dict.fromkeys(site["name"] for site in found if is_computed(site))
        return {name: self._deterministic(name) for name in names}

    def each(
        self, is_wanted: Callable[[Site], bool], kind: Kind = "latent", **options: Any
    ) -> dict[str, SiteDraws]:
        """Return the draws of the sites wanted of any run; ``options`` are those of `site`."""
        found = (site for site in sites(*self.traces) if is_wanted(site))
        names = dict.fromkeys(site["name"] for site in found)
        return {name: self.site(name, kind, **options) for name in names}

    def site(
        self,
        name: str,
        kind: Kind = "latent",
        value_of: Callable[[Site], Tensor] = lambda site: site["value"],
        event_dim: int | None = None,
    ) -> SiteDraws:
        """Return the draws of a site, or a function of them."""
        group = of_each(name, [trace.nodes for trace in self.traces])
        values = [value_of(site) for site in group]
        return stacked(group[0], values, self.total, self.nesting, kind, event_dim)

    def _deterministic(self, name: str) -> SiteDraws:
        """Return the values of a deterministic site; its shape in a single run gives its dims."""
        group = of_each(name, [trace.nodes for trace in self.traces])
        single = self.single.nodes.get(name, group[0])
        shape, depth = single["value"].shape, _plate_dims(single)
        values = []
        for site in group:
            value = site["value"]
            if value.shape == shape:  # the same for all samples, or there is only one
                value = value.expand(self.total, *shape)
            elif value.shape[:1] != (self.total,) or value[0].numel() != shape.numel():
                raise ValueError(
                    f"Deterministic site '{name}' has shape {tuple(shape)} for one sample, "
                    f"{tuple(value.shape)} for {self.total}. Count dims from the right."
                )
            values.append(value.reshape(self.total, *(1,) * (self.nesting - depth), *shape))
        frames = tuple(frame for frame in frames_of(group[0]) if -frame.dim <= depth)
        run = values, self.total, self.nesting
        return stacked(group[0], *run, "computed", len(shape) - depth, frames)


def _plate_dims(site: Site) -> int:
    """Return how many dims of a deterministic site, from the left, are those of plates."""
    shape, event_dim = site["value"].shape, site["fn"].event_dim
    if event_dim < len(shape):  # given by the user: by default all dims are those of an event
        return len(shape) - event_dim
    sizes = {frame.dim: frame.size for frame in frames_of(site)}
    depth = -min(sizes, default=0)
    if depth > len(shape):
        return 0
    fits = all(shape[i] in (1, sizes.get(i - depth, 1)) for i in range(depth))
    return depth if fits else 0


def was_observed(site: Site) -> bool:
    """Whether a site's value was drawn in the place of data, as by `poutine.uncondition`."""
    return "was_observed" in site["infer"]


def is_latent(site: Site) -> bool:
    """Whether a site is drawn, and not in the place of data."""
    return not site["is_observed"] and not was_observed(site)


def enumerated_without(trace: poutine.Trace, drawn: Container[str]) -> list[str]:
    """Return the latents of a model that are marked to be enumerated, and have no draws."""
    marked = [site["name"] for site in latent_sites(trace) if site["infer"].get("enumerate")]
    return [name for name in marked if name not in drawn]


def is_computed(site: Site) -> bool:
    """Whether a site has no randomness, deterministic or reparameterised: an observed Delta."""
    return site["type"] == "sample" and site["is_observed"] and is_delta(site)


@torch.no_grad()
def run_on_draws(
    model: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    draws: Draws,
    collect: Callable[[ModelRuns], dict[str, SiteDraws]],
    chunk_size: int | None = None,
    vectorize_particles: bool | str = True,
    draws_data: bool = False,
    enumerates: bool = False,
    compile: bool = False,
) -> dict[str, SiteDraws]:
    """Run a model on draws of its latents and on their minibatch, in chunks.

    Latents without draws are drawn from the model; so are data, with ``draws_data``. With
    ``enumerates`` those that are marked so have all their values at once. ``collect`` returns what
    is wanted of the runs of a chunk; the other options are those of `posterior_draws`. A model that
    does not fit one more plate runs under `torch.vmap`, or one by one.

    Raises:
        ValueError: a plate has another size here than in the draws.
    """
    user_model, model = model, drawing_data(model) if draws_data else model
    program, single = Program(model, model, args, kwargs), outline(model, args, kwargs)
    latents = draws.of_kind("latent")
    _check_plates(single, latents)
    minibatch = draws.minibatch.copy()
    for name, site in subsample_sites(single).nodes.items():  # of the other plates
        if name not in minibatch.nodes and len(site["value"]) != site["fn"].size:
            minibatch.add_node(name, **site)
    size = chunk_size or samples_per_chunk(sites(single))
    nesting = nesting_of(single)
    enum_dim = None
    if enumerates and enumerated_without(single, latents):
        enum_dim = -nesting - 2
        with isolated():
            first = {name: each.with_batch_dims()[0] for name, each in latents.items()}
            trace = program.run_model(_source(minibatch, first), enum_dim)
        size = chunk_size or max(1, size // most_values(trace, nesting))
    several_at_once = vectorize_particles and len(draws) > 1
    fits_plate = several_at_once and _fits_plate(user_model, args, kwargs, draws_data)
    fits_vmap = vectorize_particles and not fits_plate
    kinds = dict[str, SiteDraws]()

    def run(passes: Passes, count: int, *tensors: Tensor) -> dict[str, Tensor]:
        """Return what is wanted of a chunk of draws, and note of which kind it is."""
        nonlocal fits_vmap
        pairs = zip(latents.items(), tensors, strict=True)
        chunk = {name: replace(each, value=value) for (name, each), value in pairs}
        wide = {name: each.with_batch_dims(nesting) for name, each in chunk.items()}
        values = {name: each.with_batch_dims() for name, each in chunk.items()}
        traces: list[poutine.Trace] = []
        if fits_plate and count > 1:
            with pyro.plate(PARTICLE_PLATE, count, dim=-nesting - 1):
                traces = [program.run_model(_source(minibatch, wide), enum_dim)]
        elif fits_vmap and count > 1:
            particles = Particles(1, count, -nesting - 1, vmap=True)
            try:
                traces = [run_model(program, _source(minibatch, wide), values, particles, enum_dim)]
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a loop has the model's own errors
                if passes.is_traced:
                    raise
                fits_vmap = False
                warn_user(f"Draws run one by one ({len(draws)} runs of the model): {brief(error)}.")
        if not traces:
            passes.loops(count)
            rows = ({name: value[row] for name, value in values.items()} for row in range(count))
            traces = [program.run_model(_source(minibatch, row), enum_dim) for row in rows]
        found = collect(ModelRuns(traces, count, nesting, single))
        kinds.update(found)
        return {name: each.value for name, each in found.items()}

    passes = Passes(run, program, size, len(draws), compile=compile)
    chunks = []
    for start in range(0, len(draws), size):
        count = min(size, len(draws) - start)
        given = [each.value[start : start + count] for each in latents.values()]
        found = passes(count, *given)
        chunks.append({name: replace(kinds[name], value=value) for name, value in found.items()})
    return joined(chunks)


def _fits_plate(
    model: Callable, args: tuple, kwargs: dict[str, Any], draws_data: bool = False
) -> bool:
    """Whether a model draws and computes the same for each sample under one more plate.

    Remembered with the user's model: the handlers here are new objects in each call.
    """
    memory, key = Program(no_model, model, args, kwargs).memory, f"fits plate, {draws_data}"
    if key not in memory:
        drawing = FlatPriors()(drawing_data(model) if draws_data else model)
        alone = Program(no_model, drawing, args, kwargs)
        structure = structure_of(alone)
        choose(alone, structure)
        memory[key] = structure.mode == "plate"
    return memory[key]


def drawing_data(model: Callable) -> Callable:
    """Return a model that draws its data instead of observing them."""
    return _DrawData()(model)


class _DrawData(UnconditionMessenger):
    """Draws data; deterministic sites, factors and minibatches stay as they are."""

    def _pyro_sample(self, msg: Any) -> None:
        if can_be_drawn(msg):
            super()._pyro_sample(msg)


def can_be_drawn(site: Any) -> bool:
    """Whether a site is data: observed, and no subsample, deterministic site or factor."""
    special = site_is_subsample(site) or is_computed(site) or is_factor(site)
    return site["is_observed"] and not special


def is_factor(site: Site) -> bool:
    """Whether a site is a `pyro.factor`, which has a density and no value."""
    return isinstance(site["fn"], dist.Unit)


def _source(minibatch: poutine.Trace, values: Mapping[str, Tensor]) -> poutine.Trace:
    """Return a trace of a minibatch and some of the draws, to replay a model on."""
    trace = minibatch.copy()
    for name, value in values.items():
        site: Site = {"name": name, "type": "sample", "fn": None, "is_observed": False, "infer": {}}
        trace.add_node(name, value=value, **site)
    return trace


def _check_plates(trace: poutine.Trace, latents: Mapping[str, SiteDraws]) -> None:
    for site in sites(trace):
        for frame in latents[site["name"]].frames if site["name"] in latents else ():
            here = plates_of(site).get(frame.name)
            if here is None or here.size != frame.size:
                found = f"not {here.size}" if here else "and the model has it outside of that plate"
                raise ValueError(
                    f"Site '{site['name']}' was drawn in plate '{frame.name}' of {frame.size} "
                    f"entries, {found}. Draw it for these data."
                )
