"""The ELBO of each row as a function of its variational parameters.

``elbo_i(params) = E[log p(x_i, z_i) - log q(z_i; params)]`` in nats, from isolated runs of the
model on the minibatch, with the user's scales and masks, and without the subsample scale.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_recursive.guides.call import GuideCall
from pyro_recursive.guides.packing import LatentBlock
from pyro_recursive.guides.placement import Placement
from pyro_recursive.guides.row_families import RowFamily
from pyro_recursive.tracing.compatibility import log_prob_of
from pyro_recursive.tracing.densities import weighted
from pyro_recursive.tracing.enumeration import EnumeratedModel, Marginal, marginalised
from pyro_recursive.tracing.handlers import KLWarmup, SubstituteByName
from pyro_recursive.tracing.isolation import SharedNoise, isolated
from pyro_recursive.tracing.plates import Particles, PlateLayout
from pyro_recursive.tracing.sites import (
    Site,
    SiteTable,
    latent_sites,
    nesting_of,
    plates_of,
    sites,
    subsample_scale,
    with_plate_sizes,
)

ESTIMATORS = ("stl", "pathwise")
DRAWS = "refinement_draws"  # the plate of the draws


@dataclass(frozen=True)
class LocalBound:
    """The ELBO of the rows of one call of a guide, by runs of the model on ``shared_noise``.

    ``nesting`` is how many dims the model's plates take and those around the guide, and
    ``latent_weight`` KL warm-up's factor of the latents' densities. The gradient leaves out the
    score of q (``"stl"``) or not (``"pathwise"``); with ``double_backward`` it has one itself.
    ``enumerated`` are latents of the model to sum out, known after the first run.
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
    enumerated: set[str] = field(default_factory=set)

    @cached_property
    def keep(self) -> Tensor | None:
        """The entries of the latents whose density counts, ``[*batch, D]``; None for all."""
        return self.latents.keep(self.call.kept)

    def noise(self, params: Tensor, draws: int, seed: int | None = None) -> Tensor:
        """Return standard normals ``[S, J, *batch, n]``; with a seed the same for all rows."""
        shape = (draws, self.family.parts)
        batch, n = params.shape[:-1], self.family.noise_dim
        if seed is None:
            return torch.randn(*shape, *batch, n, dtype=params.dtype, device=params.device)
        generator = torch.Generator("cpu").manual_seed(seed)  # whatever the default device
        same = torch.empty(*shape, *[1] * len(batch), n, dtype=params.dtype, device="cpu")
        return same.normal_(generator=generator).to(params.device).expand(*shape, *batch, n)

    def value(self, params: Tensor, noise: Tensor) -> Tensor:
        """Return the estimate for each row in nats, ``[*batch, P]`` to ``[*batch]``."""
        u, log_q = self.family.scored_draw(params, noise, self.keep)
        weights = self.family.log_weights(params).exp()
        return (weights * (self.log_joint(u) - self.latent_weight * log_q)).sum(1).mean(0)

    def gradient(self, params: Tensor, noise: Tensor, create_graph: bool = False) -> Tensor:
        """Return the gradient of each row's ELBO, ``[*batch, P]``.

        With ``create_graph`` it is itself a function of ``params`` and of the model's parameters.
        """
        with torch.enable_grad():
            if not (create_graph and params.requires_grad):
                params = params.detach().requires_grad_()
            path = params.view_as(params)
            if self.estimator == "pathwise":
                total = self.value(path, noise).sum()
            else:
                # Another view, which the derivative by ``path`` takes as constant.
                density = params.view_as(params) if create_graph else params.detach()
                u, weights = self.family.draw(path, noise), self.family.log_weights(path).exp()
                log_q = self.family.log_prob(density, u, self.keep)
                gains = self.log_joint(u) - self.latent_weight * log_q
                total = (weights * gains).sum() / len(u)
            return torch.autograd.grad(total, path, create_graph=create_graph)[0]

    def log_joint(self, u: Tensor) -> Tensor:
        """Return ``log p`` with Jacobians, ``[S, J, *batch, D]`` to ``[S, J, *batch]``.

        Sites outside the rows' plates count in equal parts.
        """
        batch, count = u.shape[2:-1], u.shape[0] * u.shape[1]
        width = max(self.nesting, len(batch))
        wide = u.reshape(count, *[1] * (width - len(batch)), *u.shape[2:])
        point = wide if count > 1 else u[0, 0]
        with isolated(noise=self.shared_noise, double_backward=self.double_backward):
            placement = Placement(self.latents, point)
            known = len(self.enumerated)
            trace = self._run(placement, count, width)
        if len(self.enumerated) > known:  # which this run has drawn
            return self.log_joint(u)
        if nesting_of(trace) > width + (count > 1):  # plates may depend on the arguments
            raise ValueError("The model has more plates than before. Make a new guide.")
        total = self._by_row(trace, batch, width, count)
        volume = placement.block.log_volume(point, self.call.kept)
        if self.latent_weight != 1:
            volume = self.latent_weight * volume
        return (total + volume.reshape(count, *batch)).reshape(u.shape[:-1])

    def _run(self, placement: Placement, count: int, width: int) -> poutine.Trace:
        given = self.call.fixed_values
        own = given.keys() | placement.slots.keys()
        model: Any = SubstituteByName(given)(self.model)
        if self.enumerated:
            model = EnumeratedModel(model, own, -width - 2)
        model = poutine.trace(placement(model))
        draws = pyro.plate(DRAWS, count, dim=-width - 1) if count > 1 else nullcontext()
        warmup = KLWarmup(self.latent_weight) if self.latent_weight != 1 else nullcontext()
        with draws, warmup:
            trace = with_plate_sizes(model.get_trace(*self.call.args, **self.call.kwargs))
        others = [site for site in latent_sites(trace) if site["name"] not in own]
        for site in others:
            if not site["infer"].get("enumerate"):
                raise NotImplementedError(
                    f"Latent site '{site['name']}' is not this guide's. Marginalise it."
                )
        self.enumerated.update(site["name"] for site in others)
        return trace

    def _by_row(self, trace: poutine.Trace, batch: torch.Size, width: int, count: int) -> Tensor:
        """Sum the log-densities of sites over all but draws and rows, ``[S J, *batch]``."""
        found = {name: f for site in sites(trace) for name, f in plates_of(site).items()}
        names = {frame.name for frame in self.latents.rows}
        rows = tuple(frame for name, frame in found.items() if name in names)
        layout = PlateLayout(Particles(1, count), width, rows)
        row_dims = {frame.dim for frame in rows}
        around = {dim for dim in range(-len(batch), 0) if batch[dim] != 1} | {-width - 1}
        around -= row_dims
        shape = (count, *[1] * (width - len(batch)), *batch)
        total: Tensor | float = 0.0
        for site, each in self._densities(trace, layout):
            _check_batch(site, each.shape, around, count)
            dims = range(-each.dim(), 0)
            if summed := [dim for dim in dims if dim not in around | row_dims]:
                each = each.sum(summed, keepdim=True)
            for frame in rows:
                if frame.name not in plates_of(site):  # beside the rows: without their scale, too
                    each = each / (frame.size * subsample_scale(frame))
            total = total + each
        return torch.as_tensor(total).expand(shape).reshape(count, *batch)

    def _densities(
        self, trace: poutine.Trace, layout: PlateLayout
    ) -> Iterator[tuple[Site, Tensor]]:
        """Yield sites and their weighted log-densities, one for all that are summed together."""
        own = sites(trace)
        if self.enumerated:
            ordinary, marginals = marginalised(SiteTable(trace, poutine.Trace()), layout)
            _check_parts(marginals, self.family, {frame.name for frame in self.latents.rows})
            own = [record.site for record in ordinary]
            yield from ((marginal.site, marginal.log_prob) for marginal in marginals)
        for site in own:
            yield site, weighted(log_prob_of(site, site["fn"]), site, layout)


def _check_parts(marginals: list[Marginal], family: RowFamily, rows: set[str]) -> None:
    """Raise where a sum over the rows is met by mixtures, whose rows choose parts independently."""
    for marginal in marginals:
        if family.parts > 1 and (across := marginal.reached & rows):
            raise NotImplementedError(
                f"Sites {', '.join(map(repr, sorted(marginal.names)))} are summed together across "
                f"the rows of plate '{min(across)}', which a mixture draws apart. Refine a guide "
                "of one component, or sample the enumerated site in the guide."
            )


def _check_batch(site: Site, shape: torch.Size, around: set[int], count: int) -> None:
    """Raise where a batch dim belongs to no plate of the site, nor to those around the model."""
    dims = around | {frame.dim for frame in site["cond_indep_stack"]}
    if count == 1:
        dims.discard(min(around))  # that of the draws
    for dim in range(-len(shape), 0):
        if shape[dim] != 1 and dim not in dims:
            raise ValueError(
                f"Site '{site['name']}' has batch shape {tuple(shape)} in refinement, and dim "
                f"{dim} has no plate. Use keepdim=True or draws=1."
            )
