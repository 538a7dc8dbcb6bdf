"""Programs under `torch.vmap`: the model on the values of a guide, or the guide as well.

Models that are written for one sample (``x @ b``, ``b[group]``, networks with latent weights) do
not run under one more plate; `torch.vmap` shows them one particle at a time. So does a guide that
is written for one sample, whose draws are those of `batched_samplers`.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution, constraints
from pyro.infer.util import is_validation_enabled
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_recursive.tracing.batched_samplers import OwnDraws
from pyro_recursive.tracing.handlers import ComponentIndex
from pyro_recursive.tracing.isolation import isolated
from pyro_recursive.tracing.plates import Particles
from pyro_recursive.tracing.program import Program
from pyro_recursive.tracing.sites import (
    JOINT,
    PACKED,
    PARTICLE_PLATE,
    Site,
    latent_sites,
    layers,
    plates_of,
    sites,
)


class KnownDensity(TorchDistribution):
    """What is left of a site's distribution after the run: its log-density at the site's value."""

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        log_density: Tensor,
        batch_shape: torch.Size,
        event_shape: torch.Size,
        has_rsample: bool = False,
    ):
        self.log_density, self.has_rsample = log_density, has_rsample
        super().__init__(batch_shape, event_shape, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.log_density


def run_model(
    program: Program,
    source: poutine.Trace,
    values: dict[str, Tensor],
    particles: Particles,
    enum_dim: int | None = None,
) -> poutine.Trace:
    """Return a trace of the model, as if it had run under the plate of particles.

    ``source`` has the guide's values under that plate, and ``values`` those that differ between
    particles as `values_by_particle` returns them. The sites of the trace have a `KnownDensity`.
    ``enum_dim`` is the first dim of enumerated latents, left of the particles.

    Raises whatever the model raises under `torch.vmap`, and ValueError where it exchanges a buffer.
    """
    minibatches = program.memory.setdefault("own_minibatches", {})
    # One particle alone has no dim for them.
    run = partial(program.run_model, enum_dim=None if enum_dim is None else enum_dim + 1)
    return _run(run, source, values, particles, minibatches)


def run_guide(
    program: Program,
    particles: Particles,
    ranks: dict[str, int],
    replayed: poutine.Trace,
    noise: AbstractContextManager | None = None,
) -> poutine.Trace:
    """Return a trace of the guide, as `run_model` does, on the values of another run's trace.

    ``noise`` is a handler around each run.
    """
    minibatches = program.memory.setdefault("minibatches_of_guide", {})
    values = values_by_particle(replayed, particles, ranks)
    try:
        return _run(
            partial(_guide_of_one, program), replayed, values, particles, minibatches, noise
        )
    finally:
        guide = poutine.unwrap(program.guide)
        if isinstance(guide, TraceMessenger):  # a guide messenger keeps the trace of its last run
            guide.trace = poutine.Trace()


def _guide_of_one(program: Program, replayed: poutine.Trace) -> poutine.Trace:
    """Trace a guide; raise for sites whose densities need more than themselves."""
    trace = program.run_guide(replayed)
    for site in sites(trace):
        if site["infer"].keys() & {JOINT, PACKED} or isinstance(site["fn"], ComponentIndex):
            raise NotImplementedError(f"'{site['name']}' is part of a joint density")
        site["infer"].pop("prior", None)  # of a guide messenger
    return trace


def _run(
    program: Callable[[poutine.Trace], poutine.Trace],
    source: poutine.Trace,
    values: dict[str, Tensor],
    particles: Particles,
    minibatches: dict[str, Any],
    noise: AbstractContextManager | None = None,
) -> poutine.Trace:
    """Return a trace of a model or guide; ``minibatches`` are plates that are drawn before it."""
    assert particles.dim is not None
    width, is_validated = -particles.dim - 1, is_validation_enabled()
    prepared, forms = _Prepared(), dict[str, Site]()

    def run(values: dict[str, Tensor]) -> list[Site]:
        given = source.copy()
        for name, value in values.items():
            given.nodes[name] = {**source.nodes[name], "value": value}
        trace = program(given)
        return [site for site in trace.nodes.values() if site["type"] == "sample"]

    def one(index: Tensor, values: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        with prepared, OwnDraws(index):
            sampled = run(values)
        forms.update((site["name"], _without_tensors(site)) for site in sampled)
        return {site["name"]: _tensors_of(site, is_validated) for site in sampled}

    for name, fn in minibatches.items():
        if name not in source.nodes:
            prepared.draw(name, fn)
    index = torch.arange(particles.total)  # there may be no latent
    found = None
    while found is None:
        try:
            with noise or nullcontext(), pyro.validation_enabled(False), _same_buffers():
                found = torch.vmap(one, randomness="different")(index, values)
        except _NotDrawn as plate:
            minibatches[plate.name] = plate.fn  # drawn before the first run of a later call
            prepared.draw(plate.name, plate.fn)
        except _NewParameter:
            with isolated():
                run({name: value[0] for name, value in values.items()})
    frame = CondIndepStackFrame(PARTICLE_PLATE, particles.dim, particles.total, 0, particles.total)
    trace = poutine.Trace()
    for name, site in forms.items():
        if site_is_subsample(site):
            site["value"] = found[name]["value"][0]
        else:
            _place(site, found[name], width)
            site["cond_indep_stack"] = (frame, *site["cond_indep_stack"])
            if name in values:
                site["value"] = source.nodes[name]["value"]
        trace.add_node(name, **site)
    return trace


def draw(run: Callable[[], Tensor], total: int) -> Tensor:
    """Return what a model draws in each of so many runs of a function, ``[total, *value]``.

    Raises whatever the model raises under `torch.vmap`, where not every distribution can be drawn.
    """

    def one(index: Tensor) -> Tensor:
        with OwnDraws(index):
            return run()

    with pyro.validation_enabled(False), _same_buffers():
        return torch.vmap(one, randomness="different")(torch.arange(total))


def values_by_particle(
    trace: poutine.Trace, particles: Particles, ranks: dict[str, int]
) -> dict[str, Tensor]:
    """Return the values of latents as ``[particles, *value]``, with the dims of a single run.

    Values without a dim of particles are left out.
    """
    assert particles.dim is not None
    values = {}
    for site in latent_sites(trace):
        value, place = site["value"], particles.dim - site["fn"].event_dim
        if value.dim() >= -place:
            rank = ranks.get(site["name"])
            if rank is None:  # sequential plates may have other entries in each run
                depths = (-frame.dim for frame in plates_of(site).values() if frame.vectorized)
                rank = max(depths, default=0) + site["fn"].event_dim
            value = with_rank(value.movedim(place, 0), rank)
            values[site["name"]] = value.expand(particles.total, *value.shape[1:])
    return values


def with_rank(tensor: Tensor, rank: int) -> Tensor:
    """Return ``[particles, *rest]`` with so many dims in rest: ones on its left come and go."""
    rest = tensor.shape[1:]
    extra = max(0, len(rest) - rank)
    if any(size != 1 for size in rest[:extra]):
        raise ValueError(f"{rank} dims are too few for shape {list(rest)} of one sample.")
    return tensor.reshape(len(tensor), *(1,) * (rank - len(rest)), *rest[extra:])


def _without_tensors(site: Site) -> Site:
    """Return what is the same for all particles, and the form of the distribution."""
    kept = {key: site[key] for key in ("type", "name", "infer", "is_observed", "cond_indep_stack")}
    plain = {k: site[k] for k in ("scale", "mask", "value") if not isinstance(site[k], Tensor)}
    fn = site["fn"] if site_is_subsample(site) else _form_of(site["fn"])
    return {**kept, **plain, "fn": fn, "args": (), "kwargs": {}}


def _tensors_of(site: Site, is_validated: bool) -> dict[str, Tensor]:
    found = {k: site[k] for k in ("scale", "mask", "value") if isinstance(site[k], Tensor)}
    if not site_is_subsample(site) and not site["infer"].get("_deterministic"):
        *outer, base = layers(site["fn"])
        found["log_prob"] = base.log_prob(site["value"], *site["args"], **site["kwargs"])
        if is_validated:
            found["is_valid"] = _is_valid(site["fn"], site["value"])
        for number, layer in enumerate(outer):
            if isinstance(layer, dist.MaskedDistribution):
                mask = torch.as_tensor(layer._mask, device=site["value"].device)
                found[f"mask of layer {number}"] = mask
        if hasattr(base, "clear_cache"):  # transforms remember tensors of this run
            base.clear_cache()
    return found


def _is_valid(fn: Any, value: Tensor) -> Tensor:
    """Whether the value and the parameters of a distribution satisfy its constraints, a scalar.

    What distributions themselves check would raise under `torch.vmap`.
    """
    base = layers(fn)[-1]
    pairs = [
        (constraint, base.__dict__[name])  # without what would be computed
        for name, constraint in base.arg_constraints.items()
        if name in base.__dict__ and not constraints.is_dependent(constraint)
    ]
    valid = torch.ones((), dtype=torch.bool, device=value.device)
    try:
        for constraint, tensor in ((fn.support, value), *pairs):
            valid = valid & constraint.check(tensor).all()
    except (NotImplementedError, AttributeError, RuntimeError):  # no support, or not under vmap
        pass
    return valid


@dataclass(frozen=True)
class _Form:
    """A distribution without its tensors: the type and shapes of its base, and what is around it.

    ``wrappers`` are, from the outside, numbers of event dims, and None for a mask.
    """

    event_dim: int
    base: type
    batch_shape: torch.Size
    event_shape: torch.Size
    has_rsample: bool | None
    wrappers: tuple[int | None, ...]


def _form_of(fn: Any) -> _Form:
    *outer, base = layers(fn)
    has_rsample = vars(base).get("has_rsample") if isinstance(base, dist.Unit) else base.has_rsample
    wrappers = tuple(getattr(layer, "reinterpreted_batch_ndims", None) for layer in outer)
    shapes = base.batch_shape, base.event_shape
    return _Form(fn.event_dim, type(base), *shapes, has_rsample, wrappers)


def _place(site: Site, tensors: dict[str, Tensor], width: int) -> None:
    """Give a site its tensors, with the particles left of ``width`` dims of plates."""
    form: _Form = site["fn"]
    if "is_valid" in tensors and not bool(tensors["is_valid"].all()):
        raise ValueError(f"Site '{site['name']}' has a value or parameter that is not valid.")
    if "_dim_to_id" in site["infer"]:
        site["infer"] = _left_of_particles(site["infer"])
    for key in tensors.keys() & {"scale", "mask"}:
        site[key] = _placed(tensors[key], width)
    event_dim = form.event_dim
    if site["infer"].get("_deterministic"):  # it may have more dims than the plates
        event_dim = max(event_dim, tensors["value"].dim() - 1 - width)
    if "value" in tensors:
        site["value"] = _placed(tensors["value"], width + event_dim)
    if "log_prob" not in tensors:
        site["fn"] = dist.Delta(site["value"], event_dim=event_dim)
        return
    width += sum(dims for dims in form.wrappers if dims is not None)
    fn = _base(form, site["value"], _placed(tensors["log_prob"], width), width)
    for number, dims in reversed(list(enumerate(form.wrappers))):
        if dims is None:
            fn = fn.mask(_placed(tensors[f"mask of layer {number}"], width))
        else:
            fn, width = fn.to_event(dims), width - dims
    site["fn"] = fn


def _placed(tensor: Tensor, width: int) -> Tensor:
    """Return ``[*enumerated, particles, *rest]`` of ``[particles, *enumerated, *rest]``.

    With so many dims in rest; what is left of them is enumerated, if it is more than ones.
    """
    extra = tensor.shape[1 : max(1, tensor.dim() - width)]
    return with_rank(tensor, width) if extra.numel() == 1 else tensor.movedim(0, -width - 1)


def _left_of_particles(infer: dict[str, Any]) -> dict[str, Any]:
    """Return what enumeration notes of a site, for dims that are one further to the left."""
    moved = {**infer, "_dim_to_id": {dim - 1: each for dim, each in infer["_dim_to_id"].items()}}
    if "_enumerate_dim" in infer:
        moved["_enumerate_dim"] = infer["_enumerate_dim"] - 1
    return moved


def _base(form: _Form, value: Tensor, log_prob: Tensor, width: int) -> Any:
    if issubclass(form.base, dist.Delta):
        return dist.Delta(value, log_prob, len(form.event_shape))
    if issubclass(form.base, dist.Unit):
        return dist.Unit(log_prob, has_rsample=form.has_rsample)
    batch = form.batch_shape[max(0, len(form.batch_shape) - width) :]
    values, count = log_prob.shape[: -width - 1], log_prob.shape[-width - 1]
    shape = torch.Size((*values, count, *(1,) * (width - len(batch)), *batch))
    return KnownDensity(log_prob, shape, form.event_shape, bool(form.has_rsample))


class _NotDrawn(Exception):
    """A plate of the model's own has no minibatch yet."""

    def __init__(self, name: str, fn: Any) -> None:
        super().__init__(name)
        self.name, self.fn = name, fn


class _NewParameter(Exception):
    """A parameter is not in Pyro's store: it would be made from a tensor of one particle."""


class _Prepared(Messenger):
    """Gives a model's own plates the minibatches that were drawn for all particles together.

    Asks for what must be made before, by the exceptions above.
    """

    def __init__(self) -> None:
        super().__init__()
        self.minibatch: dict[tuple[str, int, int], Tensor] = {}  # by plate and its sizes

    def draw(self, name: str, fn: Any) -> None:
        self.minibatch[name, fn.size, fn.subsample_size] = pyro.sample(name, fn)

    def _pyro_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg) or msg["done"] or msg["value"] is not None:
            return
        name, fn = msg["name"], msg["fn"]
        if fn.subsample_size in (None, fn.size):
            return
        if (name, fn.size, fn.subsample_size) not in self.minibatch:
            raise _NotDrawn(name, fn)
        msg["value"], msg["done"] = self.minibatch[name, fn.size, fn.subsample_size], True

    def _pyro_param(self, msg: Any) -> None:
        if msg["name"] not in pyro.get_param_store():
            raise _NewParameter(msg["name"])


@contextmanager
def _same_buffers() -> Iterator[None]:
    """Raise ValueError where a module has exchanged a buffer for a tensor of one particle.

    The buffers are restored in any case.
    """
    before: dict[nn.Module, dict[str, Tensor]] = {}

    def note(module: nn.Module, inputs: Any) -> None:
        if module not in before:
            before[module] = dict(module.named_buffers(recurse=False))

    hook, changed = register_module_forward_pre_hook(note), []
    try:
        yield
    finally:
        hook.remove()
        for module, buffers in before.items():
            for name, buffer in buffers.items():
                if getattr(module, name, None) is not buffer:
                    setattr(module, name, buffer)
                    changed.append(f"{type(module).__name__}.{name}")
    if changed:
        raise ValueError(f"a run changes the buffer {changed[0]}")
