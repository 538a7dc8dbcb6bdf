"""Draws of the sites of a model, and runs of the model on them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_recursive.evaluation.evidence import samples_per_chunk
from pyro_recursive.evaluation.passes import Passes
from pyro_recursive.tracing.batched import run_model
from pyro_recursive.tracing.choice import choose
from pyro_recursive.tracing.handlers import FlatPriors
from pyro_recursive.tracing.isolation import outline
from pyro_recursive.tracing.plates import Particles
from pyro_recursive.tracing.program import Program, no_model, structure_of
from pyro_recursive.tracing.sites import (
    PARTICLE_PLATE,
    Site,
    is_delta,
    nesting_of,
    plates_of,
    sites,
    subsample_sites,
)

Kind = Literal["latent", "computed", "observed"]


@dataclass(frozen=True)
class SiteDraws:
    """Draws of one site: ``value`` is a ``[S, *plates, *event]``-dim tensor.

    ``frames`` are Pyro's frames of the vectorised plates, from left to right; ``cell`` is the
    iteration of each sequential plate around the site.
    """

    value: Tensor
    frames: tuple[Any, ...] = ()
    kind: Kind = "latent"
    cell: Mapping[str, int] = field(default_factory=dict)

    @property
    def plates(self) -> tuple[str, ...]:
        return tuple(frame.name for frame in self.frames)

    @property
    def event_shape(self) -> torch.Size:
        return self.value.shape[1 + len(self.frames) :]

    def with_batch_dims(self, nesting: int | None = None) -> Tensor:
        """Return the values with Pyro's dims of plates, as many as the site needs by default."""
        sizes = {frame.dim: frame.size for frame in self.frames}
        nesting = -min(sizes, default=0) if nesting is None else nesting
        batch = [sizes.get(dim, 1) for dim in range(-nesting, 0)]
        return self.value.reshape(len(self.value), *batch, *self.event_shape)

    def take(self, index: Tensor, plates: Sequence[str]) -> "SiteDraws":
        """Return the draws of these indices, ``[S', *plates]``, each entry of plates its own."""
        for name in plates:
            if name not in self.plates:  # sequential plates, the first of a `PlateLayout`
                index = index.select(1, self.cell[name])
        sizes = [frame.size if frame.name in plates else 1 for frame in self.frames]
        index = index.reshape(len(index), *sizes, *[1] * len(self.event_shape))
        value = self.value.gather(0, index.expand(len(index), *self.value.shape[1:]))
        return replace(self, value=value)


def stacked(
    site: Site,
    values: Sequence[Tensor],
    total: int,
    nesting: int,
    kind: Kind = "latent",
    event_dim: int | None = None,
    frames: tuple[Any, ...] | None = None,
) -> SiteDraws:
    """Return the draws of a site from its values in one or several runs, `total` in each.

    Values have the plate of samples left of the ``nesting`` dims of other plates. ``event_dim`` and
    ``frames`` are by default those of the site.
    """
    frames = _frames(site) if frames is None else frames
    event_dim = site["fn"].event_dim if event_dim is None else event_dim
    sizes = {frame.dim: frame.size for frame in frames}
    batch = (total, *(sizes.get(dim, 1) for dim in range(-nesting, 0)))
    rows = []
    for value in values:
        padding = (1,) * (len(batch) + event_dim - value.dim())
        value = value.detach().reshape(padding + value.shape)
        event = value.shape[len(batch) :]
        value = value.expand(*batch, *event)
        rows.append(value.reshape(total, *(frame.size for frame in frames), *event))
    loops = [frame for frame in plates_of(site).values() if not frame.vectorized]
    cell = {frame.name: (frame.counter - 1) % frame.size for frame in loops}
    return SiteDraws(torch.cat(rows), frames, kind, cell)


def _frames(site: Site) -> tuple[Any, ...]:
    found = [frame for frame in plates_of(site).values() if frame.vectorized]
    return tuple(sorted(found, key=lambda frame: frame.dim))


@dataclass(frozen=True)
class Draws:
    """S draws of some sites of a model.

    ``draws["z"]`` is a ``[S, *plates, *event]``-dim tensor, for the vectorised plates around the
    site from left to right. ``log_p`` and ``log_q`` of posterior draws are log p(x, z) and log
    q(z), ``[S, *plates]`` in nats, float64, for the ``plates`` that enclose every sample site;
    where they are None, ``unweighted`` says why. ``resampled`` draws were chosen by their weights.
    ``minibatch`` has the subsample sites of the plates around latents, which other calls must
    share; ``whole_minibatch`` those of all plates. ``scaled`` names log-likelihoods with a scale.
    """

    sites: dict[str, SiteDraws]
    count: int
    log_p: Tensor | None = None
    log_q: Tensor | None = None
    plates: tuple[str, ...] = ()
    resampled: bool = False
    minibatch: poutine.Trace = field(default_factory=poutine.Trace, repr=False)
    whole_minibatch: poutine.Trace = field(default_factory=poutine.Trace, repr=False)
    unweighted: str = ""
    scaled: tuple[str, ...] = ()

    @property
    def log_densities(self) -> tuple[Tensor, Tensor]:
        """``log_p`` and ``log_q``; raises ValueError for draws that have none."""
        if self.log_p is None or self.log_q is None:
            raise ValueError(f"These draws have no log p, log q. {self.unweighted}")
        return self.log_p, self.log_q

    @property
    def log_weights(self) -> Tensor:
        """``[S, *plates]`` in nats."""
        log_p, log_q = self.log_densities
        return log_p - log_q

    def __getitem__(self, name: str) -> Tensor:
        return self.sites[name].value

    def __len__(self) -> int:
        return self.count

    def take(self, index: Tensor) -> "Draws":
        taken = {name: each.take(index, self.plates) for name, each in self.sites.items()}
        log_p, log_q = (log_density.gather(0, index) for log_density in self.log_densities)
        draws = replace(self, sites=taken, count=len(index), resampled=True)
        return replace(draws, log_p=log_p, log_q=log_q)

    def of_this_call(self) -> "Draws":
        """Return the draws with their whole minibatch, for another run on the same arguments."""
        return replace(self, minibatch=self.whole_minibatch)

    def of_kind(self, *kinds: Kind) -> dict[str, SiteDraws]:
        """Return sites of kinds ``"latent"``, ``"computed"`` (deterministic), ``"observed"``."""
        return {name: each for name, each in self.sites.items() if each.kind in kinds}


def joined(chunks: Sequence[dict[str, SiteDraws]]) -> dict[str, SiteDraws]:
    """Concatenate draws of the same sites."""
    return {
        name: replace(draws[0], value=torch.cat([each.value for each in draws]))
        for name in dict.fromkeys(name for chunk in chunks for name in chunk)
        for draws in [_of_each(name, chunks)]
    }


def _of_each(name: str, runs: Sequence[Mapping[str, Any]]) -> list[Any]:
    if any(name not in run for run in runs):
        raise ValueError(f"Site '{name}' is in some runs only. Sample it in all, under a mask.")
    return [run[name] for run in runs]


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

    def latents(self) -> dict[str, SiteDraws]:
        return self.each(is_latent)

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
        group = _of_each(name, [trace.nodes for trace in self.traces])
        values = [value_of(site) for site in group]
        return stacked(group[0], values, self.total, self.nesting, kind, event_dim)

    def _deterministic(self, name: str) -> SiteDraws:
        """Return the values of a deterministic site; its shape in a single run gives its dims."""
        group = _of_each(name, [trace.nodes for trace in self.traces])
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
        frames = tuple(frame for frame in _frames(group[0]) if -frame.dim <= depth)
        run = values, self.total, self.nesting
        return stacked(group[0], *run, "computed", len(shape) - depth, frames)


def _plate_dims(site: Site) -> int:
    """Return how many dims of a deterministic site, from the left, are those of plates."""
    shape, event_dim = site["value"].shape, site["fn"].event_dim
    if event_dim < len(shape):  # given by the user: by default all dims are those of an event
        return len(shape) - event_dim
    sizes = {frame.dim: frame.size for frame in _frames(site)}
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
    compile: bool = False,
) -> dict[str, SiteDraws]:
    """Run a model on draws of its latents and on their minibatch, in chunks.

    Latents without draws are drawn from the model; so are data, with ``draws_data``. ``collect``
    returns what is wanted of the runs of a chunk; the other options are those of `posterior_draws`.
    A model that does not fit one more plate runs under `torch.vmap`, or one by one.

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
    size, nesting = chunk_size or samples_per_chunk(sites(single)), nesting_of(single)
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
                traces = [program.run_model(_source(minibatch, wide))]
        elif fits_vmap and count > 1:
            particles = Particles(1, count, -nesting - 1, vmap=True)
            try:
                traces = [run_model(program, _source(minibatch, wide), values, particles)]
            except torch.OutOfMemoryError:
                raise
            except Exception:  # a loop has the model's own errors
                if passes.is_traced:
                    raise
                fits_vmap = False
        if not traces:
            passes.loops(count)
            rows = ({name: value[row] for name, value in values.items()} for row in range(count))
            traces = [program.run_model(_source(minibatch, row)) for row in rows]
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
                raise ValueError(
                    f"Site '{site['name']}' was drawn in plate '{frame.name}' of {frame.size} "
                    f"entries, not {here and here.size}. Draw it for these data."
                )
