"""Effect handlers by which losses, guides and training tell each other about a run.

A guide asks by an effectful function, a loss answers by a handler around the run.
"""

from collections.abc import Callable, Container, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.score_parts import ScoreParts
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import effectful
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from pyro_recursive.tracing.plates import outer_shape
from pyro_recursive.tracing.sites import SUMMED, at_zero, layers

# (log q_j(u) of every component, log weights, [*batch, J] both; log |dz / du|, [*batch]; the number
# of the run where runs are looped, None for one pass) -> log-density of u, [*batch]
Reference = Callable[[Tensor, Tensor, Tensor, int | None], Tensor]


class ComponentIndex(dist.Categorical):
    """Which component of a mixture a row is drawn from: a score function without a density.

    The mixture's whole density stands at the latent sites, at whatever component: the choice adds
    nothing to it, so that `pyro.infer.Trace_ELBO`, which leaves auxiliary sites out of its rewards,
    is unbiased.
    """

    def log_choice(self, value: Tensor) -> Tensor:
        return super().log_prob(value)

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.zeros_like(self.log_choice(value))

    def score_parts(self, x: Tensor, *args: Any, **kwargs: Any) -> ScoreParts:
        score = self.log_choice(x)
        return ScoreParts(torch.zeros_like(score), score, 0)


class ComponentAssignment(Messenger):
    """Gives each particle a component of every mixture guide that runs under it.

    ``components`` has one for each particle, counted among ``members``, the guide's components in
    this run (None for its own). The guide reports ``reference`` in place of the mixture's
    log-density, holds the parameters of ``frozen`` components and, if it can
    (``holds_densities``), with ``stop_density_gradient`` those in all densities, and samples
    ``points``, packed and unconstrained ``[*batch, D]``, in place of draws.
    """

    def __init__(
        self,
        components: tuple[int, ...],
        reference: Reference | None = None,
        frozen: frozenset[int] = frozenset(),
        points: Tensor | None = None,
        members: tuple[int, ...] | None = None,
        stop_density_gradient: bool = False,
    ) -> None:
        super().__init__()
        self.components, self.reference = components, reference
        self.frozen, self.points, self.members = frozen, points, members
        self.stop_density_gradient = stop_density_gradient
        self.particle: int | None = None  # which one this run is for, where runs are looped

    def points_of(self, shape: torch.Size) -> Tensor:
        """Return the points of this run, ``[*batch, D]`` for a batch shape."""
        assert self.points is not None
        points = self.points if self.particle is None else self.points[self.particle]
        return points.reshape(*shape, points.shape[-1])

    def _pyro_component_assignment(self, msg: Any) -> None:
        msg["value"], msg["done"] = self, True


@effectful(type="component_assignment")
def current_assignment() -> ComponentAssignment | None:
    """Return the assignment of this run, None where components are drawn at random."""
    return None


@effectful(type="run_cache")
def run_cache() -> dict[Any, Any] | None:
    """Return a dictionary that is shared by two runs of a guide; None where it runs once.

    It is for results that do not depend on the runs' values; their random state is the same.
    """
    return None


@effectful(type="joint_draw")
def joint_draw(vector: Tensor, sites: frozenset[str]) -> Tensor:
    """Return a packed vector ``[*batch, D]`` of sites: the guide's, or another in its place."""
    return vector


class ReplacedDraws(Messenger):
    """Gives guides packed vectors, by their sites, in place of those that they draw."""

    def __init__(self, vectors: Mapping[frozenset[str], Tensor]) -> None:
        super().__init__()
        self.vectors = vectors

    def _pyro_joint_draw(self, msg: Any) -> None:
        sites = msg["args"][1]
        if sites in self.vectors:
            msg["value"], msg["done"] = self.vectors[sites], True


class RunCache(Messenger):
    """Gives guides the dictionary that `run_cache` returns."""

    def __init__(self, content: dict[Any, Any] | None = None) -> None:
        super().__init__()
        self.content = {} if content is None else content

    def _pyro_run_cache(self, msg: Any) -> None:
        msg["value"], msg["done"] = self.content, True


@effectful(type="dry_run")
def is_dry_run() -> bool:
    """Return whether this run only finds the structure of the guide, and has no effects."""
    return False


class DryRun(Messenger):
    """Tells guides that a run has no effects: `is_dry_run`."""

    def _pyro_dry_run(self, msg: Any) -> None:
        msg["value"], msg["done"] = True, True


class KLWarmup(Messenger):
    """Weights the densities of all latents, in model and guide, and leaves the observed sites.

    Around a call of an ELBO it turns ``log p(x | z) + log p(z) - log q(z)`` into
    ``log p(x | z) + weight * (log p(z) - log q(z))``, in nats, for a ``weight`` above 0. A guide's
    auxiliary sites and Jacobians are weighted too, and the choice of a component that a loss gives;
    `pyro.factor` is observed, and latents that a loss sums out by enumeration are a part of
    ``p(x | z)``.

    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> def model():
    ...     pyro.sample("z", dist.Normal(0.0, 1.0))
    >>> with pyro.poutine.trace() as trace, KLWarmup(0.25):
    ...     model()
    >>> trace.trace.nodes["z"]["scale"]
    0.25
    """

    def __init__(self, weight: float) -> None:
        if not weight > 0:
            raise ValueError(f"weight must be above 0, got {weight}.")
        super().__init__()
        self.weight = weight

    def _pyro_sample(self, msg: Any) -> None:
        is_given = msg["is_observed"] and not isinstance(msg["fn"], ComponentIndex)
        is_latent = not is_given and not msg["infer"].get(SUMMED)
        if is_latent and not site_is_subsample(msg):
            msg["scale"] = self.weight * msg["scale"]

    def _pyro_latent_weight(self, msg: Any) -> None:
        msg["value"] = self.weight * (1.0 if msg["value"] is None else msg["value"])
        msg["done"] = True


@effectful(type="latent_weight")
def latent_weight() -> float:
    """Return what the densities of latents are weighted by around this call."""
    return 1.0


class FlatPriors(Messenger):
    """Gives latents with improper priors, which cannot be drawn, values T(u) in all plates around.

    In unconstrained space u is zero, or a draw from a Cauchy distribution of a ``scale``.
    """

    def __init__(self, scale: float = 0.0) -> None:
        super().__init__()
        self.scale = scale

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if msg["value"] is None and isinstance(layers(fn)[-1], dist.ImproperUniform):
            fn = fn.expand(torch.broadcast_shapes(outer_shape(), fn.batch_shape))
            transform = biject_to(fn.support)
            value = at_zero(fn, transform)
            if self.scale:
                value = transform(self.scale * torch.zeros_like(transform.inv(value)).cauchy_())
            msg["value"], msg["done"] = value, True


class Leaves(Messenger):
    """Makes the values of some latents leaves of the graph, and notes the distributions.

    The outermost handler: traces record what it gives.
    """

    def __init__(self, names: Container[str]) -> None:
        super().__init__()
        self.names, self.values, self.fns = names, dict[str, Tensor](), dict[str, Any]()

    def _pyro_post_sample(self, msg: Any) -> None:
        self.fns[msg["name"]] = msg["fn"]  # nothing inside a `poutine.block` arrives here
        if msg["name"] in self.names and not msg["is_observed"]:
            leaf = msg["value"].detach().clone()
            self.values[msg["name"]] = leaf.requires_grad_(leaf.is_floating_point())
            msg["value"] = leaf.clone()  # which a model may write to


class SubstituteByName(Messenger):
    """Gives sites, subsample sites too, values by name.

    A site that has a value, such as an explicit ``subsample``, keeps it without ``override``.
    """

    def __init__(self, values: Mapping[str, Tensor], override: bool = False) -> None:
        super().__init__()
        self.values, self.override = values, override

    def _pyro_sample(self, msg: Any) -> None:
        is_free = self.override or msg["value"] is None
        if is_free and msg["name"] in self.values and not msg["is_observed"]:
            msg["value"], msg["done"] = self.values[msg["name"]], True
