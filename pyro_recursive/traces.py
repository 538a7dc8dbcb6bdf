"""Runs guide and model once for all particles, and cuts the sampled values out of the graph.

Everything here goes through public Pyro handlers: one outer particle plate, `poutine.trace` and
`poutine.replay`. A `Path` is a value of the guide on both sides of a cut: the sample with its
graph, and a stand-in that the replayed programs see. The gradient that arrives at the stand-in
goes on to the sample multiplied by a factor that is known only after the forward pass.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakKeyDictionary, ref

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from pyro.util import check_model_guide_match
from torch import Tensor

__all__ = ["Draw", "Particles", "Path", "Program", "draw", "is_delta", "sites"]

Site = dict[str, Any]

PARTICLE_PLATE = "num_particles_vectorized"  # the name that Pyro's own losses use


@dataclass(frozen=True)
class Program:
    """A model, a guide, and the arguments of this call."""

    model: Callable
    guide: Callable
    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Particles:
    """M * K samples, m slowest; `dim` is the particle plate's, None where runs are looped."""

    num_estimates: int
    num_particles: int
    dim: int | None = None

    @property
    def total(self) -> int:
        """The number of samples in all."""
        return self.num_estimates * self.num_particles


@dataclass(frozen=True)
class Structure:
    """What one run tells about a program: its plate nesting and the plates of each sample site."""

    max_plate_nesting: int
    model: dict[str, Site]
    guide: dict[str, Site]


class Path:
    """One guide value cut in two: `value` has the guide's graph, `stand_in` is what is replayed."""

    def __init__(self, site: Site, particle: int) -> None:
        self.site, self.particle = site, particle
        self.value: Tensor = site["value"]
        self._factor: list[Tensor] = []
        self.stand_in: Tensor = _ScaleGradient.apply(self.value, self._factor)

    def scale_gradient(self, factor: Tensor) -> None:
        """Set what multiplies the gradient on its way from the stand-in to the value."""
        self._factor[:] = [factor]


class _ScaleGradient(torch.autograd.Function):
    """The identity; its backward pass multiplies by a tensor that is filled in later."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: list[Tensor]) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor[0], None


@dataclass
class Draw:
    """One run of guide and model: all particles, or one of them where runs are looped.

    `paths` cuts the guide's samples from its densities, `crossings` the guide from the model.
    """

    model: poutine.Trace
    guide: poutine.Trace
    paths: list[Path]
    crossings: list[Path]


Replay = Literal["none", "paths", "values"]


def draw(
    program: Program,
    num_estimates: int,
    num_particles: int,
    *,
    max_plate_nesting: float = math.inf,
    vectorize: bool = True,
    **options: Any,
) -> tuple[Particles, list[Draw]]:
    """Run guide and model for M * K samples, in one vectorised pass or one by one; see `_draw`."""
    if not vectorize or num_estimates * num_particles == 1:
        particles = Particles(num_estimates, num_particles)
        return particles, _draw(program, particles, **options)
    known = structure_of(program).max_plate_nesting
    assumed = known if math.isinf(max_plate_nesting) else int(max_plate_nesting)
    particles = Particles(num_estimates, num_particles, dim=-assumed - 1)
    try:
        runs = _draw(program, particles, **options)
        if nesting_of(runs[0]) <= assumed:
            return particles, runs
        problem = ValueError(f"a plate stands to the left of the particle plate at {particles.dim}")
    except ValueError as error:
        problem = error
    # Plates may depend on the arguments: look at this call's before giving up.
    nesting = structure_of(program, fresh=True).max_plate_nesting
    if nesting <= assumed:
        raise problem
    particles = Particles(num_estimates, num_particles, dim=-nesting - 1)
    return particles, _draw(program, particles, **options)


def _draw(
    program: Program,
    particles: Particles,
    *,
    replay: Replay = "none",
    cut_model: bool = False,
    shared: frozenset[str] = frozenset(),
    subsample: poutine.Trace | None = None,
) -> list[Draw]:
    """Run guide and model for all particles on one minibatch.

    ``replay="paths"`` runs the guide a second time on stand-ins of its reparameterised samples,
    ``"values"`` on detached samples; ``cut_model`` gives the model stand-ins of everything it takes
    from the guide. Sites in ``shared`` have one value for the K samples of an estimate. A trace
    of subsample sites fixes the minibatch; without one it is drawn here, once for all particles.
    """
    runs: list[Draw] = []
    sharing = _ShareWithinEstimate(shared, particles)
    for particle in range(1 if particles.dim is not None else particles.total):
        sharing.particle = particle
        noise = _SameNoise() if replay != "none" else nullcontext()
        with _particle_plate(particles):
            with sharing, noise:
                guide = _run_guide(program, subsample)
            with noise:
                guide, paths = _replayed(program, guide, particle, replay)
            run = _continue(program, guide, paths, particle, cut_model, subsample)
        if subsample is None:
            subsample = subsample_sites(run)
        runs.append(run)
    return runs


def _replayed(
    program: Program, guide: poutine.Trace, particle: int, replay: Replay
) -> tuple[poutine.Trace, list[Path]]:
    """Run the guide once more where asked.

    Its Delta sites are not replayed: they are computed again from what they depend on.
    """
    paths: list[Path] = []
    if replay == "values":
        guide = _run_guide(program, _with_values(_without(guide, is_delta), _detached))
    elif replay == "paths":
        cut = _without(guide, is_delta)
        guide = _run_guide(program, _with_values(cut, _cut(particle, paths)))
    return guide, paths


def _continue(
    program: Program,
    guide: poutine.Trace,
    paths: list[Path],
    particle: int,
    cut_model: bool,
    subsample: poutine.Trace | None,
) -> Draw:
    """Replay the model on the guide's values."""
    crossings: list[Path] = []
    source = _with_values(guide, _cut(particle, crossings)) if cut_model else guide
    model = poutine.trace(poutine.replay(program.model, trace=_merged(source, subsample)))
    return Draw(model.get_trace(*program.args, **program.kwargs), guide, paths, crossings)


def _run_guide(program: Program, replayed: poutine.Trace | None) -> poutine.Trace:
    """Trace the guide, with the values of another trace where there is one."""
    guide = program.guide
    handled = guide if replayed is None else _Substitute(replayed)(guide)
    trace = poutine.trace(handled).get_trace(*program.args, **program.kwargs)
    if isinstance(poutine.unwrap(guide), Messenger):
        # A guide messenger runs the model too, and what the model observes is not the guide's.
        trace = _without(trace, lambda site: site["is_observed"])
    return trace


class _Substitute(Messenger):
    """Gives sites the values of a trace, as `poutine.replay` does.

    Unlike it, leaves `infer` alone: guide messengers keep the prior of their own run there.
    """

    def __init__(self, trace: poutine.Trace) -> None:
        super().__init__()
        self.trace = trace

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.trace.nodes and not msg["is_observed"]:
            msg["value"], msg["done"] = self.trace.nodes[msg["name"]]["value"], True


def _with_values(trace: poutine.Trace, value_of: Callable[[Site], Tensor]) -> poutine.Trace:
    """Copy a trace with another value at each latent site."""
    copy = trace.copy()
    for site in sites(trace):
        if not site["is_observed"]:
            copy.nodes[site["name"]] = {**site, "value": value_of(site)}
    return copy


def _detached(site: Site) -> Tensor:
    return site["value"].detach()


def _cut(particle: int, paths: list[Path]) -> Callable[[Site], Tensor]:
    """Return a function that cuts a site's value and keeps the `Path`."""

    def stand_in(site: Site) -> Tensor:
        if not site["value"].requires_grad:
            return site["value"]
        paths.append(Path(site, particle))
        return paths[-1].stand_in

    return stand_in


def _without(trace: poutine.Trace, unwanted: Callable[[Site], bool]) -> poutine.Trace:
    copy = trace.copy()
    for site in list(sites(trace)):
        if unwanted(site):
            copy.remove_node(site["name"])
    return copy


def _merged(trace: poutine.Trace, other: poutine.Trace | None) -> poutine.Trace:
    if other is None:
        return trace
    copy = trace.copy()
    for name, site in other.nodes.items():
        if name not in copy.nodes:
            copy.add_node(name, **site)
    return copy


def subsample_sites(run: Draw) -> poutine.Trace:
    """Return the minibatch of a run as a trace of its subsample sites, for replay."""
    chosen = poutine.Trace()
    for trace in (run.guide, run.model):
        for name, site in trace.nodes.items():
            if site["type"] == "sample" and site_is_subsample(site) and name not in chosen.nodes:
                chosen.add_node(name, **site)
    return chosen


def sites(trace: poutine.Trace) -> Iterator[Site]:
    """Yield the sample sites that carry a density: no subsample and no deterministic sites."""
    for site in trace.nodes.values():
        if site["type"] != "sample" or site_is_subsample(site):
            continue
        if not site["infer"].get("_deterministic"):
            yield site


def is_delta(site: Site) -> bool:
    """Whether the site's value is computed, not sampled: a Delta under any wrapping."""
    fn = site["fn"]
    while isinstance(fn, dist.Independent | dist.MaskedDistribution):
        fn = fn.base_dist
    return isinstance(fn, dist.Delta)


def _particle_plate(particles: Particles) -> ExitStack:
    """Enter the particle plate, if there is more than one particle to a run."""
    stack = ExitStack()
    if particles.dim is not None:
        stack.enter_context(pyro.plate(PARTICLE_PLATE, particles.total, dim=particles.dim))
    return stack


class _SameNoise(Messenger):
    """Gives two runs of a guide the same noise outside its sites: dropout, say.

    The first run notes the random state at its start and after each site, the second goes back to
    it; otherwise densities would be those of another guide than the one that sampled.
    """

    def __init__(self) -> None:
        super().__init__()
        self.states: dict[str, list[Tensor]] = {}
        self.again = False

    def __enter__(self) -> "_SameNoise":
        self.again = bool(self.states)
        self._meet("")
        return super().__enter__()

    def _pyro_post_sample(self, msg: Any) -> None:
        self._meet(msg["name"])

    def _meet(self, name: str) -> None:
        if not self.again:
            self.states[name] = _random_state()
        elif name in self.states:
            cpu, *cuda = self.states[name]
            torch.set_rng_state(cpu)
            for state in cuda:
                torch.cuda.set_rng_state(state)


def _random_state() -> list[Tensor]:
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]


class _ShareWithinEstimate(Messenger):
    """Gives the K samples of an estimate one value at the named sites."""

    def __init__(self, names: frozenset[str], particles: Particles) -> None:
        super().__init__()
        self.names, self.particles, self.particle = names, particles, 0
        self.first: dict[str, Tensor] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        # This handler is the outermost: it speaks before the trace records.
        if msg["name"] in self.names and not msg["is_observed"]:
            msg["value"] = self._shared(msg["name"], msg["value"], msg["fn"].event_dim)

    def _shared(self, name: str, value: Tensor, event_dim: int) -> Tensor:
        M, K = self.particles.num_estimates, self.particles.num_particles
        if self.particles.dim is None:
            if self.particle % K == 0:
                self.first[name] = value
            return self.first[name]
        dim = value.dim() + self.particles.dim - event_dim
        split = value.unflatten(dim, (M, K))
        return split.narrow(dim + 1, 0, 1).expand_as(split).flatten(dim, dim + 1)


def check_sites(run: Draw, max_plate_nesting: int) -> None:
    """Raise where model and guide do not fit together, naming site and remedy."""
    latent = {site["name"]: site for site in sites(run.model) if not site["is_observed"]}
    guided = {site["name"]: site for site in sites(run.guide) if not site["is_observed"]}
    for name, site in guided.items():
        if site["infer"].get("enumerate"):
            raise NotImplementedError(
                f"Guide site '{name}' asks for enumeration, which multi-sample bounds do not do. "
                "Drop its infer={'enumerate': ...} (estimator='vimco' handles discrete sites), or "
                "use pyro.infer.TraceEnum_ELBO."
            )
        if name not in latent and not site["infer"].get("is_auxiliary"):
            raise ValueError(
                f"Guide site '{name}' is no latent site of the model. Sample it in the model too, "
                "or mark it infer={'is_auxiliary': True}."
            )
    for name in latent.keys() - guided.keys():
        if latent[name]["infer"].get("enumerate"):
            raise NotImplementedError(
                f"Model site '{name}' is to be enumerated, which multi-sample bounds do not do. "
                "Use pyro.infer.TraceEnum_ELBO, or sample the site in the guide "
                "(estimator='vimco')."
            )
        raise ValueError(
            f"Model site '{name}' is latent and the guide does not sample it: the bound would be "
            "wrong. Sample it in the guide, or observe it."
        )
    if is_validation_enabled():
        check_model_guide_match(run.model, run.guide, max_plate_nesting)


_structures: WeakKeyDictionary[Any, dict[Any, tuple[ref, Structure]]] = WeakKeyDictionary()


def structure_of(program: Program, *, fresh: bool = False) -> Structure:
    """Return the structure of a program, from memory where this pair was seen before.

    Kept weakly, by the objects themselves, so that no loss remembers the first model it saw.
    """
    owner, key = _identity(program.model)
    guide, guide_key = _identity(program.guide)
    try:
        known = _structures.setdefault(owner, {})
        place = (key, guide_key, id(guide))
        if not fresh and place in known and known[place][0]() is guide:
            return known[place][1]
        structure = _discover(program)
        known[place] = (ref(guide), structure)
    except TypeError:  # unhashable or without weak references: look again each time
        return _discover(program)
    return structure


def _identity(function: Any) -> tuple[Any, Any]:
    """Return what lives as long as the function: bound methods are made anew at each access."""
    return getattr(function, "__self__", function), getattr(function, "__func__", None)


def _discover(program: Program) -> Structure:
    """Run guide and model once, outside any particle plate, leaving the random state alone."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices), poutine.block():
        run = _draw(program, Particles(1, 1))[0]
    # Later a dim of size M * K could pass for the particle plate.
    for trace in (run.model, run.guide):
        for site in sites(trace):
            check_batch_shape(site, *_batch_shapes(site))
    return structure_in(run)


def structure_in(run: Draw) -> Structure:
    """Return the structure that one run shows."""
    return Structure(
        max_plate_nesting=nesting_of(run),
        model={site["name"]: _outline(site) for site in sites(run.model)},
        guide={site["name"]: _outline(site) for site in sites(run.guide)},
    )


def check_batch_shape(site: Site, *shapes: torch.Size) -> None:
    """Raise where a batch dim belongs to no plate: it would be summed or shared in silence."""
    dims = {frame.dim for frame in site["cond_indep_stack"]}
    for shape in shapes:
        for dim in range(-len(shape), 0):
            if shape[dim] != 1 and dim not in dims:
                raise ValueError(
                    f"Site '{site['name']}' has batch shape {tuple(shape)}, and dim {dim} belongs "
                    "to no plate. Put the site inside a pyro.plate, or use .to_event(...) on its "
                    "distribution."
                )


def _batch_shapes(site: Site) -> list[torch.Size]:
    """Return the shapes that a site's log-density is made of: distribution, value, scale, mask."""
    value = site["value"]
    tensors = [site[key] for key in ("scale", "mask") if isinstance(site[key], Tensor)]
    batch = value.shape[: value.dim() - site["fn"].event_dim]
    return [site["fn"].batch_shape, batch, *(tensor.shape for tensor in tensors)]


def _outline(site: Site) -> Site:
    """Keep what describes a site, not its tensors."""
    return {key: site[key] for key in ("name", "is_observed", "cond_indep_stack")}


def nesting_of(run: Draw) -> int:
    """Return how many dims to the right the plates of a run use, the particle plate aside."""
    return max(
        (
            -frame.dim
            for trace in (run.model, run.guide)
            for site in trace.nodes.values()  # deterministic ones too: their plates take dims
            if site["type"] == "sample"
            for frame in site["cond_indep_stack"]
            if frame.vectorized and frame.name != PARTICLE_PLATE
        ),
        default=0,
    )
