"""How the samples of a program run: under one more plate, under `torch.vmap`, or looped.

The choice is made once for each structure. A few particles run under a plate whose size is no other
size in the program, and run again on their own, on the same values. A plate is right where all
densities and all values that the guide computes agree, and none has a derivative with respect to
another particle's value. A latent that is computed from noise outside sites would be the same in
all samples under a plate: such guides run under `torch.vmap`.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache, partial
from itertools import count
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import ComposeTransform, TransformedDistribution, biject_to, constraints

from pyro_recursive.tracing import batched
from pyro_recursive.tracing.compatibility import log_prob_of
from pyro_recursive.tracing.handlers import DryRun
from pyro_recursive.tracing.index_bounds import IndexBounds
from pyro_recursive.tracing.isolation import isolated
from pyro_recursive.tracing.perturbed import perturbed
from pyro_recursive.tracing.plates import Mode, Particles, ProgramStructure
from pyro_recursive.tracing.program import FAILURES, Program, without
from pyro_recursive.tracing.sites import (
    Site,
    is_delta,
    latent_sites,
    layers,
    sites,
    subsample_sites,
)

Outputs = dict[str, Tensor]  # by what they are; batch dims on the right
MODES = ("plate", "vmap", "vmap guide", "loop")
RAISES = " raises "
VALUE = "value"  # what the names of computed values start with
NUDGES = 4  # noise such as dropout may be the same twice
NOISE = 100.0  # a difference so many times that of two runs of one particle is no noise


def choose(program: Program, structure: ProgramStructure) -> None:
    """Set the mode of a structure, and the cause if it is not the plate.

    Programs are compared at their parameters and data and near them: what a zero hides in the
    first call matters in later ones.
    """
    if structure.mode is not None:
        return
    with isolated(), DryRun(), torch.enable_grad():
        found = [_Comparison(program, structure).choice()]
        with suppress(Exception), perturbed(program) as near:
            mode, cause = _Comparison(near, structure).choice()
            if RAISES not in cause:  # other values may be impossible
                found.append((mode, cause))
    structure.mode, structure.cause = max(found, key=lambda each: MODES.index(each[0]))


def require_plate(program: Program, structure: ProgramStructure) -> None:
    """Raise ValueError where a program cannot run under a plate of samples."""
    choose(program, structure)
    if structure.mode != "plate":
        raise ValueError(
            f"The model cannot run under a plate of samples: {structure.cause}. Index dims from "
            "the right, such as z.sum(-1)."
        )


class _Comparison:
    """Runs of a few particles under a plate, under `torch.vmap`, and one by one."""

    def __init__(self, program: Program, structure: ProgramStructure) -> None:
        self.program, self.ranks = program, structure.ranks
        total = _unused_prime({*structure.sizes, *_sizes((program.args, program.kwargs))})
        self.particles = Particles(1, total, -structure.max_plate_nesting - 1)
        self.ends = 0, total - 1
        nesting = structure.max_plate_nesting
        self.enum_dim = -nesting - 2 if structure.enumerated else None
        self.is_on_cpu = structure.devices <= {"cpu"}

    def choice(self) -> tuple[Mode, str]:
        """Return the mode, and why it is not the plate."""
        with suppress(*FAILURES):
            mode, cause = self._choice(moved=True)
            if RAISES not in cause:
                return mode, cause
        return self._choice(moved=False)  # other values may be impossible

    def _choice(self, moved: bool) -> tuple[Mode, str]:
        source, cause = self._guide(self._in_plate, moved)
        mode: Mode = "vmap"
        if source is None:
            mode = "vmap guide"
            source, failure = self._guide(self._under_vmap, moved=None)
            if source is None:
                return "loop", failure

        source = _with_leaves(source)
        first = self._model(self._row(source, 0))
        found = _log_densities(first)  # raises for data that no mode can serve
        alone = {name: each.detach() for name, each in found.items()}
        for name, site in subsample_sites(first).nodes.items():
            if name not in source.nodes:
                source.add_node(name, **site)
        run = partial(self._single, self._model, _log_densities, source)
        single = cache(lambda i, nudge: run(i, nudge) if i or nudge else alone)
        if mode == "vmap":
            try:
                with self.particles.plate(), self._bounds():
                    model = _log_densities(self._model(source))
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                cause = f"the model raises {brief(error)}"
            else:
                every = range(self.particles.total)
                cause = self._mixing(model, source) or self._difference(model, single, every)
                if not cause:
                    return "plate", ""
        try:
            values = batched.values_by_particle(source, self.particles, self.ranks)
            vmapped = batched.run_model(self.program, source, values, self.particles, self.enum_dim)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return "loop", f"the model raises {brief(error)}"
        if failure := self._difference(_log_densities(vmapped), single, self.ends):
            return "loop", failure
        return mode, cause

    def _model(self, source: poutine.Trace) -> poutine.Trace:
        """Trace the model with all values of its enumerated latents, whose densities must agree."""
        return self.program.run_model(source, self.enum_dim)

    def _guide(
        self, run: Callable[[poutine.Trace], poutine.Trace], moved: bool | None
    ) -> tuple[poutine.Trace | None, str]:
        """Return a trace of the guide for all particles; if it is not right, None and the cause.

        The particles are varied unless ``moved`` is None: nothing mixes them under `torch.vmap`.
        """
        try:
            drawn = run(poutine.Trace())
            drawn = _with_leaves(drawn if moved is None else self._varied(drawn, moved))
            again = without(drawn, is_delta)  # computed, not drawn
            source = _with_leaves(run(again))
            guide = self._of_guide(source)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return None, f"the guide raises {brief(error)}"
        one = partial(self._single, self.program.run_guide, self._of_guide, again)
        single = cache(one)
        cause = self._mixing(guide, drawn) or self._difference(guide, single, self.ends)
        return (None, f"in the guide {cause}") if cause else (source, "")

    def _in_plate(self, replayed: poutine.Trace) -> poutine.Trace:
        with self.particles.plate(), self._bounds():
            return self.program.run_guide(replayed)

    def _under_vmap(self, replayed: poutine.Trace) -> poutine.Trace:
        return batched.run_guide(self.program, self.particles, self.ranks, replayed)

    def _varied(self, trace: poutine.Trace, moved: bool) -> poutine.Trace:
        """Give particles values that differ, also where the guide is narrow.

        Those of finite supports run through the support; counts are moved by the particle's number.
        """
        total = self.particles.total
        for site in latent_sites(trace):
            base, value = layers(site["fn"])[-1], site["value"]
            place = value.dim() + self.particles.dim - site["fn"].event_dim
            if not _is_discrete(base):
                if moved and value.is_floating_point() and not is_delta(site):
                    site["value"] = _moved(value, site["fn"])
                continue
            if place < 0:
                continue
            batch = value.shape[: value.dim() - base.event_dim]
            numbers = torch.arange(total, device=value.device)
            numbers = numbers.reshape(-1, *[1] * (len(batch) - place - 1)).expand(batch)
            if base.has_enumerate_support:
                support = base.enumerate_support(expand=False)
                support = support.reshape(len(support), *base.event_shape)
                site["value"] = support[numbers.remainder(len(support))].to(value)
            else:
                site["value"] = value + numbers.to(value)
        return trace

    def _bounds(self) -> AbstractContextManager:
        """Check indices where the device would not raise: a plate may be where rows should be."""
        return nullcontext() if self.is_on_cpu else IndexBounds()

    def _row(self, source: poutine.Trace, particle: int, nudge: int = 0) -> poutine.Trace:
        """Return one particle of a trace; ``nudge`` changes values by about their rounding."""
        row = source.copy()
        for name, values in batched.values_by_particle(source, self.particles, self.ranks).items():
            value = values[particle].detach()
            if nudge and value.is_floating_point():
                value = value * (1 - 4 * nudge * torch.finfo(value.dtype).eps)
            row.nodes[name] = {**source.nodes[name], "value": value}
        return row

    def _single(
        self,
        run: Callable[[poutine.Trace], poutine.Trace],
        outputs: Callable[[poutine.Trace], Outputs],
        source: Any,
        i: int,
        nudge: int,
    ) -> Outputs:
        with torch.no_grad():
            try:
                return outputs(run(self._row(source, i, nudge)))
            except FAILURES:  # the value has left its support
                if not nudge:
                    raise
                return outputs(run(self._row(source, i)))

    def _of_guide(self, trace: poutine.Trace) -> Outputs:
        """Return the densities and the computed values of a run of all particles, or of one."""
        found = _log_densities(trace)
        for name, site in trace.nodes.items():
            if site["type"] == "sample" and not site_is_subsample(site) and is_delta(site):
                found[f"{VALUE} of site '{name}'"] = self._value(site)
        return found

    def _value(self, site: Site) -> Tensor:
        """Return a computed value as ``[event, particles, *batch]``; one particle has size 1."""
        value = layers(site["fn"])[-1].v  # with the graph
        if not value.is_floating_point():
            value = value.to(torch.get_default_dtype())
        dim, event_dim = self.particles.dim, site["fn"].event_dim
        assert dim is not None
        if site["infer"].get("_deterministic"):  # of any dims, the particles' first
            count = self.particles.total if value.shape[:1] == (self.particles.total,) else 1
            return value.reshape(count, -1).mT.reshape(-1, count, *(1,) * (-dim - 1))
        batch = value.shape[: value.dim() - event_dim]
        value = value.reshape(*(1,) * (-dim - len(batch)), *batch, -1)
        return value.movedim(-1, 0)

    def _difference(
        self,
        found: Outputs,
        single: Callable[[int, int], Outputs],
        particles: Iterable[int],
    ) -> str:
        """Return how outputs of all particles differ from those of some on their own."""
        for particle in particles:
            alone = single(particle, 0)
            if missing := found.keys() ^ alone.keys():
                return f"the {min(missing)} is in some runs only"
            for name, expected in alone.items():
                own = self._of(particle, found[name])
                difference, dtype = _distance(own, expected), expected.dtype
                tolerance = 1e-9 if dtype == torch.float64 else 1e-5
                values = expected.detach().nan_to_num(0.0, 0.0, 0.0).abs()
                size = values.max().item() if values.numel() else 0.0
                if difference <= tolerance * max(1.0, size):
                    continue
                # Noise such as dropout, or rounding errors that the program amplifies.
                others = (single(particle, nudge)[name] for nudge in range(1, NUDGES + 1))
                if difference > NOISE * max(_distance(other, expected) for other in others):
                    return f"the {name} is another than in a run of one sample"
                if name.startswith(VALUE) and self._is_common(found[name]):
                    return f"the {name} has noise of no site, the same for all samples"
        return ""

    def _is_common(self, output: Tensor) -> bool:
        """Whether all particles have one value, which a plate may have broadcast."""
        return bool((output == self._of(0, output)).all())

    def _of(self, particle: int, output: Tensor) -> Tensor:
        dim = self._dim_of_particles(output)
        return output if dim is None else output.narrow(dim, particle, 1)

    def _dim_of_particles(self, output: Tensor) -> int | None:
        dim = self.particles.dim
        assert dim is not None
        return dim if output.dim() >= -dim and output.shape[dim] > 1 else None

    def _mixing(self, found: Outputs, trace: poutine.Trace) -> str:
        """Return a latent whose value in one particle changes the output of another, if any."""
        leaves = [site for site in latent_sites(trace) if site["value"].requires_grad]
        values, dim = [site["value"] for site in leaves], self.particles.dim
        assert dim is not None
        moving = [each for each in found.values() if each.requires_grad]
        own = [each for each in moving if self._dim_of_particles(each) is not None]
        common = [each for each in moving if self._dim_of_particles(each) is None]
        last = self.particles.total - 1
        for outputs, others in (
            ([each.select(dim, 0).sum() for each in own], slice(1, None)),
            ([each.select(dim, last).sum() for each in own], slice(0, last)),
            ([each.sum() for each in common], slice(None)),
        ):
            if not outputs or not values:
                continue
            try:
                derivatives = torch.autograd.grad(
                    outputs, values, allow_unused=True, retain_graph=True
                )
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # an operation without a derivative
                continue
            for site, derivative in zip(leaves, derivatives, strict=True):
                place = dim - site["fn"].event_dim
                if derivative is None or derivative.dim() < -place:
                    continue
                if derivative.movedim(place, 0)[others].nan_to_num(0.0).any():
                    return f"one sample depends on the value of '{site['name']}' in another"
        return ""


def _is_discrete(base: Any) -> bool:
    return base.has_enumerate_support or base.support is constraints.nonnegative_integer


@torch.no_grad()
def _moved(value: Tensor, fn: Any) -> Tensor:
    """Return a value near another one in a distribution's support; the value itself if none is."""
    try:
        base = layers(fn)[-1]
        if isinstance(base, TransformedDistribution):  # torch has the reals for affine supports
            first = biject_to(base.base_dist.support)
            transform: Any = ComposeTransform([first, *base.transforms])
        else:
            transform = biject_to(fn.support)
        free = transform.inv(value)
        moved = transform(free + 0.1 * torch.randn_like(free))
        is_inside = bool(fn.support.check(moved).all()) and bool(moved.isfinite().all())
    except torch.OutOfMemoryError:
        raise
    except (NotImplementedError, AttributeError, ValueError, RuntimeError):  # no such transform
        return value
    return moved if is_inside and moved.shape == value.shape else value


def _with_leaves(trace: poutine.Trace) -> poutine.Trace:
    """Copy a trace: its latents have no history, and derivatives where they can."""
    copy = trace.copy()
    for site in latent_sites(trace):
        value = site["value"].detach().clone()
        copy.nodes[site["name"]] = {
            **site,
            "value": value.requires_grad_(value.is_floating_point()),
        }
    return copy


def _log_densities(trace: poutine.Trace) -> Outputs:
    found = {}
    for site in sites(trace):
        try:
            log_prob = log_prob_of(site, site["fn"])
        except NotImplementedError:  # points without a density
            continue
        name = f"density of site '{site['name']}'"
        found[name] = scale_and_mask(log_prob, site["scale"], site["mask"])
    return found


def _distance(one: Tensor, other: Tensor) -> float:
    """Return the largest difference, infinite where the shapes differ in more than leading 1s."""
    one, other = (_without_leading_ones(each.detach()) for each in (one, other))
    if one.shape != other.shape:
        return math.inf
    same = (one == other) | (one.isnan() & other.isnan())
    gap = torch.where(same, 0.0, (one - other).abs()).nan_to_num(math.inf, math.inf)
    return gap.max().item() if gap.numel() else 0.0


def _without_leading_ones(tensor: Tensor) -> Tensor:
    while tensor.dim() and tensor.shape[0] == 1:
        tensor = tensor[0]
    return tensor


def _sizes(value: Any) -> Iterable[int]:
    """Yield the sizes of dims in arguments, and their integers."""
    if isinstance(value, Tensor):
        yield from value.shape
    elif isinstance(value, int):
        yield value
    elif isinstance(value, dict):
        yield from _sizes(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _sizes(each)


def _unused_prime(sizes: set[int]) -> int:
    """Return the smallest prime above 2 that is none of the sizes."""
    return next(n for n in count(3, 2) if n not in sizes and all(n % d for d in range(3, n, 2)))


def brief(error: Exception) -> str:
    """Return the type of an error and the first sentence of its message."""
    lines = str(error).strip().splitlines()
    text = lines[0].partition(". ")[0] if lines else ""
    return f"{type(error).__name__} ({text[:100]})" if text else type(error).__name__
