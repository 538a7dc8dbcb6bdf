"""What runs of the model show of a guide's latents in a call: which are absent, and their masks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_recursive.guides.call import GuideCall
from pyro_recursive.guides.packing import LatentBlock, Values
from pyro_recursive.guides.placement import Placement
from pyro_recursive.tracing.handlers import SubstituteByName
from pyro_recursive.tracing.isolation import SharedNoise, isolated, outline, outside_of_graphs
from pyro_recursive.tracing.masks import (
    differentiable,
    is_unused,
    on_leaves,
    partly_masked,
    unused_latents,
)
from pyro_recursive.tracing.program import form_of
from pyro_recursive.tracing.sites import Site, latent_sites, mask_of


@dataclass
class LatentsInCalls:
    """Which latents of a guide calls lack, by the form of their arguments; whether any is masked.

    An absent latent is no latent of the model in that call: it may be a label that is given.
    """

    absent: dict[Any, frozenset[str]] = field(default_factory=dict)
    are_masked: bool = False

    @classmethod
    def seen(cls, trace: poutine.Trace, args: tuple, kwargs: dict[str, Any]) -> "LatentsInCalls":
        """Return what the run of the guide's first call shows."""
        return cls({(form_of(args), form_of(kwargs)): frozenset()}, _are_masked(trace))

    def absent_in(self, guide: Any, args: tuple, kwargs: dict[str, Any]) -> frozenset[str]:
        """Return the absent latents of a call; one run of the model for each form of arguments.

        Latents that the guide lacks may be data to predict: losses refuse them.
        """
        form = form_of(args), form_of(kwargs)
        if form not in self.absent:
            own = {slot.name for latents in guide.groups for slot in latents.slots}
            model = guide.served_model()
            try:
                trace = outline(model, args, kwargs)
                self.are_masked |= _are_masked(trace)
                absent = own - {site["name"] for site in sampled_latents(trace)}
            except torch.OutOfMemoryError:
                raise
            except Exception:  # the model raises by itself, if it is called so
                return frozenset()
            if absent and not guide.has_marginals:
                raise ValueError(
                    f"Sites {sorted(absent)} are observed or absent in this call, and "
                    f"{type(guide).__name__} always samples them. Use an AmortizedGuide."
                )
            self.absent[form] = frozenset(absent)
        return self.absent[form]


def sampled_latents(trace: poutine.Trace) -> list[Site]:
    """Return the latent sites of a model that a guide samples."""
    return [site for site in latent_sites(trace) if not site["infer"].get("enumerate")]


def _are_masked(trace: poutine.Trace) -> bool:
    return any(mask_of(site) is not None for site in latent_sites(trace))


def read_masks(groups: Sequence[LatentBlock], call: GuideCall, like: Tensor) -> None:
    """Set the masks of a call, and the entries of its latents that keep their densities.

    One run of the model at random coordinates, and a second where a mask leaves entries out.
    ``like`` has the dtype and device of the latents.
    """
    assert call.model is not None
    model, noise = call.model(), SharedNoise()
    slots = {slot.name: slot for latents in groups for slot in latents.slots}

    def run(values: Values, placements: Sequence[Placement] = ()) -> poutine.Trace:
        handled = SubstituteByName({**fixed, **values})(model)
        for placement in placements:
            handled = placement(handled)
        return poutine.trace(handled).get_trace(*args, **kwargs)

    def random(latents: LatentBlock) -> Tensor:
        rows = like.new_empty(*call.sizes(latents), latents.size)
        return 0.1 * torch.randn_like(latents.expand_rows(rows))

    with isolated(), torch.no_grad(), pyro.validation_enabled(False), torch.inference_mode(False):
        fixed = differentiable(dict(call.fixed_values))
        args, kwargs = differentiable(call.args), differentiable(call.kwargs)
        placements = [Placement(latents, random(latents)) for latents in groups]
        second = [random(latents) for latents in groups]
        trace, leaves = on_leaves(lambda: run({}, placements), slots.keys(), noise)
        sites = {s["name"]: s for s in latent_sites(trace) if s["name"] in slots}
        call.masks = {name: m for name, site in sites.items() if (m := mask_of(site)) is not None}
        partly = partly_masked(call.masks)
        if not partly:
            return
        values: Values = {}
        for placement, u in zip(placements, second, strict=True):
            values |= placement.latents.with_slots(placement.slots.values()).unpack(u)
        with outside_of_graphs(*call.masks.values()), isolated(noise=noise):
            unused = unused_latents(trace, leaves, values, run)
    for name in partly:
        if is_unused(name, unused):
            call.kept[name] = slots[name].flags(call.masks[name], sites[name]["value"].shape)
