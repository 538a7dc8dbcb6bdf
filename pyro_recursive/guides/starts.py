"""Where guides start: values of a model's latents at which its density is finite.

A start is a dictionary of the latents' unconstrained values ``u`` by name, ``z = T(u)``, each in
the shape of its site. A site's transform T is that of the run, and its size is known without a
draw, so that improper priors have a start.
"""

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any, Literal

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.autoguide import init_to_mean, init_to_median, init_to_sample, init_to_value
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from pyro_recursive.guides.log_density import LogDensity
from pyro_recursive.guides.packing import Values
from pyro_recursive.guides.pathfinder.gaussians import Gaussians, find_gaussians
from pyro_recursive.tracing.compatibility import check_finite
from pyro_recursive.tracing.densities import log_prob_of
from pyro_recursive.tracing.handlers import SubstituteByName
from pyro_recursive.tracing.isolation import isolated
from pyro_recursive.tracing.plates import outside_of_plates
from pyro_recursive.tracing.program import FAILURES
from pyro_recursive.tracing.sites import (
    Site,
    at_zero,
    layers,
    sites,
    subsample_sites,
    with_plate_sizes,
)
from pyro_recursive.tracing.supports import coordinates, is_circular, is_interior, plain_support

Strategy = Literal["feasible", "mean", "median", "pathfinder", "sample", "uniform"]
InitLocFn = Callable[[Site], Any] | Mapping[str, Any] | Strategy

PATHS = 4  # of the strategy "pathfinder"
ATTEMPTS = 100
RADIUS = 2.0  # of the last perturbation, in unconstrained space


def init_to_center(site: Site) -> Tensor:
    """Return the median of a site's prior where it has a closed form, else its mean, else T(0).

    A value counts if it is finite in unconstrained space as well. This is the default of
    ``init_loc_fn=``; nothing is drawn.
    """
    fn, transform = site["fn"], _transform(site["fn"])
    assert transform is not None
    for value in _centers(fn):
        value = value.expand(fn.shape())
        if bool(transform.inv(value).isfinite().all()):
            return value
    return at_zero(fn, transform)


def _centers(fn: Any) -> Iterator[Tensor]:
    """Yield the median, the mean and, of a distribution over the real line, the mode."""
    base, is_real = layers(fn)[-1], plain_support(fn.support) in (constraints.real,)
    for find in (
        lambda: base.icdf(torch.tensor(0.5)) if not base.event_dim else None,
        lambda: fn.mean,
        lambda: fn.mode if is_real else None,
    ):
        try:
            value = find()
        except (NotImplementedError, AttributeError, ValueError):
            continue
        if value is not None:
            yield value


def site_function(init_loc_fn: InitLocFn | None) -> Callable[[Site], Any]:
    """Return a start as a function of a site: of a name of Pyro's, of values, or the default."""
    if init_loc_fn is None:
        return init_to_center
    if isinstance(init_loc_fn, Mapping):
        return init_to_value(values=dict(init_loc_fn), fallback=init_to_center)
    if not isinstance(init_loc_fn, str):
        return init_loc_fn
    if init_loc_fn not in _STRATEGIES:
        raise ValueError(
            f"init_loc_fn must be a function of a site, values by name, or one of "
            f"{sorted(_STRATEGIES)}, got {init_loc_fn!r}."
        )
    return _STRATEGIES[init_loc_fn]


class StartSearch:
    """Runs a model on the arguments of one call to find starts of the guides for it.

    ``trace`` is that of the run at the values of ``init_loc_fn`` (`init_to_center` if None): a
    function of a site as in Pyro's autoguides, values of sites by name, or the name of a strategy.
    ``"pathfinder"`` is the location with the highest ELBO of a few paths of an optimiser. A site
    without a value, or at one on the boundary of its support, has that of `init_to_center`.
    """

    def __init__(
        self,
        model: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        init_loc_fn: InitLocFn | None = None,
    ) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.init_loc_fn = init_loc_fn
        self.trace, self._start = self._run(site_function(init_loc_fn))
        if init_loc_fn == "pathfinder":
            self._start = self._start_by(init_loc_fn)
        self._minibatch = {n: s["value"] for n, s in subsample_sites(self.trace).nodes.items()}
        self._is_checked = False

    def find(self, init_loc_fn: InitLocFn | None = None) -> Values:
        """Return a start by this function, or that of the search if None.

        Where the density or its gradient are not finite, random perturbations are tried.

        Raises:
            ValueError: the density of a site is finite at none of them.
        """
        if init_loc_fn is not None and init_loc_fn is not self.init_loc_fn:
            return self._finite(self._start_by(init_loc_fn))
        if not self._is_checked:
            self._start, self._is_checked = self._finite(self._start), True
        return self._start

    def moved(self, steps: Values) -> "StartSearch":
        """Return this search with another start, so far from this one in unconstrained space."""
        return self.at({name: u + steps[name] for name, u in self._start.items()})

    def at(self, start: Values) -> "StartSearch":
        """Return this search with another start, in unconstrained space."""
        other = copy.copy(self)
        other._start, other._is_checked = start, False
        return other

    def gaussian(self) -> tuple[Tensor, Tensor]:
        """Return the Gaussian with the highest ELBO of a few paths of an optimiser.

        Its location ``[D]`` and the Cholesky factor of its covariance, ``[D, D]``, unconstrained.
        """
        _, best = self._pathfinder
        return best.loc, best.scale_tril

    @cached_property
    def _pathfinder(self) -> tuple[LogDensity, Gaussians]:
        # The guide may be called under a plate of particles, and without gradients.
        with outside_of_plates(), torch.inference_mode(False), torch.enable_grad():
            density = LogDensity(self.model, self.args, self.kwargs, self.trace)
            found = find_gaussians(density, PATHS)
        return density, found.gaussians[found.elbo.argmax()]

    def log_density(self, start: Values, minibatch: Values) -> float:
        """Return log p with Jacobians at a start, summed over all sites; NaN where it fails."""
        try:
            with torch.no_grad():
                point, trace = self._at(start, minibatch)
                total = sum(_log_prob(site).sum() for site in sites(trace))
            return float(total + point.log_volume)
        except FAILURES:
            return math.nan

    def _start_by(self, init_loc_fn: InitLocFn) -> Values:
        if init_loc_fn != "pathfinder":
            return self._run(site_function(init_loc_fn))[1]
        density, best = self._pathfinder
        return density.values(best.loc)

    def _run(self, init: Callable[[Site], Any]) -> tuple[poutine.Trace, Values]:
        """Run the model; if it fails at these values, at random ones."""
        attempts = [init, *[_init_to_uniform] * 10]
        for number, init in enumerate(attempts):
            start = _AtStart(init)
            try:
                with poutine.block(), torch.no_grad():
                    model = poutine.trace(start(self.model))
                    trace = with_plate_sizes(model.get_trace(*self.args, **self.kwargs))
                return trace, start.values
            except FAILURES as error:
                if number == 0:
                    first = error
        raise first

    def _at(self, start: Values, minibatch: Values) -> tuple["_AtPoint", poutine.Trace]:
        """Run the model, isolated, at unconstrained values."""
        point = _AtPoint(start)
        model = poutine.trace(SubstituteByName(minibatch)(point(self.model)))
        with isolated():
            return point, with_plate_sizes(model.get_trace(*self.args, **self.kwargs))

    def _finite(self, start: Values) -> Values:
        problems = []
        for attempt in range(ATTEMPTS):
            near = start if attempt == 0 else _perturbed(start, attempt)
            problem, is_density = self._problem(near)
            if problem is None:
                return near
            problems.append(problem)
            if not is_density and attempt >= ATTEMPTS // 10:
                return start  # only the gradient is not finite: training says where
        raise problems[0]

    def _problem(self, start: Values) -> tuple[Exception | None, bool]:
        """Return what is not finite at a start, and whether it is a density."""
        has_gradient = not torch.is_inference_mode_enabled()
        leaves = {name: u.detach().clone() for name, u in start.items()}
        with torch.set_grad_enabled(has_gradient):
            for u in leaves.values():
                u.requires_grad_(has_gradient)
            try:
                point, trace = self._at(leaves, self._minibatch)
                total = point.log_volume
                for site in sites(trace):
                    log_prob = _log_prob(site)
                    if not bool(log_prob.isfinite().all()):
                        check_finite(site)
                        return _no_start(site["name"], log_prob), True
                    total = total + log_prob.sum()
            except FAILURES as error:  # a parameter outside of its domain
                return error, True
        if not (has_gradient and isinstance(total, Tensor) and total.requires_grad):
            return None, False
        grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        for name, grad in zip(leaves, grads, strict=True):
            if grad is not None and not bool(grad.isfinite().all()):
                return ValueError(f"The gradient of log p at site '{name}' is not finite."), False
        return None, False


class _AtStart(Messenger):
    """Gives a model's continuous latents the values of a function of the site.

    ``values`` are their unconstrained values by name.
    """

    def __init__(self, init_loc_fn: Callable[[Site], Any]) -> None:
        super().__init__()
        self.init_loc_fn = init_loc_fn
        self.values: Values = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is not None or msg["is_observed"] or site_is_subsample(msg):
            return
        transform = _transform(msg["fn"])
        if transform is not None:
            value = self._value(msg, transform)
            msg["value"], msg["done"] = value, True
            self.values[msg["name"]] = transform.inv(value)

    def _value(self, site: Site, transform: Transform) -> Tensor:
        shape = site["fn"].shape()
        try:
            value = torch.as_tensor(self.init_loc_fn(site)).detach()
        except NotImplementedError:  # a function that draws, of a prior that cannot be drawn from
            return init_to_center(site)
        try:
            value = value.expand(shape)
        except RuntimeError as error:
            raise RuntimeError(
                f"init_loc_fn returned shape {tuple(value.shape)} at site '{site['name']}', which "
                f"needs {tuple(shape)}."
            ) from error
        support = site["fn"].support
        if not bool(value.isfinite().all()):
            return init_to_center(site)
        if not is_interior(support, value):
            warnings.warn(
                f"init_loc_fn puts site '{site['name']}' on a bound of its support {support}, or "
                "beyond. It starts at the default: give values inside.",
                stacklevel=2,
            )
            return init_to_center(site)
        return value if bool(transform.inv(value).isfinite().all()) else init_to_center(site)


class _AtPoint(Messenger):
    """Gives a model's latents values that are unconstrained, by the transforms of this run.

    ``log_volume`` is the sum of ``log |dz / du|``.
    """

    def __init__(self, values: Values) -> None:
        super().__init__()
        self.values = values
        self.log_volume: Tensor | float = 0.0

    def _pyro_sample(self, msg: Any) -> None:
        u = self.values.get(msg["name"])
        if u is None or msg["value"] is not None or msg["is_observed"]:
            return
        transform = _transform(msg["fn"])
        assert transform is not None
        msg["value"], msg["done"] = transform(u), True
        log_det = transform.log_abs_det_jacobian(u, msg["value"])
        self.log_volume = self.log_volume + log_det.sum()


def component_steps(count: int, like: Tensor) -> Tensor:
    """Return steps ``[count, *shape]`` that take components from one point to places of their own.

    Equal components would stay equal. Pairs go to opposite corners of a cube of their own size, 1
    on average.
    """
    pairs = (count + 1) // 2
    sizes = torch.arange(1, pairs + 1).to(like) * (2 / (pairs + 1))
    corners = torch.randint(2, (pairs, *like.shape), device=like.device).to(like) * 2 - 1
    steps = sizes.view(-1, *[1] * like.dim()) * corners
    return torch.stack([steps, -steps], 1).flatten(0, 1)[:count]


class LastBiases:
    """The biases of the linear layers that a network's output comes from, as they were found.

    The output is in parts of one size. The layer of a part is the last `torch.nn.Linear` with these
    outputs, if there is one: of all, or a head.
    """

    def __init__(self, network: nn.Module, rows: Any, size: int) -> None:
        self.size, self.outputs = size, list[tuple[nn.Linear, Tensor]]()
        layers = [m for m in network.modules() if isinstance(m, nn.Linear) and m.bias is not None]
        hooks = [layer.register_forward_hook(self._record) for layer in layers]
        try:
            self.final = network(rows)
        finally:
            for hook in hooks:
                hook.remove()
        self.former = [(layer.bias, layer.bias.clone()) for layer, _ in self.outputs]

    def _record(self, layer: Any, inputs: Any, output: Tensor) -> None:
        self.outputs.append((layer, output))

    def add(self, number: int, shift: Tensor) -> None:
        """Add to a part of the output."""
        first = number * self.size
        part = self.final[..., first : first + self.size]
        for (layer, output), at in itertools.product(reversed(self.outputs), (first, 0)):
            own = slice(at, at + self.size)
            if layer.bias.requires_grad and torch.equal(output[..., own], part):
                layer.bias[own] += shift
                return

    def restore(self) -> None:
        """Set the biases to what they were."""
        for bias, value in self.former:
            bias.copy_(value)


def _log_prob(site: Site) -> Tensor:
    return scale_and_mask(log_prob_of(site, site["fn"]), site["scale"], site["mask"])


def _no_start(name: str, log_prob: Tensor) -> ValueError:
    wrong = log_prob[~log_prob.isfinite()].flatten()[0]
    return ValueError(
        f"Site '{name}' has log_prob {wrong.item()} at each of {ATTEMPTS} starts. Give "
        "init_loc_fn= where the model's density is finite."
    )


def _perturbed(start: Values, attempt: int) -> Values:
    """Move a start, or zero, by a random step that grows with the number of the attempt."""
    radius, from_zero = RADIUS * attempt / ATTEMPTS, attempt % 2
    return {
        name: (torch.zeros_like(u) if from_zero else u) + radius * (2 * torch.rand_like(u) - 1)
        for name, u in start.items()
    }


def _init_to_uniform(site: Site) -> Tensor:
    """Return T(u) for u uniform in a cube around zero."""
    transform = _transform(site["fn"])
    assert transform is not None
    u = transform.inv(at_zero(site["fn"], transform))
    return transform(RADIUS * (2 * torch.rand_like(u) - 1))


def _init_to_zero(site: Site) -> Tensor:
    """Return T(0)."""
    transform = _transform(site["fn"])
    assert transform is not None
    return at_zero(site["fn"], transform)


_STRATEGIES: dict[str, Callable[[Site], Any]] = {
    "feasible": _init_to_zero,
    "mean": init_to_mean,
    "median": init_to_median,
    "pathfinder": init_to_center,  # of the run before
    "sample": init_to_sample,
    "uniform": _init_to_uniform,
}


def _transform(fn: Any) -> Transform | None:
    """Return the transform of a continuous distribution, None if it has no such support."""
    try:
        return None if fn.support.is_discrete else coordinates(fn, is_circular(fn))
    except NotImplementedError:  # packing names the site
        return None
