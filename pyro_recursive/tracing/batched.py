"""The model under `torch.vmap`, over the values that the guide drew for all particles.

Models that are written for one sample (``x @ b``, ``b[group]``, networks with latent weights) do
not run under one more plate; `torch.vmap` shows them one particle at a time. Every latent is
replayed: nothing is drawn inside `run_model` but noise of the model's own, such as dropout.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution, constraints
from pyro.infer.util import is_validation_enabled
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from pyro_recursive.tracing.isolation import isolated
from pyro_recursive.tracing.plates import Particles
from pyro_recursive.tracing.program import Program
from pyro_recursive.tracing.sites import (
    PARTICLE_PLATE,
    Site,
    is_delta,
    latent_sites,
    layers,
    mask_of,
    plates_of,
)


class KnownDensity(TorchDistribution):
    """What is left of a site's distribution after the run: its log-density at the site's value."""

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, log_density: Tensor, batch_shape: torch.Size, event_shape: torch.Size):
        self.log_density = log_density
        super().__init__(batch_shape, event_shape, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.log_density


def run_model(
    program: Program, source: poutine.Trace, values: dict[str, Tensor], particles: Particles
) -> poutine.Trace:
    """Return a trace of the model, as if it had run under the plate of particles.

    ``source`` has the guide's values under that plate, and ``values`` those that differ between
    particles as `values_by_particle` returns them. The sites of the trace have a `KnownDensity`.

    Raises whatever the model raises under `torch.vmap`, and ValueError where it exchanges a buffer.
    """
    assert particles.dim is not None
    width, is_validated = -particles.dim - 1, is_validation_enabled()
    known: dict[str, Any] = program.memory.setdefault("own_minibatches", {})
    prepared, sites = _Prepared(), dict[str, Site]()

    def run(values: dict[str, Tensor]) -> list[Site]:
        given = source.copy()
        for name, value in values.items():
            given.nodes[name] = {**source.nodes[name], "value": value}
        trace = program.run_model(given)
        return [site for site in trace.nodes.values() if site["type"] == "sample"]

    def one(index: Tensor, values: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        with prepared:
            sampled = run(values)
        sites.update((site["name"], _without_tensors(site)) for site in sampled)
        return {site["name"]: _tensors_of(site, is_validated) for site in sampled}

    for name, fn in known.items():
        if name not in source.nodes:
            prepared.draw(name, fn)
    index = torch.arange(particles.total)  # there may be no latent
    found = None
    while found is None:
        try:
            with pyro.validation_enabled(False), _same_buffers():
                found = torch.vmap(one, randomness="different")(index, values)
        except _NotDrawn as plate:
            known[plate.name] = plate.fn  # drawn before the first run of a later call
            prepared.draw(plate.name, plate.fn)
        except _NewParameter:
            with isolated():
                run({name: value[0] for name, value in values.items()})
    frame = CondIndepStackFrame(PARTICLE_PLATE, particles.dim, particles.total, 0, particles.total)
    trace = poutine.Trace()
    for name, site in sites.items():
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
        with _OwnDraws(index):
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
    """Return what is the same for all particles, and the shapes of the distribution."""
    kept = {key: site[key] for key in ("type", "name", "infer", "is_observed", "cond_indep_stack")}
    plain = {k: site[k] for k in ("scale", "mask", "value") if not isinstance(site[k], Tensor)}
    own_mask = getattr(site["fn"], "_mask", None)
    if site_is_subsample(site):
        fn = site["fn"]
    else:
        fn = site["fn"].batch_shape, site["fn"].event_shape, own_mask is False, is_delta(site)
    return {**kept, **plain, "fn": fn, "args": (), "kwargs": {}}


def _tensors_of(site: Site, is_validated: bool) -> dict[str, Tensor]:
    found = {k: site[k] for k in ("scale", "mask", "value") if isinstance(site[k], Tensor)}
    if not site_is_subsample(site) and not site["infer"].get("_deterministic"):
        found["log_prob"] = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
        if is_validated:
            found["is_valid"] = _is_valid(site["fn"], site["value"])
        if (mask := mask_of(site)) is not None:
            found["entry_mask"] = mask
        own_mask = getattr(site["fn"], "_mask", None)
        if isinstance(own_mask, Tensor):
            found["own_mask"] = own_mask
        for layer in layers(site["fn"]):
            if hasattr(layer, "clear_cache"):  # transforms remember tensors of this run
                layer.clear_cache()
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


def _place(site: Site, tensors: dict[str, Tensor], width: int) -> None:
    """Give a site its tensors, with the particles left of ``width`` dims of plates."""
    batch, event_shape, is_masked, computed = site["fn"]
    if "is_valid" in tensors and not bool(tensors["is_valid"].all()):
        raise ValueError(f"Site '{site['name']}' has a value or parameter that is not valid.")
    for key in tensors.keys() & {"scale", "mask"}:
        site[key] = with_rank(tensors[key], width)
    event_dim = len(event_shape)
    if site["infer"].get("_deterministic"):  # it may have more dims than the plates
        event_dim = max(event_dim, tensors["value"].dim() - 1 - width)
    if "value" in tensors:
        site["value"] = with_rank(tensors["value"], width + event_dim)
    if "entry_mask" in tensors:  # which `KnownDensity` does not show
        site["entry_mask"] = with_rank(tensors["entry_mask"], width + event_dim)
    if "log_prob" not in tensors:
        site["fn"] = dist.Delta(site["value"], event_dim=event_dim)
        return
    log_prob = with_rank(tensors["log_prob"], width)
    if computed:
        site["fn"] = dist.Delta(site["value"], log_prob, event_dim)
        return
    batch = batch[max(0, len(batch) - width) :]
    shape = torch.Size((len(log_prob), *(1,) * (width - len(batch)), *batch))
    site["fn"] = KnownDensity(log_prob, shape, event_shape)
    if "own_mask" in tensors or is_masked:  # it has been applied: other code may look at it
        own_mask = with_rank(tensors["own_mask"], width) if "own_mask" in tensors else False
        site["fn"] = site["fn"].mask(own_mask)


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


class _OwnDraws(Messenger):
    """Draws a value of each particle at sites whose parameters all particles share."""

    def __init__(self, index: Tensor) -> None:
        super().__init__()
        self.noise = _OwnNoise(index)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is None and not msg["done"] and not site_is_subsample(msg):
            with self.noise:
                msg["value"] = msg["fn"](*msg["args"], **msg["kwargs"])
            msg["done"] = True


class _OwnNoise(TorchFunctionMode):
    """Gives random numbers for each particle where distributions fill a tensor and return it."""

    IN_PLACE = (Tensor.normal_, Tensor.exponential_, Tensor.cauchy_, Tensor.uniform_)

    def __init__(self, index: Tensor) -> None:
        super().__init__()
        self.index = index

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.IN_PLACE:  # which `torch.vmap` refuses on a tensor that they share
            args = (torch.zeros_like(args[0]) + 0 * self.index.to(args[0].device), *args[1:])
        return func(*args, **(kwargs or {}))


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
