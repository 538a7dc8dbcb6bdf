"""Runs of guide and model for all particles: in one pass, or one by one."""

import math
import re
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from pyro_recursive.tracing import batched
from pyro_recursive.tracing.choice import brief, choose
from pyro_recursive.tracing.dependence import dependence_of
from pyro_recursive.tracing.guide_values import GuideValues, value_axes
from pyro_recursive.tracing.handlers import ComponentAssignment, ReplacedDraws
from pyro_recursive.tracing.isolation import ReplayedNoise
from pyro_recursive.tracing.masks import leave_out_masked
from pyro_recursive.tracing.plates import Particles, ProgramStructure
from pyro_recursive.tracing.program import Program, structure_of, without
from pyro_recursive.tracing.sites import (
    JOINT,
    JointDraw,
    Site,
    SiteTable,
    is_delta,
    latent_sites,
    sites,
    subsample_sites,
)
from pyro_recursive.tracing.user_warnings import warn_user


class GradientCut:
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
class ParticleRun:
    """One run of guide and model: all particles, or one of them where runs are looped.

    `guide_cuts` cut the guide's samples from its densities, `model_cuts` the guide from the model.
    `shared_cuts` cut the samples that several particles share from all that the guide makes of
    them; the first of looped runs has those of all.
    """

    model: poutine.Trace
    guide: poutine.Trace
    table: SiteTable
    guide_cuts: list[GradientCut]
    model_cuts: list[GradientCut]
    shared_cuts: list[GradientCut] = field(default_factory=list)


Replay = Literal["none", "paths", "values"]


def run_particles(
    program: Program, num_estimates: int, num_particles: int, **options: Any
) -> tuple[Particles, list[ParticleRun]]:
    """Run guide and model for M * K samples; what the model masks is left out of the guide, too.

    In one vectorised pass or one by one; see `_draw`.
    """
    particles, runs = _run(program, num_estimates, num_particles, **options)
    leave_out_masked([run.table for run in runs], program)
    return particles, runs


def particles_of(
    program: Program, num_estimates: int, num_particles: int, vectorize: bool | str = True
) -> Particles:
    """Return how M * K samples of a program run; `run_particles` may find plates that differ."""
    looped = Particles(num_estimates, num_particles)
    if not vectorize or looped.total == 1:
        return looped
    structure = structure_of(program)
    return _in_one_pass(program, structure, looped, structure.max_plate_nesting, vectorize)


def _run(
    program: Program,
    num_estimates: int,
    num_particles: int,
    *,
    max_plate_nesting: float = math.inf,
    vectorize: bool | str = True,
    by_value: bool = False,
    **options: Any,
) -> tuple[Particles, list[ParticleRun]]:
    """Run guide and model for M * K samples, in one pass or one by one; see `_draw`.

    ``vectorize`` is True or "auto" for what `tracing.choice` finds, "vmap" for the model under
    `torch.vmap` where all samples run in one pass, and False for a loop. Enumerated latents of the
    model have all their values at once, in dims left of the particle plate. ``by_value`` runs all
    samples for each combination of the values that the guide enumerates, which are sampled
    otherwise.
    """
    structure = structure_of(program)
    values = value_axes(structure, program.memory) if by_value else ()
    looped = Particles(num_estimates, num_particles, values=values)
    one_by_one = not vectorize or looped.total == 1
    known = structure.max_plate_nesting
    assumed = known if math.isinf(max_plate_nesting) else int(max_plate_nesting)
    if one_by_one:
        particles = looped
    else:
        particles = _in_one_pass(program, structure, looped, assumed, vectorize)
    try:
        runs = _draw(program, particles, **_form(structure, assumed), **options)
        if not _is_outgrown(runs[0].table, particles, structure, assumed, by_value):
            return particles, runs
        problem: Exception = ValueError(f"a plate stands left of the particle plate at {-assumed}")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if particles.dim is None and not structure.enumerated and not particles.values:
            raise
        problem = error
    # Plates may depend on the arguments: look at this call's, in a run of one sample.
    fresh = structure_of(program, fresh=True)
    _refuse_misfit(fresh)
    nesting = max(assumed, fresh.max_plate_nesting)
    looped = replace(looped, values=value_axes(fresh, program.memory) if by_value else ())
    one_by_one = not vectorize or looped.total == 1
    again = looped if one_by_one else _in_one_pass(program, fresh, looped, nesting, vectorize)
    if again == particles and _form(fresh, nesting) == _form(structure, assumed):
        if particles.dim is None:
            raise problem
        if not particles.vmap:
            text = str(problem).partition("Trace Shapes")[0]  # which Pyro adds to every error
            if _SHAPES.search(text):
                problem.add_note(
                    f"All {particles.total} samples run in one pass, under one more plate on the "
                    "left. Count dims from the right, or use vectorize_particles=False."
                )
            raise problem
        where = "guide or model" if particles.vmap_guide else "model"
        _warn_of_loop(looped, f"the {where} raises {brief(problem)}")
        again = looped
    return again, _draw(program, again, **_form(fresh, nesting), **options)


def _form(structure: ProgramStructure, nesting: int) -> dict[str, Any]:
    """Return what `_draw` needs of a structure, with so many dims of plates."""
    return {
        "ranks": structure.ranks,
        "enum_dim": -nesting - 2 if structure.enumerated else None,
    }


def _is_outgrown(
    table: SiteTable,
    particles: Particles,
    structure: ProgramStructure,
    nesting: int,
    by_value: bool,
) -> bool:
    """Whether a run has plates in the way of others, or enumerated sites that were not known."""
    if by_value and {r.name for r in table.enumerated_in_guide} != structure.guide_values.keys():
        return True
    if structure.enumerated.issuperset(record.name for record in table.enumerated):
        is_free = particles.dim is None and not structure.enumerated
        return table.nesting > nesting and not is_free
    return True


# What errors about shapes say, in torch and in Pyro, and `choice` of samples that mix.
_SHAPES = re.compile(
    r"\b(shapes?|sizes?|dim|dimensions?|broadcast\w*|out of bounds|one sample)\b",
    re.IGNORECASE,
)


def _in_one_pass(
    program: Program,
    structure: ProgramStructure,
    looped: Particles,
    nesting: int,
    vectorize: bool | str,
) -> Particles:
    """Return the particles under a plate or `torch.vmap`; looped ones where neither is right."""
    is_new = structure.mode is None
    choose(program, structure)
    if structure.mode == "loop":
        _refuse_misfit(structure)
        if is_new:
            _warn_of_loop(looped, structure.cause)
        return looped
    guide = structure.mode == "vmap guide"
    if guide and looped.values:
        _warn_of_loop(looped, "the guide runs under torch.vmap, and enumerates latents")
        return looped
    model = guide or structure.mode == "vmap" or vectorize == "vmap"
    return replace(looped, dim=-nesting - 1, vmap=model, vmap_guide=guide)


def _refuse_misfit(structure: ProgramStructure) -> None:
    """Raise where model and guide do not fit, before an error or a loop that follows from it."""
    if (misfit := structure.misfit) is not None:
        raise type(misfit)(*misfit.args)


def _warn_of_loop(particles: Particles, cause: str) -> None:
    remedy = (
        "Count dims from the right, or use" if _SHAPES.search(cause) else "To silence this, use"
    )
    warn_user(
        f"Samples run one by one ({particles.total} runs of model and guide): {cause}. {remedy} "
        "vectorize_particles=False."
    )


def _draw(
    program: Program,
    particles: Particles,
    *,
    replay: Replay = "none",
    cut_model: bool = False,
    shared: frozenset[str] = frozenset(),
    subsample: poutine.Trace | None = None,
    assignment: ComponentAssignment | None = None,
    ranks: dict[str, int] | None = None,
    enum_dim: int | None = None,
) -> list[ParticleRun]:
    """Run guide and model for all particles on one minibatch.

    ``replay="paths"`` runs the guide a second time on stand-ins of its reparameterised samples,
    ``"values"`` on detached samples; ``cut_model`` gives the model stand-ins of everything it takes
    from the guide. Sites in ``shared`` have one value for the K samples of an estimate. A trace
    of subsample sites fixes the minibatch; without one it is drawn here, once for all particles.
    ``assignment`` choose the components of mixture guides. ``ranks`` are those of the structure,
    and ``enum_dim`` is the first dim of enumerated latents.
    """
    runs: list[ParticleRun] = []
    looped, count = particles.dim is None, particles.total
    sharing: Any = nullcontext()
    shared_cuts: list[GradientCut] = []
    if shared:
        sharing = _ShareWithinEstimate(
            shared, particles, shared_cuts if replay == "paths" else None
        )
    enumerated = GuideValues(particles) if particles.values else nullcontext()
    dependence = dependence_of(program) if count > 1 or enum_dim is not None else {}
    key = f"plate of {count} at {particles.dim}"
    if key not in program.memory:  # making one costs a sample statement
        program.memory[key] = particles.plate()
    plate = program.memory[key]
    for particle in range(count if looped else 1):
        if isinstance(sharing, _ShareWithinEstimate):
            sharing.particle = particle
        if isinstance(enumerated, GuideValues):
            enumerated.particle = particle
        if assignment is not None:
            assignment.particle = particle if looped else None
        noise = ReplayedNoise() if replay != "none" else nullcontext()
        cuts: list[GradientCut] = []
        model_cuts: list[GradientCut] = []
        with assignment or nullcontext():
            if particles.vmap_guide:
                run_guide = partial(batched.run_guide, program, particles, ranks or {})
                given = subsample or poutine.Trace()
                if isinstance(sharing, _ShareWithinEstimate):
                    given = sharing.shared_in(run_guide(given))
                guide = run_guide(given, noise)
                if replay != "none":
                    guide = run_guide(_stand_ins(guide, particle, replay, cuts)[0], noise)
            else:
                with enumerated, plate, sharing, noise:
                    guide = program.run_guide(subsample)
                if replay != "none":
                    drawn = guide
                    guide, vectors = _stand_ins(drawn, particle, replay, cuts)
                    if not _are_apart(program, drawn):
                        with plate, noise, ReplacedDraws(vectors):
                            guide = program.run_guide(guide)
            source = _source(guide, particle, subsample, model_cuts if cut_model else None)
            if particles.vmap:
                values = batched.values_by_particle(source, particles, ranks or {})
                model = batched.run_model(program, source, values, particles, enum_dim)
            else:
                with plate:
                    model = program.run_model(source, enum_dim)
        if subsample is None and looped:
            subsample = subsample_sites(guide, model)
        table = SiteTable(model, guide, by_value=bool(particles.values))
        found = cuts, model_cuts, [] if runs else shared_cuts
        runs.append(ParticleRun(model, guide, table, *found))
    if count == 1 and any(record.group == "score" for record in runs[0].table.guide):
        dependence = dependence_of(program)
    for run in runs:
        run.table.note(dependence)
    return runs


def _source(
    guide: poutine.Trace,
    particle: int,
    subsample: poutine.Trace | None,
    cuts: list[GradientCut] | None,
) -> poutine.Trace:
    """Return what a model replays: the minibatch, and a guide's values, cut if there is a list."""
    if subsample is None and cuts is None:
        return guide
    source = guide.copy()
    if cuts is not None:
        for site in latent_sites(guide):
            source.nodes[site["name"]] = _cut(site, particle, "paths", cuts)
    for name, site in subsample.nodes.items() if subsample is not None else ():
        if name not in source.nodes:
            source.add_node(name, **site)
    return source


def _stand_ins(
    guide: poutine.Trace, particle: int, replay: Replay, cuts: list[GradientCut]
) -> tuple[poutine.Trace, dict[frozenset[str], Tensor]]:
    """Return what a second run of the guide replays, and the packed vectors in it, by their sites.

    Delta sites and those of packed vectors are recomputed.
    """
    copy, vectors = guide.copy(), {}
    for site in latent_sites(guide):
        name, draw = site["name"], _joint_draw(site, guide)
        if draw is not None and draw.sites not in vectors:
            fn = dist.Delta(draw.vector, event_dim=1)
            packed = _cut({**site, "fn": fn, "value": draw.vector}, particle, replay, cuts)
            vectors[draw.sites] = packed["value"]
        if draw is not None or is_delta(site):
            copy.remove_node(name)
        else:
            copy.nodes[name] = _cut(site, particle, replay, cuts)
    return copy, vectors


def _are_apart(program: Program, guide: poutine.Trace) -> bool:
    """Whether no distribution of the guide depends on its samples, in this run as in those before.

    A graph of this run shows it. Once one has, a structure is taken to depend for good.
    """
    known = program.memory
    if known.get("samples apart", True):
        known["samples apart"] = False  # also where a density raises
        known["samples apart"] = _is_without_paths(sites(guide))
    return known["samples apart"]


def _is_without_paths(drawn: list[Site]) -> bool:
    """Whether all sites are drawn with a graph, and none leads from a density to a value."""
    for site in drawn:
        if site["is_observed"] or is_delta(site) or JOINT in site["infer"]:
            return False
    values = [site["value"] for site in drawn]
    if not all(value.requires_grad for value in values):
        return False
    ends = {get_gradient_edge(value).node for value in values}
    each = [site["fn"].log_prob(site["value"].detach()) for site in drawn]
    waiting = [get_gradient_edge(density).node for density in each if density.requires_grad]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node in ends:
            return False
        new = {before for before, _ in node.next_functions if before is not None} - seen
        seen |= new
        waiting += new
    return True


def _joint_draw(site: Site, guide: poutine.Trace) -> JointDraw | None:
    """Return the packed vector that all its sites in a trace have their values from, if any."""
    draw = site["infer"].get(JOINT)
    if draw is None or any(guide.nodes[n]["value"] is not v for n, v in draw.values.items()):
        return None
    return draw


def _cut(site: Site, particle: int, replay: Replay, cuts: list[GradientCut]) -> Site:
    """Return the site with a value that is cut from its graph."""
    if replay == "values":
        return {**site, "value": site["value"].detach()}
    if not site["value"].requires_grad:
        return site
    cuts.append(GradientCut(site, particle))
    return {**site, "value": cuts[-1].stand_in}


class _ShareWithinEstimate(Messenger):
    """Gives the K samples of an estimate one value at the named sites.

    Sampled values are cut from what the guide makes of them, if there is a list of ``cuts``.
    """

    def __init__(
        self, names: frozenset[str], particles: Particles, cuts: list[GradientCut] | None = None
    ) -> None:
        super().__init__()
        self.names, self.particles, self.cuts, self.particle = names, particles, cuts, 0
        self.first: dict[str, Tensor] = {}
        self.packed: frozenset[str] = frozenset()  # sites whose packed vector is shared

    def _pyro_post_joint_draw(self, msg: Any) -> None:
        sites = msg["args"][1]
        if sites <= self.names:
            msg["value"] = self._shared(min(sites), msg["value"], 1, True)
            self.packed |= sites

    def _pyro_post_sample(self, msg: Any) -> None:
        # This handler is the outermost: it speaks before the trace records.
        if msg["name"] in self.names - self.packed and not msg["is_observed"]:
            drawn = msg["value"], msg["fn"].event_dim, not is_delta(msg)
            msg["value"] = self._shared(msg["name"], *drawn)

    def shared_in(self, trace: poutine.Trace) -> poutine.Trace:
        """Return the shared values of a run of all particles, and its minibatch, for another."""
        kept = without(trace, lambda s: s["name"] not in self.names or is_delta(s))
        for site in latent_sites(kept):
            value = self._shared(site["name"], site["value"], site["fn"].event_dim, True)
            kept.nodes[site["name"]] = {**site, "value": value}
        return kept

    def _shared(self, name: str, value: Tensor, event_dim: int, is_drawn: bool) -> Tensor:
        K = self.particles.num_particles
        if self.particles.dim is None:
            if self.particle % K == 0:
                self.first[name] = self._cut(value) if is_drawn else value
            return self.first[name]
        dim = value.dim() + self.particles.dim - event_dim
        split = value.unflatten(dim, (-1, K))
        value = split.narrow(dim + 1, 0, 1).expand_as(split).flatten(dim, dim + 1)
        return self._cut(value) if is_drawn else value

    def _cut(self, value: Tensor) -> Tensor:
        if self.cuts is None or not value.requires_grad:
            return value
        self.cuts.append(GradientCut({"value": value}, self.particle))
        self.cuts[-1].scale_gradient(value.new_ones(()))
        return self.cuts[-1].stand_in
