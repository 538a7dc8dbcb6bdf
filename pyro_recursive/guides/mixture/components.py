"""Any guide as a component of a mixture: a distribution over the packed vector of a group.

Guides of this package and Pyro's `AutoContinuous` have one; other guides, which sample the model's
own sites, are run again on the values at which a density is needed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pyro import poutine
from pyro.distributions import MaskedDistribution, TorchDistribution, constraints
from pyro.infer.autoguide import AutoContinuous
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_recursive.guides.amortized import AmortizedGuide
from pyro_recursive.guides.base import LatentGuide
from pyro_recursive.guides.call import GuideCall
from pyro_recursive.guides.marginals import kept_log_density
from pyro_recursive.guides.packing import LatentBlock, PackedSite, Values
from pyro_recursive.tracing.compatibility import check_angle, log_prob_of
from pyro_recursive.tracing.handlers import SubstituteByName
from pyro_recursive.tracing.masks import SUFFIX, without_events
from pyro_recursive.tracing.plates import outer_shape
from pyro_recursive.tracing.sites import JOINT, Site, is_delta, latent_sites, layers


def component_of(guide: Callable, latents: LatentBlock, call: GuideCall) -> Any:
    """Return a guide's distribution over a group: batch ``[*batch]``, event ``[D]``."""
    if isinstance(guide, LatentGuide):
        return guide.posterior(latents, call)
    if isinstance(guide, AutoContinuous):
        return _posterior_of(guide, latents, call)
    return RunGuide(guide, latents, call, outer_shape())


def _posterior_of(guide: AutoContinuous, latents: LatentBlock, call: GuideCall) -> Any:
    """Return an autoguide's posterior, if it packs the same sites."""
    names = [site["name"] for site in latent_sites(guide.prototype_trace)]
    expected = [slot.name for slot in latents.slots]
    if names != expected:
        raise ValueError(
            f"{type(guide).__name__} has one joint density over {names}, not {expected}. Make it "
            "of the mixture's model."
        )
    posterior = guide.get_posterior(*call.args, **call.kwargs)
    return posterior.expand([1] * latents.nesting) if latents.nesting else posterior


class RunGuide(TorchDistribution):
    """A guide that samples the model's own sites, as a distribution over their packed vector."""

    arg_constraints: ClassVar[dict] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self, guide: Callable, latents: LatentBlock, call: GuideCall, outer: tuple[int, ...]
    ) -> None:
        self.guide, self.latents, self.call, self.outer = guide, latents, call, outer
        rows = latents.expand_rows(torch.empty(*call.sizes(latents), 0)).shape[:-1]
        super().__init__(rows, torch.Size([latents.size]), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "RunGuide":
        """Return this guide: it draws for the plates around it."""
        return self

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Run the guide, and pack what it samples."""
        nodes = self._run({}).nodes
        names = [slot.name for slot in self.latents.slots]
        values = {name: nodes[name]["value"] for name in names}
        inside = {n: nodes[f"{n}{SUFFIX}"]["value"] for n in names if f"{n}{SUFFIX}" in nodes}
        latents = (
            self.latents if len(inside) == len(names) else self.call.block_of(self.latents, values)
        )
        return latents.pack(values, inside)

    def log_prob(self, value: Tensor, keep: Tensor | None = None) -> Tensor:
        """Run the guide on given values: ``[*batch, D]`` to ``[*batch]``; see `marginals`."""
        latents = self.call.block_at(self.latents, value)
        unconstrained = latents.unflatten(value)
        given = {f"{name}{SUFFIX}": u for name, u in unconstrained.items()}
        trace = self._run({**latents.unpack(value), **given})
        total = value.new_zeros(value.shape[:-1])
        for slot in latents.slots:
            site = trace.nodes.get(f"{slot.name}{SUFFIX}", trace.nodes[slot.name])
            each = log_prob_of(site, site["fn"])
            if site["name"] == slot.name:
                each = each + latents.log_volume_of(slot, unconstrained[slot.name])
            if keep is not None:
                each = torch.where(self._of_events(slot, keep), each, 0.0)
            total = total + latents.sum_inner(slot, each)
        return total

    def _of_events(self, slot: PackedSite, keep: Tensor) -> Tensor:
        """Return which events of a site are kept."""
        flags = self.latents.unflatten(keep)[slot.name]
        of_events = without_events(flags, len(slot.event_shape))
        if of_events is None:
            raise NotImplementedError(
                f"{self._component()} has one density for events of site '{slot.name}', which are "
                "masked in parts. Use AmortizedGuide."
            )
        return of_events

    def _run(self, values: Values) -> poutine.Trace:
        given = SubstituteByName({**self.call.fixed_values, **values})
        # Handlers outside see only parameters: the samples belong to the mixture.
        hidden = poutine.block(hide_types=["sample"])
        with hidden, poutine.trace() as traced, _Widen(self.outer), given:
            self.guide(*self.call.args, **self.call.kwargs)
        sampled = latent_sites(traced.trace)
        angles = {slot.name for slot in self.latents.slots if slot.is_angle}
        for site in sampled:
            self._check(site, traced.trace)
            if site["name"] in angles and not is_delta(site):
                check_angle(site)
        lacking = {slot.name for slot in self.latents.slots} - {site["name"] for site in sampled}
        if lacking:
            raise ValueError(f"{self._component()} does not sample {sorted(lacking)}.")
        return traced.trace

    def _check(self, site: Site, trace: poutine.Trace) -> None:
        name = site["name"]
        computed = is_delta(site) and f"{name}{SUFFIX}" not in trace.nodes
        if computed or (site["infer"].get("is_auxiliary") and not name.endswith(SUFFIX)):
            raise NotImplementedError(
                f"{self._component()} has no density at site '{name}'. Use AmortizedGuide."
            )
        masked = any(isinstance(layer, MaskedDistribution) for layer in layers(site["fn"]))
        if masked or site["mask"] is not None:
            raise NotImplementedError(
                f"{self._component()} masks site '{name}'. Leave out the mask."
            )

    def _component(self) -> str:
        return f"Component {getattr(self.guide, '__name__', type(self.guide).__name__)}"


@kept_log_density.register
def _run_guide(distribution: RunGuide, u: Tensor, keep: Tensor) -> Tensor:
    return distribution.log_prob(u, keep)


class _Widen(Messenger):
    """Expands sites over the plates around a guide that cannot see them."""

    def __init__(self, outer: tuple[int, ...]) -> None:
        super().__init__()
        self.outer = outer

    def _pyro_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg) and self.outer and not msg["done"]:
            shape = torch.broadcast_shapes(self.outer, msg["fn"].batch_shape)
            msg["fn"] = msg["fn"].expand(shape)


@dataclass(frozen=True)
class FreeGaussian:
    """A `tracing.protocols.FreeComponent`."""

    component: AmortizedGuide
    first: AmortizedGuide
    latents: LatentBlock
    rows: tuple[Any, ...]
    size: int
    starts_by_weights: bool

    def pack(self, trace: poutine.Trace) -> Tensor:
        """Return the latents of a trace, ``[particles, *rows, D]``."""
        draw = trace.nodes[self.latents.slots[0].name]["infer"].get(JOINT)
        packed = self.latents.pack_trace(trace.nodes) if draw is None else draw.vector
        sizes = (frame.size for frame in self.rows)
        return packed.reshape(-1, *sizes, self.size)

    def place(self, loc: Tensor, scale: Tensor) -> None:
        """Set locations and scales, ``[*rows, D]`` both."""
        self.component.restart(self.latents, loc, scale)

    def place_gaussian(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Set the member of the family near a Gaussian."""
        if self.latents.whitening is not None:
            loc, scale_tril = self.latents.whitening.gaussian(loc, scale_tril)
        self.component.set_gaussian(self.latents, loc, scale_tril)

    def scatter(self, widening: float) -> None:
        """Draw locations around the first component's, some of its scales away."""
        self.component.scatter(self.latents, self.first, widening)
