"""The ELBO of each row as a function of the numbers that its distribution is made of.

``elbo_i(numbers) = E[log p(x_i, z_i) - log q(z_i; numbers)]`` in nats, from runs of the model that
nobody notices, with the rows of the minibatch, the user's scales and masks, and without the
subsample scale: rows do not know how many they are.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_recursive.guides.base import GuideCall
from pyro_recursive.guides.packing import LatentBlock, Values
from pyro_recursive.guides.row_families import RowFamily
from pyro_recursive.tracing.densities import log_prob_of, weighted
from pyro_recursive.tracing.handlers import KLWarmup, SubstituteByName
from pyro_recursive.tracing.isolation import SharedNoise, isolated
from pyro_recursive.tracing.plates import Particles, PlateLayout
from pyro_recursive.tracing.sites import Site, nesting_of, plates_of, sites, subsample_scale

__all__ = ["ESTIMATORS", "LocalBound"]

ESTIMATORS = ("stl", "pathwise")
DRAWS = "refinement_draws"  # the plate of the draws


@dataclass(frozen=True)
class LocalBound:
    """The ELBO of the rows of one call of a guide.

    Arguments:
        model: the model.
        latents, call: the group of latents, and the call with its plates and what it has sampled.
        family: the distributions that a row may have.
        nesting: how many dims the model's plates take, and the plates around the guide.
        latent_weight: what KL warm-up multiplies the latents' densities with.
        estimator: of the gradient, ``"stl"`` without the score of q, whose mean is zero: exact
            where q is the posterior; or ``"pathwise"``.
        shared_noise: the random numbers of all runs of the model.
        double_backward: whether gradients are differentiated again.
    """

    model: Callable
    latents: LatentBlock
    call: GuideCall
    family: RowFamily
    nesting: int
    latent_weight: float = 1.0
    estimator: str = "stl"
    shared_noise: SharedNoise = field(default_factory=SharedNoise)
    double_backward: bool = False

    def noise(self, numbers: Tensor, draws: int, seed: int | None = None) -> Tensor:
        """Return standard normals ``[S, J, *batch, n]``; with a seed the same for all rows."""
        shape = (draws, self.family.parts)
        batch, n = numbers.shape[:-1], self.family.noise_dim
        if seed is None:
            return torch.randn(*shape, *batch, n, dtype=numbers.dtype, device=numbers.device)
        # By the CPU's generator, whatever the default device.
        options: dict[str, Any] = {"dtype": numbers.dtype, "device": "cpu"}
        generator = torch.Generator("cpu").manual_seed(seed)
        same = torch.randn(*shape, *[1] * len(batch), n, generator=generator, **options)
        return same.to(numbers.device).expand(*shape, *batch, n)

    def value(self, numbers: Tensor, noise: Tensor) -> Tensor:
        """Return the estimate for each row in nats, ``[*batch, P]`` to ``[*batch]``."""
        u, log_q = self.family.scored_draw(numbers, noise)
        weights = self.family.log_weights(numbers).exp()
        return (weights * (self.log_joint(u) - self.latent_weight * log_q)).sum(1).mean(0)

    def gradient(self, numbers: Tensor, noise: Tensor, create_graph: bool = False) -> Tensor:
        """Return the derivative of each row's ELBO by its numbers, ``[*batch, P]``.

        With ``create_graph`` it is itself a function of the numbers and of the model's parameters.
        """
        with torch.enable_grad():
            if not (create_graph and numbers.requires_grad):
                numbers = numbers.detach().requires_grad_()
            path = numbers.view_as(numbers)
            if self.estimator == "pathwise":
                total = self.value(path, noise).sum()
            else:
                # Another view of the numbers: the derivative along the path takes it as constant.
                density = numbers.view_as(numbers) if create_graph else numbers.detach()
                u, weights = self.family.draw(path, noise), self.family.log_weights(path).exp()
                gains = self.log_joint(u) - self.latent_weight * self.family.log_prob(density, u)
                total = (weights * gains).sum() / len(u)
            return torch.autograd.grad(total, path, create_graph=create_graph)[0]

    def log_joint(self, u: Tensor) -> Tensor:
        """Return ``log p`` with Jacobians, ``[S, J, *batch, D]`` to ``[S, J, *batch]``.

        Sites outside the rows' plates count in equal parts.
        """
        batch = u.shape[2:-1]
        width = max(self.nesting, len(batch))
        count = u.shape[0] * u.shape[1]
        wide = u.reshape(count, *[1] * (width - len(batch)), *u.shape[2:])
        point = wide if count > 1 else u[0, 0]
        with isolated(noise=self.shared_noise, double_backward=self.double_backward):
            trace = self._run(self.latents.unpack(point), count, width)
        found = nesting_of(trace)  # plates may depend on the arguments
        if found > width + (count > 1):
            raise ValueError(
                f"The model's plates take {found} dims, and took {self.nesting} when the guide "
                "first saw it. Make a new guide for a model of another form."
            )
        total = self._by_row(trace, batch, width, count)
        volume = self.latents.log_volume(point)
        if self.latent_weight != 1:
            volume = self.latent_weight * volume
        return (total + volume.reshape(count, *batch)).reshape(u.shape[:-1])

    def _run(self, values: Values, count: int, width: int) -> poutine.Trace:
        given = {name: plate.indices for name, plate in self.call.plates.items()}
        given = {**given, **self.call.given, **values}
        model = poutine.trace(SubstituteByName(given)(self.model))
        with _draws_plate(count, -width - 1), _warmup(self.latent_weight):
            trace = model.get_trace(*self.call.args, **self.call.kwargs)
        _check_latents(trace, given)
        return trace

    def _by_row(self, trace: poutine.Trace, batch: torch.Size, width: int, count: int) -> Tensor:
        """Sum the log-densities of sites over all but draws and rows, ``[S J, *batch]``."""
        rows = _frames(trace, {frame.name for frame in self.latents.rows})
        layout = PlateLayout(Particles(1, count), width, rows)
        around = {dim for dim in range(-len(batch), 0) if batch[dim] != 1} | {-width - 1}
        around -= {frame.dim for frame in rows}
        kept = around | {frame.dim for frame in rows}
        shape = (count, *[1] * (width - len(batch)), *batch)
        total: Tensor | float = 0.0
        for site in sites(trace):
            log_prob = weighted(log_prob_of(site, site["fn"]), site, layout)
            _check_batch(site, log_prob.shape, around, count)
            summed = [dim for dim in range(-log_prob.dim(), 0) if dim not in kept]
            each = log_prob.sum(summed, keepdim=True) if summed else log_prob
            for frame in rows:
                if frame.name not in plates_of(site):  # beside the rows: without their scale, too
                    each = each / (frame.size * subsample_scale(frame))
            total = total + each
        return torch.as_tensor(total).expand(shape).reshape(count, *batch)


def _frames(trace: poutine.Trace, names: set[str]) -> tuple[Any, ...]:
    """Return the frames of some plates in a trace."""
    found = {name: frame for site in sites(trace) for name, frame in plates_of(site).items()}
    return tuple(frame for name, frame in found.items() if name in names)


@contextmanager
def _draws_plate(count: int, dim: int) -> Iterator[None]:
    with ExitStack() as stack:
        if count > 1:
            stack.enter_context(pyro.plate(DRAWS, count, dim=dim))
        yield


@contextmanager
def _warmup(weight: float) -> Iterator[None]:
    with ExitStack() as stack:
        if weight != 1:
            stack.enter_context(KLWarmup(weight))
        yield


def _check_batch(site: Site, shape: torch.Size, around: set[int], count: int) -> None:
    """Raise where a batch dim belongs to no plate of the site, nor to those around the model."""
    dims = around | {frame.dim for frame in site["cond_indep_stack"]}
    if count == 1:
        dims.discard(min(around))  # that of the draws
    for dim in range(-len(shape), 0):
        if shape[dim] != 1 and dim not in dims:
            raise ValueError(
                f"Site '{site['name']}' has batch shape {tuple(shape)} where the rows are refined, "
                f"and dim {dim} belongs to no plate. Put the site inside a pyro.plate, or use "
                ".to_event(...) on its distribution. Several draws, those of a mixture's "
                "components too, are one more plate on the left: keep the dims of plates where "
                "you sum over them (z.sum(-1, keepdim=True)), or use draws=1."
            )


def _check_latents(trace: poutine.Trace, given: Mapping[str, Tensor]) -> None:
    for site in sites(trace):
        if not site["is_observed"] and site["name"] not in given:
            raise NotImplementedError(
                f"Latent site '{site['name']}' is not this guide's, so that its rows have no ELBO "
                "to climb. Marginalise it in the model, or leave the rows to their encoder."
            )
